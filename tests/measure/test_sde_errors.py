"""The reverse SDE against closed forms of Gaussian data, where every step is linear; its clocks against a search."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid
from art_edm.measure.dense_paths import PathOptions, measure_along, place_points
from art_edm.measure.sde_errors import SdeErrors, measure_stochastic
from art_edm.models.analytic import GaussianDenoiser
from art_edm.sampling.sde import Brownian, sample_sde
from art_edm.sampling.solvers import integrate, sample, slope_of
from tests.benchmarks.stochastic_clocks import churned, gaussian_errors, searched

V = 0.25
GRID = Grid([80.0, 4.0, 1.5, 0.7, 0.3, 0.1, 0.0])
SETTINGS = [(1.0, "ancestral"), (0.5, "ancestral"), (1.0, "euler")]


class Recorder(GaussianDenoiser):
    """Keeps what it is called with."""

    def __init__(self, variance: float = V) -> None:
        super().__init__(0.0, variance, (1, 8, 8))
        self.seen = []

    def denoise(self, x, sigma, class_labels):
        self.seen.append(x.clone())
        return super().denoise(x, sigma, class_labels)


def draw(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn((count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clock() -> GaussianClock:
    return GaussianClock(80.0, V**0.5)


def test_a_step_is_that_of_ddpm():
    """The posterior q(x_next | x, x_0 = D) of 2006.11239 (6), (7), in the variables of a variance-exploding process."""
    net, above, below = Recorder(0.0), 2.0, 0.7  # D = 0
    sample_sde(net, draw(3000), Grid([above, below, 0.0]))
    x, after = (part.flatten().numpy() for part in net.seen)
    mean, variance = below**2 / above**2, below**2 * (above**2 - below**2) / above**2
    noise = after - mean * x
    assert np.mean(noise * x) / above == pytest.approx(0, abs=0.01)
    assert noise.var() == pytest.approx(variance, rel=0.01)
    assert abs(np.mean((after - below / above * x) * x)) / above > 0.1  # the step of the flow


def test_without_noise_all_is_euler_s():
    net = GaussianDenoiser(0.0, V, (1, 8, 8))
    euler = sample(net, draw(2), GRID, "euler")
    for step in ("ancestral", "euler"):
        np.testing.assert_allclose(sample_sde(net, draw(2), GRID, 0.0, step=step), euler, rtol=1e-12)
    assert float((sample_sde(net, draw(2), GRID, 1e-4) - euler).abs().max()) > 1e-4


@pytest.mark.parametrize("beta, step", SETTINGS)
def test_ends_have_the_spread_of_the_recursion(beta, step):
    net = GaussianDenoiser(0.0, V, (1, 8, 8))
    found = float(sample_sde(net, draw(3000), GRID, beta, step=step).std()) / V**0.5 - 1
    weak = {setting: gaussian_errors(GRID.values, V, *setting)[1] for setting in SETTINGS}
    assert found == pytest.approx(weak.pop((beta, step)), abs=0.006)
    assert min(abs(found - other) for other in weak.values()) > 0.015


@pytest.mark.slow
@pytest.mark.parametrize("beta, step", SETTINGS)
def test_grids_share_the_brownian_motion_of_a_path(beta, step):
    """The distance of a coarse run to a fine one, of the same motion, is that of the joint recursion."""
    net, latents = GaussianDenoiser(0.0, V, (1, 8, 8)), draw(60)
    dense = V**0.5 * np.tan(np.linspace(0, np.arctan(80 / V**0.5), 500)[:-1])
    path = np.unique(np.concatenate([GRID.values, dense]))[::-1]
    fine = sample_sde(net, latents, Grid(path), beta, brownian=Brownian(path=path))
    coarse = sample_sde(net, latents, GRID, beta, step=step, brownian=Brownian(path=path))
    strong, weak = gaussian_errors(GRID.values, V, beta, step)
    assert float((coarse - fine).square().mean().sqrt()) == pytest.approx(strong, rel=0.04)
    other = sample_sde(net, latents, GRID, beta, step=step, brownian=Brownian(1, path=path))
    assert float((other - fine).square().mean().sqrt()) > 1.3 * strong


def linear(levels: np.ndarray, beta: float, step: str) -> np.ndarray:
    """Weights [2, n + 1] of x and of n unit normals in the end of one step over all levels, and of n small ones."""
    def kept(s: float, t: float) -> float:
        outer = (t / s) ** (1 + beta) if step == "ancestral" else 1 - (1 + beta) * (1 - t / s)
        return (V + outer * s**2) / (V + s**2)

    small, target = np.eye(1, len(levels))[0], levels[-1]
    whole = kept(levels[0], target) * small
    for j, (s, t) in enumerate(zip(levels, levels[1:]), start=1):
        if step == "ancestral":
            part, added = (target**2 * ((target / t) ** (2 * beta) - (target / s) ** (2 * beta)),
                           t**2 * (1 - (t / s) ** (2 * beta)))
        else:
            part = added = beta * (s**2 - t**2)
        whole[j], small = part**0.5, kept(s, t) * small
        small[j] = added**0.5
    return np.stack([whole, small])


@pytest.mark.slow
@pytest.mark.parametrize("beta, step, error", [
    (1.0, "ancestral", "strong"), (0.5, "ancestral", "strong"), (1.0, "euler", "strong"), (1.0, "ancestral", "weak"),
])
def test_the_error_of_a_step_is_that_of_its_coefficients(beta, step, error):
    net, stride, points = GaussianDenoiser(0.0, V, (1, 8, 8)), 6, 90
    settings = dict(beta=beta, step=step, stride=stride)
    profile = measure_stochastic(net, draw(160), clock(), points, errors=SdeErrors(error=error, tracers=0, **settings))
    assert net.evaluations == 160 * points and profile.order == {"strong": 2, "weak": 1}[error]
    levels = place_points(clock(), net.sigma_min, points)
    for k in (40, 60, 80):
        path = levels[k - stride:k + 1]
        whole, small = linear(path, beta, step)
        e, spread = whole - small, np.append(V + path[0] ** 2, np.ones(stride))  # of x and of the normals
        size = {"strong": np.sum(e**2 * spread), "weak": np.sum((2 * whole * e - e**2)[1:])}
        other = size["weak" if error == "strong" else "strong"]
        h = path[0] - path[-1]
        found = profile.norm[:, k - stride + 1].mean() * h ** (profile.order + 1)
        assert found == pytest.approx(abs(size[error]), rel=0.05)
        assert abs(found / abs(other) - 1) > 0.2
        assert profile.sigma[k - stride + 1] == pytest.approx((path[0] * path[-1]) ** 0.5)


def test_the_laws_of_short_steps():
    """|e|^2 = (2 / sigma)^2 |J_D g|^2 h^3 / 3, and the variance 4 h^2 tr J_D / d that lacks; less the dense path's."""
    net, n = GaussianDenoiser(0.0, V, (1, 48, 48)), 4
    latents = torch.randn((4, 1, 48, 48), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = np.array([0.2, 0.5, 2.0])
    u = V + sigma**2
    strong = 4 / sigma**2 * (V / u) ** 2 * 2 * sigma / 3 * (1 - 1 / n) * (1 - 1 / (2 * n))
    weak = 4 * V / u * (1 - 1 / n)
    for error, expected in (("strong", strong), ("weak", weak)):
        profile = measure_stochastic(net, latents, clock(), 700, errors=SdeErrors(error=error, stride=n, tracers=0))
        np.testing.assert_allclose(profile.norms(sigma).mean(axis=0), expected, rtol=0.08)


@pytest.mark.slow
def test_growth_is_how_the_sde_forgets():
    net, stride, points = GaussianDenoiser(0.0, V, (1, 8, 8)), 4, 200
    local = measure_stochastic(net, draw(10), clock(), points, errors=SdeErrors(stride=stride, tracers=0))
    before = net.evaluations
    whole = measure_stochastic(net, draw(10), clock(), points, errors=SdeErrors(stride=stride, tracers=40))
    assert net.evaluations - before == pytest.approx(10 * points * 21, rel=0.05)
    levels = place_points(clock(), net.sigma_min, points)
    found = (whole.norm.mean(axis=0) / local.norm.mean(axis=0))[1:-1]  # at the levels where steps end
    seen = np.searchsorted(-levels, [-5.0, -1.0, -0.3, -0.05])
    spread = V / (V + levels[seen] ** 2)
    np.testing.assert_allclose(found[seen - stride], spread**2, rtol=0.15)
    assert found[seen[0] - stride] < 0.1 * spread[0]  # not that of the flow, whose square is `spread`


@pytest.mark.parametrize("error, column, near", [("strong", 0, 1.03), ("weak", 1, 1.06)])
def test_the_clock_is_near_the_best_of_all_grids(error, column, near):
    net, noises = GaussianDenoiser(0.0, V, (1, 8, 8)), draw(12)
    profile = measure_stochastic(net, noises, clock(), 85, errors=SdeErrors(error=error))
    art = measure_along(net, noises, clock(), 85)
    local = measure_stochastic(net, noises, clock(), 85, errors=SdeErrors(tracers=0))
    size = lambda levels: abs(gaussian_errors(levels, V, 1.0, "ancestral")[column])
    for k in (5, 10):
        own = profile.direct(k).values
        best = searched(size, own)
        assert 1 - 1e-6 < size(own) / size(best) < near
        assert size(art.direct(k).values) > 1.25 * size(best)
        assert size(local.direct(k).values) > 1.15 * size(best)


def test_churn_s_recursion_is_heun_s_method_from_raised_levels():
    net, levels, amount = GaussianDenoiser(0.0, V, (1, 8, 8)), GRID.values, 0.2
    plain = sample(net, draw(1), GRID, "heun") / draw(1)
    np.testing.assert_allclose(plain, churned(levels, np.array([V]), 0.0)[0], rtol=1e-12)
    x, fresh = net.initial(draw(4000), 80.0), draw(4000 * len(levels), 1).split(4000)
    for s, t, z in zip(levels, levels[1:], fresh):
        raised = s * (1 + amount)
        x = x + (raised**2 - s**2) ** 0.5 * z
        x = integrate(slope_of(net), x, torch.tensor([raised, t], dtype=torch.float64), "heun")[0]
    found = float(x.std())
    assert found == pytest.approx(churned(levels, np.array([V]), amount)[0], rel=5e-3)
    assert abs(found / churned(levels, np.array([V]), 0.0)[0] - 1) > 0.02


def test_noise_belongs_to_the_image():
    net = GaussianDenoiser(0.0, V, (1, 8, 8))
    every = sample_sde(net, draw(5), GRID, brownian=Brownian(3))
    torch.testing.assert_close(sample_sde(net, draw(5)[3:], GRID, brownian=Brownian(3)), every[3:], rtol=0, atol=0)
    assert not torch.equal(sample_sde(net, draw(5), GRID, brownian=Brownian(4)), every)
    small, large = (measure_stochastic(net, draw(5), clock(), 40, PathOptions(batch=batch)).norm for batch in (2, 8))
    np.testing.assert_array_equal(small, large)
    assert len(np.unique(large[:, 5])) == 5


@pytest.mark.parametrize("call, message", [
    (lambda net: sample_sde(net, draw(1), GRID, step="heun"), "heun"),
    (lambda net: sample_sde(net, draw(1), GRID, -1.0), "beta"),
    (lambda net: sample_sde(net, draw(1), GRID, brownian=Brownian(path=np.array([80.0, 1.0, 0.0]))), "lacks a level"),
    (lambda net: measure_stochastic(net, draw(1), clock(), 40, errors=SdeErrors(beta=0.0)), "beta"),
    (lambda net: measure_stochastic(net, draw(1), clock(), 9), "at least 10"),
    (lambda net: measure_stochastic(net, draw(1), clock(), 40, errors=SdeErrors(error="mean")), "'mean'"),
    (lambda net: measure_stochastic(net, draw(1), clock(), 40, errors=SdeErrors(step="euler", error="weak")), "euler"),
])
def test_what_cannot_be_is_refused(call, message):
    net = GaussianDenoiser(0.0, V, (1, 8, 8))
    with pytest.raises(ValueError, match=message):
        call(net)
    assert net.evaluations == 0
