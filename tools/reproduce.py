"""The paper's tables and figures, repeated: ours beside the paper's."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Tuple

import click
from click.core import ParameterSource

from art_edm.runtime.cli import Command


def _folder(context: click.Context, parameter: click.Parameter, value: Optional[Path]) -> Optional[Path]:
    """A folder that is named in the command must be there; the environment's may serve other work."""
    given = context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    if given and not value.is_dir():
        raise click.BadParameter(f"found no folder {value}, expected one with MNIST's four files")
    return value


@click.command(cls=Command, groups={
    "Data": "networks mnist cifar10 trust", "Size": "num resample seed", "Running": "batch device",
    "Results": "out cache listing quiet",
})
@click.argument("names", nargs=-1, metavar="[TABLE|FIGURE|ablation|transfer]...")
@click.option("--networks", type=click.Path(file_okay=False, exists=True, path_type=Path), metavar="DIR",
              help="Folder with NVIDIA's pickles, reference statistics and Inception, under their official names.")
@click.option("--mnist", type=click.Path(path_type=Path), callback=_folder, metavar="DIR", envvar="ART_EDM_MNIST",
              help="Folder with MNIST's four files.  [default: $ART_EDM_MNIST, else a download]")
@click.option("--cifar10", type=click.Path(exists=True, path_type=Path), metavar="ARCHIVE|DIR",
              help="CIFAR-10 as JPEGs train/CLASS/NNNN.jpg, a folder or a .tar.xz, for `transfer` and the ablations.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="results",
              metavar="DIR", help="Where the report goes.")
@click.option("--num", type=click.IntRange(2), metavar="N",
              help="Images, or noises, per cell.  [default: the experiment's own, as in the paper]")
@click.option("--resample", type=click.Choice(["paper", "clock"]), default="paper",
              help="How Table 5 gets other numbers of steps: log sigma linear in the step, or the clock read off.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, metavar="N",
              help="Seed of all randomness.")
@click.option("--batch", type=click.IntRange(1), default=64, metavar="N", help="Images at a time.")
@click.option("--device", default="auto", metavar="NAME",
              help="auto, cpu or cuda; naming cpu also runs what is meant for a GPU.")
@click.option("--cache", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Where finished work is kept.  [default: the user's cache]")
@click.option("--trust-pickle", "trust", is_flag=True, help="Run the code in network pickles that are not known.")
@click.option("--list", "listing", is_flag=True, help="List the experiments and what they lack, and stop.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def main(
    names: Tuple[str, ...], out: Path, device: str, cache: Optional[Path], listing: bool, quiet: bool, **given: Any
) -> int:
    """Run experiments of the paper, all without names, and write a report.

    What the machine lacks is listed first, with the address that provides it; the rest runs. Run the same command
    again to continue, also after a crash. torchrun shares the work among GPUs.

    \b
    Examples:
      python tools/reproduce.py table1
      python tools/reproduce.py table4 figure10 --num=10000
      python tools/reproduce.py --list
      torchrun --standalone --nproc_per_node=8 tools/reproduce.py table2 --networks=downloads
    """
    from paper.context import Lab
    from paper.experiments import TABLES, select
    from paper.run_all import lacking, reproduce

    from art_edm.grids.plots import check_plotting
    from art_edm.runtime.distributed import world
    from art_edm.runtime.files import cache_dir
    from art_edm.runtime.progress import GracefulStop
    from art_edm.runtime.store import Store

    say = (lambda text: None) if quiet else click.echo
    chosen = select(names)
    with world(device) as here, GracefulStop() as stop:
        with here.phase():  # everything that can fail early
            check_plotting()
            out.mkdir(parents=True, exist_ok=True)
            store = Store(cache or cache_dir() / "cells")
        lab = Lab(store, here, out, quiet=quiet, forced=device != "auto", stop=stop, **given)
        if listing:
            for item in chosen:
                lacks = [what for found, what, _ in lacking([item], lab) if item.name in found]
                click.echo(f"{item.name:<18} {item.title}" + (f"  (lacks {', '.join(lacks)})" if lacks else ""))
            click.echo(f"{len(chosen)} of {len(TABLES)} experiments")
            return 0
        failures = reproduce(chosen, lab, say)
        if here.rank == 0 and not quiet:
            click.echo(f"wrote {out / 'README.md'}")
    return 1 if failures else 0


if __name__ == "__main__":
    main(prog_name="reproduce.py")
