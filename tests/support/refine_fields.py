"""Fields, a start and processes that the tests of what works through a solver share."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.distributed import HashStore

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid, edm_unpinned
from art_edm.models.analytic import EmpiricalDenoiser, MixtureDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.refining.config import RefineConfig
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import World

SHORT = RefineConfig(noises=6, validation=4, fine_steps=20, iterations=5, cheap_iterations=5)
TOP = 80.0
CLOCK = GaussianClock(TOP, 0.5)


def pairs(**more) -> Context:
    """Work in batches of two noises."""
    return Context(**{"batch": 2, **more})


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


def art(num_steps: int, beta: float = 0.0) -> Grid:
    """ART's grid for Gaussian data; its density times (1 + (sigma / 0.5)^2)^(-beta / 4) for others."""
    tau = np.linspace(0, 1, 8193)
    rho = np.hypot(1, CLOCK.sigma(tau) / 0.5) ** (-beta / 2)
    passed = np.concatenate([[0.0], np.cumsum((rho[1:] + rho[:-1]) / 2)])
    inner = np.interp(np.arange(1, num_steps) / num_steps, passed / passed[-1], tau)
    return Grid(np.concatenate([[TOP], CLOCK.sigma(inner), [0.0]]))


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

    def share(self, value):
        self.box[self.rank] = value
        self.barrier.wait(60)
        first = self.box[0]
        self.barrier.wait(60)
        return first


def together(size, work):
    """What `work(world)` gives on each of `size` processes that are played by threads."""
    store, barrier, box = HashStore(), threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Threads(rank, size, store, barrier, box)), range(size)))


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
