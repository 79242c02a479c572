"""What is kept of sampled images: sums that can be stopped, stored, merged and continued.

Symbols
-------
span       (a, b), the images of the indices a, ..., b - 1
covered    the spans that a tally has seen, ascending and apart
content    named arrays: of a tally, all that continues it to the same bytes; of a finished one, its result
"""

from __future__ import annotations

from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

from art_edm.metrics.panel import Accumulators
from art_edm.models.latents import Decode
from art_edm.sampling.generate import to_pixels

__all__ = ["EndPoints", "MetricTally", "Tally", "as_pixels", "missing"]

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


class EndPoints(Tally):
    """The images themselves, float64 [num, C H W]; finished: `points`."""

    def __init__(self, first: int, num: int, size: int) -> None:
        super().__init__(first, num)
        self._points = np.zeros((num, size))

    def content(self) -> Content:
        parts = [self._points[a - self.first : b - self.first] for a, b in self.covered]
        return {**super().content(), "rows": np.concatenate([self._points[:0], *parts])}

    def _add(self, indices: range, images: torch.Tensor) -> None:
        self._put([(indices.start, indices.stop)], images.flatten(1).double().cpu().numpy())

    def _merge(self, content: Content, spans: Sequence[Span]) -> None:
        self._put(spans, content["rows"])

    def _put(self, spans: Sequence[Span], rows: np.ndarray) -> None:
        for a, b in spans:
            self._points[a - self.first : b - self.first], rows = rows[: b - a], rows[b - a :]

    def _finished(self) -> Content:
        return {"points": self._points}


class MetricTally(Tally):
    """All metrics of a panel, of the images as they would be stored in 8 bits; finished: what continues them.

    Args:
        accumulators: empty ones, for `num` images.
        decode: images [b, C, H, W] of the network to pixels uint8 [b, c, h, w]; `to_pixels` for those of pixels.
    """

    def __init__(self, first: int, accumulators: Accumulators, decode: Optional[Decode] = None) -> None:
        super().__init__(first, accumulators.num)
        self.accumulators, self.decode = accumulators, decode or as_pixels

    def content(self) -> Content:
        return {**super().content(), **self.accumulators.content()}

    def _add(self, indices: range, images: torch.Tensor) -> None:
        positions = [i - self.first for i in indices]
        self.accumulators.update(self.decode(images), positions, [f"image {i}" for i in indices])

    def _merge(self, content: Content, spans: Sequence[Span]) -> None:
        self.accumulators.merge(content)

    def _finished(self) -> Content:
        return self.accumulators.content()


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    """Images [b, C, H, W] in [-1, 1] as uint8 of the same shape."""
    return to_pixels(images).reshape(images.shape)
