"""Algorithm 1: same bits from same seeds and after any stop; checkpoints."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from typing import Callable, Optional

import pytest
import torch

from art_edm.grids.clocks import EdmClock, make_clock
from art_edm.learning import training
from art_edm.learning.training import PRESETS, CheckpointMismatch, TrainConfig, TrainResult, train
from art_edm.models.analytic import EmpiricalDenoiser, GaussianDenoiser
from art_edm.runtime.errors import NonFiniteOutput, Stopped

SHORT = replace(
    PRESETS["default"], iterations=12, batch=8, repeats=2, train_steps=16, trajectories=4, points=8, keep=32, rounds=2,
)
LIVE = replace(SHORT, rollout="live", iterations=6, train_steps=8)
PAPER = replace(PRESETS["paper"], iterations=6, trajectories=4, points=8, keep=4)
CONFIGS = {
    "cached": SHORT, "live": LIVE, "paper": PAPER, "three rounds": replace(SHORT, rounds=3, iterations=10),
    "by path": replace(SHORT, sees="path", shared=False, iterations=4),
}


def gaussian(kind: type = GaussianDenoiser) -> GaussianDenoiser:
    return kind(0.0, 0.25, (1, 2, 2))


class Killed(Exception):
    """Stands for the end of the process."""


def bits(result: TrainResult) -> tuple:
    learned = result.learned
    rest = (str(result.history), result.terminal_error, result.evaluations["rl"], result.evaluations["profile"])
    arrays = (learned.mean, learned.spread, learned.grid(18).values, result.profile.norm)
    return tuple(array.tobytes() for array in arrays) + rest


@pytest.fixture(scope="module")
def whole() -> dict:
    """Uninterrupted runs."""
    return {name: bits(train(gaussian(), config)) for name, config in CONFIGS.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_seed_same_bytes(name, whole):
    assert bits(train(gaussian(), CONFIGS[name])) == whole[name]
    other = bits(train(gaussian(), replace(CONFIGS[name], seed=1)))
    assert other[0] != whole[name][0] and other[3] != whole[name][3]


def test_seeds_change_the_rollouts_and_not_the_profile_alone():
    """Here nothing but the rollouts' own noise depends on the seed: a live run in units of its own."""
    config = replace(LIVE, normalise=False, temperature=1e-4)
    paths = [train(gaussian(), replace(config, seed=seed, iterations=1)).history[0]["cost"] for seed in (0, 1, 2)]
    assert len(set(paths)) == 3


def kill_before(monkeypatch, iteration: int, error: Optional[Callable] = None) -> None:
    """End the process before this iteration."""
    original = training._Run._iterate

    def iterate(self, *args):
        if self.state.iteration == iteration:
            if error is None:
                raise Killed
            error()
        original(self, *args)

    monkeypatch.setattr(training._Run, "_iterate", iterate)


@pytest.mark.parametrize("name", CONFIGS)
def test_resumed_after_any_iteration_gives_the_same_bits(name, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)  # after every iteration
    config, checkpoint = CONFIGS[name], tmp_path / "state"
    for iteration in range(config.iterations):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_before(patch, iteration)
            train(gaussian(), config, checkpoint=checkpoint)
        assert torch.load(checkpoint, weights_only=True)["iteration"] == iteration
        assert bits(train(gaussian(), config, checkpoint=checkpoint, resume=True)) == whole[name]
        assert bits(train(gaussian(), config, checkpoint=checkpoint, resume=True)) == whole[name]  # nothing left to do
        checkpoint.unlink()


def test_killed_again_and_again(whole, tmp_path, monkeypatch):
    """Checkpoints older than the kill, several kills in one run, and one that falls on the round's boundary."""
    checkpoint = tmp_path / "state"
    for iteration, every in ((2, 0), (5, 3), (6, 1), (7, 1), (11, 4)):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_before(patch, iteration)
            original = training._Run.save
            due = lambda run: run.state.iteration == 0 or (every and run.state.iteration % every == 0)
            patch.setattr(training, "SAVE_SECONDS", -1.0)
            patch.setattr(training._Run, "save", lambda run: due(run) and original(run))
            train(gaussian(), SHORT, checkpoint=checkpoint, resume=True)
    assert torch.load(checkpoint, weights_only=True)["iteration"] == 8  # not 11: three iterations were lost
    assert bits(train(gaussian(), SHORT, checkpoint=checkpoint, resume=True)) == whole["cached"]


