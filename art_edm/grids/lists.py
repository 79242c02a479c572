"""Grids of and for other programs: lists of noise levels as text.

Symbols
-------
list  noise levels as other programs write them, descending, [n]; the last may be above 0, where a grid's is 0

A sampler that takes a list of sigmas (k-diffusion's do) takes `grid.values` as they are. diffusers' need
`diffusers.use_grid`.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import List, Optional, Sequence

import numpy as np

from art_edm.grids.grid import Grid, GridError
from art_edm.runtime.files import PathLike, atomic_write, check_destination, file_kind

__all__ = ["ENDS", "check_list_destination", "finish", "list_file", "list_text", "read_list", "whole",
           "write_list"]

ENDS = ("append", "replace")
FORMATS = (".json", ".csv", ".txt")

MAX_BYTES = 32 << 20  # of a file: a million levels in 32 characters each
MAX_DIGITS = 100  # of a number: float64 has 17, and longer ones are slow to read

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def _numbers(tokens: Sequence[str]) -> List[float]:
    for i, token in enumerate(tokens):
        if len(token) > MAX_DIGITS or not _NUMBER.fullmatch(token.strip()):
            raise GridError(f"found {token.strip()[:40]!r} at place {i + 1}, expected a number; "
                            "give noise levels such as 80, 5.1, 0.002")
    return [float(token) for token in tokens]


def _from_text(text: str) -> List[float]:
    """Numbers with commas, spaces or lines between them, in brackets or not."""
    inner = re.fullmatch(r"\s*\[(.*)\]\s*|(.*)", text, re.DOTALL)
    inner = (inner[2] if inner[1] is None else inner[1]).strip()
    return _numbers(re.split(r"\s*,\s*|\s+", re.sub(r",$", "", inner))) if inner else []


def _short(digits: str) -> float:
    """A number of JSON, unless it is absurdly long."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number of {len(digits)} characters")
    return float(digits)


def _from_json(text: str) -> List[float]:
    """A list of numbers, or an object that has one under "sigmas"."""
    try:
        data = json.loads(text, parse_int=_short, parse_float=_short)
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
            if source[-5:].endswith(FORMATS) or is_folder(source):
                found = "a folder" if is_folder(source) else "no file"
                raise GridError(f"found {found} {source}, expected a .json, .csv or text file of noise levels; check "
                                "the name") from None
            raise GridError(f"found no file of that name and no list of numbers: {error}") from None
    if path.suffix == ".npy":
        raise GridError(f"{path}: found a .npy, expected a .json, .csv or text file; a grid needs no import")
    try:
        kind, size = file_kind(path), path.stat().st_size
        if kind not in ("a file of unknown kind", "a JSON text"):
            raise GridError(f"found {kind}, expected a list of numbers; check the name")
        if size > MAX_BYTES:
            raise GridError(f"found a file of {size >> 20} MB, expected a list of at most {MAX_BYTES >> 20} MB")
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


def is_folder(source: str) -> bool:
    """Whether `source` is the name of a folder."""
    try:
        return Path(source).is_dir()
    except (OSError, ValueError):  # too long for a name
        return False


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


def whole(levels: np.ndarray) -> bool:
    """Whether all levels are whole numbers, and enough of them that they may be timesteps."""
    many = levels.ndim == 1 and len(levels) > 2
    return many and bool(np.isfinite(levels).all() and (levels == np.round(levels)).all())


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
