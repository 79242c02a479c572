"""Table 1: the one-dimensional example, where everything is known.

Symbols
-------
data       N(0, 1); paths start from N(0, 1 + T^2), T = 3, and Euler steps carry them linearly
gain       what a grid multiplies a path by: prod (1 + (sigma_{k+1} - sigma_k) sigma_k / (1 + sigma_k^2))
noise-free W2 of the end points' exact distribution N(0, gain^2 (1 + T^2)) to N(0, 1): |gain sqrt(1 + T^2) - 1|
W2         of n sorted end points to the n means of N(0, 1) between its quantiles i/n: from samples, one-sided
two sets   W2 of 10,000 sorted end points to as many drawn from N(0, 1), as a study without the exact answer has it
limit      the grid with the least noise-free error, sigma_k = tan((1 - k/K) arctan T)
"""

from __future__ import annotations

import math
import time
from typing import Dict, List, Tuple

import numpy as np
import torch
from scipy.special import ndtri

from art_edm.grids.grid import Grid
from art_edm.learning.provenance import clock_score
from art_edm.models.denoiser import Denoiser
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.noise import seeded_generator
from art_edm.sampling.solvers import nfe, sample
from paper.context import Lab
from paper.experiments import Experiment
from paper.kept_runs import Run
from paper.plots import plot_clock, plot_grids
from paper.report import Result

__all__ = ["grids_of", "limit", "noise_free", "quantile_means", "run_oned"]

_METHOD = 1  # raised whenever the same cell would get other numbers
_SET = 10_000  # of the two sets
_FINEST = 20  # training steps of the runs for small K


def limit(num_steps: int, horizon: float) -> Grid:
    """The grid of the least end-point error; equidistant in arctan sigma."""
    inner = np.tan((1 - np.arange(1, num_steps) / num_steps) * math.atan(horizon))
    return Grid([horizon, *inner, 0.0])


def noise_free(grid: Grid) -> float:
    """|gain sqrt(1 + T^2) - 1| of Euler's method."""
    here, after = grid.values[:-1], grid.values[1:]
    gain = np.prod(1 + (after - here) * here / (1 + here**2))
    return float(abs(gain * math.sqrt(1 + grid.sigma_max**2) - 1))


def quantile_means(count: int) -> np.ndarray:
    """Mean of N(0, 1) between its quantiles i/n and (i + 1)/n, [n]: n times the drop of the density."""
    edges = ndtri(np.arange(1, count) / count)
    density = np.concatenate([[0.0], np.exp(-edges**2 / 2) / math.sqrt(2 * math.pi), [0.0]])
    return -np.diff(density) * count


def grids_of(num_steps: int, denoiser: Denoiser, own: Run, once: Run) -> Dict[str, Grid]:
    """Every row's grid of K = num_steps."""
    return {
        **hand_made(denoiser, num_steps), "art_rl": own.grid(num_steps), "art_rl_once": once.grid(num_steps),
        "direct": own.profile.direct(num_steps), "limit": limit(num_steps, denoiser.sigma_max),
    }


