"""The picture at the top of the README: samples of EDM's rule and of a learned grid, from the same noises.

Rows: grids. Columns: numbers of evaluations of the network (NFE), then the exact ends, which a fine solution reaches.
Run by hand:

    python tools/train_schedule.py --network=mnist --steps=3,5,7,10 --out='art{steps}.npy'
    python tests/benchmarks/readme_picture.py --grid='art{steps}.npy'
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, List, NamedTuple

import click
import torch

from art_edm.grids.grid import Grid, edm
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.files import atomic_write
from art_edm.sampling.baselines import choose_grids
from art_edm.sampling.generate import generate
from art_edm.sampling.solvers import nfe

ROOT = Path(__file__).resolve().parents[2]


class Panel(NamedTuple):
    """Samples of one grid."""

    row: str
    column: str
    images: torch.Tensor  # [N, C, H, W], pixels in [-1, 1]


def sheet(images: torch.Tensor, wide: int) -> torch.Tensor:
    """[N, C, H, W] -> [rows, columns, C] in [0, 1], `wide` images side by side; a grey image is repeated in colour."""
    pixels = (images * 0.5 + 0.5).clip(0, 1).expand(-1, 3, -1, -1)
    rows = [torch.cat(list(pixels[i:i + wide]), dim=2) for i in range(0, len(pixels), wide)]  # each [3, H, wide W]
    return torch.cat(rows, dim=1).permute(1, 2, 0)


def panels(denoiser: Denoiser, grids: List[Any], solver: str, num: int, fine: Grid) -> List[Panel]:
    """Every grid's samples of the images 0 to num - 1, and the exact ends of the same noises."""
    exact = generate(denoiser, fine, "heun", num)
    made = []
    for name, grid, _ in grids:
        made.append(Panel(name, f"NFE {nfe(solver, grid.num_steps)}", generate(denoiser, grid, solver, num)))
    rows = list(dict.fromkeys(panel.row for panel in made))
    return made + [Panel(row, "exact", exact) for row in rows]


def draw(path: Path, made: List[Panel], wide: int) -> None:
    """A table of sheets with row and column titles, as PNG."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(panel.row for panel in made))
    columns = list(dict.fromkeys(panel.column for panel in made))
    size = sheet(made[0].images, wide).shape
    height = 8.0 / len(columns) * size[0] / size[1]
    figure = Figure(figsize=(8.6, len(rows) * height + 0.35), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for panel in made:
        i, j = rows.index(panel.row), columns.index(panel.column)
        axes[i][j].imshow(sheet(panel.images, wide).numpy(), interpolation="nearest")
        axes[i][j].set(xticks=[], yticks=[])
        if i == 0:
            axes[i][j].set_title(panel.column, fontsize=10)
        if j == 0:
            axes[i][j].set_ylabel(panel.row, fontsize=10)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))


@click.command()
@click.option("--network", default="mnist", show_default=True)
@click.option("--grid", required=True, help="Learned grids; {steps} stands for their numbers of steps.")
@click.option("--steps", default="3,5,7,10", show_default=True)
@click.option("--solver", default="heun", show_default=True)
@click.option("--num", default=16, show_default=True, help="Images in each panel, of seeds 0 to num - 1.")
@click.option("--wide", default=4, show_default=True, help="Images side by side in a panel.")
@click.option("--out", type=Path, default=ROOT / "art_edm" / "docs" / "samples.png", show_default=True)
def main(network: str, grid: str, steps: str, solver: str, num: int, wide: int, out: Path) -> None:
    denoiser = load_network(network).denoiser
    numbers = [int(k) for k in steps.split(",")]
    grids = choose_grids(["edm", f"art_edm={grid}"], numbers, denoiser)
    fine = edm(200, denoiser.sigma_min, denoiser.sigma_max)
    titles = {"edm": "EDM's rule", "art_edm": "learned grid"}
    made = [p._replace(row=titles[p.row]) for p in panels(denoiser, grids, solver, num, fine)]
    draw(out, made, wide)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