def test_checkpoint_holds_nothing_in_vain(whole, tmp_path, monkeypatch):
    """The comparison would notice a part of the state that is missing."""
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    kept, damaged = tmp_path / "kept", tmp_path / "damaged"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_before(patch, 9)
        train(gaussian(), SHORT, checkpoint=kept)
    content = torch.load(kept, weights_only=True)
    fresh = training._Run(gaussian(), SHORT, "", None, True)
    fresh._begin_round(1)
    parts = {name: part.state_dict() for name, part in fresh.state.parts.items()}
    changes = {name: {"parts": {**content["parts"], name: part}} for name, part in parts.items()}
    changes.update({name: {name: value} for name, value in {
        "gamma": content["gamma"] + 1e-9, "iteration": 8, "knots": [], "paths": content["paths"][:-1],
        "history": content["history"][1:], "evaluations": 3,
    }.items()})
    for name, change in changes.items():
        torch.save({**content, **change}, damaged)
        assert bits(train(gaussian(), SHORT, checkpoint=damaged, resume=True)) != whole["cached"], name
    torch.save(content, damaged)
    assert bits(train(gaussian(), SHORT, checkpoint=damaged, resume=True)) == whole["cached"]


@pytest.mark.parametrize("name, iteration", [("cached", 4), ("live", 2)])
def test_stopped_politely(name, iteration, whole, tmp_path, monkeypatch):
    checkpoint = tmp_path / "state"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        kill_before(patch, iteration, lambda: signal.raise_signal(signal.SIGINT))
        train(gaussian(), CONFIGS[name], checkpoint=checkpoint)
    assert f"after {iteration + 1} of {CONFIGS[name].iterations}" in str(stopped.value)
    assert f"saved in {checkpoint}, continue with --resume" in str(stopped.value)
    assert signal.getsignal(signal.SIGINT) is before
    assert bits(train(gaussian(), CONFIGS[name], checkpoint=checkpoint, resume=True)) == whole[name]


class Interrupting(GaussianDenoiser):
    """A Gaussian during whose fifth call someone presses Ctrl-C."""

    calls = 0

    def denoise(self, x, sigma, class_labels):
        self.calls += 1
        if self.calls == 5:
            signal.raise_signal(signal.SIGINT)
        return super().denoise(x, sigma, class_labels)


def test_stopped_while_measuring_the_profile(whole, tmp_path):
    checkpoint = tmp_path / "state"
    with pytest.raises(Stopped, match="while measuring the profile; saved"):
        train(gaussian(Interrupting), SHORT, checkpoint=checkpoint)
    assert bits(train(gaussian(), SHORT, checkpoint=checkpoint, resume=True)) == whole["cached"]
    with pytest.raises(Stopped) as stopped:
        train(gaussian(Interrupting), SHORT)
    assert "saved" not in str(stopped.value)  # there is no file to be saved in


def jumping() -> EmpiricalDenoiser:
    """Few images far apart: a path settles on one of them at once."""
    return EmpiricalDenoiser(3 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind, wide", [(gaussian, False), (jumping, True)])
def test_killed_while_measuring_it_keeps_the_first_third(kind, wide, tmp_path, monkeypatch):
    """Whether the rest are as the first or many short ones: same bytes, and the first third is not measured again."""
    config = replace(SHORT, method="direct", trajectories=24, points=30, tolerance=1e-12)
    alone = train(kind(), config).profile
    assert (len(alone.norm) > 24) == wide
    model, checkpoint, original = kind(), tmp_path / "state", type(kind()).denoise

    def failing(self, *args):
        if self is model and self.evaluations > 300:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "denoise", failing)
        with pytest.raises(Killed):
            train(model, config, checkpoint=checkpoint)
    model = kind()
    again = train(model, config, checkpoint=checkpoint, resume=True).profile
    assert again.norm.tobytes() == alone.norm.tobytes() and again.evaluations == alone.evaluations
    assert model.evaluations == alone.evaluations - 8 * 30


def test_without_resume_a_run_starts_again(whole, tmp_path):
    checkpoint = tmp_path / "state"
    train(gaussian(), replace(SHORT, seed=5), checkpoint=checkpoint)
    assert bits(train(gaussian(), SHORT, checkpoint=checkpoint)) == whole["cached"]
    checkpoint.unlink()
    assert bits(train(gaussian(), SHORT, checkpoint=checkpoint, resume=True)) == whole["cached"]  # nothing to resume


