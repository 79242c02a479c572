"""A comparison of grids: which are sampled, how often, and how they score.

Symbols
-------
cell        one grid, number of steps and solver
block       `num` images of a cell; block b has the indices b num, ..., (b + 1) num - 1 of the seed
difference  of a cell's FID to that of the first grid in as many steps by the same solver, from the same noise; by
            "weights", those of a grid's own, to that by the first solver; of the first grid to that by the first
            solver of as many evaluations
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from art_edm.compare.accumulators import as_pixels
from art_edm.compare.sample_cache import Samples, Work, end_points, scored
from art_edm.compare.tables import Row, add_differences, add_measurements, fields
from art_edm.grids.weights import WEIGHTS
from art_edm.metrics.end_point import end_point_error
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.metric import Metric, measure, paired_distance, pooled
from art_edm.metrics.mnist import FILES, load_mnist
from art_edm.metrics.panel import Accumulators, Panel
from art_edm.metrics.standard_errors import Measurement
from art_edm.models.latents import Decode
from art_edm.models.loading import Network
from art_edm.runtime.store import Content, Store
from art_edm.sampling.baselines import Choice, hand_made
from art_edm.sampling.solvers import nfe, supported

__all__ = ["Fine", "Plan", "mnist_reference", "score", "true_images"]


class Fine(NamedTuple):
    """The fine solution that end points are compared with, from the first `noises` of each block."""

    noises: int = 256
    num_steps: int = 200
    solver: str = "heun"


@dataclass(frozen=True)
class Plan:
    """A comparison; without a panel only end points are compared, by their features too if it has no references.

    Without `fine` there are no end points.
    """

    network: Network
    choices: Sequence[Choice]
    solvers: Sequence[str] = ("heun",)
    num: int = 50_000
    blocks: int = 1
    seed: int = 0
    panel: Optional[Panel] = None
    references: Mapping[str, Content] = field(default_factory=dict)  # of each metric that needs one
    fine: Optional[Fine] = None
    decode: Optional[Decode] = None  # of a network that makes latents

    @property
    def image_shape(self) -> Tuple[int, int, int]:
        """(C, H, W) of what the detectors see."""
        shape = self.network.denoiser.img_shape
        if self.decode is None:
            return shape
        return tuple(self.decode(torch.zeros(1, *shape, device=self.network.denoiser.device)).shape[1:])

    @property
    def scores(self) -> bool:
        """Whether images are scored, and not only end points compared."""
        return self.panel is not None and all(
            name in self.references or not METRICS[name].needs_reference for name in self.panel.metrics)

    def samples(self, choice: Choice, solver: str, block: int, num: Optional[int] = None) -> Samples:
        """What is sampled for one block."""
        weights = choice.weights() if solver == WEIGHTS else None
        return Samples(self.network, choice.grid, solver, num or self.num, self.seed, block * self.num, weights)

    @property
    def fine_grid(self) -> Choice:
        """EDM's rule in many steps."""
        return Choice("edm", hand_made(self.network.denoiser, self.fine.num_steps)["edm"], "rule")

    @property
    def cells(self) -> Iterator[Tuple[Choice, str]]:
        """Every cell; with the solver "weights" the grids that have some."""
        return ((choice, solver) for solver in self.solvers for choice in self.choices
                if solver != WEIGHTS or choice.weights() is not None)

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser, if none is done yet."""
        images = self.num if self.scores else 0
        images += self.fine.noises if self.fine else 0
        count = sum(images * _evaluations(choice, solver) for choice, solver in self.cells)
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
    rows, found, count = [], [], len(list(plan.cells))
    for i, (choice, solver) in enumerate(plan.cells):
        work.note = f"{choice.name} {choice.grid.num_steps} {solver} ({i + 1} of {count})"
        row = _described(plan, choice, solver)
        if plan.scores:
            found.append(_images(plan, choice, solver, work, row))
        if plan.fine is not None:
            row.update(_error(plan, choice, solver, work))
        rows.append(row)
    if work.world.rank > 0:
        return []
    if found:
        key = lambda row: (row["steps"], plan.solvers[0] if row["solver"] == WEIGHTS else row["solver"])
        last_to_first = list(reversed(list(enumerate(rows))))
        first = {key(row): i for i, row in last_to_first}
        of_budget = {row["nfe"]: i for i, row in last_to_first}
        base = lambda i: of_budget[rows[i]["nfe"]] if first[key(rows[i])] == i else first[key(rows[i])]
        add_differences(rows, found, base, lambda i, j: None)
    return rows


def _check_fine(plan: Plan) -> None:
    try:
        supported(plan.network.denoiser, plan.fine_grid.grid)
    except ValueError as error:
        raise ValueError(f"the fine solution in {plan.fine.num_steps} steps: {error}; change --error-steps") from None


def _evaluations(choice: Choice, solver: str) -> int:
    return choice.grid.num_steps if solver == WEIGHTS else nfe(solver, choice.grid.num_steps)


def _described(plan: Plan, choice: Choice, solver: str) -> Row:
    steps, evaluations = choice.grid.num_steps, _evaluations(choice, solver)
    return {
        "name": choice.name, "origin": choice.origin, "steps": steps, "solver": solver, "nfe": evaluations,
        "network_calls": evaluations * plan.network.denoiser.networks,
        "images": plan.num if plan.scores else plan.fine.noises, "blocks": plan.blocks,
        "levels": choice.grid.values.tolist(),
    }


def _images(plan: Plan, choice: Choice, solver: str, work: Work, row: Row) -> Dict[str, Measurement]:
    """The metrics of all blocks, put into the row too; nothing on processes other than 0."""
    groups = plan.panel.groups(plan.num, plan.blocks)
    blocks = [scored(plan.samples(choice, solver, block), plan.panel, work, groups, plan.decode)
              for block in range(plan.blocks)]
    if work.world.rank > 0:
        return {}
    row["seconds"] = sum(block.seconds for block in blocks)
    return add_measurements(row, [block.of for block in blocks], plan.references)


def _error(plan: Plan, choice: Choice, solver: str, work: Work) -> Row:
    """End-point error over the first noises of all blocks, in pixels and in the features of every metric."""
    ends = [_Ends(plan, plan.samples(choice, solver, block, plan.fine.noises)) for block in range(plan.blocks)]
    exact = [_Ends(plan, plan.samples(plan.fine_grid, plan.fine.solver, block, plan.fine.noises))
             for block in range(plan.blocks)]
    points = [[end_points(each.samples, work) for each in side] for side in (ends, exact)]
    if work.world.rank > 0:
        return {}
    result = end_point_error(*map(np.concatenate, points))
    row = {**{f"error_{name}": value for name, value in result._asdict().items()},
           "error_noises": plan.fine.noises * plan.blocks}
    if plan.panel is None:
        return row
    own, true = ([each.metrics(found, work) for each, found in zip(side, part)]
                 for side, part in zip((ends, exact), points))
    for name in own[0]:
        mine, theirs = (pooled([block[name] for block in side]) for side in (own, true))
        row.update(fields(f"{name}_to_exact", paired_distance(mine, theirs)))
        if name in plan.references:
            row.update(fields(f"{name}_of_exact", measure([block[name] for block in true], plan.references[name])))
    return row


class _Ends(NamedTuple):
    """The end points of one block."""

    plan: Plan
    samples: Samples

    def metrics(self, points: np.ndarray, work: Work) -> Dict[str, List[Metric]]:
        """Metric -> groups, of those that compare two sets of images; kept. points float64 [num, C H W]."""
        network, panel = self.samples.network, self.plan.panel
        panel = replace(panel, metrics=[name for name in panel.metrics if METRICS[name].needs_reference])
        groups = panel.groups(len(points))
        accumulators = Accumulators(panel, len(points), groups, network.denoiser.device)
        what = {**self.samples.what, "kind": "metrics of end points", "panel": panel.identity, "groups": groups,
                "decoded": self.plan.decode is not None}

        def made() -> Content:
            found = Accumulators(panel, len(points), groups, network.denoiser.device)
            images = torch.from_numpy(points).reshape(-1, *network.denoiser.img_shape)
            for i, part in enumerate(images.split(work.batch)):
                positions = range(i * work.batch, i * work.batch + len(part))
                pixels = (self.plan.decode or as_pixels)(part.to(network.denoiser.device))
                found.update(pixels, positions, [f"end point {self.samples.first + j}" for j in positions])
            return found.content()

        accumulators.merge(work.store.memo(what, made))
        return accumulators.of


def mnist_reference(
    split: str, panel: Panel, device: torch.device, store: Store, data: Any = None
) -> Dict[str, Content]:
    """Metric -> statistics of MNIST's `split` (train or test), kept in `store`.

    Args:
        data: folder with the four files; None downloads them once.
    Raises:
        ValueError, ConnectionError: as `load_mnist`.
    """
    name = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}[split]
    panel = replace(panel, metrics=[name for name in panel.metrics if METRICS[name].needs_reference])
    what = {"kind": "mnist", "images": FILES[name]}
    num = {"train": 60_000, "test": 10_000}[split]
    images = lambda: load_mnist(split, data)[0][:, None]
    found = true_images(what, images, num, panel, device, store)
    return {name: groups[0].statistics() for name, groups in found.of.items()}


def true_images(
    what: Dict[str, Any], images: Callable[[], torch.Tensor], num: int, panel: Panel, device: torch.device,
    store: Store, groups: int = 1,
) -> Accumulators:
    """What a panel keeps of `num` images of a data set, in `store`.

    Args:
        what: tells these images from all others.
        images: gives them, uint8 [num, C, H, W]; not called where they are known.
        groups: of images left out together for a standard error.
    """

    def made() -> Content:
        found = Accumulators(panel, num, groups, device)
        for i, part in enumerate(images().split(500)):
            where = range(500 * i, 500 * i + len(part))
            found.update(part.to(device), where, [f"{what['kind']} {j}" for j in where])
        return found.content()

    accumulators = Accumulators(panel, num, groups, device)
    accumulators.merge(store.memo({**what, "panel": panel.identity}, made))
    return accumulators
