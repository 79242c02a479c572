"""How wide should the central difference of `field.surrogate` be? Run by hand; justifies `field.DIFFERENCE_STEP`.

Symbols
-------
h          relative half-width of the difference: D at sigma (1 +- h) along the path
error      | |Q|_h - |Q| | / |Q| for one image, |Q|_h from `field.surrogate` with the model in float32 and
           |Q| from the total derivative of the same model in float64 by forward-mode differentiation

Truncation grows as h^2 and rounding as 1/h. A network's truncation is that of its noise embedding: the
highest frequency of `ScoreUNet`, e^4 log(sigma) / 4, gives (h e^4 / 4)^2 / 6, 3e-3 at h = 0.01; a trained
network uses it little. The points x lie on paths from pure noise, where alone the surrogate is used.
The exact models are rounded to float32 on the way in and out; their |Q| is smooth, so that at the
smallest sigma D hardly moves and rounding is seen first.

    python -m tests.benchmarks.difference_step
    python -m tests.benchmarks.difference_step --network ema.pt --images 32
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Dict, Iterator, Optional, Sequence, Tuple

import click
import torch

from art_edm.measure.field import drift, rms, surrogate
from art_edm.models.analytic import GaussianDenoiser, MixtureDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.unet import ScoreUNet

STEPS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
LEVELS = (60.0, 20.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.005, 0.002)


def random_network(seed: int = 0, scale: float = 0.1) -> ScoreUNet:
    """An untrained network with every parameter moved, so that no branch is zero."""
    torch.manual_seed(seed)
    net = ScoreUNet()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(scale * torch.randn_like(p))
    return net


def load_network(path: Path) -> ScoreUNet:
    """The network of a file {config, state}, or the averaged one of a training checkpoint {build, ema}."""
    data = torch.load(path, map_location="cpu", weights_only=True)
    net = ScoreUNet(**data["config" if "state" in data else "build"])
    net.load_state_dict(data["state" if "state" in data else "ema"])
    return net


def exact_models(seed: int = 0) -> Dict[str, Denoiser]:
    """Models whose surrogate has a closed form, of a small image's size."""
    rng = torch.Generator().manual_seed(seed)
    variance = 0.5 * torch.rand(1, 8, 8, generator=rng)
    means = 0.2 * torch.randn(10, 1, 8, 8, generator=rng)
    return {
        "gaussian": GaussianDenoiser(0.0, variance, (1, 8, 8)),
        "mixture": MixtureDenoiser(torch.ones(10), means, 0.3),
    }


def reference(model: Denoiser, x: torch.Tensor, sigma: float) -> torch.Tensor:
    """|Q| = |dD/dsigma| / sigma by forward-mode differentiation, x float64 -> [B]."""
    s = torch.tensor(sigma, dtype=torch.float64)
    direction = (x - model(x, s)) / s
    _, slope = torch.func.jvp(model, (x, s), (direction.detach(), torch.ones_like(s)))
    return rms(slope.detach()) / s


@torch.no_grad()
def path(model: Denoiser, levels: Sequence[float], images: int, num_steps: int) -> Iterator[Tuple[float, torch.Tensor]]:
    """Points of paths from pure noise, at each of the descending `levels`; float64 [B, C, H, W]."""
    rng = torch.Generator().manual_seed(1)
    sigma = model.sigma_max
    x = model.initial(torch.randn(images, *model.img_shape, generator=rng, dtype=torch.float64), sigma)
    steps = max(1, num_steps // len(levels))
    for level in levels:
        for i in range(steps):  # geometric within each interval
            following = sigma * (level / sigma) ** (1 / (steps - i))
            width = following - sigma
            slope = -drift(model, x, sigma)
            x = x + width / 2 * (slope - drift(model, x + width * slope, following))
            sigma = following
        yield level, x


def errors(
    model: Denoiser, exact: Denoiser, images: int, num_steps: int
) -> Iterator[Tuple[float, float, torch.Tensor]]:
    """(sigma, RMS of |Q|, error [len(STEPS), B]) at each level; `model` computes in float32, `exact` in float64."""
    for sigma, x in path(exact, LEVELS, images, num_steps):
        norm = reference(exact, x, sigma)
        found = torch.stack([surrogate(model, x.float(), sigma, step=h).norm.double() for h in STEPS])
        yield sigma, float(norm.square().mean().sqrt()), (found - norm).abs() / norm


@click.command()
@click.option("--network", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="weights of a ScoreUNet")
@click.option("--images", default=16, show_default=True, help="paths per model")
@click.option("--num-steps", default=64, show_default=True, help="Heun steps of a path")
def main(network: Optional[Path], images: int, num_steps: int) -> None:
    """Print the error of the surrogate's norm for each step h and noise level: the worst over images."""
    models = exact_models()
    models["network"] = load_network(network) if network else random_network()
    for name, model in models.items():
        worst, median = [], []
        exact = copy.deepcopy(model).double()
        click.echo(f"\n{name}: largest relative error of |Q| over {images} images")
        click.echo(f"{'sigma':>8} {'|Q|':>9} " + " ".join(f"{f'h={h:g}':>9}" for h in STEPS))
        for sigma, norm, error in errors(model, exact, images, num_steps):
            worst.append(error.amax(dim=1))
            median.append(error.median(dim=1).values)
            click.echo(f"{sigma:8g} {norm:9.2e} " + " ".join(f"{e:9.1e}" for e in worst[-1].tolist()))
        for label, rows in (("max over sigma", worst), ("max of medians", median)):
            click.echo(f"{label:>18} " + " ".join(f"{e:9.1e}" for e in torch.stack(rows).amax(dim=0).tolist()))


if __name__ == "__main__":
    main()
