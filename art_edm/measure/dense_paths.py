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

from art_edm.grids.clocks import Clock
from art_edm.measure.field import Surrogate, evaluate, rms, surrogate
from art_edm.measure.profile import TINY, Profile, smoothed
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck, profile_batch
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.memory import with_back_off

__all__ = [
    "BATCH", "Draw", "OnStep", "advance", "draws", "extrapolated", "measure_along", "measure_enough",
    "measure_profile", "place_points", "supported_levels", "travel",
]

OnStep = Callable[[int], None]
Draw = Callable[[int], Tuple[torch.Tensor, Optional[torch.Tensor]]]
BATCH = 8  # few enough for several processes to have some, enough for a network to be busy
ENOUGH = 8  # trajectories that tell whether more are needed
MOST = 0.5  # of all |Q|, which one trajectory of a few has somewhere: 0.34 at most on networks, 0.95 where paths jump
LOG_SHARE = 0.25  # share of the profile's points that is placed by log sigma
KNOWN_SHARE = 0.75  # of the clock's own share, placed by the optimum where that is known; log sigma then has a fifth
WIDE = 20  # points of the trajectories that are many because few did not agree


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
    norm, evaluations = travel(denoiser, latents, clock, norms, len(levels) - 1, batch, class_labels, on_step, world)
    return Profile(clock, *_with_ends(levels, norm), evaluations, time.perf_counter() - began)


def draws(denoiser: Denoiser, generator: torch.Generator) -> Draw:
    """Unit normal latents [n, C, H, W] and labels, as many as are asked for, from a generator of their own."""

    def draw(count: int) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
        latents = torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)
        return latents.to(denoiser.device), denoiser.draw_labels(count, generator)

    return draw


def measure_enough(
    denoiser: Denoiser, draw: Draw, clock: Clock, trajectories: int, points: int, on_step: Optional[OnStep] = None,
    world: World = ALONE, method: Callable[..., Profile] = measure_along, tolerance: float = 0.0,
    first: Optional[Profile] = None, keep: Optional[Callable[[Profile], None]] = None,
) -> Profile:
    """A profile of a third of the trajectories, and of others only where it leaves its optimum uncertain.

    Where one trajectory somewhere has most of |Q|, a few late jumps decide, and many trajectories must be seen. As
    |Q| is differenced from level to level, an interval's difference holds all that happens within it, however short:
    what is left of the evaluations goes to many trajectories of `WIDE` points, placed by what the first third has
    seen, and `smoothed` joins the two. Elsewhere, and by other methods, the rest are measured like the first third.

    Args:
        draw: latents and labels of so many new trajectories.
        trajectories, points: M and P; no more than M P points are measured.
        method: `measure_along`, or another of its kind.
        tolerance: how far, as J/J* - 1, the third may be off for the others to be spared; 0 measures all alike.
        first: what an earlier call with the same arguments, which was stopped, gave to `keep`.
        keep: takes the third's profile as soon as it is there.
    """
    latents, labels = draw(trajectories)
    few, spent = trajectories // 3, 0
    batch = profile_batch(denoiser, trajectories, BATCH, world)

    def measure(part: slice, points: int = points, **options: Profile) -> Profile:
        some = None if labels is None else labels[part]
        tell = None if on_step is None else lambda done: on_step(spent + done)
        attempt = lambda batch: method(denoiser, latents[part], clock, points, batch, some, tell, world, **options)
        return with_back_off(attempt, batch, denoiser.device)

    if not tolerance or few < ENOUGH:
        return measure(slice(None))
    found = first or measure(slice(few))
    if keep and not first:
        keep(found)
    spent, jumps = found.evaluations, method is measure_along and found.largest_share > MOST
    if found.sampling_excess <= tolerance and not jumps:
        return found
    if not jumps:
        return found.joined(measure(slice(few, None)))
    wide = min(WIDE, points)
    more, more_labels = draw((trajectories - few) * points // wide - (trajectories - few))
    latents = torch.cat([latents, more])
    labels = None if labels is None else torch.cat([labels, more_labels])
    return smoothed([found, measure(slice(few, None), wide, known=smoothed([found]))])


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
