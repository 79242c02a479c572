"""Means of seed blocks and differences between two methods, with their standard errors.

Symbols
-------
values      one number per block, [b]
left_out    the number without each group of images in turn, [g] (delete-a-group jackknife); of a single block
paired      value i of both methods has what they share: the seeds of block i, or the images left out

A standard error is one standard deviation of what it stands beside, as estimated: from few blocks, a rough one.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence

import numpy as np

__all__ = ["Measurement", "difference", "groups_of", "jackknife"]

GROUPS = 20


class Measurement(NamedTuple):
    """A number, measured in blocks."""

    values: Sequence[float]
    left_out: Sequence[float] = ()

    @property
    def mean(self) -> float:
        """Over the blocks."""
        return float(np.mean(self.values))

    @property
    def minimum(self) -> float:
        """Over the blocks, as the papers' tables give it."""
        return float(np.min(self.values))

    @property
    def stderr(self) -> Optional[float]:
        """Of the mean; None if there is neither a second block nor a jackknife."""
        if len(self.values) > 1:
            return float(np.std(self.values, ddof=1) / np.sqrt(len(self.values)))
        return jackknife(self.left_out) if len(self.left_out) else None

    @property
    def basis(self) -> Optional[str]:
        """Where the standard error comes from."""
        if len(self.values) > 1:
            return f"{len(self.values)} blocks"
        return f"jackknife of {len(self.left_out)} groups" if len(self.left_out) else None


class Difference(NamedTuple):
    """One measurement less another."""

    value: float
    stderr: Optional[float]
    basis: Optional[str]

    def images_needed(self, images: int) -> Optional[int]:
        """How many images of each would make the difference two standard errors large, which `images` gave `stderr`.

        The variance falls as 1 / number; None where it is not known or the difference is 0.
        """
        if self.stderr is None or self.value == 0:
            return None
        return math.ceil(images * (2 * self.stderr / self.value) ** 2)


def jackknife(left_out: Sequence[float]) -> float:
    """Standard error from the values without each of g groups: (g - 1)/g sum (f_j - mean f)^2, square root of it."""
    spread = np.asarray(left_out) - np.mean(left_out)
    return float(np.sqrt((len(spread) - 1) / len(spread) * np.square(spread).sum()))


def difference(one: Measurement, base: Measurement, paired: bool) -> Difference:
    """`one` less `base`.

    Args:
        paired: their blocks (or groups) share the seeds; what these do to both then cancels.
    """
    value = one.mean - base.mean
    if paired and len(one.values) == len(base.values) > 1:
        differences = Measurement(np.subtract(one.values, base.values))
        return Difference(value, differences.stderr, f"paired over {len(one.values)} blocks")
    if paired and len(one.left_out) == len(base.left_out) > 0:
        stderr = jackknife(np.subtract(one.left_out, base.left_out))
        return Difference(value, stderr, f"paired jackknife of {len(one.left_out)} groups")
    if one.stderr is None or base.stderr is None:
        return Difference(value, None, None)
    return Difference(value, float(np.hypot(one.stderr, base.stderr)), "independent")


def groups_of(count: int, groups: int = GROUPS) -> np.ndarray:
    """Group of each of `count` images, [count]: every `groups`-th image is in the same one."""
    return np.arange(count) % groups
