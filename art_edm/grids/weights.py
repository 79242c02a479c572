"""Weights of a linear multistep method that belong to one grid, and their place in its sidecar.

Symbols
-------
K          number of steps of the grid
f_k        slope dx/dsigma that step k evaluates
w_kj       weight of f_{k-j} in step k:  x_{k+1} = x_k + (sigma_{k+1} - sigma_k) sum_j w_kj f_{k-j}

They are written as K rows, newest slope first. Row k has 1 to k + 1 numbers, weights that are not written are 0.
The sum of a row need not be 1.
"""

from __future__ import annotations

import json
from typing import Any, Dict, List, Optional

import numpy as np

from art_edm.grids.grid import GridError, sidecar_path
from art_edm.runtime.files import PathLike

__all__ = ["WEIGHTS", "checked_rows", "recorded_weights", "stale_weights", "written_rows"]

WEIGHTS = "weights"  # the sidecar's key
MAX_WEIGHT = 1e6  # of extrapolation they are a few units; a larger one is no weight
_REMEDY = "learn them with train_schedule.py --refine=weights"


def checked_rows(rows: Any, num_steps: int) -> np.ndarray:
    """The table w [K, K] of rows, 0 where nothing is written; raises a GridError for what is no weights of K steps."""
    if not isinstance(rows, (list, tuple)) or len(rows) != num_steps:
        found = f"{len(rows)} rows" if isinstance(rows, (list, tuple)) else f"{type(rows).__name__}"
        raise GridError(f"found {found} of weights for {num_steps} steps, expected a list of {num_steps}; {_REMEDY}")
    table = np.zeros((num_steps, num_steps))
    for k, row in enumerate(rows):
        if not isinstance(row, (list, tuple)) or not 1 <= len(row) <= k + 1:
            found = f"{len(row)} weights" if isinstance(row, (list, tuple)) else repr(row)[:60]
            raise GridError(f"found {found} in row {k}, expected 1 to {k + 1}, those of slopes there are; {_REMEDY}")
        for j, weight in enumerate(row):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not abs(weight) <= MAX_WEIGHT:
                found = f"found {repr(weight)[:60]} as weight {j} of row {k}"
                raise GridError(f"{found}, expected a number of at most {MAX_WEIGHT:g} in size; {_REMEDY}")
            table[k, j] = weight
    return table


def written_rows(table: np.ndarray) -> List[List[float]]:
    """The rows of a table [K, K] for JSON, each up to its last weight that is not 0."""
    return [row[: max(int(np.max(np.nonzero(row)[0], initial=0)) + 1, 1)].tolist() for row in table]


def recorded_weights(record: Dict[str, Any], num_steps: int) -> Optional[np.ndarray]:
    """The table [K, K] of a grid's record, None where it has none; a GridError for one that does not fit."""
    return None if record.get(WEIGHTS) is None else checked_rows(record[WEIGHTS], num_steps)


def stale_weights(path: PathLike) -> bool:
    """Whether the sidecar of a grid, one that `load_provenance` refuses, has weights: they are another grid's."""
    try:
        return WEIGHTS in json.loads(sidecar_path(path).read_bytes())
    except (OSError, ValueError, RecursionError, TypeError):
        return False
