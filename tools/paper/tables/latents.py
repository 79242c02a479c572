"""Images of networks that make latents: EDM2's pickles carry what decodes them.

Symbols
-------
decode    latents [b, C, H, W] -> pixels uint8 [b, 3, 8 H, 8 W] (of EDM2's RGB encoder: of the same size)
"""

from __future__ import annotations

from typing import Callable, Dict, Optional

import numpy as np
import torch

from art_edm.compare.accumulators import FeatureTally
from art_edm.compare.sample_cache import Samples, Work, entry
from art_edm.metrics.detectors import Detector
from art_edm.pickles.network import load_network_pickle
from paper.context import Lab

__all__ = ["Decode", "decoder_of", "latent_features"]

Decode = Callable[[torch.Tensor], torch.Tensor]
_AT_ONCE = 8  # images; the VAE needs a few GB for these


def decoder_of(name: str, lab: Lab) -> Optional[Decode]:
    """What turns samples of this EDM2 pickle into pixels; None for a network that makes pixels itself.

    Raises a ValueError if it needs a package that is not there.
    """
    path = lab.file(name)
    if path is None or not name.startswith("edm2-"):
        return None
    encoder = load_network_pickle(path, lab.trust).encoder
    if encoder is None:
        return None
    made = encoder.realise()
    try:
        made.init(lab.device)
    except ImportError as error:
        need = error.name
        raise ValueError(f"{name} makes latents, and decoding them needs {need}; pip install {need}") from None

    @torch.inference_mode()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([made.decode(part.float()) for part in latents.split(_AT_ONCE)])

    return decode


class _Decoded(FeatureTally):
    """Features of decoded images."""

    decode: Decode

    def _add(self, indices: range, images: torch.Tensor) -> None:
        pixels = self.decode(images)
        super()._add(indices, (pixels.double() - 127.5) / 127.5)  # which rounds to these pixels


def latent_features(
    samples: Samples, detector: Detector, work: Work, decode: Decode, splits: int = 0
) -> Optional[Dict[str, np.ndarray]]:
    """As `experiment.features`, of decoded images."""

    def make() -> FeatureTally:
        tally = _Decoded(samples.first, samples.num, detector, samples.network.denoiser.device, splits)
        tally.decode = decode
        return tally

    kind = {"kind": "features of decoded images", "detector": detector.sha256, "splits": splits}
    return entry(samples, kind, make, work)
