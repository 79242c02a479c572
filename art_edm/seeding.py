"""Random numbers that depend on (seed, index) alone, not on order, batching or what was drawn before."""

from __future__ import annotations

import torch

__all__ = ["seeded_generator"]

_GOLDEN = 0x9E3779B1  # odd, about 2^32 / 1.618: multiples of it are far apart modulo 2^32


def seeded_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of item `index` in a run with `seed`; for seed 0 simply those of `index`.

    torch's generator on the CPU uses the lowest 32 bits of its seed only, so both must be mixed into these.
    """
    return torch.Generator().manual_seed((seed * _GOLDEN + index) % 2**32)
