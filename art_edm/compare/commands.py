"""The commands `gen` and `compare` of tools/fid.py: options in, one call, a table out."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import click

from art_edm.compare.sample_cache import Work, check_images
from art_edm.compare.score_folders import Settings, compare, open_entries, parse_entries
from art_edm.compare.score_grids import Fine, Plan, mnist_reference, score
from art_edm.compare.tables import FORMATS, Row, lines, write
from art_edm.grids.plots import check_plotting
from art_edm.metrics.detectors import Detector, load_detector
from art_edm.metrics.frechet import Moments
from art_edm.metrics.references import few_images, load_reference
from art_edm.models.loading import Network, load_network
from art_edm.runtime.cli import Command, command_line, versions
from art_edm.runtime.distributed import World, world
from art_edm.runtime.files import cache_dir, check_destination
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.runtime.store import Store
from art_edm.sampling.baselines import choose_grids
from art_edm.sampling.solvers import SOLVERS

__all__ = ["compare_command", "gen_command"]

METRICS = ("fid", "is")
MNIST = "mnist:"


def _several(known: Sequence[str] = ()) -> Callable[..., List[str]]:
    """A comma-separated list without repetition, of `known` names or any."""

    def parse(context: click.Context, parameter: click.Parameter, value: str) -> List[str]:
        parts = list(dict.fromkeys(part.strip() for part in value.split(",")))
        for part in parts:
            if not part or (known and part not in known):
                wanted = f"{', '.join(known)}, separated by commas" if known else "names separated by commas"
                raise click.BadParameter(f"found {part!r}, expected {wanted}")
        return parts

    return parse


def _steps(context: click.Context, parameter: click.Parameter, value: str) -> List[int]:
    parts = _several()(context, parameter, value)
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= 100_000:
            raise click.BadParameter(f"found {part!r}, expected whole numbers from 1, such as 5,10,18")
    return list(dict.fromkeys(map(int, parts)))


def _shared(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of both commands."""
    options = [
        click.option("--ref", metavar="NPZ|PKL|URL|mnist:train", help="Statistics of the data set; needed for fid."),
        click.option("--data", metavar="DIR", help="Folder with the MNIST files, for --ref=mnist:train or mnist:test."),
        click.option("--metrics", default="fid", show_default=True, callback=_several(METRICS), metavar="LIST",
                     help="fid, is."),
        click.option("--splits", type=click.IntRange(1), default=10, show_default=True, metavar="N",
                     help="Parts of the Inception score."),
        click.option("--detector", default="inception", show_default=True, metavar="NAME|PT|PKL|URL",
                     help="inception, lenet, or a network that is called like NVIDIA's Inception."),
        click.option("--detector-sha256", metavar="HEX", help="Refuse a detector file of another SHA-256."),
        click.option("--trust-pickle", is_flag=True, help="Run the code in the .pkl files that are named here."),
        click.option("--cache", metavar="DIR", help="Where finished work is kept.  [default: the user's cache]"),
        click.option("--batch", type=click.IntRange(1), default=64, show_default=True, metavar="N",
                     help="Images at a time."),
        click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu or cuda."),
        click.option("--quiet", is_flag=True, help="Show no progress."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _store(options: Dict[str, Any]) -> Store:
    return Store(options["cache"] or cache_dir() / "cells")


def _detector(options: Dict[str, Any], shape: Tuple[int, int, int], here: World) -> Detector:
    return load_detector(
        options["detector"], shape, here.device, "is" in options["metrics"], options["detector_sha256"],
        options["trust_pickle"], options["quiet"] or here.rank > 0,
    )


def _reference(
    options: Dict[str, Any], detector: Detector, store: Store, here: World
) -> Tuple[Optional[Moments], Row, List[str]]:
    """Moments, their record and notes for the user; a ValueError for those of other features."""
    spec = options["ref"]
    if "fid" not in options["metrics"]:
        return None, {}, []
    if spec is None:
        raise click.UsageError("found no --ref, expected the statistics of a data set for fid")
    if spec in (f"{MNIST}train", f"{MNIST}test"):
        found = mnist_reference(spec[len(MNIST):], detector, here.device, store, options["data"])
        return found, {"source": spec}, []
    reference = load_reference(spec, options["quiet"] or here.rank > 0)
    notes = reference.notes_for(detector.name, detector.sha256, detector.dim)
    record = {"source": spec, "sha256": reference.sha256, **reference.provenance}
    return (reference.mu, reference.cov), record, notes


def _few(count: int, metrics: Sequence[str]) -> List[str]:
    return few_images(count, "images per block") if "fid" in metrics else []


def _destinations(paths: Sequence[Path]) -> None:
    """Fail before the work if a table cannot be written."""
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            raise click.BadParameter(f"found {path}, expected a name that ends in {', '.join(FORMATS)}",
                                     param_hint="--out")
        check_destination(path)
        if path.suffix.lower() == ".png":
            check_plotting()


def _record(options: Dict[str, Any], detector: Optional[Detector], reference: Row, here: World) -> Row:
    """What a table depends on."""
    record: Row = {"command": command_line(), "versions": versions(), "processes": here.size,
                   "device": str(here.device), "batch": options["batch"]}
    if detector is not None:
        record.update(detector=detector.name, detector_sha256=detector.sha256, reference=reference)
    return record


def _report(paths: Sequence[Path], rows: Sequence[Row], record: Row) -> None:
    click.echo("\n".join(lines(rows)))
    for path in paths:
        write(path, rows, record)
    if paths:
        click.echo(f"wrote {', '.join(map(str, paths))}")


def _show(notes: Sequence[str]) -> None:
    for note in notes:
        click.echo(f"note: {note}", err=True)


@click.command("gen", cls=Command)
@click.option("--network", required=True, metavar="NAME|PATH|URL",
              help="mnist, oned, gaussian:S, a network pickle of EDM or EDM2, or a weight file.")
@click.option("--gnet", metavar="PATH|URL", help="Guiding network pickle (EDM2).")
@click.option("--guidance", type=float, default=1.0, show_default=True, help="Guidance strength; 1 is none.")
@click.option("--class", "class_idx", type=click.IntRange(0), metavar="INT",
              help="Class of all images.  [default: random]")
@click.option("--grid", "grids", default="edm", show_default=True, callback=_several(), metavar="LIST",
              help="Rules and files: edm,dpm,uniform,F.npy,F{steps}.npy,NAME=F.npy.")
@click.option("--steps", default="18", show_default=True, callback=_steps, metavar="LIST", help="Numbers of steps.")
@click.option("--solver", "solvers", default="heun", show_default=True, callback=_several(tuple(SOLVERS)),
              metavar="LIST", help=", ".join(SOLVERS) + ".")
@click.option("--num", type=click.IntRange(2), default=50_000, show_default=True, metavar="N", help="Images per block.")
@click.option("--blocks", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Seed blocks, for a standard error; block b has the images b N, b N + 1, ...")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="N",
              help="0 for the images that upstream's --seeds=0-... are.")
@click.option("--reference-error", is_flag=True,
              help="Also measure the distance of end points to a fine solution from the same noise.")
@click.option("--error-noises", type=click.IntRange(1), default=256, show_default=True, metavar="N",
              help="Noises of each block for it.")
@click.option("--error-steps", type=click.IntRange(1), default=200, show_default=True, metavar="N",
              help="Steps of the fine solution, by EDM's rule.")
@click.option("--error-solver", type=click.Choice(list(SOLVERS)), default="heun", show_default=True,
              help="Its solver.")
@click.option("--out", "paths", multiple=True, type=click.Path(path_type=Path), metavar="F.json|csv|md|png",
              help="Also write the table; may be repeated.")
@_shared
def gen_command(**options: Any) -> None:
    """Sample on several grids and score the images without writing them.

    Without --ref, --reference-error alone is measured. An interrupted run continues where it was.

    \b
    Examples:
      python tools/fid.py gen --network=mnist --grid=edm,dpm,art.npy --steps=5,10 --num=10000 --blocks=5 \\
          --ref=mnist:train --detector=lenet
      python tools/fid.py gen --network=edm-cifar10-32x32-uncond-vp.pkl --grid=edm,art_cifar{steps}.npy --steps=5,18 \\
          --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz --out=table.json --out=plot.png
      python tools/fid.py gen --network=mnist --grid=edm,art.npy --steps=5 --solver=euler,heun --reference-error
    """
    quiet = options["quiet"]
    with world(options["device"]) as here:
        with here.phase():  # everything that can fail early
            store = _store(options)
            _destinations(options["paths"])
            network = load_network(options["network"], here.device, options["gnet"], options["guidance"],
                                   options["class_idx"], options["trust_pickle"], quiet or here.rank > 0)
            plan, reference = _plan(options, network, store, here)
        progress = Progress(plan.evaluations, "evaluations", quiet or here.rank > 0)
        with GracefulStop() as stop, closing(progress):
            rows = score(plan, Work(store, here, options["batch"], progress, stop))
        if here.rank == 0:
            record = _record(options, plan.detector, reference, here)
            record.update(network={"name": network.name, "sha256": network.sha256, **network.details},
                          seed=plan.seed, fine=plan.fine._asdict() if plan.fine else None)
            _report(options["paths"], rows, record)


def _plan(options: Dict[str, Any], network: Network, store: Store, here: World) -> Tuple[Plan, Row]:
    """What is to be done, and the record of the reference."""
    choices = choose_grids(options["grids"], options["steps"], network.denoiser)
    fine = Fine(options["error_noises"], options["error_steps"], options["error_solver"])
    plan = Plan(network, choices, options["solvers"], options["num"], options["blocks"], options["seed"],
                fine=fine if options["reference_error"] else None)
    if options["ref"] is None and options["metrics"] == ["fid"] and plan.fine:
        return plan, {}
    check_images(network)
    detector = _detector(options, network.denoiser.img_shape, here)
    moments, record, notes = _reference(options, detector, store, here)
    _show([*notes, *_few(options["num"], options["metrics"])])
    splits = options["splits"] if "is" in options["metrics"] else 0
    if splits > options["num"]:
        raise ValueError(f"found --splits={splits} for {options['num']} images, expected no more; lower --splits")
    return replace(plan, detector=detector, reference=moments, splits=splits), record


@click.command("compare", cls=Command)
@click.argument("folders", nargs=-1, required=True, metavar="NAME[@NFE]=DIR|ZIP...")
@click.option("--block", type=click.IntRange(2), default=50_000, show_default=True, metavar="N",
              help="Images per seed block, consecutive by name; fewer in all are one block.")
@click.option("--num", type=click.IntRange(2), metavar="N", help="Use the first N images by name.  [default: all]")
@click.option("--workers", type=click.IntRange(0, 64), default=2, show_default=True, metavar="N",
              help="Threads that read images; 0 for none beside the detector.")
@click.option("--out", "prefix", metavar="PREFIX",
              help="Also write PREFIX.json, .csv, .md and, where names carry their NFE, .png.")
@_shared
def compare_command(**options: Any) -> None:
    """Score several folders of images, and their differences to the first name.

    With NAME@NFE=DIR a name may come once for each NFE, and is compared with the first name at the same NFE. Where
    images have the same names (seeds), differences are taken block by block.

    \b
    Examples:
      python tools/fid.py compare --ref=cifar10-32x32.npz edm=out/edm art=out/art
      python tools/fid.py compare --ref=cifar10-32x32.npz --out=table edm@9=e5 edm@35=e18 art@9=a5 art@35=a18
    """
    with world(options["device"]) as here:
        with here.phase():  # everything that can fail early
            store, entries = _store(options), parse_entries(options["folders"])
            paths = _outputs(options["prefix"], any(entry.nfe is not None for entry in entries))
            sets, blocks = open_entries(entries, options["block"], options["num"])
            detector = _detector(options, sets[0].shape, here)
            reference, record, notes = _reference(options, detector, store, here)
            _show([*notes, *_few(len(sets[0]) // blocks, options["metrics"])])
        splits = options["splits"] if "is" in options["metrics"] else 0
        settings = Settings(options["batch"], options["workers"], splits, options["quiet"])
        rows, notes = compare(entries, sets, blocks, detector, reference, store, here, settings)
        if here.rank == 0:
            _show(notes)
            _report(paths, rows, _record(options, detector, record, here))


def _outputs(prefix: Optional[str], plotted: bool) -> List[Path]:
    if prefix is None:
        return []
    suffixes = list(FORMATS if plotted else FORMATS[:-1])
    try:
        _destinations([Path(prefix + suffix) for suffix in suffixes])
    except ValueError as error:
        if "matplotlib" not in str(error):
            raise
        _show([f"no plot: {error}".replace("--plot needs", "it needs")])
        suffixes.remove(".png")
    return [Path(prefix + suffix) for suffix in suffixes]
