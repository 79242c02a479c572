"""Grids of and for other programs: lists of noise levels as text, and diffusers' schedulers.

Symbols
-------
list       noise levels as other programs write them, descending, [n]; the last may be above 0, where a grid's is 0
sigmas     a scheduler's noise levels, float32; K + 1 values, of which the last is 0
timesteps  what a scheduler hands the network for each level: log(sigma) / 4 in EDM's formulation, else the place
           of sigma among the levels of the network's training

A sampler that takes a list of sigmas (k-diffusion's do) takes `grid.values` as they are. diffusers' need `use_grid`:
of its schedulers only EulerDiscreteScheduler has an argument for noise levels; EDMEulerScheduler's `sigmas` are
places in [0, 1] of its own rule, and the others have none.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from types import MethodType
from typing import Any, List, Optional, Sequence, Tuple

import numpy as np
import torch

from .files import PathLike, atomic_write, check_destination
from .grid import Grid, GridError

__all__ = [
    "ENDS", "SCHEDULERS", "check_list_destination", "finish", "list_file", "list_text", "read_list", "use_grid",
    "write_list",
]

ENDS = ("append", "replace")
FORMATS = (".json", ".csv", ".txt")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _numbers(tokens: Sequence[str]) -> List[float]:
    for i, token in enumerate(tokens):
        if not _NUMBER.fullmatch(token.strip()):
            raise GridError(f"found {token.strip()[:40]!r} at place {i + 1}, expected a number; "
                            "give noise levels such as 80, 5.1, 0.002")
    return [float(token) for token in tokens]


def _from_text(text: str) -> List[float]:
    """Numbers with commas, spaces or lines between them, in brackets or not."""
    inner = re.fullmatch(r"\s*\[(.*)\]\s*|(.*)", text, re.DOTALL)
    inner = (inner[2] if inner[1] is None else inner[1]).strip()
    return _numbers(re.split(r"\s*,\s*|\s+", re.sub(r",$", "", inner))) if inner else []


def _from_json(text: str) -> List[float]:
    """A list of numbers, or an object that has one under "sigmas"."""
    try:
        data = json.loads(text, parse_int=float)
    except (ValueError, RecursionError):
        raise GridError("found no valid JSON, expected a list of numbers; check the file") from None
    data = data.get("sigmas") if isinstance(data, dict) else data
    if not isinstance(data, list) or not all(isinstance(value, float) for value in data):
        raise GridError('found other JSON, expected a list of numbers, or {"sigmas": [...]}; write it as [80, 0.5, 0]')
    return data


def _from_csv(text: str) -> List[float]:
    """One row or one column of numbers, or the column with the title sigma."""
    rows = [row for row in csv.reader(text.splitlines(), skipinitialspace=True) if any(cell.strip() for cell in row)]
    titles = [cell.strip().lower() for cell in rows[0]] if rows else []
    if "sigma" in titles:
        place = titles.index("sigma")
        return _numbers([row[place] if place < len(row) else "" for row in rows[1:]])
    if len(rows) > 1 and any(len(row) != 1 for row in rows):
        raise GridError(f"found {len(rows)} rows of several columns, none with the title sigma; "
                        "expected one row, one column, or a title; add a first row with titles")
    return _numbers([cell for row in rows for cell in row])


def read_list(source: str) -> np.ndarray:
    """Noise levels from a file or from text, in the order in which they stand.

    Args:
        source: the name of a .json, .csv or text file, or the numbers themselves: "80, 5.1, .47, .002".
    Returns:
        float64 [n], as `finish` takes them; only that they are numbers is checked.
    Raises:
        GridError: no such file and no such text, or a file of something else.
    """
    path = list_file(source)
    if path is None:
        try:
            return np.array(_from_text(source))
        except GridError as error:
            raise GridError(f"found no file of that name and no list of numbers: {error}") from None
    if path.suffix == ".npy":
        raise GridError(f"{path}: found a .npy, expected a .json, .csv or text file; a grid needs no import")
    try:
        text = path.read_text(encoding="utf-8-sig")
        return np.array({".json": _from_json, ".csv": _from_csv}.get(path.suffix, _from_text)(text))
    except GridError as error:
        raise GridError(f"{path}: {error}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not text in UTF-8"
        raise GridError(f"{path}: found no readable list ({reason}), expected numbers; check the file") from None


def list_file(source: str) -> Optional[Path]:
    """The file that `read_list(source)` reads; None where it takes the numbers from the text itself."""
    try:
        return Path(source) if Path(source).is_file() else None
    except (OSError, ValueError):  # too long for a name: numbers
        return None


def finish(levels: Sequence[float], end: Optional[str] = None) -> Grid:
    """A grid of a list, which gets the final 0 by the stated choice; never sorted, and nothing else is changed.

    Args:
        levels: noise levels [n], strictly descending.
        end: for a list that stops above 0: "append" the 0, one step and one evaluation more than the list has
            steps, or "replace" the last level by it, the same number of steps.
    Returns:
        A grid of n steps (append), or n - 1 steps (replace, and for a list that ends at 0).
    Raises:
        GridError: the list is not a grid's, or stops above 0 and `end` is None.
    """
    levels = np.asarray(levels, dtype=np.float64)
    if levels.ndim != 1 or len(levels) == 0 or levels[-1] == 0:
        return Grid(levels)
    grid = Grid(np.append(levels, 0.0))  # checks the last level also where that is replaced
    steps = grid.num_steps
    if end is None:
        raise GridError(f"found a list that ends at {levels[-1]:.9g}, expected 0; choose --end=append (0 after it, "
                        f"{steps} steps) or --end=replace (0 in its place, {steps - 1} steps)")
    if end not in ENDS:
        raise GridError(f"found end = {end!r}, expected one of {', '.join(ENDS)}")
    return grid if end == "append" else Grid(np.append(levels[:-1], 0.0))


def list_text(grid: Grid, kind: str) -> str:
    """A grid as text that `read_list` reads back to the same bits.

    Args:
        grid: the grid.
        kind: ".json" a list; ".csv" the columns step and sigma; ".txt" a level on each line.
    """
    levels = grid.values.tolist()
    if kind == ".json":
        return json.dumps(levels) + "\n"
    if kind == ".csv":
        return "step,sigma\n" + "".join(f"{k},{sigma!r}\n" for k, sigma in enumerate(levels))
    return "".join(f"{sigma!r}\n" for sigma in levels)


def check_list_destination(path: PathLike) -> Path:
    """Raise a ValueError now if `write_list(path, grid)` would fail, or take the place of a grid's provenance."""
    path = Path(path)
    if path.suffix not in FORMATS:
        raise ValueError(f"found the name {path}, expected one that ends in {', '.join(FORMATS)}; change --out")
    if path.suffix == ".json" and path.with_suffix(".npy").exists():
        raise ValueError(f"{path} is where the provenance of {path.with_suffix('.npy')} goes; choose another --out")
    return check_destination(path)


