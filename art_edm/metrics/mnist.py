"""MNIST: the original four files, verified, as tensors.

The files come from a folder (`--data`) or from public mirrors into the per-user cache. What is
checked is the SHA-256 of the decompressed bytes, so that any gzip wrapper of the true data is good.
"""

from __future__ import annotations

import gzip
import hashlib
import struct
import zlib
from pathlib import Path
from typing import Optional, Sequence, Tuple

import numpy as np
import torch

from art_edm.runtime.download import DownloadError, DownloadRefused, download
from art_edm.runtime.files import cache_dir

__all__ = ["FILES", "MIRRORS", "load_mnist", "to_images"]

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
FILES = {  # name -> SHA-256 of the decompressed bytes
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


def to_images(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [N, 28, 28] -> float [N, 1, 28, 28] in [-1, 1], EDM's scale."""
    return (pixels.to(torch.float32) / 127.5 - 1).unsqueeze(1)


def load_mnist(
    split: str, data: Optional[str] = None, mirrors: Sequence[str] = MIRRORS
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one split.

    Args:
        split: "train" (60,000) or "test" (10,000).
        data: folder with the four files, plain or .gz; None downloads them into the cache.
        mirrors: addresses to try in turn.
    Returns:
        pixels uint8 [N, 28, 28], labels int64 [N].
    Raises:
        ValueError: a file is missing, damaged or not MNIST.
        ConnectionError: no mirror delivered the true file.
    """
    prefix = {"train": "train", "test": "t10k"}[split]
    pixels, labels = (_raw(f"{prefix}-{part}-ubyte", data, mirrors) for part in ("images-idx3", "labels-idx1"))
    count, height, width = struct.unpack(">3i", pixels[4:16])
    images = np.frombuffer(pixels, np.uint8, offset=16).reshape(count, height, width)
    return torch.from_numpy(images.copy()), torch.from_numpy(np.frombuffer(labels, np.uint8, offset=8).astype(np.int64))


def _raw(name: str, data: Optional[str], mirrors: Sequence[str]) -> bytes:
    """The verified, decompressed bytes of one file."""
    if data is not None:
        return _from_folder(name, Path(data))
    return _decompress(_from_mirrors(name, mirrors).read_bytes())


def _from_folder(name: str, folder: Path) -> bytes:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            blob = path.read_bytes()
            content = _decompress(blob) if path.suffix == ".gz" else blob
            if not _is_true(name, content):
                raise ValueError(f"{path} is damaged or not MNIST: SHA-256 of its content differs; fetch it again")
            return content
    raise ValueError(f"{folder} has no {name}.gz; give the folder with the four MNIST files, or omit --data")


def _is_true(name: str, content: bytes) -> bool:
    return hashlib.sha256(content).hexdigest() == FILES[name]


def _decompress(blob: bytes) -> bytes:
    """Content of a gzip blob; empty when it is damaged, which no checksum matches."""
    try:
        return gzip.decompress(blob)
    except (OSError, EOFError, zlib.error):
        return b""


def _from_mirrors(name: str, mirrors: Sequence[str]) -> Path:
    """The compressed file in the cache, from the first mirror that has it; the next mirror is the next attempt."""

    def check(path: Path) -> None:
        if not _is_true(name, _decompress(path.read_bytes())):
            raise ValueError("checksum differs")

    folder, failures = cache_dir() / "mnist", []
    for mirror in mirrors:
        url = f"{mirror}{name}.gz"
        try:
            return download(url, folder=folder, check=check, name=f"{name}.gz", delays=())
        except (DownloadError, DownloadRefused) as error:
            failures.append(f"{url}: {error.reason}")
    tried = "; ".join(failures)
    raise ConnectionError(f"could not download {name} ({tried}); put the files in a folder and give --data")
