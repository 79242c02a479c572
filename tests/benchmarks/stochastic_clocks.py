"""Errors of the reverse SDE on clocks for what its steps do wrong, on ART's, and on EDM's rule; optimal clocks, no RL.

Symbols
-------
strong    RMS distance to the exact path of the same Brownian motion
weak      the standard deviation of the end over the data's, less 1
u         v + sigma^2, the variance of a path of Gaussian data N(0, v): all is linear there, and every error of any
          grid is a recursion of three numbers, the variances of both paths and their covariance
local     the strong error's clock without growth
pinned    K - 1 steps to sigma_min, then one to 0: the clock of Euler-Maruyama does not know that its last is another
searched  the grid of least error, by BFGS over its levels from the clock's own
churn     EDM's: sigma is raised to (1 + S / K) sigma by fresh noise before each step of Heun's method

Run by hand: python -m tests.benchmarks.stochastic_clocks --out=stochastic_clocks.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import click
import numpy as np
import torch
from scipy.optimize import minimize

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid
from art_edm.measure.dense_paths import measure_along
from art_edm.measure.field import rms
from art_edm.measure.sde_errors import SdeErrors, measure_stochastic
from art_edm.metrics.detectors import load_detector
from art_edm.metrics.frechet import moments
from art_edm.metrics.metric import measure
from art_edm.metrics.mnist import load_mnist
from art_edm.metrics.panel import Accumulators, Panel
from art_edm.metrics.standard_errors import difference
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.refining.levenberg_marquardt import levels_of, parameters_of
from art_edm.runtime.files import write_json
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.sde import Brownian, sample_sde
from art_edm.sampling.solvers import fitted, supported

STEPS = (3, 5, 7, 10, 18, 36)
SETTINGS = ((1.0, "ancestral"), (1.0, "euler"), (0.5, "ancestral"))  # beta and kind of step; networks: the first two
LEARNING = 12  # noises that clocks are measured on
SPECTRUM = np.geomspace(1e-4, 1, 9)  # variances of the directions of a churned Gaussian, as of images
CHURN = (0.0, 0.1, 0.2, 0.4)  # S / K
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)


def gaussian_errors(levels: np.ndarray, v: float, beta: float, step: str) -> Tuple[float, float]:
    """Strong and weak error of a grid [K + 1] that ends at 0, for data N(0, v); exact up to the quadrature."""
    s, t, a = levels[:-1], levels[1:], (1 + beta) / 2
    u, after, ratio = v + s**2, v + t**2, t / s
    if step == "ancestral":
        kept, added = ratio ** (1 + beta), t**2 * (1 - ratio ** (2 * beta))
    else:
        kept, added = 1 - (1 + beta) * (1 - ratio), beta * (s**2 - t**2)
    kept[-1] = added[-1] = 0.0  # the step to 0 returns D
    factor, exact_factor = (v + kept * s**2) / u, (after / u) ** a
    exact_added = after * (1 - (after / u) ** beta)
    low, high = np.log(s[:-1] ** 2), np.log(t[:-1] ** 2)  # of y, a level's square
    y = np.exp((low + high) / 2 + (low - high) / 2 * NODES[:, None])
    carried = (t[:-1] ** 2 / y) ** a if step == "ancestral" else 1.0
    shared = (WEIGHTS[:, None] * (low - high) / 2 * y * beta * (after[:-1] / (y + v)) ** a * carried).sum(axis=0)
    exact = found = both = u[0]  # a path starts from its own law
    for k in range(len(s)):
        exact = exact_factor[k] ** 2 * exact + exact_added[k]
        found = factor[k] ** 2 * found + added[k]
        both = exact_factor[k] * factor[k] * both + (shared[k] if k < len(shared) else 0.0)
    return float(np.sqrt(max(exact + found - 2 * both, 0.0))), float(np.sqrt(found / v) - 1)


def churned(levels: np.ndarray, v: np.ndarray, amount: float) -> np.ndarray:
    """Standard deviation at the end of Heun's method with churn, for every variance of the data."""
    found = v + levels[0] ** 2
    for s, t in zip(levels, levels[1:]):
        raised = s * (1 + amount)
        found, h, slope = found + raised**2 - s**2, t - raised, raised / (v + raised**2)
        factor = 1 + h * slope if t == 0 else 1 + h / 2 * (slope + t / (v + t**2) * (1 + h * slope))
        found = factor**2 * found
    return np.sqrt(found)


def searched(error: Callable[[np.ndarray], float], start: np.ndarray) -> np.ndarray:
    """The grid of least error near `start`; the first level stays."""
    objective = lambda q: float(np.log(error(levels_of(q, start[0])) + 1e-12))
    found = minimize(objective, parameters_of(start), method="BFGS", options={"maxiter": 400})
    return levels_of(found.x, start[0])


