"""Grids as a user names them for a comparison, each for several numbers of steps.

    edm, dpm, uniform, ...   a rule between the network's own noise levels
    F.npy                    a grid of K steps; for another number of steps its clock is read off
    F{steps}.npy             one file for each number of steps
    NAME=F.npy               the same under a name of its own
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch

from art_edm.grids.grid import RULES, Grid, GridError, load_grid, load_provenance, read_off
from art_edm.grids.weights import recorded_weights
from art_edm.models.denoiser import Denoiser
from art_edm.sampling.solvers import supported

__all__ = ["Choice", "choose_grids", "hand_made"]


class Choice(NamedTuple):
    """A grid of a comparison."""

    name: str  # the same for all numbers of steps
    grid: Grid
    origin: str  # "rule", "file" or "resampled from K"
    note: str = ""  # of a rule with more steps than the network has levels for
    path: str = ""  # of a file that is taken as it is

    def weights(self) -> Optional[np.ndarray]:
        """The table [K, K] of the grid's sidecar, None if there is none; a GridError for one of another grid."""
        return recorded_weights(load_provenance(self.path), self.grid.num_steps) if self.path else None


def choose_grids(specs: Sequence[str], steps: Sequence[int], denoiser: Denoiser) -> List[Choice]:
    """Every grid in every number of steps, as `denoiser` takes them.

    Raises:
        ValueError: an unknown rule, a file that is no grid or of another number of steps, two grids of one name,
            or a grid that the network does not support.
    """
    chosen: List[Choice] = []
    for spec in specs:
        name, path = _split(spec)
        for k in steps:
            choice = _rule(name, k, denoiser) if path is None else _from_file(name, path, k)
            try:
                supported(denoiser, choice.grid)
            except ValueError as error:
                raise GridError(f"{choice.name} in {k} steps: {error}") from None
            if any((choice.name, k) == (other.name, other.grid.num_steps) for other in chosen):
                raise GridError(f"found two grids of the name {name}, expected one; write NAME={path or spec}")
            chosen.append(choice)
    return chosen


def _split(spec: str) -> "tuple[str, str | None]":
    """Name and path; no path for a rule."""
    name, equals, path = spec.partition("=")
    if not equals:
        name, path = (Path(spec).stem.replace("{steps}", "").rstrip("-_") or "grid", spec)
    if not path.endswith(".npy"):
        if spec not in RULES:
            raise GridError(f"found the grid {spec!r}, expected {', '.join(RULES)}, or a file that ends in .npy")
        return spec, None
    if not name:
        raise GridError(f"found {spec!r}, expected NAME=F.npy; name it or leave out the =")
    return name, path


def _rule(name: str, num_steps: int, denoiser: Denoiser) -> Choice:
    """A rule as everywhere here: a denoiser without a lowest level takes `edm` to 0."""
    own = hand_made(denoiser, num_steps)
    grid = own[name] if name in own else RULES[name](num_steps, denoiser.sigma_min, denoiser.sigma_max, 7)
    levels = denoiser.round_sigma(torch.tensor(grid.values[:-1])).cpu().numpy()
    distinct = np.unique(levels)[::-1]  # upstream's samplers take steps of length 0 between equal ones
    if len(distinct) == len(levels):
        return Choice(name, grid, "rule")
    note = f"{name} in {num_steps} steps has {len(distinct)} noise levels of this network: sampled in as many steps"
    return Choice(name, Grid(np.append(distinct, 0.0)), "rule", note)


def _from_file(name: str, path: str, num_steps: int) -> Choice:
    here = path.replace("{steps}", str(num_steps))
    grid = load_grid(here)
    if grid.num_steps == num_steps:
        return Choice(name, grid, "file", path=here)
    if "{steps}" in path:
        found = f"{here}: found {grid.num_steps} steps"
        raise GridError(f"{found}, expected {num_steps} by its name; rename it")
    return Choice(name, read_off(grid, num_steps), f"resampled from {grid.num_steps}")


def hand_made(denoiser: Denoiser, num_steps: int) -> Dict[str, Grid]:
    """The hand-made rules for a denoiser: pinned at its sigma_min, or all the way down where it is not."""
    names = {"uniform": "uniform", "dpm": "dpm", "edm": "edm", "edm-unpinned": "edm-unpinned"}
    if not denoiser.pinned:
        names = {"uniform": "uniform", "dpm": "dpm-unpinned", "edm": "edm-unpinned"}
    return {
        shown: RULES[rule](num_steps, denoiser.sigma_min, denoiser.sigma_max, 7) for shown, rule in names.items()
    }
