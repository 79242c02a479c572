"""One cell of a table of images: sampled, scored, and set against a fine solution.

Symbols
-------
cell       one grid, number of steps and solver; its images are those of all blocks
pooled     the FID of all images of a cell at once: its bias is that of their whole number, as in the paper
group      images left out together for the standard error: every 20th where features are kept, else a block
IS         mean over blocks, each in 2 parts: for 5 blocks of 10,000 just the usual 10 parts of 5,000
fine       100 steps of Heun's method on EDM's rule, from the same noises
floor      the network's own score: as many images as a cell has, on a grid fine enough
yardstick  what a score is held against: the floor, and images of the test set against the training set
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch

from art_edm.compare.sample_cache import Samples, Scored, Work, end_points, scored
from art_edm.compare.score_grids import true_images
from art_edm.grids.grid import Grid
from art_edm.metrics.detectors import Detector
from art_edm.metrics.end_point import EndPointError, end_point_error
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.metric import measure, pooled
from art_edm.metrics.panel import Panel
from art_edm.metrics.standard_errors import Measurement
from art_edm.models.latents import Decode
from art_edm.models.loading import Network
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.solvers import nfe, supported
from paper.context import Lab
from paper.experiments import Experiment

__all__ = ["Bench", "Cell"]

Content = Dict[str, np.ndarray]
FINE_STEPS = 100
TEST_IMAGES = 10_000  # of MNIST and of CIFAR-10


class Cell(NamedTuple):
    """A measured cell."""

    value: Measurement  # of the panel's first metric
    seconds: float
    error: EndPointError
    others: Mapping[str, Measurement] = {}  # of the panel's further metrics


@dataclass
class Bench:
    """What a table's images are made and judged with; the panel's first metric is the table's."""

    experiment: Experiment
    network: Network
    panel: Panel
    references: Mapping[str, Content]  # of each metric that needs one
    decode: Optional[Decode]
    lab: Lab
    work: Work

    @property
    def detector(self) -> Detector:
        """The first metric's."""
        return self.panel.detectors[METRICS[self.panel.metrics[0]].detector]

    @property
    def size(self) -> int:
        """Images of each block."""
        return max(2, (self.lab.num or self.experiment.num) // self.experiment.blocks)

    @property
    def noises(self) -> int:
        """Of the end-point errors; the first of the images'."""
        return min(self.experiment.noises, self.size)

    def evaluations(self, steps: Sequence[int], rows: int) -> int:
        """Of the denoiser for `rows` grids of each number of steps, for the fine solution and for the floor."""
        images, solver, floor = self.size * self.experiment.blocks, self.experiment.solver, self.experiment.floor
        count = rows * (images + self.noises) * sum(nfe(solver, k) for k in steps)
        return count + self.noises * nfe("heun", FINE_STEPS) + (images * nfe("heun", floor) if floor else 0)

    def cell(self, grid: Grid) -> Optional[Cell]:
        """Score and end-point error of a grid; on process 0 only, None on the others."""
        blocks = self._blocks(grid, self.experiment.solver)
        points, fine = self.points(grid), self.solution
        if points is None:
            return None
        seconds = sum(block.seconds for block in blocks)
        others = {name: self._value(blocks, name) for name in self.panel.metrics[1:]}
        return Cell(self._value(blocks), seconds, end_point_error(points, fine), others)

    def points(self, grid: Grid) -> Optional[np.ndarray]:
        """End points of the first noises, float64 [noises, C H W]; on process 0 only."""
        return self._ends(grid, self.experiment.solver)

    @cached_property
    def solution(self) -> Optional[np.ndarray]:
        """End points of the fine solution; on process 0 only."""
        return self._ends(self.fine(FINE_STEPS), "heun")

    def fine(self, num_steps: int) -> Grid:
        """EDM's rule in many steps."""
        return supported(self.network.denoiser, hand_made(self.network.denoiser, num_steps)["edm"])

    def yardsticks(self) -> Dict[str, List[Optional[float]]]:
        """Name -> [value, standard error]; on process 0 only, where the experiment asks for a floor."""
        found: Dict[str, Measurement] = {}
        steps, images = self.experiment.floor, self.size * self.experiment.blocks
        if steps:
            self.work.note = "floor"
            blocks = self._blocks(self.fine(steps), "heun")
            if self.lab.lead:
                found[f"the network's floor (Heun, {steps} steps, NFE {nfe('heun', steps)})"] = self._value(blocks)
        name, _, split = self.experiment.reference.partition(":")
        if split and self.references and self.lab.lead:
            found[f"{min(images, TEST_IMAGES):,} test images"] = self._test_set(f"{name}:test", images)
        return {name: [value.mean, value.stderr] for name, value in found.items()}

    def _blocks(self, grid: Grid, solver: str) -> List[Optional[Scored]]:
        """What is known of each block's images; None on processes other than 0."""
        groups = self.panel.groups(self.size, self.experiment.blocks)
        return [scored(Samples(self.network, grid, solver, self.size, self.lab.seed, block * self.size), self.panel,
                       self.work, groups, self.decode) for block in range(self.experiment.blocks)]

    def _value(self, blocks: Sequence[Scored], name: Optional[str] = None) -> Measurement:
        """A metric (the first) of all blocks: the Inception score as their mean, others of all images at once."""
        name = name or self.panel.metrics[0]
        parts = [block.of[name] for block in blocks]
        if name not in self.references:
            return measure(parts)
        return measure([pooled(parts)], self.references[name])

    def _ends(self, grid: Grid, solver: str) -> Optional[np.ndarray]:
        return end_points(Samples(self.network, grid, solver, self.noises, self.lab.seed), self.work)

    def _test_set(self, name: str, images: int) -> Measurement:
        """As many test images as a cell has, if there are, as a FID depends on it; evenly spaced: not of one class."""
        count, metric = min(images, TEST_IMAGES), self.panel.metrics[0]

        def pixels() -> torch.Tensor:
            every = self.lab.true_images(name)
            return every[torch.arange(count) * len(every) // count]

        what = {**self.lab.identity_of(name), "evenly spaced": count}
        found = true_images(what, pixels, count, self.panel, self.lab.device, self.lab.store, self.panel.groups(count))
        return measure([found.of[metric]], self.references[metric])
