"""Samples that do not depend on batching, and Frechet distances against closed forms."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import scipy.linalg
import torch
from networks import judge as evaluation
from networks.judge import accuracy, features_of, fid_of, fid_with_error, measured_features
from PIL import Image

from art_edm.grids.grid import edm
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.mnist import to_images
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.lenet import LeNet
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.errors import Stopped
from art_edm.runtime.progress import GracefulStop
from art_edm.sampling.generate import generate, sample_sheet, to_pixels
from art_edm.sampling.noise import latents, seeded_generator
from art_edm.sampling.solvers import sample

GRID = edm(4, 0.002, 80)
DIGITS = GaussianDenoiser(-0.7, 0.3, (1, 28, 28))


@pytest.fixture(scope="module")
def lenet():
    torch.manual_seed(0)
    return LeNet().eval()


@pytest.fixture(scope="module")
def reference(lenet):
    images = to_images(torch.randint(0, 256, (300, 28, 28), generator=seeded_generator(0, 0)).to(torch.uint8))
    return moments(features_of(lenet, images))


def small_net():
    torch.manual_seed(0)
    net = ScoreUNet(8, 1, width=8, deep_width=12, emb=8).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net


# --- seeds and latents -------------------------------------------------------------------------------


def test_latents_of_seed_0_are_those_of_edm():
    """EDM draws image i of --seeds=i with a generator of seed i."""
    expected = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 7, 3)]
    assert torch.equal(latents(0, [0, 7, 3], (1, 8, 8)), torch.stack(expected))


def test_seeds_and_indices_give_different_noise():
    drawn = {float(torch.randn((), generator=seeded_generator(s, i))) for s in range(20) for i in range(50)}
    assert len(drawn) == 1000


def test_a_seed_in_the_upper_bits_would_not_count():
    """The trap that `seeded_generator` avoids: the twin (seed << 32) + index forgets the seed."""
    forgetful = [torch.randn(3, generator=torch.Generator().manual_seed((s << 32) + 5)) for s in (0, 1)]
    assert torch.equal(*forgetful)
    assert not torch.equal(*(torch.randn(3, generator=seeded_generator(s, 5)) for s in (0, 1)))


# --- generate ----------------------------------------------------------------------------------------


def test_an_exact_denoiser_does_not_depend_on_batches_at_all():
    whole = generate(DIGITS, GRID, "heun", 7, seed=3, batch=7)
    assert whole.shape == (7, 1, 28, 28) and whole.dtype == torch.float32
    for batch in (1, 3, 100):
        assert torch.equal(generate(DIGITS, GRID, "heun", 7, seed=3, batch=batch), whole)
    assert torch.equal(generate(DIGITS, GRID, "heun", 3, seed=3, first=2), whole[2:5])
    assert not torch.equal(generate(DIGITS, GRID, "heun", 7, seed=4), whole)


def test_one_generator_for_all_would_depend_on_the_batch():
    """The failing twin: a generator per batch gives image 3 other noise in batches of 2 than of 4."""
    def drawn(batch):
        return torch.cat([torch.randn(batch, 1, 8, 8, generator=seeded_generator(0, b)) for b in range(4 // batch)])

    assert not torch.equal(drawn(2)[3], drawn(4)[3])


def test_a_network_does_not_depend_on_batches_beyond_rounding():
    net = small_net()
    whole = generate(net, GRID, "heun", 6, batch=6)
    assert whole.std() > 0.1
    assert (generate(net, GRID, "heun", 6, batch=4) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_it_is_the_solver_on_the_latents():
    net = small_net()
    with torch.no_grad():
        expected = sample(net, latents(5, range(3), (1, 8, 8)), GRID, "euler")
    images = generate(net, GRID, "euler", 3, seed=5)
    assert torch.allclose(images, expected.float(), rtol=1e-5, atol=1e-5)
    assert not images.is_inference()


def test_no_images():
    assert generate(DIGITS, GRID, "heun", 0).shape == (0, 1, 28, 28)


class Counter:
    start = 0

    def __init__(self):
        self.seen = []

    def update(self, done, note=""):
        self.seen.append(done)


def test_progress_counts_steps_of_images():
    counter = Counter()
    generate(DIGITS, GRID, "heun", 5, batch=3, progress=counter)
    assert counter.seen == [3, 6, 9, 12, 14, 16, 18, 20]


def test_a_stop_is_seen_within_a_step():
    with pytest.raises(Stopped, match="stopped while sampling"), GracefulStop() as stop:
        counter = Counter()
        counter.update = lambda done, note="": os.kill(os.getpid(), signal.SIGTERM) if done == 6 else None
        generate(DIGITS, GRID, "heun", 5, batch=3, progress=counter, stop=stop)


# --- pixels and LeNet --------------------------------------------------------------------------------


def test_pixels_round_and_clip():
    half = 0.5 / 127.5
    images = torch.tensor([-3, -1, -1 + 0.9 * half, -1 + 1.1 * half, 0.2, 1 - 1.1 * half, 1, 9]).reshape(-1, 1, 1, 1)
    assert to_pixels(images).flatten().tolist() == [0, 0, 0, 1, 153, 254, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1)
    assert torch.equal(to_pixels(to_images(every)), every)
    cut = lambda x: (x * 127.5 + 127.5).clip(0, 255).to(torch.uint8)  # the twin that cuts off
    assert cut(images).flatten().tolist() != to_pixels(images).flatten().tolist()


def test_features_are_the_input_of_the_last_layer(lenet):
    images = torch.randn(5, 1, 28, 28, generator=seeded_generator(0, 1))
    features = features_of(lenet, images, batch=2)
    assert features.shape == (5, 84)
    assert np.allclose(features @ lenet.fc2.weight.detach().numpy().T + lenet.fc2.bias.detach().numpy(),
                       lenet(images).detach().numpy(), atol=1e-5)


def test_accuracy_counts(lenet):
    images = torch.randn(8, 1, 28, 28, generator=seeded_generator(0, 2))
    labels = lenet(images).argmax(dim=1)
    assert accuracy(lenet, images, labels, batch=3) == 1
    labels[:2] = (labels[:2] + 1) % 10
    assert accuracy(lenet, images, labels, batch=3) == 0.75


def test_fid_sees_pixels_not_raw_samples(lenet, reference):
    samples = 3 * torch.randn(50, 1, 28, 28, generator=seeded_generator(0, 3))  # far outside of [-1, 1]
    clipped = to_images(to_pixels(samples))
    expected = frechet_distance(*moments(features_of(lenet, clipped)), *reference)
    assert fid_of(lenet, samples, reference) == expected
    raw = frechet_distance(*moments(features_of(lenet, samples)), *reference)
    assert abs(raw - expected) > 0.1 * expected


# --- measured_features -------------------------------------------------------------------------------


def test_features_are_kept_and_extended(lenet, tmp_path):
    store = tmp_path / "s.npz"
    expected = features_of(lenet, to_images(to_pixels(generate(DIGITS, GRID, "heun", 7, seed=1))))
    features, seconds = measured_features(lenet, DIGITS, GRID, "heun", 5, 1, store, batch=2)
    assert np.allclose(features, expected[:5], atol=1e-5) and seconds > 0
    before = DIGITS.evaluations
    again, same = measured_features(lenet, DIGITS, GRID, "heun", 5, 1, store, batch=2)
    assert np.array_equal(again, features) and same == seconds and DIGITS.evaluations == before
    more, _ = measured_features(lenet, DIGITS, GRID, "heun", 7, 1, store, batch=2)
    assert np.array_equal(more[:5], features) and np.allclose(more, expected, atol=1e-5)
    assert DIGITS.evaluations == before + 2 * 7  # two images, 2 * 4 - 1 evaluations each


def test_a_stop_keeps_the_finished_batches(lenet, tmp_path, monkeypatch):
    store, made = tmp_path / "s.npz", []
    whole, _ = measured_features(lenet, DIGITS, GRID, "heun", 6, 1, tmp_path / "whole.npz", batch=2)

    def two_batches(*args, **kwargs):
        if len(made) == 2:
            raise Stopped("stopped while sampling")
        made.append(kwargs["first"])
        return generate(*args, **kwargs)

    monkeypatch.setattr(evaluation, "generate", two_batches)
    with pytest.raises(Stopped):
        measured_features(lenet, DIGITS, GRID, "heun", 6, 1, store, batch=2)
    monkeypatch.undo()
    before = DIGITS.evaluations
    resumed, _ = measured_features(lenet, DIGITS, GRID, "heun", 6, 1, store, batch=2)
    assert made == [0, 2] and np.array_equal(resumed, whole)
    assert DIGITS.evaluations == before + 2 * 7


@pytest.mark.parametrize("content", [b"", b"not a zip", None])
def test_a_damaged_store_costs_only_time(lenet, tmp_path, content):
    store = tmp_path / "s.npz"
    features, _ = measured_features(lenet, DIGITS, GRID, "heun", 2, 1, store)
    store.write_bytes(store.read_bytes()[:-30] if content is None else content)
    assert np.array_equal(measured_features(lenet, DIGITS, GRID, "heun", 2, 1, store)[0], features)


# --- Frechet distance --------------------------------------------------------------------------------


def gaussian(rng, d, rank=None):
    root = rng.standard_normal((d, rank or d))
    return rng.standard_normal(d), root @ root.T


def elementwise(mu1, cov1, mu2, cov2):
    """Twin: the square root of the product taken element by element."""
    return np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2 - 2 * np.sqrt(np.abs(cov1 @ cov2)))


def without_two(mu1, cov1, mu2, cov2):
    """Twin: the factor 2 of the cross term forgotten."""
    return np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2 - scipy.linalg.sqrtm(cov1 @ cov2).real)


def test_equal_covariances_leave_the_means():
    rng = np.random.default_rng(0)
    (mu1, cov), (mu2, _) = gaussian(rng, 6), gaussian(rng, 6)
    expected = np.square(mu1 - mu2).sum()
    assert frechet_distance(mu1, cov, mu2, cov) == pytest.approx(expected, rel=1e-9)
    for twin in (elementwise, without_two):
        assert abs(twin(mu1, cov, mu2, cov) - expected) > 0.1 * expected


def test_commuting_covariances():
    rng = np.random.default_rng(1)
    a, b = rng.uniform(0.1, 4, (2, 6))
    turn = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    zero, expected = np.zeros(6), np.square(np.sqrt(a) - np.sqrt(b)).sum()
    assert frechet_distance(zero, np.diag(a), zero, np.diag(b)) == pytest.approx(expected, rel=1e-12)
    turned = [turn @ np.diag(v) @ turn.T for v in (a, b)]
    assert frechet_distance(zero, turned[0], zero, turned[1]) == pytest.approx(expected, rel=1e-9)
    for twin in (elementwise, without_two):
        assert abs(twin(zero, turned[0], zero, turned[1]) - expected) > 0.1 * expected


def test_random_covariances_against_scipy():
    rng = np.random.default_rng(2)
    for d in (2, 5, 20):
        (mu1, cov1), (mu2, cov2) = gaussian(rng, d), gaussian(rng, d)
        cross = np.trace(scipy.linalg.sqrtm(cov1 @ cov2)).real
        expected = np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross
        assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-8)
        assert frechet_distance(mu2, cov2, mu1, cov1) == pytest.approx(expected, rel=1e-8)
        assert abs(elementwise(mu1, cov1, mu2, cov2) - expected) > 0.01 * expected


def test_rank_deficient_covariances():
    """Along one axis each: tr sqrt(cov1 cov2) = |<u, v>| for cov1 = u u^T and cov2 = v v^T."""
    rng = np.random.default_rng(3)
    u, v, zero = *rng.standard_normal((2, 8)), np.zeros(8)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(u, u)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(zero, np.zeros((8, 8)), zero, np.outer(v, v)) == pytest.approx(v @ v)


def test_moments():
    features = np.array([[0.0, 1], [2, 5], [4, 3]], np.float32)
    mean, cov = moments(features)
    assert mean.tolist() == [2, 3] and cov.tolist() == [[4, 2], [2, 4]]  # divided by n - 1; by n it were 8/3, 4/3


# --- standard error ----------------------------------------------------------------------------------


def test_standard_error_of_a_mean():
    """Far from the reference FID is about |mu - mu0|^2 + const, whose standard error is 2 |mu - mu0| std / sqrt(n)."""
    rng = np.random.default_rng(4)
    features = rng.standard_normal((2000, 1)) + 50
    fid, stderr = fid_with_error(features, (np.zeros(1), np.eye(1)), groups=100)
    assert fid == pytest.approx(2500, rel=0.01)
    assert stderr == pytest.approx(2 * 50 / math.sqrt(2000), rel=0.2)


def test_standard_error_is_the_spread_of_repetitions():
    rng, reference = np.random.default_rng(5), (np.zeros(3), np.eye(3))
    pairs = np.array([fid_with_error(1.5 * rng.standard_normal((400, 3)) + 0.3, reference) for _ in range(60)])
    spread, typical = pairs[:, 0].std(ddof=1), np.sqrt(np.square(pairs[:, 1]).mean())
    assert typical == pytest.approx(spread, rel=0.3)
    assert typical / math.sqrt(19) < 0.5 * spread  # the twin: the spread of the f_j, not multiplied by g - 1


def test_standard_error_needs_samples():
    with pytest.raises(ValueError, match="found 39 samples, expected at least 40"):
        fid_with_error(np.zeros((39, 2)), (np.zeros(2), np.eye(2)))


# --- sheet -------------------------------------------------------------------------------------------


def test_sample_sheet(tmp_path):
    images = torch.full((5, 1, 2, 3), -1.0)
    for i in range(5):
        images[i, 0, 0, 1] = i / 5
    sample_sheet(images, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (9, 6))
        sheet = np.asarray(picture)
    for i in range(5):
        row, column = divmod(i, 3)
        assert sheet[2 * row, 3 * column + 1] == int(i / 5 * 127.5 + 128)
    colours = torch.rand(2, 3, 2, 3, generator=seeded_generator(0, 4)) * 2 - 1
    sample_sheet(colours, tmp_path / "s.png")
    with Image.open(tmp_path / "s.png") as picture:
        assert picture.mode == "RGB"
        assert np.array_equal(np.asarray(picture)[:2, 3:], to_pixels(colours)[1].permute(1, 2, 0).numpy())
    assert (sheet > 0).sum() == 5 and [p.name for p in tmp_path.iterdir()] == ["s.png"]
