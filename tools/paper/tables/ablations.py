"""Ablations: which part of the method does what, on fields that cost little.

Symbols
-------
J/J*        cost of a run's learned clock over the least possible one, by the run's own profile
budget      iterations that a run was given; it ends with the smallest steps, whatever their number
iterations  to J/J* <= 1.05: the least budget whose runs (of several seeds) end there on average
fixed       a policy of constant variance rho^2 / m in the base clock, m the mean of q at the start, so that exploring
            costs what it costs the adaptive one, whose variance is rho^2 / q
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Callable, Dict, List, Optional, Tuple

import numpy as np
import torch

from art_edm.grids.clocks import make_clock
from art_edm.learning.config import PRESETS, live
from art_edm.learning.provenance import FINE_STEPS, clock_score
from art_edm.models.analytic import GaussianDenoiser, MixtureDenoiser
from art_edm.models.loading import Network
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.solvers import nfe
from paper.context import Lab
from paper.experiments import Experiment
from paper.kept_runs import Run
from paper.plots import plot_lines
from paper.report import Result
from paper.tables.table1 import noise_free
from paper.tables.transfer import SET, Fine, endpoint, fields

__all__ = ["cheap_fields", "fixed_variance", "first_below", "run_ablation"]

SEEDS = 3
GOAL = 1.05
SMALL = dict(rounds=2, train_steps=80, batch=128)
PROFILE = dict(trajectories=8, points=48)  # enough to learn from, where many runs each measure their own
FEW = 500  # images of an exact field there


def run_ablation(experiment: Experiment, lab: Lab) -> Result:
    """The ablation of this name."""
    began = time.monotonic()
    result = _ABLATIONS[experiment.name](experiment, lab)
    result.settings.update(seed=lab.seed, seconds=time.monotonic() - began)
    return result


def cheap_fields(lab: Lab, size: int = SET) -> Dict[str, Network]:
    """Closed forms, then the bundled network and the exact fields of `size` real images."""
    widths = torch.linspace(0.05, 1.5, 16, dtype=torch.float64).reshape(1, 4, 4)
    modes = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)
    closed = {
        "oned": lab.network("oned"), "gaussian": lab.network("gaussian:0.5"),
        "anisotropic": Network(GaussianDenoiser(0.0, widths.square(), (1, 4, 4)).to(lab.device), "anisotropic", None,
                               {"std": "0.05 to 1.5, 16 pixels"}),
        "two modes": Network(MixtureDenoiser([0.5, 0.5], modes, 0.1).to(lab.device), "modes", None,
                             {"std": "0.1 around -1 and 1"}),
    }
    return {**closed, **fields(lab, size)}


def fixed_variance(network: Network, lab: Lab, clock: str, exploration: float) -> Dict[str, float]:
    """Settings that make the policy's variance constant: q's floor above every q, lambda in proportion."""
    profile = lab.run(network, method="direct", **PROFILE).profile
    base = make_clock(clock, network.denoiser.sigma_max, network.denoiser.sigma_data)
    s = np.linspace(0, 1, FINE_STEPS + 1)
    unit = profile.optimum / profile.horizon
    q = profile.norms(base.sigma(s)) * np.square(base.rate(s)) / unit  # [M, n]
    floor = 1.01 * float(q.max())
    mean = profile.cost(base.sigma(s)) / profile.optimum
    return {"epsilon": floor, "temperature": exploration**2 / mean * floor * unit}


def first_below(scores: Dict[int, List[float]], goal: float = GOAL) -> Optional[int]:
    """The least budget from which on the mean score is at most `goal`; None if there is none."""
    met = [budget for budget in sorted(scores) if all(
        np.mean(scores[other]) <= goal for other in scores if other >= budget)]
    return met[0] if met else None


def _result(experiment: Experiment, metric: str, columns: List[str], rows: Dict[str, Any], **more: Any) -> Result:
    return Result(experiment.name, experiment.title, metric, columns, rows, **more)


def _variance(experiment: Experiment, lab: Lab) -> Result:
    """From EDM's clock, which is wrong for every field here: the policy has a way to go."""
    budgets, clock, rho = (12, 25, 50, 100, 200), "edm", 0.25
    known, needed = cheap_fields(lab, FEW), {"adaptive": [], "fixed": []}
    ends = {f"{kind}, {n} iterations": [] for kind in needed for n in budgets}
    for network in known.values():
        fixed = fixed_variance(network, lab, clock, rho)
        for kind, settings in (("adaptive", {"exploration": rho}), ("fixed", fixed)):
            recipe = {"clock": clock, **SMALL, **PROFILE, **settings}
            scores = {n: _scores(network, lab, iterations=n, **recipe) for n in budgets}
            needed[kind].append(first_below(scores))
            for n in budgets:
                ends[f"{kind}, {n} iterations"].append(_mean(scores[n]))
    each = 3 * (2 * SMALL["train_steps"] + 1) * SMALL["batch"]
    result = _result(experiment, f"iterations to J/J* <= {GOAL}", list(known), needed)
    result.more = {
        "Evaluations, were every rollout live (cached, as here, they cost none)": {
            kind: [None if n is None else n * each for n in row] for kind, row in needed.items()},
        f"J/J* at the end, mean of {SEEDS} seeds": ends,
    }
    result.settings = {"budgets": str(budgets), "base clock": clock, "exploration": rho, **SMALL, **PROFILE,
                       "seeds": SEEDS, "images of an exact field": FEW}
    result.notes = ["fixed: a constant variance in the base clock that costs as much exploration at the start as the "
                    "adaptive lambda/|Q|. A dash: not within the largest budget; where a run diverged, no J/J*."]
    return result


