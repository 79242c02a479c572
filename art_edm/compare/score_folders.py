"""Folders of images against one reference: seed blocks, differences, and what is known of their uncertainty.

Symbols
-------
entry     NAME=PATH or NAME@NFE=PATH: images of one method, in the order of the seeds they are named by, else of names
block     `block` consecutive images, made from one set of seeds; fewer images in all are one block
group     of a single block, every g-th image; the jackknife leaves out one group at a time

A FID falls with the number of images, so that only blocks of the same size, and as many of them, are compared. Two
entries with the same seeds (in the files' stems; folders and extensions do not matter) or the same names are compared
block by block.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from art_edm.compare.tables import Row, add_differences, add_measurements
from art_edm.metrics.image_folders import ImageSet, format_notes, open_images
from art_edm.metrics.metric import Metric
from art_edm.metrics.panel import Accumulators, Panel, measure_images
from art_edm.runtime.context import Context
from art_edm.runtime.progress import Progress
from art_edm.runtime.store import Content

__all__ = ["Entry", "blocks_of", "compare", "open_entries", "parse_entries", "seeds_of", "unpaired"]

_METHOD = 3  # raised whenever the same images would get other numbers


class Entry(NamedTuple):
    """One method's images."""

    name: str
    nfe: Optional[int]
    path: str

    @property
    def label(self) -> str:
        """NAME or NAME@NFE."""
        return self.name if self.nfe is None else f"{self.name}@{self.nfe}"


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
    sets = [by_seed(open_images(entry.path)) for entry in entries]
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


def seeds_of(names: Sequence[str]) -> Optional[List[int]]:
    """The seeds that images are named by, as upstream's scripts name them: DIR/000123.png; None if not all are."""
    found = [re.fullmatch(r"(?:seed)?([0-9]{1,18})", os.path.splitext(os.path.basename(name))[0]) for name in names]
    seeds = [int(match.group(1)) for match in found if match]
    return seeds if len(seeds) == len(set(seeds)) == len(names) else None


def by_seed(images: ImageSet) -> ImageSet:
    """The same images in the order of their seeds, where each has one."""
    seeds = seeds_of(images.names)
    if seeds is not None:
        images.names = [name for _, name in sorted(zip(seeds, images.names))]
    return images


def unpaired(one: ImageSet, base: ImageSet) -> Optional[str]:
    """Why two sets of images are not taken to be made from the same noise, image by image; None if they are."""
    if list(one.names) == list(base.names):
        return None
    for images in (one, base):
        if seeds_of(images.names) is None:
            return f"{images.path} has names that are no seeds, or a seed twice (such as {images.names[0]})"
    other = sorted(set(seeds_of(one.names)) ^ set(seeds_of(base.names)))
    return f"the seeds differ, such as {other[0]}" if other else None


def blocks_of(count: int, block: int) -> int:
    """Number of blocks in `count` images; raises a ValueError for an incomplete one."""
    if count <= block:
        return 1
    if count % block:
        raise ValueError(f"found {count} images, expected whole blocks of {block}; change --block, or add "
                         f"--num={count - count % block}")
    return count // block


def compare(
    entries: Sequence[Entry], sets: Sequence[ImageSet], blocks: int, panel: Panel, references: Dict[str, Content],
    context: Context, workers: int = 2,
) -> Tuple[List[Row], List[str]]:
    """Score every entry, and its difference to the first name at the same NFE.

    Args:
        entries, sets, blocks: see `open_entries`.
        references: of each metric that needs one.
        context: its store keeps the statistics of images, so that they are computed once.
        workers: threads that read images; 0 for none beside the detectors.
    Returns:
        Rows for `tables` and notes for the user; the same on every process.
    """
    rows, found, notes = [], [], []
    for entry, images in zip(entries, sets):
        measurer = _Folder(entry, images, blocks, panel, context, workers)
        row: Row = {"name": entry.name, "nfe": entry.nfe, "path": entry.path, "images": len(images) // blocks,
                    "blocks": blocks}
        found.append(add_measurements(row, measurer.blocks_of_metrics(), references))
        notes += measurer.notes
        rows.append(row)
    first = {row["nfe"]: i for i, row in enumerate(rows) if row["name"] == rows[0]["name"]}
    reason = lambda i, j: unpaired(sets[i], sets[j])
    add_differences(rows, found, lambda i: first.get(rows[i]["nfe"]), reason)
    notes += [f"{row['name']} and {row['difference_to']} are not paired: {row['not_paired']}"
              for row in rows if row.get("not_paired")]
    return rows, notes


class _Folder:
    """The metrics of one entry's images: those of an earlier run, if the files are the same, or new ones."""

    def __init__(
        self, entry: Entry, images: ImageSet, blocks: int, panel: Panel, context: Context, workers: int
    ) -> None:
        self.entry, self.images, self.blocks, self.panel, self.context = entry, images, blocks, panel, context
        self.workers, self.notes, self._formats = workers, list(images.notes), None
        self._files = _fingerprint(images)

    def blocks_of_metrics(self) -> List[Dict[str, List[Metric]]]:
        """Metric -> groups, of each block."""
        size = len(self.images) // self.blocks
        groups = self.panel.groups(size, self.blocks)
        return [self._block(range(i * size, (i + 1) * size), groups).of for i in range(self.blocks)]

    def _block(self, subset: range, groups: int) -> Accumulators:
        world, store = self.context.world, self.context.store
        what = {"kind": "folder", "method": _METHOD, "files": self._files, "panel": self.panel.identity,
                "subset": [subset.start, subset.stop], "groups": groups}
        accumulators = Accumulators(self.panel, len(subset), groups, world.device)
        with world.phase():  # all look before any writes
            content = store.load(what)
            if content is None and self._formats is None:  # headers of all images, before the first is measured
                self._formats = format_notes(self.images, self.images.check(range(len(self.images))))
        if content is None:
            self._measure(accumulators, subset)
            content = {**accumulators.content(), "notes": np.array(self._formats or [], dtype=np.str_)}
            with world.phase():
                if world.rank == 0:
                    store.save(what, content)
        else:
            accumulators.merge(content)
        self.notes += [str(note) for note in content["notes"] if str(note) not in self.notes]
        return accumulators

    def _measure(self, accumulators: Accumulators, subset: range) -> None:
        images, context = copy.copy(self.images), self.context
        images.names = [self.images.names[i] for i in subset]
        quiet = context.quiet or context.world.rank > 0
        progress = _Part(len(self.images), f"{self.entry.label}: images", quiet, subset.start)
        try:
            measure_images(images, accumulators, context.world, context.batch, self.workers, progress)
        finally:
            progress.close()


class _Part(Progress):
    """Progress of a part that is counted from 0, within the whole."""

    def update(self, done: int, note: str = "") -> None:
        super().update(self.start + done, note)


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
