"""Train the networks this package ships, on MNIST: the score network and the LeNet that judges it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click
import numpy as np
import torch
from mnist.judge import accuracy, fid_with_error, lenet_features, measured_features
from mnist.train_networks import ScoreConfig, read_checkpoint, read_snapshot, snapshot_path, train_lenet, train_score

from art_edm.grids.grid import Grid, edm
from art_edm.metrics.frechet import Moments, frechet_distance, moments
from art_edm.metrics.mnist import load_mnist, to_images
from art_edm.models.denoiser import Denoiser
from art_edm.models.lenet import LeNet
from art_edm.models.loading import NetworkError, load_lenet, load_network, save_lenet, save_network
from art_edm.runtime.cli import Command, command_line, versions
from art_edm.runtime.errors import Stopped
from art_edm.runtime.files import check_destination, sha256_of, write_json
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.generate import generate, sample_sheet
from art_edm.sampling.solvers import nfe

RESULTS = ("mnist.pt", "lenet.pt", "mnist.json", "mnist.png")
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
SOLVER = "heun"
SHEET_STEPS, SHEET_DIGITS = 35, 100  # 69 evaluations
SNAPSHOT_STEPS = 18  # 35 evaluations
LENET_EPOCHS = 12
EXPECTED_ACCURACY = 0.99


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    data: Optional[str]
    out: Path
    start: Optional[Path]
    iterations: int
    batch: int
    learning_rate: float
    seed: int
    snapshots: int
    resume: bool
    quiet: bool
    device: str
    floor_samples: int
    floor_steps: int
    snapshot_samples: int

    @property
    def score(self) -> ScoreConfig:
        """Settings of the score network's training."""
        start = "" if self.start is None else sha256_of(self.start / RESULTS[0])
        return ScoreConfig(self.iterations, self.batch, self.learning_rate, seed=self.seed, start=start)

    @property
    def checkpoint(self) -> Path:
        """All state of the score network's training."""
        return self.out / "score.ckpt"

    @property
    def command(self) -> str:
        """The command that gives these results on any computer: all options but folders and how it is shown."""
        options = {k: v for k, v in asdict(self).items() if k not in ("data", "out", "resume", "quiet", "start")}
        words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
        return " ".join(["python tools/train_mnist.py", *([] if self.start is None else ["--start=DIR"]), *words])


def count(option: str, default: int, text: str, least: int = 1, most: Optional[int] = None) -> Any:
    """An option that takes a whole number."""
    kind = click.IntRange(least, most)
    return click.option(option, type=kind, default=default, show_default=True, metavar="N", help=text)


@click.command(cls=Command)
@click.option("--data", metavar="DIR", help="Folder with the four MNIST files; downloaded and kept by default.")
@click.option("--out", type=click.Path(path_type=Path), default="runs/mnist", show_default=True, metavar="DIR",
              help="Where checkpoints and results go; created if missing.")
@click.option("--start", type=click.Path(path_type=Path), metavar="DIR",
              help="Go on from the weights in DIR (mnist.pt), and judge by its LeNet; --iterations counts anew.")
@count("--iterations", 20_000, "Training steps of the score network.")
@count("--batch", 128, "Images per training step.")
@click.option("--learning-rate", type=click.FloatRange(0, 1, min_open=True), default=2e-3, show_default=True,
              metavar="X", help="Of the score network after warm-up; then linear to zero.")
@count("--seed", 0, "Of weights, draws and samples.", least=0, most=2**32 - 1)
@count("--snapshots", 2500, "Keep the averaged weights every N steps; 0 for none.", least=0)
@count("--floor-samples", 10_000, "Samples for the LeNet-FID floor.", least=40)
@count("--floor-steps", 200, "Steps of Heun's method for the floor.")
@count("--snapshot-samples", 2000, "Samples for the LeNet-FID of each snapshot; 0 to skip.", least=0)
@click.option("--device", default="cpu", show_default=True, metavar="NAME", help="Where the score network runs.")
@click.option("--resume", is_flag=True, help="Continue what an earlier run left in --out.")
@click.option("--quiet", is_flag=True, help="Show no progress.")
def main(**options: Any) -> None:
    """Train the score network and LeNet on MNIST, and measure them.

    Writes mnist.pt and lenet.pt (weights, half precision), mnist.json (how they were made and what they
    reach) and mnist.png (100 digits). Ctrl-C or SIGTERM saves; --resume continues to the same weights.

    \b
    Examples:
      python tools/train_mnist.py
      python tools/train_mnist.py --data=DIR --resume
      python tools/train_mnist.py --iterations=500 --floor-samples=500 --floor-steps=20 --out=runs/quick
    """
    settings = Settings(**options)
    check(settings)
    data = {split: load_mnist(split, settings.data) for split in ("train", "test")}
    images = {split: (to_images(pixels), labels) for split, (pixels, labels) in data.items()}
    line = command_line()
    again = line if "--resume" in line.split() else f"{line} --resume"
    try:
        with GracefulStop() as stop:
            card = run(settings, images, stop)
    except Stopped as error:
        raise Stopped(f"{error}; continue with: {again}") from None
    except OSError as error:
        raise Stopped(f"{error}; remove the cause, then continue with: {again}") from None
    report(settings, card)


