"""Profiles: q, c, J, J* and the price of distillation against closed forms and quadrature."""

from __future__ import annotations

from typing import Tuple

import numpy as np
import pytest
import torch
from scipy.integrate import quad, solve_ivp

from art_edm.grids.clocks import GaussianClock, LinearClock
from art_edm.grids.grid import Grid, edm, uniform
from art_edm.measure.dense_paths import PathOptions, advance, measure_profile
from art_edm.measure.field import DIFFERENCE_STEP, Surrogate
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser, one_dimensional

SHAPE = (1, 3, 3)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def anisotropic() -> GaussianDenoiser:
    return GaussianDenoiser(draw(*SHAPE), 0.02 + draw(*SHAPE, seed=1).square(), SHAPE)


def exact_norm(model: GaussianDenoiser, latents: torch.Tensor, sigma: np.ndarray) -> np.ndarray:
    """|Q| on the exact path x = m + sqrt(v + sigma^2) z: RMS over pixels of v z / (v + sigma^2)^(3/2), [M, n]."""
    v, z = model.variance.numpy().ravel(), latents.flatten(1).numpy()
    each = v * z[:, None, :] / (v + np.asarray(sigma, float).reshape(-1, 1) ** 2) ** 1.5  # [M, n, d]
    return np.sqrt(np.mean(each**2, axis=2))


def integral(function, top: float) -> float:
    edges = np.append(0.0, np.geomspace(0.02, top, 10))
    return sum(quad(function, a, b, epsabs=0, epsrel=1e-10)[0] for a, b in zip(edges, edges[1:]))


def trapezoid(y: np.ndarray, x: np.ndarray) -> float:
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2))


def test_isotropic_gaussian_against_the_closed_form():
    v, top = 0.25, 80.0
    model, z = GaussianDenoiser(0.0, v, SHAPE), draw(7, *SHAPE)
    profile = measure_profile(model, z, GaussianClock(top, v**0.5), points=160)
    size = float(z.square().mean(dim=(1, 2, 3)).sqrt().mean())
    c = integral(lambda s: (v * size) ** 0.5 * (v + s * s) ** -0.75, top) / top
    assert profile.horizon == top
    # The central difference of |Q| is accurate to a relative 1e-4.
    assert profile.root_integral == pytest.approx(c * top, rel=2e-4)
    assert profile.optimum == pytest.approx(c**2 * top, rel=4e-4)
    assert profile.optimum != pytest.approx(c**2, rel=0.5)  # the factor T
    energy = (v * float(z.square().mean())) ** 0.5
    assert profile.root_integral != pytest.approx(c * top * energy / (v * size) ** 0.5, rel=1e-2)  # mean of squares
    sigma = np.array([0.002, 0.1, 1.0, 10.0, 80.0])
    np.testing.assert_allclose(profile.mean(sigma)[0], size * v / (v + sigma**2) ** 1.5, rtol=3e-4)
    # Every sample has the same profile up to a factor r: J*_x / J* = E r / E r, exactly.
    assert profile.price == pytest.approx(1, rel=1e-6)


def test_anisotropic_gaussian_against_quadrature():
    model, z = anisotropic(), draw(5, *SHAPE, seed=2)
    profile = measure_profile(model, z, GaussianClock(80.0, model.sigma_data), points=120)
    q = lambda s: exact_norm(model, z, s).mean()
    root = integral(lambda s: q(s) ** 0.5, 80.0)
    each = lambda i, s: exact_norm(model, z[i : i + 1], s).item()
    roots = np.array([integral(lambda s: each(i, s) ** 0.5, 80.0) for i in range(len(z))])
    assert profile.optimum == pytest.approx(root**2 / 80, rel=1e-3)
    assert profile.state_optimum == pytest.approx(np.mean(roots**2) / 80, rel=1e-3)
    assert profile.price == pytest.approx(np.mean(roots**2) / root**2, rel=2e-4)
    assert profile.price < 0.999
    assert np.mean(roots) ** 2 / root**2 < profile.price - 1e-3  # E[r]^2 in place of E[r^2]


def built(*powers: Tuple[float, float], top: float = 4.0) -> Profile:
    """A profile of samples |Q| = a sigma^p, one for each (a, p), down to a level that no integral notices."""
    sigma = np.array([top, 0.1, 1e-6])
    return Profile(LinearClock(top), sigma, np.array([a * sigma**p for a, p in powers]), 0, 0.0)


def test_price_of_two_opposite_samples():
    top = 4.0
    profile = built((1.0, 2.0), (4.0, 0.0), top=top)  # sqrt|Q| = sigma and 2
    root = quad(lambda s: ((s * s + 4) / 2) ** 0.5, 0, top)[0]
    state = ((top**2 / 2) ** 2 + (2 * top) ** 2) / 2 / top
    assert profile.root_integral == pytest.approx(root, rel=1e-6)
    assert profile.state_optimum == pytest.approx(state, rel=1e-6)
    assert profile.price == pytest.approx(state * top / root**2, rel=1e-6)
    assert profile.price < 0.95
    # The mean of the roots in place of the root of the mean would find nothing to gain.
    assert np.mean([top**2 / 2, 2 * top]) ** 2 / top == pytest.approx(state)


