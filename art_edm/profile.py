"""Dense trajectories, the profile q(sigma) = E|Q|, and the exact optimum they give.

The exact path through a noise does not depend on the clock that travels it, so |Q| measured once on
M dense trajectories scores every schedule and every number of steps.

Symbols
-------
root    sqrt(|Q| rate^2), the root of the cost in the base clock; [M, P] over trajectories and points
q       mean of |Q| over trajectories, per sigma^2 and in units of x
c       (1/T) int sqrt(q) dpsi: at the optimum sqrt(q) theta = c, a constant
J       int q theta^2 dt of a schedule; J* = c^2 T is the least of all schedules
J*_x    E[(int sqrt|Q_x| dpsi)^2] / T: the least of all schedules that may depend on the sample
price   J*_x / J*, the price of distillation: 1 where the state does not matter
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Callable, List, Optional, Tuple

import numpy as np
import torch

from .clock import Clock
from .denoiser import Denoiser
from .devices import FiniteCheck
from .distributed import ALONE, World
from .field import Surrogate, evaluate, rms, surrogate
from .grid import Grid

__all__ = ["Profile", "advance", "measure_along", "measure_profile", "place_points"]

OnStep = Callable[[int], None]
BATCH = 8  # few enough for several processes to have some, enough for a network to be busy
FINE = 8192  # intervals of the quadratures; their cost is nothing
TINY = 1e-30  # |Q| is exactly zero where an empirical posterior has settled on one image
LOG_SHARE = 0.25  # share of the profile's points that is placed by log sigma


@dataclass(frozen=True)
class Profile:
    """|Q| along M trajectories at P noise levels, and what follows from it.

    Attributes:
        clock: base clock of the quadratures.
        sigma: noise levels [P], from sigma_max down to the lowest that was evaluated.
        norm: |Q|, [M, P]. Below the last level |Q| is held constant: what a network returns there is
            its own noise.
        evaluations, seconds: cost of measuring it.
    """

    clock: Clock
    sigma: np.ndarray
    norm: np.ndarray
    evaluations: int
    seconds: float
    _fine: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def horizon(self) -> float:
        """T, the physical time from sigma_max to 0."""
        return self.clock.sigma_max

    def norms(self, sigma: np.ndarray) -> np.ndarray:
        """|Q| of every trajectory at any noise levels [n]: [M, n].

        log|Q| is interpolated linearly in log sigma: exact for a power law, which |Q| is close to at
        both ends (sigma^-3 far above the data, 1/sigma in a network's own noise far below).
        """
        level = np.log(np.clip(sigma, self.sigma[-1], self.sigma[0]))
        known, values = np.log(self.sigma[::-1]), np.log(np.maximum(self.norm[:, ::-1], TINY))  # ascending in sigma
        right = np.clip(np.searchsorted(known, level), 1, len(known) - 1)
        w = (level - known[right - 1]) / (known[right] - known[right - 1])
        return np.exp((1 - w) * values[:, right - 1] + w * values[:, right])

    def _table(self) -> dict:
        """Quadratures on a fine grid of the base clock, computed once."""
        if not self._fine:
            # Equal steps of the clock, and of log sigma for what a network does at its lowest levels.
            low = np.geomspace(self.sigma[-1], self.sigma[0], FINE // 8)
            s = np.unique(np.concatenate([np.linspace(0, 1, FINE + 1), self.clock.fraction(low).clip(0, 1)]))
            sigma, dpsi = self.clock.sigma(s), self.clock.rate(s) * self.horizon  # dpsi / ds
            norms = self.norms(sigma)  # [M, n]
            q = norms.mean(axis=0)
            self._fine.update(
                s=s, q=q, root=_cumulative(np.sqrt(q) * dpsi, s), cost=_cumulative(q * dpsi, s),
                roots=np.array([_cumulative(np.sqrt(row) * dpsi, s)[-1] for row in norms]),
            )
        return self._fine

    @property
    def root_integral(self) -> float:
        """int sqrt(q) dpsi = c T."""
        return float(self._table()["root"][-1])

    @property
    def optimum(self) -> float:
        """J* = (int sqrt(q) dpsi)^2 / T."""
        return self.root_integral**2 / self.horizon

    @property
    def state_optimum(self) -> float:
        """J*_x = E[(int sqrt|Q_x| dpsi)^2] / T."""
        return float(np.square(self._table()["roots"]).mean()) / self.horizon

    @property
    def price(self) -> float:
        """J*_x / J*, in (0, 1]: what a clock that sees the sample could save at most."""
        return self.state_optimum / self.optimum

    def mean(self, sigma: np.ndarray) -> "tuple[np.ndarray, np.ndarray]":
        """q at noise levels [n] and its standard error over trajectories."""
        norms = self.norms(np.asarray(sigma, np.float64))
        return norms.mean(axis=0), norms.std(axis=0, ddof=min(1, len(norms) - 1)) / np.sqrt(len(norms))

    def cost(self, values: np.ndarray) -> float:
        """J of a schedule given by noise levels [n + 1] at equally spaced times, from sigma_max to 0.

        theta is constant in each step: J = sum_k theta_k int_step q dpsi, theta_k = n Delta_k / T. With
        n large it is the J of a clock; with n = K that of the grid itself, never below J*.
        """
        values = np.asarray(values, np.float64)
        table = self._table()
        integral = np.diff(np.interp(self.clock.fraction(values), table["s"], table["cost"]))
        theta = -np.diff(values) * (len(values) - 1) / self.horizon
        return float(np.sum(theta * integral))

    def direct(self, num_steps: int) -> Grid:
        """The grid that equidistributes int sqrt(q): the optimum, without learning."""
        table = self._table()
        levels = np.arange(1, num_steps) / num_steps * table["root"][-1]
        inner = self.clock.sigma(np.interp(levels, table["root"], table["s"]))
        return Grid(np.concatenate([[self.horizon], inner, [0.0]]))


def _cumulative(values: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Trapezoidal integral from s[0] to each s."""
    return np.concatenate([[0.0], np.cumsum(np.diff(s) * (values[1:] + values[:-1]) / 2)])


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


def _supported(denoiser: Denoiser, levels: np.ndarray) -> np.ndarray:
    """The levels [P] rounded to those the denoiser supports, each once, still from high to low."""
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
    levels = _supported(denoiser, place_points(clock, denoiser.sigma_min, points))  # [P]

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
    norm, evaluations = _travel(denoiser, latents, clock, norms, len(levels), batch, class_labels, on_step, world)
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
    levels = _supported(denoiser, place_points(clock, denoiser.sigma_min, points))  # [P]

    def norms(x: torch.Tensor, labels: Optional[torch.Tensor], tell: Callable[[], None]) -> torch.Tensor:
        columns, slopes, before, check = [], [torch.zeros_like(x)], None, FiniteCheck(x.device)
        for k, level in enumerate(levels):
            denoised = evaluate(denoiser, x, level, labels, check.see)
            if before is not None:
                slopes = [*slopes[-1:], (denoised - before) / (level - levels[k - 1])]
                columns.append(rms(slopes[-1]) / (level * levels[k - 1]) ** 0.5)
            if k + 1 < len(levels):
                sigma, target = x.new_full((len(x),), level), x.new_full((len(x),), levels[k + 1])
                x = advance(x, Surrogate(denoised, _ahead(slopes, levels, k), None), sigma, target)
            before = denoised
            tell()
        check.settle()
        return torch.stack(columns, dim=1)  # [b, P - 1]

    began = time.perf_counter()
    norm, evaluations = _travel(denoiser, latents, clock, norms, len(levels) - 1, batch, class_labels, on_step, world)
    return Profile(clock, *_with_ends(levels, norm), evaluations, time.perf_counter() - began)


def _travel(
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


def _ahead(slopes: List[torch.Tensor], levels: np.ndarray, k: int) -> torch.Tensor:
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
