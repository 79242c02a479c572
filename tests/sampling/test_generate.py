"""Samples that do not depend on batching, and Frechet distances against closed forms."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from art_edm.grids.grid import edm
from art_edm.metrics.mnist import to_images
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.errors import Stopped
from art_edm.runtime.progress import GracefulStop
from art_edm.sampling.generate import generate, sample_sheet, to_pixels, watching
from art_edm.sampling.noise import latents, seeded_generator
from art_edm.sampling.solvers import sample

GRID = edm(4, 0.002, 80)
DIGITS = GaussianDenoiser(-0.7, 0.3, (1, 28, 28))


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
    assert torch.equal(generate(DIGITS, GRID, "heun", range(2, 5), seed=3), whole[2:5])
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
    generate(DIGITS, GRID, "heun", 5, batch=3, watch=counter.update)
    assert counter.seen == [3, 6, 9, 12, 14, 16, 18, 20]


def test_a_stop_is_seen_within_a_step():
    with pytest.raises(Stopped, match="stopped while sampling"), GracefulStop() as stop:
        counter = Counter()
        counter.update = lambda done, note="": os.kill(os.getpid(), signal.SIGTERM) if done == 6 else None
        generate(DIGITS, GRID, "heun", 5, batch=3, watch=watching(counter, stop))


# --- pixels -----------------------------------------------------------------------------------------


def test_pixels_round_and_clip():
    half = 0.5 / 127.5
    images = torch.tensor([-3, -1, -1 + 0.9 * half, -1 + 1.1 * half, 0.2, 1 - 1.1 * half, 1, 9]).reshape(-1, 1, 1, 1)
    assert to_pixels(images).flatten().tolist() == [0, 0, 0, 1, 153, 254, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).reshape(-1, 1, 1)
    assert torch.equal(to_pixels(to_images(every)), every)
    cut = lambda x: (x * 127.5 + 127.5).clip(0, 255).to(torch.uint8)  # the twin that cuts off
    assert cut(images).flatten().tolist() != to_pixels(images).flatten().tolist()

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