def write_list(path: PathLike, grid: Grid) -> None:
    """Write a grid as .json, .csv or .txt, by the ending of the name; whole or not at all."""
    path = check_list_destination(path)
    text = list_text(grid, path.suffix)
    atomic_write(path, lambda file: file.write(text.encode()))


_EDM = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
SCHEDULERS = (*_EDM, "EulerDiscreteScheduler", "HeunDiscreteScheduler", "DPMSolverMultistepScheduler")


def use_grid(scheduler: Any, grid: Grid) -> Any:
    """Let a scheduler of diffusers run on a grid, in a pipeline or in a loop of one's own.

    From then on its `set_timesteps` lays out the grid, exact to float32, whatever rule it is configured for. An
    EDM scheduler's sigma_max becomes the grid's, since pipelines scale the first noise by it.

    Args:
        scheduler: one of `SCHEDULERS`; it is changed, its class is not.
        grid: the grid; sigma in the units of x, within the levels of training unless the scheduler is EDM's.
    Returns:
        The scheduler.
    Raises:
        ValueError: another scheduler; a configuration that does not end at 0, or that is for flow matching; a grid
            outside the network's levels, or too fine for float32. Later: another number of steps is asked for.
    """
    kind = next((base.__name__ for base in type(scheduler).__mro__ if base.__name__ in SCHEDULERS), None)
    if kind is None:
        raise ValueError(f"found {type(scheduler).__name__}, expected one of {', '.join(SCHEDULERS)} of diffusers")
    _check_configuration(scheduler.config)
    sigmas, steps = _single(grid), grid.num_steps
    if kind in _EDM:
        scheduler.register_to_config(sigma_max=grid.sigma_max)
    elif scheduler.config.get("timestep_type") != "continuous":
        _places(scheduler, sigmas)  # refuses a grid outside the network's levels

    def set_timesteps(self: Any, num_inference_steps: Optional[int] = None, device: Any = None) -> None:
        if num_inference_steps not in (None, steps):
            raise ValueError(f"found num_inference_steps = {num_inference_steps}, expected {steps}, the grid's steps; "
                             f"pass {steps}, or resample the grid with tools/make_grid.py")
        if kind == "EulerDiscreteScheduler":
            type(self).set_timesteps(self, sigmas=sigmas.numpy(), device=device)
            return
        type(self).set_timesteps(self, steps, device=device)  # forgets the last run
        timesteps = self.precondition_noise(sigmas[:-1]) if kind in _EDM else _places(self, sigmas)
        self.sigmas, self.timesteps = _laid_out(sigmas, timesteps.to(device), twice=kind == "HeunDiscreteScheduler")

    scheduler.set_timesteps = MethodType(set_timesteps, scheduler)  # bound, so that a deep copy has its own
    return scheduler


