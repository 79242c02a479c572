"""Images of a folder or a zip, as EDM's `ImageFolderDataset` finds, orders and chooses them.

Symbols
-------
name       path of an image relative to the folder, or its name in the zip; images are sorted by it
pixels     uint8 [C, H, W], C = 1 (grey) or 3 (RGB), the same for all images

Unlike there, nothing is converted silently: palettes, transparency and 16 bits are refused, and a PNG must be
whole (its checksums are verified). Files inside hidden folders and `__MACOSX` are no images.
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
from pathlib import Path, PurePosixPath
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from art_edm.runtime.files import PathLike

__all__ = ["Header", "ImageError", "ImageSet", "choose", "header_of", "lossy_note", "open_images", "pixels_of"]

CHANNELS = {"L": 1, "RGB": 3}
LOSSY = ("JPEG", "MPO", "WEBP", "JPEG2000")
MAX_PIXELS = 2**27  # 384 MB as RGB
MAX_BYTES, MAX_RATIO = 2**30, 200  # of one file in a zip; the ratio counts above 16 MB
PNG = b"\x89PNG\r\n\x1a\n"
_NO_EPS = {".eps", ".ps"}  # opening one runs Ghostscript


class ImageError(ValueError):
    """Images that cannot be used; one line that names the file."""


class Header(NamedTuple):
    """What an image file says of itself."""

    format: str  # PIL's name
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
        blob = self.read(i, 26)
        if not blob.startswith(PNG):
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
        found = "another kind of file" if path.exists() else "nothing there"
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


def lossy_note(images: ImageSet, formats: Dict[str, int]) -> Optional[str]:
    """A warning if some images have been compressed with loss; `formats` are of `ImageSet.check`."""
    lossy = sorted(set(formats) & set(LOSSY))
    if not lossy:
        return None
    others = f" among {'/'.join(sorted(set(formats) - set(LOSSY)))}" if set(formats) - set(LOSSY) else ""
    found = f"found {'/'.join(lossy)}{others}, such as {images.label(formats[lossy[0]])}"
    return f"{found}; compression artefacts change the FID: compare PNGs with a reference made from PNGs"


def _extensions() -> set:
    Image.init()
    return {ext for ext, name in Image.EXTENSION.items() if name in Image.OPEN} - _NO_EPS


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
        if ".." in parts or "\\" in name or "\0" in name or re.match(r"/|[A-Za-z]:", name):
            raise ImageError(f"{path}: found the unsafe name {name!r}, expected relative ones; make the zip again")
        large = info.file_size > 2**24 and info.file_size > MAX_RATIO * max(info.compress_size, 1)
        if large or info.file_size > MAX_BYTES:
            size = f"{info.compress_size} bytes that unpack to {info.file_size}"
            raise ImageError(f"{path}: found {name}, {size}, expected images; it may be made to exhaust the memory")
    return archive


def header_of(blob: bytes) -> Header:
    """The header of an image; raises an ImageError for one that cannot be used.

    A PNG's first 26 bytes are enough; they alone tell 16 bits, which PIL reduces to 8.
    """
    if blob.startswith(PNG) and len(blob) >= 26 and blob[12:16] == b"IHDR":
        width, height, depth, kind = struct.unpack(">IIBB", blob[16:26])
        mode = {0: "L" if depth > 1 else "1", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}.get(kind, f"kind {kind}")
        head = Header("PNG", mode + (";16" if depth == 16 else ""), width, height)
    else:
        try:
            with Image.open(io.BytesIO(blob)) as picture:
                head = Header(picture.format or "?", picture.mode, *picture.size)
        except Exception as error:  # PIL's plugins raise a dozen kinds for damaged files
            raise ImageError(_damaged(error, blob)) from None
    if head.mode not in CHANNELS:
        raise ImageError(f"found mode {head.mode}, expected 8-bit grey (L) or RGB; convert the images")
    if not 0 < head.width * head.height <= MAX_PIXELS:
        raise ImageError(f"found {head.width}x{head.height} pixels, expected 1 to {MAX_PIXELS}; is it an image?")
    return head


def pixels_of(blob: bytes) -> np.ndarray:
    """Pixels of an image file's bytes; raises an ImageError for a damaged one."""
    if blob.startswith(PNG):
        _check_png(blob)
    header_of(blob)
    try:
        with Image.open(io.BytesIO(blob)) as picture:
            pixels = np.asarray(picture)
    except Exception as error:  # as above
        raise ImageError(_damaged(error, blob)) from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _check_png(blob: bytes) -> None:
    """Every chunk whole and with its checksum, up to IEND; PIL does not look at those of the pixels."""
    at = len(PNG)
    while at + 12 <= len(blob):
        length, kind = struct.unpack(">I4s", blob[at : at + 8])
        end = at + 12 + length
        if end > len(blob):
            break
        if struct.unpack(">I", blob[end - 4 : end])[0] != zlib.crc32(blob[at + 4 : end - 4]):
            raise ImageError(f"found a damaged PNG (checksum of {kind!r}), expected a whole one; make it again")
        if kind == b"IEND":
            return
        at = end
    raise ImageError(f"found a truncated PNG of {len(blob)} bytes, expected a whole one; make it again")


def _damaged(error: Exception, blob: bytes) -> str:
    foreign = isinstance(error, UnidentifiedImageError)  # whose text names an object in memory
    reason = "no image format" if foreign else " ".join(str(error).split())[:80]
    reason = reason if blob else "it is empty"
    return f"found no readable image ({reason}), expected a whole PNG; make it again"
