"""`refine` against a long search: Adam through autograd, 500 iterations on 64 noises; both judged on 256 others.

Entries are kept in --cache as they are finished, so that a long table can be made in pieces and in any order.
Run by hand:
    python tests/benchmarks/refine_search.py --fields=oned,mixture,images --cache=cells --out=refine_search.json
    python tests/benchmarks/refine_search.py --fields=mnist --solvers=heun --steps=5,10 --cache=cells
"""

from __future__ import annotations

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional, Tuple

import click
import numpy as np
import torch

from art_edm.grids.clocks import make_clock
from art_edm.grids.grid import Grid, edm, edm_unpinned
from art_edm.measure.dense_paths import measure_along
from art_edm.measure.field import rms
from art_edm.measure.objectives import Objective, measure_objective
from art_edm.models.analytic import EmpiricalDenoiser, GaussianDenoiser, MixtureDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.refining.config import RefineConfig
from art_edm.refining.levenberg_marquardt import parameters_of
from art_edm.refining.refine import own_start, refine
from art_edm.runtime.files import write_json
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import SOLVERS, integrate, sample, slope_of

HELD, SEARCHED, STARTED = 256, 64, 24  # noises that judge, of the long search, of ART's profile
SEEDS = {"held": 9001, "searched": 9002, "art": 9003}
RATE = 0.05  # of Adam, down to a hundredth of it along a cosine
FINE = 100  # steps of RK4


def field_of(name: str) -> Tuple[Denoiser, str]:
    """A field by name, and what tells it apart from others of that name."""
    generator = torch.Generator().manual_seed(7)
    if name == "mixture":  # five components in 16 pixels
        means = 0.5 * torch.randn(5, 1, 4, 4, generator=generator, dtype=torch.float64)
        return MixtureDenoiser([0.3, 0.25, 0.2, 0.15, 0.1], means, [0.1, 0.2, 0.1, 0.3, 0.15]), name
    if name == "images":  # 200 smooth random images of 64 pixels
        coarse = torch.randn(200, 1, 3, 3, generator=generator, dtype=torch.float64)
        return EmpiricalDenoiser(torch.nn.functional.interpolate(coarse, (8, 8), mode="bilinear").tanh()), name
    if name == "spectrum":  # Gaussian data, standard deviations from 0.1 to 1.8
        return GaussianDenoiser(0.0, torch.logspace(-2, 0.5, 36, dtype=torch.float64).reshape(1, 6, 6), (1, 6, 6)), name
    network = load_network(name)
    return network.denoiser, network.identity


def noise(denoiser: Denoiser, which: str, count: int) -> torch.Tensor:
    """Unit noise of one purpose, [count, C, H, W]."""
    generator = torch.Generator().manual_seed(SEEDS[which])
    return torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)


def exact(denoiser: Denoiser, latents: torch.Tensor) -> torch.Tensor:
    """Where the paths end, by a solution finer than that of `refine`."""
    low, high = denoiser.sigma_min, denoiser.sigma_max
    rule = edm(FINE, low, high) if denoiser.pinned else edm_unpinned(FINE, high)
    return sample(denoiser, latents, rule, "rk4", batch=64)


def search(
    denoiser: Denoiser, grid: Grid, solver: str, latents: torch.Tensor, ends: torch.Tensor, iterations: int, batch: int,
    each: int = 0,
) -> Tuple[Grid, float]:
    """The best grid that Adam meets on its way from `grid`, and its mean error over `latents`.

    With `each`, an iteration takes the next so many of the noises by turns, and the last grid counts.
    """
    q = torch.tensor(parameters_of(grid.values), requires_grad=True)
    first, last = torch.tensor(grid.values[:1]), torch.zeros(1, dtype=torch.float64)
    optimizer = torch.optim.Adam([q], lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=RATE / 100)
    best: Tuple[Grid, float] = (grid, float("inf"))
    parts = list(zip(latents.split(each or len(latents)), ends.split(each or len(ends))))
    for i in range(iterations):
        noises, targets = parts[i % len(parts)]
        optimizer.zero_grad()
        levels, total = torch.cat([first, first * q.sigmoid().cumprod(0), last]), 0.0
        for a in range(0, len(noises), batch):
            moved = levels.detach().requires_grad_()
            x = denoiser.initial(noises[a : a + batch], grid.sigma_max).to(torch.float64)
            end, _ = integrate(slope_of(denoiser), x, moved, solver)
            square = (end - targets[a : a + batch]).flatten(1).square().mean(dim=1)
            f = (square + 1e-24).sqrt().sum() / len(noises)
            f.backward()
            levels.backward(moved.grad, retain_graph=True)
            total += f.item()
        if total < best[1] or each:
            best = Grid(levels.detach().numpy()), total
        optimizer.step()
        schedule.step()
    return best


def start_of(denoiser: Denoiser, k: int) -> Grid:
    """ART's grid in closed form."""
    clock = make_clock("gaussian", denoiser.sigma_max, denoiser.sigma_data)
    return measure_along(denoiser, noise(denoiser, "art", STARTED), clock, 85).direct(k)


def judged(denoiser: Denoiser, solver: str, **grids: Grid) -> Dict[str, np.ndarray]:
    """Grids, and their errors [256] on the noises that judge."""
    latents, out = noise(denoiser, "held", HELD), {}
    ends = exact(denoiser, latents)
    for name, grid in grids.items():
        out[f"{name}_grid"] = grid.values
        out[f"{name}_errors"] = rms(sample(denoiser, latents, grid, solver, batch=64) - ends).numpy()
    return out


