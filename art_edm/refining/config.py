"""Settings of a grid's refinement, and its state in memory and on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from art_edm.refining.solver_jacobian import Noises
from art_edm.runtime.errors import CheckpointMismatch
from art_edm.runtime.files import save_tensors

__all__ = ["Drawn", "EndError", "RefineConfig", "RefineState", "better", "read_state", "write_state"]

HARDLY = 0.01  # of the mean error: what is less counts as this much in a geometric mean
TINY = 1e-300
LONG = 200  # characters that are worth showing; grids are longer


@dataclass(frozen=True)
class RefineConfig:
    """Settings of a refinement."""

    seed: int = 0
    noises: int = 32  # M, over which the error is minimised
    held: int = 96  # noises held out, which decide when it ends and whether a grid may be returned
    batch: int = 16  # noises per evaluation
    fine: int = 40  # steps of the reference solution
    fine_solver: str = "rk4"
    iterations: int = 12
    more: int = 40  # iterations where they are cheap: while they took fewer evaluations than `cheap`
    cheap: int = 50_000
    step: float = 0.005  # of differences, relative to the smaller gap beside a level
    damping: float = 1.0  # of the first step, relative to the curvature
    tolerance: float = 1e-3  # two iterations in a row that gain less, relatively, end it
    patience: int = 3  # so many iterations without a gain on the noises held out end it


class EndError(NamedTuple):
    """End-point error, RMS over pixels, over noises; in units of x."""

    mean: float
    stderr: float
    median: float

    @classmethod
    def of(cls, errors: Any) -> "EndError":
        """The figures of errors [M], a numpy vector."""
        spread = float(errors.std(ddof=1)) if len(errors) > 1 else 0.0
        middle = float(torch.from_numpy(errors).quantile(0.5))
        return cls(float(errors.mean()), spread / len(errors) ** 0.5, middle)


def better(before: np.ndarray, after: np.ndarray, slack: float = 0.0) -> bool:
    """Whether errors [M] are less in mean and geometric mean, and in the mean square not more than by `slack`."""
    least = HARDLY * before.mean() + TINY
    logarithm = lambda errors: np.log(np.maximum(errors, least)).mean()
    squares = np.square(after).mean() <= (1 + slack) * np.square(before).mean()
    return bool(after.mean() < before.mean() and logarithm(after) < logarithm(before) and squares)


class Drawn(NamedTuple):
    """Noises to minimise over, noises held out, and the evaluations that solving their paths took."""

    train: Noises
    held: Noises
    evaluations: int


@dataclass
class RefineState:
    """All that changes; plain values and float64 tensors."""

    q: torch.Tensor  # of the last grid that was accepted, [K - 1]
    best: torch.Tensor  # levels of the grid to return, [K + 1]
    least: torch.Tensor  # levels after the step of least error over all noises, allowed or not, [K + 1]
    errors: torch.Tensor  # of the given grid over the noises held out, [held]
    secant: torch.Tensor  # S, [K - 1, K - 1]
    step: torch.Tensor  # the last one in q, [K - 1]; zero before there is one
    gradient: torch.Tensor  # before that step, [K - 1]
    damping: float
    best_total: float = math.inf  # error of `best`, summed over all noises
    least_total: float = math.inf  # of `least`
    drawn: int = 0  # of `evaluations`, for the exact ends of its own noises
    start: str = ""  # name of the grid to start from
    share: float = 1.0  # of the way to `least`, where it was not taken
    before: List[float] = field(default_factory=list)  # EndError of the given grid
    after: List[float] = field(default_factory=list)  # of `best`
    history: List[Dict[str, float]] = field(default_factory=list)
    evaluations: int = 0
    seconds: float = 0.0
    finished: bool = False  # with the iterations
    settled: bool = False  # what to return


def write_state(path: Path, state: RefineState, drawn: Optional[Drawn], settings: Dict[str, Any]) -> None:
    """Write all that a resumed refinement needs, atomically; `drawn` where it is the refinement's own."""
    content: Dict[str, Any] = {"settings": settings, "state": dict(vars(state))}
    if drawn is not None:
        content["noises"] = [list(noises.to(torch.device("cpu"))) for noises in drawn[:2]]
        content["noises_evaluations"] = drawn.evaluations
    try:
        save_tensors(path, content)
    except OSError as error:
        kept = "the one before is kept" if path.exists() else "there is none yet"
        reason = error.strerror or error
        raise OSError(f"cannot write the checkpoint {path}: {reason}; {kept}; make room and use --resume") from None


def read_state(path: Path, settings: Dict[str, Any], device: torch.device) -> Tuple[RefineState, Optional[Drawn]]:
    """What `write_state` wrote, the noises on `device`.

    Raises:
        CheckpointMismatch: not such a file, or one of other settings.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found, values = content["settings"], content["state"]
        state = RefineState(**{item.name: values[item.name] for item in fields(RefineState)})
        kept = [Noises(*tensors).to(device) for tensors in content.get("noises", ())]
        drawn = Drawn(*kept, content["noises_evaluations"]) if kept else None
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise CheckpointMismatch(f"{path} is not a refinement's checkpoint ({reason}); remove it") from None
    for key, value in settings.items():
        if found.get(key) != value:
            made, here = f"{key}={found.get(key)}", f"{key}={value}"
            differ = f"{made}, this run has {here}" if len(made + here) < LONG else f"other {key} than this run has"
            advice = "use the same settings, or remove it and start again without --resume"
            raise CheckpointMismatch(f"{path} was made with {differ}; {advice}")
    return state, drawn
