"""A number of evaluations per image in, a solver and its number of steps out.

Symbols
-------
N      evaluations of D per image: NFE
K      number of steps; `solvers.nfe` gives N for a solver and K

The tables were measured on learned grids, by end-point error, by the features of ends and by FID (docs/solvers.md):
`GREY` on digits, `COLOUR` on CIFAR-10. They differ, so that images of one channel have a table of their own. In one
step all solvers are Euler's.
"""

from __future__ import annotations

from typing import Tuple

from art_edm.sampling.solvers import SOLVERS, nfe, order_of

__all__ = ["CANDIDATES", "COLOUR", "GREY", "candidates", "recommended", "steps_of"]

# (N up to which, solver)
Table = Tuple[Tuple[float, str], ...]
GREY: Table = ((1, "euler"), (6, "clock-denoised"), (float("inf"), "ipndm3"))
COLOUR: Table = ((1, "euler"), (float("inf"), "ipndm3"))
CANDIDATES = ("clock", "clock-denoised", "ipndm3", "dpmpp2m", "heun")  # among which an end-point error may choose


def recommended(evaluations: int, channels: int) -> str:
    """The solver for N evaluations of images, or latents, of so many channels."""
    return next(solver for most, solver in (GREY if channels == 1 else COLOUR) if evaluations <= most)


def candidates(evaluations: int) -> Tuple[str, ...]:
    """Those of `CANDIDATES` that can use exactly N evaluations; for N = 1, where all are one, Euler alone."""
    if evaluations == 1:
        return ("euler",)
    return tuple(solver for solver in CANDIDATES if (evaluations - 1) % SOLVERS[solver].stages == 0)


def steps_of(solver: str, evaluations: int) -> int:
    """The K with which a solver uses exactly N evaluations.

    Raises a ValueError for an unknown solver, and for a number that no K uses; the message names the nearest.
    """
    order_of(solver)
    steps, rest = divmod(evaluations - 1, SOLVERS[solver].stages)
    if evaluations < 1 or rest:
        near = " or ".join(f"{nfe(solver, k)} (K = {k})" for k in (steps + 1, steps + 2) if k > 0)
        found = f"found {evaluations} evaluations for {solver}, which no number of its steps uses"
        raise ValueError(f"{found}; take {near}")
    return steps + 1
