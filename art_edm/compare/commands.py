"""The commands `gen` and `compare` of tools/fid.py: options in, one call, a table out."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import click
from click.core import ParameterSource

from art_edm.compare.options import (
    DETECTOR_HELP,
    REFERENCE_HELP,
    context_of,
    detector_options,
    few_notes,
    judges,
    record_of,
    reference_options,
    several,
    show,
)
from art_edm.compare.sample_cache import Work
from art_edm.compare.score_folders import compare, open_entries, parse_entries
from art_edm.compare.score_grids import Fine, Plan, score
from art_edm.compare.tables import FORMATS, Row, lines, write
from art_edm.grids.plots import check_plotting
from art_edm.grids.weights import WEIGHTS
from art_edm.models.latents import decoder_of
from art_edm.models.loading import Network, load_network
from art_edm.runtime.cli import Command
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import world
from art_edm.runtime.files import check_destination
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.baselines import choose_grids
from art_edm.sampling.solvers import SOLVERS

__all__ = ["compare_command", "gen_command"]


def _steps(context: click.Context, parameter: click.Parameter, value: str) -> List[int]:
    parts = several()(context, parameter, value)
    for part in parts:
        if not part.isdecimal() or not 1 <= int(part) <= 100_000:
            raise click.BadParameter(f"found {part!r}, expected whole numbers from 1, such as 5,10,18")
    return list(dict.fromkeys(map(int, parts)))


def _destinations(paths: Sequence[Path]) -> None:
    """Fail before the work if a table cannot be written."""
    for path in paths:
        if path.suffix.lower() not in FORMATS:
            raise click.BadParameter(f"found {path}, expected a name that ends in {', '.join(FORMATS)}",
                                     param_hint="--out")
        check_destination(path)
        if path.suffix.lower() == ".png":
            check_plotting()


def _report(paths: Sequence[Path], rows: Sequence[Row], record: Row) -> None:
    click.echo("\n".join(lines(rows)))
    for path in paths:
        write(path, rows, record)
    if paths:
        click.echo(f"wrote {', '.join(map(str, paths))}")


GEN_HELP = {
    "Network": "network gnet guidance class_idx", "Grids and samples": "grids steps solvers num blocks seed",
    "End-point errors": "reference_error error_noises error_steps error_solver", **REFERENCE_HELP, **DETECTOR_HELP,
}


@click.command("gen", cls=Command, groups=GEN_HELP)
@click.option("--network", required=True, metavar="NAME|PATH|URL",
              help="mnist, cifar10, oned, gaussian:S, a pickle of EDM or EDM2, a weight file, or module:factory.")
@click.option("--gnet", metavar="PATH|URL", help="Guiding network pickle (EDM2).")
@click.option("--guidance", type=float, default=1.0, show_default=True, help="Guidance strength; 1 is none.")
@click.option("--class", "class_idx", type=click.IntRange(0), metavar="INT",
              help="Class of all images.  [default: random]")
@click.option("--grid", "grids", default="edm", show_default=True, callback=several(), metavar="LIST",
              help="Rules and files with commas between: edm, dpm, uniform, F.npy, F{steps}.npy or NAME=F.npy.")
@click.option("--steps", default="18", show_default=True, callback=_steps, metavar="LIST", help="Numbers of steps.")
@click.option("--solver", "solvers", default="heun", show_default=True, callback=several(lambda: [*SOLVERS, WEIGHTS]),
              metavar="LIST", help=", ".join(SOLVERS) + "; weights: those of a grid's own, if its sidecar has them.")
@click.option("--num", type=click.IntRange(2), default=50_000, show_default=True, metavar="N", help="Images per block.")
@click.option("--blocks", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="Seed blocks, for a standard error; block b has the images b N, b N + 1, ...")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, metavar="N",
              help="0 for the noises of upstream's --seeds=0-... on a CPU; on a GPU upstream draws others.")
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
@reference_options
@detector_options
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
    with world(options["device"]) as here:
        with here.phase():  # everything that can fail early
            context = context_of(options, here)
            _destinations(options["paths"])
            network = load_network(options["network"], here.device, options["gnet"], options["guidance"],
                                   options["class_idx"], options["trust_pickle"], context.quiet)
            plan, reference = _plan(options, network, context)
        progress = Progress(plan.evaluations, "evaluations", context.quiet)
        with GracefulStop() as stop, closing(progress):
            rows = score(plan, Work(context.store, here, context.batch, progress, stop))
        if here.rank == 0:
            record = record_of(plan.panel, reference, context)
            record.update(network={"name": network.name, "sha256": network.sha256, **network.details},
                          seed=plan.seed, fine=plan.fine._asdict() if plan.fine else None)
            _report(options["paths"], rows, record)


def _plan(options: Dict[str, Any], network: Network, context: Context) -> Tuple[Plan, Row]:
    """What is to be done, and the record of the reference."""
    choices = choose_grids(options["grids"], options["steps"], network.denoiser)
    if WEIGHTS in options["solvers"] and all(choice.weights() is None for choice in choices):
        raise ValueError(f"found --solver={WEIGHTS} and no grid whose sidecar has some, expected one; learn it with "
                         "train_schedule.py --refine=weights")
    fine = Fine(options["error_noises"], options["error_steps"], options["error_solver"])
    plan = Plan(network, choices, options["solvers"], options["num"], options["blocks"], options["seed"],
                fine=fine if options["reference_error"] else None)
    asked = [name for name in ("metrics", "detector", "dino_weights")
             if click.get_current_context().get_parameter_source(name) == ParameterSource.COMMANDLINE]
    if options["ref"] is None and plan.fine and not asked:  # no features: Inception would have to be downloaded
        return plan, {}
    plan = replace(plan, decode=decoder_of(network))
    found = judges(options, plan.image_shape, context, needs_reference=plan.fine is None)
    plan = replace(plan, panel=found.panel, references=found.references)
    show(choice.note for choice in choices if choice.note)
    show([*found.notes, *(few_notes(options["num"], found.panel.metrics, "images per block") if plan.scores else [])])
    if "is" in found.panel.metrics and options["splits"] > options["num"]:
        raise ValueError(f"found --splits={options['splits']} for {options['num']} images, expected no more; lower "
                         "--splits")
    if plan.fine and plan.scores and fine.noises != options["num"]:
        show([f"the metrics of exact ends are of {fine.noises} images per block, those of samples of {options['num']}: "
              f"add --error-noises={options['num']} to compare them"])
    return plan, found.record


@click.command("compare", cls=Command, groups={"Images": "block num workers", **REFERENCE_HELP, **DETECTOR_HELP})
@click.argument("folders", nargs=-1, required=True, metavar="NAME[@NFE]=DIR|ZIP...")
@click.option("--block", type=click.IntRange(2), default=50_000, show_default=True, metavar="N",
              help="Images per seed block, consecutive by name; fewer in all are one block.")
@click.option("--num", type=click.IntRange(2), metavar="N", help="Use the first N images by name.  [default: all]")
@click.option("--workers", type=click.IntRange(0, 64), default=2, show_default=True, metavar="N",
              help="Threads that read images; 0 for none beside the detector.")
@click.option("--out", "prefix", metavar="PREFIX",
              help="Also write PREFIX.json, .csv, .md and, where names carry their NFE, .png.")
@reference_options
@detector_options
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
            context, entries = context_of(options, here), parse_entries(options["folders"])
            paths = _outputs(options["prefix"], any(entry.nfe is not None for entry in entries))
            sets, blocks = open_entries(entries, options["block"], options["num"])
            found = judges(options, sets[0].shape, context)
            show([*found.notes, *few_notes(len(sets[0]) // blocks, found.panel.metrics, "images per block")])
        rows, notes = compare(entries, sets, blocks, found.panel, found.references, context, options["workers"])
        if here.rank == 0:
            show(notes)
            _report(paths, rows, record_of(found.panel, found.record, context))


def _outputs(prefix: Optional[str], plotted: bool) -> List[Path]:
    if prefix is None:
        return []
    suffixes = list(FORMATS if plotted else FORMATS[:-1])
    try:
        _destinations([Path(prefix + suffix) for suffix in suffixes])
    except ValueError as error:
        if "matplotlib" not in str(error):
            raise
        show([f"no plot: {error}".replace("--plot needs", "it needs")])
        suffixes.remove(".png")
    return [Path(prefix + suffix) for suffix in suffixes]