def test_price_of_proportional_samples_is_one():
    assert built((1.0, -1.0), (3.0, -1.0), (0.1, -1.0)).price == pytest.approx(1, rel=1e-9)
    assert built((1.0, -1.0), (3.0, 1.0), (0.1, -1.0)).price < 0.99


def test_cost_of_the_uniform_schedule_is_the_integral_of_q():
    profile = built((1.0, 2.0), (4.0, 0.0))  # q = (sigma^2 + 4) / 2
    expected = (4**3 / 3 + 4 * 4) / 2  # int q dpsi: theta = 1
    for steps in (1, 2, 7, 1000):
        assert profile.cost(uniform(steps, 4.0).values) == pytest.approx(expected, rel=1e-6)
    sigma = 4.0 * (1 - np.linspace(0, 1, 5001)) ** 2  # theta = 2 (1 - t) = sqrt(sigma)
    weighted = (4**3.5 / 3.5 + 4 * 4**1.5 / 1.5) / 2
    assert profile.cost(sigma) == pytest.approx(weighted, rel=1e-5)
    assert weighted != pytest.approx(expected, rel=0.05)


@pytest.fixture(scope="module")
def gaussian_profile() -> Profile:
    model = anisotropic()
    return measure_profile(model, draw(6, *SHAPE, seed=3), GaussianClock(80.0, model.sigma_data), points=60)


def test_no_schedule_costs_less_than_the_optimum(gaussian_profile):
    profile, rng = gaussian_profile, np.random.default_rng(0)
    for steps in (1, 2, 3, 5, 18, 50):
        grids = [profile.direct(steps), edm(steps, 0.002, 80.0), uniform(steps, 80.0)]
        for _ in range(20):
            s = np.concatenate([[0.0], np.cumsum(rng.exponential(size=steps))])
            grids.append(Grid(np.append(profile.clock.sigma(s[:-1] / s[-1]), 0.0)))
        assert min(profile.cost(grid.values) for grid in grids) >= profile.optimum * (1 - 1e-9)
    # The cost of the left end point alone is below the optimum for a grid that leaps at the end.
    leap = np.array([80.0, 60.0, 40.0, 20.0, 10.0, 0.0])
    left = np.sum(profile.mean(leap[:-1])[0] * np.diff(leap) ** 2) * 5 / 80
    assert left < 0.5 * profile.optimum < profile.cost(leap)


def test_direct_grids_approach_the_optimum_and_equidistribute(gaussian_profile):
    profile = gaussian_profile
    assert profile.cost(profile.direct(4096).values) == pytest.approx(profile.optimum, rel=1e-5)
    values = profile.direct(7).values
    shares = []
    for high, low in zip(values, values[1:]):
        sigma = np.linspace(low, high, 20_001) if low else np.append(0.0, np.geomspace(1e-5, high, 20_001))
        shares.append(trapezoid(np.sqrt(profile.mean(sigma)[0]), sigma))
    np.testing.assert_allclose(shares, profile.root_integral / 7, rtol=1e-4)
    assert np.ptp(np.diff(values)) > 1  # steps of equal sigma would not do


def end_error(grid: Grid) -> float:
    """|std - 1| of Euler in the one-dimensional example, free of sampling noise."""
    s = grid.values
    return abs(10**0.5 * np.prod(1 + np.diff(s) * s[:-1] / (1 + s[:-1] ** 2)) - 1)


def test_direct_grid_of_the_one_dimensional_example():
    model = one_dimensional()
    profile = measure_profile(model, draw(16, 1, 1, 1), GaussianClock(3.0, 1.0), points=40)
    steps = [2, 5, 10, 20, 50, 100]
    found = [end_error(profile.direct(k)) for k in steps]
    np.testing.assert_allclose(found, [0.3492, 0.1493, 0.0771, 0.0392, 0.0159, 0.0080], atol=1e-3)
    assert abs(end_error(uniform(5, 3.0)) - 0.1493) > 0.05
    # Equal shares of q in place of sqrt(q): another grid, and a worse one.
    levels = np.linspace(0, 3, 20_001)
    share = np.concatenate([[0], np.cumsum((1 + levels[1:] ** 2) ** -1.5)])
    wrong = Grid(np.append(np.interp(np.linspace(1, 0, 6)[:-1] * share[-1], share, levels), 0.0))
    assert abs(end_error(wrong) - 0.1493) > 2e-3


def ode_solution(x: float, a: float, b: float, sigma: float, target: float) -> float:
    """Of dx/dsigma = (x - D)/sigma with D = a + b sigma."""
    slope = lambda s, y: (y - a - b * s) / s
    return solve_ivp(slope, (sigma, target), [x], rtol=1e-12, atol=1e-13, method="DOP853").y[0, -1]