def training_steps(num_steps: int) -> int:
    """The least multiple of K from 20 on: every time of the grid is a time of the rollouts."""
    return num_steps * -(-_FINEST // num_steps)


def run_oned(experiment: Experiment, lab: Lab) -> Result:
    """The table; its figures in the folder of results."""
    began, network = time.monotonic(), lab.network("oned")
    denoiser, once = network.denoiser, lab.run(network)
    runs = {k: lab.run(network, train_steps=training_steps(k), exploration=0.1) for k in experiment.steps}
    grids = {k: grids_of(k, denoiser, run, once) for k, run in runs.items()}
    names = list(grids[experiment.steps[0]])
    num = max(lab.num or experiment.num, experiment.blocks)
    size = num // experiment.blocks
    found = {name: [_measure(denoiser, grids[k][name], size, experiment.blocks, lab) for k in experiment.steps]
             for name in names}
    result = Result(
        experiment.name, experiment.title, "W2 to the exact distribution, from samples",
        [f"K = {k}" for k in experiment.steps], {name: [float(w[:, 0].mean()) for w in found[name]] for name in names},
        {name: [_stderr(w[:, 0]) for w in found[name]] for name in names}, experiment.paper,
        {"Noise-free error": {name: [noise_free(grids[k][name]) for k in experiment.steps] for name in names},
         f"W2 between two sets of {min(_SET, size):,} samples, as in the paper": {
             name: [float(w[:, 1].mean()) for w in found[name]] for name in names}},
        [nfe("euler", k) for k in experiment.steps], list(experiment.steps), "euler",
    )
    result.settings = _settings(runs, once, size, experiment.blocks, lab, began)
    result.notes = [
        "art_rl: trained for each K (rollouts of the least multiple of K from 20 on, exploration 0.1). art_rl_once: "
        "one run of the default recipe, read off at every K. direct: the optimum of the same objective, without "
        "learning. limit: the least error that any grid can have.",
    ]
    if lab.lead:
        result.figures = _figures(runs, grids, lab)
    return result


def _stderr(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _settings(
    runs: Dict[int, Run], once: Run, size: int, blocks: int, lab: Lab, began: float
) -> Dict[str, object]:
    """What the figures depend on."""
    return {
        "samples": f"{blocks} x {size}", "seed": lab.seed, "T": 3.0,
        "J/J* of the clocks": {str(k): clock_score(run) for k, run in runs.items()},
        "J/J* of art_rl_once": clock_score(once), "iterations": len(once.history["cost"]),
        "evaluations of training": sum(sum(run.evaluations.values()) for run in [*runs.values(), once]),
        "seconds": time.monotonic() - began,
    }


def _measure(denoiser: Denoiser, grid: Grid, size: int, blocks: int, lab: Lab) -> np.ndarray:
    """W2 to the exact quantiles and between two sets, [blocks, 2]; each block is a cell."""
    rows = []
    for block in range(blocks):
        what = {"kind": "w2", "method": _METHOD, "levels": grid.values.tolist(), "num": size, "seed": lab.seed,
                "block": block}
        content = lab.store.load(what)
        if content is None:  # cheap enough for every process to do; only one writes
            content = {"w2": np.array(_block(denoiser, grid, size, lab.seed, block))}
            if lab.lead:
                lab.store.save(what, content)
            lab.work().look()
        rows.append(content["w2"])
    return np.array(rows)


def _block(denoiser: Denoiser, grid: Grid, size: int, seed: int, block: int) -> Tuple[float, float]:
    generator = seeded_generator(seed, (1 << 29) + block)
    noise = torch.randn(size, 1, 1, 1, generator=generator, dtype=torch.float64)
    points = sample(denoiser, noise.to(denoiser.device), grid, "euler", batch=1 << 15).flatten().cpu().numpy()
    few = min(_SET, size)
    other = torch.randn(few, generator=generator, dtype=torch.float64).numpy()
    return _w2(np.sort(points), quantile_means(size)), _w2(np.sort(points[:few]), np.sort(other))


def _w2(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(np.square(one - other).mean()))


def _figures(runs: Dict[int, Run], grids: Dict[int, Dict[str, Grid]], lab: Lab) -> List[List[str]]:
    """Figures 4 and 8: the learned clock of the largest K, and its grids."""
    k = max(runs)
    plot_clock(lab.out / "figure4.png", f"one-dimensional example, K = {k}", runs[k])
    few = min((k for k in runs if k >= 10), default=k)
    plot_grids(lab.out / "figure8.png", f"one-dimensional example, K = {few}",
               {name: grids[few][name] for name in ("uniform", "dpm", "edm", "limit", "art_rl")})
    return [["figure4.png", f"Speed and clock of ART-RL over the last 1,024 rollouts, K = {k}, with quartiles and "
             "central 99 %; dashed: the exact optimum."],
            ["figure8.png", f"The grids of K = {few}."]]