def check(settings: Settings) -> None:
    """Refuse, before any work, what cannot be used or written."""
    if settings.start is not None:
        load_network(str(settings.start / RESULTS[0]))
        load_lenet(settings.start / RESULTS[1])
    if settings.snapshot_samples == 1:
        raise ValueError("found --snapshot-samples=1, expected 0 or at least 2; a covariance needs two samples")
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = f"--device={settings.device} ({str(error).splitlines()[0][:100]})"
        raise ValueError(f"cannot use {reason}; expected cpu, or cuda where torch finds one") from None
    folder = settings.out / "floors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot create the folder {folder}: {error.strerror}; choose another --out") from None
    for name in (*RESULTS, settings.checkpoint.name, "floors/x"):
        check_destination(settings.out / name)
    found = [path for path in (settings.checkpoint, *map(settings.out.joinpath, RESULTS)) if path.exists()]
    if found and not settings.resume:
        raise ValueError(f"found {found[0]} of an earlier run; add --resume to continue it, or choose another --out")
    if settings.checkpoint.exists():
        read_checkpoint(settings.checkpoint, settings.score)


def run(settings: Settings, images: Dict[str, Any], stop: GracefulStop) -> Dict[str, Any]:
    """All stages; returns the card."""
    weights, lenet_weights, card_path, sheet_path = (settings.out / name for name in RESULTS)
    lenet = obtain_lenet(settings, lenet_weights, *images["train"])
    start = None if settings.start is None else load_network(str(settings.start / RESULTS[0])).denoiser
    trained = train_score(
        images["train"][0], settings.score, settings.checkpoint, settings.resume, settings.device, settings.quiet,
        save_every(settings.snapshots), settings.snapshots or None, start,
    )
    save_network(weights, trained["ema"])
    network = load_network(str(weights), settings.device).denoiser  # what is shipped is what is measured
    judge = Judge(settings, lenet, moments(lenet_features(lenet, images["train"][0])), stop)
    progress = Progress(SHEET_DIGITS * SHEET_STEPS, "sample sheet", settings.quiet)
    sheet = edm(SHEET_STEPS, SIGMA_MIN, SIGMA_MAX)
    sample_sheet(generate(network, sheet, SOLVER, SHEET_DIGITS, settings.seed, 100, progress, stop), sheet_path)
    progress.close()
    losses = coarse(trained["losses"])
    card = {
        "command": settings.command, "start": origin(settings.start), "seed": settings.seed,
        "iterations": settings.iterations, "batch": settings.batch,
        "parameters": sum(p.numel() for p in network.parameters()), "seconds": trained["seconds"],
        "final_loss": losses[-1], "losses": losses,
        "sigma_data": network.sigma_data, "data_mean": network.data_mean,
        "lenet_accuracy": accuracy(lenet, *images["test"]),
        "lenet_fid_test_vs_train": judge.yardstick(images["test"][0]),
        "lenet_fid_floor": judge.floor(network, sha256_of(weights)),
        "floor_over_training": judge.snapshots(),
        "sha256": {path.name: sha256_of(path) for path in (weights, lenet_weights)},
        "versions": versions(),
    }
    write_json(card_path, card)
    return card


def save_every(snapshots: int) -> int:
    """Steps between checkpoints: at most 250, and such that every snapshot falls on one."""
    return max(n for n in range(1, 251) if snapshots % n == 0)


