"""Samples of a network on a grid, measured once: every entry is kept, and a killed run continues inside it.

Symbols
-------
entry      (network, grid, solver, seed, block) and what is kept of its images: metrics, or the end points
block      the images of the indices first, ..., first + num - 1; seed 0 is upstream's --seeds=first-(first+num-1)
           on a CPU
end point  where a path ends, float64, not rounded to pixels

Image i of a seed has a random generator of its own, so that it does not depend on the batch or on the number of
processes; a network in float32 still rounds differently in another batch.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch

from art_edm.compare.accumulators import EndPoints, MetricTally, Tally, missing
from art_edm.grids.grid import Grid
from art_edm.metrics.metric import Metric
from art_edm.metrics.panel import Accumulators, Panel
from art_edm.models.denoiser import Denoiser
from art_edm.models.latents import Decode
from art_edm.models.loading import Network
from art_edm.runtime.distributed import World
from art_edm.runtime.errors import Stopped
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.runtime.store import Content, Store
from art_edm.sampling.noise import noise_and_labels
from art_edm.sampling.solvers import Solver, nfe, sample
from art_edm.sampling.weighted import weighted

__all__ = ["Samples", "Scored", "Work", "end_points", "entry", "scored"]

Span = Tuple[int, int]

SAVE_EVERY = 10.0  # s; what a killed run loses at most, beside one batch
_METHOD = 2  # raised whenever the same entry would get other numbers; versions of torch differ by rounding only


@dataclass(frozen=True)
class Samples:
    """What is sampled: `num` images of one network on one grid."""

    network: Network
    grid: Grid
    solver: str
    num: int
    seed: int = 0
    first: int = 0
    weights: Optional[np.ndarray] = None  # [K, K], in place of the solver's

    @property
    def entry(self) -> Union[str, Solver]:
        """What takes the steps."""
        return self.solver if self.weights is None else weighted(self.weights)

    @property
    def what(self) -> Dict[str, Any]:
        """All that decides the images; a network is known by its file's hash, not by its name."""
        return {
            "method": _METHOD, "network": self.network.sha256 or self.network.name, "details": self.network.details,
            "levels": self.grid.values.tolist(), "solver": self.solver, "seed": self.seed, "first": self.first,
            "num": self.num, **({} if self.weights is None else {"weights": self.weights.tolist()}),
        }

    @property
    def evaluations(self) -> int:
        """Evaluations of the denoiser for all images."""
        return self.num * nfe(self.entry, self.grid.num_steps)


@dataclass
class Work:
    """How it is done, which changes no number beyond rounding.

    Args:
        batch: images per evaluation.
        progress: counts the evaluations done, of all processes.
        stop: asked after every step of the solver.
        save_every: seconds between two writings of an unfinished entry.
    """

    store: Store
    world: World
    batch: int = 64
    progress: Optional[Progress] = None
    stop: Optional[GracefulStop] = None
    save_every: float = SAVE_EVERY
    done: float = 0  # evaluations so far
    note: str = ""

    def skip(self, evaluations: float) -> None:
        """Evaluations that an earlier run has done: no part of the rate."""
        self.done += evaluations
        if self.progress is not None:
            self.progress.start += round(evaluations)

    def show(self, more: float = 0) -> None:
        """Show the progress, with `more` evaluations done within a batch."""
        if self.progress is not None:
            self.progress.update(round(self.done + more), self.note)

    def look(self) -> None:
        """Raise Stopped when asked to stop; only within a phase, as the other processes must know."""
        if self.stop is not None and self.stop.requested:
            raise Stopped("stopped; what is done is kept: run the same command again to continue")


class Scored(NamedTuple):
    """What is known of sampled images."""

    of: Dict[str, List[Metric]]  # metric -> its groups
    seconds: float


def scored(
    samples: Samples, panel: Panel, work: Work, groups: int = 1, decode: Optional[Decode] = None
) -> Optional[Scored]:
    """The metrics' accumulators of the images; only on process 0, None on the others.

    Args:
        groups: of the jackknife; see `Panel.groups`.
        decode: see `MetricTally`; the network's file decides it.
    Raises:
        Stopped: it was asked for, or the disk is full; what is done is kept.
        ValueError, NonFiniteOutput: the network, the grid or the detector cannot be used.
    """
    kind = {"kind": "metrics", "panel": panel.identity, "groups": groups, "decoded": decode is not None}
    empty = lambda: Accumulators(panel, samples.num, groups, samples.network.denoiser.device)
    content = entry(samples, kind, lambda: MetricTally(samples.first, empty(), decode), work)
    if content is None:
        return None
    result = empty()
    result.merge(content)
    return Scored(result.of, float(content["seconds"]))


