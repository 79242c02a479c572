"""Folders of images against one reference: seed blocks, differences, and what is known of their uncertainty.

Symbols
-------
entry     NAME=PATH or NAME@NFE=PATH: images of one method, sorted by name as upstream's --seeds sorts them
block     `block` consecutive images, made from one set of seeds; fewer images in all are one block
group     of a single block, every g-th image; the jackknife leaves out one group at a time

A FID falls with the number of images, so that only blocks of the same size, and as many of them, are compared. Two
entries whose images have the same names are taken to share seeds, and are compared block by block.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from art_edm.compare.accumulators import KEEP
from art_edm.compare.tables import Row, add_differences, measured
from art_edm.metrics.detectors import Detector
from art_edm.metrics.feature_stats import Measured, measure_images
from art_edm.metrics.frechet import Moments, frechet_distance
from art_edm.metrics.image_folders import ImageSet, lossy_note, open_images
from art_edm.metrics.standard_errors import GROUPS, Measurement
from art_edm.runtime.distributed import World
from art_edm.runtime.progress import Progress
from art_edm.runtime.store import Store

__all__ = ["Entry", "Settings", "blocks_of", "compare", "open_entries", "parse_entries", "pooled"]

_FEW_GROUPS = 10  # of features too many to keep: each group's moments are [d, d]
_METHOD = 1  # raised whenever the same images would get other numbers


class Entry(NamedTuple):
    """One method's images."""

    name: str
    nfe: Optional[int]
    path: str

    @property
    def label(self) -> str:
        """NAME or NAME@NFE."""
        return self.name if self.nfe is None else f"{self.name}@{self.nfe}"


class Settings(NamedTuple):
    """How images become features; only `splits` decides what is computed (0: no Inception score)."""

    batch: int = 64
    workers: int = 2
    splits: int = 0
    quiet: bool = True


def parse_entries(texts: Sequence[str]) -> List[Entry]:
    """NAME=PATH or NAME@NFE=PATH to entries; raises a ValueError for another form or a label given twice."""
    entries: List[Entry] = []
    for text in texts:
        match = re.fullmatch(r"([^=@]+)(?:@([1-9][0-9]*))?=(.+)", text)
        if not match:
            raise ValueError(f"found {text!r}, expected NAME=DIR or NAME@NFE=DIR, such as edm@35=out/edm18")
        name, number, path = match.groups()
        entry = Entry(name.strip(), int(number) if number else None, path)
        if entry.label in [other.label for other in entries]:
            raise ValueError(f"found {entry.label} twice, expected each name once, or once for each NFE; rename one")
        entries.append(entry)
    return entries


def open_entries(entries: Sequence[Entry], block: int, num: Optional[int] = None) -> Tuple[List[ImageSet], int]:
    """The images of every entry, and the number of blocks.

    Args:
        num: how many of the images, the first by name; None takes all.
    Raises:
        ValueError: images that cannot be used, other numbers or sizes of images, or an incomplete block.
    """
    sets = [open_images(entry.path) for entry in entries]
    for images, entry in zip(sets, entries):
        if num is not None and len(images) < num:
            raise ValueError(f"{entry.path}: found {len(images)} images, expected at least {num}; lower --num")
        images.names = images.names[:num]
        if len(images) != len(sets[0]):
            raise ValueError(f"found {len(sets[0])} images in {entries[0].path} and {len(images)} in {entry.path}, "
                             "expected as many: the FID depends on the number; add --num")
        if images.shape != sets[0].shape:
            raise ValueError(f"found {sets[0].first} in {entries[0].path} and {images.first} in {entry.path}, expected "
                             "images of one size and mode; change one of them")
    return sets, blocks_of(len(sets[0]), block)


def blocks_of(count: int, block: int) -> int:
    """Number of blocks in `count` images; raises a ValueError for an incomplete one."""
    if count <= block:
        return 1
    if count % block:
        raise ValueError(f"found {count} images, expected whole blocks of {block}; change --block, or add "
                         f"--num={count - count % block}")
    return count // block


def pooled(parts: Sequence[Tuple[int, Moments]]) -> Moments:
    """Mean and covariance (n - 1) of all images from the number, mean and covariance of each part."""
    counts = np.array([count for count, _ in parts], np.float64)
    means = np.array([mu for _, (mu, _) in parts])  # [parts, d]
    mu = counts @ means / counts.sum()
    apart = (means - mu) * np.sqrt(counts)[:, None]
    scatter = apart.T @ apart
    for count, (_, cov) in parts:
        scatter += (count - 1) * cov
    return mu, scatter / (counts.sum() - 1)


def compare(
    entries: Sequence[Entry], sets: Sequence[ImageSet], blocks: int, detector: Detector, reference: Optional[Moments],
    store: Store, world: World, settings: Settings,
) -> Tuple[List[Row], List[str]]:
    """Score every entry, and its difference to the first name at the same NFE.

    Args:
        entries, sets, blocks: see `open_entries`.
        reference: for the FID; None for the Inception score alone.
        store: keep the statistics of images, so that they are computed once.
    Returns:
        Rows for `tables` and notes for the user; the same on every process.
    """
    rows, fids, notes = [], [], []
    for entry, images in zip(entries, sets):
        folder = _Folder(entry, images, blocks, detector, reference is not None, settings)
        measure = _Measure(folder, store, world)
        row: Row = {"name": entry.name, "nfe": entry.nfe, "path": entry.path, "images": len(images) // blocks,
                    "blocks": blocks}
        if reference is not None:
            fids.append(measure.fid(reference))
            row.update(measured("fid", fids[-1]))
        if settings.splits:
            row.update(measure.inception())
        notes += measure.notes
        rows.append(row)
    if fids:
        first = {row["nfe"]: i for i, row in enumerate(rows) if row["name"] == rows[0]["name"]}
        paired = lambda i, j: list(sets[i].names) == list(sets[j].names)
        add_differences(rows, fids, lambda i: first.get(rows[i]["nfe"]), paired)
    return rows, notes


