"""The state of a training run on disk: written whole, read only for the settings it was made with."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
import torch

from art_edm.grids.clocks import Clock
from art_edm.measure.profile import Profile
from art_edm.runtime.errors import CheckpointMismatch
from art_edm.runtime.files import save_tensors

__all__ = ["State", "read_checkpoint", "write_checkpoint"]

_PLAIN = ("iteration", "gamma", "round", "history", "evaluations", "seconds")  # saved as they are
_PROFILES = ("first", "profile")
_ARRAYS = ("knots", "paths")  # lists of arrays


@dataclass
class State:
    """All that changes in a run."""

    iteration: int = 0
    gamma: float = 0.0
    round: int = -1
    knots: List[np.ndarray] = field(default_factory=list)  # one learned path per finished round
    paths: List[np.ndarray] = field(default_factory=list)  # s of the last iterations, [N + 1, B] each
    history: List[Dict[str, float]] = field(default_factory=list)
    first: Optional[Profile] = None  # of the trajectories that tell whether more are needed
    profile: Optional[Profile] = None
    evaluations: int = 0
    seconds: float = 0.0
    parts: Dict[str, Any] = field(default_factory=dict)  # policy, critic and their optimizers


def write_checkpoint(path: Path, state: State, settings: Dict[str, Any]) -> None:
    """Write `state` and the settings it belongs to, atomically; an OSError (a full disk) says what is kept."""
    content: Dict[str, Any] = {name: getattr(state, name) for name in _PLAIN}
    for name in _ARRAYS:
        content[name] = [torch.from_numpy(array.copy()) for array in getattr(state, name)]
    content["parts"] = {name: part.state_dict() for name, part in state.parts.items()}
    for name in _PROFILES:
        p = getattr(state, name)
        if p is not None:
            content[name] = {
                "sigma": torch.from_numpy(p.sigma), "norm": torch.from_numpy(p.norm), "evaluations": p.evaluations,
                "seconds": p.seconds, "order": p.order,
            }
    content["settings"] = settings
    try:
        save_tensors(path, content)
    except OSError as error:
        kept = "the one before is kept" if path.exists() else "there is none yet"
        raise OSError(
            f"cannot write the checkpoint {path}: {error.strerror or error}; {kept}; make room and run again "
            "with --resume"
        ) from None


def read_checkpoint(path: Path, settings: Dict[str, Any], clock: Clock) -> "tuple[State, Dict[str, Any]]":
    """The state in `path`, its `parts` still empty, and what each of the parts had.

    Args:
        settings: those of the present run.
        clock: the profile's base clock.
    Raises:
        CheckpointMismatch: not a checkpoint, or one of other settings.
    """
    try:
        content = torch.load(path, weights_only=True)
        found = content["settings"]
    except Exception as error:  # torch raises many kinds for a file that is not one of its own
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise CheckpointMismatch(f"{path} is not a checkpoint ({reason}); remove it") from None
    for key, value in settings.items():
        if found.get(key) != value:
            raise CheckpointMismatch(
                f"{path} was made with {key}={found.get(key)}, this run has {key}={value}; "
                "use the same settings, or remove it and start again without --resume"
            )
    state = State(**{name: content[name] for name in _PLAIN})
    for name in _ARRAYS:
        setattr(state, name, [tensor.numpy() for tensor in content[name]])
    for name in _PROFILES:
        if name in content:
            p = content[name]
            plain = (p[each] for each in ("evaluations", "seconds", "order"))
            setattr(state, name, Profile(clock, p["sigma"].numpy(), p["norm"].numpy(), *plain))
    return state, content["parts"]
