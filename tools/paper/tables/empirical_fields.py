"""Exact fields of real images: the exact denoiser of a memorised data set.

    CIFAR-10    JPEGs train/CLASS/NNNN.jpg, in a folder or a .tar.xz; the first of each class
    MNIST       the first of the training images
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Optional

import torch
from networks.cifar10 import load_cifar10

from art_edm.metrics.mnist import load_mnist, to_images
from art_edm.models.analytic import EmpiricalDenoiser
from art_edm.models.loading import Network

__all__ = ["cifar10_images", "empirical", "mnist_images"]


def cifar10_images(source: Path, num: int) -> torch.Tensor:
    """The first num / 10 images of each class, float32 [num, 3, 32, 32] in [-1, 1].

    Raises a ValueError if they are not there.
    """
    each = max(1, num // 10)
    try:
        pixels, labels = load_cifar10("train", str(source), each)
    except ValueError as error:
        raise ValueError(f"{error}; correct --cifar10") from None
    if len(pixels) != 10 * each:
        found = f"found {len(pixels)} images of {len(labels.unique())} classes in {source}"
        raise ValueError(f"{found}, expected {each} of each of 10 as train/CLASS/NNNN.jpg; correct --cifar10")
    return pixels.float() / 127.5 - 1


def mnist_images(folder: Optional[Path], num: int) -> torch.Tensor:
    """The first training images, float32 [num, 1, 28, 28] in [-1, 1]."""
    return to_images(load_mnist("train", folder)[0][:num])


def empirical(name: str, images: torch.Tensor, device: torch.device) -> Network:
    """The exact field of these images, known by their content."""
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    return Network(EmpiricalDenoiser(images).to(device), name, digest, {"images": len(images)})


