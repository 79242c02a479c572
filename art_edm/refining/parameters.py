"""The numbers of a scheme that a refinement moves, as one vector.

Symbols
-------
q       parameters of the inner levels, [K - 1], see `levenberg_marquardt`
w       the free weights, at `places`, [W]; all other weights stay
p       (q, w), [K - 1 + W]
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import numpy as np

from art_edm.refining import levenberg_marquardt
from art_edm.refining.solver_jacobian import Place, Scheme

__all__ = ["Parameters", "free_places"]


def free_places(num_steps: int, values: int) -> Tuple[Place, ...]:
    """The weights of the newest `values` slopes of each step, as (k, j)."""
    return tuple((k, j) for k in range(num_steps) for j in range(min(k + 1, values)))


class Parameters(NamedTuple):
    """Vectors p to schemes and back."""

    first: float  # sigma_0, which stays
    low: float  # lowest level that the model supports
    places: Tuple[Place, ...] = ()  # of the free weights
    fixed: Optional[np.ndarray] = None  # weights [K, K] of which all others are taken

    def vector(self, scheme: Scheme) -> np.ndarray:
        """p of a scheme; a level at `low` is taken as one just above it."""
        q = levenberg_marquardt.parameters_of(scheme.levels, self.low)
        return np.append(q, [scheme.weights[place] for place in self.places])

    def scheme(self, p: np.ndarray) -> Scheme:
        """The scheme of p."""
        q, w = np.split(p, [len(p) - len(self.places)])
        levels = levenberg_marquardt.levels_of(q, self.first, self.low)
        if self.fixed is None:
            return Scheme(levels)
        weights = self.fixed.copy()
        for place, value in zip(self.places, w):
            weights[place] = value
        return Scheme(levels, weights)

    def chain(self, p: np.ndarray, scheme: Scheme) -> np.ndarray:
        """d (levels, weights) / d p, [P, P]."""
        to_p, inner = np.eye(len(p)), len(p) - len(self.places)
        to_p[:inner, :inner] = levenberg_marquardt.chain(p[:inner], scheme.levels, self.low)
        return to_p