def arrays(numbers: Dict[str, float]) -> Dict[str, np.ndarray]:
    """Numbers as a cell holds them."""
    return {name: np.asarray(value) for name, value in numbers.items()}


def searched(denoiser: Denoiser, solver: str, k: int, iterations: int, batch: int) -> Dict[str, np.ndarray]:
    """The long search's grid and ART's."""
    start, latents = start_of(denoiser, k), noise(denoiser, "searched", SEARCHED)
    ends, before, began = exact(denoiser, latents), denoiser.evaluations, time.perf_counter()
    found, _ = search(denoiser, start, solver, latents, ends, iterations, batch)
    cost = {"search_evaluations": denoiser.evaluations - before, "search_seconds": time.perf_counter() - began}
    return {**arrays(cost), **judged(denoiser, solver, art=start, search=found)}


def refined(denoiser: Denoiser, solver: str, k: int, config: RefineConfig) -> Dict[str, np.ndarray]:
    """The refined grid; what the other clock to start from costs is not counted."""
    own = measure_objective(denoiser, Objective(solver)) if SOLVERS[solver].alone else None
    result = refine(denoiser, start_of(denoiser, k), solver, config, starts=own_start(denoiser, own, k))
    cost = {"evaluations": result.evaluations, "seconds": result.seconds, "iterations": len(result.history) - 1}
    return {**arrays(cost), **judged(denoiser, solver, refined=result.grid)}


def kept(store: Store, what: Dict[str, Any], make: Callable[[], Dict[str, np.ndarray]]) -> Dict[str, np.ndarray]:
    """The finished cell, made if it is not there."""
    content = store.load(what)
    if content is None:
        content = make()
        store.save(what, content)
    return content


def row(content: Dict[str, np.ndarray]) -> Dict[str, Any]:
    """The figures of a cell: means, medians, and the ratios with the standard error of a paired difference."""
    errors = {name: content[f"{name}_errors"] for name in ("art", "search", "refined")}
    result: Dict[str, Any] = {}
    for name, e in errors.items():
        result[name] = {"mean": float(e.mean()), "stderr": float(e.std(ddof=1) / len(e) ** 0.5),
                        "median": float(np.median(e)), "rms": float(np.sqrt(np.square(e).mean())),
                        "grid": content[f"{name}_grid"].tolist()}
    for name in ("search", "art"):
        paired = float((errors["refined"] - errors[name]).std(ddof=1) / HELD**0.5)
        scale = max(float(errors[name].mean()), 1e-300)
        result[f"over_{name}"] = {"mean": float(errors["refined"].mean()) / scale, "stderr": paired / scale,
                                  "median": float(np.median(errors["refined"]) / max(np.median(errors[name]), 1e-300))}
    for name in ("evaluations", "seconds", "iterations", "search_evaluations", "search_seconds"):
        result[name] = float(content[name])
    return result


@click.command()
@click.option("--fields", default="oned,mixture,images,spectrum", show_default=True,
              help="Of these and what --network of train_schedule.py takes.")
@click.option("--solvers", default=",".join(SOLVERS), show_default=True)
@click.option("--steps", default="3,5,7,10,18", show_default=True)
@click.option("--iterations", default=500, show_default=True, help="Of the long search.")
@click.option("--batch", default=64, show_default=True, help="Noises that the search differentiates at once.")
@click.option("--cache", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(fields: str, solvers: str, steps: str, iterations: int, batch: int, cache: Path, out: Optional[Path]) -> None:
    """Table of end-point errors: ART's grid, the long search's, the refined one."""
    store, config, table = Store(cache), RefineConfig(), {}
    for name in fields.split(","):
        denoiser, identity = field_of(name)
        for parameter in denoiser.parameters():
            parameter.requires_grad_(False)
        for solver in solvers.split(","):
            for k in (int(part) for part in steps.split(",")):
                what = {"refine_search": 1, "field": identity, "solver": solver, "steps": k}
                content = {
                    **kept(store, {**what, "iterations": iterations, "rate": RATE},
                           partial(searched, denoiser, solver, k, iterations, batch)),
                    **kept(store, {**what, "config": asdict(config), "version": 2},
                           partial(refined, denoiser, solver, k, config)),
                }
                table.setdefault(name, {}).setdefault(solver, {})[str(k)] = shown = row(content)
                show(name, solver, k, shown)
    if out:
        write_json(out, {"iterations": iterations, "searched": SEARCHED, "held": HELD, "config": asdict(config),
                         "table": table})
        click.echo(f"wrote {out}")


def show(name: str, solver: str, k: int, figures: Dict[str, Any]) -> None:
    """One line of a cell."""
    means = "  ".join(f"{key} {figures[key]['mean']:.4g} ({figures[key]['median']:.4g})"
                      for key in ("art", "search", "refined"))
    ratio = figures["over_search"]
    click.echo(f"{name} {solver} K={k}: {means}  refined/search {ratio['mean']:.3f}±{ratio['stderr']:.3f} "
               f"(median {ratio['median']:.3f})  {figures['evaluations']:.0f} evaluations, {figures['seconds']:.1f} s")


if __name__ == "__main__":
    main()
