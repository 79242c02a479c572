"""What a clock could gain that sees the sample: price of distillation, and end points on a clock of each sample's own.

Symbols
-------
price    J*_x / J*, see `profile`: what the objective could fall by if the clock saw all of the path
shared   the optimal grid of as many other noises, the same for all
own      the optimal grid of the sample's |Q| alone; half: of the mean of its |Q| and the others' q
error    RMS distance of a sample's end to a fine solution from the same noise, [M]
gain     mean of shared less own (or half) errors, and its standard error over noises (paired), in units of the mean
         shared error

A sample's own clock is made from its whole exact path, which no sampler has seen when it starts. The price bounds what
any state-dependent clock could gain of the objective J, the sum of local errors. End points are another matter: a clock
may do better there than the optimum of J, and does worse where steps end off the path whose |Q| it was made from.

Run by hand: python -m tests.benchmarks.state_dependence --cifar10=cifar10.tar.xz --out=state_dependence.json
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Dict, List, Optional

import click
import numpy as np
import torch
from paper.tables.empirical_fields import cifar10_images, empirical, mnist_images

from art_edm.grids.clocks import GaussianClock
from art_edm.measure.dense_paths import measure_along
from art_edm.measure.field import rms
from art_edm.measure.local_errors import measure_errors
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser, MixtureDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.files import write_json
from art_edm.sampling.solvers import SOLVERS, euler_step, fitted, sample, slope_of

STEPS = (3, 5, 10)
POINTS = 85
CASES = (("euler", "art"), ("heun", "art"), ("heun", "heun"))  # solver, and whose local errors the clock is for


def levels_of(denoiser: Denoiser, profile: Profile, common: np.ndarray, share: float, num_steps: int) -> torch.Tensor:
    """The optimal grid of each trajectory, [K + 1, M, 1, 1, 1], with a share of the common profile [P] in its own."""
    rows = (replace(profile, norm=((1 - share) * row + share * common)[None], _fine={}) for row in profile.norm)
    grids = [fitted(denoiser, row.direct(num_steps)).values for row in rows]
    return torch.from_numpy(np.stack(grids, axis=1))[..., None, None, None]


@torch.no_grad()
def ends_of(denoiser: Denoiser, latents: torch.Tensor, levels: torch.Tensor, solver: str) -> torch.Tensor:
    """As `solvers.sample`, with levels [K + 1, M, 1, 1, 1] of each sample's own."""
    parts = []
    for start in range(0, len(latents), 64):
        some, sigma = latents[start:start + 64], levels[:, start:start + 64]
        x, past, slope = denoiser.initial(some, float(sigma[0, 0])), (), slope_of(denoiser)
        for above, below in zip(sigma, sigma[1:]):
            x, past = (SOLVERS[solver].step if below.all() else euler_step)(slope, x, above, below, past)
        parts.append(x)
    return torch.cat(parts)


def summary(each: np.ndarray) -> Dict[str, float]:
    return {"rms": float(np.sqrt(np.square(each).mean())), "mean": float(each.mean()), "median": float(np.median(each))}


def compare(denoiser: Denoiser, noises: int) -> Dict[str, Any]:
    """Prices, and for each case and number of steps the errors on both kinds of grid."""
    clock = GaussianClock(denoiser.sigma_max, denoiser.sigma_data)
    learning, judging = (
        torch.randn((n, *denoiser.img_shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for n, seed in ((noises, 5), (noises, 1000))
    )
    methods = {"art": measure_along, "heun": partial(measure_errors, solver="heun")}
    common = {name: method(denoiser, learning, clock, POINTS) for name, method in methods.items()}
    own = {name: method(denoiser, judging, clock, POINTS) for name, method in methods.items()}
    found: Dict[str, Any] = {"price": {name: own[name].price for name in own}, "cases": []}
    exact = sample(denoiser, judging, fitted(denoiser, common["art"].direct(100)), "heun", batch=64)
    for solver, objective in CASES:
        for k in STEPS:
            grid = fitted(denoiser, common[objective].direct(k))
            shared = rms(sample(denoiser, judging, grid, solver, batch=64) - exact).numpy()
            cell = {"solver": solver, "objective": objective, "steps": k, "shared": summary(shared)}
            for kind, share in (("own", 0.0), ("half", 0.5)):
                levels = levels_of(denoiser, own[objective], common[objective].norm.mean(axis=0), share, k)
                single = rms(ends_of(denoiser, judging, levels, solver) - exact).numpy()
                gain = (shared - single) / shared.mean()
                cell[kind] = {
                    **summary(single), "gain": float(gain.mean()), "better": float((single < 0.999 * shared).mean()),
                    "gain_stderr": float(gain.std(ddof=1) / np.sqrt(noises)),
                }
            found["cases"].append(cell)
    return found


def field(name: str, cifar10: Optional[Path], mnist: Optional[Path], images: int) -> Denoiser:
    """A field by name; the two exact fields of images are mnist-set and cifar10-set."""
    if name == "anisotropic":  # standard deviations 0.05 to 1.5
        widths = torch.linspace(0.05, 1.5, 16, dtype=torch.float64).reshape(1, 4, 4)
        return GaussianDenoiser(0.0, widths.square(), (1, 4, 4))
    if name == "modes":  # N(-1, 0.1^2) and N(1, 0.1^2) in one dimension
        return MixtureDenoiser([0.5, 0.5], torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1), 0.1)
    if name in ("mnist-set", "cifar10-set"):
        found = mnist_images(mnist, images) if name == "mnist-set" else cifar10_images(cifar10, images)
        return empirical(name, found, torch.device("cpu")).denoiser
    return load_network(name).denoiser


@click.command()
@click.option("--fields", default="gaussian:0.5,oned,anisotropic,modes,mnist,mnist-set,cifar10-set", show_default=True)
@click.option("--mnist", type=click.Path(path_type=Path), help="Folder with MNIST's files; downloaded once otherwise.")
@click.option("--cifar10", type=click.Path(path_type=Path), help="CIFAR-10 as a folder or archive.")
@click.option("--images", default=1000, show_default=True, help="Of the exact fields.")
@click.option("--noises", default=64, show_default=True)
@click.option("--out", type=click.Path(path_type=Path))
def main(
    fields: str, mnist: Optional[Path], cifar10: Optional[Path], images: int, noises: int, out: Optional[Path]
) -> None:
    """A line for each field, solver, objective and number of steps."""
    table: Dict[str, Any] = {}
    for name in fields.split(","):
        found = table[Path(name).stem if "/" in name else name] = compare(field(name, cifar10, mnist, images), noises)
        prices = ", ".join(f"{key} {price:.3f}" for key, price in found["price"].items())
        click.echo(f"{name}: price of distillation {prices}")
        for cell in found["cases"]:
            parts: List[str] = [" -> ".join(f"{cell[kind][key]:.4f}" for kind in ("shared", "own", "half"))
                                for key in ("rms", "median")]
            parts += [f"{cell[kind]['gain']:+.3f}±{cell[kind]['gain_stderr']:.3f}" for kind in ("own", "half")]
            click.echo(f"  {cell['solver']:<6}{cell['objective']:<6}K={cell['steps']:<3}" + "   ".join(parts))
    if out:
        write_json(out, {"noises": noises, "images": images, "table": table})


if __name__ == "__main__":
    main()
