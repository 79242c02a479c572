"""Training of the classifiers whose features judge samples: LeNet for digits, a ResNet for natural images."""

from __future__ import annotations

import math
from typing import Any, Dict

import torch
from torch import nn
from torch.nn import functional

from art_edm.sampling.noise import seeded_generator
from networks.config import ClassifierConfig
from networks.loop import Run, to_unit, train

__all__ = ["ClassifierConfig", "accuracy", "train_classifier"]

FIRST = 5000  # images that set a first layer which is not trained


def _batch(pixels: torch.Tensor, config: ClassifierConfig, it: int) -> Any:
    """The images' numbers [B] and the images [B, C, H, W] of a step; every epoch shows each image at most once."""
    epoch, part = divmod(it, len(pixels) // config.batch)
    order = torch.randperm(len(pixels), generator=seeded_generator(config.seed, -1 - epoch))
    pick = order[part * config.batch:(part + 1) * config.batch]
    images = to_unit(pixels[pick])
    if not config.shift:
        return pick, images
    rng, height, width = seeded_generator(config.seed, it), *images.shape[2:]
    padded = functional.pad(images, [config.shift] * 4, mode="reflect")
    images = torch.empty_like(images)
    moves = torch.randint(0, 2 * config.shift + 1, (len(pick), 2), generator=rng).tolist()
    for image, (down, right), source in zip(images, moves, padded):
        image.copy_(source[:, down:down + height, right:right + width])
    return pick, torch.where(torch.rand(len(pick), 1, 1, 1, generator=rng) < 0.5, images, images.flip(3))


def _learning_rate(it: int, config: ClassifierConfig) -> float:
    cosine = (1 + math.cos(math.pi * it / config.iterations)) / 2
    rise = config.rise * config.iterations
    return config.learning_rate * cosine * (min(1, (it + 1) / rise) if rise else 1)


def _optimizer(net: nn.Module, config: ClassifierConfig) -> torch.optim.Optimizer:
    trained = [p for p in net.parameters() if p.requires_grad]
    if not config.momentum:
        return torch.optim.AdamW(trained, weight_decay=config.weight_decay)
    return torch.optim.SGD(trained, config.learning_rate, config.momentum, weight_decay=config.weight_decay,
                           nesterov=True)


def train_classifier(
    kind: type, pixels: torch.Tensor, labels: torch.Tensor, config: ClassifierConfig, run: Run
) -> nn.Module:
    """A classifier of `kind` trained on pixels uint8 [N, C, H, W] (or images in [-1, 1]) and labels [N].

    Raises what `networks.loop.train` raises.
    """
    torch.manual_seed(config.seed)
    net = kind().to(memory_format=torch.channels_last)
    if hasattr(net, "fit_patches"):
        net.fit_patches(to_unit(pixels[:FIRST]))
    optimizer = _optimizer(net, config)
    parts: Dict[str, Any] = {"net": net, "optimizer": optimizer}

    def step(it: int) -> float:
        pick, images = _batch(pixels, config, it)
        loss = functional.cross_entropy(net(images), labels[pick], label_smoothing=config.smoothing)
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(it, config)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    train(parts, step, config, {}, run)
    return net.to(memory_format=torch.contiguous_format).eval()


@torch.no_grad()
def accuracy(net: nn.Module, pixels: torch.Tensor, labels: torch.Tensor, batch: int = 1000) -> float:
    """Share of images [N, C, H, W] whose label [N] is the classifier's first choice."""
    chosen = torch.cat([net(to_unit(part)).argmax(dim=1) for part in pixels.split(batch)])  # [N]
    return float((chosen == labels).double().mean())
