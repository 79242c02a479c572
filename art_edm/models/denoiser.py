"""The one contract every model meets: a denoiser D(x; sigma).

Symbols
-------
x          noisy images, [B, C, H, W] float
sigma      noise level, scalar or [B], in the units of x
denoised   D(x; sigma) = E[y | y + sigma n = x], [B, C, H, W]
score      (D(x; sigma) - x) / sigma**2

Everything above this layer sees a model only through `Denoiser`: the field, the solvers, the
training loop. An adapter (EDM, EDM2, an exact distribution, our own network) is a subclass that
sets the attributes and writes `denoise`.
"""

from __future__ import annotations

import itertools
from typing import Optional, Tuple, Union

import torch

__all__ = ["Denoiser"]


class Denoiser(torch.nn.Module):
    """Base class of all denoisers.

    Attributes:
        sigma_min, sigma_max: range of noise levels at which the model is meaningful.
        sigma_data: standard deviation of the data, used to choose a base clock.
        img_channels: C.
        img_resolution: H (= W for networks; an exact distribution may have `img_shape` [C, H, W]).
        label_dim: number of classes, 0 when unconditional.
        class_idx: the class of all images; None draws one for each.
        networks: network calls per evaluation, 2 where one network guides another.
        difference_step: relative half-width of the difference that measures |Q|; None until it is chosen.
        pinned: whether hand-made rules stop at sigma_min before 0, as EDM's does for networks.
        evaluations: images evaluated so far; the unit in which all costs are reported.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    label_dim: int = 0
    class_idx: Optional[int] = None
    networks: int = 1
    difference_step: Optional[float] = 0.01
    pinned: bool = True

    def __init__(self, img_channels: int, img_resolution: int, img_width: Optional[int] = None) -> None:
        super().__init__()
        self.img_channels = img_channels
        self.img_resolution = img_resolution
        self.img_shape = (img_channels, img_resolution, img_width or img_resolution)
        self.evaluations = 0

    @property
    def device(self) -> torch.device:
        """Where the weights are; the CPU for a model that has none."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next((tensor.device for tensor in tensors), torch.device("cpu"))

    @property
    def sigma_limits(self) -> Tuple[float, float]:
        """Lowest and highest level a grid may have; wider than the range of meaning where a model allows more."""
        return 0.0, self.sigma_max

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        """D(x; sigma) for x [B, C, H, W] and sigma [B]; written by each adapter."""
        raise TypeError(f"{type(self).__name__} does not define denoise()")

    def forward(
        self, x: torch.Tensor, sigma: Union[float, torch.Tensor], class_labels: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """Denoise a batch and count it.

        Args:
            x: [B, C, H, W], any float type; the result has the same type.
            sigma: scalar or [B], positive.
            class_labels: one-hot [B, label_dim], or None.
        Returns:
            denoised [B, C, H, W].
        Raises:
            ValueError: x is not a batch of this model's images, or sigma has another length.
        """
        if x.ndim != 4 or tuple(x.shape[1:]) != self.img_shape:
            expected = ", ".join(str(n) for n in self.img_shape)
            raise ValueError(f"x has shape {tuple(x.shape)}, expected [B, {expected}]")
        if not isinstance(sigma, torch.Tensor) or (sigma.numel() == 1 and sigma.device != x.device):
            sigma = x.new_full((1,), float(sigma))  # made on the device: a copy to it would wait
        sigma = sigma.to(x.device, x.dtype).reshape(-1)
        if len(sigma) not in (1, len(x)):
            raise ValueError(f"sigma has {len(sigma)} values for {len(x)} images, expected one, or one for each")
        self.evaluations += len(x)
        return self.denoise(x, sigma.expand(len(x)), class_labels)

    def initial(self, latents: torch.Tensor, sigma: float) -> torch.Tensor:
        """Where a path starts: float64 [B, C, H, W] from unit normal latents at noise level `sigma`.

        Networks start as EDM does, from pure noise; an exact distribution may start from its own marginal.
        """
        return latents.to(torch.float64) * sigma

    def draw_labels(self, count: int, generator: torch.Generator) -> Optional[torch.Tensor]:
        """One-hot labels [count, label_dim], uniform or all of `class_idx`; None for an unconditional model.

        As upstream's scripts do, the generator is the one that drew the noise just before.
        """
        if self.label_dim == 0:
            return None
        index = torch.randint(self.label_dim, (count,), generator=generator)
        if self.class_idx is not None:
            index = torch.full_like(index, self.class_idx)
        return torch.zeros(count, self.label_dim).scatter_(1, index[:, None], 1).to(self.device)

    def neighbours(self, sigma: torch.Tensor, step: float) -> Tuple[torch.Tensor, torch.Tensor]:
        """Levels [B] above and below sigma [B], `step` of it away, between which D is differenced."""
        return sigma * (1 + step), sigma * (1 - step)

    def round_sigma(self, sigma: Union[float, torch.Tensor]) -> torch.Tensor:
        """The nearest noise level the model supports; the identity for continuous models."""
        return torch.as_tensor(sigma, dtype=None if isinstance(sigma, torch.Tensor) else torch.float64)
