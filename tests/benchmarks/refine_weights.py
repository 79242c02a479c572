"""Levels and weights refined (`--refine=weights`) against ART's grid with `clock`, and against refined levels.

All begin with ART-RL's grid and the solver `clock`; errors are mean RMS distances from exact end points over noises
that had no part in anything. Cells are kept in --cache, so that a long table can be made in pieces.
Run by hand:
    python -m tests.benchmarks.refine_weights mnist --curve=8,16,64 --cache=cells --out=refine_weights.json
    python -m tests.benchmarks.refine_weights mixture --steps=3,5 --search=2000 --noises=256 --test=256 --cache=cells
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import click
import numpy as np
import torch

from art_edm.grids.grid import Grid, edm, edm_unpinned
from art_edm.grids.weights import written_rows
from art_edm.measure.field import rms
from art_edm.refining.config import RefineConfig
from art_edm.refining.noise_sets import STREAM, NoiseSets
from art_edm.refining.parameters import Parameters, free_places
from art_edm.refining.refine import refine
from art_edm.refining.solver_jacobian import Noises, Scheme
from art_edm.runtime.context import Context
from art_edm.runtime.files import write_json
from art_edm.runtime.store import Store
from art_edm.sampling.noise import seeded_generator
from art_edm.sampling.solvers import sample, slope_of
from art_edm.sampling.weighted import table_of, weighted
from art_edm.schedule import learn_schedule
from tests.benchmarks.refine_search import field_of

POOL, FIRST_VALIDATION, SEED = 512, 256, 9101  # noises of training from the first on, of validation; seed of the judges
CHUNK, FINE = 32, 20  # exact ends by RK4 on EDM's rule: 0.002 from those of 60 steps on mnist
RATE = 0.01  # of the search by Adam, down to a hundredth of it along a cosine
Content = Dict[str, np.ndarray]


class Bench:
    """One field, its noises, and what is known already."""

    def __init__(self, name: str, store: Store, validation: int, test: int, batch: int) -> None:
        (self.denoiser, self.identity), self.store, self.batch = field_of(name), store, batch
        self.validation, self.test = self.noises("pool", FIRST_VALIDATION, validation), self.noises("test", 0, test)

    def kept(self, make: Callable[[], Content], **what: Any) -> Content:
        """A cell, made if it is not there."""
        what = {"refine_weights": 1, "network": self.identity, **what}
        content = self.store.load(what)
        if content is None:
            content = make()
            self.store.save(what, content)
        return content

    def noises(self, name: str, first: int, count: int) -> Noises:
        """Noises of one purpose with their exact ends."""
        generator = seeded_generator(0, STREAM) if name == "pool" else torch.Generator().manual_seed(SEED)
        latents = torch.randn((POOL, *self.denoiser.img_shape), generator=generator, dtype=torch.float64)
        low, top = self.denoiser.sigma_min, self.denoiser.sigma_max
        fine = edm(FINE, low, top) if self.denoiser.pinned else edm_unpinned(FINE, top)
        parts = []
        for i in range(first, first + count, CHUNK):
            make = lambda i=i: {"ends": sample(self.denoiser, latents[i : i + CHUNK], fine, "rk4").numpy()}
            parts.append(torch.from_numpy(self.kept(make, ends=FINE, noises=name, first=i)["ends"]))
        return Noises(latents[first : first + count], None, torch.cat(parts)[:count])

    def start(self, steps: int) -> Grid:
        """ART-RL's grid, by the default run."""
        make = lambda: {"levels": learn_schedule(self.denoiser, (steps,))[steps].grid.values}
        return Grid(self.kept(make, art=steps)["levels"])

    def judged(self, scheme: Scheme, **more: np.ndarray) -> Content:
        """A scheme and its errors on the noises of the judges."""
        solver = "clock" if scheme.weights is None else weighted(scheme.weights)
        ends = sample(self.denoiser, self.test.latents, Grid(scheme.levels), solver, batch=CHUNK)
        weights = {} if scheme.weights is None else {"weights": scheme.weights}
        return {"levels": scheme.levels, **weights, "errors": rms(ends - self.test.ends).numpy(), **more}

    def refined(self, steps: int, config: RefineConfig) -> Content:
        """By `refine`."""
        train = self.noises("pool", 0, -(-config.noises // CHUNK) * CHUNK).part(slice(0, config.noises))
        drawn = NoiseSets(train, self.validation, 0, 0.0)
        found = refine(self.denoiser, self.start(steps), "clock", config, Context(batch=CHUNK), drawn)
        best = min(found.history, key=lambda row: row["validation"])
        return self.judged(Scheme(found.grid.values, found.weights), train=np.array(best["train"]),
                           validation=np.array(best["validation"]), evaluations=np.array(found.evaluations))

    def searched(self, steps: int, iterations: int, count: int) -> Content:
        """The best levels and weights that Adam meets on its way over `count` noises; by autograd."""
        grid, noises = self.start(steps), self.noises("pool", 0, count)
        table = table_of("clock", grid.values)
        form = Parameters(grid.sigma_max, 0.0, free_places(steps, 4), table)
        p = torch.tensor(form.vector(Scheme(grid.values, table)), requires_grad=True)
        optimizer = torch.optim.Adam([p], lr=RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations, eta_min=RATE / 100)
        best = (np.inf, form.scheme(p.detach().numpy()))
        for _ in range(iterations):
            optimizer.zero_grad()
            total = sum(float(self._backward(p, form, noises.part(slice(a, a + self.batch)), count))
                        for a in range(0, count, self.batch))
            if total < best[0]:
                best = (total, form.scheme(p.detach().numpy()))
            optimizer.step()
            schedule.step()
        return self.judged(best[1], train=np.array(best[0]))

    def _backward(self, p: torch.Tensor, form: Parameters, part: Noises, count: int) -> torch.Tensor:
        """The share of some noises in the mean error; its gradient is added to p's."""
        q, w = p[: len(p) - len(form.places)], p[len(p) - len(form.places):]
        sigma = torch.cat([q.new_tensor([form.first]), form.first * q.sigmoid().cumprod(0), q.new_zeros(1)])
        rows = torch.zeros(form.fixed.shape, dtype=torch.float64).index_put(
            tuple(torch.tensor(form.places).T), w)  # all others are 0 with `clock`
        x, slopes, slope = self.denoiser.initial(part.latents, form.first), [], slope_of(self.denoiser)
        for k in range(len(sigma) - 1):
            slopes.insert(0, slope(x, sigma[k]))
            x = x + (sigma[k + 1] - sigma[k]) * sum(weight * f for weight, f in zip(rows[k], slopes))
        error = ((x - part.ends).flatten(1).square().mean(dim=1) + 1e-24).sqrt().sum() / count
        error.backward()
        return error.detach()


def row(content: Content, base: Content) -> Dict[str, Any]:
    """Figures of a cell; the ratio's standard error is that of a paired difference."""
    e, scale = content["errors"], float(base["errors"].mean())
    paired = float((e - base["errors"]).std(ddof=1) / len(e) ** 0.5)
    numbers = {name: float(content[name]) for name in ("train", "validation", "evaluations") if name in content}
    weights = {"weights": written_rows(content["weights"])} if "weights" in content else {}
    return {"mean": float(e.mean()), "stderr": float(e.std(ddof=1) / len(e) ** 0.5), "median": float(np.median(e)),
            "ratio": float(e.mean()) / scale, "ratio_stderr": paired / scale, **numbers,
            "levels": content["levels"].tolist(), **weights}


def picture(path: Path, steps: int, points: Dict[int, Dict[str, Any]]) -> None:
    """Errors over the number of noises."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    counts = sorted(points)
    for name, label in (("train", "noises of training"), ("validation", "validation noises"), ("mean", "other noises")):
        axes.plot(counts, [points[count][name] for count in counts], marker="o", label=label)
    axes.set(xscale="log", xlabel="noises of training", ylabel="mean end-point error", title=f"K = {steps}")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@click.command()
@click.argument("name")
@click.option("--steps", default="3,4,5,6", show_default=True)
@click.option("--kinds", default="clock,weights,levels", show_default=True)
@click.option("--noises", default=48, show_default=True)
@click.option("--validation", default=64, show_default=True)
@click.option("--test", default=64, show_default=True)
@click.option("--iterations", default=9, show_default=True)
@click.option("--curve", default="", help="Other numbers of noises, for the first of --steps.")
@click.option("--search", default=0, help="Iterations of Adam, on the same noises.")
@click.option("--batch", default=CHUNK, show_default=True, help="Noises that Adam differentiates at once.")
@click.option("--cache", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path))
@click.option("--picture", "drawn", type=click.Path(path_type=Path))
def main(
    name: str, steps: str, kinds: str, noises: int, validation: int, test: int, iterations: int, curve: str,
    search: int, batch: int, cache: Path, out: Optional[Path], drawn: Optional[Path],
) -> None:
    """A line for each cell."""
    bench, table = Bench(name, Store(cache), validation, test, batch), {}
    for parameter in bench.denoiser.parameters():
        parameter.requires_grad_(False)
    judges = {"validation": validation, "test": test}

    def cell(kind: str, k: int, count: int = 0) -> Content:
        if kind == "clock":
            return bench.kept(lambda: bench.judged(Scheme(bench.start(k).values)), clock=k, **judges)
        if kind == "search":
            return bench.kept(partial(bench.searched, k, search, count), search=k, iterations=search, noises=count,
                              **judges)
        given = dict(noises=count, validation=validation, iterations=iterations, cheap_iterations=iterations)
        config = RefineConfig.of_weights(**given) if kind == "weights" else RefineConfig(**given)
        return bench.kept(partial(bench.refined, k, config), refined=k, settings=asdict(config), **judges)

    wanted = [(kind, int(k), noises) for k in steps.split(",") for kind in kinds.split(",")]
    wanted += [("weights", int(steps.split(",")[0]), int(count)) for count in curve.split(",") if count]
    wanted += [("search", int(k), noises) for k in steps.split(",") if search]
    for kind, k, count in wanted:
        shown = row(cell(kind, k, count), cell("clock", k))
        table.setdefault(str(k), {}).setdefault(kind, {})[str(count if kind != "clock" else 0)] = shown
        click.echo(f"{name} K={k} {kind:<8} {count:>4} noises: {shown['mean']:.4f} ± {shown['stderr']:.4f}, to clock "
                   f"{shown['ratio']:.3f} ± {shown['ratio_stderr']:.3f}; train {shown.get('train', np.nan):.4f} "
                   f"validation {shown.get('validation', np.nan):.4f}, {shown.get('evaluations', 0):.0f} evaluations")
        if out:
            write_json(out, {"network": name, "noises": noises, **judges, "iterations": iterations, "table": table})
    if drawn:
        points = {int(count): each for count, each in table[steps.split(",")[0]]["weights"].items()}
        picture(drawn, int(steps.split(",")[0]), points)


if __name__ == "__main__":
    main()
