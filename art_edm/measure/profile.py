"""The profile q(sigma) = E|Q| of dense trajectories, and the exact optimum it gives.

The exact path through a noise does not depend on the clock that travels it, so |Q| measured once on
M dense trajectories scores every schedule and every number of steps.

Symbols
-------
q       mean over trajectories of |Q|, the size of a local error of second order, per sigma^2 and in units of x
c       (1/T) int sqrt(q) dpsi: at the optimum sqrt(q) theta = c, a constant
J       int q theta^2 dt of a schedule; J* = c^2 T is the least of all schedules
J*_x    E[(int sqrt|Q_x| dpsi)^2] / T: the least of all schedules that may depend on the sample
price   J*_x / J*, the price of distillation: 1 where the state does not matter

For a solver of order p the local error is C_p theta^(p + 1): |Q| is C_1, and with C_p in its place all of this
holds with the power p + 1 for 2, its root for the square root, and J* = c^(p + 1) T.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Sequence

import numpy as np

from art_edm.grids.clocks import Clock
from art_edm.grids.grid import Grid

__all__ = ["TINY", "Profile", "smoothed"]

FINE = 8192  # intervals of the quadratures; their cost is nothing
TINY = 1e-30  # |Q| is exactly zero where an empirical posterior has settled on one image
KNOTS = 128  # intervals of a smoothed profile
REACH = 0.05  # share of the clock over which a trajectory's |Q| is one and the same piece of evidence
FLOOR = 1e-6  # least w, in units of the optimum's c^2: no clock may lose itself in what M trajectories did not see
STIFFNESS = 2e-7  # of log q, which changes its bend no faster than the evidence asks for


@dataclass(frozen=True)
class Profile:
    """|Q| along M trajectories at P noise levels, and what follows from it.

    Attributes:
        clock: base clock of the quadratures.
        sigma: noise levels [P], from sigma_max down to the lowest that was evaluated.
        norm: |Q|, [M, P]. Below the last level |Q| is held constant: what a network returns there is
            its own noise.
        evaluations, seconds: cost of measuring it.
        order: p, where `norm` is C_p.
    """

    clock: Clock
    sigma: np.ndarray
    norm: np.ndarray
    evaluations: int
    seconds: float
    order: int = 1
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
            q, power = norms.mean(axis=0), 1 / (self.order + 1)
            self._fine.update(
                s=s, q=q, root=_cumulative(q**power * dpsi, s), cost=_cumulative(q * dpsi, s),
                roots=np.array([_cumulative(row**power * dpsi, s)[-1] for row in norms]),
            )
        return self._fine

    @property
    def root_integral(self) -> float:
        """int sqrt(q) dpsi = c T; of a higher order, int q^(1 / (p + 1)) dpsi."""
        return float(self._table()["root"][-1])

    @property
    def optimum(self) -> float:
        """J* = (int sqrt(q) dpsi)^2 / T."""
        return self.root_integral ** (self.order + 1) / self.horizon**self.order

    @property
    def state_optimum(self) -> float:
        """J*_x = E[(int sqrt|Q_x| dpsi)^2] / T."""
        return float(np.power(self._table()["roots"], self.order + 1).mean()) / self.horizon**self.order

    @property
    def price(self) -> float:
        """J*_x / J*, in (0, 1]: what a clock that sees the sample could save at most."""
        return self.state_optimum / self.optimum

    @property
    def sampling_excess(self) -> float:
        """How far, as J/J* - 1, the optimum of these M trajectories is expected from that of infinitely many.

        The optimum of each half is scored on the other: both are off, by twice as much variance each, so four times
        what all of them are off together. Infinite for fewer than four.
        """
        if len(self.norm) < 4:
            return float("inf")
        halves = [replace(self, norm=self.norm[i::2], _fine={}) for i in range(2)]
        crossed = [b.cost(a.direct(FINE).values) / b.optimum - 1 for a, b in (halves, halves[::-1])]
        return max(float(np.mean(crossed)), 0.0) / 4

    @property
    def largest_share(self) -> float:
        """Of all trajectories' |Q| at one level, the most that a single one has at any level: 1 / M if all agree."""
        return float((self.norm.max(axis=0) / np.maximum(self.norm.sum(axis=0), TINY)).max())

    def joined(self, other: "Profile") -> "Profile":
        """The trajectories of both, which have the same levels."""
        evaluations, seconds = self.evaluations + other.evaluations, self.seconds + other.seconds
        norm = np.concatenate([self.norm, other.norm])
        return replace(self, norm=norm, evaluations=evaluations, seconds=seconds, _fine={})

    def averaged(self) -> "Profile":
        """One trajectory that has the mean of all: the same q, J and J*, and no price."""
        return replace(self, norm=self.norm.mean(axis=0, keepdims=True), _fine={})

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
        return float(np.sum(theta**self.order * integral))

    def optimal_fraction(self, s: np.ndarray) -> np.ndarray:
        """How much of its time the optimum has spent when the base clock is at fraction s."""
        table = self._table()
        return np.interp(s, table["s"], table["root"]) / table["root"][-1]

    def direct(self, num_steps: int) -> Grid:
        """The grid that equidistributes int sqrt(q): the optimum, without learning."""
        table = self._table()
        levels = np.arange(1, num_steps) / num_steps * table["root"][-1]
        inner = self.clock.sigma(np.interp(levels, table["root"], table["s"]))
        return Grid(np.concatenate([[self.horizon], inner, [0.0]]))


