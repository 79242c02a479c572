"""The Frechet distance against closed forms and singular values of the data; the Inception score by its definition."""

from __future__ import annotations

import inspect
import math

import numpy as np
import pytest
import scipy.linalg

from art_edm.metrics.frechet import (
    factor,
    frechet_distance,
    inception_score,
    moments,
    negative_part,
    nuclear_norm,
    plogp,
)


def data(seed, rows, d, decades=2.0):
    """Features [rows, d] whose variances fall over the given decades of standard deviation."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return rng.standard_normal((rows, d)) * np.logspace(0, -decades, d) @ turn + rng.standard_normal(d) / 10


def from_data(x1, x2):
    """The distance without covariances: tr (cov1 cov2)^(1/2) = sum of singular values of Y1 Y2^T."""
    (m1, y1), (m2, y2) = ((x.mean(axis=0), (x - x.mean(axis=0)) / math.sqrt(len(x) - 1)) for x in (x1, x2))
    cross = np.linalg.svd(y1 @ y2.T, compute_uv=False).sum()
    return np.square(m1 - m2).sum() + np.square(y1).sum() + np.square(y2).sum() - 2 * cross


def clipped(mu1, cov1, mu2, cov2):
    """Twin: roots of all eigenvalues that are positive, rounding's too."""
    values, vectors = np.linalg.eigh(cov1)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov2 @ root).clip(min=0)).sum()
    return np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross


def turned(values, seed):
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((len(values), len(values))))[0]
    return turn * np.asarray(values) @ turn.T


@pytest.mark.parametrize("d, rows1, rows2", [(5, 50, 40), (64, 300, 200), (64, 20, 200), (64, 30, 25), (200, 90, 500)])
@pytest.mark.parametrize("decades", [0.5, 3.0])
def test_any_rank_against_the_data(d, rows1, rows2, decades):
    x1, x2 = data(1, rows1, d, decades), data(2, rows2, d, decades)
    stats = (*moments(x1), *moments(x2))
    exact = from_data(x1, x2)
    assert frechet_distance(*stats) == pytest.approx(exact, rel=1e-10)
    assert frechet_distance(*stats[2:], *stats[:2]) == pytest.approx(exact, rel=1e-10)
    if rows1 < d and rows2 > d:
        assert abs(clipped(*stats) - exact) > 1e-9 * exact  # this is what the rank is for


def test_one_image_set_against_itself():
    for rows in (20, 64, 65, 300):
        mu, cov = moments(data(3, rows, 64, 4))
        assert frechet_distance(mu, cov, mu, cov) == pytest.approx(0, abs=1e-12 * np.trace(cov))
    mu, cov = moments(data(3, 20, 64, 0))
    assert abs(clipped(mu, cov, mu, cov)) > 1e-12 * np.trace(cov)


def test_equal_covariances_leave_the_means():
    mu, cov = moments(data(4, 30, 64))
    assert frechet_distance(mu, cov, mu + 0.5, cov) == pytest.approx(0.25 * 64, rel=1e-12)
    assert frechet_distance(mu, cov, mu + 0.5, 1.21 * cov) == pytest.approx(16 + 0.01 * np.trace(cov), rel=1e-10)


@pytest.mark.parametrize("zeros", [0, 3, 30])
def test_commuting_covariances_of_any_rank(zeros):
    rng = np.random.default_rng(5)
    a, b = rng.uniform(0.1, 4, (2, 40))
    a[:zeros], b[zeros // 2 : zeros // 2 + zeros] = 0, 0  # partly the same directions
    exact, zero = np.square(np.sqrt(a) - np.sqrt(b)).sum(), np.zeros(40)
    found = frechet_distance(zero, turned(a, 6), zero, turned(b, 6))
    assert found == pytest.approx(exact, rel=1e-12)
    assert abs(frechet_distance(zero, turned(a, 6), zero, turned(b, 7)) - exact) > 0.01 * exact


def test_the_factor_has_the_rank():
    for rank in (0, 1, 10, 24):
        cov = turned([*range(1, rank + 1), *[0] * (24 - rank)], 8)
        f = factor(cov)
        assert f.shape == (24, rank)
        np.testing.assert_allclose(f @ f.T, cov, atol=1e-13 * 24)
    noisy = turned([*range(1, 11), *[1e-9] * 14], 8)  # above rounding: it counts
    assert factor(noisy).shape == (24, 24)


def test_nuclear_norm():
    rng = np.random.default_rng(9)
    u, v = (np.linalg.qr(rng.standard_normal((30, 12)))[0] for _ in range(2))
    for values in (np.linspace(1, 2, 12), np.logspace(0, -14, 12), [1.0, 2.0] + [0.0] * 10):
        p = u * np.asarray(values) @ v.T
        assert nuclear_norm(p) == pytest.approx(np.sum(values), rel=1e-13)
        assert nuclear_norm(p[:, :5]) == pytest.approx(np.linalg.norm(p[:, :5], "nuc"), rel=1e-10)
    assert nuclear_norm(np.empty((30, 0))) == 0
    tiny = u * np.logspace(0, -14, 12) @ v.T
    squares = np.linalg.eigvalsh(tiny @ tiny.T)
    assert abs(np.sqrt(squares.clip(min=0)).sum() / nuclear_norm(tiny) - 1) > 1e-9  # the quick way does not do here


@pytest.mark.skipif("disp" not in inspect.signature(scipy.linalg.sqrtm).parameters,
                    reason="the square root as upstream takes it needs a scipy before 1.18")
@pytest.mark.filterwarnings("ignore:The `disp`:DeprecationWarning")
@pytest.mark.parametrize("d", [64, 512])
def test_against_sqrtm(d):
    (mu1, cov1), (mu2, cov2) = moments(data(10, 3 * d, d, 1)), moments(data(11, 3 * d, d, 1))
    root = scipy.linalg.sqrtm(cov1 @ cov2, disp=False)[0].real
    exact = np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2 - 2 * root)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(exact, rel=1e-9)
    assert frechet_distance(mu1, cov1, mu2, cov2 * (1 + 1e-6)) != pytest.approx(exact, rel=1e-9)


