"""Frechet distance between Gaussians fitted to features, and Inception score.

Symbols
-------
mu, cov    mean [d] and covariance [d, d] (n - 1) of features, float64
factor     F [d, r] with F F^T = cov, r the numerical rank
FD         |mu1 - mu2|^2 + tr cov1 + tr cov2 - 2 tr (cov1 cov2)^(1/2)
p          class probabilities [n, k]; a bar is the mean over n
IS         exp of the mean over n of sum_k p log(p / p-bar)

tr (cov1 cov2)^(1/2) is the sum of the singular values of P = F1^T F2, the nuclear norm: no square root of
a matrix, no complex numbers, and nothing special about covariances without full rank.
"""

from __future__ import annotations

from typing import Tuple

import numpy as np
from scipy.linalg.lapack import dpstrf

__all__ = ["Moments", "factor", "frechet_distance", "inception_score", "moments", "negative_part", "nuclear_norm",
           "plogp"]

Moments = Tuple[np.ndarray, np.ndarray]  # mean [d], covariance [d, d]
_ACCURACY = 1e-10  # relative to the norm; an upper bound, the error found is mostly 1e-14


def moments(features: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Mean [d] and covariance [d, d] of features [n, d], n >= 2, in float64."""
    features = np.asarray(features, np.float64)
    return features.mean(axis=0), np.cov(features, rowvar=False).reshape(features.shape[1], -1)


def frechet_distance(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """FD of two Gaussians; exact up to rounding for covariances of any rank.

    Args:
        mu1, mu2: means [d].
        cov1, cov2: symmetric covariances [d, d]; eigenvalues that are negative or within rounding of zero count as
            zero (`negative_part` tells how much that is).
    Returns:
        FD >= 0, in the squared units of the features.
    Raises:
        ValueError: NaN or infinity among the moments.
    """
    if not all(np.isfinite(part).all() for part in (mu1, cov1, mu2, cov2)):
        raise ValueError("found NaN or infinite moments, expected numbers; check the features")
    cross = nuclear_norm(factor(cov1).T @ factor(cov2))
    return max(0.0, float(np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross))


def factor(cov: np.ndarray) -> np.ndarray:
    """F [d, r] with F F^T = cov, or the nearest positive semidefinite matrix where cov is none.

    Cholesky's with pivoting, which ends at the rank r: where no variance is left but rounding's, d eps times the
    largest (roots of that would be 1e-8 each). If more than rounding is left off the diagonal, `cov` has negative
    eigenvalues (sums in float32, a file in float16); the Cholesky factor of such a matrix means nothing, and F comes
    from the positive eigenvalues.
    """
    cov = np.asarray(cov, np.float64)
    lower, order, rank, rounding = _pivoted(cov)
    if rank < len(cov) and np.abs(cov[np.ix_(order, order)] - lower @ lower.T).max() > 4 * rounding:
        values, vectors = np.linalg.eigh(cov)
        return vectors[:, values > 0] * np.sqrt(values[values > 0])
    result = np.empty((len(cov), rank))
    result[order] = lower
    return result


def negative_part(cov: np.ndarray) -> float:
    """Minus the sum of the negative eigenvalues of cov, over its trace; 0 for a covariance, up to rounding."""
    lower, order, rank, rounding = _pivoted(cov)
    if rank == len(cov) or np.abs(cov[np.ix_(order, order)] - lower @ lower.T).max() <= 4 * rounding:
        return 0.0
    values = np.linalg.eigvalsh(cov)
    return float(-values[values < 0].sum() / np.abs(values).sum())


def _pivoted(cov: np.ndarray) -> Tuple[np.ndarray, np.ndarray, int, float]:
    """Lower factor [d, r] of the reordered matrix, the order [d], r, and what counts as rounding."""
    rounding = len(cov) * np.finfo(np.float64).eps * cov.diagonal().max()
    lower, order, rank, _ = dpstrf(cov, lower=1, tol=rounding)
    return np.tril(lower)[:, :rank], order - 1, rank, rounding  # LAPACK counts rows from 1


def nuclear_norm(p: np.ndarray) -> float:
    """Sum of the singular values of P [r1, r2].

    They are the roots of the eigenvalues of P P^T, which take a third of the time. An eigenvalue is off by
    about eps times the largest, its root by that over twice the root; where this matters, P itself is used.
    """
    if min(p.shape) == 0:
        return 0.0
    squares = np.linalg.eigvalsh(p @ p.T if len(p) <= p.shape[1] else p.T @ p)  # ascending
    rounding = np.finfo(np.float64).eps * squares[-1]
    if squares[0] > 0:
        roots = np.sqrt(squares)
        if rounding * (0.5 / roots).sum() <= _ACCURACY * roots.sum():
            return float(roots.sum())
    return float(np.linalg.svd(p, compute_uv=False).sum())


def inception_score(totals: np.ndarray, negentropies: np.ndarray, counts: np.ndarray) -> Tuple[float, float]:
    """Mean and standard deviation (n) of the IS of several parts of the images.

    As mean sum_k p log(p / p-bar) = mean sum_k p log p - sum_k p-bar log p-bar, sums are all that is needed.

    Args:
        totals: sum of p over each part's images, [parts, k].
        negentropies: sum over them of sum_k p log p, [parts].
        counts: number of images of each part, [parts], none 0.
    """
    mean = totals / counts[:, None]  # [parts, k]
    scores = np.exp(negentropies / counts - plogp(mean).sum(axis=1))
    return float(scores.mean()), float(scores.std())


def plogp(p: np.ndarray) -> np.ndarray:
    """p log p, 0 at 0."""
    return p * np.log(np.where(p > 0, p, 1))