def draw(denoiser: Denoiser, count: int, seed: int) -> torch.Tensor:
    return torch.randn((count, *denoiser.img_shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def grids_of(denoiser: Denoiser, beta: float, step: str) -> Dict[str, Callable[[int], np.ndarray]]:
    """Rule -> K -> levels."""
    clock, noises = GaussianClock(denoiser.sigma_max, denoiser.sigma_data), draw(denoiser, LEARNING, 5)
    measured = {"strong": measure_stochastic(denoiser, noises, clock, 85, errors=SdeErrors(beta, step))}
    if hasattr(denoiser, "variance"):
        measured["local"] = measure_stochastic(denoiser, noises, clock, 85, errors=SdeErrors(beta, step, tracers=0))
    if step == "ancestral":
        measured["weak"] = measure_stochastic(denoiser, noises, clock, 85, errors=SdeErrors(beta, step, "weak"))
    measured["art"] = measure_along(denoiser, noises, clock, 85)
    rules = {name: lambda k, p=p: fitted(denoiser, p.direct(k)).values for name, p in measured.items()}
    if step == "euler":
        for name in ("strong", "art"):
            rules[f"{name}, pinned"] = lambda k, p=measured[name]: np.append(
                p.direct(k - 1).values[:-1], [denoiser.sigma_min, 0.0])
    for name in ("edm", "uniform"):
        rules[name] = lambda k, name=name: supported(denoiser, hand_made(denoiser, k)[name]).values
    return rules


def closed_form(denoiser: Denoiser, beta: float, step: str) -> Dict[str, List[Dict[str, Any]]]:
    """Errors of every rule, and of the searched optimum of each error, where the data are Gaussian."""
    v, found = float(denoiser.variance.mean()), {}
    rules = grids_of(denoiser, beta, step)
    for k in STEPS:
        grids = {name: rule(k) for name, rule in rules.items()}
        for i, name in enumerate(("searched, strong", "searched, weak")):
            error = lambda levels, i=i: abs(gaussian_errors(levels, v, beta, step)[i])
            starts = [grids["strong"], grids.get("weak", grids["art"]), grids["art"]]
            grids[name] = min((searched(error, start) for start in starts), key=error)
        for name, levels in grids.items():
            strong, weak = gaussian_errors(levels, v, beta, step)
            found.setdefault(name, []).append({"strong": strong, "weak": weak, "levels": levels.tolist()})
    return found


def paths_of(
    denoiser: Denoiser, rules: Dict[str, Callable[[int], np.ndarray]], steps: Sequence[int], fine: int = 0
) -> Tuple[Dict[Tuple[str, int], Grid], np.ndarray]:
    """Every grid, and all their levels (and more) as one path, on which they share the Brownian motion."""
    grids = {(name, k): Grid(rule(k)) for k in steps for name, rule in rules.items()}
    dense = [rules[name](fine // 2) for name in ("strong", "edm") if fine]
    return grids, np.unique(np.concatenate([*dense, *(grid.values for grid in grids.values())]))[::-1]


def sampled(denoiser: Denoiser, beta: float, step: str, noises: int, fine: int) -> Dict[str, List[Dict[str, Any]]]:
    """Strong errors of every rule against one fine solution, and what each gains over ART's clock, noise by noise."""
    rules, latents = grids_of(denoiser, beta, step), draw(denoiser, noises, 1000)
    del rules["uniform"]
    grids, path = paths_of(denoiser, rules, STEPS, fine)
    motion = Brownian(path=path)
    reference = batches(lambda part: sample_sde(denoiser, part, Grid(path), beta, brownian=motion), latents)
    each = {key: rms(batches(lambda part, grid=grid: sample_sde(denoiser, part, grid, beta, step=step, brownian=motion),
                             latents) - reference).numpy() for key, grid in grids.items()}
    found: Dict[str, List[Dict[str, Any]]] = {}
    for (name, k), error in each.items():
        total, less = float(np.sqrt(np.square(error).mean())), each["art", k] - error
        found.setdefault(name, []).append({
            "strong": total, "stderr": deviation(np.square(error)) / (2 * total), "median": float(np.median(error)),
            "gain": float(less.mean() / each["art", k].mean()), "gain_stderr": deviation(less) / each["art", k].mean(),
            "levels": grids[name, k].values.tolist(),
        })
    return found


def batches(run: Callable[[torch.Tensor], torch.Tensor], latents: torch.Tensor) -> torch.Tensor:
    return torch.cat([run(part) for part in latents.split(64)])


def deviation(values: np.ndarray) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def lenet_fid(denoiser: Denoiser, data: Optional[Path], count: int, steps: Sequence[int]) -> List[Dict[str, Any]]:
    """LeNet-FID to MNIST's training set of ancestral samples, beta = 1, all from the same noise; less ART's, paired."""
    detector = load_detector("lenet", denoiser.img_shape, denoiser.device)
    pixels = load_mnist("train", data)[0].split(500)
    mean, cov = moments(torch.cat([detector.features(part[:, None]) for part in pixels]).double().numpy())
    panel, reference = Panel(["fid"], {"detector": detector}), {"mu": mean, "sigma": cov}
    rules = grids_of(denoiser, 1.0, "ancestral")
    kept = {name: rules[name] for name in ("strong", "weak", "art", "edm")}
    grids, path = paths_of(denoiser, kept, steps)
    latents, found = draw(denoiser, count, 2000), {}
    for key, grid in grids.items():
        ends = batches(lambda part, grid=grid: sample_sde(denoiser, part, grid, brownian=Brownian(path=path)), latents)
        images = (ends * 127.5 + 128).clip(0, 255).to(torch.uint8)
        judged = Accumulators(panel, count, panel.groups(count))
        for i, part in enumerate(images.split(500)):
            judged.update(part, range(500 * i, 500 * i + len(part)), [str(key)] * len(part))
        found[key] = measure([judged.of["fid"]], reference)
    rows = []
    for (name, k), fid in found.items():
        less = difference(fid, found["art", k], True)
        rows.append({"rule": name, "steps": k, "fid": fid.mean, "stderr": fid.stderr, "less_art": less.value,
                     "less_art_stderr": less.stderr})
        click.echo(f"LeNet-FID K={k:<3}{name:<7}{fid.mean:.2f}±{fid.stderr:.2f}  less ART's "
                   f"{less.value:+.2f}±{less.stderr:.2f}")
    return rows


def churn_table(num_steps: Tuple[int, ...] = (5, 10, 18)) -> List[Dict[str, Any]]:
    """The searched grid of each amount of churn, its W2, and that of the grid searched without churn."""
    distance = lambda levels, amount: float(
        np.sqrt(np.square(churned(levels, SPECTRUM, amount) - np.sqrt(SPECTRUM)).sum()))
    rows = []
    for k in num_steps:
        still = None
        for amount in CHURN:
            starts = [80.0 * (1 - np.arange(k + 1) / k) ** rho for rho in (3, 5, 7)]
            starts += [] if still is None else [still]
            error = lambda levels, amount=amount: distance(levels, amount)
            best = min((searched(error, start) for start in starts), key=error)
            still = best if still is None else still
            rule = 80.0 * (1 - np.arange(k + 1) / k) ** 7
            rows.append({"steps": k, "churn": amount, "searched": error(best), "of no churn": error(still),
                         "edm, unpinned": error(rule), "levels": best.tolist()})
    return rows


@click.command()
@click.option("--networks", default="gaussian:0.5,oned,mnist", show_default=True)
@click.option("--noises", default=64, show_default=True)
@click.option("--fine", default=120, show_default=True, help="Levels of the reference beside the grids' own.")
@click.option("--fid", default=0, show_default=True, help="Samples of mnist for its LeNet-FID; 0: none.")
@click.option("--fid-steps", default="5,7,10,18", show_default=True)
@click.option("--mnist", type=click.Path(path_type=Path), help="Folder with MNIST's files; downloaded once otherwise.")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    networks: str, noises: int, fine: int, fid: int, fid_steps: str, mnist: Optional[Path], out: Optional[Path]
) -> None:
    """A line for each network, kind of step and rule: strong (and weak) errors by number of steps."""
    table: Dict[str, Any] = {}
    for name in filter(None, networks.split(",")):
        denoiser = load_network(name).denoiser
        exact = hasattr(denoiser, "variance")
        for beta, step in SETTINGS if exact else SETTINGS[:2]:
            cells = closed_form(denoiser, beta, step) if exact else sampled(denoiser, beta, step, noises, fine)
            table.setdefault(name, {})[f"{step} {beta:g}"] = cells
            for rule, row in cells.items():
                more = (f"{c['weak']:+.4f}" if "weak" in c else f"±{c['stderr']:.4f} {c['gain']:+.3f}" for c in row)
                parts = (f"{c['strong']:.4f}{text}" for c, text in zip(row, more))
                click.echo(f"{name:<13}{step:<10}{beta:<4g}{rule:<17}" + "  ".join(parts))
    steps = [int(part) for part in fid_steps.split(",")]
    fids = lenet_fid(load_network("mnist").denoiser, mnist, fid, steps) if fid else []
    churn = churn_table()
    for row in churn:
        click.echo(f"churn K={row['steps']:<3}" + "  ".join(f"{key} {row[key]:.4g}" for key in list(row)[1:5]))
    if out:
        write_json(out, {"steps": STEPS, "noises": noises, "table": table, "churn": churn, "lenet_fid": fids})


if __name__ == "__main__":
    main()
