"""Moments and Inception scores of batches: those of all features at once, however they are divided."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from art_edm.metrics.detectors import Detector
from art_edm.metrics.feature_stats import FeatureError, RunningMoments, RunningScore, check_finite, measure_images
from art_edm.metrics.frechet import inception_score, moments, plogp
from art_edm.metrics.image_folders import open_images
from art_edm.runtime.distributed import World


class Shared(World):
    """One of several processes, played by threads: a sum waits for all."""

    def __init__(self, rank, board, barrier):
        super().__init__(rank, barrier.parties)
        self.board, self.barrier, self.turn = board, barrier, 0

    def sum(self, tensor):
        self.turn += 1
        self.board[self.turn, self.rank] = tensor.clone()
        self.barrier.wait(10)
        return sum(self.board[self.turn, rank] for rank in range(self.size))

    def phase(self):
        return nullcontext()

    def check(self):
        pass


def together(size, work):
    """work(world) of each process."""
    board, barrier = {}, threading.Barrier(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(Shared(rank, board, barrier)), range(size)))


def features(n=400, d=12, far=0.0):
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.standard_normal((n, d)) @ rng.standard_normal((d, d)) + far)


def running(parts, d=12):
    stats = RunningMoments(d)
    for part in parts:
        stats.update(part)
    return stats


def by_sums(parts, d=12):
    """Twin: the difference of the sum of squares and n mean mean^T, as upstream takes it."""
    n, total, squares = 0, torch.zeros(d).double(), torch.zeros(d, d).double()
    for f in parts:
        n, total, squares = n + len(f), total + f.sum(0), squares + f.T @ f
    return ((squares - torch.outer(total, total) / n) / (n - 1)).numpy()


@pytest.mark.parametrize("batch", [1, 7, 64, 400])
@pytest.mark.parametrize("far", [0.0, 1e6])
def test_moments_do_not_depend_on_batches_or_order(batch, far):
    f = features(far=far)
    exact = moments(f.numpy())
    shuffled = f[torch.randperm(len(f), generator=torch.Generator().manual_seed(2))]
    for order in (f, shuffled):
        mu, cov = running(order.split(batch)).result()
        np.testing.assert_allclose(mu, exact[0], rtol=1e-12)
        np.testing.assert_allclose(cov, exact[1], rtol=1e-9, atol=1e-9 * np.abs(exact[1]).max())
        assert (cov == cov.T).all()
    if far:
        assert np.abs(by_sums(f.split(batch)) - exact[1]).max() > 1e-6 * np.abs(exact[1]).max()


def test_single_precision_is_summed_in_double():
    f = features(n=3000).float()
    mu, cov = running(f.split(50)).result()
    exact = moments(f.numpy())
    np.testing.assert_allclose(cov, exact[1], rtol=1e-10, atol=1e-12)
    assert mu.dtype == cov.dtype == np.float64
    assert np.abs(np.cov(f.numpy(), rowvar=False, dtype=np.float32) - exact[1]).max() > 1e-8


@pytest.mark.parametrize("size", [2, 3, 5])
def test_moments_do_not_depend_on_processes(size):
    f = features(n=100, far=1e4)
    batches, exact = f.split(30), moments(f.numpy())  # with five processes one has nothing
    for mu, cov in together(size, lambda world: running(batches[world.rank :: size]).merge(world).result()):
        np.testing.assert_allclose(mu, exact[0], rtol=1e-12)
        np.testing.assert_allclose(cov, exact[1], rtol=1e-9, atol=1e-9 * np.abs(exact[1]).max())
    means_forgotten = sum(running(batches[rank::size]).scatter for rank in range(size)).numpy() / 99
    assert np.abs(means_forgotten - exact[1]).max() > 1e-3 * np.abs(exact[1]).max()


def by_definition(p, splits):
    """The score of all probabilities at once."""
    parts = [p[len(p) * j // splits : len(p) * (j + 1) // splits] for j in range(splits)]
    return inception_score(np.array([part.sum(0) for part in parts]), np.array([plogp(part).sum() for part in parts]),
                           np.array([len(part) for part in parts]))


@pytest.mark.parametrize("batch, splits", [(1, 10), (17, 10), (103, 3), (50, 1)])
def test_scores_do_not_depend_on_batches_order_or_processes(batch, splits):
    p = np.random.default_rng(3).dirichlet([0.2] * 5, size=103)
    exact = by_definition(p, splits)
    ranges = [range(i, min(i + batch, 103)) for i in range(0, 103, batch)]

    def work(world):
        score = RunningScore(103, splits)
        for indices in reversed(ranges[world.rank :: world.size]):
            score.update(torch.from_numpy(p[indices.start : indices.stop]), indices)
        return score.merge(world, 5).result()

    for size in (1, 2, 3):
        assert all(found == pytest.approx(exact, rel=1e-10, abs=1e-12) for found in together(size, work))
    assert splits == 1 or by_definition(p[::-1], splits) != pytest.approx(exact, rel=1e-6)


def test_a_score_needs_an_image_per_split():
    with pytest.raises(FeatureError, match="found 9 images, expected at least one per split .10.; lower --splits"):
        RunningScore(9, 10)
    assert len(RunningScore(10, 10).edges) == 11


class Mean(Detector):
    """Features: mean and mean square of the pixels; NaN where the first pixel is `bad`."""

    name, sha256, dim, classes = "mean", "0", 2, 2

    def __init__(self, bad=None):
        self.bad, self.largest = bad, 0

    def features(self, images):
        self.largest = max(self.largest, len(images))
        x = images.double().flatten(1) / 255
        values = torch.stack([x.mean(1), x.square().mean(1)], dim=1)
        return torch.where(images[:, :1, 0, 0] == self.bad, torch.nan, values) if self.bad is not None else values

    def probabilities(self, images):
        share = self.features(images)[:, :1]
        return torch.cat([share, 1 - share], dim=1)


@pytest.fixture
def images(tmp_path):
    for i in range(23):
        pixels = np.random.default_rng(i).integers(0, 200, (4, 4), dtype=np.uint8)
        pixels[0, 0] = 200 + i
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return open_images(tmp_path)


@pytest.mark.parametrize("size, batch, workers", [(1, 1, 0), (1, 64, 2), (2, 5, 1), (3, 4, 3), (3, 64, 0)])
def test_measured_images(images, size, batch, workers):
    detector = Mean()
    pixels = torch.from_numpy(np.stack([images.load(i) for i in range(23)]))
    exact = moments(detector.features(pixels).numpy())
    score = by_definition(detector.probabilities(pixels).numpy(), 4)
    detector.largest = 0
    for found in together(size, lambda world: measure_images(images, detector, world, True, 4, batch, workers)):
        np.testing.assert_allclose(found.moments[0], exact[0], rtol=1e-12)
        np.testing.assert_allclose(found.moments[1], exact[1], rtol=1e-9)
        assert found.score == pytest.approx(score, rel=1e-10)
    assert detector.largest == min(batch, 23)  # the memory needed does not grow with the number of images
    only = measure_images(images, detector, World(), fid=False, splits=4)
    assert only.moments is None and only.score == pytest.approx(score, rel=1e-10)
    assert measure_images(images, detector, World()).score is None


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_nan_is_named_by_its_image(images, batch):
    with pytest.raises(FeatureError, match="17.png: the detector gave NaN or infinite features") as error:
        measure_images(images, Mean(bad=217), World(), batch=batch)
    assert "16.png" not in str(error.value)
    values = torch.tensor([[0.0, 1], [2, -torch.inf]])
    with pytest.raises(FeatureError, match="^b: "):
        check_finite(values, ["a", "b"])
    assert check_finite(values[:1], ["a"]) is not None
