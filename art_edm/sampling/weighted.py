"""A linear multistep method with the weights of each step given: what a grid's sidecar may carry (`grids.weights`).

Symbols
-------
w_kj  weight of slope f_{k-j} in step k of a grid of K steps, a table [K, K], newest first, 0 for j > k:
      x_{k+1} = x_k + (sigma_{k+1} - sigma_k) sum_j w_kj f_{k-j}

Every solver that evaluates once in a step is such a method on a given grid, those through denoised images too: as
D_j = x_j - sigma_j f_j, and the x_j differ by slopes, a step is linear in the slopes.
"""

from __future__ import annotations

from typing import Union

import numpy as np
import torch

from art_edm.sampling.multistep import Row, slopes_step
from art_edm.sampling.solvers import SOLVERS, Solver, integrate

__all__ = ["table_of", "weighted"]


def weighted(table: np.ndarray) -> Solver:
    """The method of a table [K, K]; for grids of K steps."""
    weights = torch.from_numpy(np.ascontiguousarray(table, np.float64))
    count = 1 + max((int(j) for j in np.nonzero(np.any(table != 0, axis=0))[0]), default=0)

    def rule(sigma: torch.Tensor) -> Row:
        if len(sigma) != len(weights) + 1:
            raise ValueError(f"found weights of {len(weights)} steps for a grid of {len(sigma) - 1}; use the grid "
                             "that they were learned with, or a solver by its name")
        return lambda k, m: weights[k, :m]

    return Solver(slopes_step, 1, "weights of a grid's own", past=count - 1, rule=rule)


def table_of(solver: Union[str, Solver], levels: np.ndarray) -> np.ndarray:
    """The weights [K, K] of a solver that evaluates once in a step, on levels [K + 1].

    Its steps are taken from 0 with unit vectors as slopes. Raises a ValueError for a solver of more evaluations.
    """
    if not isinstance(solver, Solver) and SOLVERS[solver].stages > 1:
        single = [name for name, entry in SOLVERS.items() if entry.stages == 1]
        raise ValueError(f"found {solver}, which evaluates {SOLVERS[solver].stages} times in a step, expected one that "
                         f"evaluates once, as its weights are to be learned: {', '.join(single)}")
    steps = len(levels) - 1
    units = iter(torch.eye(steps, dtype=torch.float64))
    states = [torch.zeros(steps, dtype=torch.float64)]
    integrate(lambda x, sigma: next(units), states[0], torch.from_numpy(levels.copy()), solver,
              on_step=lambda k, sigma, x: states.append(x))
    moves = torch.stack(states).diff(dim=0).numpy() / np.diff(levels)[:, None]  # [K, K], of slope i in step k
    return np.stack([np.append(moves[k, k::-1], np.zeros(steps - 1 - k)) for k in range(steps)])
