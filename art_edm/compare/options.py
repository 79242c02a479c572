"""What the commands of tools/fid.py share: options, and from them a panel of metrics and its references."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import click

from art_edm.compare.score_grids import mnist_reference
from art_edm.metrics.detectors import load_detector
from art_edm.metrics.dinov2 import load_dinov2
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.panel import Panel
from art_edm.metrics.references import Reference, few_images, load_reference
from art_edm.runtime.cli import command_line, versions
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import World
from art_edm.runtime.files import cache_dir
from art_edm.runtime.store import Content, Store

__all__ = ["Judges", "context_of", "detector_options", "judges", "record_of", "reference_options", "several", "show"]

MNIST = "mnist:"
DETECTOR_HELP = {"Metrics and detectors": "metrics detector detector_sha256 trust_detector dino_weights"}
REFERENCE_HELP = {"Reference": "ref data splits"}
Options = Dict[str, Any]


def several(known: Callable[[], Sequence[str]] = tuple) -> Callable[..., Optional[List[str]]]:
    """A comma-separated list without repetition, of the names that `known` gives, or of any."""

    def parse(context: click.Context, parameter: click.Parameter, value: Optional[str]) -> Optional[List[str]]:
        if value is None:
            return None
        parts, names = list(dict.fromkeys(part.strip() for part in value.split(","))), list(known())
        for part in parts:
            if not part or (names and part not in names):
                wanted = f"{', '.join(names)}, separated by commas" if names else "names separated by commas"
                raise click.BadParameter(f"found {part!r}, expected {wanted}")
        return parts

    return parse


def detector_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Which networks see the images, and how."""
    return _with(command, [
        click.option("--metrics", callback=several(lambda: METRICS), metavar="LIST",
                     help=f"{', '.join(METRICS)}, one or several.  [default: fid; of an EDM2 --ref all it has]"),
        click.option("--detector", default="inception", show_default=True, metavar="NAME|PT|PKL|URL",
                     help="inception, lenet, cifar10, a classifier trained here, or a network called like Inception."),
        click.option("--detector-sha256", metavar="HEX",
                     help="Refuse a detector file of another SHA-256; consent to run a TorchScript of this one."),
        click.option("--trust-detector", is_flag=True,
                     help="Run a TorchScript detector that is not NVIDIA's: it is a program and can write files."),
        click.option("--dino-weights", metavar="PATH|URL",
                     help="DINOv2 ViT-L/14 weights for fd_dinov2.  [default: Meta's, downloaded once]"),
        click.option("--trust-pickle", is_flag=True, help="Run the code in the .pkl files that are named here."),
        click.option("--batch", type=click.IntRange(1), default=64, show_default=True, metavar="N",
                     help="Images at a time."),
        click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu or cuda."),
        click.option("--quiet", is_flag=True, help="Show no progress."),
    ])


