"""Stochastic sampling: the reverse SDE on a grid.

    dx = (1 + beta) (x - D) / sigma dsigma + sqrt(2 beta sigma |dsigma|) xi,    sigma falling

Symbols
-------
beta       strength of the noise: 0 is the probability-flow equation, 1 the reverse-time SDE. Every beta gives x the
           same law at each noise level
r, h       sigma_next / sigma and sigma - sigma_next of a step
ancestral  x_next = D + r^(1 + beta) (x - D) + N, N = sigma_next sqrt(1 - r^(2 beta)) xi: exact where D stays as it
           is. beta = 0 is Euler's step, beta = 1 the ancestral step of DDPM (2006.11239)
euler      Euler-Maruyama: D + (1 - (1 + beta)(1 - r)) (x - D) + N, N = sqrt(beta (sigma^2 - sigma_next^2)) xi. A long
           step turns x - D over and adds noise of the size of sigma: not for few steps
"""

from __future__ import annotations

import zlib
from typing import Iterable, NamedTuple, Optional

import numpy as np
import torch

from art_edm.grids.grid import Grid
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.runtime.precision import full_precision
from art_edm.sampling.noise import seeded_generator
from art_edm.sampling.solvers import supported

__all__ = ["Brownian", "SDE_STEPS", "sample_sde"]

SDE_STEPS = ("ancestral", "euler")


class Brownian(NamedTuple):
    """The Brownian motion of a run.

    Grids that share a path share the motion, whose steps add up to those of the grid.
    """

    seed: int = 0
    path: Optional[np.ndarray] = None  # descending levels between which noise is drawn, all of the grid's among them


SEED_0 = Brownian()


@torch.no_grad()
@full_precision()
def sample_sde(
    denoiser: Denoiser, latents: torch.Tensor, grid: Grid, beta: float = 1.0, step: str = "ancestral",
    class_labels: Optional[torch.Tensor] = None, brownian: Brownian = SEED_0,
) -> torch.Tensor:
    """Carry unit noise from the grid's first level to 0 by the reverse SDE; the step to 0 returns D.

    An image's noise depends on its latents and the seed alone, not on the others of the batch.

    Args:
        denoiser, latents, grid, class_labels: as of `solvers.sample`.
        beta: strength of the noise, not negative.
        step: a name in `SDE_STEPS`.
        brownian: what decides the noise.
    Returns:
        Images [B, C, H, W] float64; K evaluations each.
    Raises:
        ValueError: an unknown step or a negative beta; a level that is not on the path; as `solvers.supported`.
        NonFiniteOutput: the denoiser returned NaN or infinity.
    """
    _check(beta, step)
    levels = supported(denoiser, grid).values
    fine = levels if brownian.path is None else np.asarray(brownian.path, np.float64)
    place = np.searchsorted(-fine, -levels[:-1])
    if not np.array_equal(fine[np.minimum(place, len(fine) - 1)], levels[:-1]):
        raise ValueError("the path lacks a level of the grid; pass all of the grid's among the path's levels")
    draw = _Noise(latents, brownian.seed)
    x, check = denoiser.initial(latents, float(levels[0])).to(torch.float64), FiniteCheck(latents.device)
    for k, sigma in enumerate(levels[:-1]):
        denoised = check.see(denoiser(x, x.new_full((), sigma), class_labels), x.new_full((), sigma))
        if levels[k + 1] == 0:
            x = denoised
            break
        parts = fine[place[k]:place[k + 1] + 1]
        noise = _composed((draw() for _ in parts[1:]), parts, beta, step)
        x = _advance(x, denoised, sigma, levels[k + 1], noise, beta, step)
    check.settle()
    return x


class _Noise:
    """Unit normal images [B, C, H, W], one after the other; each image's depend on its `latents` and the seed."""

    def __init__(self, latents: torch.Tensor, seed: int) -> None:
        content = latents.detach().to("cpu", torch.float64).numpy()
        self.generators = [seeded_generator(seed, zlib.crc32(image.tobytes())) for image in content]
        self.shape, self.device = latents.shape[1:], latents.device

    def __call__(self) -> torch.Tensor:
        draws = [torch.randn(self.shape, generator=one, dtype=torch.float64) for one in self.generators]
        drawn = torch.stack(draws) if draws else torch.zeros(0, *self.shape)
        return drawn.to(self.device, non_blocking=True)


def _check(beta: float, step: str) -> None:
    if step not in SDE_STEPS:
        raise ValueError(f"found step {step!r}, expected one of {', '.join(SDE_STEPS)}")
    if not 0 <= beta < float("inf"):
        raise ValueError(f"found beta = {beta}, expected a finite number, not negative")


def _advance(
    x: torch.Tensor, denoised: torch.Tensor, sigma: float, after: float, noise: torch.Tensor, beta: float, step: str
) -> torch.Tensor:
    """One step, with the noise [B, C, H, W] it adds."""
    ratio = after / sigma
    kept = ratio ** (1 + beta) if step == "ancestral" else 1 - (1 + beta) * (1 - ratio)
    return denoised + kept * (x - denoised) + noise


def _composed(draws: Iterable[torch.Tensor], levels: np.ndarray, beta: float, step: str) -> torch.Tensor:
    """The noise of a step from the first level to the last, from unit normals of the intervals between.

    Each has the variance that arises in its interval: of an ancestral step (target / s)^(2 + 2 beta) 2 beta s ds, as
    it is carried on to the target; of Euler's 2 beta s ds. The normals stand for the same Brownian motion for all
    steps, up to how the weight (target / s)^(1 + beta) changes within an interval.
    """
    above, below, target = levels[:-1], levels[1:], levels[-1]
    if step == "ancestral":
        variance = target**2 * ((target / below) ** (2 * beta) - (target / above) ** (2 * beta))
    else:
        variance = beta * (above**2 - below**2)
    return sum(float(each) * draw for each, draw in zip(np.sqrt(np.maximum(variance, 0)), draws))
