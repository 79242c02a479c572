"""An oracle: what a classifier's features say of images, without the detectors and the stores of the product."""

from __future__ import annotations

import numpy as np
import torch

from art_edm.metrics.frechet import Moments, frechet_distance, moments
from art_edm.sampling.generate import to_pixels


@torch.no_grad()
def features_of(net: torch.nn.Module, images: torch.Tensor) -> np.ndarray:
    """Features [N, d] of images [N, C, H, W] in [-1, 1]."""
    return torch.cat([net.features(part) for part in images.split(1000)]).numpy()


def fid_of(net: torch.nn.Module, samples: torch.Tensor, reference: Moments) -> float:
    """Frechet distance of samples [N, C, H, W] that are clipped and rounded to pixels first."""
    images = to_pixels(samples).reshape(samples.shape) / 127.5 - 1
    return frechet_distance(*moments(features_of(net, images)), *reference)