def reference_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What images are compared with."""
    return _with(command, [
        click.option("--ref", metavar="NPZ|PKL|URL|mnist:train",
                     help="Statistics of the data set; needed for all metrics but is."),
        click.option("--data", metavar="DIR", help="Folder with the MNIST files, for --ref=mnist:train or mnist:test."),
        click.option("--splits", type=click.IntRange(1), default=10, show_default=True, metavar="N",
                     help="Parts of the Inception score."),
        click.option("--cache", metavar="DIR", help="Where finished work is kept.  [default: the user's cache]"),
    ])


def _with(command: Callable[..., Any], options: Sequence[Callable[..., Any]]) -> Callable[..., Any]:
    for option in reversed(options):
        command = option(command)
    return command


def context_of(options: Options, here: World) -> Context:
    """How work is done."""
    store = Store(options["cache"] or cache_dir() / "cells")
    return Context(here, store, options["quiet"] or here.rank > 0, batch=options["batch"])


class Judges(NamedTuple):
    """What images are judged by."""

    panel: Panel
    references: Mapping[str, Content]  # of each metric that needs one; {} where none is compared with
    record: Dict[str, Any]  # of the reference
    notes: List[str]


def judges(
    options: Options, shape: Tuple[int, int, int], context: Context, needs_reference: bool = True
) -> Judges:
    """The metrics that are asked for, or that the reference holds, their detectors and references.

    Args:
        shape: (C, H, W) of the images.
        needs_reference: whether a metric that compares is an error without --ref.
    Raises:
        click.UsageError, ValueError: one line.
    """
    spec, metrics = options["ref"], options["metrics"]
    known = load_reference(spec, context.quiet) if spec and not spec.startswith(MNIST) else None
    metrics = metrics or (list(known.sets) if known else ["fid"])
    comparing = [name for name in metrics if METRICS[name].needs_reference]
    if comparing and spec is None and needs_reference:
        raise click.UsageError(f"found no --ref, expected the statistics of a data set for {', '.join(comparing)}")
    if known is not None:
        for name in comparing:
            known.of(name)
    elif spec is not None and spec not in (f"{MNIST}train", f"{MNIST}test"):
        raise click.UsageError(f"found --ref={spec}, expected mnist:train or mnist:test, a path or an address")
    panel = _panel(options, metrics, shape, context)
    if spec is None or not comparing:
        return Judges(panel, {}, {}, [])
    if known is None:
        found = mnist_reference(spec[len(MNIST):], panel, context.world.device, context.store, options["data"])
        return Judges(panel, found, {"source": spec}, [])
    notes = [note for name in comparing for note in _fits(known, name, panel)]
    record = {"source": spec, "sha256": known.sha256, **known.provenance}
    return Judges(panel, {name: known.of(name) for name in comparing}, record, [*known.notes, *notes])


def _panel(options: Options, metrics: Sequence[str], shape: Tuple[int, int, int], context: Context) -> Panel:
    """The metrics' detectors, loaded."""
    used = {METRICS[name].detector for name in metrics}
    device, detectors = context.world.device, {}
    if "detector" in used:
        scores = any(METRICS[name].output == "probabilities" for name in metrics)
        trust = options["trust_detector"] or (options["trust_pickle"] and _plain(options["detector"]).endswith(".pkl"))
        detectors["detector"] = load_detector(options["detector"], shape, device, scores, options["detector_sha256"],
                                              trust, context.quiet)
    if "dinov2" in used:
        detectors["dinov2"] = load_dinov2(options["dino_weights"], device, context.quiet)
    return Panel(metrics, detectors, options.get("splits", 10))


def _plain(spec: str) -> str:
    return spec.split("?")[0].lower()


def _fits(reference: Reference, name: str, panel: Panel) -> List[str]:
    detector = panel.detectors[METRICS[name].detector]
    return reference.notes_for(name, detector.name, detector.sha256, detector.dim)


def few_notes(count: int, metrics: Sequence[str], what: str = "images") -> List[str]:
    """A note where the images are few for a Frechet distance."""
    return few_images(count, what) if {"fid", "fd_dinov2"} & set(metrics) else []


def record_of(panel: Optional[Panel], reference: Mapping[str, Any], context: Context) -> Dict[str, Any]:
    """What results depend on."""
    record: Dict[str, Any] = {"command": command_line(), "versions": versions(), "processes": context.world.size,
                              "device": str(context.world.device), "batch": context.batch}
    if panel is not None:
        record.update(described(panel), splits=panel.splits)
    return {**record, "reference": dict(reference)} if reference else record


def described(panel: Panel) -> Dict[str, Any]:
    """The metrics and their detectors, for a record; of one detector also without its name."""
    by_metric = {name: panel.detectors[METRICS[name].detector] for name in panel.metrics}
    each = {name: {"detector": used.name, "detector_sha256": used.sha256, "features": used.dim}
            for name, used in by_metric.items()}
    return {**next(iter(each.values())), "metrics": list(panel.metrics), "detectors": each}


def show(notes: Sequence[str]) -> None:
    """Notes on stderr, one line each."""
    for note in notes:
        click.echo(f"note: {note}", err=True)
