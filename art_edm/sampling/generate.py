"""Images by number: sampled with seeds of their own, as pixels, as a sheet."""

from __future__ import annotations

import math
from typing import Callable, Optional, Union

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

__all__ = ["generate", "sample_sheet", "to_pixels", "watching"]

Watch = Callable[[int], None]

def generate(
    denoiser: Denoiser, grid: Grid, solver: str, images: Union[int, range], seed: int = 0, batch: int = 250,
    watch: Optional[Watch] = None,
) -> torch.Tensor:
    """Sample images; image i depends on (seed, i) only, not on the batch it is made in (up to rounding).

    Args:
        images: how many, or the range of their indices.
        batch: images per evaluation.
        watch: called after every step with the number of steps done, summed over images; may raise.
    Returns:
        Images, float32 [N, C, H, W] on the CPU; not clipped.
    """
    indices = range(images) if isinstance(images, int) else images
    parts = [torch.empty(0, *denoiser.img_shape)]
    for start in range(0, len(indices), batch):
        on_step = _counting(watch, start * grid.num_steps)
        with torch.inference_mode():
            noise, labels = noise_and_labels(denoiser, seed, indices[start:start + batch])
            made = sample(denoiser, noise, grid, solver, labels, on_step=on_step)  # [b, C, H, W]
        parts.append(made.to("cpu", torch.float32, copy=True))  # out here, so that it is an ordinary tensor
    return torch.cat(parts)


def _counting(watch: Optional[Watch], done: int) -> Optional[OnStep]:
    """What a solver calls, for a watch that counts the steps of images."""
    return None if watch is None else lambda k, sigma, x: watch(done + k * len(x))


def watching(progress: Progress, stop: GracefulStop) -> Watch:
    """A watch that shows progress, and raises Stopped when asked to stop."""

    def watch(done: int) -> None:
        if stop.requested:
            raise Stopped("stopped while sampling")
        progress.update(done)

    return watch


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
