"""Moments and Inception scores of batches: those of all features at once, however they are divided."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from art_edm.compare import tables
from art_edm.metrics.detectors import Detector
from art_edm.metrics.feature_stats import METRICS, Fid, InceptionScore, Kid, RunningMoments
from art_edm.metrics.frechet import frechet_distance, inception_score, moments, plogp
from art_edm.metrics.image_folders import open_images
from art_edm.metrics.metric import FeatureError, Metric, Scale, measure, merged, paired_distance, pooled
from art_edm.metrics.panel import Accumulators, Panel, check_finite, measure_images
from art_edm.metrics.standard_errors import jackknife
from art_edm.runtime.distributed import World


class Shared(World):
    """One of several processes, played by threads: a gathering waits for all."""

    def __init__(self, rank, board, barrier):
        super().__init__(rank, barrier.parties)
        self.board, self.barrier, self.turn = board, barrier, 0

    def gather(self, value):
        self.turn += 1
        self.board[self.turn, self.rank] = value
        self.barrier.wait(10)
        return [self.board[self.turn, rank] for rank in range(self.size)]

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


def fids(parts, d=12, num=400):
    """An accumulator for each part."""
    found = [Fid(Scale(num, d)) for _ in parts]
    for one, part in zip(found, parts):
        one.update(part, np.arange(len(part)))
    return found


@pytest.mark.parametrize("size", [2, 3, 5])
def test_moments_of_parts_are_merged(size):
    f = features(n=100, far=1e4)
    exact = moments(f.numpy())
    found = merged(fids([f[i::size] for i in range(size)])).statistics()
    np.testing.assert_allclose(found["mu"], exact[0], rtol=1e-12)
    np.testing.assert_allclose(found["sigma"], exact[1], rtol=1e-9, atol=1e-9 * np.abs(exact[1]).max())
    means_forgotten = sum(running([f[i::size]]).scatter for i in range(size)).numpy() / 99
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

    for size in (1, 2, 3):
        parts = [InceptionScore(Scale(103, 5, splits)) for _ in range(size)]
        for i, indices in enumerate(reversed(ranges)):
            parts[i % size].update(torch.from_numpy(p[indices.start : indices.stop]), np.asarray(indices))
        total = merged(parts)
        assert (total.result(), total.details()["splits_std"]) == pytest.approx(exact, rel=1e-10, abs=1e-12)
    assert splits == 1 or by_definition(p[::-1], splits) != pytest.approx(exact, rel=1e-6)


def test_a_score_needs_an_image_per_split():
    with pytest.raises(FeatureError, match="found 9 images, expected at least one per split .10.; lower --splits"):
        InceptionScore(Scale(9, 5, 10))
    assert len(InceptionScore(Scale(10, 5, 10)).edges) == 11


# --- the protocol ------------------------------------------------------------------------------------


def reference_of(f):
    mu, cov = moments(f)
    return {"mu": mu, "sigma": cov}


def test_one_block_has_the_jackknife_of_its_groups():
    f, reference = features(n=60).numpy(), reference_of(features(n=90, far=0.3).numpy())
    group = np.arange(60) % 20
    groups = fids([torch.from_numpy(f[group == j]) for j in range(20)], num=60)
    fid = lambda rows: frechet_distance(*moments(rows), reference["mu"], reference["sigma"])
    found = measure([groups], reference)
    assert found.mean == pytest.approx(fid(f), rel=1e-9)
    assert found.stderr == pytest.approx(jackknife([fid(f[group != j]) for j in range(20)]), rel=1e-8)
    two = measure([groups, groups[:10]], reference)  # of blocks, their spread
    assert two.basis == "2 blocks" and two.left_out == ()


def test_blocks_are_pooled_group_by_group_or_as_they_are():
    f, reference = features(n=200).numpy(), reference_of(features(n=90, far=0.3).numpy())
    blocks, fid = f.reshape(5, 40, 12), lambda rows: frechet_distance(*moments(rows), *reference.values())
    grouped = [fids([torch.from_numpy(block[j::20]) for j in range(20)]) for block in blocks]
    single = [fids([torch.from_numpy(block)]) for block in blocks]
    for each, left in ((grouped, [np.delete(f, np.s_[j::20], axis=0) for j in range(20)]),
                       (single, [np.concatenate(np.delete(blocks, j, axis=0)) for j in range(5)])):
        found = measure([pooled(each)], reference)
        assert found.mean == pytest.approx(fid(f), rel=1e-9)
        assert found.left_out == pytest.approx([fid(part) for part in left], rel=1e-8)
    assert np.mean([fid(block) for block in blocks]) > 1.05 * fid(f)  # the twin: fewer images have another bias


@pytest.mark.slow
def test_a_distance_between_images_of_the_same_noises_is_known_better_than_one_to_others():
    """A small shift of every image: its standard error by leaving out pairs is that of repetitions."""
    rng, paired, alone, values = np.random.default_rng(5), [], [], []
    for _ in range(40):
        x = rng.standard_normal((100, 3))
        y = x + 0.3 + 0.1 * rng.standard_normal((100, 3))
        ends, exact = (fids([torch.from_numpy(z[j::20]) for j in range(20)], d=3) for z in (y, x))
        found = paired_distance(ends, exact)
        assert found.mean == pytest.approx(frechet_distance(*moments(y), *moments(x)), rel=1e-9)
        values.append(found.mean), paired.append(found.stderr)
        alone.append(measure([ends], merged(exact).statistics()).stderr)
    assert np.median(paired) == pytest.approx(np.std(values), rel=0.3) and np.median(alone) > 1.5 * np.std(values)


class Toy(Metric):
    """The largest feature, which needs no reference."""

    name, title, needs_reference = "toy", "Toy", False

    def __init__(self, scale):
        super().__init__(scale)
        self.largest = -np.inf

    def update(self, values, positions):
        self.largest = max(self.largest, float(values.max()))

    def content(self):
        return {"largest": np.float64(self.largest)}

    def merge(self, content):
        self.largest = max(self.largest, float(content["largest"]))

    def result(self, reference=None):
        return self.largest


def test_a_new_metric_is_one_class(images, monkeypatch):
    """Measured with others in one run of the detector, distinguished in keys, and shown in a table."""
    monkeypatch.setitem(METRICS, "toy", Toy)
    detector = Mean()
    panel = Panel(["fid", "toy"], {"detector": detector})
    accumulators = Accumulators(panel, len(images))
    measure_images(images, accumulators, World(), batch=8, workers=0)
    row = {"name": "x", "blocks": 1, "images": len(images)}
    reference = {"fid": {"mu": np.zeros(2), "sigma": np.eye(2)}}
    tables.add_measurements(row, [accumulators.of], reference)
    pixels = torch.from_numpy(np.stack([images.load(i) for i in range(23)]))
    assert row["toy"] == float(detector.features(pixels).max())
    assert tables.lines([row])[0].split()[-1] == "Toy" and ["toy", "0", 0] in panel.identity
    assert len(detector.calls) == 3 + 1  # batches, and this test's own


def test_outputs_of_one_detector_are_asked_for_once(images):
    detector = Mean()
    panel = Panel(["fid", "is", "kid"], {"detector": detector}, 4)
    measure_images(images, Accumulators(panel, 23), World(), batch=23, workers=0)
    assert detector.calls == ["features", "probabilities"]


def test_features_do_not_follow_the_callers_autocast():
    class Linear(Mean):
        def features(self, pixels):
            return pixels.flatten(1).float() @ torch.full((12, 2), 0.1)

    panel, pixels = Panel(["fid"], {"detector": Linear()}), torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert panel.detectors["detector"].features(pixels).dtype == torch.bfloat16  # the trap is real
        assert panel.outputs(pixels, "ab")["fid"].dtype == torch.float32


# --- KID ---------------------------------------------------------------------------------------------


def kids(f):
    kid = Kid(Scale(len(f), f.shape[1]))
    for rows in np.array_split(np.arange(len(f)), 3)[::-1]:
        kid.update(torch.from_numpy(f[rows]), rows)
    return kid


def kid_by_loops(x, y):
    """The unbiased estimate by its definition."""
    k = lambda a, b: (a @ b / len(a) + 1) ** 3
    mean = lambda pairs: np.mean([k(a, b) for a, b in pairs])
    within = lambda z: mean((z[i], z[j]) for i in range(len(z)) for j in range(len(z)) if i != j)
    return within(x) + within(y) - 2 * mean((a, b) for a in x for b in y)


def test_kid_and_its_jackknife_by_definition():
    rng = np.random.default_rng(3)
    x, y = rng.standard_normal((60, 4)).astype(np.float32), (rng.standard_normal((30, 4)) + 0.2).astype(np.float32)
    found = measure([[kids(x)]], {"features": y})
    exact = x.astype(np.float64), y.astype(np.float64)
    assert found.mean == pytest.approx(kid_by_loops(*exact), rel=1e-10)
    left = [kid_by_loops(np.delete(exact[0], np.s_[j::20], axis=0), exact[1]) for j in (0, 7)]
    assert [found.left_out[0], found.left_out[7]] == pytest.approx(left, rel=1e-9)
    biased = (((exact[0] @ exact[0].T) / 4 + 1) ** 3).mean()  # the twin: each with itself too
    assert abs(biased - kid_by_loops(*exact)) > 0.1
    grouped = [kids(x[j::20]) for j in range(20)]
    assert merged(grouped).result({"features": y}) == pytest.approx(found.mean, rel=1e-10)


def test_kid_is_unbiased_where_the_fid_is_not():
    """Two sets of one distribution: zero within the standard error, for few images too."""
    rng, values, errors, distances = np.random.default_rng(4), [], [], []
    for _ in range(60):
        x, y = rng.standard_normal((2, 80, 6)).astype(np.float32)
        found = measure([[kids(x)]], {"features": y})
        values.append(found.mean), errors.append(found.stderr)
        distances.append(frechet_distance(*moments(x), *moments(y)))
    mean_error = np.std(values) / np.sqrt(60)
    assert abs(np.mean(values)) < 3 * mean_error and np.mean(distances) > 20 * np.std(distances) / np.sqrt(60)
    assert measure([[kids(x)]], {"features": x}).mean == 0 > kid_by_loops(x[:40], x[:40])  # which takes x with itself
    shifted = measure([[kids(x + np.float32(0.5))]], {"features": y})
    assert shifted.mean > 3 * shifted.stderr


class Mean(Detector):
    """Features: mean and mean square of the pixels; NaN where the first pixel is `bad`."""

    name, sha256, dim, classes = "mean", "0", 2, 2

    def __init__(self, bad=None):
        self.bad, self.largest, self.calls = bad, 0, []

    def features(self, images):
        self.calls.append("features")
        self.largest = max(self.largest, len(images))
        x = images.double().flatten(1) / 255
        values = torch.stack([x.mean(1), x.square().mean(1)], dim=1)
        return torch.where(images[:, :1, 0, 0] == self.bad, torch.nan, values) if self.bad is not None else values

    def probabilities(self, images):
        self.calls.append("probabilities")
        share = images.double().flatten(1).mean(dim=1, keepdim=True) / 255
        return torch.cat([share, 1 - share], dim=1)


@pytest.fixture
def images(tmp_path):
    for i in range(23):
        pixels = np.random.default_rng(i).integers(0, 200, (4, 4), dtype=np.uint8)
        pixels[0, 0] = 200 + i
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.png")
    return open_images(tmp_path)


def measured(images, detector, world, splits=4, batch=64, workers=0):
    accumulators = Accumulators(Panel(["fid", "is"], {"detector": detector}, splits), len(images), device=world.device)
    measure_images(images, accumulators, world, batch, workers)
    return {name: groups[0] for name, groups in accumulators.of.items()}


@pytest.mark.parametrize("size, batch, workers", [(1, 1, 0), (1, 64, 2), (2, 5, 1), (3, 4, 3), (3, 64, 0)])
def test_measured_images(images, size, batch, workers):
    detector = Mean()
    pixels = torch.from_numpy(np.stack([images.load(i) for i in range(23)]))
    exact = moments(detector.features(pixels).numpy())
    score = by_definition(detector.probabilities(pixels).numpy(), 4)
    detector.largest = 0
    for found in together(size, lambda world: measured(images, detector, world, 4, batch, workers)):
        np.testing.assert_allclose(found["fid"].statistics()["mu"], exact[0], rtol=1e-12)
        np.testing.assert_allclose(found["fid"].statistics()["sigma"], exact[1], rtol=1e-9)
        assert (found["is"].result(), found["is"].details()["splits_std"]) == pytest.approx(score, rel=1e-10)
    assert detector.largest == min(batch, 23)  # the memory needed does not grow with the number of images


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_nan_is_named_by_its_image(images, batch):
    with pytest.raises(FeatureError, match="17.png: the detector gave NaN or infinite features") as error:
        measured(images, Mean(bad=217), World(), batch=batch)
    assert "16.png" not in str(error.value)
    values = torch.tensor([[0.0, 1], [2, -torch.inf]])
    with pytest.raises(FeatureError, match="^b: "):
        check_finite(values, ["a", "b"])
    assert check_finite(values[:1], ["a"]) is not None
