"""The metrics, as features come in: FID and FD-DINOv2 by moments, KID by features, the Inception score by sums.

Symbols
-------
f          features of one batch, [b, d]
n, mean    number of images so far and the mean [d] of their features, float64
scatter    sum over the images of (f - mean)(f - mean)^T, [d, d]; cov = scatter / (n - 1)
k          kernel of KID, (x . y / d + 1)^3

Two sets with means m1, m2 have together scatter1 + scatter2 + n1 n2 / (n1 + n2) (m1 - m2)(m1 - m2)^T (Chan, Golub
and LeVeque 1979): unlike the difference of E[f f^T] and mean mean^T, it loses no digits far from zero.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, Optional, Sequence, Tuple, Type

import numpy as np
import torch

from art_edm.metrics.frechet import frechet_distance, inception_score, plogp
from art_edm.metrics.metric import FeatureError, Metric, Scale, merged
from art_edm.metrics.standard_errors import GROUPS, groups_of

__all__ = ["FdDino", "Fid", "InceptionScore", "Kid", "METRICS", "RunningMoments", "register"]

Content = Dict[str, np.ndarray]
_KERNEL_ROWS = 2048  # of the kernel's matrix at a time


METRICS: Dict[str, Type[Metric]] = {}


def register(metric: Type[Metric]) -> Type[Metric]:
    """Class decorator: make a metric known by its name."""
    METRICS[metric.name] = metric
    return metric


class RunningMoments:
    """Mean and covariance of features [b, d] given batch by batch; memory d^2, whatever their number."""

    def __init__(self, dim: int, device: Optional[torch.device] = None) -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # only the upper triangle counts

    def update(self, features: torch.Tensor) -> None:
        """Add the images with features f [b, d]."""
        f = features.to(self.mean)  # float64, on the same device
        if len(f):
            mean = f.mean(dim=0)
            self.add(len(f), mean, (f - mean).T @ (f - mean))

    def add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """Add other images by their moments; to empty ones, to the same bytes."""
        total = self.count + count
        if total == 0:
            return
        shift = mean.to(self.mean) - self.mean  # [d]
        self.scatter += scatter.to(self.scatter)
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def result(self) -> Tuple[np.ndarray, np.ndarray]:
        """Mean [d] and covariance [d, d] (n - 1); at least two images."""
        upper = self.scatter.triu().cpu().numpy()
        return self.mean.cpu().numpy(), (upper + np.triu(upper, 1).T) / (self.count - 1)


@register
class Fid(Metric):
    """Frechet distance of the features' Gaussian to the reference's."""

    name, title = "fid", "FID"

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.moments = RunningMoments(scale.width, scale.device)

    def update(self, values: torch.Tensor, positions: np.ndarray) -> None:
        self.moments.update(values)

    def content(self) -> Content:
        own = self.moments
        upper = own.scatter[_triangle(len(own.mean), own.mean.device)]
        return {"count": np.int64(own.count), "mean": own.mean.cpu().numpy(), "scatter": upper.cpu().numpy()}

    def merge(self, content: Mapping[str, np.ndarray]) -> None:
        full = torch.zeros_like(self.moments.scatter)
        full[_triangle(len(full), full.device)] = torch.from_numpy(content["scatter"]).to(full)
        self.moments.add(int(content["count"]), torch.from_numpy(content["mean"]), full)

    def result(self, reference: Optional[Content] = None) -> float:
        return frechet_distance(*self.moments.result(), reference["mu"], reference["sigma"])

    def statistics(self) -> Content:
        return dict(zip(("mu", "sigma"), self.moments.result()))


@register
class FdDino(Fid):
    """The same of DINOv2's features."""

    name, title, detector = "fd_dinov2", "FD-DINOv2", "dinov2"


