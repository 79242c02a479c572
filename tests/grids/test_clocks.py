"""Base clocks: inverses, rates and ends against closed forms, quadrature and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad

from art_edm.grids.clocks import CLOCKS, ComposedClock, EdmClock, GaussianClock, LinearClock, make_clock

TAU = np.linspace(0, 1, 33)
CASES = {
    "linear": LinearClock(80.0),
    "edm": EdmClock(80.0),
    "edm-3": EdmClock(3.0, rho=3.0),
    **{f"gaussian-{s:g}": GaussianClock(80.0, s) for s in (0.02, 0.5, 1.5, 20.0, 300.0)},
    "gaussian-short": GaussianClock(3.0, 1.0),
    "composed-linear": ComposedClock(LinearClock(80.0), (TAU + TAU**2) / 2),
    "composed-gaussian": ComposedClock(GaussianClock(80.0, 0.5), (3 * TAU - TAU**2) / 2),
    "composed-twice": ComposedClock(
        ComposedClock(EdmClock(80.0), np.array([0, 0.3, 0.55, 0.8, 1.0])), np.array([0, 0.2, 0.55, 1.0])
    ),
}
clocks = pytest.mark.parametrize("clock", CASES.values(), ids=CASES.keys())


@clocks
def test_fraction_inverts_sigma(clock):
    s = np.linspace(0, 1, 1001)
    error = np.abs(clock.fraction(clock.sigma(s)) - s).max()
    assert error < 1e-9
    shifted = np.abs(clock.fraction(clock.sigma(s) * (1 + 1e-6)) - s).max()
    assert shifted > 1e-9  # the bound tells an error of one in a million


@clocks
def test_sigma_inverts_fraction(clock):
    sigma = np.geomspace(0.002, clock.sigma_max, 500)
    np.testing.assert_allclose(clock.sigma(clock.fraction(sigma)), sigma, rtol=1e-9)


@clocks
def test_ends_are_exact(clock):
    assert clock.sigma(0.0) == clock.sigma_max and clock.sigma(1.0) == 0.0
    assert clock.fraction(clock.sigma_max) == 0.0 and clock.fraction(0.0) == 1.0
    assert clock.sigma(-0.5) == clock.sigma_max and clock.sigma(1.5) == 0.0  # clipped


@clocks
def test_sigma_falls_strictly(clock):
    assert (np.diff(clock.sigma(np.linspace(0, 1, 4001))) < 0).all()


@clocks
def test_rate_is_the_slope_of_sigma(clock):
    s, h = np.linspace(0.0131, 0.9731, 150), 1e-6
    slope = (clock.sigma(s - h) - clock.sigma(s + h)) / (2 * h)  # -dsigma/ds = dpsi/ds
    np.testing.assert_allclose(clock.rate(s), slope / clock.sigma_max, rtol=2e-5)
    assert not np.allclose(clock.rate(s), -slope / clock.sigma_max, rtol=0.1)  # wrong sign
    assert not np.allclose(clock.rate(s), slope, rtol=0.1)  # 1 / sigma_max dropped


@clocks
def test_rate_integrates_to_the_whole_time(clock):
    s = np.linspace(0, 1, 50_001)
    rate = clock.rate(s)
    assert np.sum((rate[1:] + rate[:-1]) / 2) / 50_000 == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("sigma_data", [0.02, 0.5, 5.0])
def test_gaussian_clock_flattens_the_cost_of_gaussian_data(sigma_data):
    s = np.linspace(0, 1, 301)

    def cost(clock):
        return (sigma_data**2 + clock.sigma(s) ** 2) ** -1.5 * clock.rate(s) ** 2  # |Q| rate^2 over v |z|

    flat = cost(GaussianClock(80.0, sigma_data))
    whole = sum(quad(lambda x: (sigma_data**2 + x * x) ** -0.75, a, b, epsabs=0, epsrel=1e-12)[0]
                for a, b in ((0, sigma_data), (sigma_data, 10 * sigma_data), (10 * sigma_data, 80)))
    np.testing.assert_allclose(flat, (whole / 80) ** 2, rtol=1e-9)
    for twin in (LinearClock(80.0), EdmClock(80.0), GaussianClock(80.0, 1.1 * sigma_data)):
        assert np.ptp(cost(twin)) > 0.01 * cost(twin).mean()


@pytest.mark.parametrize("sigma_data, sigma_max", [(0.5, 80.0), (0.02, 80.0), (1.0, 3.0), (300.0, 80.0)])
def test_gaussian_fraction_is_the_integral_of_its_density(sigma_data, sigma_max):
    clock = GaussianClock(sigma_max, sigma_data)

    def mass(sigma, power):
        edges = [0.0, *(x for x in np.geomspace(sigma_data / 3, sigma_max, 8) if x < sigma), sigma]
        integrate = lambda a, b: quad(lambda x: (sigma_data**2 + x * x) ** power, a, b, epsabs=0, epsrel=1e-12)[0]
        return sum(integrate(a, b) for a, b in zip(edges, edges[1:]))

    levels = np.array([1e-3, 0.05, 0.5, 0.9]) * sigma_max
    expected = [1 - mass(x, -0.75) / mass(sigma_max, -0.75) for x in levels]
    np.testing.assert_allclose(clock.fraction(levels), expected, rtol=0, atol=1e-11)
    wrong = [1 - mass(x, -0.5) / mass(sigma_max, -0.5) for x in levels]
    assert np.abs(clock.fraction(levels) - wrong).max() > 1e-3


def test_composed_clock_goes_through_its_knots():
    base, knots = GaussianClock(80.0, 0.5), np.array([0, 0.1, 0.45, 0.7, 1.0])
    clock = ComposedClock(base, knots)
    np.testing.assert_allclose(clock.sigma(np.linspace(0, 1, 5)), base.sigma(knots), rtol=1e-12)
    assert clock.sigma_max == base.sigma_max
    same = ComposedClock(base, np.linspace(0, 1, 9))
    s = np.linspace(0, 1, 100)
    np.testing.assert_allclose(same.sigma(s), base.sigma(s), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(same.rate(s), base.rate(s), rtol=1e-9)
    assert np.abs(clock.sigma(s) - base.sigma(s)).max() > 1


def test_clocks_by_name():
    assert [make_clock(name, 80.0, 0.5).name for name in CLOCKS] == list(CLOCKS)
    assert make_clock("gaussian", 80.0, 0.3).sigma_data == 0.3
    with pytest.raises(ValueError, match="unknown base clock 'log'; expected one of gaussian, linear, edm"):
        make_clock("log", 80.0, 0.5)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_numbers_out_of_range_are_refused(bad):
    for build in (LinearClock, EdmClock, lambda top: GaussianClock(top, 0.5)):
        with pytest.raises(ValueError, match="sigma_max is .* expected a positive number"):
            build(bad)
    with pytest.raises(ValueError, match="sigma_data is .* expected a positive number"):
        GaussianClock(80.0, bad)
