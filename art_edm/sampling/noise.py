"""Random numbers that depend on (seed, index) alone, not on order, batching or what was drawn before."""

from __future__ import annotations

from typing import Optional, Sequence, Tuple

import torch

from art_edm.models.denoiser import Denoiser

__all__ = ["latents", "noise_and_labels", "seeded_generator"]

_GOLDEN = 0x9E3779B1  # odd, about 2^32 / 1.618: multiples of it are far apart modulo 2^32


def seeded_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of item `index` in a run with `seed`; for seed 0 simply those of `index`.

    torch's generator on the CPU uses the lowest 32 bits of its seed only, so both must be mixed into these.
    """
    return torch.Generator().manual_seed((seed * _GOLDEN + index) % 2**32)


def latents(seed: int, indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Unit noise [len(indices), C, H, W]; each image's own. Seed 0: EDM's --seeds=indices on a CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=seeded_generator(seed, i)) for i in indices])


def noise_and_labels(
    denoiser: Denoiser, seed: int, indices: Sequence[int]
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Unit noise [B, C, H, W] and labels [B, label_dim] (None if unconditional), on the denoiser's device.

    Each image has its own generator, which draws the noise and then the label, as upstream's scripts do.
    """
    noises, labels = [], []
    for index in indices:
        generator = seeded_generator(seed, index)
        noises.append(torch.randn(denoiser.img_shape, generator=generator))
        labels.append(denoiser.draw_labels(1, generator))
    stacked = None if denoiser.label_dim == 0 else torch.cat(labels)
    return torch.stack(noises).to(denoiser.device), stacked
