"""Pictures of a run and of a grid; the only module that needs matplotlib, and only when called."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List

import numpy as np

from art_edm.grids.grid import Grid
from art_edm.runtime.files import atomic_write

__all__ = ["check_plotting", "plot_grid"]

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
