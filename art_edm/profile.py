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

import numpy as np

from .clock import Clock
from .grid import Grid

__all__ = ["TINY", "Profile"]

FINE = 8192  # intervals of the quadratures; their cost is nothing
TINY = 1e-30  # |Q| is exactly zero where an empirical posterior has settled on one image


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

    def joined(self, other: "Profile") -> "Profile":
        """The trajectories of both, which have the same levels."""
        evaluations, seconds = self.evaluations + other.evaluations, self.seconds + other.seconds
        norm = np.concatenate([self.norm, other.norm])
        return replace(self, norm=norm, evaluations=evaluations, seconds=seconds, _fine={})

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

    def direct(self, num_steps: int) -> Grid:
        """The grid that equidistributes int sqrt(q): the optimum, without learning."""
        table = self._table()
        levels = np.arange(1, num_steps) / num_steps * table["root"][-1]
        inner = self.clock.sigma(np.interp(levels, table["root"], table["s"]))
        return Grid(np.concatenate([[self.horizon], inner, [0.0]]))


def _cumulative(values: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Trapezoidal integral from s[0] to each s."""
    return np.concatenate([[0.0], np.cumsum(np.diff(s) * (values[1:] + values[:-1]) / 2)])
