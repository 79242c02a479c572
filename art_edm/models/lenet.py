"""Feature detectors for Frechet distances: LeNet, the detector of the paper's MNIST tables (section 6.4)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

__all__ = ["LeNet"]


class LeNet(nn.Module):
    """LeNet-5 with ReLU and max-pooling on [B, 1, 28, 28] in [-1, 1].

    `features` are the 84 penultimate activations, on which the LeNet-FID is computed.
    """

    num_features, img_shape = 84, (1, 28, 28)

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv1 = nn.Conv2d(6, 16, 5)
        self.fc0 = nn.Linear(400, 120)
        self.fc1 = nn.Linear(120, 84)
        self.fc2 = nn.Linear(84, 10)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """[B, 1, 28, 28] -> [B, 84]."""
        h = functional.max_pool2d(functional.relu(self.conv0(x)), 2)
        h = functional.max_pool2d(functional.relu(self.conv1(h)), 2)
        return functional.relu(self.fc1(functional.relu(self.fc0(h.flatten(1)))))

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """[B, 84] -> class logits [B, 10]."""
        return self.fc2(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits [B, 10]."""
        return self.classify(self.features(x))
