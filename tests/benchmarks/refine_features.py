"""A grid refined by the end-point error and by the distance of features, both judged on held-out noises.

Run by hand:
    python tests/benchmarks/refine_features.py --out=tests/benchmarks/results/refine_features.json --grids=DIR
    python tools/fid.py gen --network=mnist --grid='DIR/art.npy,DIR/features.npy,DIR/error.npy' --steps=5 \
        --solver=clock-denoised --num=2000 --detector=lenet --ref=mnist:train
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import click
import torch

from art_edm.grids.grid import Grid, save_grid
from art_edm.measure.objectives import Objective, measure_objective
from art_edm.metrics.end_point import EndPointError
from art_edm.models.loading import load_network
from art_edm.refining.config import RefineConfig
from art_edm.refining.feature_runs import FeatureRuns, load_judge
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import refine
from art_edm.refining.solver_jacobian import Noises, Scheme
from art_edm.refining.stage import Stage
from art_edm.runtime.cli import command_line
from art_edm.runtime.context import Context
from art_edm.runtime.files import write_json

JUDGES, MAKERS = 0, 11  # seeds


@click.command()
@click.option("--solver", default="clock-denoised", show_default=True)
@click.option("--steps", default=5, show_default=True)
@click.option("--noises", default=64, show_default=True, help="Of the descent; three times as many validate.")
@click.option("--judges", default=128, show_default=True, help="Noises that judge.")
@click.option("--iterations", default=8, show_default=True)
@click.option("--grids", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    solver: str, steps: int, noises: int, judges: int, iterations: int, grids: Path, out: Optional[Path]
) -> None:
    """Refine ART's grid both ways on the bundled network."""
    torch.set_num_threads(1)
    denoiser, context = load_network("mnist").denoiser, Context(batch=64)
    detector = load_judge("features", None, denoiser)
    config = RefineConfig(seed=MAKERS, noises=noises, validation=3 * noises, fine_solver="heun", fine_steps=32,
                          iterations=iterations, cheap_iterations=iterations)
    drawn = draw_noises(denoiser, RefineConfig(seed=JUDGES, noises=1, validation=judges - 1), denoiser.sigma_max,
                        context)
    both = drawn.train, drawn.validation
    judging = Noises(torch.cat([part.latents for part in both]), None, torch.cat([part.ends for part in both]))
    made = draw_noises(denoiser, config, denoiser.sigma_max, context)
    art = measure_objective(denoiser, Objective()).direct(steps)

    def judged(name: str, grid: Grid, **more: Any) -> Dict[str, Any]:
        save_grid(grids / f"{name}.npy", grid, {"solver": solver})
        with Stage(denoiser, context) as stage:
            run = FeatureRuns(solver, judging, stage, detector).run(Scheme(grid.values), False)
        found = {"distance": run.errors.mean().item(), **EndPointError.of(run.figures[:, 0])._asdict(),
                 "levels": grid.values.tolist(), **more}
        click.echo(f"{name}: {found}")
        return found

    rows = {"art": judged("art", art)}
    for name, judge in (("features", detector), ("error", None)):
        result = refine(denoiser, art, solver, config, context, made._replace(detector=judge))
        rows[name] = judged(name, result.grid, refined=result.record())
    if out is not None:
        write_json(out, {"command": command_line(), "solver": solver, "num_steps": steps, "judges": judges, **rows})


if __name__ == "__main__":
    main()
