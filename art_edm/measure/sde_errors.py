"""The local errors of steps of the reverse SDE (`sampling.sde`), for the clock that suits them.

    dx = (1 + beta) (x - D) / sigma dsigma + sqrt(2 beta sigma |dsigma|) xi,    sigma falling

Symbols
-------
beta       strength of the noise: 0 is the probability-flow equation, 1 the reverse-time SDE. Every beta gives x the
           same law at each noise level
r, h       sigma_next / sigma and sigma - sigma_next of a step
N          the noise that a step of `sampling.sde` adds
e          x_next of one step from a path, less the path at sigma_next, both driven by the same noise
growth     how much of e is left, RMS, at the last level: the SDE forgets early errors
strong     distance to the exact path of the same noise. D moves by J_D g dW, J_D = dD/dx, g^2 = 2 beta sigma, so
           |e|^2 / h^3 tends to ((1 + beta) / sigma)^2 |J_D g|^2 / 3; for Euler's step with J_D - 1 in place of J_D.
           Errors of different steps have different noise: their squares add, sum |e|^2 growth^2 is of order 2
weak       error of the law. For beta = 1 D is a martingale along the path: an ancestral step has the mean of x_next
           right, and too little variance, |e|^2 - 2 <N, e> per pixel, about 4 h^2 tr J_D / d. What is missing adds up:
           the sum of its size times growth^2 is of order 1. Exact for Gaussian data of many pixels (the size is
           taken image by image); where data have modes, a path that changes from one to another counts as growth,
           though the law is the same

"Of order p" is that of `profile`: a cost C theta^(p + 1), for which the optimal density is its root C^(1 / (p + 1)).
Left out are the means of e, of order h^2, that Euler's steps and other beta have. They add up to the same order as
the rest, so that for those the clock is not the optimum.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import astuple, dataclass
from functools import partial
from typing import Callable, Deque, List, NamedTuple, Optional, Tuple

import numpy as np
import torch

from art_edm.grids.clocks import Clock
from art_edm.measure.dense_paths import WHOLE, PathOptions, supported_levels, travel
from art_edm.measure.field import evaluate, rms
from art_edm.measure.local_errors import STRIDE, at_middles
from art_edm.measure.profile import TINY, Profile
from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.sampling.sde import _advance, _check, _composed, _Noise

__all__ = ["ORDERS_SDE", "SdeErrors", "TRACERS", "measure_stochastic"]

ORDERS_SDE = {"strong": 2, "weak": 1}
TRACERS = 8  # steps of a dense path whose error is followed to the end


@dataclass(frozen=True)
class SdeErrors:
    """Which errors of which steps are measured."""

    beta: float = 1.0  # as of `sample_sde`; above 0
    step: str = "ancestral"  # as of `sample_sde`
    error: str = "strong"  # a name in `ORDERS_SDE`; weak is for ancestral steps
    stride: int = STRIDE  # levels of the dense path that a step spans
    tracers: int = TRACERS  # steps whose error is followed to the path's end; 0: local errors alone, growth 1


STRONG = SdeErrors()


def measure_stochastic(
    denoiser: Denoiser, latents: torch.Tensor, clock: Clock, points: int, options: PathOptions = WHOLE,
    errors: SdeErrors = STRONG,
) -> Profile:
    """As `local_errors.measure_errors`, for steps of the SDE along its paths: |e|^2 / h^3, or what is lacking / h^2.

    The tracers are spread over the path; between them the growth is interpolated in log-log.

    Returns:
        A profile of order 2 (strong) or 1 (weak). M P evaluations, and M P / 2 for each tracer.
    Raises:
        ValueError: an unknown step or error, beta not above 0, or fewer levels than a step spans.
        NonFiniteOutput: the denoiser returned NaN or infinity.
    """
    levels = supported_levels(denoiser, clock, points)
    beta, step, error, stride, tracers = astuple(errors)
    order = _order_of(error, beta, step, len(levels), stride)
    length = levels[:-stride] - levels[stride:]  # h, [n]
    launch = np.unique(np.linspace(stride, len(levels) - 1, tracers + 1).astype(int)[:-1])

    def norms(x: torch.Tensor, labels: Optional[torch.Tensor], tell: Callable[[], None]) -> torch.Tensor:
        draw, check, noise = _Noise(x, 0), FiniteCheck(x.device), None
        see = lambda x, level: evaluate(denoiser, x, level, labels, check.see)
        window: Deque[_Point] = deque(maxlen=stride + 1)
        columns, followed, sizes = [], [], []  # sizes; paths that began with an error, and those errors
        for k, level in enumerate(levels):
            window.append(_Point(x, see(x, level), noise))
            if k >= stride:
                end, added = _whole_step(list(window), levels[k - stride:k + 1], beta, step)
                columns.append(_size(error, end - x, added) / length[k - stride] ** (order + 1))
                if k in launch:
                    followed.append(end)
                    sizes.append(rms(end - x))
            if k + 1 < len(levels):
                noise = draw()
                part = _composed([noise], levels[k:k + 2], beta, step)
                move = partial(_advance, sigma=level, after=levels[k + 1], noise=part, beta=beta, step=step)
                followed = [move(other, see(other, level)) for other in followed]
                x = move(x, window[-1].denoised)
            tell()
        check.settle()
        ends = [torch.where(e > TINY, rms(other - x) / (e + TINY), 1.0) for other, e in zip(followed, sizes)]
        growth = _interpolated(ends, levels[launch], levels[stride:]) if ends else 1.0
        return torch.stack(columns, dim=1).cpu() * growth**2

    start = time.perf_counter()
    norm, evaluations = travel(denoiser, latents, clock, norms, len(length), options)
    return Profile(clock, *at_middles(levels, stride, norm), evaluations, time.perf_counter() - start, order)


class _Point(NamedTuple):
    """A point of the dense path, and the noise of the interval that ends there."""

    x: torch.Tensor
    denoised: torch.Tensor
    noise: Optional[torch.Tensor]  # unit normal


def _whole_step(
    points: List[_Point], levels: np.ndarray, beta: float, step: str
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Where one step from the first of the points to the level of the last ends, and the noise it adds.

    It begins with what the dense path evaluated and sums its noise, so that it costs nothing more; its error is that
    of the step less that of the path, a constant factor for all levels.
    """
    noise = _composed([point.noise for point in points[1:]], levels, beta, step)
    return _advance(points[0].x, points[0].denoised, levels[0], levels[-1], noise, beta, step), noise


