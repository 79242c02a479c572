"""Fields, a start and processes that the tests of what works through a solver share."""

from __future__ import annotations

import torch

from art_edm.grids.grid import Grid, edm_unpinned
from art_edm.models.analytic import EmpiricalDenoiser, MixtureDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.refining.refine import RefineConfig
from art_edm.runtime.distributed import World

SHORT = RefineConfig(noises=6, held=4, batch=2, fine=20, iterations=5, more=5)


def mixture() -> MixtureDenoiser:
    """Three components in four pixels."""
    generator = torch.Generator().manual_seed(3)
    means = 0.5 * torch.randn(3, 1, 2, 2, generator=generator, dtype=torch.float64)
    return MixtureDenoiser([0.5, 0.3, 0.2], means, [0.3, 0.4, 0.6], sigma_min=0.01, sigma_max=20.0)


def clusters() -> EmpiricalDenoiser:
    """Clusters of images of 16 pixels: paths jump to one of them, and end-point errors have heavy tails."""
    generator = torch.Generator().manual_seed(1)
    centres, near = (torch.randn(n, 1, 4, 4, generator=generator, dtype=torch.float64) for n in (10, 40))
    return EmpiricalDenoiser((centres.repeat(4, 1, 1, 1) + 0.4 * near).clamp(-1, 1))


def start(num_steps: int = 5) -> Grid:
    """A grid for it that is far from the best."""
    return edm_unpinned(num_steps, 20.0)


class Threads(World):
    """A process played by a thread: phases go through a store as usual, sums and values through memory."""

    def __init__(self, rank, size, store, barrier, box):
        super().__init__(rank, size, store)
        self.barrier, self.box = barrier, box

    def sum(self, tensor):
        self.box[self.rank] = tensor
        self.barrier.wait(60)
        total = sum(self.box[rank] for rank in range(self.size))
        self.barrier.wait(60)
        return total


class Rounded(Denoiser):
    """Data N(0, W) in float32 through matrices, whose rounding depends on the images that are evaluated together."""

    def __init__(self):
        super().__init__(1, 4)
        self.sigma_max = 20.0
        generator = torch.Generator().manual_seed(8)
        basis = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))[0]
        self.basis, self.variance = basis.float(), torch.linspace(0.1, 2, 16)

    def denoise(self, x, sigma, class_labels):
        shrink = self.variance / (self.variance + sigma[:, None].float() ** 2)
        return ((x.float().flatten(1) @ self.basis * shrink) @ self.basis.T).reshape(x.shape).to(x.dtype)
