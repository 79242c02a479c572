"""Drift and surrogate by differences against exact ones; accuracy, cost, errors and precision flags."""

from __future__ import annotations

import copy
import math
from typing import Optional

import pytest
import torch

from art_edm.measure.field import (
    DIFFERENCE_STEP,
    Surrogate,
    choose_step,
    drift,
    evaluate,
    rms,
    surrogate,
)
from art_edm.models.analytic import EmpiricalDenoiser, ExactDenoiser, GaussianDenoiser, MixtureDenoiser, one_dimensional
from art_edm.models.denoiser import Denoiser
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.errors import NonFiniteOutput
from art_edm.runtime.precision import full_precision

SHAPE = (1, 4, 4)
SIGMAS = [0.02, 0.1, 0.3, 1.0, 3.0, 20.0, 80.0]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(draw(*SHAPE), 0.2 + draw(*SHAPE, seed=1).square(), SHAPE)


def mixture() -> MixtureDenoiser:
    return MixtureDenoiser([0.3, 0.3, 0.4], 0.3 * draw(3, *SHAPE), 0.5)


def empirical() -> EmpiricalDenoiser:
    """Images along a line, so close that neighbours overlap at every sigma tested (0.3 and up)."""
    line = torch.linspace(-1, 1, 200, dtype=torch.float64).reshape(-1, 1, 1, 1)
    return EmpiricalDenoiser(line * torch.ones(SHAPE, dtype=torch.float64) / 4, chunk=64)


def points(model: ExactDenoiser, sigma: float, count: int = 6) -> torch.Tensor:
    """Draws at noise level sigma: exact ones where the model has them, else means (or images) plus noise."""
    if isinstance(model, GaussianDenoiser):
        return model.initial(draw(count, *SHAPE, seed=2), sigma)
    centres = model.means if isinstance(model, MixtureDenoiser) else model.images.reshape(-1, *SHAPE)[::30]
    noise = math.hypot(sigma, 0.5 if isinstance(model, MixtureDenoiser) else 0.0)
    return centres[torch.arange(count) % len(centres)] + noise * draw(count, *SHAPE, seed=2)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float(((found - exact).abs() / exact).max())


CASES = [(gaussian, s) for s in SIGMAS] + [(mixture, s) for s in SIGMAS] + [(empirical, s) for s in SIGMAS if s >= 0.3]


@pytest.mark.parametrize("build, sigma", CASES)
def test_drift_and_surrogate_agree_with_the_exact_ones(build, sigma):
    model = build()
    x = points(model, sigma)
    torch.testing.assert_close(drift(model, x, sigma), model.exact_drift(x, sigma), rtol=1e-9, atol=1e-11)
    found = surrogate(model, x, sigma)
    exact = model.exact_surrogate(x, sigma)
    torch.testing.assert_close(found.denoised, model(x, torch.tensor(sigma, dtype=torch.float64)), rtol=0, atol=0)
    assert relative_error(found.norm, rms(exact)) < 1e-3
    assert float((rms(-found.slope / sigma - exact) / rms(exact)).max()) < 2e-3  # the vector, with its sign
    assert float((rms(+found.slope / sigma - exact) / rms(exact)).min()) > 1.9  # twin: the other sign


@pytest.mark.parametrize("build", [gaussian, mixture, empirical])
@pytest.mark.parametrize("sigma", [0.3, 3.0, 80.0])
def test_error_falls_as_the_square_of_the_step(build, sigma):
    model = build()
    x = points(model, sigma)
    exact = model.exact_surrogate(x, sigma)
    vector = [float(rms(-surrogate(model, x, sigma, step=h).slope / sigma - exact).norm()) for h in (0.04, 0.02, 0.01)]
    for wide, narrow in zip(vector, vector[1:]):
        assert 3.8 < wide / narrow < 4.2
    wide = surrogate(model, x, sigma, step=0.3).norm
    assert relative_error(wide, rms(exact)) > 1e-2  # twin: a step that is too wide


