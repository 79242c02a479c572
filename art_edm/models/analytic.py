"""Exact denoisers: distributions whose score, drift and surrogate are known in closed form.

Symbols (with the noise-convolved density p(x; sigma) = integral p_data(y) N(x; y, sigma^2 I) dy)
-------
score      grad_x log p(x; sigma), [B, C, H, W]
D          posterior mean of the clean image, D = x + sigma^2 score
F          exact drift, equation (5): F = -(x - D) / sigma = sigma score
slope      dD/dsigma, total, along the path's direction dx/dsigma = (x - D) / sigma
Q          exact surrogate, equation (8): Q = d^2 x / dsigma^2 = -slope / sigma
p_i        posterior weight of component (or image) i, softmax of the log-densities l_i
l_i'       dl_i/dsigma along the path, so that p_i' = p_i (l_i' - sum_j p_j l_j')

All is computed in float64 whatever the type of x, and returned in the type of x: the oracle's own
error is then the rounding of its input and output.
"""

from __future__ import annotations

from typing import Iterator, Optional, Sequence, Tuple, Union

import torch

from art_edm.models.denoiser import Denoiser

__all__ = ["EmpiricalDenoiser", "ExactDenoiser", "GaussianDenoiser", "MixtureDenoiser", "one_dimensional"]

Values = Union[float, Sequence[float], torch.Tensor]


def _double(values: Values, name: str) -> torch.Tensor:
    values = torch.as_tensor(values, dtype=torch.float64)
    if not values.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinity, expected finite numbers")
    return values


