"""Frechet distance between Gaussians fitted to features.

Symbols
-------
mu, cov    mean [d] and covariance [d, d] (n - 1) of features, float64
FD         |mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2)
"""

from __future__ import annotations

from typing import Tuple

import numpy as np

__all__ = ["frechet_distance", "moments"]


def moments(features: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of features [n, d], n >= 2, in float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """FD by symmetric eigendecompositions: tr (cov1 cov2)^(1/2) = tr (r cov2 r)^(1/2) with r = cov1^(1/2).

    Rank-deficient covariances are fine; eigenvalues that rounding makes negative count as zero.
    """
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    return float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)
