"""Judging a generator of digits by the LeNet-FID of the paper's MNIST tables (section 6.4).

Symbols
-------
images     float [N, 1, 28, 28] in [-1, 1]
pixels     the same images as they would be stored, uint8 [N, 28, 28]
features   the 84 penultimate activations of LeNet, [N, 84]
reference  mean [84] and covariance [84, 84] of the features of the 60,000 training images
FID        Frechet distance between the moments of samples' features and the reference
"""

from __future__ import annotations

import math
import time
import zipfile
from pathlib import Path
from typing import Optional, Sequence, Tuple

import numpy as np
import torch
from PIL import Image

from .denoiser import Denoiser
from .features import LeNet
from .files import PathLike, atomic_write
from .frechet import frechet_distance, moments
from .grid import Grid
from .mnist import to_images
from .progress import GracefulStop, Progress, Stopped
from .seeding import seeded_generator
from .solvers import OnStep, sample

__all__ = [
    "Moments", "accuracy", "fid_with_error", "generate", "latents", "lenet_features", "lenet_fid", "measured_features",
    "noise_and_labels", "sample_sheet", "to_pixels",
]

Moments = Tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d, d]


def latents(seed: int, indices: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """Unit noise [len(indices), C, H, W]; each image's own, whatever the batch. Seed 0 is EDM's --seeds=indices."""
    return torch.stack([torch.randn(tuple(shape), generator=seeded_generator(seed, i)) for i in indices])


def noise_and_labels(
    denoiser: Denoiser, seed: int, indices: Sequence[int]
) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Unit noise [B, C, H, W] and labels [B, label_dim] (None if unconditional), on the denoiser's device.

    Each image has its own generator, which draws the noise and then the label, as upstream's scripts do.
    """
    noises, labels = [], []
    for index in indices:
        generator = seeded_generator(seed, index)
        noises.append(torch.randn(denoiser.img_shape, generator=generator))
        labels.append(denoiser.draw_labels(1, generator))
    stacked = None if denoiser.label_dim == 0 else torch.cat(labels)
    return torch.stack(noises).to(denoiser.device), stacked


def generate(
    denoiser: Denoiser, grid: Grid, solver: str, num: int, seed: int = 0, batch: int = 250,
    progress: Optional[Progress] = None, stop: Optional[GracefulStop] = None, first: int = 0,
) -> torch.Tensor:
    """Sample images; image i depends on (seed, i) only, not on the batch it is made in (up to rounding).

    Args:
        num: number of images, of the indices `first` to `first + num - 1`.
        batch: images per evaluation.
        progress: told the number of steps done, summed over images.
        stop: looked at after every step.
    Returns:
        Images, float32 [num, C, H, W] on the CPU; not clipped.
    Raises:
        Stopped: `stop` was requested.
    """
    end = first + num
    parts = [torch.empty(0, *denoiser.img_shape)]
    for start in range(first, end, batch):
        indices = range(start, min(start + batch, end))
        watch = _watch(progress, stop, start * grid.num_steps)
        with torch.inference_mode():
            noise, labels = noise_and_labels(denoiser, seed, indices)
            images = sample(denoiser, noise, grid, solver, labels, on_step=watch)  # [b, C, H, W]
        parts.append(images.to("cpu", torch.float32, copy=True))  # out here, so that it is an ordinary tensor
    return torch.cat(parts)


def _watch(progress: Optional[Progress], stop: Optional[GracefulStop], done: int) -> OnStep:
    def on_step(k: int, sigma: float, x: torch.Tensor) -> None:
        if stop is not None and stop.requested:
            raise Stopped("stopped while sampling")
        if progress is not None:
            progress.update(done + k * len(x))

    return on_step


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """float [N, 1, 28, 28] in [-1, 1] -> uint8 [N, 28, 28], clipped and rounded as EDM's generate.py does."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).squeeze(1)


@torch.no_grad()
def lenet_features(lenet: LeNet, images: torch.Tensor, batch: int = 1000) -> np.ndarray:
    """Features float32 [N, 84] of images [N, 1, 28, 28]."""
    return torch.cat([lenet.features(part) for part in images.split(batch)]).numpy()


@torch.no_grad()
def accuracy(lenet: LeNet, images: torch.Tensor, labels: torch.Tensor, batch: int = 1000) -> float:
    """Share of images [N, 1, 28, 28] whose label [N] is LeNet's first choice."""
    chosen = torch.cat([lenet(part).argmax(dim=1) for part in images.split(batch)])  # [N]
    return float((chosen == labels).double().mean())


def lenet_fid(lenet: LeNet, samples: torch.Tensor, reference: Moments) -> float:
    """FID of samples [N, 1, 28, 28], clipped and rounded to pixels first."""
    return frechet_distance(*moments(lenet_features(lenet, to_images(to_pixels(samples)))), *reference)


def fid_with_error(features: np.ndarray, reference: Moments, groups: int = 20) -> Tuple[float, float]:
    """FID of all features [n, d] and its standard error by the delete-a-group jackknife.

    With f_j the FID without every `groups`-th sample from the j-th on, the variance is (g - 1)/g sum (f_j - mean f)^2.
    Unlike the spread of blocks' FIDs, it is hardly touched by the bias of a FID of few samples.

    Raises:
        ValueError: fewer than two samples per group.
    """
    if len(features) < 2 * groups:
        raise ValueError(f"found {len(features)} samples, expected at least {2 * groups} for a standard error")
    group = np.arange(len(features)) % groups  # [n]
    left_out = [frechet_distance(*moments(features[group != j]), *reference) for j in range(groups)]
    variance = (groups - 1) / groups * np.square(left_out - np.mean(left_out)).sum()
    return frechet_distance(*moments(features), *reference), math.sqrt(variance)


def measured_features(
    lenet: LeNet, denoiser: Denoiser, grid: Grid, solver: str, num: int, seed: int, store: Path, batch: int = 250,
    progress: Optional[Progress] = None, stop: Optional[GracefulStop] = None,
) -> Tuple[np.ndarray, float]:
    """Features of `num` samples, kept in `store` after every batch: what is there already is not sampled again.

    Args:
        store: .npz file; its name must tell networks, grids, solvers and seeds apart.
    Returns:
        features float32 [num, 84], and the seconds that sampling them took.
    Raises:
        Stopped: `stop` was requested; the finished batches are in `store`.
    """
    features, seconds = _stored(store, lenet.num_features)
    if progress is not None:
        progress.start = min(len(features), num) * grid.num_steps  # not done now: no part of the rate
    while len(features) < num:
        done = len(features)
        size = min(batch - done % batch, num - done)
        began = time.monotonic()
        images = generate(denoiser, grid, solver, size, seed, batch, progress, stop, first=done)
        features = np.concatenate([features, lenet_features(lenet, to_images(to_pixels(images)))])
        seconds += time.monotonic() - began
        content = {"features": features, "seconds": np.float64(seconds)}
        atomic_write(store, lambda file, content=content: np.savez(file, **content))
    return features[:num], seconds * num / max(len(features), 1)


def _stored(store: Path, width: int) -> Tuple[np.ndarray, float]:
    """Features [n, width] and seconds in `store`; none if it is absent or damaged, which costs only time."""
    try:
        with np.load(store, allow_pickle=False) as content:
            features, seconds = content["features"], float(content["seconds"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return np.empty((0, width), np.float32), 0.0
    return features.reshape(-1, width), seconds


def sample_sheet(images: torch.Tensor, path: PathLike) -> None:
    """Write images [N, 1, H, W] as one PNG, row by row in a square, atomically."""
    pixels = to_pixels(images).numpy()
    side = math.ceil(math.sqrt(len(pixels)))
    _, height, width = pixels.shape
    sheet = np.zeros((side, side, height, width), np.uint8)
    sheet.reshape(-1, height, width)[: len(pixels)] = pixels
    picture = Image.fromarray(sheet.transpose(0, 2, 1, 3).reshape(side * height, side * width))
    atomic_write(path, lambda file: picture.save(file, format="png"))