def origin(start: Optional[Path]) -> Optional[Dict[str, Any]]:
    """What the training started from, if not from random weights: the hash of the weights, and their card."""
    if start is None:
        return None
    try:
        card = json.loads((start / RESULTS[2]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        card = None
    return {"sha256": sha256_of(start / RESULTS[0]), "card": card}


def coarse(losses: List[float], parts: int = 20) -> List[float]:
    """The course of the loss in at most `parts` means of equally long stretches."""
    return [float(part.mean()) for part in np.array_split(losses, min(parts, len(losses)))]


def obtain_lenet(settings: Settings, path: Path, images: torch.Tensor, labels: torch.Tensor) -> LeNet:
    """LeNet as read from its weight file, which is written first unless an earlier run did."""
    if settings.start is not None:
        save_lenet(path, load_lenet(settings.start / RESULTS[1]))
    if path.exists() and (settings.resume or settings.start is not None):
        try:
            return load_lenet(path)
        except NetworkError as error:
            click.echo(f"note: {error}; training it again", err=True)
    save_lenet(path, train_lenet(images, labels, LENET_EPOCHS, seed=settings.seed, quiet=settings.quiet))
    return load_lenet(path)


@dataclass(frozen=True)
class Judge:
    """LeNet, and the moments of the training images' features that samples are compared with."""

    settings: Settings
    lenet: LeNet
    reference: Moments
    stop: GracefulStop

    def yardstick(self, images: torch.Tensor) -> float:
        """FID of true images that were not trained on."""
        return frechet_distance(*moments(lenet_features(self.lenet, images)), *self.reference)

    def floor(self, network: Denoiser, weights: str) -> Dict[str, Any]:
        """What the network reaches when the number of steps does not limit it."""
        num, steps = self.settings.floor_samples, self.settings.floor_steps
        features, seconds = self._sample(network, weights, num, steps, "LeNet-FID floor")
        fid, stderr = fid_with_error(features, self.reference)
        grid = {"rule": "edm", "num_steps": steps, "sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rho": 7}
        return {"samples": num, "solver": SOLVER, "grid": grid, "nfe": nfe(SOLVER, steps), "fid": fid, "stderr": stderr,
                "seconds": seconds}

    def snapshots(self) -> List[Dict[str, Any]]:
        """The LeNet-FID over the course of training, of fewer samples and steps than the floor's."""
        num, every, rows = self.settings.snapshot_samples, self.settings.snapshots, []
        for iteration in range(every, self.settings.iterations + 1, every) if num and every else []:
            path = snapshot_path(self.settings.checkpoint, iteration)
            if not path.exists():  # made with other --snapshots before it was resumed
                continue
            network, seconds = read_snapshot(path, self.settings.device)
            features, _ = self._sample(network, sha256_of(path), num, SNAPSHOT_STEPS, f"LeNet-FID at {iteration}")
            fid = frechet_distance(*moments(features), *self.reference)
            rows.append({"iteration": iteration, "seconds": seconds, "fid": fid, "samples": num,
                         "nfe": nfe(SOLVER, SNAPSHOT_STEPS)})
        return rows

    def _sample(
        self, network: Denoiser, weights: str, num: int, steps: int, label: str
    ) -> Tuple[np.ndarray, float]:
        """Features of samples and the seconds they took, from an earlier run as far as there are any."""
        grid = edm(steps, SIGMA_MIN, SIGMA_MAX)
        store = self.settings.out / "floors" / f"{self._key(weights, grid)}.npz"
        progress = Progress(num * steps, label, self.settings.quiet)
        try:
            return measured_features(
                self.lenet, network, grid, SOLVER, num, self.settings.seed, store, progress=progress, stop=self.stop
            )
        finally:
            progress.close()

    def _key(self, weights: str, grid: Grid) -> str:
        """A file name for all that the features of a sample depend on."""
        lenet = sha256_of(self.settings.out / "lenet.pt")
        parts = [weights, lenet, SOLVER, grid.values.tolist(), self.settings.seed]
        return sha256(json.dumps(parts).encode()).hexdigest()[:20]


def report(settings: Settings, card: Dict[str, Any]) -> None:
    """Say what was written and what it reaches."""
    floor = card["lenet_fid_floor"]
    click.echo(f"wrote {', '.join(str(settings.out / name) for name in RESULTS)}")
    click.echo(f"LeNet accuracy {card['lenet_accuracy']:.2%}; score network's loss {card['final_loss']:.4f}")
    click.echo(f"LeNet-FID floor {floor['fid']:.3f} +- {floor['stderr']:.3f} of {floor['samples']} samples by "
               f"{floor['nfe']} evaluations each; true test images {card['lenet_fid_test_vs_train']:.3f}")
    if card["lenet_accuracy"] < EXPECTED_ACCURACY:
        click.echo(f"note: LeNet's accuracy is below the expected {EXPECTED_ACCURACY:.0%}; do not ship it", err=True)


if __name__ == "__main__":
    main(prog_name="train_mnist.py")
