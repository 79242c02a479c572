"""Where each solver ends on which grid: EDM's rule, ART's clock, its own clock, refined.

The clocks are optimal ones (`--method=direct`); errors are RMS distances from exact end points over noises that
no rule has seen. Entries are kept in --cache, so that a long table can be made in pieces.
Run by hand:
    python -m tests.benchmarks.solver_clocks mnist gaussian:0.5 oned --cache=cells --out=solver_clocks.json
    python -m tests.benchmarks.solver_clocks empirical-mnist --mnist=DIR --rules=edm,art,refined --cache=cells
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click
import numpy as np
import torch
from paper.tables.empirical_fields import cifar10_images, empirical, mnist_images

from art_edm.grids.grid import Grid, edm, edm_unpinned, save_grid
from art_edm.measure.field import rms
from art_edm.measure.objectives import Objective, measure_objective
from art_edm.measure.profile import Profile
from art_edm.models.loading import Network, load_network
from art_edm.refining.config import RefineConfig
from art_edm.refining.noise_sets import NoiseSets, draw_noises
from art_edm.refining.refine import own_start, refine
from art_edm.runtime.cli import command_line
from art_edm.runtime.files import write_json
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import SOLVERS, fitted, nfe, sample

STEPS = (3, 5, 7, 10, 18)
RULES = ("edm", "art", "own", "refined")
FINE = 60  # steps of RK4 on EDM's rule, whose last step is short: the judges' exact paths
SEED = 1000  # of the judges' noises
CONFIG = RefineConfig()
METHODS = {"refined": 8}  # one more whenever a rule's grids change


class Bench:
    """One field: its clocks, its judges, and what is known already."""

    def __init__(self, network: Network, noises: int, store: Store, seed: int = SEED) -> None:
        self.seed = seed
        self.network, self.denoiser, self.noises, self.store = network, network.denoiser, noises, store
        self.profiles: Dict[Optional[str], Profile] = {}
        self.drawn: Optional[NoiseSets] = None
        generator = torch.Generator().manual_seed(seed)
        self.latents = torch.randn((noises, *self.denoiser.img_shape), generator=generator, dtype=torch.float64)
        what = {**self._what(), "kind": "judges", "fine": FINE}
        known = store.load(what)
        if known is None:
            ends = sample(self.denoiser, self.latents, self.rule(FINE), "rk4", batch=64)
            known = {"ends": ends.numpy()}
            store.save(what, known)
        self.ends = torch.from_numpy(known["ends"])

    def _what(self) -> Dict[str, Any]:
        return {"network": self.network.identity, "noises": self.noises, "seed": self.seed, "version": 3}

    def profile(self, solver: Optional[str] = None) -> Profile:
        """Of |Q|, or of a solver's local errors."""
        if solver not in self.profiles:
            self.profiles[solver] = measure_objective(self.denoiser, Objective(solver))
        return self.profiles[solver]

    def rule(self, steps: int) -> Grid:
        """EDM's."""
        low, top = self.denoiser.sigma_min, self.denoiser.sigma_max
        return edm(steps, low, top) if self.denoiser.pinned else edm_unpinned(steps, top)

    def plain(self, steps: int, solver: Optional[str] = None) -> Grid:
        """The optimum of a profile."""
        return fitted(self.denoiser, self.profile(solver).direct(steps))

    def grid(self, rule: str, solver: str, steps: int) -> Tuple[Grid, Dict[str, float]]:
        """The grid, and what it cost beyond the profile."""
        denoiser = self.denoiser
        if rule == "edm":
            return self.rule(steps), {}
        if rule in ("art", "own"):
            return self.plain(steps, solver if rule == "own" else None), {}
        plain = self.plain(steps)
        self.drawn = self.drawn or draw_noises(denoiser, CONFIG, denoiser.sigma_max)
        others = own_start(denoiser, self.profile(solver) if SOLVERS[solver].alone else None, steps)
        refined = refine(denoiser, plain, solver, CONFIG, noises=self.drawn, starts=others)
        return refined.grid, {
            "evaluations": refined.evaluations, "share": refined.share, "other": refined.start in others}

    def cell(self, rule: str, solver: str, steps: int) -> Dict[str, Any]:
        """RMS over noises, its standard error, median, and each noise's error."""
        what = {**self._what(), "rule": rule, "solver": solver, "steps": steps}
        if rule in METHODS:
            what["method"] = METHODS[rule]
        known = self.store.load(what)
        if known is None:
            grid, more = self.grid(rule, solver, steps)
            errors = rms(sample(self.denoiser, self.latents, grid, solver, batch=64) - self.ends).numpy()
            known = {"errors": errors, "levels": grid.values, **{name: np.array(value) for name, value in more.items()}}
            self.store.save(what, known)
        errors = known["errors"]
        total = float(np.sqrt(np.square(errors).mean()))
        stderr = float(np.square(errors).std(ddof=1) / len(errors) ** 0.5 / (2 * total)) if total else 0.0
        more = {name: float(known[name]) for name in ("evaluations", "share", "other") if name in known}
        return {"rms": total, "stderr": stderr, "mean": float(errors.mean()), "median": float(np.median(errors)),
                "levels": known["levels"].tolist(), **more}


