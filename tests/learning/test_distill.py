"""From rollouts to a clock: means, rescaling, monotony, reading off, quantiles."""

from __future__ import annotations

import numpy as np
import pytest

from art_edm.grids.clocks import EdmClock, GaussianClock, LinearClock
from art_edm.grids.grid import Grid, edm_unpinned, uniform
from art_edm.learning.distill import distill
from art_edm.measure.profile import Profile

N = 32
TAU = np.linspace(0, 1, N + 1)
CLOCK = GaussianClock(80.0, 0.5)


def noisy(mean: np.ndarray, paths: int = 50, size: float = 0.02) -> np.ndarray:
    """Paths of exactly this mean, [N + 1, 2 * paths], fixed at both ends."""
    noise = size * np.random.default_rng(0).standard_normal((N + 1, paths)) * (TAU * (1 - TAU))[:, None]
    return mean[:, None] + np.concatenate([noise, -noise], axis=1)


def test_mean_of_paths_of_known_mean():
    mean = (TAU + TAU**2) / 2
    learned = distill(noisy(mean), CLOCK)
    np.testing.assert_allclose(learned.mean, mean, atol=1e-12)
    np.testing.assert_allclose(learned.sigma(TAU[:-1]), CLOCK.sigma(mean)[:-1], rtol=1e-9)
    half = distill(noisy(mean)[:, :50], CLOCK)  # without the mirror images
    assert np.abs(half.mean - mean).max() > 1e-5


def test_paths_are_rescaled_to_arrive():
    paths = noisy((TAU + TAU**2) / 2)
    ends = np.random.default_rng(1).uniform(0.8, 1.2, paths.shape[1])
    found, expected = distill(paths * ends, CLOCK), distill(paths, CLOCK)
    np.testing.assert_allclose(found.mean, expected.mean, atol=1e-12)
    np.testing.assert_allclose(found.spread, expected.spread, atol=1e-12)
    assert found.mean[0] == 0 and found.mean[-1] == 1
    assert np.abs((paths * ends).clip(0, 1).mean(axis=1) - expected.mean).max() > 1e-2  # not rescaled


def test_path_that_stays_behind_is_left_out():
    paths = noisy((TAU + TAU**2) / 2)
    lost = 0.4 * TAU[:, None] ** 3
    np.testing.assert_allclose(distill(np.hstack([paths, lost]), CLOCK).mean, distill(paths, CLOCK).mean, atol=1e-12)
    counted = np.hstack([paths, np.repeat(lost / 0.4, 10, axis=1)]).mean(axis=1)
    assert np.abs(counted - distill(paths, CLOCK).mean).max() > 1e-2
    only_lost = distill(lost, CLOCK)  # better than nothing
    np.testing.assert_allclose(only_lost.mean, TAU**3, atol=1e-4)


@pytest.mark.parametrize("clock", [CLOCK, LinearClock(80.0), EdmClock(80.0)])
def test_clock_falls_strictly_even_where_paths_go_back(clock):
    mean = TAU.copy()
    mean[10:16] = [0.5, 0.45, 0.4, 0.4, 0.4, 0.42]
    assert (np.diff(mean) < 0).any()
    learned = distill(np.repeat(mean[:, None], 4, axis=1), clock)
    assert (np.diff(learned.mean) > 0).all() and learned.mean[0] == 0 and learned.mean[-1] == 1
    for steps in (1, 2, 3, 5, 18, 32, 33, 100, 1000):
        grid = learned.grid(steps)
        assert grid.num_steps == steps and grid.sigma_max == 80.0 and grid.values[-1] == 0  # `Grid` checks the order
    with pytest.raises(ValueError, match="ascend"):
        Grid(np.append(clock.sigma(mean[:-1]), 0.0))  # the mean itself is no grid


@pytest.mark.parametrize("steps", [1, 2, 5, 18, 32, 100])
def test_reading_off_a_linear_path_gives_the_clock(steps):
    paths = np.repeat(TAU[:, None], 3, axis=1)
    inner = 1 - np.arange(steps) / steps
    for clock, expected in (
        (LinearClock(80.0), uniform(steps, 80.0).values), (EdmClock(80.0), edm_unpinned(steps, 80.0).values),
        (CLOCK, np.append(CLOCK.sigma(1 - inner), 0.0)),
    ):
        np.testing.assert_allclose(distill(paths, clock).grid(steps).values, expected, rtol=1e-7)
        bent = distill(paths**1.1, clock).grid(steps).values
        assert steps == 1 or not np.allclose(bent, expected, rtol=1e-2)