class ExactDenoiser(Denoiser):
    """Base of the exact denoisers: unconditional, defined at any sigma > 0.

    A subclass writes `_denoised`, `_score` and `_slope` for x [B, C, H, W] and s [B, 1, 1, 1], both
    float64. The methods below do not count as evaluations; calling the denoiser does.
    """

    def __init__(self, img_shape: Sequence[int], sigma_data: float, sigma_min: float, sigma_max: float) -> None:
        if len(img_shape) != 3:
            raise ValueError(f"img_shape is {tuple(img_shape)}, expected three numbers (C, H, W)")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"sigma_min is {sigma_min} and sigma_max {sigma_max}, expected 0 < sigma_min < sigma_max")
        super().__init__(*img_shape)
        self.sigma_data, self.sigma_min, self.sigma_max = float(sigma_data), float(sigma_min), float(sigma_max)

    def _denoised(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not define _denoised()")

    def _score(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return (self._denoised(x, s) - x) / s.square()

    def _slope(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        raise TypeError(f"{type(self).__name__} does not define _slope()")

    @staticmethod
    def _prepare(x: torch.Tensor, sigma: Union[float, torch.Tensor]) -> Tuple[torch.Tensor, torch.Tensor]:
        """x and sigma (scalar or [B]) in float64, sigma as [B or 1, 1, 1, 1]."""
        s = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).reshape(-1, 1, 1, 1)
        return x.to(torch.float64), s

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        """D(x; sigma) for x [B, C, H, W], sigma [B]; computed in float64, returned in the type of x."""
        return self._denoised(*self._prepare(x, sigma)).to(x.dtype)

    def score(self, x: torch.Tensor, sigma: Union[float, torch.Tensor]) -> torch.Tensor:
        """grad_x log p(x; sigma).

        Args:
            x: [B, C, H, W].
            sigma: scalar or [B], positive.
        Returns:
            [B, C, H, W], in units of 1 / x.
        """
        return self._score(*self._prepare(x, sigma)).to(x.dtype)

    def exact_drift(self, x: torch.Tensor, sigma: Union[float, torch.Tensor]) -> torch.Tensor:
        """F = sigma score, equation (5); x [B, C, H, W], sigma scalar or [B] -> [B, C, H, W], x per sigma."""
        double, s = self._prepare(x, sigma)
        return (s * self._score(double, s)).to(x.dtype)

    def exact_surrogate(self, x: torch.Tensor, sigma: Union[float, torch.Tensor]) -> torch.Tensor:
        """Q = d/dsigma [(x - D) / sigma] along the path, equation (8); a vector, not its norm.

        Args:
            x: [B, C, H, W].
            sigma: scalar or [B], positive.
        Returns:
            [B, C, H, W], in units of x per sigma^2; `field.rms` of it is |Q|.
        """
        double, s = self._prepare(x, sigma)
        return (-self._slope(double, s) / s).to(x.dtype)


class GaussianDenoiser(ExactDenoiser):
    """Data N(mean, diag(variance)).

    Args:
        mean, variance: numbers or tensors that broadcast to img_shape; variance >= 0.
        img_shape: (C, H, W).
        sigma_min, sigma_max: range of noise levels that users of the denoiser should cover.
    Raises:
        ValueError: a shape does not broadcast, or a value is not finite or negative.
    """

    def __init__(
        self, mean: Values, variance: Values, img_shape: Sequence[int], sigma_min: float = 0.002,
        sigma_max: float = 80.0,
    ) -> None:
        mean, variance = _double(mean, "mean"), _double(variance, "variance")
        if (variance < 0).any():
            raise ValueError(f"variance has the value {float(variance.min()):.6g}, expected none below 0")
        try:
            mean, variance = (v.expand(tuple(img_shape)).clone() for v in (mean, variance))
        except RuntimeError:
            shapes = f"mean has shape {tuple(mean.shape)} and variance {tuple(variance.shape)}"
            raise ValueError(f"{shapes}, expected shapes that broadcast to {tuple(img_shape)}") from None
        super().__init__(img_shape, float(variance.mean().sqrt()), sigma_min, sigma_max)
        self.register_buffer("mean", mean)  # [C, H, W]
        self.register_buffer("variance", variance)  # [C, H, W]

    def _denoised(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return self.mean + self.variance / (self.variance + s.square()) * (x - self.mean)

    def _score(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        return -(x - self.mean) / (self.variance + s.square())

    def _slope(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        # D' = v/u x' - 2 s v/u^2 (x - mean) with u = v + s^2 and x' = s (x - mean)/u; hence Q = v (x - mean)/u^2.
        return -s * self.variance * (x - self.mean) / (self.variance + s.square()).square()

    def initial(self, latents: torch.Tensor, sigma: Union[float, torch.Tensor]) -> torch.Tensor:
        """Exact draws at noise level sigma: mean + sqrt(variance + sigma^2) latents.

        Args:
            latents: unit normal, [B, C, H, W].
            sigma: scalar or [B], not negative.
        Returns:
            [B, C, H, W] float64.
        """
        z, s = self._prepare(latents, sigma)
        return self.mean + (self.variance + s.square()).sqrt() * z


class MixtureDenoiser(ExactDenoiser):
    """Data sum_i weights_i N(means_i, std_i^2 I), for few components (all are held at once).

    Args:
        weights: [N], positive; divided by their sum.
        means: [N, C, H, W].
        std: number or [N], >= 0.
        sigma_min, sigma_max: range of noise levels that users of the denoiser should cover.
    Raises:
        ValueError: a shape does not match, or a value is out of range.
    """

    def __init__(
        self, weights: Values, means: torch.Tensor, std: Values, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> None:
        weights, means, std = _double(weights, "weights"), _double(means, "means"), _double(std, "std")
        if means.ndim != 4 or tuple(weights.shape) != (len(means),) or tuple(std.shape) not in ((), (len(means),)):
            found = f"weights {tuple(weights.shape)}, means {tuple(means.shape)}, std {tuple(std.shape)}"
            raise ValueError(f"shapes are {found}, expected [N], [N, C, H, W] and one number or [N]")
        if (weights <= 0).any() or (std < 0).any():
            low = f"{float(weights.min()):.6g} and {float(std.min()):.6g}"
            raise ValueError(f"the least weight and std are {low}, expected weights above 0 and std not below 0")
        weights, std = weights / weights.sum(), std.expand(len(means))
        w = weights.reshape(-1, 1, 1, 1)
        spread = (w * (means - (w * means).sum(0)).square()).sum(0)  # [C, H, W]
        super().__init__(means.shape[1:], float((weights @ std.square() + spread.mean()).sqrt()), sigma_min, sigma_max)
        self.register_buffer("weights", weights)  # [N]
        self.register_buffer("means", means)  # [N, C, H, W]
        self.register_buffer("std", std.clone())  # [N]

    def _posterior(self, x: torch.Tensor, s: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Residuals x - m_i [B, N, d], variances tau_i = std_i^2 + s^2 [B, N, 1], weights p_i [B, N, 1]."""
        r = (x[:, None] - self.means).flatten(2)
        tau = self.std.square().reshape(1, -1, 1) + s.flatten(1)[:, :, None]**2
        log_density = -r.shape[2] / 2 * tau.log() - r.square().sum(dim=2, keepdim=True) / (2 * tau)
        return r, tau, (self.weights.log()[:, None] + log_density).log_softmax(dim=1).exp()

    def _denoised(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        r, tau, p = self._posterior(x, s)
        means = self.means.flatten(1) + self.std.square().reshape(1, -1, 1) / tau * r  # [B, N, d]
        return (p * means).sum(dim=1).reshape(x.shape)

    def _score(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        r, tau, p = self._posterior(x, s)
        return -(p * r / tau).sum(dim=1).reshape(x.shape)

    def _slope(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        r, tau, p = self._posterior(x, s)
        s = s.flatten(1)[:, :, None]  # [B, 1, 1]
        shrink = self.std.square().reshape(1, -1, 1) / tau  # [B, N, 1]
        means = self.means.flatten(1) + shrink * r  # D_i, [B, N, d]
        dx = s * (p * r / tau).sum(dim=1, keepdim=True)  # dx/dsigma, [B, 1, d]
        dmeans = shrink * (dx - 2 * s / tau * r)  # D_i'
        # l_i = log w_i - d/2 log tau_i - |r_i|^2 / (2 tau_i), with tau_i' = 2 s and r_i' = dx
        dlog = ((s * r.square() / tau - r * dx).sum(dim=2, keepdim=True) - r.shape[2] * s) / tau
        dlog = dlog - (p * dlog).sum(dim=1, keepdim=True)
        means = means - (p * means).sum(dim=1, keepdim=True)  # changes nothing but the rounding
        return (p * (dmeans + dlog * means)).sum(dim=1).reshape(x.shape)


class EmpiricalDenoiser(ExactDenoiser):
    """Data uniform over a set of images: what a network trained without limit would learn.

    The log-weights are taken as (x.y_i - |y_i|^2 / 2) / sigma^2: the term |x|^2 common to all images,
    which would drown them at large sigma, cancels on paper. In float64 and relative to the mean image
    their error is that of rounding x itself; in float32, weights would be wrong by 0.1 at sigma = 0.002.

    Args:
        images: [N, C, H, W], kept in their type; on the device the module is moved to.
        chunk: images taken at a time; takes about (3 B + 3 C H W) chunk numbers of memory.
        sigma_min, sigma_max: range of noise levels that users of the denoiser should cover.
    Raises:
        ValueError: images are not a float batch, are empty, or hold NaN.
    """

    def __init__(
        self, images: torch.Tensor, chunk: int = 4096, sigma_min: float = 0.002, sigma_max: float = 80.0
    ) -> None:
        if images.ndim != 4 or not len(images) or not images.is_floating_point():
            raise ValueError(f"images are {images.dtype} {tuple(images.shape)}, expected floats [N, C, H, W], N > 0")
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}, expected at least 1")
        flat = images.flatten(1)  # [N, d]
        centre = flat.mean(dim=0, dtype=torch.float64)  # [d]
        square = sum(float((part.to(torch.float64) - centre).square().sum()) for part in flat.split(chunk))
        if not square < float("inf"):
            raise ValueError("images hold NaN or infinity, expected finite numbers")
        super().__init__(images.shape[1:], (square / flat.numel()) ** 0.5, sigma_min, sigma_max)
        self.chunk = chunk
        self.register_buffer("images", flat)
        self.register_buffer("centre", centre)

    def _chunks(self, x: torch.Tensor, s: torch.Tensor) -> Iterator[Tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """For centred x [B, d], s [B, 1]: images y [n, d], |y|^2 [n], log-weights [B, n] up to one constant."""
        for part in self.images.split(self.chunk):
            y = part.to(torch.float64) - self.centre
            square = y.square().sum(dim=1)
            yield y, square, (x @ y.T - square / 2) / s.square()

    def _moments(self, x: torch.Tensor, s: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """Centred posterior mean [B, d] and log of the weights' sum [B, 1], by a running log-sum-exp."""
        mean, top = torch.zeros_like(x), torch.full_like(s, -float("inf"))
        total = torch.zeros_like(s)
        for y, _, logits in self._chunks(x, s):
            new = torch.maximum(top, logits.amax(dim=1, keepdim=True))
            weight, scale = (logits - new).exp(), (top - new).exp()
            mean, total, top = mean * scale + weight @ y, total * scale + weight.sum(dim=1, keepdim=True), new
        return mean / total, top + total.log()

    def _denoised(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        mean, _ = self._moments(x.flatten(1) - self.centre, s.flatten(1).expand(len(x), 1))
        return (self.centre + mean).reshape(x.shape)

    def _slope(self, x: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        # l_i' = -(x - y_i).x'/s^2 + |x - y_i|^2/s^3 = (x - y_i).(D - y_i) / s^3, since x' = (x - D)/s.
        shape, s, x = x.shape, s.flatten(1).expand(len(x), 1), x.flatten(1) - self.centre
        mean, log_total = self._moments(x, s)
        first, total = torch.zeros_like(x), torch.zeros_like(s)
        for y, square, logits in self._chunks(x, s):
            dlog = square - (x + mean) @ y.T + (x * mean).sum(dim=1, keepdim=True)  # s^3 l_i', [B, n]
            weight = (logits - log_total).exp() * dlog  # s^3 p_i l_i'
            first, total = first + weight @ y, total + weight.sum(dim=1, keepdim=True)
        return ((first - total * mean) / s**3).reshape(shape)  # sum_i p_i l_i' (y_i - D)


def one_dimensional() -> GaussianDenoiser:
    """The paper's one-dimensional example: data N(0, 1), T = sigma_max = 3; one pixel, [1, 1, 1]."""
    denoiser = GaussianDenoiser(0.0, 1.0, (1, 1, 1), sigma_min=1e-4, sigma_max=3.0)
    denoiser.pinned = False  # its hand-made rules are the paper's for this example: all the way down
    return denoiser
