"""End-point errors: statistics by their definitions, standard errors by repetition."""

import numpy as np
import pytest

from art_edm.metrics.end_point import EndPointError, end_point_error


def test_by_hand():
    """r = 3, 4, 5: RMS sqrt(50 / 3), mean 4; r^2 = 9, 16, 25 has the variance 193 / 3."""
    exact = np.random.default_rng(0).standard_normal((3, 2))
    found = end_point_error(exact + np.array([[3, -3], [-4, 4], [5, 5]]), exact)
    rms = np.sqrt(50 / 3)
    assert found == pytest.approx((rms, np.sqrt(193 / 9) / (2 * rms), 4, np.sqrt(1 / 3), 4), rel=1e-12)
    assert found.rms != pytest.approx(found.mean, rel=0.01)


def test_standard_errors_are_the_spread_of_repetitions():
    rng = np.random.default_rng(0)
    results = [end_point_error(rng.standard_normal((256, 4)), np.zeros((256, 4))) for _ in range(200)]
    for name in ("rms", "mean"):
        spread = np.std([getattr(result, name) for result in results])
        assert spread == pytest.approx(getattr(results[0], f"{name}_stderr"), rel=0.2)


def test_of_one_noise_and_of_none_wrong():
    assert end_point_error(np.ones((1, 4)), np.zeros((1, 4))) == (1, None, 1, None, 1)
    assert EndPointError.of(np.zeros(4)) == (0, 0, 0, 0, 0)
