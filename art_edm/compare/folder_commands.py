"""The commands `calc` and `ref` of tools/fid.py: images in, their scores or their statistics out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click

from art_edm.compare.options import (
    DETECTOR_HELP,
    REFERENCE_HELP,
    Judges,
    context_of,
    described,
    detector_options,
    few_notes,
    judges,
    record_of,
    reference_options,
    show,
)
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.image_folders import ImageSet, format_notes, open_images
from art_edm.metrics.metric import measure, merged
from art_edm.metrics.panel import Accumulators, measure_images
from art_edm.metrics.references import check_npz, check_reference_destination, save_reference
from art_edm.runtime.cli import Command, versions
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import world
from art_edm.runtime.files import check_destination, write_json
from art_edm.runtime.progress import Progress

__all__ = ["calc_command", "ref_command"]

workers_option = click.option("--workers", type=click.IntRange(0, 64), default=2, show_default=True, metavar="N",
                              help="Threads that read images; 0 for none beside the detector.")


@click.command("calc", cls=Command, groups={"Images": "images num seed workers", **REFERENCE_HELP, **DETECTOR_HELP})
@click.option("--images", required=True, metavar="DIR|ZIP", help="The images.")
@click.option("--num", "--num-images", "num", type=click.IntRange(min=2), default=50000, show_default=True, metavar="N",
              help="How many of the images to use; fewer are an error. Newer torchrun knows only the longer name.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Chooses the images.")
@click.option("--out", type=click.Path(path_type=Path), metavar="F.json", help="Also write all results and settings.")
@workers_option
@reference_options
@detector_options
def calc_command(**options: Any) -> None:
    """Compare images with the statistics of a data set; prints the FID alone, other metrics by name.

    \b
    Examples:
      python tools/fid.py calc --images=out --ref=cifar10-32x32.npz
      python tools/fid.py calc --images=out --ref=img512.pkl --metrics=fid,fd_dinov2 --num=50000 --out=scores.json
    """
    with world(options["device"]) as here:
        with here.phase():  # everything that can fail early
            context = context_of(options, here)
            if options["out"] is not None:
                check_destination(options["out"])
            images, notes = find_images(options["images"], options["num"], options["seed"])
            found = judges(options, images.shape, context)
            notes += [*found.notes, *few_notes(len(images), found.panel.metrics)]
            show(notes)
            accumulators = Accumulators(found.panel, len(images), device=here.device)
        take_in(images, accumulators, context, options["workers"])
        if here.rank == 0:
            results = report(accumulators, found)
            if options["out"] is not None:
                record = {**record_of(found.panel, found.record, context), "num_images": len(images),
                          "images": str(images.path), "seed": options["seed"], "image_shape": list(images.shape)}
                write_json(options["out"], {**results, **record, "notes": notes})


def find_images(path: str, num: Optional[int] = None, seed: int = 0) -> Tuple[ImageSet, List[str]]:
    """The images, their headers checked, and what the user should know of them."""
    images = open_images(path, num, seed)
    return images, [*images.notes, *format_notes(images, images.check(range(len(images))))]


def take_in(images: ImageSet, accumulators: Accumulators, context: Context, workers: int) -> None:
    """Run the detectors over all images."""
    progress = Progress(len(images), "images", context.quiet)
    try:
        measure_images(images, accumulators, context.world, context.batch, workers, progress)
    finally:
        progress.close()


def report(accumulators: Accumulators, found: Judges) -> Dict[str, Any]:
    """Print the results, the FID alone as EDM's fid.py prints it; returns them in full."""
    results: Dict[str, Any] = {}
    for name, groups in accumulators.of.items():
        measurement, details = measure([groups], found.references.get(name)), merged(groups).details()
        results.update({name: measurement.mean, f"{name}_stderr": measurement.stderr},
                       **{f"{name}_{key}": value for key, value in details.items()})
        spread = measurement.stderr if measurement.stderr is not None else next(iter(details.values()), None)
        shown = f"{measurement.mean:g}" + ("" if spread is None else f" +- {spread:g}")
        click.echo(shown if name == "fid" else f"{METRICS[name].title} {shown}")
    return results


@click.command("ref", cls=Command, groups={"Images": "data dest workers", **DETECTOR_HELP})
@click.option("--data", required=True, metavar="DIR|ZIP", help="The images of the data set; all are used.")
@click.option("--dest", required=True, metavar="F.npz|F.pkl", help="Where they go: .npz for EDM, .pkl for EDM2.")
@workers_option
@detector_options
def ref_command(**options: Any) -> None:
    """Write the statistics of a data set that `calc` needs.

    \b
    Examples:
      python tools/fid.py ref --data=my-dataset.zip --dest=my-dataset.npz
      python tools/fid.py ref --data=my-dataset.zip --dest=my-dataset.pkl --metrics=fid,fd_dinov2
    """
    with world(options["device"]) as here:
        with here.phase():
            if here.rank == 0:
                check_reference_destination(options["dest"])
            metrics = options["metrics"] or ["fid"]
            idle = [name for name in metrics if not METRICS[name].needs_reference]
            if idle:
                raise click.BadParameter(f"found {idle[0]}, which needs no reference", param_hint="--metrics")
            if options["dest"].lower().endswith(".npz"):
                check_npz(metrics)
            images, notes = find_images(options["data"])
            context = context_of({**options, "cache": None}, here)
            found = judges({**options, "ref": None, "metrics": metrics}, images.shape, context, needs_reference=False)
            show([*notes, *few_notes(len(images), metrics)])
            accumulators = Accumulators(found.panel, len(images), device=here.device)
        take_in(images, accumulators, context, options["workers"])
        if here.rank == 0:
            provenance = {**described(found.panel), "data": str(images.path), "versions": versions()}
            sets = {name: groups[0].statistics() for name, groups in accumulators.of.items()}
            save_reference(options["dest"], sets, len(images), provenance)
            shown = ", ".join(str(found.panel.width(METRICS[name])) for name in metrics)
            click.echo(f"wrote {options['dest']}: {shown} features of {len(images)} images")
