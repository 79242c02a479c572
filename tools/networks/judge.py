"""Judging a generator by the Frechet distance of a classifier's features: LeNet-FID (section 6.4), CIFAR-FID.

Symbols
-------
images     float [N, C, H, W] in [-1, 1]
pixels     the same images as they would be stored, uint8 [N, C, H, W]
features   the d penultimate activations of the classifier, [N, d]
reference  mean [d] and covariance [d, d] of the features of the training images
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
from torch import nn

from art_edm.grids.grid import Grid
from art_edm.metrics.frechet import Moments, frechet_distance, moments
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.files import atomic_write
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.generate import generate, to_pixels
from networks.loop import to_unit

__all__ = ["accuracy", "features_of", "fid_of", "fid_with_error", "measured_features"]


@torch.no_grad()
def features_of(classifier: nn.Module, images: torch.Tensor, batch: int = 1000) -> np.ndarray:
    """Features float32 [N, d] of images or pixels [N, C, H, W]."""
    return torch.cat([classifier.features(to_unit(part)) for part in images.split(batch)]).numpy()


@torch.no_grad()
def accuracy(classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor, batch: int = 1000) -> float:
    """Share of images or pixels [N, C, H, W] whose label [N] is the classifier's first choice."""
    chosen = torch.cat([classifier(to_unit(part)).argmax(dim=1) for part in images.split(batch)])  # [N]
    return float((chosen == labels).double().mean())


def fid_of(classifier: nn.Module, samples: torch.Tensor, reference: Moments) -> float:
    """FID of samples [N, C, H, W], clipped and rounded to pixels first."""
    return frechet_distance(*moments(features_of(classifier, to_pixels(samples).reshape(samples.shape))), *reference)


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
    classifier: nn.Module, denoiser: Denoiser, grid: Grid, solver: str, num: int, seed: int, store: Path,
    batch: int = 250, progress: Optional[Progress] = None, stop: Optional[GracefulStop] = None,
) -> Tuple[np.ndarray, float]:
    """Features of `num` samples, kept in `store` after every batch: what is there already is not sampled again.

    Args:
        store: .npz file; its name must tell networks, grids, solvers and seeds apart.
    Returns:
        features float32 [num, d], and the seconds that sampling them took.
    Raises:
        Stopped: `stop` was requested; the finished batches are in `store`.
    """
    features, seconds = _stored(store, classifier.num_features)
    if progress is not None:
        progress.start = min(len(features), num) * grid.num_steps  # not done now: no part of the rate
    while len(features) < num:
        done = len(features)
        size = min(batch - done % batch, num - done)
        began = time.monotonic()
        images = generate(denoiser, grid, solver, size, seed, batch, progress, stop, first=done)
        features = np.concatenate([features, features_of(classifier, to_pixels(images).reshape(images.shape))])
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
