"""Make, resample, show, import and export noise-level grids: .npy files that any sampler here accepts."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click
from click.core import ParameterSource

from art_edm.grids import grid as grids
from art_edm.grids.grid import (
    RESAMPLING,
    RULES,
    Grid,
    GridError,
    check_grid_destination,
    load_grid,
    load_provenance,
    save_grid,
)
from art_edm.grids.lists import ENDS, check_list_destination, finish, list_file, list_text, read_list, whole, write_list
from art_edm.grids.plots import check_plotting, plot_grid
from art_edm.runtime.cli import Group
from art_edm.runtime.files import check_destination, sha256_of

FILE = click.Path(path_type=Path)


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Make, resample, show, import and export noise-level grids.

    A grid is a .npy of K + 1 values, from sigma_max strictly down to 0. A .json of the same name says
    where it came from.

    \b
    Examples:
      python tools/make_grid.py edm --steps=18 --out=edm-18.npy
      python tools/make_grid.py resample edm-18.npy --steps=9
      python tools/make_grid.py show edm-9.npy --plot
      python tools/make_grid.py import "80, 5.1092, 1.584, .47, .002" --end=append --out=gits.npy
      python tools/make_grid.py export edm-9.npy --out=sigmas.csv
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def save(out: Path, grid: Grid, provenance: Dict[str, Any]) -> None:
    """Write the grid and say so."""
    try:
        save_grid(out, grid, provenance)
    except OSError as error:
        raise OSError(
            f"cannot write {out}: {error.strerror or error}; any older file is as it was; "
            "make room there or choose another --out"
        ) from None
    click.echo(f"wrote {out}: {describe(grid)}")


def describe(grid: Grid) -> str:
    """One line: steps and range."""
    steps = f"{grid.num_steps} step" + "s" * (grid.num_steps > 1)
    return f"{steps}, sigma from {grid.sigma_max:.6g} to {grid.values[-2]:.6g}, then 0"


def rule_command(name: str) -> click.Command:
    """The command that makes a grid by one of the rules."""
    rule = getattr(grids, name.replace("-", "_"))
    used = set(inspect.signature(rule).parameters)
    unused = [p for p in ("sigma_max", "sigma_min", "rho") if p not in used]

    @click.pass_context
    def command(context: click.Context, steps: int, out: Path, **numbers: float) -> None:
        for parameter in unused:
            if context.get_parameter_source(parameter) is not ParameterSource.DEFAULT:
                click.echo(f"note: the rule {name} has no {parameter}; the option changes nothing", err=True)
        grid = RULES[name](steps, numbers["sigma_min"], numbers["sigma_max"], numbers["rho"])
        settings = {key: value for key, value in numbers.items() if key in used}
        save(check_grid_destination(out), grid, {"rule": name, "num_steps": steps, **settings})

    def number(option: str, default: float, text: str) -> click.Option:
        note = " (not used by this rule)" if option in unused else ""
        return click.Option([f"--{option.replace('_', '-')}"], type=float, default=default, show_default=True,
                            metavar="NUMBER", help=text + note)

    formula = inspect.getdoc(rule).split("\n\n")[0]
    example = f"python tools/make_grid.py {name} --steps=18 --out={name}-18.npy"
    return click.Command(
        name, callback=command, short_help=formula.split(":")[0].split(";")[0],
        help=f"{formula}\n\n\b\nExample:\n  {example}",
        params=[
            click.Option(["--steps"], type=int, required=True, metavar="K", help="Number of steps."),
            click.Option(["--out"], type=FILE, required=True, metavar="FILE.npy", help="Where to write the grid."),
            number("sigma_max", 80, "First noise level."),
            number("sigma_min", 0.002, "Last positive noise level."),
            number("rho", 7, "Exponent."),
        ],
    )


for _name in RULES:
    main.add_command(rule_command(_name))


def resampled_name(path: Path, old: int, new: int) -> Path:
    """art-18.npy -> art-9.npy where the name ends in the number of steps, else art.npy -> art-9.npy."""
    digits = re.search(r"\d*$", path.stem).group()
    stem = path.stem[: -len(digits)] + str(new) if digits == str(old) else f"{path.stem}-{new}"
    return path.with_name(stem + ".npy")


def provenance_of(path: Path) -> Tuple[Dict[str, Any], str]:
    """The sidecar, and what is wrong with it if it cannot be used."""
    try:
        return load_provenance(path), ""
    except GridError as error:
        return {}, str(error)


@main.command("resample")
@click.argument("source", type=FILE, metavar="IN.npy")
@click.option("--steps", type=int, required=True, metavar="K", help="Number of steps of the new grid.")
@click.option("--resample", "how", type=click.Choice(list(RESAMPLING)), default="clock", show_default=True,
              help="clock: sigma(t) is read off at t = k/K. paper: log sigma linear in the step, from the first to the "
              "last positive value.")
@click.option("--out", type=FILE, metavar="FILE.npy",
              help="Where to write it; by default the input's name with the number of steps replaced or added.")
def resample_command(source: Path, steps: int, how: str, out: Optional[Path]) -> None:
    """The same schedule in another number of steps.

    A grid is a clock: sigma(t) at t = k/K, joined by a monotone cubic of log(sigma + 0.05). Half the steps are every
    second level.

    \b
    Example:
      python tools/make_grid.py resample art-18.npy --steps=9
    """
    old = load_grid(source)
    grid = RESAMPLING[how](old, steps)
    if out is None:
        out = resampled_name(source, old.num_steps, steps)
        if out == source:
            raise ValueError(f"{source} has {steps} steps already; choose other --steps, or name the copy with --out")
    check_grid_destination(out)
    origin, note = provenance_of(source)
    if note:
        click.echo(f"note: {note}", err=True)
    save(out, grid, {
        "rule": "resample", "resample": how, "num_steps": steps, "source": source.name,
        "source_num_steps": old.num_steps,
        "source_sha256": sha256_of(source), "source_provenance": origin,
    })


@main.command("show")
@click.argument("source", type=FILE, metavar="FILE.npy")
@click.option("--plot", is_flag=True,
              help="Draw it, as FILE.png, beside the edm, dpm and uniform rules of the same number of steps.")
def show_command(source: Path, plot: bool) -> None:
    """Print a grid's values, its steps, the checks it passed and its origin.

    \b
    Example:
      python tools/make_grid.py show art-18.npy --plot
    """
    grid = load_grid(source)
    picture = source.with_suffix(".png") if plot else None
    if picture:
        check_plotting()
        check_destination(picture)
        sigma_min = min(0.002, grid.sigma_max / 1000)  # the usual one of EDM, in place on small scales too
        rules = {name: RULES[name](grid.num_steps, sigma_min, grid.sigma_max, 7) for name in ("uniform", "dpm", "edm")}
        plot_grid(picture, {**rules, source.stem: grid})
    origin, note = provenance_of(source)
    click.echo(f"{source}: {describe(grid)}")
    click.echo("\n".join(table(grid)))
    click.echo("checks passed: one dimension, real floats, finite, strictly descending, only the last value is 0")
    click.echo(f"provenance: {note or (json.dumps(origin, indent=1) if origin else 'no sidecar')}")
    if picture:
        click.echo(f"wrote {picture}")


@main.command("import")
@click.argument("source", metavar="LIST")
@click.option("--end", type=click.Choice(ENDS),
              help="For a list that stops above 0: append 0, one step more, or replace the last level by 0.")
@click.option("--out", type=FILE, required=True, metavar="FILE.npy", help="Where to write the grid.")
def import_command(source: str, end: Optional[str], out: Path) -> None:
    """A grid from a list of noise levels of another program.

    LIST is the numbers themselves, or a text, .json or .csv file. The levels are taken as they are, never sorted.

    Lists of GITS stop at sigma_min, as its samplers do. With --end=append the same steps are followed by one to 0;
    with --end=replace the last step goes to 0 instead, at the published number of evaluations.

    \b
    Example:
      python tools/make_grid.py import "80, 5.1092, 1.584, .47, .002" --end=replace --out=gits.npy
    """
    check_grid_destination(out)
    levels, file = read_list(source), list_file(source)
    try:
        grid = finish(levels, end)
    except GridError as error:
        raise GridError(f"{file}: {error}" if file else str(error)) from None
    if whole(levels):
        click.echo("note: all levels are whole numbers; they are taken as noise levels. If they are timesteps, give "
                   "sigma = sqrt((1 - alphas_cumprod[t]) / alphas_cumprod[t]) of each", err=True)
    last = float(levels[-1])
    if end and not last:
        click.echo(f"note: the list ends at 0 already; --end={end} changes nothing", err=True)
    chosen = end if last else None
    origin = {"source": file.name, "source_sha256": sha256_of(file)} if file else {"source": source[:1000]}
    save(out, grid, {"rule": "import", "num_steps": grid.num_steps, "end": chosen, "last_level": last, **origin})
    if chosen:
        how = ("0 follows {}: one step more than the list has" if chosen == "append" else
               "0 takes the place of {}: as many steps as the list has")
        click.echo(how.format(f"{last:.6g}"))
    click.echo(f"evaluations per image: {evaluations(grid.num_steps)}")


def evaluations(num_steps: int) -> str:
    """The cost of a grid under each solver, those of one cost together: "4 (euler, ipndm), 7 (heun)"."""
    from art_edm.sampling.solvers import SOLVERS, nfe  # not for --help: torch takes seconds

    names: Dict[int, List[str]] = {}
    for solver in SOLVERS:
        names.setdefault(nfe(solver, num_steps), []).append(solver)
    return ", ".join(f"{count} ({', '.join(solvers)})" for count, solvers in names.items())


@main.command("export")
@click.argument("source", type=FILE, metavar="FILE.npy")
@click.option("--out", type=FILE, metavar="FILE", help="A .json, .csv or .txt; by default the list is printed.")
def export_command(source: Path, out: Optional[Path]) -> None:
    """A grid as a list for another program, to the last bit.

    .json is a list, .csv has the columns step and sigma, .txt one level on a line.

    \b
    Example:
      python tools/make_grid.py export edm-18.npy --out=sigmas.json
    """
    if out is None:
        click.echo(list_text(load_grid(source), ".json"), nl=False)
        return
    check_list_destination(out)
    grid = load_grid(source)
    try:
        write_list(out, grid)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror or error}; any older file is as it was") from None
    click.echo(f"wrote {out}: {describe(grid)}")


def table(grid: Grid) -> List[str]:
    """Lines of step, sigma, step size sigma_i - sigma_{i+1} and ratio sigma_i / sigma_{i+1}."""
    lines = [f"{'step':>6} {'sigma':>12} {'size':>12} {'ratio':>8}"]
    levels = grid.values.tolist()
    for i in range(grid.num_steps):
        sigma, after = levels[i], levels[i + 1]
        ratio = f"{sigma / after:.4g}" if after else "-"
        lines.append(f"{i:>6} {sigma:>12.6g} {sigma - after:>12.6g} {ratio:>8}")
    return [*lines, f"{grid.num_steps:>6} {0:>12}"]


if __name__ == "__main__":
    main(prog_name="make_grid.py")
