"""End-point error of every solver on EDM's rule and on learned grids, and of grids read off another's clock.

    python tools/train_schedule.py --network=mnist --steps=2,3,4,5,6,7,8,9,10,12,15,18,20 --out='art-{steps}.npy'
    python tests/benchmarks/solvers.py --grids='art-{steps}.npy' --out=solvers.json

The error is the RMS over pixels between where a solver and a fine Heun solution end, from the same noise; mean and RMS
over noises. Noises of --choose are those by which a variant may be picked, those of --judge those that are quoted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import click
import numpy as np
import torch

from art_edm.grids.grid import RESAMPLING, Grid, edm, load_grid
from art_edm.measure.field import rms
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.files import write_json
from art_edm.sampling import multistep
from art_edm.sampling.multistep import denoised_step, slopes_step
from art_edm.sampling.solvers import SOLVERS, Solver, multistep_solver, nfe, sample

Ends = Tuple[torch.Tensor, torch.Tensor]  # latents and where their exact paths end, [M, C, H, W]


def variants() -> Dict[str, Solver]:
    """The table, and other orders of its solvers: values and order of the last step."""
    found = dict(SOLVERS)
    for name, step, rule, pairs in (
        ("slopes in the clock", slopes_step, multistep.clock_slopes, [(2, 2), (3, 1), (3, 2), (3, 3), (4, 1), (4, 3)]),
        ("D in the clock", denoised_step, multistep.clock_denoised, [(2, 1), (2, 2), (3, 2), (3, 3), (4, 1), (4, 2)]),
        ("even weights", slopes_step, multistep.even_row, [(3, 3), (4, 1), (4, 4)]),
        ("even weights of D", denoised_step, multistep.even_row, [(3, 1), (3, 2)]),
        ("2M", denoised_step, multistep.dpmpp2m_row, [(2, 1)]),
        ("AB in sigma", slopes_step, multistep.through_times(lambda sigma: sigma), [(3, 1), (3, 2), (4, 2)]),
    ):
        for values, last in pairs:
            found[f"{name}, {values}, last {last}"] = multistep_solver(step, rule, values, last, name)
    return found


def exact_ends(denoiser: Denoiser, noises: int, seed: int, fine: int, batch: int) -> Ends:
    """Noises and a fine Heun solution's ends."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((noises, *denoiser.img_shape), generator=generator, dtype=torch.float64)
    grid = edm(fine, max(denoiser.sigma_min, 0.002), denoiser.sigma_max)
    return latents, sample(denoiser, latents, grid, "heun", batch=batch)


def score(denoiser: Denoiser, ends: Ends, grid: Grid, solver: Any, batch: int) -> Dict[str, float]:
    """Mean over noises, its standard error, RMS and median."""
    each = rms(sample(denoiser, ends[0], grid, solver, batch=batch) - ends[1]).numpy()  # [M]
    return {"mean": float(each.mean()), "stderr": float(each.std(ddof=1) / len(each) ** 0.5),
            "rms": float(np.sqrt(np.square(each).mean())), "median": float(np.median(each))}


@click.command()
@click.option("--network", default="mnist", show_default=True)
@click.option("--grids", required=True, help="F{steps}.npy, a file for each number of steps.")
@click.option("--budgets", default="3,4,5,6,7,8,10", show_default=True, help="Evaluations.")
@click.option("--resampled", default="4,6,9,12,15,20", show_default=True, help="Steps read off --source.")
@click.option("--source", default=18, show_default=True, help="Steps of the grid that is read off.")
@click.option("--solvers", help="Only these, of the table and its variants, with semicolons between.")
@click.option("--rules", default="edm,art", show_default=True)
@click.option("--sets", default="choose,judge", show_default=True, help="Which noises.")
@click.option("--noises", default=256, show_default=True)
@click.option("--choose", default=2000, show_default=True, help="Seed of the noises that may choose.")
@click.option("--judge", default=3000, show_default=True, help="Seed of the noises that judge.")
@click.option("--fine", default=200, show_default=True, help="Steps of the exact ends, by Heun.")
@click.option("--batch", default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(network: str, grids: str, budgets: str, resampled: str, out: Optional[Path], **settings: Any) -> None:
    """Print both tables, and write them as JSON."""
    wanted = settings["solvers"].split(";") if settings["solvers"] else list(variants())
    denoiser, batch = load_network(network).denoiser, settings["batch"]
    learned = lambda k: load_grid(grids.replace("{steps}", str(k)))
    rule = lambda k: edm(k, max(denoiser.sigma_min, 0.002), denoiser.sigma_max)
    sets = {name: exact_ends(denoiser, settings["noises"], settings[name], settings["fine"], batch)
            for name in settings["sets"].split(",")}
    result: Dict[str, Any] = {"network": network, **settings, "solvers": {}, "read off": {}}
    for solver in wanted:
        entry = variants()[solver]
        for budget in map(int, budgets.split(",")):
            k, rest = divmod(budget - 1, entry.stages)
            if rest or k < 1:
                continue
            for name in settings["rules"].split(","):
                grid = learned(k + 1) if name == "art" else rule(k + 1)
                row = {which: score(denoiser, ends, grid, entry, batch) for which, ends in sets.items()}
                result["solvers"].setdefault(solver, {}).setdefault(name, {})[budget] = row
                means = " ".join(f"{each['mean']:.4f}" for each in row.values())
                click.echo(f"{solver:<32} {name} NFE {budget:>2}: {means}")
        save(out, result)
    source = learned(settings["source"])
    for solver in ("heun", "euler", "clock"):
        for k in map(int, filter(None, resampled.split(","))):
            named = {"edm": rule(k), **{name: each(source, k) for name, each in RESAMPLING.items()},
                     "learned": learned(k)}
            row = {name: score(denoiser, sets["judge"], grid, solver, batch) for name, grid in named.items()}
            result["read off"].setdefault(solver, {})[k] = {"NFE": nfe(solver, k), **row}
            means = ", ".join(f"{name} {each['mean']:.4f}" for name, each in row.items())
            click.echo(f"{solver:<15} K {k:>2}: {means}")
        save(out, result)


def save(out: Optional[Path], result: Dict[str, Any]) -> None:
    """What there is so far."""
    if out:
        write_json(out, result)


if __name__ == "__main__":
    main()
