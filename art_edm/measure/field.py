"""The probability-flow field of a denoiser and the surrogate that measures its curvature.

Symbols
-------
F       drift in physical time psi = sigma_max - sigma, equation (5): F = -(x - D(x; sigma)) / sigma
d       slope of the path in sigma: dx/dsigma = (x - D) / sigma = -F
Q       d^2 x / dsigma^2 along the path, equation (8): Q = dF/dpsi + (dF/dx) F
slope   dD/dsigma, the total derivative of D along (dx/dsigma, 1)
|Q|     RMS over pixels of Q = |slope| / sigma, since d/dsigma [(x - D)/sigma] = -slope / sigma

Differencing D and not F avoids the cancellation of x: at sigma = 80, x is a hundred times D.
"""

from __future__ import annotations

import math
from typing import Callable, NamedTuple, Optional, Union

import torch

from art_edm.models.denoiser import Denoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.runtime.precision import full_precision

__all__ = [
    "DIFFERENCE_STEP", "STEPS", "Surrogate", "choose_step", "drift", "evaluate", "rms", "surrogate",
]

# Relative steps h of the central difference. The truncation error falls as h^2, the rounding error of a
# float32 network grows as 1/h; tests/benchmarks/difference_step.py measures both against float64. The first
# is right for most; a network that sees its noise level through Fourier features of high frequency needs less.
STEPS = (0.01, 0.003, 0.001)
DIFFERENCE_STEP = STEPS[0]
See = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # looks at what a denoiser returned, and passes it on
AGREEMENT = 5e-3  # with the next smaller step: what is left of the error is a tenth of it


class Surrogate(NamedTuple):
    """What three evaluations tell about a point of a path."""

    denoised: torch.Tensor  # D(x; sigma), [B, C, H, W]
    slope: torch.Tensor  # dD/dsigma along the path, [B, C, H, W]
    norm: torch.Tensor  # |Q|, [B]


def rms(x: torch.Tensor) -> torch.Tensor:
    """Root mean square over everything but the first axis, [B, ...] -> [B]: a norm free of resolution."""
    return x.flatten(1).square().mean(dim=1).sqrt()


def _at_once(x: torch.Tensor) -> See:
    """NaN and infinity are an error as soon as they are returned."""
    return FiniteCheck(x.device, deferred=False).see


@torch.no_grad()
def evaluate(
    denoiser: Denoiser, x: torch.Tensor, sigma: float, class_labels: Optional[torch.Tensor] = None,
    see: Optional[See] = None,
) -> torch.Tensor:
    """D(x; sigma) [B, C, H, W] in full precision; raises a NonFiniteOutput for NaN or infinity unless `see` looks."""
    level = x.new_full((), sigma)  # made on the device: a copy to it would wait
    with full_precision():
        return (see or _at_once(x))(denoiser(x, level, class_labels), level)


@torch.no_grad()
def drift(
    denoiser: Denoiser, x: torch.Tensor, sigma: Union[float, torch.Tensor], class_labels: Optional[torch.Tensor] = None
) -> torch.Tensor:
    """F(x, psi) = -(x - D(x; sigma)) / sigma, equation (5).

    Args:
        x: [B, C, H, W], float64 for exactness; the denoiser may compute in float32.
        sigma: scalar or [B], positive.
    Returns:
        [B, C, H, W], in units of x per unit of sigma. One evaluation per image.
    Raises:
        NonFiniteOutput: the denoiser returned NaN or infinity.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
    with full_precision():
        denoised = _at_once(x)(denoiser(x, sigma, class_labels), sigma)
    return (denoised - x) / sigma.reshape(-1, 1, 1, 1)


@torch.no_grad()
def surrogate(
    denoiser: Denoiser, x: torch.Tensor, sigma: Union[float, torch.Tensor],
    class_labels: Optional[torch.Tensor] = None, step: Optional[float] = None, see: Optional[See] = None,
) -> Surrogate:
    """|Q|(x, psi), equation (8), by a central difference of D along the path.

    The path is followed to sigma (1 +- step) along its tangent; curvature of the path enters only at
    the order of the difference's own error, step^2. A denoiser of discrete noise levels chooses the two.

    Args:
        x: [B, C, H, W].
        sigma: scalar or [B], positive.
        step: relative half-width of the difference; by default the denoiser's own.
        see: looks for NaN and infinity; by default they are an error at once.
    Returns:
        `Surrogate`; |Q| in units of x per sigma^2. Three evaluations per image.
    Raises:
        NonFiniteOutput: the denoiser returned NaN or infinity.
    """
    sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).reshape(-1).expand(x.shape[0])  # [B]
    s, step = sigma.reshape(-1, 1, 1, 1), step or denoiser.difference_step or DIFFERENCE_STEP
    see = see or _at_once(x)
    with full_precision():
        denoised = see(denoiser(x, sigma, class_labels), sigma)
        above, below = denoiser.neighbours(sigma, step)  # [B] each
        tangent = (x - denoised) / s  # dx/dsigma
        pair = torch.cat([x + (level - sigma).reshape(-1, 1, 1, 1) * tangent for level in (above, below)])
        levels = torch.cat([above, below])
        labels = None if class_labels is None else torch.cat([class_labels, class_labels])
        upper, lower = see(denoiser(pair, levels, labels), levels).chunk(2)
    slope = (upper - lower) / (above - below).reshape(-1, 1, 1, 1)
    return Surrogate(denoised, slope, rms(slope) / sigma)


def choose_step(denoiser: Denoiser, latents: torch.Tensor, class_labels: Optional[torch.Tensor] = None) -> float:
    """The largest of `STEPS` whose |Q| agrees with that of the next smaller one.

    Compared by the median over seven noise levels, so that the rounding error, which reigns at the lowest
    of them only, has no say. The images are noise of the standard deviation that a path has there.

    Args:
        latents: unit normal noise [B, C, H, W], B >= 1.
    Returns:
        The step. 21 evaluations per image for each step that is tried.
    Raises:
        NonFiniteOutput: the denoiser returned NaN or infinity.
    """
    levels = denoiser.round_sigma(
        torch.logspace(math.log10(denoiser.sigma_min * 5), math.log10(denoiser.sigma_max * 0.8), 7, dtype=torch.float64)
    ).tolist()

    def norms(step: float) -> torch.Tensor:
        """|Q| [7, B]."""
        spread = [math.hypot(level, denoiser.sigma_data) for level in levels]
        check = FiniteCheck(latents.device)
        points = [surrogate(denoiser, s * latents, level, class_labels, step, check.see)
                  for s, level in zip(spread, levels)]
        check.settle()
        return torch.stack([point.norm for point in points])

    wide = norms(STEPS[0])
    for step, smaller in zip(STEPS, STEPS[1:]):
        narrow = norms(smaller)
        if float((wide / narrow - 1).abs().median()) < AGREEMENT:
            return step
        wide = narrow
    return STEPS[-1]
