"""From a policy to a grid: the time-only clock that its trajectories follow on average.

Symbols
-------
s       base-clock fraction along a rollout, [N + 1, M] over times and the last M trajectories
tau     time as a fraction, k / N
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.interpolate import PchipInterpolator

from art_edm.grids.clocks import Clock
from art_edm.grids.grid import Grid

__all__ = ["LearnedClock", "distill"]

QUANTILES = (0.005, 0.25, 0.75, 0.995)  # the central 99 % and the quartiles
MIN_STEP = 1e-6  # least advance of s in one training step: a clock never stands still


class LearnedClock(NamedTuple):
    """s(tau) of a run in its base clock, and how far its trajectories spread around it."""

    clock: Clock
    mean: np.ndarray  # [N + 1]
    spread: np.ndarray  # 0.5, 25, 75 and 99.5 % quantiles of s, [4, N + 1]
    theta: np.ndarray  # the same quantiles of theta = dpsi/dt of each step, [4, N]

    def sigma(self, tau: np.ndarray) -> np.ndarray:
        """Noise levels at times tau, by a monotone cubic through the mean in the base clock."""
        path = PchipInterpolator(np.linspace(0, 1, len(self.mean)), self.mean)
        return self.clock.sigma(path(tau))

    def grid(self, num_steps: int) -> Grid:
        """The grid of K = num_steps: the clock read off at K + 1 equally spaced times."""
        inner = self.sigma(np.arange(1, num_steps) / num_steps)
        return Grid(np.concatenate([[self.clock.sigma_max], inner, [0.0]]))


def distill(paths: np.ndarray, clock: Clock) -> LearnedClock:
    """Average rollouts into a time-only clock.

    Each path is rescaled to end at s = 1 (psi = T) exactly; the mean is made strictly increasing.
    Averaging s and not sigma keeps exploration noise from biasing the last, smallest noise levels.

    Args:
        paths: s [N + 1, M] of the last M trajectories.
        clock: the base clock of s.
    """
    arrived = paths[:, paths[-1] > 0.5]  # a path that is not even half way says nothing about arriving
    kept = arrived if arrived.size else paths
    scaled = (kept / kept[-1]).clip(0, 1)
    steps = np.maximum(np.diff(np.maximum.accumulate(scaled.mean(axis=1))), MIN_STEP)
    mean = np.concatenate([[0.0], np.cumsum(steps)])
    mean /= mean[-1]
    mean[-1] = 1.0
    theta = -np.diff(clock.sigma(scaled), axis=0) * len(steps) / clock.sigma_max  # [N, M]
    return LearnedClock(clock, mean, *(np.quantile(values, QUANTILES, axis=1) for values in (scaled, theta)))
