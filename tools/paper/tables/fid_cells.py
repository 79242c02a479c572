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
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from art_edm.compare.accumulators import moments_of, score_of
from art_edm.compare.sample_cache import Samples, Work, end_points, features
from art_edm.grids.grid import Grid
from art_edm.metrics.detectors import Detector
from art_edm.metrics.end_point import EndPointError, end_point_error
from art_edm.metrics.frechet import Moments, frechet_distance, moments
from art_edm.metrics.mnist import load_mnist
from art_edm.metrics.standard_errors import Measurement, groups_of
from art_edm.models.loading import Network
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.solvers import nfe, supported
from paper.context import Lab
from paper.experiments import Experiment
from paper.tables.latents import Decode, latent_features

__all__ = ["Bench", "Cell", "pooled", "pooled_moments"]

Content = Dict[str, np.ndarray]
FINE_STEPS = 100
_PARTS = 2  # of the Inception score, in each block


class Cell(NamedTuple):
    """A measured cell."""

    value: Measurement
    seconds: float
    error: EndPointError


@dataclass
class Bench:
    """What a table's images are made and judged with; without a reference, by their Inception score."""

    experiment: Experiment
    network: Network
    detector: Detector
    reference: Optional[Moments]
    decode: Optional[Decode]
    lab: Lab
    work: Work

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
        contents = self._contents(grid, self.experiment.solver)
        points, fine = self.points(grid), self.solution
        if points is None:
            return None
        seconds = sum(float(content["seconds"]) for content in contents)
        return Cell(self._value(contents), seconds, end_point_error(points, fine))

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
            contents = self._contents(self.fine(steps), "heun")
            if self.lab.lead:
                found[f"the network's floor (Heun, {steps} steps, NFE {nfe('heun', steps)})"] = self._value(contents)
        if self.experiment.reference == "mnist:train" and self.reference is not None and self.lab.lead:
            content = self._test_set(images)
            count = len(content["features"])
            found[f"{count:,} test images"] = pooled([content], count, self.reference)
        return {name: [value.mean, value.stderr] for name, value in found.items()}

    def _contents(self, grid: Grid, solver: str) -> List[Optional[Content]]:
        """What is kept of each block."""
        splits, contents = _PARTS if self.reference is None else 0, []
        for block in range(self.experiment.blocks):
            samples = Samples(self.network, grid, solver, self.size, self.lab.seed, block * self.size)
            if self.decode is not None:
                contents.append(latent_features(samples, self.detector, self.work, self.decode, splits))
            else:
                contents.append(features(samples, self.detector, self.work, splits))
        return contents

    def _value(self, contents: Sequence[Content]) -> Measurement:
        if self.reference is None:
            return Measurement([score_of(content)[0] for content in contents])
        return pooled(contents, self.size, self.reference)

    def _ends(self, grid: Grid, solver: str) -> Optional[np.ndarray]:
        return end_points(Samples(self.network, grid, solver, self.noises, self.lab.seed), self.work)

    def _test_set(self, images: int) -> Content:
        """Features of the first test images, at most as many as a cell has: a FID depends on their number."""
        what: Dict[str, Any] = {"kind": "mnist test set", "images": images, "detector": self.detector.sha256}
        content = self.lab.store.load(what)
        if content is None:
            parts = load_mnist("test", self.lab.mnist)[0][:images].split(500)
            found = [self.detector.features(part[:, None].to(self.lab.device)).cpu().numpy() for part in parts]
            content = {"features": np.concatenate(found)}
            self.lab.store.save(what, content)
        return content


def pooled(contents: Sequence[Content], size: int, reference: Moments) -> Measurement:
    """FID of all images of blocks of `size` at once, and without each group of them."""
    if "features" in contents[0]:
        every = np.concatenate([content["features"] for content in contents])
        group = groups_of(len(every))
        parts = [every[group != j] for j in range(group.max() + 1)] if len(every) >= 2 * (group.max() + 1) else []
        value = frechet_distance(*moments(every), *reference)
        return Measurement([value], [frechet_distance(*moments(part), *reference) for part in parts])
    counted = [(size, *moments_of(content)) for content in contents]
    value = frechet_distance(*pooled_moments(counted), *reference)
    rest = [counted[:i] + counted[i + 1:] for i in range(len(counted))] if len(counted) > 1 else []
    return Measurement([value], [frechet_distance(*pooled_moments(some), *reference) for some in rest])


def pooled_moments(parts: Sequence[Tuple[int, np.ndarray, np.ndarray]]) -> Moments:
    """Mean and covariance (n - 1) of all from (number, mean, covariance) of each part."""
    total = sum(count for count, _, _ in parts)
    mean = sum(count * mu for count, mu, _ in parts) / total
    scatter = sum((count - 1) * cov + count * np.outer(mu - mean, mu - mean) for count, mu, cov in parts)
    return mean, scatter / (total - 1)
