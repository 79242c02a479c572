"""Images of a folder or a zip, as EDM's `ImageFolderDataset` finds, orders and chooses them.

Symbols
-------
name       path of an image relative to the folder, or its name in the zip; images are sorted by it
pixels     uint8 [C, H, W], C = 1 (grey) or 3 (RGB), the same for all images

Unlike there, nothing is converted silently: palettes, alpha channels and 16 bits are refused, and a PNG must be
whole (its checksums are verified). Files inside hidden folders and `__MACOSX` are no images. Whatever a file is named,
only `FORMATS` are decoded: others (PostScript) are programs.
"""

from __future__ import annotations

import io
import os
import re
import struct
import zipfile
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from art_edm.runtime.files import PathLike, file_kind

__all__ = ["Header", "ImageError", "ImageSet", "choose", "format_notes", "header_of", "open_images", "pixels_of"]

CHANNELS = {"L": 1, "RGB": 3}
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")
FORMATS = ("PNG", "BMP", "PPM", "TIFF", "GIF", "TGA", "JPEG", "WEBP", "JPEG2000")
TRANSPARENT = "PNG with a transparent colour"
HEAD = 4096  # bytes that hold the header of nearly every PNG
MAX_PIXELS = 2**27  # 384 MB as RGB
MAX_BYTES, MAX_RATIO = 2**30, 200  # of one file in a zip; the ratio counts above 16 MB
PNG, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


class ImageError(ValueError):
    """Images that cannot be used; one line that names the file."""


class Header(NamedTuple):
    """What an image file says of itself."""

    format: str  # PIL's name, or TRANSPARENT
    mode: str  # PIL's name; PNGs of 16 bits have ";16" added
    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height} {self.mode}"


