"""The check for NaN and infinity that a GPU need not wait for: what it says, and how often it reads."""

from __future__ import annotations

import math

import pytest
import torch
from torch.overrides import TorchFunctionMode

from art_edm.grids.clocks import GaussianClock
from art_edm.measure import dense_paths as trajectories
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.evaluate import FiniteCheck
from art_edm.models.loading import load_network
from art_edm.runtime.errors import NonFiniteOutput

READING = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero", "numpy", "cpu"}


class Reads(TorchFunctionMode):
    """Counts the values that Python takes out of tensors: `.item()`, `float()`, `if tensor`, `.cpu()`."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in READING
        return function(*args, **(kwargs or {}))


def travel(check, bad=()):
    """Ten levels; images at the levels in `bad` are not finite from then on."""
    x = torch.ones(3, 1, 2, 2)
    for k in range(10):
        for image, level, value in bad:
            if level == k:
                x = x.clone()
                x[image, 0, 0, 0] = value
        x = check.see(x, 10.0 - k)
    check.settle()
    return x


@pytest.mark.parametrize("deferred", [True, False])
@pytest.mark.parametrize("bad, said", [
    ([(1, 4, math.nan)], r"at sigma = 6 for 1 of 3 images"),
    ([(2, 0, math.inf), (0, 5, math.nan)], r"at sigma = 10 for 1 of 3"),
    ([(2, 9, -math.inf), (0, 9, math.nan)], r"at sigma = 1 for 2 of 3"),
])
def test_the_first_bad_level_is_named(bad, said, deferred):
    with pytest.raises(NonFiniteOutput, match=said):
        travel(FiniteCheck("cpu", deferred), bad)


def test_of_several_levels_the_bad_images_own_is_named():
    check, values = FiniteCheck("cpu", True), torch.zeros(3, 1, 2, 2)
    values[1] = math.nan
    check.see(values, torch.tensor([5.0, 7.0, 9.0]))
    with pytest.raises(NonFiniteOutput, match="sigma = 7 for 1 of 3"):
        check.settle()
    with pytest.raises(NonFiniteOutput, match="sigma = 4 for 1 of 3"):
        FiniteCheck("cpu").see(values, torch.tensor(4.0))


def test_a_finite_path_passes_and_is_forgotten():
    check = FiniteCheck("cpu", True)
    travel(check)
    assert check._seen == []
    with pytest.raises(NonFiniteOutput, match="sigma = 3 "):  # the next path is watched anew
        travel(check, [(0, 7, math.nan)])


def test_a_cpu_is_asked_at_once_and_a_gpu_at_the_end():
    at_once, late = FiniteCheck("cpu"), FiniteCheck("cuda")
    bad = torch.full((1, 1, 2, 2), math.nan)
    with pytest.raises(NonFiniteOutput):
        at_once.see(bad, 1.0)
    assert late.see(bad, 1.0) is bad
    with pytest.raises(NonFiniteOutput):
        late.settle()


def test_a_deferred_check_reads_nothing_on_the_way():
    with Reads() as reads:
        x, check = torch.ones(3, 1, 2, 2), FiniteCheck("cpu", True)
        for k in range(10):
            check.see(x, 10.0 - k)
    assert reads.count == 0
    with Reads() as reads:
        for k in range(10):
            assert bool(x.isfinite().all())  # what it replaces
    assert reads.count == 10


@pytest.mark.gpu  # only a GPU tells when the host waits for it
def test_the_host_does_not_wait_within_a_path():
    net = load_network("mnist", "cuda").denoiser
    x, check = torch.randn(2, 1, 28, 28, device="cuda", dtype=torch.float64), FiniteCheck("cuda")
    levels = [x.new_full((), level) for level in (3.0, 1.0, 0.3)]
    with torch.inference_mode():
        net(x, levels[0])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for level in levels:
                x = check.see(net(x, level), 1.0)
            with pytest.raises(RuntimeError, match="synchroniz"):
                bool(x.isfinite().all())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check.settle()


@pytest.mark.parametrize("deferred, more", [(True, 0), (False, 6)])
def test_a_profile_reads_as_often_whatever_its_points(deferred, more, monkeypatch):
    monkeypatch.setattr(trajectories, "FiniteCheck", lambda device: FiniteCheck(device, deferred))
    net, counts = GaussianDenoiser(0.0, 0.25, (1, 4, 4)), []
    latents = torch.ones(2, 1, 4, 4, dtype=torch.float64)
    for points in (6, 12):
        with Reads() as reads:
            trajectories.measure_along(net, latents, GaussianClock(80.0, 0.5), points)
        counts.append(reads.count)
    assert counts[1] - counts[0] == more
