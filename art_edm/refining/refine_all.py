"""`--refine` as a whole: the grids of several K share their noises, and the clocks from which they may start.

The optimal clock of the solver's own local errors is often worse than ART's, but may be near a lower minimum: Heun's
method gains a sixth by it on networks. It costs one to three times ART's profile, RK4's up to eleven times, and one
serves every K of a run.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Dict, Mapping, Optional

from art_edm.grids.grid import Grid
from art_edm.measure.objectives import Objective, measure_objective
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.refining.config import RefineConfig
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import RefineResult, refine
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.memory import with_back_off
from art_edm.runtime.pieces import Pieces
from art_edm.runtime.progress import Count
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import fitted

__all__ = ["OWN", "RefineConfig", "refined_grids", "starts"]

OWN = "own local errors"


def starts(denoiser: Denoiser, own: Optional[Profile], num_steps: int) -> Dict[str, Grid]:
    """The other grids to start from: the optimum of the solver's own local errors, if the model has its levels."""
    try:
        return {} if own is None else {OWN: fitted(denoiser, own.direct(num_steps))}
    except ValueError:
        return {}


def refined_grids(
    denoiser: Denoiser, grids: Mapping[int, Grid], solver: str, config: RefineConfig, count: Count, identity: str = "",
    states: Mapping[int, Path] = {}, resume: bool = False, quiet: bool = True, world: World = ALONE,
    own_clock: bool = True, pieces: Optional[Pieces] = None,
) -> Dict[int, RefineResult]:
    """For each K the grid refined for `solver`; errors as of `refine` and `measure_objective`.

    Args:
        grids: K -> the grid that nothing may be worse than.
        count: told of each piece of work, of stage "start", "ends" (if several K share their noises) or "refine".
        states: K -> file for the state of its refinement; the other clock is in a store in the folder of the first.
        pieces: what a run that was killed had found of exact ends, and where this one keeps what it finds.
        own_clock: False where the grids are those of the solver's own local errors already.
    """
    own, noises = None, None
    if own_clock and max(grids) > 1:
        began, first = time.perf_counter(), next(iter(states.values()), None)
        context = Context(world, Store(first and first.parent), quiet, identity)
        own = measure_objective(denoiser, Objective(solver, seed=config.seed), context)
        count("start", began, own.evaluations)
    if len(grids) > 1:
        began, top = time.perf_counter(), next(iter(grids.values())).sigma_max
        draw = lambda batch: draw_noises(denoiser, replace(config, batch=batch), top, quiet, world, pieces=pieces)
        noises = with_back_off(draw, config.batch, denoiser.device)
        count("ends", began, noises.evaluations)
    found = {}
    for k, grid in grids.items():
        began, others = time.perf_counter(), starts(denoiser, own, k)
        more = (resume, quiet, world, noises, others, pieces)
        found[k] = refine(denoiser, grid, solver, config, identity, states.get(k), *more)
        count("refine", began, found[k].evaluations)
    return found
