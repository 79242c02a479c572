"""Dense trajectories: the exact path followed through many noise levels, and |Q| measured on the way.

Symbols
-------
M, P    trajectories; noise levels on each
levels  noise levels [P], from sigma_max down to the denoiser's lowest
norm    |Q|, [M, P]
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Callable, List, Optional, Tuple

import numpy as np
import torch

from art_edm.grids.clocks import Clock
from art_edm.measure.field import Surrogate, evaluate, rms, surrogate
from art_edm.measure.profile import TINY, Profile
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.runtime.distributed import ALONE, World

__all__ = [
    "BATCH", "Draw", "OnStep", "PathOptions", "WHOLE", "advance", "draws", "extrapolated", "measure_along",
    "measure_profile", "place_points", "supported_levels", "travel",
]

OnStep = Callable[[int], None]
Draw = Callable[[int], Tuple[torch.Tensor, Optional[torch.Tensor]]]
BATCH = 8  # few enough for several processes to have some, enough for a network to be busy
LOG_SHARE = 0.25  # share of the profile's points that is placed by log sigma
KNOWN_SHARE = 0.75  # of the clock's own share, placed by the optimum where that is known; log sigma then has a fifth


@dataclass(frozen=True)
class PathOptions:
    """How the trajectories of a measurement are evaluated."""

    class_labels: Optional[torch.Tensor] = None  # one-hot [M, label_dim]
    batch: int = BATCH  # images per evaluation; processes share out whole batches, so their number changes no rounding
    on_step: Optional[OnStep] = None  # called with the number of images evaluated so far
    world: World = ALONE  # processes that share the trajectories; each gets all of the profile


WHOLE = PathOptions()  # one process, images of no class

def advance(x: torch.Tensor, point: Surrogate, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Follow the path from `sigma` to `target`, exactly where D is linear in sigma along it.

    d(x / sigma)/dsigma = -D / sigma^2; with D = a + b sigma: x / sigma changes by a (1/target - 1/sigma)
    - b log(target / sigma). The slope b is there already: it was measured for |Q|.

    Args:
        x: [B, C, H, W]; sigma, target: [B], positive.
    Returns:
        [B, C, H, W]; second-order accurate, no evaluation.
    """
    sigma, target = sigma.reshape(-1, 1, 1, 1), target.reshape(-1, 1, 1, 1)
    ratio = target / sigma
    base = point.denoised - point.slope * sigma
    return ratio * x + base * (1 - ratio) - point.slope * target * ratio.log()


def place_points(clock: Clock, sigma_min: float, points: int, known: Optional[Profile] = None) -> np.ndarray:
    """Noise levels [P] from sigma_max to sigma_min: equally spaced in a mix of the clock and of log sigma.

    The clock alone is right for the data; log sigma sees what a network does at its lowest levels. With a profile
    that is known already, by its optimum above all: there paths bend, and must be followed.
    """
    sigma = np.geomspace(clock.sigma_max, sigma_min, 4096)
    s, log_share = clock.fraction(sigma), LOG_SHARE
    if known is not None:
        optimal = known.optimal_fraction(s)
        s, log_share = (1 - KNOWN_SHARE) * s / s[-1] + KNOWN_SHARE * optimal / optimal[-1], LOG_SHARE / 5
    mixed = (1 - log_share) * s / s[-1] + log_share * np.linspace(0, 1, len(sigma))
    levels = np.exp(np.interp(np.linspace(0, 1, points), mixed, np.log(sigma)))
    levels[0], levels[-1] = clock.sigma_max, sigma_min
    return levels


def supported_levels(denoiser: Denoiser, clock: Clock, points: int, known: Optional[Profile] = None) -> np.ndarray:
    """`place_points` rounded to the levels the denoiser supports, each once, still from high to low."""
    levels = place_points(clock, denoiser.sigma_min, points, known)
    rounded = denoiser.round_sigma(torch.from_numpy(levels)).cpu().numpy()
    return np.unique(rounded)[::-1].copy()


def measure_profile(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, points: int, options: PathOptions = WHOLE
) -> Profile:
    """Travel M trajectories over P noise levels and measure |Q| at each: 3 M P evaluations.

    Args:
        latents: unit normal noise, [M, C, H, W].
        clock: base clock of the quadratures, and for three quarters of the points' placement.
        points: P, at least 2; noise levels from sigma_max to the denoiser's sigma_min. A model of discrete
            levels is measured at those, each once.
    Raises:
        NonFiniteOutput: the denoiser returned NaN or infinity; the message names the noise level.
    """
    levels = supported_levels(denoiser, clock, points)  # [P]

    def norms(x: torch.Tensor, labels: Optional[torch.Tensor], tell: Callable[[], None]) -> torch.Tensor:
        columns, check = [], FiniteCheck(x.device)
        for k, level in enumerate(levels):
            sigma = x.new_full((len(x),), level)
            point = surrogate(denoiser, x, sigma, labels, see=check.see)
            columns.append(point.norm)
            if k + 1 < len(levels):
                x = advance(x, point, sigma, x.new_full((len(x),), levels[k + 1]))
            tell()
        check.settle()
        return torch.stack(columns, dim=1)  # [b, P]

    began = time.perf_counter()
    norm, evaluations = travel(denoiser, latents, clock, norms, len(levels), options)
    return Profile(clock, levels, norm, evaluations, time.perf_counter() - began)


