"""CIFAR-10 as image files in one folder per class, or an archive of them, as tensors."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Iterator, Optional, Tuple

import numpy as np
import torch
from PIL import Image

__all__ = ["CLASSES", "load_cifar10"]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_KINDS = (".jpg", ".jpeg", ".png")


def load_cifar10(split: str, data: Optional[str], each: Optional[int] = None) -> Tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one split, in the order of their paths.

    Args:
        split: "train" or "test".
        data: a folder, or a .tar archive (compressed or not), of SPLIT/CLASS/*.jpg or *.png, 32x32 pixels in colour.
        each: only the first so many of each class.
    Returns:
        pixels uint8 [N, 3, 32, 32], labels int64 [N], numbers in CLASSES.
    Raises:
        ValueError: no such place, or what is in it is no such image.
    """
    if data is None:
        raise ValueError("found no --data, expected a folder or .tar archive of train/CLASS/*.jpg and test/CLASS/*.jpg")
    try:
        files = sorted(_files(Path(data), split), key=lambda item: item[0])
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"cannot read {data}: {error}; get it again") from None
    if not files:
        raise ValueError(f"{data} has no {split}/CLASS/*.jpg or *.png with a CLASS of {', '.join(CLASSES)}")
    classes = [[file for file in files if file[0].split("/")[-2] == name][:each] for name in CLASSES]
    labels = torch.tensor([label for label, part in enumerate(classes) for _ in part])
    pixels = [_pixels(f"{data}: {name}", content) for part in classes for name, content in part]
    return torch.from_numpy(np.stack(pixels)), labels


def _files(place: Path, split: str) -> Iterator[Tuple[str, bytes]]:
    """(SPLIT/CLASS/NAME, content) of every image of one split."""
    if place.is_dir():
        for path in place.glob(f"{split}/*/*"):
            if _wanted(path.parts[-3:], split):
                yield "/".join(path.parts[-3:]), path.read_bytes()
        return
    with tarfile.open(place) as archive:
        for member in archive:
            parts = tuple(member.name.split("/")[-3:])
            if member.isfile() and _wanted(parts, split):
                yield "/".join(parts), archive.extractfile(member).read()


def _wanted(parts: Tuple[str, ...], split: str) -> bool:
    return len(parts) == 3 and parts[0] == split and parts[1] in CLASSES and parts[2].lower().endswith(_KINDS)


def _pixels(name: str, content: bytes) -> np.ndarray:
    """uint8 [3, 32, 32]."""
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:  # no format that starts a program
            pixels = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{name} is damaged or no image ({type(error).__name__}); get it again") from None
    if pixels.shape != (32, 32, 3) or pixels.dtype != np.uint8:
        raise ValueError(f"{name}: found {pixels.dtype} {list(pixels.shape)}, expected 32x32 pixels in colour")
    return pixels.transpose(2, 0, 1)
