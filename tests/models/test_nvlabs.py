"""Networks behind the contract: labels, guidance, float32, ranges, discrete levels; on stand-ins written here.

The stand-ins have the interface of EDM's and EDM2's networks; the real ones are in test_adapters_upstream.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import make_clock
from art_edm.grids.grid import Grid, edm
from art_edm.learning.rollouts import LiveEnvironment
from art_edm.measure.dense_paths import PathOptions, measure_profile
from art_edm.measure.field import surrogate
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.nvlabs import AdapterError, NetworkDenoiser
from art_edm.sampling.solvers import fitted, sample, supported

STD = 0.4


class GaussianNet(torch.nn.Module):
    """The exact denoiser of N(shift, STD^2) data, in float32 and with a record of how it was called."""

    def __init__(self, label_dim=0, shift=0.0, **attributes):
        super().__init__()
        self.img_channels, self.img_resolution, self.label_dim, self.shift = 1, 4, label_dim, shift
        self.calls = []
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        self.calls.append((x.dtype, tuple(sigma.shape), force_fp32))
        x, s = x.to(torch.float32), sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        mean = self.shift
        if class_labels is not None and self.label_dim:
            mean = mean + class_labels.to(torch.float32).argmax(1).reshape(-1, 1, 1, 1)
        return mean + STD**2 / (STD**2 + s**2) * (x - mean)


class DiscreteNet(GaussianNet):
    """The same at 60 noise levels only, as an iDDPM network: its conditioning is that of the nearest one."""

    def __init__(self):
        u = torch.cat([torch.logspace(math.log10(90), -2, 60), torch.zeros(1)])
        super().__init__(sigma_min=float(u[-2]), sigma_max=float(u[0]))
        self.register_buffer("u", u)

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma)
        index = (self.u[None] - sigma.reshape(-1, 1).to(self.u)).abs().argmin(1)
        return self.u[index].to(sigma.dtype).reshape(sigma.shape)

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        return super().forward(x, self.round_sigma(sigma), class_labels, force_fp32)


def noise(batch=3, seed=0):
    return torch.randn(batch, 1, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- ranges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attributes, low, high, limits, data", [
    (dict(sigma_min=0, sigma_max=float("inf"), sigma_data=0.5), 0.002, 80, (0, math.inf), 0.5),  # EDMPrecond
    (dict(sigma_min=0.02, sigma_max=100), 0.02, 80, (0.02, 100), 0.5),  # VEPrecond
    (dict(sigma_min=0.001, sigma_max=60.0), 0.002, 60, (0.001, 60), 0.5),
    (dict(sigma_data=0.7), 0.002, 80, (0, math.inf), 0.7),  # EDM2
])
def test_range(attributes, low, high, limits, data):
    denoiser = NetworkDenoiser(GaussianNet(**attributes))
    assert (denoiser.sigma_min, denoiser.sigma_max) == (low, high)
    assert denoiser.sigma_limits == limits and denoiser.sigma_data == data
    assert denoiser.img_shape == (1, 4, 4)


def test_a_discrete_network_starts_and_ends_at_its_own_levels():
    net = DiscreteNet()
    denoiser = NetworkDenoiser(net)
    assert denoiser.sigma_max in net.u.double().tolist() and denoiser.sigma_min in net.u.double().tolist()
    assert abs(denoiser.sigma_max - 80) < 8 and denoiser.sigma_min == pytest.approx(0.01)


# --- one evaluation ----------------------------------------------------------------------------------


def test_one_level_is_passed_once_and_in_full_precision():
    net = GaussianNet()
    denoiser = NetworkDenoiser(net)
    x = noise()
    out = denoiser(x, 0.3)
    assert net.calls == [(torch.float64, (1,), True)]
    assert out.dtype == torch.float64
    assert torch.equal(out, net(x, torch.tensor(0.3)).double())  # the same bits as upstream's own call
    denoiser(x, torch.tensor([0.1, 0.2, 0.3]))
    assert net.calls[-1] == (torch.float64, (3,), True)
    assert denoiser.evaluations == 6
    NetworkDenoiser(net, fp32=False)(x, 0.3)
    assert net.calls[-1] == (torch.float64, (1,), False)


@pytest.mark.parametrize("guidance", [0.0, 0.3, 1.7, 3.0])
def test_guidance(guidance):
    """Both are Gaussian, so the guided denoiser has a closed form; counted once, called twice."""
    net, gnet = GaussianNet(shift=0.5), GaussianNet(shift=-0.25)
    denoiser = NetworkDenoiser(net, gnet, guidance)
    x, s = noise(), 0.6
    ratio = STD**2 / (STD**2 + s**2)
    main, ref = (m + ratio * (x - m) for m in (0.5, -0.25))
    out = denoiser(x, s)
    assert torch.allclose(out, ref + guidance * (main - ref), atol=1e-6)
    assert not torch.allclose(out, main + guidance * (ref - main), atol=1e-2)  # the two the other way round
    assert (denoiser.evaluations, denoiser.networks, len(net.calls), len(gnet.calls)) == (3, 2, 1, 1)


def test_no_guidance_does_not_touch_the_guide():
    denoiser = NetworkDenoiser(GaussianNet())
    assert denoiser.networks == 1 and denoiser.gnet is None


@pytest.mark.parametrize("arguments, text", [
    (dict(guidance=2.0), "found guidance 2 without a guiding network; add --gnet"),
    (dict(gnet=GaussianNet()), "found a guiding network and guidance 1"),
    (dict(guidance=float("nan"), gnet=GaussianNet()), "found guidance nan, expected a finite number"),
    (dict(class_idx=0), "found class 0, but the network has no classes"),
    (dict(net=GaussianNet(3), class_idx=3), "found class 3, but the network has classes 0 to 2"),
    (dict(guidance=2.0, gnet=GaussianNet(img_resolution=8)), "network for images (1, 8, 8), expected (1, 4, 4)"),
    (dict(net=GaussianNet(3), guidance=2.0, gnet=GaussianNet(4)), "guiding network of 4 classes, expected none or 3"),
])
def test_what_does_not_fit_is_refused(arguments, text):
    with pytest.raises(AdapterError) as caught:
        NetworkDenoiser(**{"net": GaussianNet(), **arguments})
    assert text in str(caught.value) and "\n" not in str(caught.value)


# --- labels ------------------------------------------------------------------------------------------


def test_labels_are_drawn_after_the_noise_as_upstream_does():
    denoiser = NetworkDenoiser(GaussianNet(label_dim=5))
    generator, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    for g in (generator, twin):
        torch.randn(1, 4, 4, generator=g)
    labels = denoiser.draw_labels(6, generator)
    assert torch.equal(labels, torch.eye(5)[torch.randint(5, size=[6], generator=twin)])  # upstream's own expression
    assert len(labels.argmax(1).unique()) > 1
    fixed = NetworkDenoiser(GaussianNet(label_dim=5), class_idx=2)
    assert torch.equal(fixed.draw_labels(4, generator), torch.eye(5)[[2, 2, 2, 2]])
    assert NetworkDenoiser(GaussianNet()).draw_labels(4, generator) is None


def test_labels_reach_the_network():
    denoiser = NetworkDenoiser(GaussianNet(label_dim=3))
    z = noise(3)
    labels = torch.eye(3)
    x = sample(denoiser, z, edm(40, 0.002, 80.0), class_labels=labels)
    expected = torch.arange(3.0).reshape(3, 1, 1, 1) + STD * z  # class k is N(k, STD^2)
    assert torch.allclose(x.float(), expected.float(), atol=0.03)
    assert not torch.allclose(x.float(), expected.flip(0).float(), atol=0.3)


class LabelledNet(GaussianNet):
    """Each class has its own standard deviation, so that the curvature tells which label was used."""

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        std = 0.2 + class_labels.to(torch.float32).argmax(1).reshape(-1, 1, 1, 1)
        return std**2 / (std**2 + sigma.to(torch.float32).reshape(-1, 1, 1, 1)**2) * x.to(torch.float32)


def test_training_uses_each_trajectory_s_own_label():
    denoiser = NetworkDenoiser(LabelledNet(label_dim=2))
    clock = make_clock("gaussian", 80.0, 0.5)
    z = noise(2)
    profile = measure_profile(denoiser, z, clock, 40, options=PathOptions(class_labels=torch.eye(2)))
    for row, std in enumerate((0.2, 1.2)):
        exact = GaussianDenoiser(0.0, std**2, img_shape=(1, 4, 4))
        exact.sigma_min, exact.pinned = 0.002, True
        exact.initial = lambda latents, sigma: latents.double() * sigma
        single = measure_profile(exact, z[row:row + 1], clock, 40)
        seen = profile.sigma > 0.02  # below, differences of a float32 network are its rounding
        assert profile.norm[row][seen] == pytest.approx(single.norm[0][seen], rel=0.03)
        assert profile.norm[1 - row] != pytest.approx(single.norm[0], rel=0.3)


def test_live_rollouts_keep_their_labels():
    denoiser = NetworkDenoiser(LabelledNet(label_dim=2))
    env = LiveEnvironment(denoiser, make_clock("gaussian", 80.0, 0.5), unit=1.0)
    env.reset(8, 2, torch.Generator().manual_seed(3))
    labels = env.labels[np.argsort(env.mine)]  # of paths 0 to 7
    assert labels.shape == (8, 2) and torch.equal(labels[:4], labels[4:])
    env.move(np.full(8, 0.5))
    point = surrogate(denoiser, env.x, env._sigma(), env.labels)
    np.testing.assert_allclose(env.weight()[env.mine], point.norm.numpy() * env.clock.rate(env.s) ** 2, rtol=1e-12)
    swapped = surrogate(denoiser, env.x, env._sigma(), env.labels.flip(1))
    assert not torch.allclose(point.norm, swapped.norm, rtol=0.1)


# --- discrete noise levels ---------------------------------------------------------------------------


@pytest.mark.parametrize("level", [1, 5, 20, 40, 58])
def test_the_difference_of_a_discrete_network_is_between_its_levels(level):
    """The conditioning jumps from level to level: 1 % apart, D would not change with it at all."""
    net = DiscreteNet()
    denoiser = NetworkDenoiser(net)
    sigma = net.u[level].double().repeat(3)
    above, below = denoiser.neighbours(sigma, 0.01)
    assert torch.equal(above, net.u[level - 1].double().repeat(3))
    assert torch.equal(below, net.u[level + 1].double().repeat(3))
    x = STD * noise() + sigma[0] * noise(seed=1)
    s, ratio = float(sigma[0]), STD**2 / (STD**2 + float(sigma[0])**2)
    exact = -2 * s * ratio / (STD**2 + s**2) * x + ratio * (1 - ratio) / s * x  # dD/dsigma, and along dx/dsigma
    found = surrogate(denoiser, x, sigma)
    assert torch.allclose(found.slope, exact, rtol=0.05)  # levels 16 % apart: the difference's own error
    assert torch.equal(found.norm, found.slope.flatten(1).square().mean(1).sqrt() / sigma)

    class Naive(NetworkDenoiser):
        def neighbours(self, sigma, step):
            return sigma * (1 + step), sigma * (1 - step)

    assert not torch.allclose(surrogate(Naive(net), x, sigma).slope, exact, rtol=0.3)  # the other sign, even


def test_a_wide_step_of_a_discrete_network_goes_to_the_nearest_levels():
    net = DiscreteNet()
    above, below = NetworkDenoiser(net).neighbours(net.u[20:21].double(), 0.5)
    assert above.item() == pytest.approx(1.5 * float(net.u[20]), rel=0.08)
    assert below.item() == pytest.approx(0.5 * float(net.u[20]), rel=0.08)


def test_at_the_ends_the_difference_is_one_sided():
    net = DiscreteNet()
    denoiser = NetworkDenoiser(net)
    above, below = denoiser.neighbours(net.u[[0, 59]].double(), 0.01)
    assert above.tolist() == pytest.approx([float(net.u[0]), float(net.u[58])])
    assert below.tolist() == pytest.approx([float(net.u[1]), float(net.u[59])])


def test_a_profile_of_a_discrete_network_has_each_level_once():
    net = DiscreteNet()
    denoiser = NetworkDenoiser(net)
    profile = measure_profile(denoiser, noise(2), make_clock("gaussian", denoiser.sigma_max, 0.5), 200)
    assert set(profile.sigma) <= set(net.u.double().tolist())
    assert len(profile.sigma) == len(set(profile.sigma)) < 60
    exact = 3 * STD**2 / profile.sigma**3  # far above the data: D = STD^2 x / sigma^2, x = sigma z: up to |z|
    ratio = profile.norm[0] / exact
    assert ratio[1] / ratio[5] == pytest.approx(1, rel=0.05)


def test_grids_are_rounded_and_duplicates_refused():
    net = DiscreteNet()
    denoiser = NetworkDenoiser(net)
    grid = supported(denoiser, Grid([80.0, 3.0, 0.5, 0.0]))
    assert set(grid.values) <= set(net.u.double().tolist()) and grid.num_steps == 3
    assert grid != Grid([80.0, 3.0, 0.5, 0.0]) and supported(denoiser, grid) == grid
    with pytest.raises(ValueError, match=r"steps 1 and 2 \(sigma = 3 and 2.99\) are the same noise level.*use fewer"):
        supported(denoiser, Grid([80.0, 3.0, 2.99, 0.5, 0.0]))


def test_a_learned_grid_ends_at_the_lowest_level_of_the_network():
    denoiser = NetworkDenoiser(GaussianNet(sigma_min=0.02, sigma_max=100.0))
    assert fitted(denoiser, Grid([80.0, 1.0, 0.01, 0.0])) == Grid([80.0, 1.0, 0.02, 0.0])
    assert fitted(denoiser, Grid([80.0, 1.0, 0.03, 0.0])) == Grid([80.0, 1.0, 0.03, 0.0])
    spaced = [80.0, (80.0 * 0.02) ** 0.5, 0.02, 0.0]  # two levels to place, evenly in log sigma
    for values in ([80.0, 0.015, 0.01, 0.0], [80.0, 0.02, 0.01, 0.0]):
        assert fitted(denoiser, Grid(values)).values.tolist() == pytest.approx(spaced, rel=1e-12)
    with pytest.raises(ValueError, match="above the network's sigma_max"):
        fitted(denoiser, Grid([101.0, 1.0, 0.0]))


# --- a network that cannot run -----------------------------------------------------------------------


class Broken(GaussianNet):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize("result, text", [
    (RuntimeError("first\nsecond"), r"net.pkl cannot be evaluated \(RuntimeError: first second\)"),
    (torch.full((1, 1, 4, 4), float("nan")), "net.pkl returned NaN or infinity for one image of noise 1"),
    (torch.zeros(1, 1, 8, 8), r"net.pkl returned shape \(1, 1, 8, 8\) for one image"),
])
def test_a_trial_evaluation_tells(result, text):
    with pytest.raises(AdapterError, match=text) as caught:
        NetworkDenoiser(Broken(result)).trial("net.pkl")
    assert "\n" not in str(caught.value)


def test_a_good_trial_is_not_counted():
    denoiser = NetworkDenoiser(GaussianNet(label_dim=2))
    denoiser.trial("net.pkl")
    assert denoiser.evaluations == 0 and len(denoiser.net.calls) == 1


# --- networks of forks ----------------------------------------------------------------------------------


class PlainNet(GaussianNet):
    """A fork's network: its forward has no force_fp32, and it computes in float16 by its own switch."""

    use_fp16 = True

    def forward(self, x, sigma, class_labels=None):
        out = super().forward(x, sigma, class_labels)
        return out.half() if self.use_fp16 else out


def test_a_forward_without_force_fp32():
    x = noise()
    expected = NetworkDenoiser(GaussianNet())(x, 1.0)
    net = PlainNet()
    assert torch.equal(NetworkDenoiser(net)(x, 1.0), expected) and net.use_fp16 is False
    assert NetworkDenoiser(PlainNet(), gnet=PlainNet(shift=1.0), guidance=2.0)(x, 1.0).shape == x.shape
    net = PlainNet()
    assert not torch.equal(NetworkDenoiser(net, fp32=False)(x, 1.0), expected) and net.use_fp16  # the twin: float16
    with pytest.raises(TypeError):
        net(x, torch.ones(1), None, force_fp32=True)  # what it would get otherwise
    assert NetworkDenoiser(GaussianNet(), fp32=False).net is not None


class ConvNet(torch.nn.Module):
    img_channels, img_resolution, label_dim = 1, 4, 0

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        return self.conv(x.to(torch.float32))


def test_the_callers_autocast_does_not_reach_the_network():
    denoiser, x = NetworkDenoiser(ConvNet()), noise()
    expected = denoiser(x, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(denoiser(x, 1.0), expected)
        assert not torch.equal(NetworkDenoiser(ConvNet(), fp32=False)(x, 1.0), expected)  # the twin