@register
class InceptionScore(Metric):
    """Mean over `splits` parts of the Inception score: part j has the positions from j num // splits on."""

    name, title, output, needs_reference = "is", "IS", "probabilities", False

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        if scale.num < scale.splits:
            raise FeatureError(f"found {scale.num} images, expected at least one per split ({scale.splits}); lower "
                               "--splits")
        self.edges = np.arange(scale.splits + 1) * scale.num // scale.splits  # [splits + 1]
        self.sums = np.zeros((scale.splits, scale.width + 2))  # of p, of sum_k p log p, and the number of images

    def update(self, values: torch.Tensor, positions: np.ndarray) -> None:
        p = values.double().cpu().numpy()
        rows = np.column_stack([p, plogp(p).sum(axis=1), np.ones(len(p))])
        np.add.at(self.sums, np.searchsorted(self.edges, positions, side="right") - 1, rows)

    def content(self) -> Content:
        return {"sums": self.sums}

    def merge(self, content: Mapping[str, np.ndarray]) -> None:
        self.sums = self.sums + content["sums"]

    def result(self, reference: Optional[Content] = None) -> float:
        return self._scores()[0]

    def details(self) -> Dict[str, float]:
        return {"splits_std": self._scores()[1]}

    def _scores(self) -> Tuple[float, float]:
        used = self.sums[self.sums[:, -1] > 0]
        return inception_score(used[:, :-2], used[:, -2], used[:, -1])


@register
class Kid(Metric):
    """Squared maximum mean discrepancy by the polynomial kernel, without bias: for hundreds of images."""

    name, title = "kid", "KID"

    def __init__(self, scale: Scale) -> None:
        super().__init__(scale)
        self.parts: List[Tuple[np.ndarray, np.ndarray]] = []  # positions [b] and features [b, d]

    def update(self, values: torch.Tensor, positions: np.ndarray) -> None:
        self.parts.append((np.asarray(positions), values.float().cpu().numpy()))

    def content(self) -> Content:
        empty = np.zeros(0, np.int64), np.zeros((0, self.scale.width), np.float32)
        positions, features = (np.concatenate(part) for part in zip(empty, *self.parts))
        order = np.argsort(positions, kind="stable")
        return {"positions": positions[order], "features": features[order]}

    def merge(self, content: Mapping[str, np.ndarray]) -> None:
        self.parts.append((content["positions"], content["features"]))

    def result(self, reference: Optional[Content] = None) -> float:
        x, y = self.content()["features"], reference["features"]
        if np.array_equal(x, y):
            return 0.0  # the same images: across pairs too, none is taken with itself
        return _unbiased(kernel_sums([x])[0, 0], len(x), _self_mean(y), kernel_sums([x], [y])[0, 0] / len(x) / len(y))

    def statistics(self) -> Content:
        return {"features": self.content()["features"]}

    @classmethod
    def left_out(cls, groups: Sequence[Metric], reference: Optional[Content]) -> List[float]:
        """By sums of the kernel between twentieths of the images, each needed once; whatever `groups` there are."""
        every, y = merged(groups).content()["features"], reference["features"]
        if len(every) < 2 * GROUPS:
            return []
        x = [every[groups_of(len(every)) == j] for j in range(GROUPS)]
        counts = np.array([len(part) for part in x])
        within, across, mean = kernel_sums(x), kernel_sums(x, [y])[:, 0], _self_mean(y)
        found = []
        for j, count in enumerate(counts.sum() - counts):
            rest = np.arange(len(x)) != j
            found.append(_unbiased(within[np.ix_(rest, rest)].sum(), count, mean, across[rest].sum() / count / len(y)))
        return found


def kernel_sums(x: Sequence[np.ndarray], y: Optional[Sequence[np.ndarray]] = None) -> np.ndarray:
    """Sums of k between the features of each pair of parts, [parts, parts]; without y, of x with x but for i = i."""
    x = [part.astype(np.float64) / part.shape[1] ** 0.5 for part in x]
    y = x if y is None else [part.astype(np.float64) / part.shape[1] ** 0.5 for part in y]
    sums = np.zeros((len(x), len(y)))
    for i, one in enumerate(x):
        for j, other in enumerate(y):
            for rows in np.split(one, range(_KERNEL_ROWS, len(one), _KERNEL_ROWS)):
                sums[i, j] += ((rows @ other.T + 1) ** 3).sum()
        if y is x:
            sums[i, i] -= ((np.square(one).sum(axis=1) + 1) ** 3).sum()
    return sums


def _self_mean(y: np.ndarray) -> float:
    return kernel_sums([y])[0, 0] / (len(y) * (len(y) - 1))


def _unbiased(within: float, count: int, of_reference: float, across: float) -> float:
    return float(within / (count * (count - 1)) + of_reference - 2 * across)


def _triangle(dim: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    rows, columns = torch.triu_indices(dim, dim, device=device)
    return rows, columns
