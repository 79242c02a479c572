"""Local errors of solvers against one exact step of the closed form; and ART-RL for costs of a higher power."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.learning.config import PRESETS, live
from art_edm.learning.training import train
from art_edm.measure.dense_paths import place_points
from art_edm.measure.local_errors import measure_errors
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser
from art_edm.sampling.multistep import on_path
from art_edm.sampling.solvers import integrate, order_of, slope_of

VARIANCE = 0.25
STRIDE, POINTS = 6, 160


def denoiser() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, VARIANCE, (1, 2, 2))


def uneven() -> GaussianDenoiser:
    """Pixels of unequal variance: C_4 of equal ones is zero at some levels."""
    return GaussianDenoiser(0.0, VARIANCE * torch.logspace(-1, 1, 16).double().reshape(1, 4, 4), (1, 4, 4))


def draw(count: int = 3) -> torch.Tensor:
    return torch.randn((count, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """The path that starts at 80 z: x is proportional to the standard deviation sqrt(v + sigma^2)."""
    return 80 * latents * ((VARIANCE + sigma**2) / (VARIANCE + 80.0**2)) ** 0.5


def expected(solver: str, levels: np.ndarray, k: int, past: int) -> np.ndarray:
    """C_p of the step that ends at level k, from exact states, with so many exact steps before it."""
    slope, order = slope_of(denoiser()), order_of(solver)
    kept, ends = (), [levels[k - STRIDE * j] for j in range(past + 1, -1, -1)]
    for j, start in enumerate(ends[:-1]):
        end, kept = integrate(slope, exact(draw(), start), torch.tensor(ends), solver, kept, steps=[j])
        kept = on_path(kept, exact(draw(), start))
    error = (end - exact(draw(), ends[-1])).flatten(1).square().mean(dim=1).sqrt()
    return (error / (ends[-2] - ends[-1]) ** (order + 1)).numpy()


@pytest.mark.parametrize("solver, past, cost", [
    ("euler", 0, 1), ("heun", 0, 2), ("dpmpp2m", 1, 1), ("ipndm2", 1, 1), ("ipndm3", 2, 1),
    ("ab4-sigma", 3, 1), ("rk4", 0, 4),
])
def test_the_error_of_a_step_is_that_from_the_exact_path(solver, past, cost):
    clock = GaussianClock(80.0, VARIANCE**0.5)
    net = denoiser()
    profile = measure_errors(net, draw(), clock, POINTS, solver=solver, stride=STRIDE)
    levels = place_points(clock, net.sigma_min, POINTS)
    assert profile.order == order_of(solver) and profile.norm.shape == (3, POINTS - STRIDE + 2)
    path = POINTS + 3 * (POINTS - 1) if solver == "rk4" else POINTS  # RK4 follows the path where it is measured
    assert profile.evaluations == net.evaluations == 3 * (path + (cost - 1) * (POINTS - STRIDE))
    apart = []
    for k in (70, 90, 110):  # sigma = 3 to 0.2
        found = profile.norm[:, k - STRIDE + 1]
        np.testing.assert_allclose(found, expected(solver, levels, k, past), rtol=0.1)
        assert profile.sigma[k - STRIDE + 1] == pytest.approx((levels[k] * levels[k - STRIDE]) ** 0.5)
        other = ("dpmpp2m", levels, k, 1) if solver in ("heun", "ipndm2") else ("heun", levels, k, 0)
        twin = expected(*other)
        apart.append(np.abs(found / twin - 1).max())
    assert max(apart) > 0.3  # another solver's


def test_euler_s_error_is_half_of_q():
    """e = h^2 x'' / 2: C_1 = |Q| / 2, up to the length of a step."""
    clock = GaussianClock(80.0, VARIANCE**0.5)
    profile = measure_errors(denoiser(), draw(), clock, 400, solver="euler", stride=2)
    sigma = np.array([0.1, 0.5, 2.0])
    path = (VARIANCE + 80.0**2) ** 0.5
    size = draw().flatten(1).square().mean(dim=1).sqrt().numpy()[:, None]
    second = VARIANCE / (VARIANCE + sigma**2) ** 1.5 * 80 / path * size
    np.testing.assert_allclose(profile.norms(sigma), second / 2, rtol=0.03)


def test_few_levels_and_unknown_solvers_are_refused():
    clock = GaussianClock(80.0, 0.5)
    with pytest.raises(ValueError, match="rk5"):
        measure_errors(denoiser(), draw(), clock, 40, solver="rk5")
    with pytest.raises(ValueError, match="at least 10"):
        measure_errors(denoiser(), draw(), clock, 9)
    with pytest.raises(ValueError, match="cached"):
        train(denoiser(), live(PRESETS["default"].changed(solver="heun")))


@pytest.mark.slow
@pytest.mark.parametrize("solver, bound", [("heun", 1.05), ("rk4", 1.15)])
def test_art_rl_reaches_the_optimum_of_its_solver(solver, bound):
    """In a third of the default's iterations, most of the way from the base clock to J* of the order's objective."""
    config = PRESETS["default"].changed(solver=solver, trajectories=6, iterations=120, batch=96, train_steps=64)
    result = train(uneven(), config)

    def score(profile: Profile, sigma: np.ndarray) -> float:
        values = np.append(sigma[:-1], 0.0)
        values[0] = 80.0
        return profile.cost(values) / profile.optimum

    tau = np.linspace(0, 1, 2049)
    reached = score(result.profile, result.learned.sigma(tau))
    start = score(result.profile, result.profile.clock.sigma(tau))
    assert 1 - 1e-3 < reached < bound and start > 1.05 and reached - 1 < (start - 1) / 3
    euler = train(uneven(), config.changed(solver=None, iterations=1)).profile
    assert score(result.profile, euler.direct(2048).values) > 1.05  # ART's own optimum is not this one
