"""The classifier of CIFAR-10 images whose features give the CIFAR-FID: a small residual network."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["ResNet"]


def _unit(c_in: int, c_out: int) -> nn.Sequential:
    """Convolution, batch norm and activation: [B, c_in, H, W] -> [B, c_out, H, W]."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.GELU())


class Stage(nn.Module):
    """Half the resolution and other channels, then one residual block of two convolutions."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.enter = _unit(c_in, c_out)
        self.block = nn.Sequential(_unit(c_out, c_out), _unit(c_out, c_out))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[B, c_in, H, W] -> [B, c_out, H/2, W/2]."""
        h = functional.max_pool2d(self.enter(h), 2)
        return h + self.block(h)


class ResNet(nn.Module):
    """Residual classifier of [B, 3, 32, 32] in [-1, 1], ten classes.

    `features` are the penultimate activations: the mean over the pixels of the last stage.
    """

    img_shape = (3, 32, 32)

    def __init__(self, widths: Sequence[int] = (32, 96, 192)) -> None:
        super().__init__()
        self.num_features = widths[-1]
        pairs = zip((3, *widths[:-1]), widths)
        self.stages = nn.Sequential(*(Stage(c_in, c_out) for c_in, c_out in pairs))
        self.classify = nn.Linear(self.num_features, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 32, 32] -> [B, widths[-1]]."""
        return self.stages(x.contiguous(memory_format=torch.channels_last)).mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits [B, 10]."""
        return self.classify(self.features(x))
