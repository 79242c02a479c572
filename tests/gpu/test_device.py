"""The numbers of a GPU are the CPU's, within its rounding; each test runs on the CPU too, where it rehearses itself."""

from __future__ import annotations

import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import edm
from art_edm.measure.dense_paths import measure_along, measure_profile
from art_edm.measure.local_errors import measure_errors
from art_edm.metrics.feature_stats import RunningMoments
from art_edm.models.unet import ScoreUNet
from art_edm.refining.config import RefineConfig
from art_edm.refining.refine import refine
from art_edm.runtime.memory import NoMemory, with_back_off
from art_edm.runtime.precision import full_precision
from art_edm.sampling.solvers import SOLVERS, sample

DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def network():
    """A small network, all of its weights drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = ScoreUNet(8, sigma_data=0.5, width=8, deep_width=12, emb=8).eval().requires_grad_(False)
        for value in net.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return net


def noises(count):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def both(device, work):
    """What `work(denoiser, latents)` gives there and here."""
    there, here = (work(network().to(place), noises(4).to(place)) for place in (device, "cpu"))
    return torch.as_tensor(there).cpu(), torch.as_tensor(here)


@pytest.mark.slow
@DEVICE
def test_samples(device):
    for name in SOLVERS:
        there, here = both(device, lambda net, x, name=name: sample(net, x, edm(6, 0.002, 80.0), name))
        scale = float(here.abs().max())
        assert float((there - here).abs().max()) < 1e-3 * scale, name
        other = sample(network(), noises(4), edm(5, 0.002, 80.0), name)
        assert float((other - here).abs().max()) > 1e-2 * scale, name


@pytest.mark.slow
@DEVICE
@pytest.mark.parametrize("measure", [measure_along, measure_profile, measure_errors])
def test_profiles(device, measure):
    there, here = both(device, lambda net, x: measure(net, x, GaussianClock(80.0, 0.5), 16).norm)
    torch.testing.assert_close(there.mean(0), here.mean(0), rtol=1e-3, atol=0)


@pytest.mark.slow
@DEVICE
def test_a_refined_grid(device):
    config = RefineConfig(noises=4, validation=4, fine_steps=6, iterations=1, cheap_iterations=1)
    there, here = both(device, lambda net, x: refine(net, edm(4, 0.002, 80.0), "heun", config).grid.values.copy())
    torch.testing.assert_close(there, here, rtol=1e-3, atol=0)


@DEVICE
def test_moments(device):
    features = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    running = RunningMoments(32, device)
    for part in features.split(100):
        running.update(part.to(device))
    mean, covariance = (torch.from_numpy(value) for value in running.result())
    torch.testing.assert_close(mean, features.double().mean(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(covariance, features.double().T.cov(), rtol=1e-9, atol=1e-12)


@DEVICE
def test_memory_that_runs_out(device):
    def work(batch):
        torch.empty(1 << 55 if batch > 2 else 1, dtype=torch.uint8, device=device)
        return batch

    assert with_back_off(work, 16, device) == 2
    with pytest.raises(NoMemory, match=f"free on {device}, expected room for one image"):
        with_back_off(lambda batch: work(16), 16, device)


@DEVICE
def test_full_precision(device):
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(device)
    exact, before = a.double() @ a.double(), torch.backends.cuda.matmul.allow_tf32
    error = lambda: float((a @ a - exact).abs().max() / exact.abs().max())
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        coarse = error()
        with full_precision():
            assert error() < 1e-6
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert coarse > 1e-5 or device == "cpu" or torch.cuda.get_device_capability() < (8, 0)
