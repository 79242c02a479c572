"""KID on the same features by torch-fidelity, where it is installed (pip install torch-fidelity)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.metrics.feature_stats import Kid
from art_edm.metrics.metric import Scale, measure

fidelity = pytest.importorskip("torch_fidelity.metric_kid", exc_type=ImportError)


def sets(n, d=64):
    """Features as a ReLU leaves them, of two distributions, numbers of float32."""
    rng = np.random.default_rng(0)
    return [np.maximum(0, rng.standard_normal((n, d)) + shift).astype(np.float32) for shift in (0.3, 0.35)]


def theirs_of(x, y, **options):
    """torch-fidelity's mean and standard deviation; in float64, as its sums in float32 are good to 1e-4 only."""
    found = fidelity.kid_features_to_metric(torch.from_numpy(x).double(), torch.from_numpy(y).double(), verbose=False,
                                            **options)
    return found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"]


def ours(x, y):
    kid = Kid(Scale(len(x), x.shape[1]))
    kid.update(torch.from_numpy(x), np.arange(len(x)))
    return measure([[kid]], {"features": y})


@pytest.mark.parametrize("n", [100, 1000])
def test_all_features_at_once(n):
    x, y = sets(n)
    assert ours(x, y).mean == pytest.approx(theirs_of(x, y, kid_subsets=1, kid_subset_size=n)[0], rel=1e-6)
    half = theirs_of(x[: n // 2], y[: n // 2], kid_subsets=1, kid_subset_size=n // 2)[0]
    assert half != pytest.approx(ours(x, y).mean, rel=1e-3)


def test_means_of_subsets_are_about_ours_within_its_standard_error():
    x, y = sets(1000)
    mean, spread = theirs_of(x, y, kid_subsets=100, kid_subset_size=100)
    found = ours(x, y)
    assert abs(found.mean - mean) < 3 * spread / 100**0.5 + found.stderr
    assert found.stderr < spread  # that of a subset of 100
