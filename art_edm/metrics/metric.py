"""The protocol of all metrics: what a metric keeps of images, and how its number and standard error come of that.

Symbols
-------
set        images that are judged together, numbered 0, ..., num - 1: their positions
group      every G-th image of a set; the jackknife leaves out one group at a time
output     what a detector gives: features [b, d] or class probabilities [b, k]
content    named arrays: all that continues an accumulator to the same bytes
reference  named arrays of the data set that a metric compares with; `statistics` of its images

A metric is a subclass of `Metric` in `feature_stats.METRICS`; tables, references and commands know the protocol only.
"""

from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np
import torch

from art_edm.metrics.standard_errors import Measurement

__all__ = ["FeatureError", "Metric", "Scale", "measure", "merged", "paired_distance", "pooled"]

Content = Dict[str, np.ndarray]


class FeatureError(ValueError):
    """Features that cannot be used; the message names the image."""


class Scale(NamedTuple):
    """What an accumulator must know of its set and its detector before it begins."""

    num: int  # images of the set
    width: int  # of the detector's output: d or k
    splits: int = 10  # parts of the Inception score
    device: torch.device = torch.device("cpu")


class Metric:
    """What one metric keeps of some images of a set: an accumulator, and the number that comes of it."""

    name = ""  # of the option --metrics, of references and of a table's fields
    title = ""  # of a table's column
    output = "features"  # what `update` is given
    detector = "detector"  # which of the panel's gives it
    needs_reference = True

    def __init__(self, scale: Scale) -> None:
        self.scale = scale

    def update(self, values: torch.Tensor, positions: np.ndarray) -> None:
        """Take in a detector's output [b, .] for the images at these positions [b] of the set."""
        raise NotImplementedError

    def content(self) -> Content:
        """All that is kept."""
        raise NotImplementedError

    def merge(self, content: Mapping[str, np.ndarray]) -> None:
        """Take in the content of an accumulator of other images; into an empty one, to the same bytes."""
        raise NotImplementedError

    def result(self, reference: Optional[Content] = None) -> float:
        """The metric of all images taken in."""
        raise NotImplementedError

    def statistics(self) -> Content:
        """What `result` of other images needs of these as a reference."""
        raise NotImplementedError

    def details(self) -> Dict[str, float]:
        """Further fields of a table, without the metric's name."""
        return {}

    @classmethod
    def left_out(cls, groups: Sequence["Metric"], reference: Optional[Content]) -> List[float]:
        """The metric without each group in turn; none where there is one group only."""
        if len(groups) == 1:
            return []
        return [merged(_rest(groups, j)).result(reference) for j in range(len(groups))]


def merged(parts: Sequence[Metric]) -> Metric:
    """The accumulator of all images of several."""
    total = type(parts[0])(parts[0].scale)
    for part in parts:
        total.merge(part.content())
    return total


def _rest(parts: Sequence[Metric], j: int) -> List[Metric]:
    return [part for i, part in enumerate(parts) if i != j]


def measure(blocks: Sequence[Sequence[Metric]], reference: Optional[Content] = None) -> Measurement:
    """A metric of each block (a sequence of groups), with the jackknife of a single one."""
    values = [merged(groups).result(reference) for groups in blocks]
    return Measurement(values, blocks[0][0].left_out(blocks[0], reference) if len(blocks) == 1 else ())


def pooled(blocks: Sequence[Sequence[Metric]]) -> List[Metric]:
    """The groups of all blocks as one set: group by group, or the blocks where they have no groups."""
    if len(blocks[0]) == 1:
        return [groups[0] for groups in blocks]
    return [merged(parts) for parts in zip(*blocks)]


def paired_distance(ends: Sequence[Metric], exact: Sequence[Metric]) -> Measurement:
    """A metric of images with others from the same noises as reference; a group is left out of both at once."""
    value = merged(ends).result(merged(exact).statistics())
    left_out = [merged(_rest(ends, j)).result(merged(_rest(exact, j)).statistics())
                for j in range(len(ends) if len(ends) > 1 else 0)]
    return Measurement([value], left_out)
