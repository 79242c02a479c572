"""What is kept of sampled images: sums that can be stopped, stored, merged and continued.

Symbols
-------
span       (a, b), the images of the indices a, ..., b - 1
covered    the spans that a tally has seen, ascending and apart
content    named arrays: of a tally, all that continues it to the same bytes; of a finished one, its result
kept       features of at most KEEP dimensions stay as they are, [num, d]; of others the moments are enough
"""

from __future__ import annotations

import math
from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch

from art_edm.metrics.detectors import Detector
from art_edm.metrics.feature_stats import RunningMoments, RunningScore, check_finite
from art_edm.metrics.frechet import moments
from art_edm.sampling.generate import to_pixels

__all__ = ["KEEP", "EndPoints", "FeatureTally", "Tally", "missing", "moments_of", "score_of"]

KEEP = 256  # 10,000 images: 10 MB

Content = Dict[str, np.ndarray]
Span = Tuple[int, int]


def joined(spans: Sequence[Span]) -> List[Span]:
    """Spans in ascending order, adjacent ones as one; none overlap."""
    result: List[Span] = []
    for a, b in sorted(spans):
        if result and result[-1][1] == a:
            result[-1] = (result[-1][0], b)
        else:
            result.append((a, b))
    return result


def missing(covered: Sequence[Span], a: int, b: int) -> List[Span]:
    """The parts of span (a, b) that are not covered."""
    result = []
    for c, d in joined(covered):
        if a < min(c, b):
            result.append((a, min(c, b)))
        a = max(a, d)
    return result + ([(a, b)] if a < b else [])


class Tally:
    """Base class: `num` images from index `first` on, in any order, each once."""

    def __init__(self, first: int, num: int) -> None:
        self.first, self.num = first, num
        self.covered: List[Span] = []
        self.seconds = 0.0

    def add(self, indices: range, images: torch.Tensor, seconds: float) -> None:
        """Take in images [b, C, H, W] of these indices, not clipped, that took so long to make."""
        self._add(indices, images)
        self._cover([(indices.start, indices.stop)], seconds)

    def content(self) -> Content:
        """All that is needed to continue."""
        return {"covered": np.array(self.covered, np.int64).reshape(-1, 2), "seconds": np.float64(self.seconds)}

    def merge(self, content: Content) -> bool:
        """Take in another tally's content; False, and nothing is done, if they have an image in common."""
        spans = [(int(a), int(b)) for a, b in content["covered"]]
        if any(missing(self.covered, a, b) != [(a, b)] for a, b in spans):
            return False
        self._merge(content, spans)
        self._cover(spans, float(content["seconds"]))
        return True

    def finished(self) -> Content:
        """The result, once all images are covered."""
        assert self.covered == [(self.first, self.first + self.num)], self.covered
        return {"seconds": np.float64(self.seconds), **self._finished()}

    def _cover(self, spans: Sequence[Span], seconds: float) -> None:
        self.covered = joined([*self.covered, *spans])
        self.seconds += seconds

    def _add(self, indices: range, images: torch.Tensor) -> None:
        raise NotImplementedError

    def _merge(self, content: Content, spans: Sequence[Span]) -> None:
        raise NotImplementedError

    def _finished(self) -> Content:
        raise NotImplementedError


class _Rows:
    """A row [d] for each image, at its place."""

    def __init__(self, first: int, num: int, dim: int, dtype: type) -> None:
        self.first, self.values = first, np.zeros((num, dim), dtype)

    def put(self, spans: Sequence[Span], rows: np.ndarray) -> None:
        """Set the rows of spans, given one after the other."""
        for a, b in spans:
            self.values[a - self.first : b - self.first], rows = rows[: b - a], rows[b - a :]

    def get(self, spans: Sequence[Span]) -> np.ndarray:
        """The rows of spans, one after the other."""
        parts = [self.values[a - self.first : b - self.first] for a, b in spans]
        return np.concatenate([self.values[:0], *parts])