def bent(seed, shift, d=128, n=500):
    """Features whose variances fall off as Inception's do, in single precision."""
    basis = np.random.RandomState(7).randn(d, d) / d**0.5 / np.arange(1, d + 1)[:, None]
    return np.maximum(0, np.random.RandomState(seed).randn(n, d) @ basis + shift).astype(np.float32)


def half(x):
    return moments(x)[1].astype(np.float16).astype(np.float64)


def summed_in_single(x):
    """E[f f^T] - mean mean^T in float32, the features far from zero."""
    x = x + np.float32(2)
    mean = x.mean(0)
    cov = (x.T @ x - len(x) * np.outer(mean, mean)) / np.float32(len(x) - 1)
    return (cov.astype(np.float64) + cov.T) / 2


def cholesky_alone(mu1, cov1, mu2, cov2):
    """Twin: the pivoted Cholesky factors whatever they are worth."""
    factors = []
    for cov in (cov1, cov2):
        lower, order, rank, _ = scipy.linalg.lapack.dpstrf(cov, lower=1)
        factors.append(np.empty((len(cov), rank)))
        factors[-1][order - 1] = np.tril(lower)[:, :rank]
    return np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2) - 2 * nuclear_norm(factors[0].T @ factors[1])


@pytest.mark.parametrize("spoil", [half, summed_in_single])
def test_a_covariance_with_negative_eigenvalues(spoil):
    reference, (mu, cov) = moments(bent(1, 0.3)), moments(bent(2, 0.32))
    exact, spoilt = frechet_distance(*reference, mu, cov), spoil(bent(2, 0.32))
    assert np.linalg.eigvalsh(spoilt)[0] < -1e-9 < 0 < negative_part(spoilt) and negative_part(cov) == 0
    assert frechet_distance(*reference, mu, spoilt) == pytest.approx(exact, rel=1e-3)
    assert frechet_distance(mu, spoilt, *reference) == pytest.approx(exact, rel=1e-3)
    values = np.linalg.eigvalsh(spoilt)
    assert negative_part(spoilt) == pytest.approx(-values[values < 0].sum() / np.trace(spoilt), rel=1e-2)
    if spoil is half:
        assert cholesky_alone(*reference, mu, spoilt) != pytest.approx(exact, rel=3e-3)
    for rank in (0, 1, 10, 24):
        assert negative_part(turned([*range(1, rank + 1), *[0] * (24 - rank)], 8)) == 0  # rounding is no such part


def test_an_eigenvalue_below_zero_is_no_root():
    """A product without full rank, whose least squares are rounding of either sign."""
    p = np.random.default_rng(1).standard_normal((30, 4)) @ np.random.default_rng(2).standard_normal((4, 30))
    assert np.linalg.eigvalsh(p @ p.T)[0] < 0
    with np.errstate(all="raise"):
        assert nuclear_norm(p) == pytest.approx(np.linalg.svd(p, compute_uv=False).sum(), rel=1e-12)


@pytest.mark.parametrize("part", range(4))
def test_moments_that_are_not_numbers_are_no_distance(part):
    stats = [np.zeros(3), np.eye(3), np.ones(3), np.eye(3)]
    assert frechet_distance(*stats) == pytest.approx(3)
    stats[part] = stats[part] * np.nan
    with pytest.raises(ValueError, match="NaN or infinite moments"):
        frechet_distance(*stats)


# --- Inception score ---------------------------------------------------------------------------------


def sums(p, splits):
    """Totals, negentropies and counts of consecutive parts of p [n, k]."""
    parts = np.array_split(p, splits)
    return (np.array([part.sum(axis=0) for part in parts]), np.array([plogp(part).sum() for part in parts]),
            np.array([len(part) for part in parts]))


def test_inception_score_in_closed_form():
    sure = np.eye(4)[np.arange(80) % 4]  # each class as often, and known: IS = number of classes
    assert inception_score(*sums(sure, 5)) == pytest.approx((4, 0), abs=1e-12)
    assert inception_score(*sums(np.full((80, 4), 0.25), 5)) == pytest.approx((1, 0), abs=1e-12)  # nothing known
    ordered = np.sort(np.arange(80) % 4)
    assert inception_score(*sums(np.eye(4)[ordered], 4)) == pytest.approx((1, 0), abs=1e-12)  # a class per part
    assert inception_score(*sums(np.eye(4)[ordered], 1))[0] == pytest.approx(4)


def test_inception_score_by_its_definition():
    p = np.random.default_rng(12).dirichlet([0.3] * 6, size=90)
    scores = [math.exp(np.mean([(row * np.log(row / part.mean(axis=0))).sum() for row in part]))
              for part in np.array_split(p, 3)]
    assert inception_score(*sums(p, 3)) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)
    assert inception_score(*sums(p, 3))[1] != pytest.approx(np.std(scores, ddof=1), rel=1e-3)


def test_moments():
    features = np.array([[0.0, 1], [2, 5], [4, 3]], np.float32)
    mean, cov = moments(features)
    assert mean.tolist() == [2, 3] and cov.tolist() == [[4, 2], [2, 4]]  # divided by n - 1; by n it were 8/3, 4/3
