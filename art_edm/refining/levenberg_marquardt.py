"""The pure parts of a grid's refinement: its parameters, the model of the error about a grid, and the next step.

Symbols
-------
q       parameters, [K-1]: sigma_j - low = (sigma_{j-1} - low) / (1 + exp(-q_j)), j = 1..K-1. sigma_0 stays, and any
        q is a grid that descends and keeps above the lowest level `low` that the model supports
error   RMS over pixels of the residual at the end point, [M] over noises; f is its mean, which is minimised
w       1 / error, smoothed: the gradient of f is g = mean of w J^T r
H       curvature, mean of w J^T J - w^3 (J^T r)(J^T r)^T: Gauss-Newton's, for distances in place of their squares
S       what H leaves out, learned from the change of g over each step (symmetric rank one). It matters: an error of
        order p is itself a power of the steps, and where all residuals point one way J vanishes at the optimum
"""

from __future__ import annotations

from typing import Tuple

import numpy as np

__all__ = ["chain", "levels_of", "model", "parameters_of", "proposal", "scales", "secant"]

SMOOTHING = 0.05  # of the mean error: below it, errors no longer weigh more
MAX_STEP = 0.5  # of a parameter q
MIN_RATIO = 1e-3  # of the excesses over `low` of neighbouring levels; a smaller one starts from here
MIN_SCALE = 0.1  # least curvature that scales a parameter, relative to the largest
MIN_SCALE_WEIGHTS = 1e-6  # the same among weights: their curvatures differ as the squares of their steps in sigma do
MIN_CURVATURE = 1.0  # added to the scale, in units of f per parameter: where J vanishes it is all there is
TINY = 1e-300


def levels_of(q: np.ndarray, first: float, low: float = 0.0) -> np.ndarray:
    """The levels [K + 1] of parameters q [K - 1]."""
    inner = low + (first - low) * np.cumprod(1 / (1 + np.exp(-q)))
    return np.concatenate([[first], inner, [0.0]])


def parameters_of(levels: np.ndarray, low: float = 0.0) -> np.ndarray:
    """The parameters q [K - 1] of levels [K + 1]; a level at `low` is taken as one just above it."""
    excess = levels[:-1] - low
    for j in range(1, len(excess)):
        excess[j] = max(excess[j], MIN_RATIO * excess[j - 1])
    ratio = excess[1:] / excess[:-1]
    return np.log(ratio / (1 - ratio))


def chain(q: np.ndarray, levels: np.ndarray, low: float = 0.0) -> np.ndarray:
    """d sigma_j / d q_i, [K - 1, K - 1]: (sigma_j - low) / (1 + exp(q_i)) for i <= j."""
    return np.tril(np.outer(levels[1:-1] - low, 1 / (1 + np.exp(q))))


def model(
    errors: np.ndarray, jtj: np.ndarray, jtr: np.ndarray, to_q: np.ndarray, weights: bool = False
) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradient g [K - 1], curvature H [K - 1, K - 1] and the scales [K - 1] of f in q: 1 / scale is a usual step.

    Args:
        errors: [M]; jtj, jtr: J^T J [M, K-1, K-1] and J^T r [M, K-1] per pixel, by level.
        to_q: d level / d q.
        weights: whether weights are among the parameters.
    """
    w = 1 / np.sqrt(np.square(errors) + (SMOOTHING * errors.mean()) ** 2 + TINY)  # [M]
    outward = np.einsum("m,mi,mj->ij", w**3, jtr, jtr) / len(w)  # a distance is straight along its residual
    curvature = np.tensordot(w, jtj, 1) / len(w)
    gradient = w @ jtr / len(w)
    scale = scales(np.diag(to_q.T @ curvature @ to_q), errors.mean(), weights)
    return to_q.T @ gradient, to_q.T @ (curvature - outward) @ to_q, scale


def scales(diagonal: np.ndarray, f: float, weights: bool) -> np.ndarray:
    """Those of the parameters [P], from the curvature's diagonal where f is minimised; see `model`."""
    least = MIN_SCALE_WEIGHTS if weights else MIN_SCALE
    return np.sqrt(np.maximum(diagonal, least * diagonal.max()) + MIN_CURVATURE * f / len(diagonal) + TINY)


def secant(S: np.ndarray, H: np.ndarray, step: np.ndarray, change: np.ndarray) -> np.ndarray:
    """S so that H + S explains the gradient's `change` over `step`, by the least change of rank one."""
    missing = change - (H + S) @ step
    size = missing @ step
    if abs(size) <= 1e-6 * np.linalg.norm(missing) * np.linalg.norm(step):  # the update has no bound there
        return S
    return S + np.outer(missing, missing) / size


def proposal(
    gradient: np.ndarray, H: np.ndarray, scale: np.ndarray, damping: float
) -> Tuple[np.ndarray, float]:
    """The next step in q and the gain that the curvature H (with S) promises.

    -(|H| + damping diag scale^2)^-1 g, where |H| has the magnitudes of H's eigenvalues in units of `scale`: a
    direction of negative curvature is followed downhill. No parameter moves by more than `MAX_STEP`.
    """
    values, vectors = np.linalg.eigh(H / np.outer(scale, scale))
    step = -(vectors @ (vectors.T @ (gradient / scale) / (np.abs(values) + damping))) / scale
    step = step * min(1.0, MAX_STEP / max(np.abs(step).max(), TINY))
    return step, float(-(gradient @ step) - 0.5 * step @ H @ step)