class _Folder(NamedTuple):
    """The images of one entry and what is asked of them."""

    entry: Entry
    images: ImageSet
    blocks: int
    detector: Detector
    fid: bool
    settings: Settings

    @property
    def groups(self) -> int:
        """For the jackknife; 1 if there is none."""
        groups = GROUPS if self.detector.dim <= KEEP else _FEW_GROUPS
        return 1 if self.blocks > 1 or len(self.images) < 2 * groups else groups

    def subsets(self, groups: int) -> Iterator[range]:
        """Indices of each block, or of each group of the only one."""
        size = len(self.images) // self.blocks
        for block in range(self.blocks):
            yield from (range(block * size + group, (block + 1) * size, groups) for group in range(groups))


class _Measure:
    """The statistics of a folder: those of an earlier run, if the files are the same, or new ones."""

    def __init__(self, folder: _Folder, store: Store, world: World) -> None:
        self.folder, self.store, self.world = folder, store, world
        self.notes = list(folder.images.notes)
        self._files = _fingerprint(folder.images)
        self._lossy: Optional[str] = None  # a note, once the images have been checked
        self._done = 0

    def fid(self, reference: Moments) -> Measurement:
        """FID of every block; without the groups in turn if there is one only."""
        groups = self.folder.groups
        parts = [(len(subset), self._part(subset, 0)) for subset in self.folder.subsets(groups)]
        stats = [(count, _moments(content)) for count, content in parts]
        if groups == 1:
            return Measurement([frechet_distance(*moments, *reference) for _, moments in stats])
        left_out = (pooled(stats[:j] + stats[j + 1 :]) for j in range(groups))  # one at a time: each is [d, d]
        whole = frechet_distance(*pooled(stats), *reference)
        return Measurement([whole], [frechet_distance(*moments, *reference) for moments in left_out])

    def inception(self) -> Row:
        """Inception score of every block."""
        scores = [self._part(subset, self.folder.settings.splits)["score"] for subset in self.folder.subsets(1)]
        row = measured("is", Measurement([float(mean) for mean, _ in scores]))
        return row if len(scores) > 1 else {**row, "is_splits_std": float(scores[0][1])}

    def _part(self, subset: range, splits: int) -> Dict[str, np.ndarray]:
        """Moments (no splits) or Inception score of some of the images."""
        what = {
            "kind": "folder", "method": _METHOD, "files": self._files, "detector": self.folder.detector.sha256,
            "subset": [subset.start, subset.stop, subset.step], "splits": splits,
        }
        with self.world.phase():  # all look before any writes
            content = self.store.load(what)
            if content is None and self._lossy is None:  # headers of all images, before the first is measured
                images = self.folder.images
                self._lossy = lossy_note(images, images.check(range(len(images)))) or ""
        if content is None:
            content = {**_content(self._measured(subset, splits)), "note": np.array(self._lossy)}
            with self.world.phase():
                if self.world.rank == 0:
                    self.store.save(what, content)
        note = str(content["note"])
        self.notes += [note] if note and note not in self.notes else []
        self._done += len(subset)
        return content

    def _measured(self, subset: range, splits: int) -> Measured:
        images, settings = copy.copy(self.folder.images), self.folder.settings
        images.names = [self.folder.images.names[i] for i in subset]
        quiet = settings.quiet or self.world.rank > 0
        progress = _Part(len(self.folder.images), f"{self.folder.entry.label}: images", quiet, self._done)
        try:
            return measure_images(images, self.folder.detector, self.world, not splits, splits, settings.batch,
                                  settings.workers, progress)
        finally:
            progress.close()


class _Part(Progress):
    """Progress of a part that is counted from 0, within the whole."""

    def update(self, done: int, note: str = "") -> None:
        super().update(self.start + done, note)


def _content(result: Measured) -> Dict[str, np.ndarray]:
    if result.moments is None:
        return {"score": np.array(result.score)}
    mu, cov = result.moments
    return {"mu": mu, "cov": cov}


def _moments(content: Dict[str, np.ndarray]) -> Moments:
    return content["mu"], content["cov"]


def _fingerprint(images: ImageSet) -> str:
    """SHA-256 of where the images are and of every file's name, size and time of change."""
    digest = hashlib.sha256(f"{images.path.resolve()} {images.shape}\n".encode("utf-8", "surrogateescape"))
    whole = images.path.is_file()
    if whole:
        digest.update(_stamp(images.path))
    for name in images.names:
        digest.update(f"{name}\n".encode("utf-8", "surrogateescape") + (b"" if whole else _stamp(images.path / name)))
    return digest.hexdigest()


def _stamp(path: Path) -> bytes:
    try:
        found: Any = os.stat(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; check the file") from None
    return f"{found.st_size} {found.st_mtime_ns}\n".encode()
