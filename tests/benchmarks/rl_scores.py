"""J/J* of ART-RL over fields, seeds and base clocks, against an independent, finer profile.

Run by hand: python tests/benchmarks/rl_scores.py [oned gaussian anisotropic mnist cifar10 wrong live ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, Optional, Tuple

import click
import numpy as np
import torch

from art_edm.grids.clocks import GaussianClock, make_clock
from art_edm.learning.training import PRESETS, TrainConfig, TrainResult, live, train
from art_edm.measure.dense_paths import PathOptions, measure_profile
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.files import write_json

ENDS = {"K": [2, 5, 10, 20, 50, 100]}


def anisotropic() -> Denoiser:
    """8x8 Gaussian data whose standard deviations run from 0.05 to 1.5."""
    std = torch.logspace(np.log10(0.05), np.log10(1.5), 64, dtype=torch.float64).reshape(1, 8, 8)
    return GaussianDenoiser(0.0, std.square(), img_shape=(1, 8, 8))


def reference(denoiser: Denoiser, config: TrainConfig, finer: int) -> Profile:
    """A profile from `finer` times the trajectories and points, of other noises than any run's."""
    generator = torch.Generator().manual_seed(10**6)
    shape = (finer * config.trajectories, *denoiser.img_shape)
    latents = torch.randn(shape, generator=generator, dtype=torch.float64)
    clock = GaussianClock(denoiser.sigma_max, denoiser.sigma_data)
    return measure_profile(denoiser, latents, clock, finer * config.points, options=PathOptions(batch=128))


def score(result: TrainResult, profile: Profile) -> float:
    """J/J* of the learned clock on `profile`."""
    values = result.learned.sigma(np.linspace(0, 1, 4097))
    values[0], values[-1] = profile.horizon, 0.0
    return profile.cost(values) / profile.optimum


def base_score(config: TrainConfig, denoiser: Denoiser, profile: Profile) -> float:
    """J/J* of the base clock itself: where learning starts."""
    clock = make_clock(config.clock, denoiser.sigma_max, config.recipe.clock_sigma_data or denoiser.sigma_data)
    return profile.cost(clock.sigma(np.linspace(0, 1, 4097))) / profile.optimum


def linear_end_error(values: np.ndarray) -> float:
    """|std - 1| of Euler on the 1-D example without sampling noise: it is linear."""
    growth = 1 + np.diff(values) * values[:-1] / (1 + values[:-1] ** 2)
    return abs(np.sqrt(10) * np.prod(growth) - 1)


def cases(which: Tuple[str, ...]) -> List[Tuple[str, Denoiser, TrainConfig]]:
    """(name, denoiser, configuration) of the runs asked for."""
    default = PRESETS["default"]
    fields = {"oned": lambda: load_network("oned").denoiser, "gaussian": lambda: load_network("gaussian:0.5").denoiser,
              "anisotropic": anisotropic, "mnist": lambda: load_network("mnist").denoiser,
              "cifar10": lambda: load_network("cifar10").denoiser}
    found = [(name, fields[name](), default) for name in fields if name in which]
    if "wrong" in which:
        for name in ("gaussian", "mnist"):
            denoiser = fields[name]()
            wide = default.changed(clock_sigma_data=3 * denoiser.sigma_data)
            found.append((f"{name}, sigma_data x 3", denoiser, wide))
            found.append((f"{name}, EDM clock", denoiser, default.changed(clock="edm")))
    if "live" in which:
        found.append(("mnist, live", fields["mnist"](), live(default)))
    return found


@click.command()
@click.argument("which", nargs=-1)
@click.option("--seeds", default=3, show_default=True)
@click.option("--finer", default=4, show_default=True, help="Trajectories and points of the reference, over a run's.")
@click.option("--out", type=click.Path(path_type=Path))
def main(which: Tuple[str, ...], seeds: int, finer: int, out: Optional[Path]) -> None:
    """One line per run: J/J* of the base clock, of the learned clock, and of the profile's own optimum."""
    profiles: Dict[str, Profile] = {}
    records = []
    for name, denoiser, config in cases(which or ("oned", "gaussian", "anisotropic", "mnist", "wrong", "live")):
        field = name.split(",")[0]
        if field not in profiles:
            profiles[field] = reference(denoiser, config, finer)
        profile = profiles[field]
        for seed in range(1 if config.rollout == "live" else seeds):
            result = train(denoiser, config.changed(seed=seed))
            own = result.profile.direct(4096).values
            record = {
                "case": name, "seed": seed, "start": base_score(config, denoiser, profile),
                "J_over_J_star": score(result, profile), "direct": profile.cost(own) / profile.optimum,
                "terminal_error": result.terminal_error,
                "evaluations": result.evaluations, "seconds": result.seconds,
            }
            line = f"{name:<24} seed {seed}  start {record['start']:.4f}  RL {record['J_over_J_star']:.4f}  "
            line += f"direct {record['direct']:.4f}  RL {result.seconds['rl']:.1f} s  "
            line += f"{sum(result.evaluations.values()):,} evaluations"
            if field == "oned":
                record["end"] = {k: linear_end_error(result.learned.grid(k).values) for k in ENDS["K"]}
                direct = {k: linear_end_error(profile.direct(k).values) for k in ENDS["K"]}
                line += "  end error RL/direct " + " ".join(f"{record['end'][k] / direct[k]:.4f}" for k in ENDS["K"])
            click.echo(line)
            records.append(record)
    if out:
        write_json(out, records)


if __name__ == "__main__":
    main()
