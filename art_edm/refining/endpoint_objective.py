"""The end-point objective as a whole: the growth is measured, a grid is chosen for each K, and other noises confirm it.

End-point errors have heavy tails: where a path ends on another image, one noise outweighs twenty. The few noises that
choose do not show such tails, so three times as many others must find the chosen grid better, too; else the clock's
own stays.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional

import numpy as np

from art_edm.grids.grid import Grid
from art_edm.models.denoiser import Denoiser
from art_edm.refining.config import Drawn, EndError, RefineConfig, better
from art_edm.refining.error_growth import SLACK, Sigma, Weighted, choose_growth, measure_growth
from art_edm.refining.noise_sets import draw_noises, teller
from art_edm.refining.solver_jacobian import Travel
from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.memory import with_back_off
from art_edm.runtime.pieces import Pieces
from art_edm.runtime.progress import Count, GracefulStop
from art_edm.sampling.solvers import fitted, nfe

__all__ = ["CHOOSE", "confirm", "draw_apart", "draw_noises", "end_point_grids"]

CHOOSE = RefineConfig(held=32)  # the noises that choose, both parts of them
APART = 3  # times the noises that choose
STREAM = (1 << 30) + 8  # theirs


def draw_apart(
    denoiser: Denoiser, config: RefineConfig, sigma_max: float, quiet: bool = True, world: World = ALONE,
    pieces: Optional[Pieces] = None,
) -> Drawn:
    """The noises of `confirm`: as `draw_noises`, but more, and none of those that the same `config` gives there."""
    many = replace(config, noises=APART * config.noises, held=APART * config.held)
    return draw_noises(denoiser, many, sigma_max, quiet, world, STREAM, pieces)


def confirm(
    denoiser: Denoiser, found: Weighted, plain: Grid, apart: Drawn, batch: int, quiet: bool = True,
    world: World = ALONE, pieces: Optional[Pieces] = None,
) -> Weighted:
    """`found` where noises that had no part in the choice find its grid better, too; else it gets the `plain` one.

    Args:
        found: of `choose_growth`. Where it has the plain grid already, it is returned as it is.
        plain: the clock's own grid.
        apart: from `draw_apart`. Other arguments and errors as for `choose_growth`.
    """
    if found.beta == 0:
        return found
    plain, began = fitted(denoiser, plain), time.perf_counter()
    total = 2 * nfe(found.solver, plain.num_steps) * sum(len(part.latents) for part in apart[:2])
    label = "end-point errors, images"
    with GracefulStop() as stop, teller(denoiser, label, total, quiet, world, stop, pieces) as tell:
        parts = [Travel(denoiser, found.solver, part, batch, tell, world, pieces) for part in apart[:2]]
        before, after = (np.concatenate([part.run(grid.values, keep=False).errors for part in parts])
                         for grid in (plain, found.grid))
    found = found._replace(
        apart=(EndError.of(before), EndError.of(after)), refuted=not better(before, after, SLACK),
        evaluations=found.evaluations + sum(part.evaluations for part in parts),
        seconds=found.seconds + time.perf_counter() - began,
    )
    return found._replace(grid=plain, beta=0.0, error_after=found.error_before) if found.refuted else found


def end_point_grids(
    denoiser: Denoiser, sigma_of: Sigma, grids: Mapping[int, Grid], solver: str, config: RefineConfig,
    noises: Optional[Drawn], count: Count, quiet: bool = True, world: World = ALONE, pieces: Optional[Pieces] = None,
) -> Dict[int, Weighted]:
    """For each K the grid that serves `solver` best; evaluations are in batches of `config` or what memory allows.

    Args:
        sigma_of: the learned clock, noise levels at times [n] in [0, 1].
        grids: K -> the clock's own grid.
        noises: from `draw_noises` with the same `config`; None draws them.
        count: told of each piece of work, of stage "endpoint" or, for exact ends, "ends".
        pieces: what a run that was killed had found, and where this one keeps what it finds.
    """
    top, whole = next(iter(grids.values())).sigma_max, None

    def attempt(stage: str, work: Callable[[int], Any], before: int = 0) -> Any:
        began = time.perf_counter()
        result = with_back_off(work, config.batch, denoiser.device)
        count(stage, began, result.evaluations - before)
        return result

    growth, found, common = None, {}, {"quiet": quiet, "world": world, "pieces": pieces}
    if noises is None:
        noises = attempt("ends", lambda batch: draw_noises(denoiser, replace(config, batch=batch), top, **common))
    if max(grids) > 1:
        growth = attempt("endpoint", partial(measure_growth, denoiser, sigma_of, solver, noises, **common))
    for k, plain in grids.items():
        choose = partial(choose_growth, denoiser, sigma_of, plain, solver, noises, growth=growth, **common)
        found[k] = attempt("endpoint", choose)
        if found[k].beta != 0:
            if whole is None:
                whole = attempt("ends", lambda batch: draw_apart(denoiser, replace(config, batch=batch), top, **common))
            ask = partial(confirm, denoiser, found[k], plain, whole, **common)
            found[k] = attempt("endpoint", ask, found[k].evaluations)
    return found