def _scores(network: Network, lab: Lab, **settings: Any) -> List[float]:
    """J/J* of runs of several seeds; infinite where learning diverged."""
    scores = []
    for seed in range(lab.seed, lab.seed + SEEDS):
        try:
            scores.append(clock_score(lab.run(network, **{"seed": seed, **settings})))
        except FloatingPointError:
            scores.append(float("inf"))
    return scores


def _mean(scores: List[float]) -> Optional[float]:
    """Mean of scores; None, a dash in the report, where a run diverged."""
    return float(np.mean(scores)) if np.isfinite(scores).all() else None


def _clock(experiment: Experiment, lab: Lab) -> Result:
    """Rollouts as coarse as the grid, or finer: what the grid's own error says."""
    steps, fine = (3, 5, 10), Fine(lab.num or 128)
    known = {name: network for name, network in cheap_fields(lab).items() if name in ("oned", "mnist", "mnist-set")}
    kinds: Dict[str, Callable[[int], Dict[str, Any]]] = {
        f"fine clock ({PRESETS['default'].recipe.train_steps} steps)": lambda k: {},
        "K steps, Simpson": lambda k: {"train_steps": k},
        "K steps, left end (the paper's)": lambda k: {"train_steps": k, "simpson": False},
    }
    found: Dict[str, List[Tuple[float, float]]] = {kind: [] for kind in [*kinds, "direct"]}
    for name, network in known.items():
        for k in steps:
            runs = {kind: lab.run(network, **settings(k)) for kind, settings in kinds.items()}
            grids = {**{kind: run.grid(k) for kind, run in runs.items()},
                     "direct": next(iter(runs.values())).profile.direct(k)}
            for kind, grid in grids.items():
                error = None if name == "oned" else endpoint(network, grid, "euler", fine, lab)
                found[kind].append((noise_free(grid), 0.0) if error is None else (error.rms, error.rms_stderr))
    result = _result(
        experiment, "end-point error, Euler", [f"{name} K = {k}" for name in known for k in steps],
        {kind: [value for value, _ in row] for kind, row in found.items()},
        stderr={kind: [stderr for _, stderr in row] for kind, row in found.items()},
    )
    result.settings = {"noises": fine.noises, "solver": "euler"}
    result.notes = ["fine clock: one run for all K, its clock read off. K steps: a run for each K, whose rollouts take "
                    "the grid's own steps, weighed by Simpson's rule or by q at their start. direct: the optimum of "
                    "the objective in the limit of many steps, without learning. oned: the exact error of its "
                    "end points' distribution."]
    return result


def _live(experiment: Experiment, lab: Lab) -> Result:
    """The same field, through the denoiser in every rollout and through interpolated trajectories."""
    config = live(PRESETS["default"])
    names = ("rollout", "batch", "repeats", "train_steps", "iterations", "actor_rate", "distill_paths")
    settings = {name: config.settings()[name] for name in names}
    names = ("oned", "gaussian", "anisotropic", *(["mnist"] if lab.num is None else []))
    known = {name: network for name, network in cheap_fields(lab).items() if name in names}
    runs = {"cached": [lab.run(network) for network in known.values()],
            "live": [lab.run(network, **settings) for network in known.values()]}
    table = lambda number: {kind: [number(run) for run in row] for kind, row in runs.items()}
    result = _result(experiment, "J/J* of the learned clock", list(known), table(clock_score))
    result.more = {"Evaluations": table(lambda run: sum(run.evaluations.values())),
                   "Seconds": table(lambda run: sum(run.seconds.values()))}
    result.settings = {key: value for key, value in settings.items() if key != "rollout"}
    result.notes = ["cached: the default recipe; its evaluations are those of the profile. live: the settings below, "
                    "as every rollout costs evaluations; one run each."]
    return result


