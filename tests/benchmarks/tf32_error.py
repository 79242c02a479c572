"""Where TF32 hurts: its error in |Q| by differences from level to level and over 0.01 sigma, and in samples.

Symbols
-------
TF32       operands of convolutions and products rounded to 10 bits of mantissa, products added in float32, as
           NVIDIA's tensor cores do; played here on any machine
error      of |Q|: RMS over trajectories of | |Q| / |Q|_64 - 1 | at a noise level, |Q|_64 of the same network in float64
           on the same trajectories; of samples: RMS over images and pixels of the distance to float64's end points
direct     J/J* of the optimum that the erring profile gives, as a clock, on float64's profile: what the error costs

    python -m tests.benchmarks.tf32_error --out tests/benchmarks/results/tf32_error.json
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import click
import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import edm
from art_edm.measure.dense_paths import measure_along, measure_profile
from art_edm.measure.field import rms
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.cli import versions
from art_edm.runtime.files import write_json
from art_edm.sampling.solvers import sample

PRODUCTS = {"conv2d", "conv_transpose2d", "linear", "matmul", "__matmul__", "bmm", "addmm", "baddbmm", "einsum"}


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to 10 bits of mantissa, to the nearest."""
    return ((x.contiguous().view(torch.int32) + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


class Tf32(TorchFunctionMode):
    """Within it, the operands of products are rounded."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in PRODUCTS:
            operands = [i for i, value in enumerate(args) if isinstance(value, torch.Tensor)][:2]  # not the bias
            args = [to_tf32(v) if i in operands and v.dtype == torch.float32 else v for i, v in enumerate(args)]
        return function(*args, **(kwargs or {}))


class Tf32Denoiser(Denoiser):
    """A denoiser in simulated TF32."""

    def __init__(self, inner: Denoiser) -> None:
        super().__init__(inner.img_channels, inner.img_resolution)
        self.inner, self.sigma_data, self.difference_step = inner, inner.sigma_data, inner.difference_step

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        with Tf32():
            return self.inner.denoise(x, sigma, class_labels)


def clock_score(profile: Profile, reference: Profile) -> float:
    """J/J* on `reference` of the optimum of `profile`."""
    return reference.cost(profile.direct(4096).values) / reference.optimum


def profile_errors(found: Profile, exact: Profile) -> Dict[str, float]:
    """Error of |Q| over noise levels, of q, of J*, and its price."""
    each = np.sqrt(np.square(found.norm / exact.norm - 1).mean(axis=0))  # [P]
    mean = np.abs(found.norm.mean(axis=0) / exact.norm.mean(axis=0) - 1)
    return {
        "median": float(np.median(each)), "max": float(each.max()), "max_at_sigma": float(found.sigma[each.argmax()]),
        "mean_max": float(mean.max()), "J_star": found.optimum / exact.optimum - 1,
        "direct": clock_score(found, exact), "median_above_1": float(np.median(each[found.sigma > 1])),
    }


def rows_of_profiles(models: Dict[str, Denoiser], trajectories: int, points: int) -> Dict[str, Any]:
    """Errors of both measurements, printed as they are found."""
    exact, table = models["float64"], {}
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn((trajectories, *exact.img_shape), generator=generator, dtype=torch.float64)
    clock = GaussianClock(exact.sigma_max, exact.sigma_data)
    kinds: Dict[str, Callable[..., Profile]] = {"along": measure_along, "over 0.01 sigma": measure_profile}
    for kind, measure in kinds.items():
        reference = measure(exact, latents, clock, points)
        for name, model in models.items():
            if model is exact:
                continue
            row = profile_errors(measure(model, latents, clock, points), reference)
            table[f"{kind}, {name}"] = row
            click.echo(f"{kind:<16} {name:<8} error of |Q|: median {row['median']:.1e}, largest {row['max']:.1e} "
                       f"(sigma {row['max_at_sigma']:.3g}); of q {row['mean_max']:.1e}; J* {row['J_star']:+.1e}; "
                       f"its optimum's J/J* {row['direct']:.5f}")
    return table


def rows_of_samples(models: Dict[str, Denoiser], noises: int, steps: int) -> Dict[str, float]:
    """RMS distance of Heun's end points to float64's, and that of float64's to twice the steps."""
    exact = models["float64"]
    latents = torch.randn((noises, *exact.img_shape), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = edm(steps, exact.sigma_min, exact.sigma_max)
    ends = {name: sample(model, latents, grid, "heun", batch=16) for name, model in models.items()}
    fine = sample(exact, latents, edm(4 * steps, exact.sigma_min, exact.sigma_max), "heun", batch=16)
    distances = {name: ends[name] - ends["float64"] for name in models if name != "float64"}
    distances["the grid itself"] = ends["float64"] - fine
    found = {name: float(rms(distance).square().mean().sqrt()) for name, distance in distances.items()}
    click.echo(f"samples, Heun, {steps} steps of EDM's rule: distance " + ", ".join(
        f"{name} {value:.1e}" for name, value in found.items()))
    return found


@click.command()
@click.option("--network", default="mnist", show_default=True, help="A network whose weights can be cast to float64.")
@click.option("--trajectories", default=8, show_default=True)
@click.option("--points", default=85, show_default=True)
@click.option("--noises", default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the results as JSON.")
def main(network: str, trajectories: int, points: int, noises: int, out: Optional[Path]) -> None:
    """Print the errors of float32 and of TF32 against float64."""
    single = load_network(network).denoiser
    models = {"float64": copy.deepcopy(single).double(), "float32": single, "tf32": Tf32Denoiser(single)}
    found = {"network": network, "trajectories": trajectories, "points": points, "noises": noises,
             "profile": rows_of_profiles(models, trajectories, points),
             "samples": rows_of_samples(models, noises, 18), "versions": versions()}
    if out is not None:
        write_json(out, found)


if __name__ == "__main__":
    main()
