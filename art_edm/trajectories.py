"""Dense trajectories: the exact path followed through many noise levels, and |Q| measured on the way.

Symbols
-------
M, P    trajectories; noise levels on each
levels  noise levels [P], from sigma_max down to the denoiser's lowest
norm    |Q|, [M, P]
"""

from __future__ import annotations

import time
from typing import Callable, List, Optional, Tuple

import numpy as np
import torch

from .clock import Clock
from .denoiser import Denoiser
from .devices import FiniteCheck, profile_batch, with_back_off
from .distributed import ALONE, World
from .field import Surrogate, evaluate, rms, surrogate
from .profile import TINY, Profile

__all__ = [
    "BATCH", "OnStep", "advance", "extrapolated", "measure_along", "measure_enough", "measure_profile", "place_points",
    "supported_levels", "travel",
]

OnStep = Callable[[int], None]
BATCH = 8  # few enough for several processes to have some, enough for a network to be busy
ENOUGH = 8  # trajectories that tell whether more are needed
LOG_SHARE = 0.25  # share of the profile's points that is placed by log sigma


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


def place_points(clock: Clock, sigma_min: float, points: int) -> np.ndarray:
    """Noise levels [P] from sigma_max to sigma_min: equally spaced in a mix of the clock and of log sigma.

    The clock alone is right for the data; log sigma sees what a network does at its lowest levels.
    """
    sigma = np.geomspace(clock.sigma_max, sigma_min, 4096)
    s = clock.fraction(sigma)
    mixed = (1 - LOG_SHARE) * s / s[-1] + LOG_SHARE * np.linspace(0, 1, len(sigma))
    levels = np.exp(np.interp(np.linspace(0, 1, points), mixed, np.log(sigma)))
    levels[0], levels[-1] = clock.sigma_max, sigma_min
    return levels


def supported_levels(denoiser: Denoiser, clock: Clock, points: int) -> np.ndarray:
    """`place_points` rounded to the levels the denoiser supports, each once, still from high to low."""
    levels = place_points(clock, denoiser.sigma_min, points)
    rounded = denoiser.round_sigma(torch.from_numpy(levels)).cpu().numpy()
    return np.unique(rounded)[::-1].copy()


def measure_profile(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, points: int, batch: int = BATCH,
    class_labels: Optional[torch.Tensor] = None, on_step: Optional[OnStep] = None, world: World = ALONE,
) -> Profile:
    """Travel M trajectories over P noise levels and measure |Q| at each: 3 M P evaluations.

    Args:
        latents: unit normal noise, [M, C, H, W].
        clock: base clock of the quadratures, and for three quarters of the points' placement.
        points: P, at least 2; noise levels from sigma_max to the denoiser's sigma_min. A model of discrete
            levels is measured at those, each once.
        batch: images per evaluation. The processes share out whole batches, so that their number changes no rounding.
        on_step: called with the number of images evaluated so far.
        world: processes that share the trajectories; each gets all of the profile.
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
    norm, evaluations = travel(denoiser, latents, clock, norms, len(levels), batch, class_labels, on_step, world)
    return Profile(clock, levels, norm, evaluations, time.perf_counter() - began)


def measure_along(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, points: int, batch: int = BATCH,
    class_labels: Optional[torch.Tensor] = None, on_step: Optional[OnStep] = None, world: World = ALONE,
) -> Profile:
    """As `measure_profile`, from M P evaluations: D is differenced from one level of the trajectory to the next.

    The difference over an interval is the mean slope within it, which belongs to its geometric midpoint: exactly
    so for the law sigma^-2 that slopes follow far above the data. The same differences, extrapolated, carry the path
    on to the next level. The two ends are extrapolated, linearly in log-log; where |Q| is zero, or there is one
    interval alone, they are held constant.
    """
    levels = supported_levels(denoiser, clock, points)  # [P]

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
    norm, evaluations = travel(denoiser, latents, clock, norms, len(levels) - 1, batch, class_labels, on_step, world)
    return Profile(clock, *_with_ends(levels, norm), evaluations, time.perf_counter() - began)


def measure_enough(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, points: int, class_labels: Optional[torch.Tensor] = None,
    on_step: Optional[OnStep] = None, world: World = ALONE, method: Callable[..., Profile] = measure_along,
    tolerance: float = 0.0,
) -> Profile:
    """A profile of the first third of the latents, and of the others only where it leaves its optimum uncertain.

    Arguments as of `measure_along`, the batch as memory allows.

    Args:
        method: `measure_along`, or another of its kind.
        tolerance: how far, as J/J* - 1, the few may be off for the others to be spared; 0 measures all.
    """
    few, labels = len(latents) // 3, class_labels
    parts = [slice(0, few), slice(few, None)] if tolerance and few >= ENOUGH else [slice(None)]
    found: Optional[Profile] = None
    batch = profile_batch(denoiser, len(latents), BATCH, world)
    for part in parts:
        before = found.evaluations if found else 0

        def tell(done: int, before: int = before) -> None:
            if on_step:
                on_step(before + done)

        def measure(batch: int, part: slice = part) -> Profile:
            some = None if labels is None else labels[part]
            return method(denoiser, latents[part], clock, points, batch, some, tell, world)

        more = with_back_off(measure, batch, denoiser.device)
        found = found.joined(more) if found else more
        if found.sampling_excess <= tolerance:
            break
    return found


def travel(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, norms: Callable[..., torch.Tensor], width: int, batch: int,
    class_labels: Optional[torch.Tensor], on_step: Optional[OnStep], world: World,
) -> Tuple[np.ndarray, int]:
    """|Q| [M, width] by `norms` of each batch, each process on its share of the latents, and all evaluations."""
    start, count = denoiser.evaluations, len(latents)
    full = torch.zeros(count + 1, width, dtype=torch.float64)  # the last row counts evaluations

    def tell() -> None:
        world.check()
        if on_step:
            on_step(denoiser.evaluations - start)

    with world.phase():
        for a in range(world.rank * batch, count, world.size * batch):
            b = min(a + batch, count)
            labels = None if class_labels is None else class_labels[a:b]
            full[a:b] = norms(denoiser.initial(latents[a:b], clock.sigma_max), labels, tell).cpu()
    full[-1, 0] = denoiser.evaluations - start
    full = world.sum(full.to(world.device)).cpu().numpy()
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