def test_reading_off_between_the_knots():
    mean = 0.5 * TAU + 0.5 * TAU**2
    t = np.arange(7) / 7
    found = distill(mean[:, None], LinearClock(80.0)).grid(7).values[:-1]
    np.testing.assert_allclose(found, 80 * (1 - 0.5 * t - 0.5 * t**2), atol=80 * 1e-4)


def test_s_is_averaged_and_not_sigma():
    clock = EdmClock(80.0)
    paths = np.stack([TAU**0.8, TAU**1.25], axis=1)
    found = distill(paths, clock).sigma(TAU)
    np.testing.assert_allclose(found[:-1], clock.sigma(paths.mean(axis=1))[:-1], rtol=1e-9)
    biased = clock.sigma(paths).mean(axis=1)
    assert (biased[1:-1] > found[1:-1]).all() and biased[-2] > 1.4 * found[-2]


def test_quartiles_and_the_central_99_per_cent():
    level = np.linspace(0.2, 0.6, 1001)  # s half way; each path is straight before and after
    paths = np.where(TAU[:, None] <= 0.5, 2 * TAU[:, None] * level, level + (2 * TAU[:, None] - 1) * (1 - level))
    clock = LinearClock(80.0)
    learned = distill(paths[:, np.random.default_rng(0).permutation(1001)], clock)
    np.testing.assert_allclose(learned.spread[:, N // 2], [0.202, 0.3, 0.5, 0.598], atol=1e-12)
    np.testing.assert_allclose(learned.spread[:, N // 4], [0.101, 0.15, 0.25, 0.299], atol=1e-12)
    assert (learned.spread[:, 0] == 0).all() and (learned.spread[:, -1] == 1).all()
    # theta = dpsi/dt is 2 level before and 2 (1 - level) after, in the linear clock.
    np.testing.assert_allclose(learned.theta[:, 0], [0.404, 0.6, 1.0, 1.196], atol=1e-9)
    np.testing.assert_allclose(learned.theta[:, -1], [0.804, 1.0, 1.4, 1.596], atol=1e-9)
    narrow = np.quantile(level, [0.025, 0.975])
    assert np.abs(learned.spread[[0, 3], N // 2] - narrow).max() > 5e-3  # the central 95 % is another band


def test_theta_of_the_base_clock_is_its_rate():
    learned = distill(np.repeat(TAU[:, None], 3, axis=1), CLOCK)
    ends, middle = CLOCK.rate(TAU), CLOCK.rate((TAU[1:] + TAU[:-1]) / 2)
    over_step = (ends[:-1] + 4 * middle + ends[1:]) / 6
    np.testing.assert_allclose(learned.theta, np.tile(over_step, (4, 1)), rtol=5e-3)
    assert not np.allclose(learned.theta, np.tile(ends[:-1], (4, 1)), rtol=3e-2)
    assert learned.theta.mean() == pytest.approx(1, rel=1e-9)  # constraint (6): theta averages 1 over the time


def test_distilling_the_optimum_gives_the_direct_grid():
    clock = LinearClock(4.0)
    sigma = np.geomspace(4.0, 1e-6, 60)
    profile = Profile(clock, sigma, (1 / (1 + sigma) ** 2)[None], 0, 0.0)  # sqrt|Q| = 1 / (1 + sigma)
    paths = clock.fraction(profile.direct(N).values)
    grid = distill(paths[:, None], clock).grid(8)
    np.testing.assert_allclose(grid.values, 5 ** (1 - np.arange(9) / 8) - 1, atol=2e-3)  # equal steps of log(1 + sigma)
    assert np.abs(grid.values - uniform(8, 4.0).values).max() > 0.3


def test_ground_that_is_covered_twice_counts_once():
    """A mean that goes back from 0.4 to 0.2 stands still until it passes 0.4 again: 0, 0.4, 0.4, 0.6, 1."""
    mean = distill(np.array([0.0, 0.4, 0.2, 0.6, 1.0])[:, None], CLOCK).mean
    np.testing.assert_allclose(mean, [0, 0.4, 0.4, 0.6, 1], atol=1e-5)
    assert abs(0.8 / 1.2 - 0.6) > 0.05  # steps taken as they are, then normalised, would give 0.8 / 1.2 there
