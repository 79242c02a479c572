"""The picture at the top of the README: samples of EDM's rule and of a learned grid, from the same noises.

Rows: grids. Columns: numbers of evaluations of the network (NFE), each by the solver that `--nfe` takes, then the exact
ends, which a fine solution reaches. Below each panel its figures, from tables of `fid.py gen`. Run by hand:

    python tools/train_schedule.py --network=cifar10 --steps=4,6,8,10,18 --out='art{steps}.npy'
    python tools/fid.py gen --network=cifar10 --grid='edm,art=art{steps}.npy' --steps=4,6,8,10,18 --solver=ipndm3 \
        --reference-error --error-noises=64 --error-steps=60 --num=500 \
        --detector=cifar10 --ref=cifar10.npz --out=table.json
    python tests/benchmarks/readme_picture.py --grid='art{steps}.npy' --scores=table.json --num=9 --wide=3
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import click
import torch

from art_edm.grids.grid import edm
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.files import atomic_write
from art_edm.sampling.baselines import choose_grids
from art_edm.sampling.budget import recommended
from art_edm.sampling.generate import generate

ROOT = Path(__file__).resolve().parents[2]
DISTANCES = {"resnet": "CIFAR-FID", "lenet": "LeNet-FID", "inception": "FID"}
TITLES = {"edm": "EDM's rule", "art": "learned grid"}


class Panel(NamedTuple):
    """Samples of one grid."""

    row: str
    column: str
    images: torch.Tensor  # [N, C, H, W], pixels in [-1, 1]
    below: str = ""


def sheet(images: torch.Tensor, wide: int) -> torch.Tensor:
    """[N, C, H, W] -> [rows, columns, C] in [0, 1], `wide` images side by side; a grey image is repeated in colour."""
    pixels = (images * 0.5 + 0.5).clip(0, 1).expand(-1, 3, -1, -1)
    rows = [torch.cat(list(pixels[i:i + wide]), dim=2) for i in range(0, len(pixels), wide)]  # each [3, H, wide W]
    return torch.cat(rows, dim=1).permute(1, 2, 0)


def figures(paths: List[Path]) -> Dict[Tuple[str, int, str], str]:
    """(grid, evaluations, solver) -> end-point error and Frechet distance, from tables of `fid.py gen`."""
    tables = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return {(row["name"], row["nfe"], row["solver"]):
            f"error {row['error_mean']:.3f}, {DISTANCES[table['detector']]} {row['fid']:.0f}"
            for table in tables for row in table["rows"]}


def panels(denoiser: Denoiser, numbers: List[int], grid: str, num: int, known: Dict[Tuple[str, int, str], str]
           ) -> List[Panel]:
    """Every grid's samples of the images 0 to num - 1, and the exact ends of the same noises."""
    exact = generate(denoiser, edm(200, denoiser.sigma_min, denoiser.sigma_max), "heun", num)
    made = []
    for choice in choose_grids(["edm", f"art={grid}"], numbers, denoiser):
        count = choice.grid.num_steps
        solver = recommended(count, denoiser.img_shape[0])
        images, below = generate(denoiser, choice.grid, solver, num), known.get((choice.name, count, solver), "")
        made.append(Panel(TITLES[choice.name], f"NFE {count}, {solver}", images, below))
    return made + [Panel(row, "exact", exact) for row in TITLES.values()]


def draw(path: Path, made: List[Panel], wide: int) -> None:
    """A table of sheets with row and column titles, as PNG."""
    from matplotlib.figure import Figure

    rows = list(dict.fromkeys(panel.row for panel in made))
    columns = list(dict.fromkeys(panel.column for panel in made))
    size = sheet(made[0].images, wide).shape
    height = 8.0 / len(columns) * size[0] / size[1]
    figure = Figure(figsize=(8.6, len(rows) * (height + 0.2) + 0.35), layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for panel in made:
        i, j = rows.index(panel.row), columns.index(panel.column)
        axes[i][j].imshow(sheet(panel.images, wide).numpy(), interpolation="nearest")
        axes[i][j].set(xticks=[], yticks=[])
        axes[i][j].set_xlabel(panel.below, fontsize=7)
        if i == 0:
            axes[i][j].set_title(panel.column, fontsize=7)
        if j == 0:
            axes[i][j].set_ylabel(panel.row, fontsize=10)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=150))


@click.command()
@click.option("--network", default="cifar10", show_default=True)
@click.option("--grid", required=True, help="Learned grids; {steps} stands for their numbers of steps.")
@click.option("--nfe", default="4,6,8,10,18", show_default=True, help="Evaluations, which are as many steps.")
@click.option("--scores", default="", help="JSON tables of fid.py gen for the grids edm and art.")
@click.option("--num", default=16, show_default=True, help="Images in each panel, of seeds 0 to num - 1.")
@click.option("--wide", default=4, show_default=True, help="Images side by side in a panel.")
@click.option("--out", type=Path, default=ROOT / "art_edm" / "docs" / "samples.png", show_default=True)
def main(network: str, grid: str, nfe: str, scores: str, num: int, wide: int, out: Path) -> None:
    denoiser, known = load_network(network).denoiser, figures([Path(name) for name in scores.split(",") if name])
    draw(out, panels(denoiser, [int(k) for k in nfe.split(",")], grid, num, known), wide)
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