def field(name: str, mnist: Optional[Path], cifar10: Optional[Path], images: int) -> Network:
    """A network by name, or an exact field of images."""
    if name == "empirical-mnist":
        return empirical(name, mnist_images(mnist, images), torch.device("cpu"))
    if name == "empirical-cifar10":
        return empirical(name, cifar10_images(cifar10, images), torch.device("cpu"))
    return load_network(name)


@click.command()
@click.argument("fields", nargs=-1, required=True)
@click.option("--solvers", default="euler,heun,rk4,dpmpp2m,ab4-sigma", show_default=True)
@click.option("--steps", default=",".join(map(str, STEPS)), show_default=True)
@click.option("--rules", default=",".join(RULES), show_default=True)
@click.option("--noises", default=256, show_default=True)
@click.option("--seed", default=SEED, show_default=True, help="Of the judges' noises.")
@click.option("--images", default=2000, show_default=True, help="Of the exact fields.")
@click.option("--mnist", type=click.Path(path_type=Path))
@click.option("--cifar10", type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--grids", type=click.Path(path_type=Path), help="Folder for the grids: FIELD-SOLVER-RULE-K.npy.")
def main(
    fields: Tuple[str, ...], solvers: str, steps: str, rules: str, noises: int, seed: int, images: int,
    mnist: Optional[Path], cifar10: Optional[Path], cache: Path, out: Optional[Path], grids: Optional[Path],
) -> None:
    """A line for each field, solver and rule."""
    counts, table = [int(k) for k in steps.split(",")], {}
    for name in fields:
        network = field(name, mnist, cifar10, images)
        bench = Bench(network, noises, Store(cache), seed)
        for solver in solvers.split(","):
            for rule in rules.split(","):
                cells: List[Dict[str, Any]] = [bench.cell(rule, solver, k) for k in counts]
                table.setdefault(network.name, {}).setdefault(solver, {})[rule] = cells
                for k, cell in zip(counts, cells if grids else ()):
                    grids.mkdir(parents=True, exist_ok=True)
                    made = {"rule": rule, "solver": solver, "network": network.name, "command": command_line()}
                    save_grid(grids / f"{network.name}-{solver}-{rule}-{k}.npy", Grid(np.array(cell["levels"])), made)
                shown = "  ".join(f"{cell['rms']:.4g}±{cell['stderr']:.2g}" for cell in cells)
                click.echo(f"{network.name:<18} {solver:<8} {rule:<9} {shown}")
    if out:
        cost = {solver: [nfe(solver, k) for k in counts] for solver in solvers.split(",")}
        settings = {"steps": counts, "nfe": cost, "noises": noises, "seed": seed, "images": images}
        write_json(out, {**settings, "table": table})


if __name__ == "__main__":
    main()
