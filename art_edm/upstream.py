"""What the patched generate.py (EDM) and generate_images.py (EDM2) call; light, beside what those load themselves.

Symbols
-------
grid         the noise levels of a .npy, used as they are: `--schedule=FILE.npy`
grid_solver  a solver of `solvers.SOLVERS` to take that grid with, instead of upstream's own: `--solver=NAME`; or the
             method of the weights in the grid's sidecar (`grids.weights`)
t_steps      noise levels of upstream's samplers, [K + 1], on their device and in their dtype

Where no .npy is given, a patched script computes what the unpatched one computes, to the bit.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple, Union

import click
from click.core import ParameterSource

from art_edm.grids.grid import (
    RESAMPLING,
    Grid,
    GridError,
    check_distinct,
    check_range,
    load_grid,
    load_provenance,
    sidecar_path,
)
from art_edm.grids.weights import recorded_weights, stale_weights

__all__ = ["grid_levels", "schedule_option", "solve"]

# Options that a grid leaves nothing to say for: parameter, and how it is written.
_CONTRADICTING = {
    "discretization": "--disc", "scaling": "--scaling", "rho": "--rho", "sigma_min": "--sigma_min",
    "sigma_max": "--sigma_max",
}

# Upstream's defaults of the options that add noise, which only upstream's own samplers do.
_STOCHASTIC = {"S_churn": 0, "S_min": 0, "S_max": float("inf"), "S_noise": 1}


# --- in the samplers ---------------------------------------------------------------------------------


def grid_levels(
    grid: Union[Grid, Sequence[float]], net: Any, t_steps: Any,
    discretization: str = "edm", schedule: str = "linear", scaling: str = "none",
) -> Any:
    """The grid's noise levels as a sampler of upstream takes them.

    Args:
        grid: a grid, or its values.
        net: upstream's network; where it has `round_sigma`, all levels but the final 0 go through it.
        t_steps: any tensor; the result has its dtype and device.
        discretization, schedule, scaling: arguments of EDM's `ablation_sampler`; a grid replaces them.
    Returns:
        [K + 1], float, strictly descending to 0.
    Raises:
        GridError: not a grid; levels outside the network's range, or equal after rounding; an ablation.
    """
    if (discretization, schedule, scaling) != ("edm", "linear", "none"):
        raise GridError(
            f"found discretization = {discretization!r}, schedule = {schedule!r}, scaling = {scaling!r} with a grid, "
            "whose values are noise levels; expected 'edm', 'linear', 'none'; leave these arguments out"
        )
    grid = grid if isinstance(grid, Grid) else Grid(grid)
    check_range(grid, float(getattr(net, "sigma_min", 0)), float(getattr(net, "sigma_max", float("inf"))))
    levels = t_steps.new_tensor(grid.values.tolist())  # [K + 1]
    if hasattr(net, "round_sigma"):
        levels[:-1] = net.round_sigma(levels[:-1]).to(levels)
    check_distinct(grid, levels.tolist())
    return levels


def solve(
    grid_solver: Any, grid: Any, denoise: Callable[[Any, Any], Any], noise: Any, t_steps: Any, S_churn: float = 0
) -> Any:
    """Sample by a solver of `solvers.SOLVERS`, in the precision of upstream's sampler.

    Args:
        grid_solver: its name, or an entry of one's own.
        grid: as a sampler was given it; None is an error.
        denoise: D(x [B, C, H, W], sigma []), labels and guidance in it.
        noise: unit normal, [B, C, H, W].
        t_steps: the levels of `grid_levels`; the state has their dtype.
        S_churn: as a sampler was given it; not 0 is an error.
    Returns:
        images [B, C, H, W], what upstream's sampler returns.
    Raises:
        GridError: no grid, or churn.
        ValueError: an unknown solver.
    """
    from art_edm.sampling.solvers import integrate

    if grid is None:
        raise GridError(f"found grid_solver = {grid_solver!r} without a grid, which it needs; add grid or leave it out")
    if S_churn > 0:
        raise GridError(f"found S_churn = {S_churn:g} with grid_solver = {grid_solver!r}, which adds no noise; "
                        "leave out one of them")

    def slope(x: Any, sigma: Any) -> Any:
        return (x - denoise(x, sigma).to(x.dtype)) / sigma

    return integrate(slope, noise.to(t_steps.dtype) * t_steps[0], t_steps, grid_solver)[0]


# --- on the command line -----------------------------------------------------------------------------


class _File(NamedTuple):
    path: str
    grid: Grid

    def record(self) -> Dict[str, Any]:
        """The sidecar, {} if there is none; what is wrong with one is said, and an error where it has weights."""
        try:
            return load_provenance(self.path)
        except GridError as error:
            if stale_weights(self.path):
                raise click.UsageError(f"{error}, or say with --solver=NAME to take no weights of it") from None
            _say(f"note: {error}")
            return {}


class _Unusable(click.ClickException):
    exit_code = 2


class _Schedule(click.ParamType):
    """One of upstream's own names, or a .npy: read and checked while options are parsed, so before anything else."""

    name = "schedule"

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def convert(self, value: Any, param: Optional[click.Parameter], ctx: Optional[click.Context]) -> Union[str, _File]:
        if not isinstance(value, str) or value in self.names:
            return value
        if not value.endswith(".npy"):
            expected = f"{', '.join(self.names)} or the" if self.names else "the"
            self.fail(f"found {value!r}, expected {expected} name of a .npy file", param, ctx)
        try:
            return _File(value, load_grid(value))
        except GridError as error:
            self.fail(str(error), param, ctx)


