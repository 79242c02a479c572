"""Training of a bundled network and its judge on a data set, and the measurement of both."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import click
import numpy as np
import torch
from torch import nn

from art_edm.compare.sample_cache import Work
from art_edm.compare.score_grids import Plan, score
from art_edm.compare.tables import Row
from art_edm.grids.grid import edm
from art_edm.metrics.detectors import ClassifierDetector, Detector
from art_edm.metrics.frechet import Moments, frechet_distance, moments
from art_edm.metrics.panel import Panel
from art_edm.models.loading import Network, load_classifier, load_network, save_classifier, save_network
from art_edm.runtime.cli import command_line, versions
from art_edm.runtime.distributed import ALONE
from art_edm.runtime.errors import Stopped
from art_edm.runtime.files import check_destination, sha256_of, write_json
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.runtime.store import Store
from art_edm.sampling.baselines import Choice
from art_edm.sampling.generate import generate, sample_sheet, watching
from networks.classifier import accuracy, train_classifier
from networks.config import Settings
from networks.loop import read_checkpoint
from networks.score import snapshot_path, train_score

__all__ = ["coarse", "run_training"]

SIGMA_MIN, SIGMA_MAX = 0.002, 80.0
SOLVER = "heun"
SHEET_STEPS, SHEET_IMAGES = 35, 100  # 69 evaluations
SNAPSHOT_STEPS = 18  # 35 evaluations


def run_training(settings: Settings) -> None:
    """Check everything, do the work, and say how to continue if it stops."""
    _check(settings)
    data = {split: settings.data_set.load(split, settings.data) for split in ("train", "test")}
    line = command_line()
    again = line if "--resume" in line.split() else f"{line} --resume"
    try:
        with GracefulStop() as stop:
            card = _work(settings, data, stop)
    except Stopped as error:
        raise Stopped(f"{error}; continue with: {again}") from None
    except OSError as error:
        raise Stopped(f"{error}; remove the cause, then continue with: {again}") from None
    _report(settings, card)


def _check(settings: Settings) -> None:
    """Refuse, before any work, what cannot be used or written."""
    data_set = settings.data_set
    if settings.start is not None:
        load_network(str(settings.start / data_set.results[0]))
        load_classifier(data_set.judge, settings.start / data_set.judge_file)
    if settings.snapshot_samples == 1:
        raise ValueError("found --snapshot-samples=1, expected 0 or at least 2; a covariance needs two samples")
    Store(settings.out / "floors")
    for name in (*data_set.results, "score.ckpt", "judge.ckpt", "floors/x"):
        check_destination(settings.out / name)
    checkpoints = {settings.run(name).checkpoint: getattr(settings, name) for name in ("score", "judge")}
    found = [path for path in (*checkpoints, *map(settings.out.joinpath, data_set.results)) if path.exists()]
    if found and not settings.resume:
        raise ValueError(f"found {found[0]} of an earlier run; add --resume to continue it, or choose another --out")
    for checkpoint, config in checkpoints.items():
        if checkpoint.exists():
            read_checkpoint(checkpoint, config)


def _work(settings: Settings, data: Dict[str, Any], stop: GracefulStop) -> Dict[str, Any]:
    """All stages; returns the card."""
    data_set = settings.data_set
    weights, judge_path, card_path, sheet_path = (settings.out / name for name in data_set.results)
    classifier = _obtain_judge(settings, *data["train"])
    start = None if settings.start is None else load_network(str(settings.start / data_set.results[0])).denoiser
    trained = train_score(
        data["train"][0], settings.score, settings.run("score"), settings.device, settings.snapshots, start
    )
    save_network(weights, trained["ema"])
    network = load_network(str(weights), settings.device)  # what is shipped is what is measured
    right = accuracy(classifier, *data["test"])
    detector = ClassifierDetector(classifier.to(settings.device), sha256_of(judge_path))
    judge = Judge(settings, detector, _moments(detector, data["train"][0], settings.device), stop)
    progress = Progress(SHEET_IMAGES * SHEET_STEPS, "sample sheet", settings.quiet)
    grid = edm(SHEET_STEPS, SIGMA_MIN, SIGMA_MAX)
    images = generate(network.denoiser, grid, SOLVER, SHEET_IMAGES, settings.seed, 100, watching(progress, stop))
    sample_sheet(images, sheet_path)
    progress.close()
    losses, fid = coarse(trained["losses"]), data_set.fid.lower().replace("-", "_")
    card = {
        "command": settings.command, "data": data_set.note, "start": _origin(settings), "seed": settings.seed,
        "iterations": settings.iterations, "batch": settings.batch,
        "images_seen": settings.iterations * settings.batch,
        "parameters": sum(p.numel() for p in network.denoiser.parameters()), "seconds": trained["seconds"],
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, --device={settings.device}",
        "final_loss": losses[-1], "losses": losses,
        "sigma_data": network.denoiser.sigma_data, "data_mean": network.denoiser.data_mean,
        f"{data_set.judge.__name__.lower()}_accuracy": right,
        f"{fid}_test_vs_train": frechet_distance(
            *_moments(detector, data["test"][0], settings.device), *judge.reference),
        f"{fid}_floor": judge.floor(network),
        "floor_over_training": judge.snapshots(trained["snapshots"]),
        "sha256": {name: sha256_of(settings.out / name) for name in data_set.results[:2]},
        "versions": versions(),
    }
    write_json(card_path, card)
    return card


def _origin(settings: Settings) -> Optional[Dict[str, Any]]:
    """What the training started from, if not from random weights: the hash of the weights, and their card."""
    if settings.start is None:
        return None
    weights, _, card_path, _ = (settings.start / name for name in settings.data_set.results)
    try:
        card = json.loads(card_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        card = None
    return {"sha256": sha256_of(weights), "card": card}


def coarse(losses: List[float], parts: int = 20) -> List[float]:
    """The course of the loss in at most `parts` means of equally long stretches."""
    return [float(part.mean()) for part in np.array_split(losses, min(parts, len(losses)))]


def _obtain_judge(settings: Settings, pixels: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    """The classifier as read from its weight file, which is written first."""
    kind, path = settings.data_set.judge, settings.out / settings.data_set.judge_file
    if settings.start is None:
        save_classifier(path, train_classifier(kind, pixels, labels, settings.judge, settings.run("judge")))
    else:
        save_classifier(path, load_classifier(kind, settings.start / path.name))
    return load_classifier(kind, path)


def _moments(detector: Detector, pixels: torch.Tensor, device: str) -> Moments:
    """Mean and covariance of the features of true images."""
    features = [detector.features(part.to(device)).cpu() for part in pixels.split(1000)]
    return moments(torch.cat(features).numpy())


@dataclass(frozen=True)
class Judge:
    """A classifier as a detector, and the moments of the training images that samples are compared with."""

    settings: Settings
    detector: Detector
    reference: Moments
    stop: GracefulStop

    def floor(self, network: Network) -> Dict[str, Any]:
        """What the network reaches when the number of steps does not limit it."""
        num, steps = self.settings.floor_samples, self.settings.floor_steps
        row = self._score(network, num, steps, f"{self.settings.data_set.fid} floor")
        grid = {"rule": "edm", "num_steps": steps, "sigma_min": SIGMA_MIN, "sigma_max": SIGMA_MAX, "rho": 7}
        return {"samples": num, "solver": SOLVER, "grid": grid, "nfe": row["nfe"], "fid": row["fid"],
                "stderr": row["fid_stderr"], "seconds": row["seconds"]}

    def snapshots(self, taken: Dict[int, float]) -> List[Dict[str, Any]]:
        """The FID over the course of training, of fewer samples and steps than the floor's."""
        num, rows = self.settings.snapshot_samples, []
        for iteration, seconds in taken.items() if num else ():
            path = snapshot_path(self.settings.run("score").checkpoint, iteration)
            network = load_network(str(path), self.settings.device)
            row = self._score(network, num, SNAPSHOT_STEPS, f"{self.settings.data_set.fid} at {iteration}")
            rows.append({"iteration": iteration, "seconds": seconds, "fid": row["fid"], "samples": num,
                         "nfe": row["nfe"]})
        return rows

    def _score(self, network: Network, num: int, steps: int, label: str) -> Row:
        """Samples by EDM's rule, scored; those that an earlier run has finished are not made again."""
        choice = Choice("edm", edm(steps, SIGMA_MIN, SIGMA_MAX), "rule")
        mean, covariance = self.reference
        plan = Plan(network, [choice], (SOLVER,), num, seed=self.settings.seed,
                    panel=Panel(["fid"], {"detector": self.detector}),
                    references={"fid": {"mu": mean, "sigma": covariance}})
        progress = Progress(plan.evaluations, label, self.settings.quiet)
        try:
            return score(plan, Work(Store(self.settings.out / "floors"), ALONE, 250, progress, self.stop))[0]
        finally:
            progress.close()


def _report(settings: Settings, card: Dict[str, Any]) -> None:
    """Say what was written and what it reaches."""
    data_set = settings.data_set
    fid, kind = data_set.fid.lower().replace("-", "_"), data_set.judge.__name__
    floor, right = card[f"{fid}_floor"], card[f"{kind.lower()}_accuracy"]
    click.echo(f"wrote {', '.join(str(settings.out / name) for name in data_set.results)}")
    click.echo(f"{kind} accuracy {right:.2%}; score network's loss {card['final_loss']:.4f}")
    click.echo(f"{data_set.fid} floor {floor['fid']:.3f} +- {floor['stderr']:.3f} of {floor['samples']} samples by "
               f"{floor['nfe']} evaluations each; true test images {card[f'{fid}_test_vs_train']:.3f}")
    if right < data_set.expected_accuracy:
        click.echo(f"note: {kind}'s accuracy is below the expected {data_set.expected_accuracy:.0%}; do not ship it",
                   err=True)