def _cumulative(values: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Trapezoidal integral from s[0] to each s."""
    return np.concatenate([[0.0], np.cumsum(np.diff(s) * (values[1:] + values[:-1]) / 2)])


def smoothed(parts: Sequence[Profile]) -> Profile:
    """One profile of all trajectories, whose mean is the likeliest smooth q instead of the plain mean.

    Where a few late jumps make up q, their plain mean is zero wherever none of the M trajectories happens to jump,
    and its optimum rushes through. With w = q rate^(p + 1), the weight in the base clock, this takes the w that
    minimises

        (M / REACH) int (w - <w> log w) / phi ds + STIFFNESS int (d^3 log w / ds^3)^2 ds,     phi = <w^2> / <w>:

    <> is the mean over trajectories (in phi of a neighbourhood, too) and phi / M what one of them alone adds to it.
    The first term is the likelihood of counts: zero among M trajectories says that w is less than about phi / M,
    and no more. The second term is zero for every w = exp(a + b s + c s^2): an exponential or a normal tail goes on
    as it began. A field of many equal trajectories has so much evidence that the second term changes nothing.

    Each trajectory keeps its share of the mean. The parts may have levels of their own.
    """
    first = parts[0]
    s = np.linspace(0, float(first.clock.fraction(first.sigma[-1])), KNOTS + 1)
    sigma = first.clock.sigma(s)
    sigma[0], sigma[-1] = first.sigma[0], first.sigma[-1]
    norm = np.concatenate([part.norms(sigma) for part in parts])  # [M, KNOTS + 1]
    rate = first.clock.rate(s) ** (first.order + 1)
    mean = norm.mean(axis=0)
    q = _likely(norm * rate, s[1]) / rate
    share = np.where(mean > 10 * TINY, norm / np.maximum(mean, TINY), 1.0)
    evaluations, seconds = (sum(getattr(part, name) for part in parts) for name in ("evaluations", "seconds"))
    return replace(first, sigma=sigma, norm=q * share, evaluations=evaluations, seconds=seconds, _fine={})


def _likely(weights: np.ndarray, step: float) -> np.ndarray:
    """The w of `smoothed`, [n], of trajectories' [M, n] at knots `step` apart: convex in log w, by Newton's method."""
    count, knots = weights.shape
    unit = weights.mean()
    weights = weights / unit
    mean = weights.mean(axis=0)
    near = np.exp(-np.abs(np.subtract.outer(np.arange(knots), np.arange(knots))) * step / REACH)
    near = near / near.sum(axis=1, keepdims=True)
    alone = (near @ np.square(weights).sum(axis=0)) / np.maximum(near @ weights.sum(axis=0), TINY)  # phi
    evidence = count * step / REACH / np.maximum(alone, 1e-9)
    bend = np.diff(np.eye(knots), n=3, axis=0)
    stiff = 2 * STIFFNESS / step**5 * (bend.T @ bend)
    log_w = np.log(np.maximum(near @ mean, 1e-4))

    def loss(log_w: np.ndarray) -> float:
        return float(evidence @ (np.exp(log_w) - mean * log_w) + log_w @ stiff @ log_w / 2)

    now = loss(log_w)
    for _ in range(100):
        w = np.exp(log_w)
        slope = evidence * (w - mean) + stiff @ log_w
        change = np.linalg.solve(np.diag(evidence * w + 1e-9) + stiff, -slope)
        change = change * min(1, 3 / np.abs(change).max())
        while loss(log_w + change) > now and np.abs(change).max() > 1e-9:
            change = change / 2
        log_w, before = log_w + change, now
        now = loss(log_w)
        if before - now < 1e-9 * max(abs(now), 1):
            break
    w = np.exp(log_w)
    return (w + FLOOR * np.sqrt(w).mean() ** 2) * unit
