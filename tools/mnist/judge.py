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
from typing import Optional, Tuple

import numpy as np
import torch

from art_edm.grids.grid import Grid
from art_edm.metrics.frechet import Moments, frechet_distance, moments
from art_edm.metrics.mnist import to_images
from art_edm.models.denoiser import Denoiser
from art_edm.models.lenet import LeNet
from art_edm.runtime.files import atomic_write
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.generate import generate, to_pixels

__all__ = ["accuracy", "fid_with_error", "lenet_features", "lenet_fid", "measured_features"]


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