def test_one_dimensional_surrogate():
    """|Q| = |x| / (1 + sigma^2)^2 in the paper's example."""
    model = one_dimensional()
    x = torch.tensor([-3.0, -0.5, 0.1, 2.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    sigma = torch.tensor([0.01, 0.5, 1.5, 3.0], dtype=torch.float64)
    assert relative_error(surrogate(model, x, sigma).norm, x.flatten().abs() / (1 + sigma**2) ** 2) < 2e-4


@pytest.mark.parametrize("build", [gaussian, mixture])
def test_a_difference_off_the_path_is_far_off(build):
    """Twins: the difference at fixed x (convection dropped), and at fixed sigma (partial derivative dropped).

    Vectors, as for Gaussian data the second has the right norm and the wrong sign.
    """
    model, sigma = build(), torch.tensor(0.8, dtype=torch.float64)
    x = points(model, 0.8)
    exact = model.exact_surrogate(x, sigma)
    h = DIFFERENCE_STEP
    fixed_x = (model(x, sigma * (1 + h)) - model(x, sigma * (1 - h))) / (2 * h * sigma)
    shift = h * (x - model(x, sigma))
    fixed_sigma = (model(x + shift, sigma) - model(x - shift, sigma)) / (2 * h * sigma)
    assert float((rms(-(fixed_x + fixed_sigma) / sigma - exact) / rms(exact)).max()) < 1e-3  # together they are right
    for wrong in (fixed_x, fixed_sigma, fixed_x - fixed_sigma, -fixed_x - fixed_sigma):
        assert float((rms(-wrong / sigma - exact) / rms(exact)).min()) > 0.2


def test_cost_is_one_evaluation_for_the_denoiser_or_drift_and_three_for_the_surrogate():
    model = mixture()
    x = points(model, 1.0, count=5)
    drift(model, x, 1.0)
    assert model.evaluations == 5
    surrogate(model, x, 1.0)
    assert model.evaluations == 5 + 3 * 5
    evaluate(model, x, 1.0)
    assert model.evaluations == 25
    model.exact_surrogate(x, 1.0)
    assert model.evaluations == 25


def test_noise_level_per_image_and_scalar_agree():
    model = mixture()
    x = points(model, 1.0, count=3)
    levels = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    whole, field = surrogate(model, x, levels), drift(model, x, levels)
    for i in range(3):
        one = surrogate(model, x[i : i + 1], float(levels[i]))
        torch.testing.assert_close(whole.norm[i : i + 1], one.norm, rtol=1e-9, atol=0)
        torch.testing.assert_close(whole.slope[i : i + 1], one.slope, rtol=1e-8, atol=1e-10)
        single = drift(model, x[i : i + 1], float(levels[i]))
        torch.testing.assert_close(field[i : i + 1], single, rtol=1e-12, atol=1e-14)
    assert whole.norm.shape == (3,) and whole.slope.shape == x.shape


class Labelled(Denoiser):
    """D = label weight x, to see that labels reach both halves of the difference."""

    label_dim = 2

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        scale = class_labels @ torch.tensor([0.25, 0.5], dtype=x.dtype)
        return scale.reshape(-1, 1, 1, 1) * x


def test_labels_are_passed_on():
    """D = c x gives slope = c dx/dsigma = c (1 - c) x / sigma."""
    model, x = Labelled(1, 4), draw(2, *SHAPE)
    labels = torch.eye(2, dtype=torch.float64)
    scale = torch.tensor([0.25, 0.5], dtype=torch.float64).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(drift(model, x, 2.0, labels), (scale - 1) * x / 2)
    torch.testing.assert_close(surrogate(model, x, 2.0, labels).slope, scale * (1 - scale) * x / 2)
    torch.testing.assert_close(evaluate(model, x, 2.0, labels), scale * x)
    assert not torch.allclose(evaluate(model, x, 2.0, labels.flip(0)), scale * x)


class Broken(Denoiser):
    """NaN below a noise level, as a network in half precision may be."""

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        return torch.where(sigma.reshape(-1, 1, 1, 1) < 0.5, math.nan, x / 2)


def test_non_finite_output_names_the_noise_level():
    model, x = Broken(1, 4), draw(3, *SHAPE)
    levels = torch.tensor([1.0, 0.25, 0.125], dtype=torch.float64)
    for function in (drift, surrogate):
        with pytest.raises(NonFiniteOutput, match=r"sigma = 0\.25 for 2 of 3 images"):
            function(model, x, levels)
        with pytest.raises(NonFiniteOutput, match=r"sigma = 0\.4 for 3 of 3 images"):
            function(model, x, 0.4)
        function(model, x, 0.6)
    with pytest.raises(NonFiniteOutput, match=r"sigma = 0\.4 for 3 of 3 images"):
        evaluate(model, x, 0.4)
    torch.testing.assert_close(evaluate(model, x, 0.6), x / 2)
    drift(model, x, 0.501)
    with pytest.raises(NonFiniteOutput, match=r"sigma = 0\.49599 for 3 of 6 images"):
        surrogate(model, x, 0.501)  # only the lower end of the difference is bad


class Recorder(Denoiser):
    """Runs a matrix product and records its type and the flags it ran under."""

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        product = x.flatten(1) @ torch.eye(x[0].numel(), dtype=x.dtype)
        self.seen = (product.dtype, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        return product.reshape(x.shape).to(x.dtype) / 2


def test_full_precision_inside_and_flags_restored():
    model, x = Recorder(1, 4), draw(2, *SHAPE).float()
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = True, True
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(x, 1.0)
            assert model.seen == (torch.bfloat16, True, True)  # the trap is real
            for function in (drift, evaluate, surrogate):
                function(model, x, 1.0)
                assert model.seen == (torch.float32, False, False)
            model(x, 1.0)
            assert model.seen == (torch.bfloat16, True, True)
        with pytest.raises(NonFiniteOutput):
            surrogate(Broken(1, 4), x, 0.1)
        with pytest.raises(KeyError), full_precision():
            raise KeyError
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (True, True)
        torch.backends.cuda.matmul.allow_tf32 = False
        with full_precision():
            pass
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (False, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_no_gradient_is_recorded():
    net = ScoreUNet(8, width=12, deep_width=12, emb=8)
    found = surrogate(net, draw(1, 1, 8, 8), 1.0)
    assert not any(part.requires_grad for part in found)
    assert not drift(net, draw(1, 1, 8, 8), 1.0).requires_grad
    assert not evaluate(net, draw(1, 1, 8, 8), 1.0).requires_grad and net(draw(1, 1, 8, 8), 1.0).requires_grad


def test_rms_is_free_of_resolution():
    x = draw(3, 2, 4, 4)
    larger = x.repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    torch.testing.assert_close(rms(larger), rms(x))
    torch.testing.assert_close(rms(x), x.flatten(1).norm(dim=1) / math.sqrt(32))
    assert isinstance(surrogate(gaussian(), draw(1, *SHAPE), 1.0), Surrogate)


def random_network() -> ScoreUNet:
    torch.manual_seed(0)
    net = ScoreUNet(8, sigma_data=0.5, data_mean=-0.2, width=16, deep_width=24, emb=32)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


@pytest.mark.parametrize("sigma", [0.002, 0.02, 0.1, 0.5, 2.0, 20.0, 80.0])
def test_step_on_a_float32_network_against_its_float64_twin(sigma):
    """Within 4e-3 at the default step; the highest noise frequency's truncation is (0.01 e^4 / 4)^2 / 6 = 3e-3."""
    net = random_network()
    exact = copy.deepcopy(net).double()
    x = -0.2 + math.hypot(sigma, 0.5) * draw(8, 1, 8, 8)
    s = torch.tensor(sigma, dtype=torch.float64)
    tangent = ((x - exact(x, s)) / s).detach()
    _, slope = torch.func.jvp(exact, (x, s), (tangent, torch.ones_like(s)))
    norm = rms(slope.detach()) / s
    assert relative_error(surrogate(net, x, sigma).norm, norm) < 4e-3
    assert relative_error(surrogate(net, x, sigma, step=0.1).norm, norm) > 1e-2  # twin: truncation
    assert relative_error(surrogate(net, x, sigma, step=1e-6).norm, norm) > 1e-2  # twin: rounding
    assert relative_error(surrogate(exact, x, sigma, step=1e-4).norm, norm) < 1e-5  # the reference itself


def test_float64_twin_has_no_float32_left():
    net = random_network().double()
    x, s = draw(2, 1, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    with torch.no_grad():
        moved = net(x * (1 + 1e-12), s) - net(x, s)
    assert 1e-14 < float(moved.abs().max()) < 1e-10  # a float32 step anywhere would give 0 or 1e-8


class Wavy(GaussianDenoiser):
    """D sways with the logarithm of the noise level, as of a network with Fourier features of high frequency."""

    frequency = 0.0

    def denoise(self, x, sigma, class_labels):
        wave = 50 * torch.sin(self.frequency * sigma.log()).reshape(-1, 1, 1, 1)
        return super().denoise(x, sigma, class_labels) + wave


@pytest.mark.parametrize("frequency, step", [(3.0, 0.01), (30.0, 0.003), (100.0, 0.001)])
def test_the_step_of_differences_is_as_small_as_the_field_asks_for(frequency, step):
    """A central difference is off by (frequency step)^2 / 6: 1.5 % of 30 with 0.01, 0.14 % with 0.003."""
    model = Wavy(0.0, 0.25, SHAPE)
    model.frequency = frequency
    assert choose_step(model, draw(2, *SHAPE)) == step
    assert model.evaluations == 2 * 21 * (2 if step == 0.01 else 3)
