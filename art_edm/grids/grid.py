"""Noise-level grids: the only form in which a schedule reaches a sampler.

Symbols
-------
K          number of steps, `num_steps`
values     sigma_0 > sigma_1 > ... > sigma_{K-1} > sigma_K = 0, float64 [K+1], in the units of x
sigma_max  sigma_0, where sampling starts
sigma_min  sigma_{K-1}, the last positive level, where a rule pins it
rho        exponent of the EDM rule: sigma^(1/rho) is equidistant

A grid is a plain `.npy`; a JSON sidecar of the same stem says where it came from. A file is taken as it
is or refused: never sorted, padded or unpickled.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from tokenize import TokenError
from typing import Any, BinaryIO, Callable, Dict, Sequence, Tuple

import numpy as np

from art_edm.runtime.files import (
    HEAD_BYTES,
    PathLike,
    atomic_write,
    check_destination,
    file_kind,
    sha256_of,
    write_json,
)

__all__ = [
    "CLOCK_OFFSET", "MAX_STEPS", "RESAMPLING", "RULES", "SIGMA_SLACK", "Grid", "GridError", "check_distinct",
    "check_grid_destination", "check_range", "dpm",
    "dpm_unpinned", "edm", "edm_unpinned", "load_grid", "load_provenance", "read_off", "resample", "save_grid",
    "sidecar_path", "uniform",
]

MAX_STEPS = 1_000_000  # a larger number is a typing error, and would exhaust the memory first

CLOCK_OFFSET = 0.05  # in units of x: log(sigma + 0.05) is nearly straight down to sigma = 0

_REMEDY = "make a grid with tools/make_grid.py"


class GridError(ValueError):
    """Not a grid; the message is one line: what was found, what was expected, what to do."""


def _real_vector(values: Any) -> np.ndarray:
    """`values` as float64 [n], or a GridError; nothing but real floats is converted."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise GridError("found rows of uneven length, expected one vector of K + 1 floats; pass a flat list") from None
    if not np.issubdtype(array.dtype, np.floating):
        raise GridError(f"found values of type {array.dtype}, expected float64; convert them with .astype('float64')")
    if array.ndim != 1:
        raise GridError(f"found shape {array.shape}, expected one dimension of K + 1 values; store a single grid")
    if len(array) < 2:
        raise GridError(f"found {len(array)} value(s), expected at least 2, sigma_max and the final 0; {_REMEDY}")
    return array.astype(np.float64) + 0.0  # adding 0 turns -0 into 0


def _check_levels(values: np.ndarray) -> None:
    """Raise a GridError for the first level that breaks the rules of a grid."""
    last = len(values) - 1

    def refuse(bad: np.ndarray, message: str) -> None:
        if bad.any():
            i = int(np.argmax(bad))
            raise GridError(message.format(i=i, j=i + 1, here=values[i], after=values[min(i + 1, last)], last=last))

    refuse(~np.isfinite(values), f"found {{here}} at index {{i}}; expected finite noise levels; {_REMEDY}")
    refuse(values < 0, f"found {{here:.9g}} at index {{i}}; expected no negative noise level; {_REMEDY}")
    refuse(np.diff(values) > 0, "values ascend; expected noise levels from sigma_max down to 0, found {here:.9g} then "
           "{after:.9g} at index {j}; store them in descending order")
    refuse(values[:-1] == 0, "found 0 at index {i}; expected 0 only at the end, index {last}; remove the others")
    refuse(np.diff(values) == 0, "found {here:.9g} twice, at steps {i} and {j}; expected strictly descending noise "
           "levels; use fewer steps or remove one of the two")
    refuse(values[-1:] != 0, f"found {values[-1]:.9g} at the end, index {last}; expected exactly 0 there; "
           "append 0.0 if sampling shall end without noise")