class ImageSet:
    """Images by index: `names`, `shape` (C, H, W), and `load(i)` -> pixels."""

    def __init__(self, path: PathLike, names: Sequence[str], archive: Optional[zipfile.ZipFile] = None) -> None:
        self.path, self.names, self._archive = Path(path), list(names), archive
        self.notes: List[str] = []  # what the user should know, without it being an error
        self.first = self.header(0)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> Tuple[int, int, int]:
        """(C, H, W) of every image."""
        return CHANNELS[self.first.mode], self.first.height, self.first.width

    def label(self, i: int) -> str:
        """The image's name with that of the folder or zip, for messages."""
        return str(self.path / self.names[i]).encode("utf-8", "replace").decode()

    def read(self, i: int, size: int = -1) -> bytes:
        """The file's first `size` bytes, or all."""
        try:
            if self._archive is None:
                with open(self.path / self.names[i], "rb") as file:
                    return file.read(size)
            with self._archive.open(self.names[i]) as file:
                return file.read(size)
        except OSError as error:
            raise ImageError(f"cannot read {self.label(i)}: {error.strerror or error}; check the file") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
            raise ImageError(f"{self.label(i)}: damaged or encrypted in the zip ({error}); make it again") from None

    def header(self, i: int) -> Header:
        """The header of image i, which can be used; raises an ImageError otherwise."""
        with suppress(ImageError):
            return header_of(self.read(i, HEAD))
        blob = self.read(i)
        try:
            return header_of(blob)
        except ImageError as error:
            raise ImageError(f"{self.label(i)}: {error}") from None

    def check(self, indices: Iterable[int]) -> Dict[str, int]:
        """Compare the headers with the first image's, before the expensive work; returns the first index of a format.

        Raises:
            ImageError: an image of another size or mode; both files are named.
        """
        formats = {self.first.format: 0}
        for i in indices:
            head = self.header(i)
            formats.setdefault(head.format, i)
            if head[1:] != self.first[1:]:
                found = f"found {self.label(i)}, {head}, and {self.label(0)}, {self.first}"
                raise ImageError(f"{found}; expected images of one size and mode; resize or convert them")
        return formats

    def load(self, i: int) -> np.ndarray:
        """Pixels of image i."""
        blob = self.read(i)
        try:
            pixels = pixels_of(blob)
        except ImageError as error:
            raise ImageError(f"{self.label(i)}: {error}") from None
        if pixels.shape != self.shape:  # changed since it was checked
            raise ImageError(f"{self.label(i)}: found shape {pixels.shape}, expected {self.shape}; was it replaced?")
        return pixels

    def batches(self, ranges: Sequence[range], workers: int) -> Iterator[Tuple[range, np.ndarray]]:
        """(indices, pixels [b, C, H, W]) for each range, in order; read ahead by `workers` threads, 0 for none."""

        def stack(indices: range) -> Tuple[range, np.ndarray]:
            batch = np.empty((len(indices), *self.shape), np.uint8)
            for row, i in zip(batch, indices):
                row[...] = self.load(i)
            return indices, batch

        if workers == 0:
            yield from map(stack, ranges)
            return
        waiting, todo = deque(), iter(ranges)
        with ThreadPoolExecutor(workers) as pool:
            try:
                for indices in todo:
                    waiting.append(pool.submit(stack, indices))
                    if len(waiting) > 2 * workers:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def open_images(path: PathLike, num: Optional[int] = None, seed: int = 0) -> ImageSet:
    """The images of a folder (with its subfolders) or a zip, sorted by name.

    Args:
        num: how many of them to choose, with `seed`; None takes all.
    Raises:
        ImageError: no folder or zip; unsafe names; no images, or fewer than `num` or 2.
    """
    path = Path(path)
    archive = None
    if path.is_dir():
        walk = os.walk(path, onerror=_unreadable)  # does not follow links to folders
        names = [os.path.relpath(os.path.join(root, name), path) for root, _, files in walk for name in files]
    elif path.suffix.lower() == ".zip":
        archive = _open_zip(path)
        names = sorted({info.filename for info in archive.infolist() if not info.is_dir()})
    else:
        found = file_kind(path) if path.is_file() else "nothing there"
        raise ImageError(f"{path}: found {found}, expected a folder or a .zip with images; check the name")
    extensions = _extensions()
    images = sorted(name for name in names if os.path.splitext(name)[1].lower() in extensions)
    shown = [name for name in images if not _is_hidden(name)]
    if not shown:
        raise ImageError(f"{path}: found no images, expected PNGs; check the name")
    if len(shown) < (num or 2):
        remedy = "generate more, or lower --num" if num else "a covariance needs two"
        raise ImageError(f"{path}: found {len(shown)} images, expected at least {num or 2}; {remedy}")
    result = ImageSet(path, [shown[i] for i in choose(len(shown), num, seed)], archive)
    if len(shown) < len(images):
        first = next(filter(_is_hidden, images))
        result.notes.append(f"{path}: left out {len(images) - len(shown)} hidden images, such as {first}")
    return result


def _unreadable(error: OSError) -> None:
    raise ImageError(f"cannot read {error.filename}: {error.strerror}; check its permissions") from None


def choose(total: int, num: Optional[int], seed: int) -> np.ndarray:
    """Indices of the `num` of `total` images that EDM's `ImageFolderDataset(max_size=num, random_seed=seed)` takes."""
    indices = np.arange(total, dtype=np.int64)
    if num is not None and num < total:
        np.random.RandomState(seed % (1 << 31)).shuffle(indices)
        indices = np.sort(indices[:num])
    return indices


def format_notes(images: ImageSet, formats: Dict[str, int]) -> List[str]:
    """What the user should know of the formats of some images, which are of `ImageSet.check`."""
    notes, lossy = [], sorted(set(formats) & set(LOSSY))
    if lossy:
        others = f" among {'/'.join(sorted(set(formats) - set(LOSSY)))}" if set(formats) - set(LOSSY) else ""
        found = f"found {'/'.join(lossy)}{others}, such as {images.label(formats[lossy[0]])}"
        notes.append(f"{found}; compression artefacts change the FID: compare PNGs with a reference made from PNGs")
    if TRANSPARENT in formats:
        found = f"found a {TRANSPARENT}, {images.label(formats[TRANSPARENT])}"
        notes.append(f"{found}; the transparency is left out and the colour stays, as in EDM's own reader")
    return notes


