"""Nothing mixes devices, and loops do not wait for one: on a pretended device, where no GPU is needed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import edm
from art_edm.learning.rollouts import LiveEnvironment
from art_edm.measure.dense_paths import measure_along, measure_profile
from art_edm.measure.local_errors import measure_errors
from art_edm.measure.sde_errors import measure_stochastic
from art_edm.metrics.feature_stats import RunningMoments
from art_edm.models.analytic import MixtureDenoiser
from art_edm.models.unet import ScoreUNet
from art_edm.sampling.solvers import SOLVERS, sample
from tests.support.fake_device import DEVICE, FakeDevice, Held, Mixed

CLOCK = GaussianClock(80.0, 0.5)


def network():
    return MixtureDenoiser([0.3, 0.7], torch.tensor([-0.4, 0.6]).reshape(2, 1, 1, 1), 0.01)


def noises(count=3):
    return torch.randn(count, 1, 1, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def on_device(work):
    """What `work(denoiser, latents)` returns there, brought back, and how often the host read from the device."""
    with FakeDevice() as device:
        result = work(device.take(network()), device.take(noises()))
        reads = device.reads
        return (result.cpu() if isinstance(result, torch.Tensor) else result), reads


def measured(measure, **options):
    return lambda points: lambda net, x: measure(net, x, CLOCK, points, **options).norm


def sampled(solver):
    return lambda points: lambda net, x: sample(net, x, edm(points, 0.002, 80.0), solver)


WORK = {"along": measured(measure_along), "points": measured(measure_profile), "sde": measured(measure_stochastic),
        **{f"errors of {name}": measured(measure_errors, solver=name) for name in ("euler", "heun", "rk4", "ipndm")},
        **{name: sampled(name) for name in SOLVERS}}


@pytest.mark.slow
@pytest.mark.parametrize("name", WORK)
def test_the_cpus_numbers_without_mixing_and_with_a_bounded_number_of_reads(name):
    found, reads = on_device(WORK[name](12))
    assert np.array_equal(found, WORK[name](12)(network(), noises()))
    assert reads == on_device(WORK[name](24))[1] <= 4


def test_a_network_with_its_weights_there():
    net = ScoreUNet(img_resolution=8, sigma_data=0.5, width=8, deep_width=12, emb=8).eval().requires_grad_(False)
    latents = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = edm(3, 0.002, 80.0)
    expected = sample(net, latents, grid)
    with FakeDevice() as device:
        found = sample(device.take(net), device.take(latents), grid)
        assert isinstance(found, Held) and found.device == DEVICE and device.reads <= 4
        with pytest.raises(Mixed):
            sample(net, latents, grid)
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


def test_moments_are_read_once():
    features = [torch.randn(5, 3, generator=torch.Generator().manual_seed(k)) for k in range(6)]

    def moments(device, batches):
        running = RunningMoments(3, device)
        for batch in batches:
            running.update(batch)
        return running.result()

    with FakeDevice() as device:
        found = moments(DEVICE, map(device.take, features))
        assert device.reads == 2  # the mean and the scatter
    assert all(np.array_equal(*pair) for pair in zip(found, moments("cpu", features)))


@pytest.mark.parametrize("mix", [
    lambda net, x: x + noises(), lambda net, x: x.add_(noises()), lambda net, x: x.numpy(),
    lambda net, x: network()(x, 1.0), lambda net, x: torch.cat([x, noises()]), lambda net, x: np.asarray(x),
])
def test_a_mix_is_found(mix):
    mix(network(), noises())  # on the CPU alone nobody sees it
    with pytest.raises((Mixed, RuntimeError)):
        on_device(mix)


@pytest.mark.parametrize("read", [
    lambda x: float(x.max()), lambda x: bool((x > 0).any()), lambda x: x[x > 0], lambda x: x.to("cpu"),
    lambda x: x.sum().item(), lambda x: x.flatten().tolist(), lambda x: torch.zeros(3, 1, 1, 1).double().copy_(x),
])
def test_a_read_in_a_loop_is_counted(read):
    assert on_device(lambda net, x: [read(x) for _ in range(7)])[1] == 7
    assert on_device(lambda net, x: [x.sum() for _ in range(7)])[1] == 0


@pytest.mark.parametrize("paths", [4, 16])
def test_live_rollouts_read_as_often_however_many_noises_there_are(paths):
    def follow(net, x):
        live = LiveEnvironment(net, CLOCK, 1.0)
        live.reset(paths, 2, torch.Generator().manual_seed(0))
        for _ in range(5):
            live.weight()
            live.move(np.full(paths, 0.1))

    assert on_device(follow)[1] <= 2 * 6