class Grid:
    """Immutable noise levels of a sampler.

    `values` are [K+1] real floats, strictly descending, positive except the last, which is 0; a GridError
    refuses anything else.
    """

    __slots__ = ("_values",)

    def __init__(self, values: Any) -> None:
        vector = _real_vector(values)
        _check_levels(vector)
        self._values = np.frombuffer(vector.tobytes(), dtype=np.float64)  # on bytes: cannot be made writable again

    @property
    def values(self) -> np.ndarray:
        """The noise levels, read-only float64 [K+1]."""
        return self._values

    @property
    def num_steps(self) -> int:
        """K, one less than the number of values."""
        return len(self._values) - 1

    @property
    def sigma_max(self) -> float:
        """The first value."""
        return float(self._values[0])

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        return np.array_equal(self._values, other._values) if isinstance(other, Grid) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values.tobytes())

    def __reduce__(self) -> Any:
        return Grid, (self._values,)  # a copied or unpickled grid is checked and read-only again

    def __repr__(self) -> str:
        shown = [f"{v:.6g}" for v in self._values]
        return f"Grid({', '.join(shown if len(shown) <= 6 else [*shown[:3], '...', *shown[-2:]])}; K={self.num_steps})"


def _steps(num_steps: int) -> int:
    if isinstance(num_steps, bool) or not isinstance(num_steps, (int, np.integer)) or not 1 <= num_steps <= MAX_STEPS:
        raise GridError(f"found num_steps = {num_steps}, expected a whole number from 1 to {MAX_STEPS}; change --steps")
    return int(num_steps)


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise GridError(f"found {name} = {value}, expected a finite number above 0; change --{name.replace('_', '-')}")
    return float(value)


def _interval(sigma_min: float, sigma_max: float) -> Tuple[float, float]:
    low, high = _positive("sigma_min", sigma_min), _positive("sigma_max", sigma_max)
    if low >= high:
        raise GridError(f"found sigma_min = {low:.9g}, expected less than sigma_max = {high:.9g}; lower --sigma-min")
    return low, high


def uniform(num_steps: int, sigma_max: float) -> Grid:
    """sigma_k = sigma_max (1 - k/K), k = 0..K."""
    num_steps, sigma_max = _steps(num_steps), _positive("sigma_max", sigma_max)
    return Grid(sigma_max * (1 - np.arange(num_steps + 1) / num_steps))


def dpm(num_steps: int, sigma_min: float, sigma_max: float) -> Grid:
    """K levels equidistant in log sigma, from sigma_max to sigma_min (both exact), then 0."""
    num_steps, (sigma_min, sigma_max) = _steps(num_steps), _interval(sigma_min, sigma_max)
    values = sigma_max * (sigma_min / sigma_max) ** (np.arange(num_steps) / max(num_steps - 1, 1))
    values[1:][-1:] = sigma_min  # nothing to set in one step
    return Grid(np.append(values, 0.0))


def edm(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7) -> Grid:
    """K levels equidistant in sigma^(1/rho), from sigma_max to sigma_min, then 0; equation (5) of EDM (2206.00364).

    The same bits as EDM's sampler on a CPU, rounding of the end points included; one step, where that
    divides 0 by 0, is [sigma_max, 0].
    """
    import torch  # numpy's power differs from torch's in the last bit; the other rules do not need it

    num_steps, (sigma_min, sigma_max), rho = _steps(num_steps), _interval(sigma_min, sigma_max), _positive("rho", rho)
    if num_steps == 1:
        return Grid([sigma_max, 0.0])
    try:
        first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    except OverflowError:
        raise GridError(f"found rho = {rho:.9g}, for which sigma^(1/rho) overflows; raise --rho, usually 7") from None
    fraction = torch.arange(num_steps, dtype=torch.float64, device="cpu") / (num_steps - 1)  # [K]
    return Grid(np.append(((first + fraction * (last - first)) ** rho).numpy(), 0.0))


def edm_unpinned(num_steps: int, sigma_max: float, rho: float = 7) -> Grid:
    """sigma_k = sigma_max (1 - k/K)^rho, k = 0..K: the EDM rule with sigma_min = 0 spends no step on sigma_min."""
    num_steps, sigma_max, rho = _steps(num_steps), _positive("sigma_max", sigma_max), _positive("rho", rho)
    return Grid(sigma_max * (1 - np.arange(num_steps + 1) / num_steps) ** rho)


def dpm_unpinned(num_steps: int, sigma_min: float, sigma_max: float) -> Grid:
    """sigma_k = sigma_max (sigma_min/sigma_max)^(k/K), k = 0..K-1, then 0: 0 takes the place of sigma_min."""
    num_steps, (sigma_min, sigma_max) = _steps(num_steps), _interval(sigma_min, sigma_max)
    return Grid(np.append(sigma_max * (sigma_min / sigma_max) ** (np.arange(num_steps) / num_steps), 0.0))