def test_advance_is_exact_where_the_denoiser_is_linear_in_sigma():
    a, b, x, sigma, target = 0.7, -0.3, 2.0, 3.0, 0.4
    start = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
    here, there = start.new_tensor([sigma]), start.new_tensor([target])
    point = Surrogate(torch.full_like(start, a + b * sigma), torch.full_like(start, b), here)
    expected = ode_solution(x, a, b, sigma, target)
    assert advance(start, point, here, there).item() == pytest.approx(expected, rel=1e-10)
    assert advance(start, point, here, here).item() == x
    wrong = point._replace(slope=torch.full_like(start, -b))
    assert advance(start, wrong, here, there).item() != pytest.approx(expected, rel=1e-2)


def test_advance_is_of_second_order_and_euler_is_not():
    model, z = anisotropic(), draw(2, *SHAPE, seed=4)

    def error(steps: int, euler: bool) -> float:
        levels = np.geomspace(10.0, 0.05, steps + 1)
        x = model.initial(z, levels[0])
        for here, there in zip(levels, levels[1:]):
            sigma, target = (x.new_full((2,), level) for level in (here, there))
            if euler:
                x = x + (there - here) * -model.exact_drift(x, sigma)
            else:
                slope = -here * model.exact_surrogate(x, sigma)
                x = advance(x, Surrogate(model(x, sigma), slope, sigma), sigma, target)
        return float((x - model.initial(z, levels[-1])).abs().max())

    order, euler = (np.log2(error(40, kind) / error(80, kind)) for kind in (False, True))
    assert 1.85 < order < 2.3
    assert 0.8 < euler < 1.2
    assert error(40, False) < 0.1 * error(40, True)


def test_trajectories_follow_the_exact_path():
    model, z = anisotropic(), draw(4, *SHAPE, seed=5)
    profile = measure_profile(model, z, GaussianClock(80.0, model.sigma_data), points=80)
    sigma = profile.sigma
    assert sigma[0] == 80 and sigma[-1] == model.sigma_min and (np.diff(sigma) < 0).all()
    np.testing.assert_allclose(profile.norm, exact_norm(model, z, sigma), rtol=5e-3)
    assert not np.allclose(profile.norm, exact_norm(model, -z.flip(0), sigma), rtol=5e-2)


@pytest.mark.parametrize("batch", [2, 3, 64])
def test_evaluations_are_three_per_point(batch):
    model, z = anisotropic(), draw(7, *SHAPE)
    model(z, 1.0)  # what came before is not the profile's
    seen = []
    profile = measure_profile(model, z, GaussianClock(80.0, 1.0), 5, PathOptions(None, batch, seen.append))
    assert profile.evaluations == 3 * 7 * 5 == seen[-1]
    assert seen == sorted(set(seen)) and len(seen) == 5 * -(-7 // batch)
    assert profile.norm.shape == (7, 5) and profile.seconds > 0
    assert model.evaluations == 7 + 105


def test_batches_change_nothing():
    model, z = anisotropic(), draw(5, *SHAPE)
    one, two = (measure_profile(model, z, GaussianClock(80.0, 1.0), 6, PathOptions(batch=b)).norm for b in (64, 2))
    np.testing.assert_allclose(one, two, rtol=1e-12)
    assert not np.allclose(one[:2], two[2:4], rtol=1e-3)


class Recorder(GaussianDenoiser):
    """A Gaussian that remembers the lowest noise level it was asked for."""

    lowest = float("inf")

    def denoise(self, x, sigma, class_labels):
        self.lowest = min(self.lowest, float(sigma.min()))
        return super().denoise(x, sigma, class_labels)


def test_constant_below_the_lowest_noise_level():
    low = 0.5
    model = Recorder(0.0, 0.01, SHAPE, sigma_min=low)
    profile = measure_profile(model, draw(3, *SHAPE), GaussianClock(80.0, 0.1), points=30)
    norms = profile.norms(np.array([low, 0.3, 0.01, 0.0]))
    np.testing.assert_allclose(norms, norms[:, :1] * np.ones((1, 4)), rtol=1e-9)
    np.testing.assert_allclose(norms[:, 0], profile.norm[:, -1], rtol=1e-9)
    # The data's own |Q| grows a hundredfold below sigma_min: nothing but the rule above keeps it constant.
    assert exact_norm(model, draw(3, *SHAPE), [0.0]).mean() > 100 * norms.mean()
    assert model.lowest == pytest.approx(low * (1 - DIFFERENCE_STEP))


def test_standard_error(gaussian_profile):
    sigma = np.array([0.01, 1.0, 30.0])
    norms = gaussian_profile.norms(sigma)
    q, error = gaussian_profile.mean(sigma)
    np.testing.assert_allclose(q, norms.sum(axis=0) / 6)
    by_hand = np.sqrt(((norms - norms.sum(axis=0) / 6) ** 2).sum(axis=0) / 5 / 6)
    np.testing.assert_allclose(error, by_hand)
    assert not np.allclose(error, norms.std(axis=0) / 6**0.5, rtol=1e-3)  # M in place of M - 1
    single = built((1.0, 2.0))
    assert single.mean(sigma[:1])[1] == 0
