"""Exact denoisers against independently written densities, closed-form paths and fine integration."""

from __future__ import annotations

import math
from typing import Callable, Tuple

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from art_edm.measure.field import rms
from art_edm.models.analytic import EmpiricalDenoiser, ExactDenoiser, GaussianDenoiser, MixtureDenoiser, one_dimensional

SHAPE = (2, 2, 3)
LogDensity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # x [C, H, W], sigma [] -> []


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian() -> Tuple[GaussianDenoiser, LogDensity]:
    mean, variance = draw(*SHAPE), draw(*SHAPE, seed=1).square() + 0.1

    def log_density(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        total = variance + sigma**2
        return -0.5 * ((x - mean) ** 2 / total + torch.log(2 * math.pi * total)).sum()

    return GaussianDenoiser(mean, variance, SHAPE), log_density


def mixture_density(weights: torch.Tensor, means: torch.Tensor, stds: torch.Tensor) -> LogDensity:
    """log sum_i w_i N(x; m_i, (s_i^2 + sigma^2) I), component by component."""

    def log_density(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        terms = []
        for w, m, s in zip(weights, means, stds):
            total = s**2 + sigma**2
            volume = 0.5 * x.numel() * torch.log(2 * math.pi * total)
            terms.append(torch.log(w) - volume - ((x - m) ** 2).sum() / total / 2)
        return torch.logsumexp(torch.stack(terms), dim=0)

    return log_density


def mixture() -> Tuple[MixtureDenoiser, LogDensity]:
    weights, stds = torch.tensor([[0.2, 0.5, 0.3], [0.4, 0.7, 1.0]], dtype=torch.float64)
    means = draw(3, *SHAPE)
    return MixtureDenoiser(5 * weights, means, stds), mixture_density(weights, means, stds)


def empirical() -> Tuple[EmpiricalDenoiser, LogDensity]:
    images = 0.4 * draw(9, *SHAPE)  # close enough that several matter at each sigma below
    uniform = torch.full((9,), 1 / 9, dtype=torch.float64)
    return EmpiricalDenoiser(images, chunk=4), mixture_density(uniform, images, torch.zeros(9, dtype=torch.float64))


BUILDERS = [gaussian, mixture, empirical]


def noisy(model: ExactDenoiser, sigma: float, count: int = 4) -> torch.Tensor:
    """Points of the model's typical set at noise level sigma; images for the empirical one."""
    images = model.images.reshape(-1, *SHAPE) if isinstance(model, EmpiricalDenoiser) else draw(count, *SHAPE, seed=7)
    return images[:count] + sigma * draw(count, *SHAPE, seed=8)


def path_derivative(
    log_density: LogDensity, x: torch.Tensor, sigma: float, horizon: float,
    tangent: Callable[[torch.Tensor], torch.Tensor] = torch.clone, dpsi: float = 1.0,
) -> torch.Tensor:
    """Derivative of F along (tangent(F), dpsi), forward over reverse autograd of F = sigma grad log p; [C, H, W]."""

    def drift(x: torch.Tensor, psi: torch.Tensor) -> torch.Tensor:
        return (horizon - psi) * torch.func.grad(log_density)(x, horizon - psi)

    psi = torch.tensor(horizon - sigma, dtype=torch.float64)
    direction = (tangent(drift(x, psi)), torch.tensor(dpsi, dtype=torch.float64))
    return torch.func.jvp(drift, (x, psi), direction)[1]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", [0.3, 0.8, 3.0, 80.0])
def test_score_is_the_gradient_of_the_log_density(build, sigma):
    model, log_density = build()
    x = noisy(model, sigma)
    level = torch.tensor(sigma, dtype=torch.float64)
    for one, score, denoised in zip(x, model.score(x, sigma), model(x, level)):
        leaf = one.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(log_density(leaf, level), leaf)
        torch.testing.assert_close(score, gradient, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close((denoised - one) / level**2, gradient, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", [0.5, 1.5, 20.0])
def test_drift_points_down_the_noise(build, sigma):
    model, _ = build()
    x = noisy(model, sigma)
    drift = model.exact_drift(x, sigma)
    level = torch.tensor(sigma, dtype=torch.float64)
    torch.testing.assert_close(drift, -(x - model(x, level)) / sigma, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(drift, sigma * model.score(x, sigma), rtol=1e-14, atol=0)
    assert float((drift + sigma * model.score(x, sigma)).abs().max()) > 0.1  # twin: the other sign


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", [0.4, 0.8, 3.0, 75.0])
def test_surrogate_is_the_total_derivative_of_the_drift(build, sigma):
    model, log_density = build()
    x = noisy(model, sigma)
    surrogate = model.exact_surrogate(x, sigma)
    for one, found in zip(x, surrogate):
        total = path_derivative(log_density, one, sigma, horizon=80.0)
        torch.testing.assert_close(found, total, rtol=1e-8, atol=1e-10 * float(total.abs().max()))


@pytest.mark.parametrize("build", BUILDERS)
def test_surrogate_twins_are_far_off(build):
    model, log_density = build()
    x = noisy(model, 0.8, count=1)[0]
    exact = model.exact_surrogate(x[None], 0.8)[0]
    scale = float(exact.norm())
    twins = {
        "partial derivative dropped": {"dpsi": 0.0},
        "clock runs the wrong way": {"dpsi": -1.0},
        "convection dropped": {"tangent": torch.zeros_like},
        "convection of the wrong sign": {"tangent": torch.neg},
    }
    for name, change in twins.items():
        wrong = path_derivative(log_density, x, 0.8, 80.0, **change)
        assert float((wrong - exact).norm()) > 0.2 * scale, name


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("sigma", [0.6, 2.0])
def test_surrogate_is_the_second_derivative_of_an_integrated_path(build, sigma):
    """Eighth-order second difference of x(sigma); the path by DOP853 at a tolerance of 1e-13."""
    model, _ = build()
    start = noisy(model, sigma, count=1)

    def velocity(s: float, flat: np.ndarray) -> np.ndarray:
        return -model.exact_drift(torch.from_numpy(flat).reshape(1, *SHAPE), s).flatten().numpy()

    width = 0.02 * sigma
    half = np.array([8 / 5, -1 / 5, 8 / 315, -1 / 560])
    second = -205 / 72 * start.flatten().numpy()
    for sign in (1, -1):
        levels = sigma + sign * width * np.arange(1, 5)
        path = solve_ivp(
            velocity, (sigma, levels[-1]), start.flatten().numpy(), "DOP853", levels, rtol=1e-13, atol=1e-14,
            max_step=width / 2,  # the solver's interpolant, used between its own points, is of lower order
        )
        second = second + path.y @ half
    exact = model.exact_surrogate(start, sigma).flatten().numpy()
    error = np.linalg.norm(second / width**2 - exact) / np.linalg.norm(exact)
    assert error < 1e-8
    assert np.linalg.norm(-second / width**2 - exact) > np.linalg.norm(exact)  # twin: the other sign


def test_gaussian_path_in_closed_form():
    """x(sigma) = mean + (x0 - mean) sqrt((v + sigma^2) / (v + sigma0^2)); its derivatives are F and Q."""
    model, _ = gaussian()
    top = 80.0
    x0 = model.initial(draw(3, *SHAPE), top)

    def path(sigma: torch.Tensor) -> torch.Tensor:
        return model.mean + (x0 - model.mean) * ((model.variance + sigma**2) / (model.variance + top**2)).sqrt()

    def velocity_of(sigma: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(path, (sigma,), (torch.ones_like(sigma),))[1]

    for level in (0.002, 0.5, 5.0, 80.0):
        sigma = torch.tensor(level, dtype=torch.float64)
        x = path(sigma)
        velocity, acceleration = torch.func.jvp(velocity_of, (sigma,), (torch.ones_like(sigma),))
        torch.testing.assert_close(model.exact_drift(x, sigma), -velocity, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(model.exact_surrogate(x, sigma), acceleration, rtol=1e-9, atol=1e-14)


def test_one_dimensional_example():
    model = one_dimensional()
    assert (model.img_shape, model.sigma_min, model.sigma_max, model.sigma_data) == ((1, 1, 1), 1e-4, 3.0, 1.0)
    x = torch.linspace(-4, 4, 17, dtype=torch.float64).reshape(-1, 1, 1, 1)
    for sigma in (1e-4, 0.3, 1.0, 3.0):
        expected = x.flatten().abs() / (1 + sigma**2) ** 2
        torch.testing.assert_close(rms(model.exact_surrogate(x, sigma)), expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(model.exact_drift(x, sigma), -sigma * x / (1 + sigma**2), rtol=1e-14, atol=0)
    start = model.initial(draw(200_000, 1, 1, 1), 3.0)
    assert abs(float(start.var()) - 10) < 0.15  # the paper's start, N(0, 10); 0.15 is five standard errors


def test_initial_matches_the_marginal():
    model, _ = gaussian()
    latents = draw(50_000, *SHAPE).to(torch.float32)
    start = model.initial(latents, 0.7)  # float64, as assert_close checks
    torch.testing.assert_close(start.mean(0), model.mean, rtol=0, atol=0.05)
    torch.testing.assert_close(start.var(0), model.variance + 0.49, rtol=0.05, atol=0)
    other, _ = empirical()
    torch.testing.assert_close(other.initial(latents[:2], 3.0), 3 * latents[:2].double(), rtol=0, atol=0)


def test_per_image_noise_levels_agree_with_one_at_a_time():
    sigma = torch.tensor([0.01, 0.7, 80.0], dtype=torch.float64)
    for model in (build()[0] for build in BUILDERS):
        x = noisy(model, 1.0, count=3)
        for method in (model, model.score, model.exact_drift, model.exact_surrogate):
            alone = torch.cat([method(x[i : i + 1], sigma[i]) for i in range(3)])
            torch.testing.assert_close(method(x, sigma), alone, rtol=1e-12, atol=1e-14)


def test_sigma_data_is_the_spread_of_draws():
    model, _ = mixture()
    rng = torch.Generator().manual_seed(3)
    pick = torch.multinomial(model.weights, 100_000, replacement=True, generator=rng)
    y = model.means[pick] + model.std[pick].reshape(-1, 1, 1, 1) * draw(100_000, *SHAPE, seed=4)
    assert abs(float(y.var(0).mean().sqrt()) / model.sigma_data - 1) < 0.01
    model, _ = empirical()
    assert model.sigma_data == pytest.approx(float(model.images.var(0, unbiased=False).mean().sqrt()), rel=1e-12)
    model, _ = gaussian()
    assert model.sigma_data == pytest.approx(float(model.variance.mean().sqrt()), rel=1e-12)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0, 80.0])
def test_chunks_do_not_matter_and_a_mixture_without_width_is_the_same(sigma):
    images = draw(40, *SHAPE)
    x, level = images[:5] + sigma * draw(5, *SHAPE, seed=2), torch.tensor(sigma, dtype=torch.float64)
    whole, narrow = EmpiricalDenoiser(images, chunk=40), MixtureDenoiser(torch.ones(40), images, 0.0)
    denoised, surrogate = whole(x, level), whole.exact_surrogate(x, level)
    scale = float(surrogate.abs().max())
    for model in (narrow, *(EmpiricalDenoiser(images, chunk=chunk) for chunk in (1, 7, 1000))):
        assert model.sigma_data == pytest.approx(whole.sigma_data, rel=1e-12)
        torch.testing.assert_close(model(x, level), denoised, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(model.exact_surrogate(x, level), surrogate, rtol=1e-10, atol=1e-12 * scale)


def near_duplicates(sigma: float) -> Tuple[torch.Tensor, torch.Tensor]:
    """300 float32 images of MNIST's size of which pairs differ by 2 sigma, and noisy x that cannot tell them apart."""
    images = draw(300, 1, 28, 28).clamp(-1, 1).float()
    images[6:12] = images[:6]
    images[6:12, :, 14, 14] += 2 * min(sigma, 1.0)
    return images, images[:6] + sigma * draw(6, 1, 28, 28, seed=5).float()


@pytest.mark.parametrize("sigma", [0.002, 0.05, 0.5, 5.0, 80.0])
def test_empirical_accuracy_in_float32(sigma):
    """float32 in and out costs one rounding of the output: the weights are computed in float64."""
    images, x = near_duplicates(sigma)
    model, exact = EmpiricalDenoiser(images, chunk=64), EmpiricalDenoiser(images.double(), chunk=300)
    level, denoised = torch.tensor(sigma), model(x, torch.tensor(sigma))  # float32: both see the same level
    assert denoised.dtype == torch.float32
    assert float((denoised - exact(x.double(), level)).abs().max()) < 1e-7
    expected = exact.exact_surrogate(x.double(), level)
    assert float((model.exact_surrogate(x, level) - expected).norm()) < 1e-6 * float(expected.norm())


def test_empirical_in_float32_throughout_would_be_wrong():
    """The twin: ||x||^2 - 2 x.y + ||y||^2 in float32; twins differ by 4e-3 and weights are wrong by 0.1."""
    images, x = near_duplicates(0.002)
    y, flat = images.flatten(1), x.flatten(1)
    distance = flat.square().sum(1, keepdim=True) - 2 * flat @ y.T + y.square().sum(1)
    naive = (-distance / (2 * 0.002**2)).softmax(dim=1) @ y
    exact = EmpiricalDenoiser(images)(x, torch.tensor(0.002)).flatten(1)
    assert float((naive - exact).abs().max()) > 1e-4  # measured 4e-4


def test_empirical_limits():
    images = draw(40, *SHAPE)
    model = EmpiricalDenoiser(images, chunk=16)
    x = images[:6] + 0.002 * draw(6, *SHAPE, seed=2)
    torch.testing.assert_close(model(x, torch.tensor(0.002, dtype=torch.float64)), images[:6], rtol=0, atol=1e-15)
    far, mean = draw(6, *SHAPE, seed=3) * 1e6, images.mean(0).expand(6, *SHAPE)
    torch.testing.assert_close(model(far, torch.tensor(1e6, dtype=torch.float64)), mean, rtol=0, atol=1e-5)
    outlier = torch.full((1, *SHAPE), 1e3, dtype=torch.float64)  # far from all data: no 0 / 0
    assert model(outlier, 0.002).isfinite().all() and model.exact_surrogate(outlier, 0.002).isfinite().all()


@pytest.mark.parametrize(
    "build, words",
    [
        (lambda: GaussianDenoiser(torch.zeros(3), 1.0, SHAPE[:1] + (2, 2)), "broadcast"),
        (lambda: GaussianDenoiser(0.0, -1.0, SHAPE), "variance"),
        (lambda: GaussianDenoiser(float("nan"), 1.0, SHAPE), "mean"),
        (lambda: GaussianDenoiser(0.0, 1.0, (1, 1)), "img_shape"),
        (lambda: GaussianDenoiser(0.0, 1.0, SHAPE, sigma_min=80.0, sigma_max=0.002), "sigma_min"),
        (lambda: MixtureDenoiser([1.0, 1.0], draw(3, *SHAPE), 1.0), "shapes"),
        (lambda: MixtureDenoiser([1.0, 1.0, 0.0], draw(3, *SHAPE), 1.0), "weight"),
        (lambda: MixtureDenoiser([1.0, 1.0, 1.0], draw(3, *SHAPE), [0.1, -0.1, 0.1]), "std"),
        (lambda: EmpiricalDenoiser(torch.zeros(4, 28, 28)), "images"),
        (lambda: EmpiricalDenoiser(torch.zeros(4, 1, 2, 2, dtype=torch.uint8)), "uint8"),
        (lambda: EmpiricalDenoiser(torch.zeros(0, 1, 2, 2)), "images"),
        (lambda: EmpiricalDenoiser(torch.full((4, 1, 2, 2), float("inf"))), "NaN or infinity"),
        (lambda: EmpiricalDenoiser(torch.zeros(4, 1, 2, 2), chunk=0), "chunk"),
    ],
)
def test_bad_arguments_are_named(build, words):
    with pytest.raises(ValueError, match=words):
        build()