def end_points(samples: Samples, work: Work) -> Optional[np.ndarray]:
    """End points float64 [num, C H W]; only on process 0, None on the others. Raises as `scored`."""
    size = int(np.prod(samples.network.denoiser.img_shape))
    content = entry(samples, {"kind": "end points"}, lambda: EndPoints(samples.first, samples.num, size), work)
    return None if content is None else content["points"]


def entry(samples: Samples, kind: Dict[str, Any], make: Callable[[], Tally], work: Work) -> Optional[Content]:
    """The finished entry, from the store or made now by all processes."""
    what, world, end = {**samples.what, **kind}, work.world, work.done + samples.evaluations
    with world.phase():  # all look before any writes
        content = work.store.load(what)
        tally = make()
        covered = [] if content is not None else _adopt(tally, work.store.parts(what), world)
    if content is None:
        with world.phase():
            _sample(samples, what, tally, covered, work)
        with world.phase():
            if world.rank == 0:
                content = _finish(samples, what, tally, make, work)
    else:
        work.skip(samples.evaluations)
    work.done = end
    work.show()
    return content if world.rank == 0 else None


def _adopt(tally: Tally, parts: List[Tuple[int, Content]], world: World) -> List[Span]:
    """Continue what this process has left, or one of more processes before; returns all that is covered by any part.

    All processes read the same parts and agree on who takes which. Two have an image in common only if a run was
    killed while it took over another's part: then the one with more images counts.
    """
    by_size = sorted(parts, key=lambda part: (-int(np.diff(part[1]["covered"]).sum()), part[0]))
    covered: List[Span] = []
    chosen: Dict[int, Content] = {}
    for rank, content in by_size:
        spans = [(int(a), int(b)) for a, b in content["covered"]]
        if all(missing(covered, a, b) == [(a, b)] for a, b in spans):
            covered += spans
            chosen[rank] = content
    for rank in sorted(chosen):
        if rank % world.size == world.rank:
            tally.merge(chosen[rank])
    return covered


def _shares(samples: Samples, covered: List[Span], work: Work) -> Iterator[range]:
    """What is left of this process's batches; the batches are the same in a run that is continued."""
    end, step = samples.first + samples.num, work.batch * work.world.size
    for start in range(samples.first + work.batch * work.world.rank, end, step):
        for a, b in missing(covered, start, min(start + work.batch, end)):
            yield range(a, b)


def _sample(samples: Samples, what: Dict[str, Any], tally: Tally, covered: List[Span], work: Work) -> None:
    """Make this process's share of the images."""
    denoiser, cost = samples.network.denoiser, nfe(samples.entry, samples.grid.num_steps)
    work.skip(cost * sum(b - a for a, b in covered))
    saved = time.monotonic()
    try:
        for indices in _shares(samples, covered, work):
            began = time.monotonic()
            images = _images(denoiser, samples, indices, work)
            tally.add(indices, images, time.monotonic() - began)
            work.done += cost * len(indices) * work.world.size
            work.show()
            work.look()
            if time.monotonic() - saved >= work.save_every:
                _keep(what, tally, work)
                saved = time.monotonic()
            work.world.check()
    except BaseException:
        _keep(what, tally, work)
        raise
    if work.world.size > 1:
        _keep(what, tally, work)


def _images(denoiser: Denoiser, samples: Samples, indices: range, work: Work) -> torch.Tensor:
    """Images float64 [b, C, H, W] of these indices."""
    share = nfe(samples.entry, samples.grid.num_steps) / samples.grid.num_steps * work.world.size

    def on_step(k: int, sigma: float, x: torch.Tensor) -> None:
        work.show(k * share * len(x))
        work.look()

    with torch.inference_mode():
        noise, labels = noise_and_labels(denoiser, samples.seed, indices)
        return sample(denoiser, noise, samples.grid, samples.entry, labels, on_step=on_step)


def _keep(what: Dict[str, Any], tally: Tally, work: Work) -> None:
    """Write the unfinished entry."""
    with _room():
        work.store.save_part(what, work.world.rank, tally.content())


def _finish(
    samples: Samples, what: Dict[str, Any], tally: Tally, make: Callable[[], Tally], work: Work
) -> Content:
    """Put the processes' parts together in the order of their ranks, and write the entry."""
    if work.world.size > 1:
        tally = make()
        for rank, content in work.store.parts(what):
            if rank < work.world.size:
                tally.merge(content)
    if missing(tally.covered, samples.first, samples.first + samples.num):
        found = f"found not all processes' images in {work.store.folder}"
        raise ValueError(f"{found}; expected a folder that all of them share: change --cache")
    content = tally.finished()
    with _room():
        work.store.save(what, content)
    return content


@contextmanager
def _room() -> Iterator[None]:
    """A full disk is not the end: what the store says of it asks to run again."""
    try:
        yield
    except OSError as error:
        raise Stopped(str(error)) from None
