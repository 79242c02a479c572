"""Pictures of a run and of a grid; the only module that needs matplotlib, and only when called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np

from .distill import LearnedClock
from .files import atomic_write
from .grid import Grid

__all__ = ["check_plotting", "plot_grid", "plot_run"]

TITLES = {"edm": "edm (Karras)"}
COLORS = {"uniform": "0.75", "dpm": "tab:green", "edm": "tab:blue", "edm-unpinned": "tab:cyan"}


def check_plotting() -> None:
    """Raises a ValueError that says what to install when matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed; pip install 'art_edm[plot]'") from None


def _figure(width: float, columns: int) -> "tuple[Any, List[Any]]":
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, columns)))


def _save(figure: Any, path: Path) -> None:
    kind = path.suffix[1:] or "png"
    atomic_write(path, lambda file: figure.savefig(file, format=kind, dpi=150))


def _draw_grids(axes: Any, grids: Dict[str, Grid]) -> None:
    """Positive noise levels over the step; the last name is the grid in question, drawn on top."""
    for name, grid in grids.items():
        main = name not in COLORS
        axes.plot(
            grid.values[:-1], "o-" if main else ".-", color="tab:red" if main else COLORS[name],
            markersize=4, linewidth=1.8 if main else 1, label=TITLES.get(name, name),
        )
    axes.set(xlabel="step i (the final 0 is not drawn)", ylabel="noise level $\\sigma_i$", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()


def plot_grid(path: Path, grids: Dict[str, Grid]) -> None:
    """A grid beside the rules of the same number of steps, on a log axis."""
    figure, (axes,) = _figure(6, 1)
    _draw_grids(axes, grids)
    _save(figure, path)


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
