"""Images of networks that make latents: EDM2's pickles carry what decodes them.

Symbols
-------
decode    latents [b, C, H, W] -> pixels uint8 [b, 3, 8 H, 8 W] (of EDM2's RGB encoder: of the same size)
"""

from __future__ import annotations

from typing import Optional

import torch

from art_edm.compare.accumulators import Decode
from art_edm.pickles.network import load_network_pickle
from paper.context import Lab

__all__ = ["decoder_of"]

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
