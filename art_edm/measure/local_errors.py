"""The local error of the solver in use, measured along exact paths by the solver's own steps.

Symbols
-------
p       order of the solver
h       length of a step, sigma - sigma_next
e       x_next of one step from the exact path, less the exact path at sigma_next, [B, C, H, W]
C_p     RMS(e) / h^(p + 1): takes the place of |Q|, which is C_1 of Euler's method but for the factor 1/2
stride  levels of the dense trajectory that a step spans: about as long as a step of the grids that will be used,
        since the law h^(p + 1) holds for short steps only

The dense trajectory must be exact next to a step that spans several of its intervals. `advance` is, but not next to
the error of a solver of order 4: there the path is followed by RK4 over every interval, whose error over a step is
stride^-4 of RK4's own. The trajectory's evaluations are the first stage of every step and all the past of
multistep solvers, so that those, and Euler's method, cost nothing more; a step of Heun's method costs one evaluation
more, of RK4 three.

Not every solver has a C_p (`Solver.alone`). The error of iPNDM and of steps in the learned clock contains the ratio
of neighbouring steps, or higher derivatives of the clock, in the same power as h^(p + 1); and most of the error of
UniPC's step is taken away by the next one. No density of levels minimises their sum.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Callable, Deque, NamedTuple, Optional, Tuple

import numpy as np
import torch

from art_edm.grids.clocks import Clock
from art_edm.measure.dense_paths import WHOLE, PathOptions, advance, extrapolated, supported_levels, travel
from art_edm.measure.field import Surrogate, evaluate, rms
from art_edm.measure.profile import Profile
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.sampling.multistep import on_path
from art_edm.sampling.solvers import SOLVERS, Past, integrate, order_of

__all__ = ["STRIDE", "at_middles", "check_alone", "measure_errors", "path_stages"]

STRIDE = 8
FINE_ORDER = 4  # of a solver, from which on RK4 follows the path


class _Point(NamedTuple):
    """A point of the dense trajectory."""

    level: torch.Tensor  # [], on the CPU: no step reads it from a device
    x: torch.Tensor
    denoised: torch.Tensor


def check_alone(solver: str) -> None:
    """Raise a ValueError for an unknown solver, or one whose local errors are not C_p h^(p + 1)."""
    order_of(solver)
    if not SOLVERS[solver].alone:
        others = ", ".join(name for name, entry in SOLVERS.items() if entry.alone)
        raise ValueError(f"found the local errors of {solver}, which follow from the steps around it and not from its "
                         f"own length, so that no clock minimises them; expected one of {others}; a grid of the "
                         f"default objective suits {solver}")


def measure_errors(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, points: int, options: PathOptions = WHOLE,
    solver: str = "heun", stride: int = STRIDE,
) -> Profile:
    """As `dense_paths.measure_along`, with C_p of a solver in place of |Q|.

    C_p of a step belongs to the geometric middle of its levels; beyond the first and the last it is held constant.

    Args:
        solver: a name in `solvers.SOLVERS`, of an entry that is `alone`.
        stride: levels that a step spans, less than `points`.
    Returns:
        A profile of that solver's order. M P evaluations for Euler and DPM-Solver++(2M), about 2 M P for Heun, 4 M P
        for multistep solvers of order 4, 7 M P for RK4.
    Raises:
        ValueError: an unknown solver, one that has no C_p, or fewer levels than a step spans.
        NonFiniteOutput: the denoiser returned NaN or infinity.
    """
    check_alone(solver)
    levels, order = supported_levels(denoiser, clock, points), order_of(solver)
    if len(levels) < stride + 2:
        raise ValueError(f"found {len(levels)} noise levels, expected at least {stride + 2} for the errors of {solver}")
    length = levels[:-stride] - levels[stride:]  # h, [n]

    def norms(x: torch.Tensor, labels: Optional[torch.Tensor], tell: Callable[[], None]) -> torch.Tensor:
        columns, slopes, check = [], [torch.zeros_like(x)], FiniteCheck(x.device)
        window: Deque[_Point] = deque(maxlen=stride * (1 + SOLVERS[solver].past) + 1)
        for k, level in enumerate(levels):
            denoised = evaluate(denoiser, x, level, labels, check.see)
            if window:
                slopes = [*slopes[-1:], (denoised - window[-1].denoised) / (level - levels[k - 1])]
            window.append(_Point(torch.tensor(level, dtype=x.dtype), x, denoised))
            if k >= stride:
                end = _step(denoiser, labels, check, solver, list(window)[::-1][::stride][::-1])
                columns.append(rms(end - x) / length[k - stride] ** (order + 1))
            if k + 1 < len(levels) and path_stages(solver) > 1:
                following = _Point(torch.tensor(levels[k + 1], dtype=x.dtype), x, denoised)
                x = _step(denoiser, labels, check, "rk4", [window[-1], following])
            elif k + 1 < len(levels):
                sigma, target = x.new_full((len(x),), level), x.new_full((len(x),), levels[k + 1])
                x = advance(x, Surrogate(denoised, extrapolated(slopes, levels, k), None), sigma, target)
            tell()
        check.settle()
        return torch.stack(columns, dim=1)  # [b, n]

    began = time.perf_counter()
    norm, evaluations = travel(denoiser, latents, clock, norms, len(length), options)
    return Profile(clock, *at_middles(levels, stride, norm), evaluations, time.perf_counter() - began, order)


def path_stages(solver: str) -> int:
    """Evaluations per level of the dense trajectory on which the errors of `solver` are measured."""
    return SOLVERS["rk4"].stages if order_of(solver) >= FINE_ORDER else 1


def at_middles(levels: np.ndarray, stride: int, norm: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Where the errors [M, n] of steps over `stride` of the levels [P] belong, and they: [n + 2] and [M, n + 2].

    Each belongs to the geometric middle of its step; beyond the first and the last they are held constant.
    """
    middle = np.sqrt(levels[:-stride] * levels[stride:])
    held = np.concatenate([norm[:, :1], norm, norm[:, -1:]], axis=1)
    return np.concatenate([levels[:1], middle, levels[-1:]]), held


def _step(
    denoiser: Denoiser, labels: Optional[torch.Tensor], check: FiniteCheck, solver: str, path: "list[_Point]"
) -> torch.Tensor:
    """One step of the solver from the last point but one of `path` to the level of the last, after those before it."""
    past: Past = ()
    sigma = torch.stack([point.level for point in path])
    for k, start in enumerate(path[:-1]):

        def slope(x: torch.Tensor, sigma: torch.Tensor, start: _Point = start) -> torch.Tensor:
            known = x is start.x
            return (x - (start.denoised if known else evaluate(denoiser, x, float(sigma), labels, check.see))) / sigma

        end, past = integrate(slope, start.x, sigma, solver, past, steps=[k])
        past = on_path(past, start.x)
    return end
