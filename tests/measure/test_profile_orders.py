"""Profiles of higher order against closed forms; and when a third of the trajectories is enough."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock, LinearClock
from art_edm.measure.dense_paths import draws, measure_profile
from art_edm.measure.objectives import STREAM, Objective, expected_evaluations, measure_objective
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser
from art_edm.sampling.noise import seeded_generator

TOP = 4.0
LEVELS = np.geomspace(TOP, 1e-4, 60)


def power_law(order: int, power: float, scales: np.ndarray) -> Profile:
    """C_p = scale sigma^power for each trajectory; log-log interpolation makes it exact down to the last level."""
    return Profile(LinearClock(TOP), LEVELS, scales[:, None] * LEVELS**power, 0, 0.0, order)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_power_law_has_its_closed_form(order):
    """int sigma^b from 0 to T with b = power / (p + 1); J* = c^(p + 1) T; the grid is uniform in sigma^(b + 1)."""
    power, scales = 2.0, np.array([0.5, 1.0, 4.0])
    b, mean = power / (order + 1), scales.mean()
    profile = power_law(order, power, scales)
    integral = TOP ** (b + 1) / (b + 1)
    c = mean ** (1 / (order + 1)) * integral / TOP
    assert profile.root_integral == pytest.approx(c * TOP, rel=1e-4)
    assert profile.optimum == pytest.approx(c ** (order + 1) * TOP, rel=3e-4)
    # Trajectories differ by a factor alone, so that the sample's own clock saves nothing.
    assert profile.price == pytest.approx(1.0, rel=1e-6)
    expected = TOP * (1 - np.arange(6) / 5) ** (1 / (b + 1))
    np.testing.assert_allclose(profile.direct(5).values, expected, rtol=2e-3, atol=1e-12)
    other = power_law(order % 4 + 1, power, scales).direct(5).values
    assert not np.allclose(other, expected, rtol=2e-3)


@pytest.mark.parametrize("order", [1, 2, 4])
def test_the_cost_is_theta_to_the_order_plus_one(order):
    """One step: theta = 1, J = int C_p dpsi. Two equal steps of a constant C_p cost the same, uneven ones more."""
    flat = power_law(order, 0.0, np.ones(2))
    assert flat.cost(np.array([TOP, 0.0])) == pytest.approx(TOP, rel=1e-6)
    assert flat.cost(np.array([TOP, 1.0, 0.0])) == pytest.approx(
        (3 / 2) ** (order + 1) * 2 + (1 / 2) ** (order + 1) * 2, rel=1e-3)  # sum theta^(p + 1) dt, dt = 2
    curved = power_law(order, 1.5, np.array([1.0, 3.0]))
    fine = curved.direct(4096).values
    assert curved.cost(fine) == pytest.approx(curved.optimum, rel=1e-3)
    rng = np.random.default_rng(0)
    for _ in range(20):
        s = np.append(np.sort(rng.uniform(0, TOP, 5))[::-1], 0.0)
        assert curved.cost(np.append(TOP, s)) > curved.optimum


@pytest.mark.slow
def test_the_expected_excess_is_that_of_many_draws():
    """log |Q| off by independent noise: the excess of M trajectories' optimum, judged by the truth and by itself."""
    rng, count, spread = np.random.default_rng(1), 8, 0.5
    truth = power_law(1, 1.0, np.ones(1))
    found, true = [], []
    for _ in range(150):
        smooth = rng.normal(size=(count, 6)) @ np.cos(np.arange(6)[:, None] * np.linspace(0, np.pi, len(LEVELS)))
        noisy = Profile(truth.clock, LEVELS, LEVELS * np.exp(spread * smooth - spread**2 / 2), 0, 0.0)
        found.append(noisy.sampling_excess)
        true.append(truth.cost(noisy.direct(2048).values) / truth.optimum - 1)
    assert np.mean(found) == pytest.approx(np.mean(true), rel=0.35)
    assert not np.mean(found) == pytest.approx(4 * np.mean(true), rel=0.35)  # without the factor


def test_the_expected_excess_of_two_halves_in_closed_form():
    """sqrt q = 1 of one half and 1 + u of the other, u = sigma / T: (28/27 - 1 and 1.5 ln 2 - 1) / 2 / 4."""
    norm = np.tile(np.stack([np.ones_like(LEVELS), (1 + LEVELS / TOP) ** 2]), (2, 1))
    found = Profile(power_law(1, 1.0, np.ones(1)).clock, LEVELS, norm, 0, 0.0).sampling_excess
    assert found == pytest.approx((1 / 27 + 1.5 * np.log(2) - 1) / 8, rel=0.02)
    assert found != pytest.approx((1 / 27 + 1.5 * np.log(2) - 1) / 2, rel=0.02)


def field(spread: float) -> GaussianDenoiser:
    """Few pixels of very unequal variance: trajectories differ; many equal ones: they do not."""
    variance = torch.logspace(-spread, spread, 4, dtype=torch.float64).reshape(1, 2, 2)
    return GaussianDenoiser(0.0, variance, (1, 2, 2))


def test_all_are_measured_only_where_a_third_is_not_enough():
    """Of a method that looks at points, the rest like the third; of differences from level to level, see elsewhere."""
    for spread, tolerance, expected in ((0.0, 0.002, 8), (2.0, 0.002, 24), (0.0, 0.0, 24), (2.0, 10.0, 8)):
        denoiser = field(spread)
        objective = Objective(None, 24, 20, tolerance, path_differences=False, seed=1)
        profile = measure_objective(denoiser, objective)
        assert len(profile.norm) == expected
        assert profile.evaluations == denoiser.evaluations == 3 * 20 * expected
        assert denoiser.evaluations in expected_evaluations(objective)
        latents, _ = draws(denoiser, seeded_generator(1, STREAM))(24)
        whole = measure_profile(field(spread), latents, GaussianClock(80.0, denoiser.sigma_data), 20)
        np.testing.assert_array_equal(profile.norm, whole.norm[:expected])
    assert replace(profile, norm=profile.norm[:3]).sampling_excess == float("inf")
