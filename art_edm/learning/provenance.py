"""What a run reports: its score against the exact optimum, its provenance, its table."""

from __future__ import annotations

from typing import Any, Dict, List, Optional

import numpy as np

from art_edm.grids.grid import Grid
from art_edm.learning.training import TrainConfig, TrainResult
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import Network
from art_edm.runtime.cli import command_line, versions
from art_edm.sampling.baselines import hand_made

__all__ = ["choice", "clock_score", "costs", "provenance", "rule_scores", "table"]

FINE_STEPS = 4096  # steps at which a clock's J is taken, as the limit of many steps


def clock_score(result: TrainResult) -> float:
    """J/J* of the learned clock; of the direct method, 1 by construction."""
    profile = result.profile
    if result.learned is None:
        values = profile.direct(FINE_STEPS).values
    else:
        values = result.learned.sigma(np.linspace(0, 1, FINE_STEPS + 1))
        values[0], values[-1] = profile.horizon, 0.0
    return profile.cost(values) / profile.optimum


def rule_scores(denoiser: Denoiser, profile: Profile) -> Dict[str, float]:
    """J/J* of each hand-made rule as a clock, in the limit of many steps."""
    return {
        name: profile.cost(grid.values) / profile.optimum for name, grid in hand_made(denoiser, FINE_STEPS).items()
    }


def provenance(
    network: Network, config: TrainConfig, result: TrainResult, grid: Grid, seconds: Dict[str, float]
) -> Dict[str, Any]:
    """The sidecar of a learned grid: all that is needed to judge and to repeat it.

    `J_over_J_star` and `J_over_J_star_rules` compare clocks, in the limit of many steps;
    `J_over_J_star_grids` compares grids of this number of steps, theta constant in each step, where even
    the optimal clock's grid (`direct`) is above 1. What weighting or refinement did to the grid is in the last alone.
    """
    profile = result.profile
    grids = {**hand_made(network.denoiser, grid.num_steps), "direct": profile.direct(grid.num_steps), "this": grid}
    score, evaluations = clock_score(result), sum(result.evaluations.values())
    return {
        "num_steps": grid.num_steps, "sigma_max": grid.sigma_max, "method": config.method, "preset": config.preset,
        "J": score * profile.optimum, "J_star": profile.optimum, "J_over_J_star": score,
        "J_over_J_star_rules": rule_scores(network.denoiser, profile),
        "J_over_J_star_grids": {name: profile.cost(g.values) / profile.optimum for name, g in grids.items()},
        # of an SDE it would be the noise of single paths
        "price_of_distillation": None if config.solver == "sde" else profile.price,
        "terminal_error": result.terminal_error,
        "evaluations": evaluations, "evaluations_by_stage": result.evaluations,
        "network_calls": evaluations * network.denoiser.networks,
        "seconds": sum(seconds.values()), "seconds_by_stage": seconds,
        "seed": config.seed, "network": {"name": network.name, "sha256": network.sha256, **network.details},
        "versions": versions(), "command": command_line(), "settings": config.settings(),
    }


def table(record: Dict[str, Any]) -> List[str]:
    """Lines of the table shown after a run, from the sidecar's record."""
    label = "ART-RL" if record["method"] == "rl" else "direct"
    label = "this grid" if {"weighted", "refined"} & set(record) else label
    steps = record["num_steps"]
    lines = [f"{'J/J*':<14}{'clock':>10}{f'K = {steps}':>12}"]
    clocks = {**record["J_over_J_star_rules"], "direct": 1.0, "this": record["J_over_J_star"]}
    for name, value in record["J_over_J_star_grids"].items():
        if name == "direct" and label == "direct":
            continue
        shown = label if name == "this" else name
        clock = "-" if shown == "this grid" else _number(clocks[name])
        lines.append(f"{shown:<14}{clock:>10}{_number(value):>12}")
    price, error = record["price_of_distillation"], record["terminal_error"]
    notes = [f"price of distillation {price:.4f}"] if price is not None else []
    notes += [f"terminal error {error:+.4f}"] if error is not None else []
    return [*lines, ", ".join(notes)] if notes else lines


def choice(record: Dict[str, Any], given: bool) -> List[str]:
    """One line, of a grid that was asked for by its evaluations: which solver and why; none of another grid.

    `given` says whether the solver was asked for, too.
    """
    if "nfe" not in record:
        return []
    evaluations, solver, steps, tried = record["nfe"], record["solver"], record["num_steps"], record.get("tried", {})
    named = lambda name, k: f"{name} in {k} step{'s' * (k > 1)}"
    if tried:
        best = sorted(tried.items(), key=lambda each: each[1]["mean"])
        shown = [name if one["num_steps"] == steps else named(name, one["num_steps"]) for name, one in best]
        errors = ", ".join(f"{name} {one['mean']:.4g}" for name, (_, one) in zip(shown, best))
        why = f"end-point errors on validation noises, before refinement: {errors}"
    else:
        why = "as --solver says" if given else "recommended"
    return [f"NFE {evaluations}: {named(solver, steps)}; {why}"]


def _number(value: float) -> str:
    return f"{value:.4f}" if value < 100 else f"{value:.4g}"


def costs(record: Dict[str, Any], peak: Optional[float] = None) -> str:
    """One line: evaluations and seconds by stage."""
    stages = ", ".join(f"{name} {seconds:.1f}" for name, seconds in record["seconds_by_stage"].items())
    memory = f"; peak memory {peak:.2f} GB" if peak else ""
    guided = record["network_calls"] != record["evaluations"]
    calls = f" ({record['network_calls']:,} by either network)" if guided else ""
    return f"{record['evaluations']:,} images evaluated{calls}; {record['seconds']:.1f} s: {stages}{memory}"