def measure_along(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, points: int, options: PathOptions = WHOLE,
    known: Optional[Profile] = None,
) -> Profile:
    """As `measure_profile`, from M P evaluations: D is differenced from one level of the trajectory to the next.

    The difference over an interval is the mean slope within it, which belongs to its geometric midpoint: exactly
    so for the law sigma^-2 that slopes follow far above the data. The same differences, extrapolated, carry the path
    on to the next level. The two ends are extrapolated, linearly in log-log; where |Q| is zero, or there is one
    interval alone, they are held constant. `known` places the levels, as of `place_points`.
    """
    levels = supported_levels(denoiser, clock, points, known)  # [P]

    def norms(x: torch.Tensor, labels: Optional[torch.Tensor], tell: Callable[[], None]) -> torch.Tensor:
        columns, slopes, before, check = [], [torch.zeros_like(x)], None, FiniteCheck(x.device)
        for k, level in enumerate(levels):
            denoised = evaluate(denoiser, x, level, labels, check.see)
            if before is not None:
                slopes = [*slopes[-1:], (denoised - before) / (level - levels[k - 1])]
                columns.append(rms(slopes[-1]) / (level * levels[k - 1]) ** 0.5)
            if k + 1 < len(levels):
                sigma, target = x.new_full((len(x),), level), x.new_full((len(x),), levels[k + 1])
                x = advance(x, Surrogate(denoised, extrapolated(slopes, levels, k), None), sigma, target)
            before = denoised
            tell()
        check.settle()
        return torch.stack(columns, dim=1)  # [b, P - 1]

    began = time.perf_counter()
    norm, evaluations = travel(denoiser, latents, clock, norms, len(levels) - 1, options)
    return Profile(clock, *_with_ends(levels, norm), evaluations, time.perf_counter() - began)


def draws(denoiser: Denoiser, generator: torch.Generator) -> Draw:
    """Unit normal latents [n, C, H, W] and labels, as many as are asked for, from a generator of their own."""

    def draw(count: int) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        latents = torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)
        return latents.to(denoiser.device), denoiser.draw_labels(count, generator)

    return draw


def travel(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, norms: Callable[..., torch.Tensor], width: int,
    options: PathOptions,
) -> Tuple[np.ndarray, int]:
    """|Q| [M, width] by `norms` of each batch, each process on its share of the latents, and all evaluations."""
    start, count, batch, world = denoiser.evaluations, len(latents), options.batch, options.world
    full = torch.zeros(count + 1, width, dtype=torch.float64)  # the last row counts evaluations

    def tell() -> None:
        world.check()
        if options.on_step:
            options.on_step(denoiser.evaluations - start)

    with world.phase():
        for a in range(world.rank * batch, count, world.size * batch):
            b = min(a + batch, count)
            labels = None if options.class_labels is None else options.class_labels[a:b]
            full[a:b] = norms(denoiser.initial(latents[a:b], clock.sigma_max), labels, tell).cpu()
    full[-1, 0] = denoiser.evaluations - start
    full = world.sum(full).numpy()
    return full[:-1], int(full[-1, 0])


def extrapolated(slopes: List[torch.Tensor], levels: np.ndarray, k: int) -> torch.Tensor:
    """dD/dsigma in the middle of the step from level k, on the line through those of the two steps before."""
    if k < 2:  # the first of all slopes is none that was measured
        return slopes[-1]
    middle = (levels[k - 2 : k + 1] + levels[k - 1 : k + 2]) / 2  # of the steps k - 2, k - 1 and k
    return slopes[-1] + (slopes[-1] - slopes[-2]) * ((middle[2] - middle[1]) / (middle[1] - middle[0]))


def _with_ends(levels: np.ndarray, norm: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Geometric midpoints of the levels [P] and the two ends, and |Q| at them, [M, P + 1]."""
    middle = np.sqrt(levels[1:] * levels[:-1])
    mean = norm.mean(axis=0)
    ends = []
    for end, near, far in ((levels[0], 0, 1), (levels[-1], -1, -2)):
        power = 0.0
        if len(middle) > 1 and min(mean[near], mean[far]) > TINY:
            power = np.log(mean[near] / mean[far]) / np.log(middle[near] / middle[far])
        ends.append(norm[:, near] * (end / middle[near]) ** power)
    return np.concatenate([levels[:1], middle, levels[-1:]]), np.column_stack([ends[0], norm, ends[1]])
