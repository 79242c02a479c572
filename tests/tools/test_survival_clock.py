"""Clocks that jump by hours: the same bytes, checkpoints that can be resumed, and no rate below zero."""

from __future__ import annotations

import io
import random
import re
import time

import pytest

from art_edm.learning.config import PRESETS
from art_edm.learning.training import train
from art_edm.models.analytic import GaussianDenoiser
from art_edm.runtime.context import Context
from art_edm.runtime.progress import Progress
from art_edm.runtime.store import Store

CONFIG = PRESETS["default"].changed(
    iterations=8, batch=8, repeats=2, train_steps=16, trajectories=4, points=8, distill_paths=32, rounds=2,
)
CLOCKS = ("time", "monotonic", "perf_counter")
HOURS = 3600.0


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def jump(monkeypatch):
    """All clocks of the process show `jump.now` hours more (or fewer) than they would."""
    class Jump:
        now = 0.0

    def shifted(real):
        return lambda: real() + Jump.now * HOURS

    for name in CLOCKS:
        monkeypatch.setattr(time, name, shifted(getattr(time, name)))
    return Jump


def jumping(jump, seed):
    """A Gaussian during each of whose calls the clocks jump."""
    rng = random.Random(seed)

    class Jumping(GaussianDenoiser):
        def denoise(self, x, sigma, class_labels):
            jump.now = rng.uniform(-5, 5)
            return super().denoise(x, sigma, class_labels)

    return Jumping(0.0, 0.25, (1, 2, 2))


def bits(result):
    learned = result.learned
    return learned.mean.tobytes(), learned.grid(18).values.tobytes(), result.profile.norm.tobytes(), result.history


@pytest.mark.slow
@pytest.mark.parametrize("rollout", ["cached", "live"])
def test_the_same_bytes_whatever_the_clocks_show(jump, tmp_path, rollout):
    config = CONFIG.changed(rollout=rollout)
    whole = bits(train(GaussianDenoiser(0.0, 0.25, (1, 2, 2)), config))

    def leap(done):  # rollouts on the profile call no network
        jump.now += (-4, 7, -9)[done % 3]

    context = Context(store=Store(tmp_path), identity="jumping")
    for seed in range(2):
        assert bits(train(jumping(jump, seed), config, context, leap)) == whole
        assert bits(train(jumping(jump, seed), config, context, leap)) == whole  # from what the first has left
        context.store.remove()
    assert bits(train(jumping(jump, 0), config.changed(seed=1)))[0] != whole[0]


def shown(progress, steps, jump, jumps):
    """What is written on the terminal while the clock jumps between steps."""
    for done in range(1, steps + 1):
        jump.now += jumps.get(done, 0)
        time.sleep(0.002)
        progress.last -= 1  # so that every line is written
        progress.update(done)
    progress.close()


def numbers(text):
    """Rates and seconds left, of every line."""
    found = re.findall(r"(\S+)/s  (?:(-?\d+):)?(-?\d+):(-?\d+) left", text)
    assert len(found) > 20
    rates = [float(rate) for rate, *_ in found]
    return rates, [int(hours or 0) * 3600 + int(minutes) * 60 + int(seconds) for _, hours, minutes, seconds in found]


@pytest.mark.parametrize("jumps", [{10: -3}, {10: 3}, {5: 2, 15: -4, 25: 1}, {1: -1}], ids=str)
def test_no_rate_below_zero_and_a_sound_one_again_after_the_jump_back(jump, monkeypatch, jumps):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    shown(Progress(1000, "work"), 30, jump, jumps)
    rates, left = numbers(stream.getvalue())
    assert min(rates) > 0 and min(left) >= 0
    assert all(rate <= 1100 for rate in rates)  # 2 ms a step at least, but for the first after a jump


def test_without_counting_anew_the_rate_is_absurd(jump, monkeypatch):
    """The twin: as it would be if time since the beginning were taken as it is."""
    began = time.monotonic()
    jump.now -= 3
    rate = 10 / max(time.monotonic() - began, 1e-9)
    assert rate > 1e9


def test_a_line_is_shown_soon_after_a_jump_back(jump, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    progress = Progress(1000, "work")
    progress.update(1)
    jump.now -= 3
    progress.update(2)  # only notices
    time.sleep(0.11)
    progress.update(3)
    assert "work 3/1000" in stream.getvalue()
