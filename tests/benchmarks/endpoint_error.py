"""End-point error of grids: RMS distance to a fine Heun solution from the same noise.

Run by hand: python tests/benchmarks/endpoint_error.py --network=mnist --out=endpoint.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, Optional, Tuple

import click
import numpy as np
import torch

from art_edm.grids.grid import Grid, edm
from art_edm.learning.training import PRESETS, train
from art_edm.measure.field import rms
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.files import write_json
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.solvers import sample


def errors(denoiser: Denoiser, grids: Dict[str, Grid], solver: str, latents: torch.Tensor, fine: torch.Tensor) -> dict:
    """Per grid: RMS over noises and pixels, its standard error, and the median over noises."""
    rows = {}
    for name, grid in grids.items():
        each = rms(sample(denoiser, latents, grid, solver, batch=128) - fine).numpy()  # [n]
        total = float(np.sqrt(np.square(each).mean()))
        stderr = float(np.square(each).std(ddof=1) / np.sqrt(len(each)) / (2 * total))
        rows[name] = {"rms": total, "stderr": stderr, "median": float(np.median(each))}
    return rows


@click.command()
@click.option("--network", default="mnist", show_default=True)
@click.option("--steps", default="3,5,7,10,18", show_default=True)
@click.option("--noises", default=256, show_default=True)
@click.option("--fine", default=200, show_default=True, help="Steps of the reference solution.")
@click.option("--seed", default=1000, show_default=True, help="Seed of the noises, apart from the training's.")
@click.option("--out", type=click.Path(path_type=Path))
def main(network: str, steps: str, noises: int, fine: int, seed: int, out: Optional[Path]) -> None:
    """Table of uniform, dpm, edm, edm-unpinned, direct and RL grids for Heun and Euler."""
    denoiser = load_network(network).denoiser
    run = train(denoiser, PRESETS["default"], quiet=False)
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((noises, *denoiser.img_shape), generator=generator, dtype=torch.float64)
    reference_grid = edm(fine, denoiser.sigma_min, denoiser.sigma_max)
    reference = sample(denoiser, latents, reference_grid, "heun", batch=128)
    table: Dict[str, Dict[str, dict]] = {}
    for solver in ("heun", "euler"):
        for k in (int(part) for part in steps.split(",")):
            grids = {**hand_made(denoiser, k), "direct": run.profile.direct(k), "ART-RL": run.learned.grid(k)}
            rows = errors(denoiser, grids, solver, latents, reference)
            table.setdefault(solver, {})[str(k)] = rows
            show(solver, k, rows)
    if out:
        write_json(out, {"network": network, "noises": noises, "fine": fine, "seed": seed, "table": table})
        click.echo(f"wrote {out}")


def show(solver: str, k: int, rows: Dict[str, dict]) -> Tuple[str, ...]:
    """Print one row of the table; returns the hand-made rules that beat the learned grid."""
    parts = (f"{name} {row['rms']:.4f}±{row['stderr']:.4f} ({row['median']:.4f})" for name, row in rows.items())
    rules = [name for name in rows if name not in ("direct", "ART-RL")]
    beaten = tuple(name for name in rules if rows[name]["rms"] <= rows["ART-RL"]["rms"])
    ratio = rows["edm"]["rms"] / rows["ART-RL"]["rms"]
    verdict = f"NOT below {json.dumps(beaten)}" if beaten else "RL below every rule"
    cells = "  ".join(parts)
    click.echo(f"{solver:<6} K={k:<3} {cells}  edm/RL {ratio:.2f}  {verdict}")
    return beaten


if __name__ == "__main__":
    main()
