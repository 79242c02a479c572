"""The classifier of CIFAR-10 images whose features give the CIFAR-FID: a small residual network."""

from __future__ import annotations

from typing import Sequence

import torch
from torch import nn
from torch.nn import functional

__all__ = ["ResNet"]

PATCH = 2  # side of the patches that the first layer decorrelates
RIDGE = 5e-4  # added to their variances, which span four orders of magnitude
LOGIT_SCALE = 1 / 9  # keeps the first logits small beside features that are maxima


def _unit(c_in: int, c_out: int, pool: int = 1) -> nn.Sequential:
    """Convolution, maximum over pool x pool pixels, batch norm and activation."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.MaxPool2d(pool), nn.BatchNorm2d(c_out),
                         nn.GELU())


class Stage(nn.Module):
    """Half the resolution and other channels, then one residual convolution."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.enter = _unit(c_in, c_out, pool=2)
        self.block = _unit(c_out, c_out)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """[B, c_in, H, W] -> [B, c_out, H/2, W/2]."""
        h = self.enter(h)
        return h + self.block(h)


class ResNet(nn.Module):
    """Residual classifier of [B, 3, 32, 32] in [-1, 1], ten classes.

    The first layer whitens patches of the training images and is not trained (`fit_patches`). `features` are the
    penultimate activations: the maxima over the pixels of the last stage.
    """

    img_shape = (3, 32, 32)

    def __init__(self, widths: Sequence[int] = (64, 192, 256)) -> None:
        super().__init__()
        self.num_features = widths[-1]
        size = 3 * PATCH**2  # of a patch
        self.whiten = nn.Conv2d(3, 2 * size, PATCH, bias=False).requires_grad_(False)
        pairs = zip((2 * size, *widths[:-1]), widths)
        self.stages = nn.Sequential(*(Stage(c_in, c_out) for c_in, c_out in pairs))
        self.fc = nn.Linear(self.num_features, 10, bias=False)

    @torch.no_grad()
    def fit_patches(self, images: torch.Tensor) -> None:
        """Make the first layer give the principal components of patches of images [N, 3, H, W], and their negatives."""
        patches = functional.unfold(images, PATCH).movedim(1, 2).reshape(-1, 3 * PATCH**2).double()
        variances, vectors = torch.linalg.eigh(patches.T.cov())
        filters = (vectors / (variances + RIDGE).sqrt()).T.reshape(-1, 3, PATCH, PATCH)
        self.whiten.weight.copy_(torch.cat([filters, -filters]))

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 3, 32, 32] -> [B, widths[-1]]."""
        h = functional.gelu(self.whiten(x.contiguous(memory_format=torch.channels_last)))
        return self.stages(h).amax(dim=(2, 3))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """[B, widths[-1]] -> class logits [B, 10]."""
        return self.fc(features) * LOGIT_SCALE

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits [B, 10]."""
        return self.classify(self.features(x))
