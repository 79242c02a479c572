"""A comparison of grids: which are sampled, how often, and how they score.

Symbols
-------
cell        one grid, number of steps and solver
block       `num` images of a cell; block b has the indices b num, ..., (b + 1) num - 1 of the seed
difference  of a cell's FID to that of the first grid in as many steps by the same solver, from the same noise
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from art_edm.compare.accumulators import moments_of, score_of
from art_edm.compare.sample_cache import Samples, Work, end_points, features
from art_edm.compare.tables import Row, add_differences, measured
from art_edm.grids.grid import Grid
from art_edm.metrics.detectors import Detector
from art_edm.metrics.end_point import end_point_error
from art_edm.metrics.feature_stats import RunningMoments
from art_edm.metrics.frechet import Moments, frechet_distance, moments
from art_edm.metrics.mnist import FILES, load_mnist
from art_edm.metrics.standard_errors import GROUPS, Measurement, groups_of
from art_edm.models.loading import Network
from art_edm.runtime.store import Store
from art_edm.sampling.baselines import Choice, hand_made
from art_edm.sampling.solvers import nfe, supported

__all__ = ["Fine", "Plan", "mnist_reference", "score"]


class Fine(NamedTuple):
    """The fine solution that end points are compared with, from the first `noises` of each block."""

    noises: int = 256
    num_steps: int = 200
    solver: str = "heun"


@dataclass(frozen=True)
class Plan:
    """A comparison; without a detector only end points are compared, and without `fine` only images."""

    network: Network
    choices: Sequence[Choice]
    solvers: Sequence[str] = ("heun",)
    num: int = 50_000
    blocks: int = 1
    seed: int = 0
    detector: Optional[Detector] = None
    reference: Optional[Moments] = None  # for the FID
    splits: int = 0  # for the Inception score
    fine: Optional[Fine] = None

    def samples(self, grid: Grid, solver: str, block: int, num: Optional[int] = None) -> Samples:
        """What is sampled for one block."""
        return Samples(self.network, grid, solver, num or self.num, self.seed, block * self.num)

    @property
    def fine_grid(self) -> Grid:
        """EDM's rule in many steps."""
        return hand_made(self.network.denoiser, self.fine.num_steps)["edm"]

    @property
    def cells(self) -> Iterator[Tuple[Choice, str]]:
        """Every cell."""
        return ((choice, solver) for solver in self.solvers for choice in self.choices)

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser, if none is done yet."""
        images = self.num if self.detector else 0
        images += self.fine.noises if self.fine else 0
        count = sum(images * nfe(solver, choice.grid.num_steps) for choice, solver in self.cells)
        fine = self.fine.noises * nfe(self.fine.solver, self.fine.num_steps) if self.fine else 0
        return self.blocks * (count + fine * len(list(self.cells)))


def score(plan: Plan, work: Work) -> List[Row]:
    """Sample and score every cell; rows for `tables` on process 0, none on the others.

    Raises:
        Stopped: it was asked for, or the disk is full; what is done is kept.
        ValueError, NonFiniteOutput: the network, the grid or the detector cannot be used.
    """
    if plan.fine is not None:  # before any work
        _check_fine(plan)
    rows, fids, count = [], [], len(list(plan.cells))
    for i, (choice, solver) in enumerate(plan.cells):
        work.note = f"{choice.name} {choice.grid.num_steps} {solver} ({i + 1} of {count})"
        row = _described(plan, choice, solver)
        if plan.detector is not None:
            fid = _images(plan, choice, solver, work, row)
            fids.append(fid)
        if plan.fine is not None:
            row.update(_error(plan, choice, solver, work))
        rows.append(row)
    if work.world.rank > 0:
        return []
    if plan.reference is not None:
        first = {(row["steps"], row["solver"]): i for i, row in reversed(list(enumerate(rows)))}
        add_differences(rows, fids, lambda i: first[rows[i]["steps"], rows[i]["solver"]], lambda i, j: True)
    return rows


def _check_fine(plan: Plan) -> None:
    try:
        supported(plan.network.denoiser, plan.fine_grid)
    except ValueError as error:
        raise ValueError(f"the fine solution in {plan.fine.num_steps} steps: {error}; change --error-steps") from None


def _described(plan: Plan, choice: Choice, solver: str) -> Row:
    steps = choice.grid.num_steps
    evaluations = nfe(solver, steps)
    return {
        "name": choice.name, "origin": choice.origin, "steps": steps, "solver": solver, "nfe": evaluations,
        "network_calls": evaluations * plan.network.denoiser.networks,
        "images": plan.num if plan.detector else plan.fine.noises, "blocks": plan.blocks,
        "levels": choice.grid.values.tolist(),
    }


def _images(plan: Plan, choice: Choice, solver: str, work: Work, row: Row) -> Optional[Measurement]:
    """FID and Inception score of all blocks, put into the row; the FID's measurement."""
    fids, scores, left_out, seconds = [], [], [], 0.0
    for block in range(plan.blocks):
        content = features(plan.samples(choice.grid, solver, block), plan.detector, work, plan.splits)
        if content is None:  # process 0 does the rest
            continue
        seconds += float(content["seconds"])
        if plan.reference is not None:
            fids.append(frechet_distance(*moments_of(content), *plan.reference))
            if plan.blocks == 1:
                left_out = _left_out(content, plan.reference)
        if plan.splits:
            scores.append(score_of(content))
    fid = Measurement(fids, left_out) if fids else None
    row.update(measured("fid", fid) if fid else {}, seconds=seconds)
    if scores:
        row.update(measured("is", Measurement([mean for mean, _ in scores])))
        if plan.blocks == 1:
            row["is_splits_std"] = scores[0][1]
    return fid


def _left_out(content: Dict[str, np.ndarray], reference: Moments) -> List[float]:
    """FID without each group of images; none where only the moments are kept, or for few images."""
    kept = content.get("features")
    if kept is None or len(kept) < 2 * GROUPS:
        return []
    group = groups_of(len(kept))
    return [frechet_distance(*moments(kept[group != j]), *reference) for j in range(GROUPS)]


def _error(plan: Plan, choice: Choice, solver: str, work: Work) -> Row:
    """End-point error over the first noises of all blocks."""
    fine, points, exact = plan.fine, [], []
    for block in range(plan.blocks):
        exact.append(end_points(plan.samples(plan.fine_grid, fine.solver, block, fine.noises), work))
        points.append(end_points(plan.samples(choice.grid, solver, block, fine.noises), work))
    if work.world.rank > 0:
        return {}
    result = end_point_error(np.concatenate(points), np.concatenate(exact))
    return {**{f"error_{name}": value for name, value in result._asdict().items()},
            "error_noises": fine.noises * plan.blocks}


def mnist_reference(split: str, detector: Detector, device: torch.device, store: Store, data: Any = None) -> Moments:
    """Moments of the features of MNIST's `split` (train or test), kept in `store`.

    Args:
        data: folder with the four files; None downloads them once.
    Raises:
        ValueError, ConnectionError: as `load_mnist`.
    """
    name = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}[split]
    what = {"kind": "mnist", "images": FILES[name], "detector": detector.sha256}
    content = store.load(what)
    if content is None:
        running = RunningMoments(detector.dim, device)
        for pixels in load_mnist(split, data)[0].split(500):
            running.update(detector.features(pixels[:, None].to(device)))
        mu, cov = running.result()
        content = {"mu": mu, "cov": cov[np.triu_indices(len(cov))]}
        store.save(what, content)
    return moments_of(content)
