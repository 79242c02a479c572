"""The command that trains a bundled network; without torch, so that --help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import click

from art_edm.runtime.cli import Command
from networks.config import DataSet, Settings

__all__ = ["training_command"]


def _count(option: str, default: int, text: str, least: int = 1, most: Optional[int] = None) -> Any:
    """An option that takes a whole number."""
    kind = click.IntRange(least, most)
    return click.option(option, type=kind, default=default, show_default=True, metavar="N", help=text)


def training_command(data_set: DataSet, text: str) -> click.Command:
    """The command of tools/train_NAME.py; `text` is its help."""
    name, rate = data_set.name, data_set.score.learning_rate
    options = [
        click.option("--data", metavar="PLACE", help=data_set.data_help),
        click.option("--out", type=click.Path(path_type=Path), default=f"runs/{name}", show_default=True, metavar="DIR",
                     help="Where checkpoints and results go; created if missing."),
        click.option("--start", type=click.Path(path_type=Path), metavar="DIR",
                     help=f"Go on from the weights in DIR ({name}.pt), and judge by its {data_set.judge_name}; "
                          "--iterations counts anew."),
        _count("--iterations", data_set.score.iterations, "Training steps of the score network."),
        _count("--batch", data_set.score.batch, "Images per training step."),
        click.option("--learning-rate", type=click.FloatRange(0, 1, min_open=True), default=rate, show_default=True,
                     metavar="X", help="Of the score network after warm-up."),
        _count("--seed", 0, "Of weights, draws and samples.", least=0, most=2**32 - 1),
        _count("--snapshots", data_set.snapshots, "Keep the averaged weights every N steps; 0 for none.", least=0),
        _count("--floor-samples", 10_000, f"Samples for the {data_set.fid} floor.", least=40),
        _count("--floor-steps", 200, "Steps of Heun's method for the floor."),
        _count("--snapshot-samples", 2000, f"Samples for the {data_set.fid} of each snapshot; 0 to skip.", least=0),
        click.option("--device", default="cpu", show_default=True, metavar="NAME",
                     help="Where the score network runs."),
        click.option("--resume", is_flag=True, help="Continue what an earlier run left in --out."),
        click.option("--quiet", is_flag=True, help="Show no progress."),
    ]

    def main(**values: Any) -> None:
        from art_edm.runtime.distributed import resolve_device
        from networks.command import run_training

        run_training(Settings(data_set, **{**values, "device": str(resolve_device(values["device"]))}))

    main.__doc__ = text
    for option in reversed(options):
        main = option(main)
    return click.command(cls=Command)(main)