class _ScheduleOption(click.Option):
    """Collects every use of the option; click's own rule, the last one holds, would hide a contradiction."""

    def consume_value(self, ctx: click.Context, opts: Any) -> Tuple[Any, ParameterSource]:
        value, source = super().consume_value(ctx, opts)
        return ((value,) if isinstance(value, str) else value), source  # a text in default_map is one value


def schedule_option(command: click.Command) -> click.Command:
    """Decorator, above `@click.command()`: `--schedule=FILE.npy`, beside the values upstream has for it, if any.

    With it, `--solver` takes the names of `solvers.SOLVERS` too; without `--solver`, the weights of the grid's sidecar
    are used, or the solver that it names. The command's function then gets `grid`, its number
    of steps and, for a solver that upstream lacks, `grid_solver`; without a .npy it gets what it got before.
    """
    old = next((p for p in command.params if p.name == "schedule"), None)
    names = list(getattr(old.type, "choices", ())) if old else []
    option = _ScheduleOption(
        ["--schedule"], multiple=True, type=_Schedule(names), metavar="|".join([*names, "FILE.npy"]),
        help="Noise levels from FILE.npy, in as many steps as it has, or resampled to --steps"
        + (f". Or: {old.help}" if old and old.help else ""),
    )
    _put(command, old, option)
    command.params.append(click.Option(
        ["--resample"], type=click.Choice(list(RESAMPLING)), default="clock", show_default=True,
        help="How a grid comes to another number of --steps: by its clock, or by the paper's rule.",
    ))
    command.callback = _with_grid(command.callback, bool(old), _solver_option(command))
    return command


def _put(command: click.Command, old: Optional[click.Parameter], new: click.Parameter) -> None:
    """Add an option, in the place of the one it replaces."""
    if old:
        command.params[command.params.index(old)] = new
    else:
        command.params.append(new)


def _solver_option(command: click.Command) -> Sequence[str]:
    """Let `--solver` name ours too; returns the names that are upstream's, () where it has no such option."""
    from art_edm.sampling.solvers import SOLVERS  # takes torch, which the scripts have loaded by now

    old = next((p for p in command.params if p.name == "solver"), None)
    theirs = list(getattr(old.type, "choices", ())) if old else []
    names = [*theirs, *(name for name in SOLVERS if name not in theirs)]
    ours = f"{', '.join(names[len(theirs):])}: on a grid of --schedule=FILE.npy only" if theirs else \
        "Solver on a grid of --schedule=FILE.npy  [default: heun, this script's own]"
    _put(command, old, click.Option(
        ["--solver"], type=click.Choice(names), metavar="|".join(names),
        help=f"{old.help}. {ours}" if old and old.help else ours,
    ))
    return theirs


def _with_grid(callback: Callable[..., Any], keep_schedule: bool, theirs: Sequence[str]) -> Callable[..., Any]:
    """`callback` with `schedule` turned into `grid` and `num_steps`, and a `solver` of ours into `grid_solver`."""

    @functools.wraps(callback)
    def call(*args: Any, **options: Any) -> Any:
        given, how = options.pop("schedule", None) or (), options.pop("resample", "clock")
        given = (given,) if isinstance(given, str) else given  # called from Python
        files = [value for value in given if isinstance(value, _File)]
        options = _with_solver(options, theirs, files)
        if not files:
            extra = {"schedule": given[-1] if given else None} if keep_schedule else {}
            return callback(*args, **options, **extra)
        context = click.get_current_context()
        _check_options(context, len(given))
        try:
            grid = _in_steps(context, files[0], options["num_steps"], how)
            return callback(*args, **{**options, "num_steps": grid.num_steps, "grid": grid})
        except GridError as error:
            raise _Unusable(f"--schedule={files[0].path}: {error}") from None
        except (AssertionError, RuntimeError, ValueError) as error:
            if not _lacks_gpu(error):
                raise
            raise _Unusable("found no CUDA device, which NVlabs' script needs (with NCCL); expected a GPU; on a CPU, "
                            "sample on this grid with art_edm.sampling.solvers.sample") from None

    return call


