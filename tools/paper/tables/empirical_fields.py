"""Exact fields of real images: the exact denoiser of a memorised data set.

    CIFAR-10    JPEGs train/CLASS/NNNN.jpg, in a folder or a .tar.xz; the first of each class
    MNIST       the first of the training images
"""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path
from typing import Dict, Optional

import numpy as np
import torch
from PIL import Image

from art_edm.metrics.mnist import load_mnist, to_images
from art_edm.models.analytic import EmpiricalDenoiser
from art_edm.models.loading import Network

__all__ = ["cifar10_images", "empirical", "mnist_images"]

_PLACE = re.compile(r"(?:^|/)train/([^/]+)/(\d+)\.(?:jpg|jpeg|png)$")


def cifar10_images(source: Path, num: int) -> torch.Tensor:
    """The first num / 10 images of each class, float32 [num, 3, 32, 32] in [-1, 1].

    Raises a ValueError if they are not there.
    """
    each = max(1, num // 10)
    try:
        blobs = _from_folder(source, each) if source.is_dir() else _from_archive(source, each)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"cannot read {source}: {' '.join(str(error).split())}; correct --cifar10") from None
    classes = {name.rpartition("/")[0] for name in blobs}
    if len(classes) != 10 or len(blobs) != 10 * each:
        raise ValueError(f"found {len(blobs)} images of {len(classes)} classes in {source}, expected {each} of each of "
                         "10 as train/CLASS/NNNN.jpg; correct --cifar10")
    arrays = [np.asarray(Image.open(io.BytesIO(blobs[name])).convert("RGB")) for name in sorted(blobs)]
    pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


def _wanted(name: str, each: int) -> Optional[str]:
    """class/number of one of the first images of its class, or None."""
    match = _PLACE.search(name)
    return f"{match[1]}/{int(match[2]):05d}" if match and int(match[2]) < each else None


def _from_folder(source: Path, each: int) -> Dict[str, bytes]:
    paths = {_wanted(path.as_posix(), each): path for path in source.glob("train/*/*")}
    return {name: path.read_bytes() for name, path in paths.items() if name}


def _from_archive(source: Path, each: int) -> Dict[str, bytes]:
    blobs: Dict[str, bytes] = {}
    with tarfile.open(source) as archive:
        for member in archive:
            name = _wanted(member.name, each)
            if name and member.isfile():
                blobs[name] = archive.extractfile(member).read()
    return blobs


def mnist_images(folder: Optional[Path], num: int) -> torch.Tensor:
    """The first training images, float32 [num, 1, 28, 28] in [-1, 1]."""
    return to_images(load_mnist("train", folder)[0][:num])


def empirical(name: str, images: torch.Tensor, device: torch.device) -> Network:
    """The exact field of these images, known by their content."""
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return Network(EmpiricalDenoiser(images).to(device), name, digest, {"images": len(images)})


