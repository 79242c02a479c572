"""Base clocks: the coordinate in which the sampling clock is learned.

Symbols
-------
psi    physical time elapsed, psi = sigma_max - sigma, in [0, T], T = sigma_max
s      fraction of the base clock, in [0, 1]; u = T s is the same in units of sigma
rate   d psi / d u, dimensionless; identically 1 for the linear clock

ART does not change under a change of the physical-time coordinate: with v = du/dt the running cost
|Q| theta^2 is (|Q| rate^2) v^2. A base clock in which |Q| rate^2 is nearly flat makes v nearly 1
everywhere, where the raw clock needs speeds that span three orders of magnitude.
"""

from __future__ import annotations

from typing import Union

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import hyp2f1

__all__ = ["CLOCKS", "Clock", "ComposedClock", "EdmClock", "GaussianClock", "LinearClock", "make_clock"]

Array = Union[float, np.ndarray]


class Clock:
    """A strictly decreasing map from s in [0, 1] to sigma in [sigma_max, 0]."""

    name = ""

    def __init__(self, sigma_max: float) -> None:
        if not 0 < sigma_max < np.inf:
            raise ValueError(f"sigma_max is {sigma_max}, expected a positive number")
        self.sigma_max = float(sigma_max)

    def sigma(self, s: Array) -> np.ndarray:
        """Noise level at fraction s (s is clipped to [0, 1])."""
        raise TypeError(f"{type(self).__name__} does not define sigma()")

    def fraction(self, sigma: Array) -> np.ndarray:
        """Fraction s at which the noise level is sigma; the inverse of `sigma`."""
        raise TypeError(f"{type(self).__name__} does not define fraction()")

    def rate(self, s: Array) -> np.ndarray:
        """d psi / d u at fraction s."""
        raise TypeError(f"{type(self).__name__} does not define rate()")


class LinearClock(Clock):
    """u = psi: the paper's literal form."""

    name = "linear"

    def sigma(self, s: Array) -> np.ndarray:
        return self.sigma_max * (1 - np.clip(s, 0, 1))

    def fraction(self, sigma: Array) -> np.ndarray:
        return 1 - np.asarray(sigma, np.float64) / self.sigma_max

    def rate(self, s: Array) -> np.ndarray:
        return np.ones_like(np.asarray(s, np.float64))


class EdmClock(Clock):
    """The rho rule of EDM as a clock: sigma = sigma_max (1 - s)^rho."""

    name = "edm"

    def __init__(self, sigma_max: float, rho: float = 7.0) -> None:
        super().__init__(sigma_max)
        self.rho = rho

    def sigma(self, s: Array) -> np.ndarray:
        return self.sigma_max * (1 - np.clip(s, 0, 1)) ** self.rho

    def fraction(self, sigma: Array) -> np.ndarray:
        return 1 - (np.asarray(sigma, np.float64) / self.sigma_max) ** (1 / self.rho)

    def rate(self, s: Array) -> np.ndarray:
        return self.rho * (1 - np.clip(s, 0, 1)) ** (self.rho - 1)


class GaussianClock(Clock):
    """The optimal clock of Gaussian data: density du/dsigma proportional to w = (sigma_data^2 + sigma^2)^(-3/4).

    W(sigma) = int_0^sigma w = sigma sigma_data^(-3/2) 2F1(1/2, 3/4; 3/2; -(sigma / sigma_data)^2).
    """

    name = "gaussian"

    def __init__(self, sigma_max: float, sigma_data: float) -> None:
        super().__init__(sigma_max)
        if not 0 < sigma_data < np.inf:
            raise ValueError(f"sigma_data is {sigma_data}, expected a positive number")
        self.sigma_data = float(sigma_data)
        # Start of the inversion: equal steps of log sigma where w falls, of sigma where it is flat.
        top = np.arcsinh(self.sigma_max / self.sigma_data)
        self._table_sigma = self.sigma_data * np.sinh(np.linspace(0, top, 2049))
        self._total = float(self._mass(self.sigma_max))
        self._table_mass = self._mass(self._table_sigma)

    def _mass(self, sigma: Array) -> np.ndarray:
        ratio = np.asarray(sigma, np.float64) / self.sigma_data
        return ratio * self.sigma_data**-0.5 * hyp2f1(0.5, 0.75, 1.5, -np.square(ratio))

    def _density(self, sigma: Array) -> np.ndarray:
        return (self.sigma_data**2 + np.square(sigma)) ** -0.75

    def sigma(self, s: Array) -> np.ndarray:
        mass = (1 - np.clip(np.asarray(s, np.float64), 0, 1)) * self._total
        sigma = np.interp(mass, self._table_mass, self._table_sigma)
        for _ in range(3):  # Newton; the table is good to 1e-6 already
            sigma = sigma - (self._mass(sigma) - mass) / self._density(sigma)
        return np.where(mass >= self._total, self.sigma_max, np.clip(sigma, 0, self.sigma_max))

    def fraction(self, sigma: Array) -> np.ndarray:
        return 1 - self._mass(sigma) / self._total

    def rate(self, s: Array) -> np.ndarray:
        return self._total / (self.sigma_max * self._density(self.sigma(s)))


class ComposedClock(Clock):
    """A learned path s(tau) through a base clock, used as a clock itself: sigma = base.sigma(s(tau)).

    Args:
        base: the clock in which the path was learned.
        knots: s at equally spaced tau, [N + 1], strictly increasing from 0 to 1; joined by a monotone cubic.
    """

    def __init__(self, base: Clock, knots: np.ndarray) -> None:
        super().__init__(base.sigma_max)
        self.base, self.knots, self.name = base, np.asarray(knots, np.float64), base.name
        self._path = PchipInterpolator(np.linspace(0, 1, len(self.knots)), self.knots)
        self._speed = self._path.derivative()

    def _at(self, tau: Array) -> np.ndarray:
        """The path; its ends to the bit."""
        return np.where(tau >= 1, 1.0, np.where(tau <= 0, 0.0, self._path(tau)))

    def sigma(self, s: Array) -> np.ndarray:
        return self.base.sigma(self._at(np.clip(s, 0, 1)))

    def fraction(self, sigma: Array) -> np.ndarray:
        target = np.asarray(self.base.fraction(sigma), np.float64)
        last = len(self.knots) - 1
        below = np.clip(np.searchsorted(self.knots, target, side="right") - 1, 0, last - 1) / last
        above = below + 1 / last
        for _ in range(52):  # bisection: the path may stand still at a knot, where Newton would leap
            middle = (below + above) / 2
            before = self._at(middle) < target
            below, above = np.where(before, middle, below), np.where(before, above, middle)
        return np.where(target >= 1, 1.0, np.where(target <= 0, 0.0, (below + above) / 2))

    def rate(self, s: Array) -> np.ndarray:
        s = np.clip(s, 0, 1)
        return self.base.rate(self._at(s)) * self._speed(s)


CLOCKS = ("gaussian", "linear", "edm")


def make_clock(name: str, sigma_max: float, sigma_data: float) -> Clock:
    """A clock by name: gaussian (default of training), linear (the paper's form) or edm.

    Raises:
        ValueError: unknown name.
    """
    if name == "gaussian":
        return GaussianClock(sigma_max, sigma_data)
    if name == "linear":
        return LinearClock(sigma_max)
    if name == "edm":
        return EdmClock(sigma_max)
    raise ValueError(f"unknown base clock {name!r}; expected one of {', '.join(CLOCKS)}")
