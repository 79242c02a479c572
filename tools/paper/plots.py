"""Pictures of results; matplotlib is needed only when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple

import numpy as np

from art_edm.grids.grid import Grid
from art_edm.grids.plots import check_plotting
from art_edm.runtime.files import atomic_write
from paper.kept_runs import Run
from paper.report import Result

__all__ = ["plot_clock", "plot_grids", "plot_lines", "plot_overview", "plot_sheets"]

COLORS = {"uniform": "0.6", "dpm": "tab:green", "edm": "tab:blue", "art_rl": "tab:red", "art_rl_once": "tab:orange",
          "art_rl_own": "tab:orange", "direct": "tab:purple", "limit": "black"}
MARKERS = {"uniform": "v", "dpm": "^", "edm": "s", "art_rl": "o", "art_rl_own": "D"}


def _figure(width: float, height: float, rows: int = 1, columns: int = 1) -> Tuple[Any, List[Any]]:
    check_plotting()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(np.ravel(figure.subplots(rows, columns, squeeze=False)))


def _save(figure: Any, path: Path) -> None:
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=120))


def plot_clock(path: Path, title: str, run: Run) -> None:
    """Speed theta(t) and clock sigma(t) of a run with quartiles and central 99 %, beside the exact optimum."""
    learned, steps = run.learned, len(run.learned.mean) - 1
    exact = run.profile.direct(steps).values
    figure, (left, right) = _figure(10, 4, 1, 2)
    figure.suptitle(f"ART-RL, {title}")
    tau = np.linspace(0, 1, steps + 1)
    middle, horizon = (tau[1:] + tau[:-1]) / 2, learned.clock.sigma_max
    sigma = learned.clock.sigma(learned.mean)
    _band(left, middle, learned.theta, -np.diff(sigma) * steps / horizon)
    left.plot(middle, -np.diff(exact) * steps / horizon, "k--", linewidth=1, label="exact optimum")
    left.set(xlabel="sampling clock t / T", ylabel="speed $\\theta = d\\psi/dt$", title="control")
    ends = slice(None, -1 if horizon > 10 else None)  # the final 0 has no place on a logarithmic axis
    _band(right, tau[ends], learned.clock.sigma(learned.spread)[:, ends], sigma[ends])
    right.plot(tau[ends], exact[ends], "k--", linewidth=1, label="exact optimum")
    right.set(xlabel="sampling clock t / T", ylabel="noise level $\\sigma = T - \\psi(t)$", title="learned clock")
    for axes in (left, right):
        if horizon > 10:
            axes.set_yscale("log")
        axes.legend()
    _save(figure, path)


def _band(axes: Any, t: np.ndarray, quantiles: np.ndarray, mean: np.ndarray) -> None:
    low, first, third, high = quantiles
    axes.fill_between(t, low, high, color="tab:red", alpha=0.15, linewidth=0, label="central 99 %")
    axes.fill_between(t, first, third, color="tab:red", alpha=0.35, linewidth=0, label="quartiles")
    axes.plot(t, mean, color="tab:red", label="mean clock")


def plot_grids(path: Path, title: str, grids: Dict[str, Grid]) -> None:
    """Positive noise levels over the step, logarithmic where they span decades."""
    figure, (axes,) = _figure(6, 4)
    for name, grid in grids.items():
        wide = name == "art_rl"
        axes.plot(grid.values[:-1], "o-" if wide else ".-", color=COLORS.get(name), markersize=5, label=name,
                  linewidth=2 if wide else 1)
    axes.set(xlabel="step i (the final 0 is not drawn)", ylabel="noise level $\\sigma_i$", title=title,
             yscale="log" if max(grid.sigma_max for grid in grids.values()) > 10 else "linear")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend()
    _save(figure, path)


def plot_lines(path: Path, title: str, x: str, y: str, lines: Dict[str, Tuple[List[float], List[float]]]) -> None:
    """Named lines (x, y) on logarithmic axes."""
    figure, (axes,) = _figure(7.5, 4)
    for name, (across, up) in lines.items():
        axes.plot(across, np.maximum(up, 1e-6), "o-", markersize=4, label=name)
    axes.set(xlabel=x, ylabel=y, title=title, xscale="log", yscale="log")
    ticks = sorted({value for across, _ in lines.values() for value in across})
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xticks([], minor=True)
    figure.legend(loc="outside right center")
    _save(figure, path)


def plot_overview(path: Path, results: Sequence[Result]) -> None:
    """Figure 3: the metric over NFE, one panel for each table; ours solid, the paper's dotted where it has it.

    art_rl_own: grids learned for each number of steps, where art_rl is one grid resampled.
    """
    columns = min(3, len(results))
    rows = -(-len(results) // columns)
    figure, panels = _figure(4.2 * columns, 3.4 * rows + 0.4, rows, columns)
    for axes, result in zip(panels, results):
        _panel(axes, result)
    for axes in panels[len(results):]:
        axes.set_visible(False)
    shown = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=5)
    figure.suptitle("solid: here, with standard errors\ndotted: as printed in the paper", fontsize=10)
    _save(figure, path)


def _panel(axes: Any, result: Result) -> None:
    for name in MARKERS:
        style = {"color": COLORS[name], "marker": MARKERS[name], "markersize": 4}
        if name in result.rows:
            errors = [value or 0 for value in result.stderr.get(name, [0] * len(result.nfe))]
            axes.errorbar(result.nfe, result.rows[name], errors, label=name, capsize=2, **style)
        if name in result.paper:
            axes.plot(result.nfe, np.array(result.paper[name], float), linestyle=":", linewidth=1, alpha=0.8, **style)
    axes.set(title=f"{result.name}: {result.title}", xlabel="NFE", ylabel=result.metric.partition(",")[0],
             xscale="log", yscale="log")
    axes.title.set_fontsize(8)
    axes.set_xticks(result.nfe, [str(n) for n in result.nfe], fontsize=7)
    axes.minorticks_off()


def plot_sheets(path: Path, title: str, sheets: Dict[str, Sequence[np.ndarray]], columns: Sequence[str]) -> None:
    """Images of each grid (row) and number of steps (column), the same noises throughout.

    Args:
        sheets: row -> for each column uint8 [n, C, H, W].
    """
    figure, panels = _figure(1.75 * len(columns) + 0.6, 1.75 * len(sheets) + 0.7, len(sheets), len(columns))
    figure.suptitle(title)
    for r, (name, row) in enumerate(sheets.items()):
        for c, images in enumerate(row):
            axes = panels[r * len(columns) + c]
            mosaic = _mosaic(images)
            axes.imshow(mosaic, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if r == 0:
                axes.set_title(columns[c], fontsize=9)
            if c == 0:
                axes.set_ylabel(name)
    _save(figure, path)


def _mosaic(images: np.ndarray) -> np.ndarray:
    """uint8 [n, C, H, W] side by side in a square, [., .] or [., ., 3]; missing places white."""
    count, channels, height, width = images.shape
    side = int(np.ceil(np.sqrt(count)))
    places = np.full((side * side, channels, height, width), 255, np.uint8)
    places[:count] = images
    tiles = places.reshape(side, side, channels, height, width).transpose(0, 3, 1, 4, 2)
    return tiles.reshape(side * height, side * width, channels).squeeze()