@pytest.mark.parametrize("change, message", [
    ({"seed": 3}, "was made with seed=0, this run has seed=3"),
    ({"batch": 16}, "was made with batch=8, this run has batch=16"),
    ({"clock": "edm"}, "was made with clock=gaussian, this run has clock=edm"),
    ({"clock_sigma_data": 0.7}, "was made with clock_sigma_data=None, this run has clock_sigma_data=0.7"),
])
def test_checkpoint_of_other_settings_is_refused(change, message, tmp_path):
    checkpoint = tmp_path / "state"
    train(gaussian(), replace(SHORT, iterations=2), "net-a", checkpoint)
    content = checkpoint.read_bytes()
    with pytest.raises(CheckpointMismatch, match=message) as found:
        train(gaussian(), replace(SHORT, iterations=2, **change), "net-a", checkpoint, resume=True)
    assert "without --resume" in str(found.value) and str(checkpoint) in str(found.value)
    with pytest.raises(CheckpointMismatch, match="network=net-a, this run has network=net-b"):
        train(gaussian(), replace(SHORT, iterations=2), "net-b", checkpoint, resume=True)
    assert checkpoint.read_bytes() == content
    train(gaussian(), replace(SHORT, iterations=2), "net-a", checkpoint, resume=True)


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated", "foreign"])
def test_file_that_is_no_checkpoint_is_refused(damage, tmp_path):
    checkpoint = tmp_path / "state"
    train(gaussian(), replace(SHORT, iterations=2), checkpoint=checkpoint)
    if damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, checkpoint)
    else:
        content = checkpoint.read_bytes()
        checkpoint.write_bytes({"garbage": b"garbage", "empty": b"", "truncated": content[: len(content) // 2]}[damage])
    with pytest.raises(CheckpointMismatch, match="is not a checkpoint .*remove it"):
        train(gaussian(), replace(SHORT, iterations=2), checkpoint=checkpoint, resume=True)


class Failing(GaussianDenoiser):
    """A Gaussian that returns NaN from its n-th call on, and remembers at which noise level it first did."""

    calls, limit, failed_at = 0, 0, None

    def denoise(self, x, sigma, class_labels):
        self.calls += 1
        denoised = super().denoise(x, sigma, class_labels)
        if self.calls > self.limit:
            self.failed_at = self.failed_at or float(sigma[0])
            denoised = denoised * float("nan")
        return denoised


@pytest.mark.parametrize("calls", [3, 8, 9, 200, 500, 800])
def test_failing_network_leaves_a_checkpoint_from_which_a_good_one_goes_on(calls, whole, tmp_path):
    """Calls: one for each of 8 points of the profile, then 34 for each of 4 noises in each iteration."""
    checkpoint, model = tmp_path / "state", gaussian(Failing)
    model.limit = calls
    with pytest.raises(NonFiniteOutput) as failed:
        train(model, LIVE, checkpoint=checkpoint)
    assert f"sigma = {model.failed_at:.6g}" in str(failed.value)
    assert f"What was learned so far is in {checkpoint}" in str(failed.value)
    content = torch.load(checkpoint, weights_only=True)
    assert content["iteration"] == max(0, calls - 8) // (4 * 34)
    assert ("profile" in content) == (calls >= 8)
    assert bits(train(gaussian(), LIVE, checkpoint=checkpoint, resume=True))[:4] == whole["live"][:4]
    shutil.rmtree(tmp_path)
    model = gaussian(Failing)
    model.limit = calls
    with pytest.raises(NonFiniteOutput) as failed:
        train(model, LIVE)
    assert "learned so far" not in str(failed.value)


def test_direct_method_learns_nothing(tmp_path):
    config = replace(SHORT, method="direct")
    result = train(gaussian(), config, checkpoint=tmp_path / "state")
    assert result.learned is None and result.terminal_error is None and not result.history
    assert result.evaluations == {"step": 0, "profile": 4 * 8, "rl": 0}
    again = train(gaussian(Failing), config, checkpoint=tmp_path / "state", resume=True)  # needs no call any more
    assert again.profile.norm.tobytes() == result.profile.norm.tobytes()


def test_default_preset_is_the_default():
    assert TrainConfig() == PRESETS["default"]
    assert all(config.preset == name for name, config in PRESETS.items())
    assert isinstance(make_clock("edm", 80.0, 0.5), EdmClock)
