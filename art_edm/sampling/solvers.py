"""Deterministic solvers of the probability-flow equation on a given grid, and the one table of them.

Symbols
-------
x          state, [B, C, H, W] float64, as in EDM's sampler
sigma      noise level at the start of a step; sigma_next at its end
slope      dx/dsigma = (x - D(x; sigma)) / sigma, the drift (5) with its sign turned
past       what a multistep solver keeps of its last steps, see `multistep`; () for the others
K          number of steps of the grid
NFE        evaluations of D per image: stages (K - 1) + 1. Euler and multistep solvers K, Heun 2K - 1, RK4 4K - 3

A solver is a function of one step and an entry in `SOLVERS`. It receives a grid and never builds one. The slope has no
value at sigma = 0, so that the step that ends there evaluates nothing at its end: Euler's, or for multistep solvers of
the order that their entry names. It is recognised by its value, never by its index.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch

from art_edm.grids.grid import SIGMA_SLACK, Grid, check_distinct, check_range
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.runtime.precision import full_precision
from art_edm.sampling import multistep
from art_edm.sampling.multistep import Past, Rule, Slope, Step, denoised_step, limited, slopes_step

__all__ = [
    "OnStep", "Past", "SOLVERS", "Slope", "Solver", "Step", "check_steps", "euler_step", "fitted", "heun_step",
    "integrate", "multistep_solver", "nfe", "noise_levels", "order_of", "rk4_step", "sample", "slope_of", "supported",
]

OnStep = Callable[[int, float, torch.Tensor], None]

PROBES = 1 << 14  # levels at which a model's rounding is tried; ones that are closer than 0.1 % may be missed


def euler_step(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past = (), weights: None = None
) -> Tuple[torch.Tensor, Past]:
    """First order, one evaluation: x + h k1, h = sigma_next - sigma."""
    return x + (sigma_next - sigma) * slope(x, sigma), ()


def heun_step(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past = (), weights: None = None
) -> Tuple[torch.Tensor, Past]:
    """Second order, two evaluations: x + h (k1 + k2) / 2; algorithm 1 of EDM (2206.00364)."""
    h = sigma_next - sigma
    k1 = slope(x, sigma)
    k2 = slope(x + h * k1, sigma_next)
    return x + h * (0.5 * k1 + 0.5 * k2), ()


def rk4_step(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, sigma_next: torch.Tensor, past: Past = (), weights: None = None
) -> Tuple[torch.Tensor, Past]:
    """Fourth order, four evaluations: the classical Runge-Kutta step in sigma, x + h (k1 + 2 k2 + 2 k3 + k4) / 6."""
    h = sigma_next - sigma
    middle = sigma + h / 2
    k1 = slope(x, sigma)
    k2 = slope(x + h / 2 * k1, middle)
    k3 = slope(x + h / 2 * k2, middle)
    k4 = slope(x + h * k3, sigma_next)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), ()


class Solver(NamedTuple):
    """An entry of the table."""

    step: Step
    order: int  # p: the local error of a short step on a smooth path is C_p h^(p + 1)
    source: str  # what it is and where it is from, one line
    stages: int = 1  # evaluations of a step that does not end at 0
    past: int = 0  # earlier steps that a step of full order takes; `integrate` keeps no more
    last_order: int = 1  # of the step to 0
    rule: Optional[Rule] = None  # weights of a multistep solver, from the grid alone
    reach: int = 0  # steps further back than its neighbours whose weights a level's move changes
    alone: bool = True  # whether a short step's error is C_p h^(p + 1), however long the steps before it are


def multistep_solver(step: Step, rule: Rule, values: int, last: int, source: str, **more: Any) -> Solver:
    """A solver through the last `values` values, and through `last` in the step to 0."""
    return Solver(step, **{"order": values, **more}, source=source, past=values - 1, last_order=last,
                  rule=limited(rule, values, last))


def _ipndm(values: int) -> Solver:
    """Its weights, of an even grid, are of order 2 on others."""
    return multistep_solver(slopes_step, multistep.even_row, values, 2, f"iPNDM (2204.13902) of order {values}",
                            order=2, alone=False)


SOLVERS: Dict[str, Solver] = {
    "euler": Solver(euler_step, 1, "Euler; DDIM (2010.02502)"),
    "heun": Solver(heun_step, 2, "Heun, algorithm 1 of EDM (2206.00364)", stages=2),
    "rk4": Solver(rk4_step, 4, "the classical Runge-Kutta method", stages=4),
    "dpmpp2m": multistep_solver(denoised_step, multistep.dpmpp2m_row, 2, 1, "DPM-Solver++(2M) (2211.01095)"),
    "ipndm2": _ipndm(2),
    "ipndm3": _ipndm(3),
    "ipndm": _ipndm(4),
    "ab4-sigma": multistep_solver(slopes_step, multistep.through_times(lambda sigma: sigma), 4, 1,
                                  "Adams-Bashforth of order 4 with the weights of the uneven levels"),
    "deis": multistep_solver(slopes_step, multistep.through_times(multistep.vp_time), 4, 1, "DEIS-tAB3 (2204.13902)"),
    "unipc": Solver(multistep.unipc_step, 3, "UniPC-3, B2(h) (2302.04867)", past=3, rule=multistep.unipc(3),
                    alone=False),  # the next step corrects most of it
    "clock": multistep_solver(slopes_step, multistep.clock_slopes, 4, 2,
                              "slopes extrapolated in the learned clock", reach=1, alone=False),
    "clock-denoised": multistep_solver(denoised_step, multistep.clock_denoised, 3, 1,
                                       "denoised images extrapolated in the learned clock", reach=1, alone=False),
}


def nfe(solver: Union[str, Solver], num_steps: int) -> int:
    """Evaluations of the denoiser per image on a grid of `num_steps` steps: the last step evaluates once."""
    stages = _entry(solver).stages
    if num_steps < 1:
        raise ValueError(f"found num_steps = {num_steps}, expected at least 1")
    return stages * (num_steps - 1) + 1


def order_of(solver: str) -> int:
    """p; raises a ValueError for an unknown solver."""
    return _entry(solver).order


def _entry(solver: Union[str, Solver]) -> Solver:
    if isinstance(solver, Solver):
        return solver
    if solver not in SOLVERS:
        raise ValueError(f"found solver {solver!r}, expected one of {', '.join(SOLVERS)}")
    return SOLVERS[solver]


@torch.no_grad()
@full_precision()
def sample(
    denoiser: Denoiser, latents: torch.Tensor, grid: Grid, solver: Union[str, Solver] = "heun",
    class_labels: Optional[torch.Tensor] = None, on_step: Optional[OnStep] = None, batch: Optional[int] = None,
) -> torch.Tensor:
    """Carry unit noise from the grid's first noise level to 0, in full precision whatever the caller has switched on.

    Args:
        denoiser: the model; its `initial` turns the noise into the state at the first level.
        latents: unit normal noise [B, C, H, W].
        grid: noise levels; rounded to those the model supports by `denoiser.round_sigma`.
        solver: a name in `SOLVERS`, or an entry of one's own.
        class_labels: one-hot [B, label_dim], or None.
        on_step: called as on_step(k, sigma_k, x) after step k = 1..K, for every batch.
        batch: images per evaluation; all at once by default.
    Returns:
        Images [B, C, H, W] float64.
    Raises:
        ValueError: an unknown solver; labels or a batch that do not fit; a grid that starts above the
            model's sigma_max, or loses a step by rounding.
        NonFiniteOutput: the denoiser returned NaN or infinity.
    """
    _entry(solver)
    if batch is not None and batch < 1:
        raise ValueError(f"found batch = {batch}, expected at least 1 image")
    if class_labels is not None and len(class_labels) != len(latents):
        raise ValueError(f"found {len(class_labels)} class labels for {len(latents)} latents; pass one per image")
    sigma = torch.tensor(supported(denoiser, grid).values, device=latents.device)  # [K + 1]
    size = batch or max(len(latents), 1)
    parts: List[torch.Tensor] = []
    for start in range(0, max(len(latents), 1), size):
        labels = None if class_labels is None else class_labels[start:start + size]
        x = denoiser.initial(latents[start:start + size], float(sigma[0])).to(torch.float64)  # [b, C, H, W]
        check = FiniteCheck(x.device)
        parts.append(integrate(slope_of(denoiser, labels, check), x, sigma, solver, on_step=on_step)[0])
        check.settle()
    return torch.cat(parts)


def integrate(
    slope: Slope, x: torch.Tensor, sigma: torch.Tensor, solver: Union[str, Solver], past: Past = (),
    on_step: Optional[OnStep] = None, steps: Optional[Iterable[int]] = None,
) -> Tuple[torch.Tensor, Past]:
    """Follow dx/dsigma through levels that need not end at 0; differentiable, `torch.no_grad` is the caller's.

    Args:
        slope: the field, as from `slope_of`.
        x: state where the first of `steps` begins, [B, C, H, W]; all is computed in its type, float64 in `sample`.
        sigma: levels [n + 1] of the grid, strictly descending; weights are computed from all of them.
        solver: a name in `SOLVERS`, or an entry of one's own.
        past: what an earlier call with the same solver returned; () starts anew.
        on_step: called as on_step(k, sigma_k, x) after step k = 1..n.
        steps: which steps to take, of 0..n-1, one after the other; all by default.
    Returns:
        (x at the level after the last step, past): to be continued by another call from there, with the same result.
    Raises:
        ValueError: an unknown solver.
    """
    entry, levels = _entry(solver), sigma.tolist()
    row = entry.rule(sigma.to("cpu", torch.float64)) if entry.rule else None  # once per grid, on the CPU
    for k in range(len(levels) - 1) if steps is None else steps:
        step = euler_step if levels[k + 1] == 0 and row is None else entry.step
        x, past = step(slope, x, sigma[k], sigma[k + 1], past, row and partial(row, k))
        past = past[-entry.past:] if entry.past else ()
        if on_step is not None:
            on_step(k + 1, levels[k + 1], x)
    return x, past


def slope_of(
    denoiser: Denoiser, class_labels: Optional[torch.Tensor] = None, check: Optional[FiniteCheck] = None
) -> Slope:
    """dx/dsigma of a denoiser, for class_labels one-hot [B, label_dim] or None; its result has the type of x.

    What it returns raises NonFiniteOutput where the denoiser returned NaN or infinity: at once, or when the caller
    settles the `check` it gave.
    """
    check = check or FiniteCheck(denoiser.device, deferred=False)

    def slope(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        denoised = check.see(denoiser(x, sigma, class_labels).to(x.dtype), sigma)
        return (x - denoised) / sigma

    return slope


def supported(denoiser: Denoiser, grid: Grid) -> Grid:
    """The grid rounded to the noise levels the model supports; the final 0 is not a level to round.

    Raises a ValueError if the grid leaves the model's range, or loses a step by rounding.
    """
    check_range(grid, *denoiser.sigma_limits)
    levels = np.append(denoiser.round_sigma(torch.tensor(grid.values[:-1])).cpu().numpy(), 0.0)
    check_distinct(grid, levels.tolist())
    return Grid(levels)


def fitted(denoiser: Denoiser, grid: Grid) -> Grid:
    """As `supported`, for a learned grid: levels that collide, or that the model has not, move to free ones nearby.

    Of a model of discrete levels each moves to one of its levels, the closest strictly descending ones in the order of
    levels. Of another, those below its lowest are spaced evenly in log sigma from the last one above, down to it.

    Raises a ValueError where there are more steps than levels, as `check_steps` does before any work.
    """
    values, low, levels = grid.values[:-1].copy(), denoiser.sigma_limits[0], noise_levels(denoiser)
    below = int((values <= low).sum())
    if levels is not None:
        check_steps(denoiser, len(values))
        rounded = denoiser.round_sigma(torch.tensor(np.maximum(values, levels[-1]))).cpu().numpy()
        index = np.abs(levels[None] - rounded[:, None]).argmin(axis=1) - np.arange(len(values))
        upper, lower = np.maximum.accumulate(index), np.minimum.accumulate(index[::-1])[::-1]
        moved = ((upper + lower) // 2).clip(index[0], len(levels) - len(values))
        values = levels[moved + np.arange(len(values))]
    elif 0 < below < len(values):
        values[-below:] = np.geomspace(values[-below - 1], low, below + 1)[1:]
    return supported(denoiser, Grid(np.append(values, 0.0)))


def noise_levels(denoiser: Denoiser) -> Optional[np.ndarray]:
    """The levels [L] of a model of discrete ones, from its sigma_max down; None where any level will do."""
    low, high = max(denoiser.sigma_limits[0], 1e-4 * denoiser.sigma_min), denoiser.sigma_max
    probes = torch.tensor(np.geomspace(low, high, PROBES))
    rounded = torch.cat([denoiser.round_sigma(part).cpu() for part in probes.split(1024)]).numpy()
    levels = np.unique(rounded[(rounded >= low) & (rounded <= high * (1 + SIGMA_SLACK))])[::-1]
    return levels if len(levels) < PROBES // 2 else None


def check_steps(denoiser: Denoiser, num_steps: int) -> None:
    """Raise a ValueError where a grid would have more steps than the model has levels."""
    levels = noise_levels(denoiser)
    if levels is not None and num_steps > len(levels):
        raise ValueError(f"found {num_steps} steps, but the network has {len(levels)} noise levels from "
                         f"{levels[0]:g} to {levels[-1]:g}; use at most {len(levels)} steps")
