"""Runs of a solver that a detector judges: how far the features of its ends are from those of exact ends.

Symbols
-------
F, E   features of the solver's ends and of the exact ends of the same M noises, [M, d]; A, B are these less their means
Q      orthogonal, [M, M]: U V^T of the singular value decomposition A B^T = U S V^T
R      A - Q B, [M, d]
FD     |mean F - mean E|^2 + |R|^2 / (M - 1): the Frechet distance of `metrics.frechet`, whose trace of a root is the
       nuclear norm tr S / (M - 1). It is the mean of a_m = |mean F - mean E|^2 + M |R_m|^2 / (M - 1)
J      dF / dp, [M, P, d], of the numbers p that are moved; its mean over noises and the rest

Q is where |A - Q B| is least. So a change of Q is of second order, and FD's gradient is the one with Q held, where FD
is a sum of squares: g = 2 mean(J) (mean F - mean E) + 2 sum_m (J_m - mean J) R_m / (M - 1). Its Gauss-Newton curvature
is somewhat too large, as Q follows. Because both sets share their noises, FD is 0 for an exact solver and tens of
noises tell grids apart, far fewer than features.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, Optional, Tuple, Union

import numpy as np
import torch

from art_edm.metrics.detectors import Detector, load_detector
from art_edm.models.denoiser import Denoiser
from art_edm.refining import levenberg_marquardt
from art_edm.refining.solver_jacobian import Kept, Move, Noises, Place, Run, SolverRuns
from art_edm.refining.stage import Stage

__all__ = ["FeatureRuns", "check_judge", "described", "feature_residuals", "load_judge"]

LENET_SHAPE = (1, 28, 28)


def feature_residuals(features: np.ndarray, exact: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """mean F - mean E [d], and R [M, d]."""
    ours, theirs = features.mean(axis=0), exact.mean(axis=0)
    left, right = features - ours, exact - theirs
    u, _, v = np.linalg.svd(left @ right.T)
    return ours - theirs, left - u @ v @ right


def features_of(detector: Detector, images: torch.Tensor) -> torch.Tensor:
    """[B, d] float64 of images [B, C, H, W] in [-1, 1], which are clipped but not rounded: differences need it so."""
    return detector.features((images.to(torch.float32) * 127.5 + 127.5).clip(0, 255)).to(torch.float64)


def check_judge(by: str, spec: Optional[str], refined: bool) -> None:
    """Raise a ValueError for a --refine-by or --detector that is unknown or has no effect."""
    if by not in ("error", "features"):
        raise ValueError(f"found --refine-by={by}, expected error or features")
    if by == "features" and not refined:
        raise ValueError("found --refine-by=features without --refine, which it is of; add --refine or leave it out")
    if by == "error" and spec is not None:
        raise ValueError(f"found --detector={spec} without --refine-by=features, which it is of; leave one of them out")


def described(refine: Union[bool, str], detector: Optional[Detector]) -> Union[bool, str]:
    """What a record says of --refine: which numbers were moved (True: levels), and by features of which detector."""
    if detector is None:
        return True if refine == "levels" else refine
    return f"{'levels' if refine is True else refine}, by features of {detector.name} {detector.sha256}"


def load_judge(by: str, spec: Optional[str], denoiser: Denoiser, quiet: bool = True) -> Optional[Detector]:
    """The detector that `spec` names, by default LeNet for its images, else Inception; None for --refine-by=error.

    Raises a ValueError for one that cannot be used, such as one that takes whole pixel values alone.
    """
    if by == "error":
        return None
    spec = spec or ("lenet" if denoiser.img_shape == LENET_SHAPE else "inception")
    detector = load_detector(spec, denoiser.img_shape, denoiser.device, quiet=quiet)
    try:
        features_of(detector, torch.full((1, *denoiser.img_shape), 0.3, device=denoiser.device))
    except Exception as error:  # whatever a foreign network raises
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{detector.name} refuses images that are not of whole numbers ({type(error).__name__}: "
                         f"{reason}), which --refine-by=features needs; choose another --detector") from None
    return detector


class FeatureRuns(SolverRuns):
    """`errors` of its runs are a_m: their mean, FD, is minimised."""

    def __init__(self, solver: str, noises: Noises, stage: Stage, detector: Detector) -> None:
        super().__init__(solver, noises, stage)
        self.detector = detector
        batches = [features_of(detector, part) for part in noises.ends.split(self.batch)]
        self.exact = torch.cat(batches).cpu().numpy()
        self.width = 1 + self.exact.shape[1]

    def _what(self, *args: Any, **more: Any) -> Dict[str, Any]:
        return super()._what(*args, **more, detector=self.detector.sha256)

    def _figures(self, end: torch.Tensor, part: slice) -> torch.Tensor:
        return torch.cat([super()._figures(end, part), features_of(self.detector, end)], dim=1)

    def _errors(self, figures: np.ndarray) -> np.ndarray:
        shift, rest = feature_residuals(figures[:, 1:], self.exact)
        return np.square(shift).sum() + np.square(rest).sum(axis=1) * len(rest) / (len(rest) - 1)

    @staticmethod
    def better(before: Run, after: Run) -> bool:
        """Whether FD is less."""
        return bool(after.errors.mean() < before.errors.mean())

    def model(self, run: Run, to_p: np.ndarray, step: float, places: Tuple[Place, ...]) -> Tuple[np.ndarray, ...]:
        """Gradient and curvature of FD in p, and the scales of p."""
        shift, rest = feature_residuals(run.figures[:, 1:], self.exact)
        count, others = len(to_p), len(rest) - 1
        J = self._derived(run, step, places, count * len(shift)).reshape(-1, count, len(shift))
        mean = J.mean(axis=0)  # [P, d]
        J = J - mean
        gradient = 2 * (mean @ shift + np.einsum("mpd,md->p", J, rest) / others)
        H = to_p.T @ (2 * (mean @ mean.T + np.einsum("mpd,mqd->pq", J, J) / others)) @ to_p
        return to_p.T @ gradient, H, levenberg_marquardt.scales(np.diag(H), run.errors.mean(), bool(places))

    def _products(self, moves: Iterator[Move], part: slice, kept: Kept) -> torch.Tensor:
        """J of a batch, [B, P d]."""
        here = features_of(self.detector, kept.end)
        return torch.cat([(features_of(self.detector, x) - here) / size for x, size in self._moved(moves, part, kept)],
                         dim=1)
