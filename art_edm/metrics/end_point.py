"""End-point error: how far a solver ends from the exact solution of the same noise.

Symbols
-------
r     RMS over pixels between two end points from the same noise, [M] over M noises, in units of x
rms   root of the mean of r^2 over noises; a few paths that end on another image can dominate it
mean  mean of r over noises
"""

from __future__ import annotations

from typing import NamedTuple, Optional

import numpy as np

__all__ = ["EndPointError", "better", "end_point_error"]

GEOMETRIC_FLOOR = 0.01  # of the mean error: what is less counts as this much in a geometric mean
TINY = 1e-300


class EndPointError(NamedTuple):
    """Statistics of r; each standard error is None for a single noise."""

    rms: float
    rms_stderr: Optional[float]
    mean: float
    mean_stderr: Optional[float]
    median: float

    @classmethod
    def of(cls, r: np.ndarray) -> "EndPointError":
        """The statistics of r [M]; the standard error of the RMS is by the delta method."""
        square = np.square(r)
        rms, mean, median, errors = float(np.sqrt(square.mean())), float(r.mean()), float(np.median(r)), (None, None)
        if len(r) > 1:
            of_square, of_mean = (float(each.std(ddof=1)) / len(r) ** 0.5 for each in (square, r))
            errors = (of_square / (2 * rms) if rms > 0 else 0.0), of_mean
        return cls(rms, errors[0], mean, errors[1], median)


def end_point_error(ends: np.ndarray, exact: np.ndarray) -> EndPointError:
    """The statistics of end points [M, d] against those of a fine solution from the same noises [M, d]."""
    return EndPointError.of(np.sqrt(np.square(ends - exact).mean(axis=1)))


def better(before: np.ndarray, after: np.ndarray) -> bool:
    """Whether errors [M] are less in mean and geometric mean, and not more in the mean square.

    The mean square is what few paths that end on another image can decide, the geometric mean what most noises do.
    """
    floor = GEOMETRIC_FLOOR * before.mean() + TINY
    logarithm = lambda errors: np.log(np.maximum(errors, floor)).mean()
    squares = np.square(after).mean() <= np.square(before).mean()
    return bool(after.mean() < before.mean() and logarithm(after) < logarithm(before) and squares)
