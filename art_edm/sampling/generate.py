"""Images by number: sampled with seeds of their own, as pixels, as a sheet."""

from __future__ import annotations

import math
from typing import Optional

import numpy as np
import torch
from PIL import Image

from art_edm.grids.grid import Grid
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.errors import Stopped
from art_edm.runtime.files import PathLike, atomic_write
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.noise import noise_and_labels
from art_edm.sampling.solvers import OnStep, sample

__all__ = ["generate", "sample_sheet", "to_pixels"]


def generate(
    denoiser: Denoiser, grid: Grid, solver: str, num: int, seed: int = 0, batch: int = 250,
    progress: Optional[Progress] = None, stop: Optional[GracefulStop] = None, first: int = 0,
) -> torch.Tensor:
    """Sample images; image i depends on (seed, i) only, not on the batch it is made in (up to rounding).

    Args:
        num: number of images, of the indices `first` to `first + num - 1`.
        batch: images per evaluation.
        progress: counts the steps done, summed over images.
        stop: asked after every step.
    Returns:
        Images, float32 [num, C, H, W] on the CPU; not clipped.
    Raises:
        Stopped: `stop` was requested.
    """
    end = first + num
    parts = [torch.empty(0, *denoiser.img_shape)]
    for start in range(first, end, batch):
        indices = range(start, min(start + batch, end))
        watch = _watch(progress, stop, start * grid.num_steps)
        with torch.inference_mode():
            noise, labels = noise_and_labels(denoiser, seed, indices)
            images = sample(denoiser, noise, grid, solver, labels, on_step=watch)  # [b, C, H, W]
        parts.append(images.to("cpu", torch.float32, copy=True))  # out here, so that it is an ordinary tensor
    return torch.cat(parts)


def _watch(progress: Optional[Progress], stop: Optional[GracefulStop], done: int) -> OnStep:
    def on_step(k: int, sigma: float, x: torch.Tensor) -> None:
        if stop is not None and stop.requested:
            raise Stopped("stopped while sampling")
        if progress is not None:
            progress.update(done + k * len(x))

    return on_step


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """float [N, 1, 28, 28] in [-1, 1] -> uint8 [N, 28, 28], clipped and rounded as EDM's generate.py does."""
    return (images * 127.5 + 128).clip(0, 255).to(torch.uint8).squeeze(1)


def sample_sheet(images: torch.Tensor, path: PathLike) -> None:
    """Write images [N, C, H, W], grey or of three colours, as one PNG, row by row in a square, atomically."""
    num, channels, height, width = images.shape
    side = math.ceil(math.sqrt(num))
    sheet = np.zeros((side * side, height, width, channels), np.uint8)
    sheet[:num] = to_pixels(images).reshape(images.shape).permute(0, 2, 3, 1).numpy()
    rows = sheet.reshape(side, side, height, width, channels).swapaxes(1, 2)
    picture = Image.fromarray(rows.reshape(side * height, side * width, channels).squeeze(2 if channels == 1 else ()))
    atomic_write(path, lambda file: picture.save(file, format="png"))
