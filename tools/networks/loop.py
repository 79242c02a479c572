"""The training loop of every bundled network: steps, checkpoints, stops, and going on to the same bytes.

A step draws from a generator seeded by (seed, iteration), so a resumed run sees exactly the draws of an
uninterrupted one.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict

import torch

from art_edm.pickles.archives import load_tensors
from art_edm.runtime.errors import Stopped
from art_edm.runtime.files import save_tensors
from art_edm.runtime.progress import GracefulStop, Progress

__all__ = ["DAMAGED", "Run", "read_checkpoint", "to_unit", "train"]

# What `load_tensors` and the use of its result raise for a file that is truncated, or of another kind.
DAMAGED = (RuntimeError, OSError, ValueError, LookupError, AttributeError, TypeError)


@dataclass(frozen=True)
class Run:
    """Where a training keeps its state, and how it is shown.

    Args:
        checkpoint: file that holds all state, rewritten every `save_every` steps and on a stop.
        resume: continue from `checkpoint` if it exists.
        quiet: show no progress.
    """

    checkpoint: Path
    resume: bool = False
    quiet: bool = False
    save_every: int = 250


def to_unit(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels uint8 of any shape as floats in [-1, 1], EDM's scale; floats stay as they are."""
    return pixels.to(torch.float32) / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels


def train(
    parts: Dict[str, Any], step: Callable[[int], float], config: Any, build: Dict[str, Any], run: Run,
    saving: Callable[[Dict[str, Any]], None] = lambda log: None,
) -> Dict[str, Any]:
    """Take `config.iterations` steps.

    Args:
        parts: all that a checkpoint holds the state of, by name; read from the checkpoint first when resuming.
        step: takes the iteration's number, trains, and returns the loss.
        config: the settings, a dataclass; a checkpoint of other settings is refused.
        build: what the images and settings make the network of; a checkpoint of another network is refused.
        saving: called with the log before every regular checkpoint; what it puts there is kept.
    Returns:
        the log: `losses` (mean per `save_every` steps), `seconds`, `iteration`.
    Raises:
        Stopped: Ctrl-C or SIGTERM; the checkpoint is written.
        ValueError: the checkpoint is damaged, or of other settings or images.
    """
    log: Dict[str, Any] = {"iteration": 0, "seconds": 0.0, "losses": [], "running": 0.0, "since": 0}
    if run.resume and run.checkpoint.exists():
        log.update(_restore(run.checkpoint, config, build, parts))
    progress = Progress(config.iterations, config.label, run.quiet, log["iteration"])
    began = time.monotonic() - log["seconds"]

    def save() -> None:
        state = {name: part.state_dict() for name, part in parts.items()}
        save_tensors(run.checkpoint, {**state, "log": log, "config": asdict(config), "build": build})

    with GracefulStop() as stop:
        for it in range(log["iteration"], config.iterations):
            log["running"] += step(it)
            log.update(iteration=it + 1, seconds=time.monotonic() - began)
            last = it + 1 == config.iterations
            if (it + 1) % run.save_every == 0 or last:
                log["losses"].append(log["running"] / (it + 1 - log["since"]))
                log.update(running=0.0, since=it + 1)
                saving(log)
                save()
            if stop.requested and not last:
                save()
                progress.close()
                after = f"{it + 1} of {config.iterations} iterations"
                raise Stopped(f"{config.label} stopped after {after}; saved in {run.checkpoint}")
            progress.update(it + 1, f"loss {log['losses'][-1]:.4f}" if log["losses"] else "")
    progress.close()
    return log


def read_checkpoint(checkpoint: Path, config: Any) -> Dict[str, Any]:
    """The state that `train` saved; raises a ValueError if it is damaged, foreign or of other settings."""
    try:
        state = load_tensors(checkpoint)
        if not isinstance(state, dict):
            raise TypeError(type(state).__name__)
        saved = {**asdict(type(config)()), **state["config"]}
        done = state["log"]["iteration"]
    except DAMAGED as error:
        what = f"damaged or not a checkpoint of the {config.label} ({type(error).__name__})"
        raise ValueError(f"{checkpoint} is {what}; remove it to start again") from None
    for key, value in asdict(config).items():
        longer = key == "iterations" and config.open_ended and done <= value
        if saved[key] != value and not longer:
            found = f"{key}={saved[key]}, not {value}"
            raise ValueError(f"{checkpoint} was trained with {found}; use that or remove the file")
    return state


def _restore(checkpoint: Path, config: Any, build: Dict[str, Any], parts: Dict[str, Any]) -> Dict[str, Any]:
    """Load all state into `parts`; returns the log."""
    state = read_checkpoint(checkpoint, config)
    for key, value in build.items():  # not to the last bit: a mean depends on the number of threads
        if not math.isclose(state["build"][key], value, rel_tol=1e-4, abs_tol=1e-4):
            found = f"{key}={state['build'][key]}, not {value}"
            raise ValueError(f"{checkpoint} was trained on images of {found}; use those or remove the file")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return dict(state["log"])
