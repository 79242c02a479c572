"""A panel of metrics and detectors, and what it makes of images.

Symbols
-------
panel         which metrics are asked for, and the detectors they look through
accumulators  those of all metrics for one set of images, one for each group of the jackknife
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Type

import numpy as np
import torch

from art_edm.metrics.detectors import Detector
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.image_folders import ImageSet
from art_edm.metrics.metric import FeatureError, Metric, Scale
from art_edm.metrics.standard_errors import GROUPS, groups_of
from art_edm.runtime.distributed import World
from art_edm.runtime.precision import without_autocast
from art_edm.runtime.progress import Progress

__all__ = ["Accumulators", "Panel", "check_finite", "measure_images"]

Content = Dict[str, np.ndarray]
WIDE = 256  # features, above which a group's moments [d, d] are dear
_FEW_GROUPS = 10  # then


@dataclass(frozen=True)
class Panel:
    """Which metrics are asked for, and the detectors they look through."""

    metrics: Sequence[str] = ()
    detectors: Mapping[str, Detector] = field(default_factory=dict)  # by `Metric.detector`
    splits: int = 10

    @property
    def classes(self) -> List[Type[Metric]]:
        """The metrics' classes, in the order they were asked for."""
        return [METRICS[name] for name in self.metrics]

    @property
    def identity(self) -> List[List[Any]]:
        """All that decides the numbers, for keys in a store."""
        return [[cls.name, self.detectors[cls.detector].sha256, self.splits if cls.output == "probabilities" else 0]
                for cls in self.classes]

    def width(self, cls: Type[Metric]) -> int:
        """Of what the metric's detector gives it."""
        detector = self.detectors[cls.detector]
        return detector.classes if cls.output == "probabilities" else detector.dim

    def groups(self, num: int, blocks: int = 1) -> int:
        """Groups of a set for the jackknife; of wide features only where blocks give no standard error."""
        wide = max((self.width(cls) for cls in self.classes), default=0) > WIDE
        groups = (_FEW_GROUPS if blocks == 1 else 1) if wide else GROUPS
        return groups if num >= 2 * groups else 1

    @without_autocast()
    def outputs(self, pixels: torch.Tensor, labels: Sequence[str]) -> Dict[str, torch.Tensor]:
        """Metric -> what it is given of images uint8 [b, C, H, W]; each detector runs once where it can.

        Raises a FeatureError that names the image (by its label) for which a value is not finite.
        """
        found: Dict[str, torch.Tensor] = {}
        for key, detector in self.detectors.items():
            wanted = sorted({cls.output for cls in self.classes if cls.detector == key})
            values = {name: check_finite(value, labels) for name, value in detector.outputs(pixels, wanted).items()}
            found.update({cls.name: values[cls.output] for cls in self.classes if cls.detector == key})
        return found


class Accumulators:
    """Those of all metrics of a panel for one set of images, one for each group.

    Args:
        num: images of the set.
        groups: 1 for no jackknife.
    """

    def __init__(self, panel: Panel, num: int, groups: int = 1, device: Optional[torch.device] = None) -> None:
        self.panel, self.num, self.groups = panel, num, groups
        self.group = groups_of(num, groups)  # [num]
        scale = lambda cls: Scale(num, panel.width(cls), panel.splits, device or torch.device("cpu"))
        self.of = {cls.name: [cls(scale(cls)) for _ in range(groups)] for cls in panel.classes}

    def update(self, pixels: torch.Tensor, positions: Iterable[int], labels: Sequence[str]) -> None:
        """Take in images uint8 [b, C, H, W] at these positions; their labels are for messages."""
        where = np.asarray(positions)
        for name, values in self.panel.outputs(pixels, labels).items():
            for j, metric in enumerate(self.of[name]):
                rows = np.flatnonzero(self.group[where] == j)
                if len(rows):
                    own = values if self.groups == 1 else values[torch.from_numpy(rows).to(values.device)]
                    metric.update(own, where[rows])

    def content(self) -> Content:
        """All that is kept, under names METRIC/GROUP/ARRAY."""
        return {f"{name}/{j}/{key}": value for name, parts in self.of.items() for j, part in enumerate(parts)
                for key, value in part.content().items()}

    def merge(self, content: Mapping[str, np.ndarray]) -> None:
        """Take in the content of those of other images of the same set."""
        for name, parts in self.of.items():
            for j, part in enumerate(parts):
                start = f"{name}/{j}/"
                part.merge({key[len(start):]: value for key, value in content.items() if key.startswith(start)})


def check_finite(values: torch.Tensor, labels: Sequence[str]) -> torch.Tensor:
    """`values` [b, ...] unchanged, or a FeatureError that names the first image whose values are not finite."""
    good = torch.isfinite(values).flatten(1).all(dim=1)  # [b]
    if not good.all():
        label = labels[int(good.logical_not().nonzero()[0])]
        raise FeatureError(f"{label}: the detector gave NaN or infinite features, expected numbers; check the image "
                           "and the detector")
    return values


def measure_images(
    images: ImageSet, accumulators: Accumulators, world: World, batch: int = 64, workers: int = 2,
    progress: Optional[Progress] = None,
) -> None:
    """Take in all images, this process its share of the batches; then all processes have the whole.

    The batches are the same for any number of processes, so that the detectors round alike.

    Args:
        batch: images per batch.
        workers: threads that read images; 0 reads them between the detectors' runs.
        progress: counts images; process 0 reports its share times the number of processes.
    Raises:
        ImageError, FeatureError: naming the image; on every process.
    """
    ranges = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    mine, done = ranges[world.rank :: world.size], 0
    with world.phase():
        for indices, pixels in images.batches(mine, workers):
            # uint8 [b, C, H, W]; not pinned: what a detector returns is read at once, so that no copy could overlap it
            x = torch.from_numpy(pixels).to(world.device)
            accumulators.update(x, indices, [images.label(i) for i in indices])
            done += len(indices)
            if progress is not None:
                progress.update(min(done * world.size, len(images)))
            world.check()
    if world.size > 1:
        parts, own = world.gather(accumulators.content()), accumulators
        fresh = Accumulators(own.panel, own.num, own.groups, world.device)
        for part in parts:
            fresh.merge(part)
        own.of = fresh.of
