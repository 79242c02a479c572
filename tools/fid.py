"""Frechet distances and Inception scores of images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import click

from art_edm.compare.commands import compare_command, gen_command
from art_edm.metrics.detectors import Detector, load_detector
from art_edm.metrics.feature_stats import Measured, measure_images
from art_edm.metrics.frechet import frechet_distance
from art_edm.metrics.image_folders import ImageSet, lossy_note, open_images
from art_edm.metrics.references import (
    Reference,
    check_reference_destination,
    few_images,
    load_reference,
    save_reference,
)
from art_edm.runtime.cli import Group, command_line, versions
from art_edm.runtime.distributed import World, world
from art_edm.runtime.files import check_destination, write_json
from art_edm.runtime.progress import Progress

METRICS = ("fid", "is")


@dataclass(frozen=True)
class Settings:
    """What every command needs to turn images into features."""

    batch: int
    workers: int
    detector: str
    detector_sha256: Optional[str]
    trust_pickle: bool
    device: str
    quiet: bool

    def load(self, shape: Tuple[int, int, int], here: World, scores: bool = False) -> Detector:
        """The detector, for images of `shape`."""
        return load_detector(
            self.detector, shape, here.device, scores, self.detector_sha256, self.trust_pickle,
            self.quiet or here.rank > 0,
        )

    def measure(self, images: ImageSet, detector: Detector, here: World, fid: bool = True, splits: int = 0) -> Measured:
        """Features of all images, summed up."""
        progress = Progress(len(images), "images", self.quiet or here.rank > 0)
        try:
            return measure_images(images, detector, here, fid, splits, self.batch, self.workers, progress)
        finally:
            progress.close()


def detector_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `Settings` holds."""
    options = [
        click.option("--batch", type=click.IntRange(1), default=64, show_default=True, metavar="N",
                     help="Images per run of the detector."),
        click.option("--workers", type=click.IntRange(0, 64), default=2, show_default=True, metavar="N",
                     help="Threads that read images; 0 for none beside the detector."),
        click.option("--detector", default="inception", show_default=True, metavar="NAME|PT|PKL|URL",
                     help="inception, lenet, or a network that is called like NVIDIA's Inception."),
        click.option("--detector-sha256", metavar="HEX", help="Refuse a detector file of another SHA-256."),
        click.option("--trust-pickle", is_flag=True, help="Allow a .pkl detector to run the code in it."),
        click.option("--device", default="auto", show_default=True, metavar="NAME", help="auto, cpu or cuda."),
        click.option("--quiet", is_flag=True, help="Show no progress."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def split_settings(options: Dict[str, Any]) -> Tuple[Settings, Dict[str, Any]]:
    """The shared options, and the others."""
    own = {key: value for key, value in options.items() if key not in Settings.__dataclass_fields__}
    return Settings(**{key: options[key] for key in Settings.__dataclass_fields__}), own


@click.group(cls=Group, invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Frechet distances and Inception scores of images, on a CPU, a GPU or many.

    \b
    Examples:
      python tools/fid.py calc --images=fid-tmp --ref=https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz
      python tools/fid.py calc --images=fid-tmp --ref=img512.pkl --metrics=fid,is --out=scores.json
      python tools/fid.py ref --data=my-dataset.zip --dest=my-dataset.npz
      torchrun --standalone --nproc_per_node=8 tools/fid.py calc --images=fid-tmp --ref=my-dataset.npz
      python tools/fid.py calc --images=digits --ref=mnist.npz --detector=lenet --num=10000
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def parse_metrics(context: click.Context, parameter: click.Parameter, value: str) -> List[str]:
    """`fid,is` -> list, without repetition."""
    metrics = list(dict.fromkeys(part.strip() for part in value.split(",")))
    for metric in metrics:
        if metric not in METRICS:
            raise click.BadParameter(f"found {metric!r}, expected {' or '.join(METRICS)}, separated by commas")
    return metrics


@main.command()
@click.option("--images", required=True, metavar="DIR|ZIP", help="The images.")
@click.option("--ref", metavar="NPZ|PKL|URL", help="Statistics of the data set; needed for fid.")
@click.option("--metrics", default="fid", show_default=True, callback=parse_metrics, metavar="LIST", help="fid, is.")
@click.option("--num", "--num-images", "num", type=click.IntRange(min=2), default=50000, show_default=True, metavar="N",
              help="How many of the images to use; fewer are an error. Newer torchrun knows only the longer name.")
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Chooses the images.")
@click.option("--splits", type=click.IntRange(min=1), default=10, show_default=True, metavar="N",
              help="Parts of the Inception score.")
@click.option("--out", type=click.Path(path_type=Path), metavar="F.json", help="Also write all results and settings.")
@detector_options
def calc(**options: Any) -> None:
    """Compare images with the statistics of a data set; prints the FID."""
    settings, own = split_settings(options)
    fid, splits = "fid" in own["metrics"], own["splits"] if "is" in own["metrics"] else 0
    with world(settings.device) as here:
        with here.phase():  # everything that can fail early
            if fid and own["ref"] is None:
                raise click.UsageError("found no --ref, expected the statistics of a data set for fid")
            if own["out"] is not None:
                check_destination(own["out"])
            reference = load_reference(own["ref"], settings.quiet or here.rank > 0) if fid else None
            images, notes = find_images(own["images"], own["num"], own["seed"])
            detector = settings.load(images.shape, here, scores=splits > 0)
            if reference is not None:
                notes += reference.notes_for(detector.name, detector.sha256, detector.dim)
            show(notes)
        measured = settings.measure(images, detector, here, fid, splits)
        if here.rank == 0:
            results = report(measured, reference)
            if own["out"] is not None:
                results.update(record(images, detector, reference, settings, own, here), notes=notes)
                write_json(own["out"], results)


def find_images(path: str, num: Optional[int] = None, seed: int = 0) -> Tuple[ImageSet, List[str]]:
    """The images, looked over, and what the user should know of them."""
    images = open_images(path, num, seed)
    lossy = lossy_note(images, images.check(range(len(images))))
    return images, [*images.notes, *([lossy] if lossy else []), *few_images(len(images))]


def show(notes: List[str]) -> None:
    """Notes on stderr, one line each."""
    for note in notes:
        click.echo(f"note: {note}", err=True)


def report(measured: Measured, reference: Optional[Reference]) -> Dict[str, Any]:
    """Print the results, the FID alone as EDM's fid.py prints it; returns them in full."""
    results: Dict[str, Any] = {}
    if measured.moments is not None and reference is not None:
        results["fid"] = frechet_distance(*measured.moments, reference.mu, reference.cov)
        click.echo(f"{results['fid']:g}")
    if measured.score is not None:
        results["inception_score"], results["inception_score_std"] = measured.score
        click.echo("Inception score {:g} +- {:g}".format(*measured.score))
    return results


def record(
    images: ImageSet, detector: Detector, reference: Optional[Reference], settings: Settings, own: Dict[str, Any],
    here: World,
) -> Dict[str, Any]:
    """What the results depend on."""
    data = {
        "num_images": len(images), "images": str(images.path), "seed": own["seed"], "splits": own["splits"],
        "image_shape": list(images.shape), "batch": settings.batch, **described(detector),
        "processes": here.size, "device": str(here.device), "command": command_line(), "versions": versions(),
    }
    if reference is not None:
        data["reference"] = {"source": reference.source, "sha256": reference.sha256, **reference.provenance}
    return data


def described(detector: Detector) -> Dict[str, Any]:
    """The detector's part of a record."""
    return {"detector": detector.name, "detector_sha256": detector.sha256, "features": detector.dim}


@main.command("ref")
@click.option("--data", required=True, metavar="DIR|ZIP", help="The images of the data set; all are used.")
@click.option("--dest", required=True, metavar="F.npz|F.pkl", help="Where they go: .npz for EDM, .pkl for EDM2.")
@detector_options
def ref(**options: Any) -> None:
    """Write the statistics of a data set that `calc` needs."""
    settings, own = split_settings(options)
    with world(settings.device) as here:
        with here.phase():
            if here.rank == 0:
                check_reference_destination(own["dest"])
            images, notes = find_images(own["data"])
            detector = settings.load(images.shape, here)
            show(notes)
        moments = settings.measure(images, detector, here).moments
        if here.rank == 0:
            provenance = {**described(detector), "data": str(images.path), "versions": versions()}
            save_reference(own["dest"], *moments, len(images), provenance)
            click.echo(f"wrote {own['dest']}: {detector.dim} features of {len(images)} images")


main.add_command(compare_command)
main.add_command(gen_command)

if __name__ == "__main__":
    main(prog_name="fid.py")