def _price(experiment: Experiment, lab: Lab) -> Result:
    """J*_x/J*: what a clock that sees the sample could save of the cost."""
    known = cheap_fields(lab)
    runs = [lab.run(network, method="direct", trajectories=64) for network in known.values()]
    result = _result(
        experiment, "price of distillation, J*_x / J*", list(known), {"price": [run.profile.price for run in runs]},
        stderr={"price": [_price_stderr(run) for run in runs]}, better="",
        more={"J/J* of rules as clocks": {name: [
            run.profile.cost(hand_made(network.denoiser, FINE_STEPS)[name].values) / run.profile.optimum
            for network, run in zip(known.values(), runs)] for name in ("uniform", "dpm", "edm")}},
    )
    result.settings = {"trajectories": 64}
    result.notes = ["1: nothing is lost by one clock for all samples. Cost is to leading order the squared error of "
                    "Euler's method, summed over steps."]
    return result


def _price_stderr(run: Run) -> float:
    """Over trajectories, by the jackknife."""
    norm, count = run.profile.norm, len(run.profile.norm)
    groups = np.arange(count) % 8
    left = [replace(run.profile, norm=norm[groups != j], _fine={}).price for j in range(8)]
    return float(np.sqrt(7 / 8 * np.square(left - np.mean(left)).sum()))


def _solver(experiment: Experiment, lab: Lab) -> Result:
    """|Q| is Euler's local error; other solvers have another."""
    fine, steps = Fine(lab.num or experiment.num), (3, 5, 10, 18)
    network = lab.network("mnist")
    run = lab.run(network)
    columns = [(solver, k) for solver in ("euler", "heun", "rk4") for k in steps]
    grids = {k: {**{name: hand_made(network.denoiser, k)[name] for name in ("uniform", "dpm", "edm", "edm-unpinned")},
                 "direct": run.profile.direct(k), "art_rl": run.grid(k)} for k in steps}
    errors = {row: [endpoint(network, grids[k][row], solver, fine, lab) for solver, k in columns] for row in grids[3]}
    result = _result(
        experiment, "end-point error on mnist", [f"{solver} {k}, NFE {nfe(solver, k)}" for solver, k in columns],
        {row: [each.rms for each in found] for row, found in errors.items()},
        stderr={row: [each.rms_stderr for each in found] for row, found in errors.items()},
        more={"edm / art_rl": {"error": [edm.rms / own.rms if own.rms else None
                                         for edm, own in zip(errors["edm"], errors["art_rl"])]},
              "Median over noises": {row: [each.median for each in found] for row, found in errors.items()}},
    )
    result.settings = {"noises": fine.noises, "fine": f"Heun, {fine.num_steps} steps, EDM's rule"}
    return result


def _budget(experiment: Experiment, lab: Lab) -> Result:
    """The default recipe but for the number of iterations."""
    budgets = (25, 50, 100, 200, 400)
    known = cheap_fields(lab, FEW)
    found = {name: {n: [clock_score(lab.run(network, iterations=n, **PROFILE))] for n in budgets}
             for name, network in known.items()}
    rows = {f"{n} iterations": [float(np.mean(found[name][n])) for name in known] for n in budgets}
    result = _result(experiment, "J/J* of the learned clock", list(known), rows, better="")
    result.more = {f"iterations to J/J* <= {GOAL}": {"needed": [first_below(scores) for scores in found.values()]}}
    if lab.lead:
        lines: Dict[str, Tuple[List[float], List[float]]] = {
            name: (list(scores), [float(np.mean(scores[n])) - 1 for n in budgets]) for name, scores in found.items()}
        plot_lines(lab.out / "ablation-budget.png", "iterations to converge", "iterations of the run", "J/J* - 1",
                   lines)
        result.figures = [["ablation-budget.png", "Distance of the learned clock from the optimum over the iterations "
                           "that a run was given."]]
    result.settings = {"recipe": "default", **PROFILE, "images of an exact field": FEW}
    return result


_ABLATIONS: Dict[str, Callable[[Experiment, Lab], Result]] = {
    "ablation-variance": _variance, "ablation-clock": _clock, "ablation-live": _live, "ablation-price": _price,
    "ablation-solver": _solver, "ablation-budget": _budget,
}