def _lacks_gpu(error: Exception) -> bool:
    """Whether it is what torch says where the script asks for CUDA or NCCL and there is none."""
    import torch

    return not torch.cuda.is_available() and any(word in str(error) for word in ("CUDA", "NCCL", "NVIDIA"))


def _with_solver(options: Dict[str, Any], theirs: Sequence[str], files: Sequence[_File]) -> Dict[str, Any]:
    """The options with a `solver` that upstream lacks as `grid_solver`; usage errors for what does not go with it."""
    solver = options.get("solver")
    if solver is None and files:
        solver = _recorded_solver(files[0], options["num_steps"])
        if theirs and solver in theirs and solver != "heun":  # without a name, EDM's sampler is Heun's
            options = {**options, "solver": solver}
    if not theirs:  # upstream's sampler is Heun's and has no name
        options = {name: value for name, value in options.items() if name != "solver"}
    if solver is None or solver in (theirs or ["heun"]):
        return options
    if not files:
        raise click.UsageError(f"found --solver={solver} without a grid; add --schedule=FILE.npy")
    for name, default in _STOCHASTIC.items():
        if options.get(name, default) != default:
            what = f"--solver={solver}, which adds" if isinstance(solver, str) else "the grid's weights, which add"
            raise click.UsageError(f"found --{name} with {what} no noise; leave out one of them")
    return {**options, **({"solver": None} if theirs else {}), "grid_solver": solver}


def _recorded_solver(file: _File, num_steps: int) -> Any:
    """The weights of the grid's sidecar as a solver, or the name of its solver, None for neither; said in one line."""
    from art_edm.sampling.solvers import SOLVERS
    from art_edm.sampling.weighted import weighted

    record, name, steps = file.record(), sidecar_path(file.path).name, file.grid.num_steps
    try:
        weights = recorded_weights(record, steps)
    except GridError as error:
        raise click.UsageError(f"{name}: {error}, or name a solver with --solver") from None
    if weights is not None:
        if not _given(click.get_current_context(), "num_steps") or num_steps == steps:
            _say(f"Weights of {name} for its {steps} steps; --solver=NAME takes a solver without them.")
            return weighted(weights)
        _say(f"note: the weights of {name} are for {steps} steps, not {num_steps}; they are left out")
    solver = record.get("solver")
    if solver is None:
        return None
    if not isinstance(solver, str) or solver not in SOLVERS:
        raise click.UsageError(f"found the solver {solver!r} in {name}, expected one of {', '.join(SOLVERS)}; "
                               "say which with --solver")
    _say(f"Solver {solver}, as {name} says; --solver=NAME takes another.")
    return solver


def _say(text: str) -> None:
    """Once, not by every process."""
    if os.environ.get("RANK", "0") == "0":
        click.echo(text)


def _given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) not in (None, ParameterSource.DEFAULT)


def _check_options(context: click.Context, times: int) -> None:
    """Usage errors for what contradicts a grid."""
    if times > 1:
        raise click.UsageError(f"found --schedule {times} times, expected one; a grid does not combine with another")
    for name, written in _CONTRADICTING.items():
        if _given(context, name):
            raise click.UsageError(f"found {written} together with a grid, which fixes the noise levels; "
                                   f"leave out {written} or --schedule")


def _in_steps(context: click.Context, file: _File, num_steps: int, how: str) -> Grid:
    """The grid in the number of steps that was asked for, its own by default."""
    if not _given(context, "num_steps") or num_steps == file.grid.num_steps:
        if _given(context, "resample"):
            _say(f"note: --resample={how} changes nothing; {file.path} has {file.grid.num_steps} steps")
        return file.grid
    grid = RESAMPLING[how](file.grid, num_steps)
    rule = "" if how == "clock" else f" by the {how}'s rule"
    _say(f"Resampled {file.path} from {file.grid.num_steps} to {num_steps} steps{rule}.")
    return grid