def _size(error: str, e: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """What a step does wrong, [B], per pixel."""
    square = e.square().flatten(1).mean(dim=1)
    return square if error == "strong" else (2 * (noise * e).flatten(1).mean(dim=1) - square).abs()


def _order_of(error: str, beta: float, step: str, levels: int, stride: int) -> int:
    """Order of an error, if it can be measured on so many levels."""
    _check(beta, step)
    if error not in ORDERS_SDE or (error, step) == ("weak", "euler"):
        raise ValueError(f"found the error {error!r} of {step} steps, expected strong, or weak of ancestral steps")
    if beta == 0:
        raise ValueError("found beta = 0, expected noise to measure an SDE's errors; use measure_errors without it")
    if levels < stride + 2:
        raise ValueError(f"found {levels} noise levels, expected at least {stride + 2} for an SDE's errors")
    return ORDERS_SDE[error]


def _interpolated(growth: List[torch.Tensor], known: np.ndarray, levels: np.ndarray) -> torch.Tensor:
    """Growth [b, n] at `levels` from that [S, b] at a few; linear in log-log, and 1 at the last level."""
    points = np.log(np.append(known, levels[-1])[::-1])  # ascending
    values = np.log(torch.stack(growth).cpu().numpy() + TINY)  # [S, b]
    rows: Tuple[np.ndarray, ...] = tuple(np.stack([*values, np.zeros_like(values[0])], axis=1)[:, ::-1])
    return torch.from_numpy(np.exp([np.interp(np.log(levels), points, row) for row in rows]))
