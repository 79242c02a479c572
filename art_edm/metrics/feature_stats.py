"""Moments and Inception scores of features as they come, of any number of images, on any number of processes.

Symbols
-------
f          features of one batch, [b, d]
n, mean    number of images so far and the mean [d] of their features, float64
scatter    sum over the images of (f - mean)(f - mean)^T, [d, d]; cov = scatter / (n - 1)

Two sets with means m1, m2 have together scatter1 + scatter2 + n1 n2 / (n1 + n2) (m1 - m2)(m1 - m2)^T (Chan, Golub
and LeVeque 1979): unlike the difference of E[f f^T] and mean mean^T, it loses no digits far from zero.
"""

from __future__ import annotations

import math
from typing import List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from art_edm.metrics.detectors import Detector
from art_edm.metrics.frechet import inception_score, plogp
from art_edm.metrics.image_folders import ImageSet
from art_edm.runtime.distributed import World
from art_edm.runtime.progress import Progress

__all__ = ["FeatureError", "Measured", "RunningMoments", "RunningScore", "check_finite", "measure_images"]


class FeatureError(ValueError):
    """Features that cannot be used; the message names the image."""


class RunningMoments:
    """Mean and covariance of features [b, d] given batch by batch; memory d^2, whatever their number."""

    def __init__(self, dim: int, device: Optional[torch.device] = None) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: torch.Tensor) -> None:
        """Add the images with features f [b, d]."""
        f = features.to(self.mean)  # float64, on the same device
        new, total = len(f), self.count + len(f)
        if new == 0:
            return
        mean = f.mean(dim=0)
        shift = mean - self.mean  # [d]
        rows = torch.cat([f - mean, shift[None] * math.sqrt(self.count * new / total)])  # [b + 1, d]
        self.scatter.addmm_(rows.T, rows)
        self.mean += shift * (new / total)
        self.count = total

    def merge(self, world: World) -> RunningMoments:
        """The moments of all processes' images, on each of them."""
        counts = torch.zeros(world.size, dtype=torch.float64, device=self.mean.device)
        counts[world.rank] = self.count
        total = RunningMoments(len(self.mean), self.mean.device)
        total.count = int(world.sum(counts).sum())
        total.mean = world.sum(self.mean * (self.count / max(total.count, 1)))
        shift = self.mean - total.mean
        total.scatter = world.sum(self.scatter + self.count * torch.outer(shift, shift))
        return total

    def result(self) -> Tuple[np.ndarray, np.ndarray]:
        """Mean [d] and covariance [d, d] (n - 1); at least two images."""
        cov = (self.scatter / (self.count - 1)).cpu().numpy()
        return self.mean.cpu().numpy(), (cov + cov.T) / 2  # a matrix product is not symmetric to the last bit


class RunningScore:
    """Inception score of `total` images, given in batches of any order: part j of `splits` has every image i with
    j total // splits <= i < (j + 1) total // splits."""

    def __init__(self, total: int, splits: int = 10) -> None:
        if total < splits:
            raise FeatureError(f"found {total} images, expected at least one per split ({splits}); lower --splits")
        self.edges = np.arange(splits + 1) * total // splits  # [splits + 1]
        self.sums: Optional[np.ndarray] = None  # [splits, k + 1]: of p and, last, of sum_k p log p

    def update(self, probabilities: torch.Tensor, indices: range) -> None:
        """Add the images of these indices, with class probabilities p [b, k]."""
        p = probabilities.double().cpu().numpy()
        rows = np.column_stack([p, plogp(p).sum(axis=1)])  # [b, k + 1]
        if self.sums is None:
            self.sums = np.zeros((len(self.edges) - 1, rows.shape[1]))
        np.add.at(self.sums, np.searchsorted(self.edges, np.asarray(indices), side="right") - 1, rows)

    def merge(self, world: World, classes: int) -> RunningScore:
        """The sums of all processes' images, on each of them."""
        sums = np.zeros((len(self.edges) - 1, classes + 1)) if self.sums is None else self.sums
        total = RunningScore(int(self.edges[-1]), len(self.edges) - 1)
        total.sums = world.sum(torch.tensor(sums, device=world.device)).cpu().numpy()
        return total

    def result(self) -> Tuple[float, float]:
        """Mean and standard deviation over the splits."""
        return inception_score(self.sums[:, :-1], self.sums[:, -1], np.diff(self.edges))


class Measured(NamedTuple):
    """What `measure_images` found: of the metrics that were not asked for, None."""

    moments: Optional[Tuple[np.ndarray, np.ndarray]]  # mean [d], covariance [d, d]
    score: Optional[Tuple[float, float]]  # Inception score, its standard deviation


def check_finite(values: torch.Tensor, names: List[str]) -> torch.Tensor:
    """`values` [b, ...] unchanged, or a FeatureError that names the first image whose values are not finite."""
    good = torch.isfinite(values).flatten(1).all(dim=1)  # [b]
    if not good.all():
        name = names[int(good.logical_not().nonzero()[0])]
        raise FeatureError(f"{name}: the detector gave NaN or infinite features, expected numbers; look at the image "
                           "and the detector")
    return values


def measure_images(
    images: ImageSet, detector: Detector, world: World, fid: bool = True, splits: int = 0, batch: int = 64,
    workers: int = 2, progress: Optional[Progress] = None,
) -> Measured:
    """Run the detector over all images, this process over its share of the batches.

    The batches are the same for any number of processes, so that the detector rounds alike.

    Args:
        fid: compute the moments.
        splits: parts of the Inception score; 0 for none.
        batch: images per batch.
        workers: threads that read images; 0 reads them between the detector's runs.
        progress: counts images; told by process 0, about its share times the number of processes.
    Raises:
        ImageError, FeatureError: naming the image; on every process.
    """
    device = world.device
    moments = RunningMoments(detector.dim if fid else 0, device)
    score = RunningScore(len(images), splits) if splits else None
    ranges = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    mine, done = ranges[world.rank :: world.size], 0
    with world.phase():
        for indices, pixels in images.batches(mine, workers):
            x = torch.from_numpy(pixels).to(device)  # uint8 [b, C, H, W]
            names = [images.label(i) for i in indices]
            if fid:
                moments.update(check_finite(detector.features(x), names))
            if score is not None:
                score.update(check_finite(detector.probabilities(x), names), indices)
            done += len(indices)
            if progress is not None:
                progress.update(min(done * world.size, len(images)))
            world.check()
    return Measured(
        moments.merge(world).result() if fid else None,
        score.merge(world, detector.classes).result() if score is not None else None,
    )