# All rules by name and with one signature; each takes what it needs.
RULES: Dict[str, Callable[[int, float, float, float], Grid]] = {
    "uniform": lambda num_steps, sigma_min, sigma_max, rho: uniform(num_steps, sigma_max),
    "dpm": lambda num_steps, sigma_min, sigma_max, rho: dpm(num_steps, sigma_min, sigma_max),
    "edm": lambda num_steps, sigma_min, sigma_max, rho: edm(num_steps, sigma_min, sigma_max, rho),
    "edm-unpinned": lambda num_steps, sigma_min, sigma_max, rho: edm_unpinned(num_steps, sigma_max, rho),
    "dpm-unpinned": lambda num_steps, sigma_min, sigma_max, rho: dpm_unpinned(num_steps, sigma_min, sigma_max),
}


def resample(grid: Grid, num_steps: int) -> Grid:
    """The same schedule in another number of steps: log sigma linear in the step (section 6.5.1 of the paper).

    The first and the last positive value are kept exactly; one step is [sigma_max, 0]. Raises a GridError if
    `grid` has one step (there is nothing to interpolate) or `num_steps` is not valid.
    """
    num_steps, old = _steps(num_steps), grid.values[:-1]  # [N]
    if num_steps in (1, grid.num_steps):
        return grid if grid.num_steps == num_steps else Grid([grid.sigma_max, 0.0])
    _check_clock(grid, num_steps)
    position = np.arange(num_steps) * (len(old) - 1) / (num_steps - 1)  # [N'], in steps of the old grid
    j = np.minimum(position.astype(int), len(old) - 2)
    weight = position - j
    new = old[j] ** (1 - weight) * old[j + 1] ** weight
    new[0], new[-1] = old[0], old[-1]  # to the bit, whatever the processor makes of x ** 1
    return Grid(np.append(new, 0.0))


def _check_clock(grid: Grid, num_steps: int) -> None:
    if grid.num_steps == 1:
        raise GridError(f"found a grid of 1 step, expected at least 2 to resample it to {num_steps}; {_REMEDY}")


def read_off(grid: Grid, num_steps: int) -> Grid:
    """The same clock in another number of steps: sigma(t) read off at t = k/K', K' = `num_steps`.

    sigma(t) is the monotone cubic (PCHIP) through log(sigma_k + 0.05) over t = k/K. Levels that both grids have are
    kept to the bit: every second one for K' = K/2, all for K' = K. Below the last positive level sigma(t) goes on to
    0, so that a finer grid may need levels below a network's lowest, which refuses them.

    Raises a GridError if `grid` has one step, `num_steps` is not valid, or two levels fall together.
    """
    num_steps, old = _steps(num_steps), grid.num_steps
    if num_steps in (1, old):
        return grid if num_steps == old else Grid([grid.sigma_max, 0.0])
    _check_clock(grid, num_steps)
    from scipy.interpolate import PchipInterpolator  # most users of a grid do not need it

    place, rest = np.divmod(np.arange(num_steps + 1) * old, num_steps)  # t K = place + rest / K'
    clock = PchipInterpolator(np.arange(old + 1), np.log(grid.values + CLOCK_OFFSET))
    between = np.exp(clock(place + rest / num_steps)) - CLOCK_OFFSET
    return Grid(np.where(rest == 0, grid.values[place], between))


# How far, relatively, a grid may leave a network's range: EDM's own rule returns its end points only up to rounding.
SIGMA_SLACK = 1e-6


def check_range(grid: Grid, low: float, high: float) -> None:
    """Raise a GridError for levels outside a network's range, which upstream's samplers would clip and not say so."""
    if grid.sigma_max > high * (1 + SIGMA_SLACK):
        raise GridError(
            f"the grid starts at sigma = {grid.sigma_max:.9g}, above the network's sigma_max = {high:.9g}; "
            f"make a grid with --sigma-max={high:.9g}"
        )
    last = grid.num_steps - 1
    if grid.values[last] < low * (1 - SIGMA_SLACK):
        raise GridError(
            f"step {last} is at sigma = {grid.values[last]:.9g}, below the network's sigma_min = {low:.9g}; "
            f"make a grid with --sigma-min={low:.9g}, or use fewer steps"
        )


