"""Pixels from the latents that EDM2's networks make: their pickles carry what decodes them, Stable Diffusion's VAE.

The decoding is upstream's own class, of a version that is known; its VAE is stabilityai/sd-vae-ft-mse by the package
diffusers (an extra: pip install diffusers), which downloads it once from huggingface.co.
"""

from __future__ import annotations

from typing import Callable, Optional

import torch

from art_edm.models.loading import Network

__all__ = ["Decode", "decoder_of"]

Decode = Callable[[torch.Tensor], torch.Tensor]
_AT_ONCE = 8  # images; the VAE needs a few GB for these


def decoder_of(network: Network) -> Optional[Decode]:
    """Latents [b, C, H, W] -> pixels uint8 [b, 3, 8 H, 8 W]; None for a network that makes pixels itself.

    Raises a ValueError if nothing decodes them, or if it needs a package that is not there.
    """
    channels, height, width = network.denoiser.img_shape
    if channels in (1, 3):
        return None
    if network.encoder is None:
        raise ValueError(f"{network.name} makes latents of {channels}x{height}x{width} and has no decoder, expected "
                         "images of 1 or 3 channels or a pickle of EDM2; make images elsewhere and use fid.py compare")
    made = network.encoder.realise()
    try:
        made.init(network.denoiser.device)
    except ImportError as error:
        need = error.name
        raise ValueError(f"{network.name} makes latents, and decoding them needs {need}; pip install {need}") from None

    @torch.inference_mode()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([made.decode(part.float()) for part in latents.split(_AT_ONCE)])

    return decode