def _check_configuration(config: Any) -> None:
    end = config.get("final_sigmas_type", "zero")
    if end != "zero":
        raise ValueError(f"found a scheduler with final_sigmas_type = {end!r}, expected 'zero', where every grid ends; "
                         "make it with from_config(..., final_sigmas_type='zero')")
    if config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction":
        raise ValueError("found a scheduler for flow matching, expected one whose noise is added to the image; "
                         "a grid's noise levels do not apply to it")


def _single(grid: Grid) -> torch.Tensor:
    """The grid in float32 [K + 1], in which diffusers keeps its levels; still strictly descending."""
    sigmas = torch.tensor(grid.values, dtype=torch.float32)
    same = (sigmas.diff() >= 0).nonzero()
    if len(same):
        i = int(same[0])
        raise ValueError(f"steps {i} and {i + 1} (sigma = {grid.values[i]:.9g} and {grid.values[i + 1]:.9g}) are the "
                         "same noise level in float32, in which diffusers samples; use fewer steps")
    return sigmas


def _places(scheduler: Any, sigmas: torch.Tensor) -> torch.Tensor:
    """Where the levels sigmas[:-1] lie among those of the training, log-linear between two: [K] float32."""
    kept = scheduler.alphas_cumprod.to("cpu", torch.float64).numpy()
    trained, levels = np.sqrt((1 - kept) / kept), sigmas[:-1].to(torch.float64).numpy()  # ascending; descending
    if levels[0] > trained[-1] * 1.001 or levels[-1] < trained[0] * 0.999:
        raise ValueError(f"found a grid from {levels[0]:.6g} to {levels[-1]:.6g}, expected none outside the network's "
                         f"levels, {trained[-1]:.6g} to {trained[0]:.6g}; make a grid with --sigma-max and --sigma-min")
    return torch.from_numpy(np.interp(np.log(levels), np.log(trained), np.arange(len(trained)))).to(torch.float32)


def _laid_out(sigmas: torch.Tensor, timesteps: torch.Tensor, twice: bool) -> Tuple[torch.Tensor, torch.Tensor]:
    """Levels [K + 1] and timesteps [K], or for Heun [2K] and [2K - 1]: every level but the first evaluated twice."""
    if not twice:
        return sigmas.clone(), timesteps
    inner, rest = sigmas[1:-1].repeat_interleave(2), timesteps[1:].repeat_interleave(2)
    return torch.cat([sigmas[:1], inner, sigmas[-1:]]), torch.cat([timesteps[:1], rest])