def check_distinct(grid: Grid, levels: Sequence[float]) -> None:
    """Raise a GridError for neighbours of the rounded `levels` [K + 1] that rounding made equal, or ascending."""
    if levels[0] == float("inf"):
        raise GridError(f"sigma = {grid.sigma_max:.9g} is too large for the sampler's precision; use smaller values")
    before = grid.values
    for i, (here, after) in enumerate(zip(levels[:-1], levels[1:])):
        if not here > after:
            raise GridError(
                f"steps {i} and {i + 1} (sigma = {before[i]:.9g} and {before[i + 1]:.9g}) are the same noise level, "
                f"{here:.9g}, after rounding to those the network supports; use fewer steps"
            )


# How a grid comes to another number of steps, by name: by the learned clock, or by the paper's rule.
RESAMPLING: Dict[str, Callable[[Grid, int], Grid]] = {"clock": read_off, "paper": resample}


def sidecar_path(path: PathLike) -> Path:
    """The JSON file beside a grid, of the same stem; raises a GridError unless `path` ends in .npy."""
    if Path(path).suffix != ".npy":
        raise GridError(f"found the name {path}, expected one that ends in .npy; rename it or change --out")
    return Path(path).with_suffix(".json")


def check_grid_destination(path: PathLike) -> Path:
    """Raise a ValueError now if `save_grid(path)` would fail, or replace a JSON file that is no sidecar."""
    sidecar = sidecar_path(path)
    path, sidecar = check_destination(path), check_destination(sidecar)
    if sidecar.exists() and "npy_sha256" not in _read_sidecar(sidecar):
        raise GridError(f"found {sidecar}, not a grid's provenance, which goes there; choose another --out")
    return path


def save_grid(path: PathLike, grid: Grid, provenance: Dict[str, Any]) -> None:
    """Write `path` (.npy) and its sidecar, `provenance` with the key npy_sha256 added.

    Raises a ValueError if `path` does not end in .npy or `provenance` holds NaN. After an OSError (a full
    disk, no permission) older files are as they were.
    """
    beside = sidecar_path(path)
    buffer = io.BytesIO()
    np.save(buffer, grid.values, allow_pickle=False)
    sidecar = {**provenance, "npy_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}

    # The sidecar is replaced once the .npy lies complete under its temporary name, so that a full disk changes
    # neither, and just before the .npy is renamed: a crash between the two leaves the old grid with the new
    # sidecar, which load_provenance finds out by the hash; never a new grid with an old sidecar.
    def write(file: BinaryIO) -> None:
        file.write(buffer.getvalue())
        file.flush()
        write_json(beside, sidecar)

    atomic_write(path, write)


def load_grid(path: PathLike) -> Grid:
    """Read and check a grid; raises a GridError that names the path, and never unpickles, sorts or pads."""
    try:
        return Grid(_read_npy(path))
    except GridError as error:
        raise GridError(f"{path}: {error}") from None


def load_provenance(path: PathLike) -> Dict[str, Any]:
    """The sidecar of the grid at `path`, {} if none; raises a GridError if it is another grid's or unreadable."""
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        return {}
    data = _read_sidecar(sidecar)
    if data.get("npy_sha256") != sha256_of(path):
        message = f"found the provenance of another file than {path} (npy_sha256 differs); move it away"
        raise GridError(f"{sidecar}: {message}")
    return data


def _read_sidecar(sidecar: Path) -> Dict[str, Any]:
    try:
        data = json.loads(sidecar.read_bytes())
    except (OSError, ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise GridError(f"{sidecar}: found no readable JSON object, expected a grid's provenance; move it away")
    return data


def _read_npy(path: PathLike) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            if not head.startswith(np.lib.format.MAGIC_PREFIX):  # np.load would try a zip or a pickle next
                raise GridError(f"found {file_kind(head)}, expected a .npy; {_REMEDY}")
            file.seek(0)
            return np.load(file, allow_pickle=False)
    except GridError:
        raise  # it is a ValueError too
    except OSError as error:
        raise GridError(f"found no readable file ({error.strerror}), expected a .npy; check the name") from None
    except (ArithmeticError, EOFError, MemoryError, RecursionError, SyntaxError, TokenError, TypeError,
            ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise GridError(f"found a damaged or foreign .npy ({reason}), expected float64 values; {_REMEDY}") from None