class EndPoints(Tally):
    """The images themselves, float64 [num, C H W]; finished: `points`."""

    def __init__(self, first: int, num: int, size: int) -> None:
        super().__init__(first, num)
        self._rows = _Rows(first, num, size, np.float64)

    def content(self) -> Content:
        return {**super().content(), "rows": self._rows.get(self.covered)}

    def _add(self, indices: range, images: torch.Tensor) -> None:
        self._rows.put([(indices.start, indices.stop)], images.flatten(1).double().cpu().numpy())

    def _merge(self, content: Content, spans: Sequence[Span]) -> None:
        self._rows.put(spans, content["rows"])

    def _finished(self) -> Content:
        return {"points": self._rows.values}


class FeatureTally(Tally):
    """Features of the images as they would be stored in 8 bits, and class probabilities if `splits` > 0.

    Finished: `features` [num, d] if kept, else `mu` [d] and the upper triangle of `cov`; `score` [2], the Inception
    score and its standard deviation over the splits.
    """

    def __init__(self, first: int, num: int, detector: Detector, device: torch.device, splits: int = 0) -> None:
        super().__init__(first, num)
        self.detector = detector
        kept = detector.dim <= KEEP
        self._rows = _Rows(first, num, detector.dim, np.float32) if kept else None
        self._moments = None if kept else RunningMoments(detector.dim, device)
        self._score = RunningScore(num, splits) if splits else None

    def content(self) -> Content:
        content = super().content()
        if self._rows is not None:
            content["rows"] = self._rows.get(self.covered)
        if self._moments is not None:
            content["mean"], content["scatter"] = self._moments.mean.cpu().numpy(), self._moments.scatter.cpu().numpy()
        if self._score is not None and self._score.sums is not None:
            content["scores"] = self._score.sums
        return content

    def _add(self, indices: range, images: torch.Tensor) -> None:
        pixels = to_pixels(images).reshape(images.shape)  # uint8 [b, C, H, W]
        names = [f"image {i}" for i in indices]
        features = check_finite(self.detector.features(pixels), names)
        if self._rows is not None:
            self._rows.put([(indices.start, indices.stop)], features.float().cpu().numpy())
        if self._moments is not None:
            self._moments.update(features)
        if self._score is not None:
            relative = range(indices.start - self.first, indices.stop - self.first)
            self._score.update(check_finite(self.detector.probabilities(pixels), names), relative)

    def _merge(self, content: Content, spans: Sequence[Span]) -> None:
        if self._rows is not None:
            self._rows.put(spans, content["rows"])
        if self._moments is not None:
            _absorb(self._moments, sum(b - a for a, b in spans), content["mean"], content["scatter"])
        if self._score is not None and "scores" in content:
            self._score.sums = content["scores"] + (0 if self._score.sums is None else self._score.sums)

    def _finished(self) -> Content:
        content: Content = {}
        if self._rows is not None:
            content["features"] = self._rows.values
        if self._moments is not None:
            mu, cov = self._moments.result()
            content.update(mu=mu, cov=cov[np.triu_indices(len(cov))])
        if self._score is not None:
            content["score"] = np.array(self._score.result())
        return content


def _absorb(own: RunningMoments, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    """Add the moments of other images (`feature_stats` has the formula); into an empty one, to the same bytes."""
    total = own.count + count
    if total == 0:
        return
    other, shared = torch.from_numpy(mean).to(own.mean), torch.from_numpy(scatter).to(own.scatter)
    shift = other - own.mean
    own.mean = other.clone() if own.count == 0 else own.mean + shift * (count / total)
    rows = shift[None] * math.sqrt(own.count * count / total)
    own.scatter = own.scatter + shared + rows.T @ rows
    own.count = total


def moments_of(content: Content) -> Tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of a finished `FeatureTally`."""
    if "features" in content:
        return moments(content["features"])
    mu = content["mu"]
    cov = np.zeros((len(mu), len(mu)))
    cov[np.triu_indices(len(mu))] = content["cov"]
    return mu, cov + np.triu(cov, 1).T


def score_of(content: Content) -> Tuple[float, float]:
    """Inception score of a finished `FeatureTally` and its standard deviation over the splits."""
    return float(content["score"][0]), float(content["score"][1])