def _extensions() -> set:
    Image.init()
    return {ext for ext, name in Image.EXTENSION.items() if name in Image.OPEN}


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name.replace(os.sep, "/")).parts)


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        archive = zipfile.ZipFile(path)
    except OSError as error:
        raise ImageError(f"cannot read {path}: {error.strerror or error}; check the name") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise ImageError(f"{path}: found no readable zip ({error}), expected one; make it again") from None
    for info in archive.infolist():
        name = info.orig_filename
        parts = PurePosixPath(name).parts
        if "\\" in name and ".." not in name and not re.match(r"[/\\]|[A-Za-z]:", name):
            raise ImageError(f"{path}: found the name {name!r} with a backslash, expected / between folders; make the "
                             "zip again with another program")
        if ".." in parts or "\\" in name or "\0" in name or re.match(r"/|[A-Za-z]:", name):
            raise ImageError(f"{path}: found the unsafe name {name!r}, expected relative ones; make the zip again")
        large = info.file_size > 2**24 and info.file_size > MAX_RATIO * max(info.compress_size, 1)
        if large or info.file_size > MAX_BYTES:
            size = f"{info.compress_size} bytes that unpack to {info.file_size}"
            raise ImageError(f"{path}: found {name}, {size}, expected images; it may be made to exhaust the memory")
    return archive


def header_of(blob: bytes) -> Header:
    """The header of an image; raises an ImageError for one that cannot be used."""
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as picture:
            transparent = picture.format == "PNG" and picture.mode in CHANNELS and "transparency" in picture.info
            head = Header(TRANSPARENT if transparent else picture.format or "?", picture.mode, *picture.size)
    except Exception as error:  # PIL's plugins raise a dozen kinds for damaged files
        raise ImageError(_damaged(error, blob)) from None
    if head.format == "PNG" and blob[24] == 16:  # which PIL reduces to 8
        head = head._replace(mode="L;16" if head.mode.startswith("I") else f"{head.mode};16")
    if head.mode not in CHANNELS:
        raise ImageError(f"found mode {head.mode}, expected 8-bit grey (L) or RGB; convert the images")
    if not 0 < head.width * head.height <= MAX_PIXELS:
        raise ImageError(f"found {head.width}x{head.height} pixels, expected 1 to {MAX_PIXELS}; is it an image?")
    return head


def pixels_of(blob: bytes) -> np.ndarray:
    """Pixels of an image file's bytes; raises an ImageError for a damaged one."""
    header_of(blob)
    try:
        with Image.open(io.BytesIO(blob), formats=FORMATS) as picture:
            picture.verify()  # of a PNG, the checksums up to its end, which decoding does not look at
        if blob.startswith(PNG) and PNG_END not in blob:
            raise ValueError("its end is missing")
        with Image.open(io.BytesIO(blob), formats=FORMATS) as picture:
            pixels = np.asarray(picture)
    except Exception as error:  # as above
        raise ImageError(_damaged(error, blob)) from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _damaged(error: Exception, blob: bytes) -> str:
    if any(text in str(error) for text in ("MAX_TEXT_CHUNK", "MAX_TEXT_MEMORY", "Decompressed Data Too Large")):
        return "found more than 1 MB of text beside the pixels, expected an image; remove the metadata"
    if "exceeds limit" in str(error):
        return f"found an image too large to decode safely ({str(error).split(',')[0]}), expected fewer pixels"
    foreign = isinstance(error, UnidentifiedImageError)  # whose text names an object in memory
    if foreign and not blob.startswith(PNG):
        return f"found {file_kind(blob)}, no readable image, expected a whole PNG; make it again"
    reason = "no header" if foreign else " ".join(str(error).split())[:80]
    return f"found a damaged or truncated image ({reason}), expected a whole PNG; make it again"
