"""Pictures of a learned clock beside its grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np

from art_edm.grids.grid import Grid
from art_edm.grids.plots import _draw_grids, _figure, _save
from art_edm.learning.distill import LearnedClock

__all__ = ["plot_run"]


def plot_run(path: Path, title: str, grids: Dict[str, Grid], learned: Optional[LearnedClock]) -> None:
    """The learned clock and its speed with quartiles and 99 % band (the paper's Figures 4, 5, 8), and the grids.

    Args:
        grids: hand-made rules, then the learned grid under its own name.
        learned: None for the direct method, which has no spread to show.
    """
    figure, axes = _figure(14 if learned else 6, 3 if learned else 1)
    figure.suptitle(title)
    if learned:
        _draw_clock(axes[0], learned)
        _draw_speed(axes[1], learned)
    _draw_grids(axes[-1], grids)
    axes[-1].set_title("grids")
    _save(figure, path)


def _band(axes: Any, t: np.ndarray, quantiles: np.ndarray, mean: np.ndarray, label: str) -> None:
    low, first, third, high = quantiles
    axes.fill_between(t, low, high, color="tab:red", alpha=0.15, linewidth=0, label="central 99 %")
    axes.fill_between(t, first, third, color="tab:red", alpha=0.35, linewidth=0, label="quartiles")
    axes.plot(t, mean, color="tab:red", label=label)
    axes.set(xlabel="sampling clock t / T", yscale="log")
    axes.legend()


def _draw_clock(axes: Any, learned: LearnedClock) -> None:
    """sigma = T - psi(t): on psi's own axis all of sampling would hide in the last per mille."""
    tau = np.linspace(0, 1, len(learned.mean))[:-1]  # sigma is 0 at the end
    _band(axes, tau, learned.clock.sigma(learned.spread[:, :-1]), learned.clock.sigma(learned.mean[:-1]), "mean")
    axes.set(ylabel="$\\sigma = T - \\psi(t)$")
    axes.set_title("learned clock")


def _draw_speed(axes: Any, learned: LearnedClock) -> None:
    steps = len(learned.mean) - 1
    mean = -np.diff(learned.clock.sigma(learned.mean)) * steps / learned.clock.sigma_max
    _band(axes, (np.arange(steps) + 0.5) / steps, np.maximum(learned.theta, mean.min() / 10), mean, "of the mean clock")
    axes.set(ylabel="speed $\\theta = d\\psi/dt$")
    axes.set_title("control")
