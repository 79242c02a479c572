"""Algorithm 1: same bits from same seeds and after any stop; checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, Optional

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import EdmClock, make_clock
from art_edm.learning import training
from art_edm.learning.training import (
    CHECKPOINT,
    PRESETS,
    CheckpointMismatch,
    TrainConfig,
    TrainResult,
    rollout_settings,
    train,
)
from art_edm.measure import objectives
from art_edm.measure.profile import Profile
from art_edm.models.analytic import EmpiricalDenoiser, GaussianDenoiser
from art_edm.runtime.context import Context
from art_edm.runtime.errors import NonFiniteOutput, Stopped
from art_edm.runtime.store import Store

SHORT = PRESETS["default"].changed(
    iterations=12, batch=8, repeats=2, train_steps=16, trajectories=4, points=8, distill_paths=32, rounds=2,
)
LIVE = SHORT.changed(rollout="live", iterations=6, train_steps=8)
PAPER = PRESETS["paper"].changed(iterations=6, trajectories=4, points=8, distill_paths=4)
CONFIGS = {
    "cached": SHORT, "live": LIVE, "paper": PAPER, "three rounds": SHORT.changed(rounds=3, iterations=10),
    "by path": SHORT.changed(policy_inputs="path", path_differences=False, iterations=4),
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


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_same_seed_same_bytes(name, whole):
    assert bits(train(gaussian(), CONFIGS[name])) == whole[name]
    other = bits(train(gaussian(), CONFIGS[name].changed(seed=1)))
    assert other[0] != whole[name][0] and other[3] != whole[name][3]


def test_seeds_change_the_rollouts_and_not_the_profile_alone():
    """Here nothing but the rollouts' own noise depends on the seed: a live run in units of its own."""
    config = LIVE.changed(normalise=False, temperature=1e-4)
    paths = [train(gaussian(), config.changed(seed=seed, iterations=1)).history[0]["cost"] for seed in (0, 1, 2)]
    assert len(set(paths)) == 3


def context(folder: Path, identity: str = "a Gaussian", **more: Any) -> Context:
    return Context(store=Store(folder), identity=identity, **more)


def kept(folder: Path) -> Optional[Dict[str, Any]]:
    """What the checkpoint holds of plain values."""
    content = Store(folder).load(CHECKPOINT)
    return None if content is None else json.loads(str(content["plain"]))


def killed_at(iteration: int):
    """End the process before this iteration."""
    def kill(done: int) -> None:
        if done == iteration:
            raise Killed
    return kill


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_continued_after_any_iteration_gives_the_same_bits(name, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)  # after every iteration
    config = CONFIGS[name]
    for iteration in range(1, config.iterations):
        folder = tmp_path / str(iteration)
        with pytest.raises(Killed):
            train(gaussian(), config, context(folder), killed_at(iteration))
        assert kept(folder)["iteration"] == iteration
        fresh = []
        assert bits(train(gaussian(), config, context(folder), fresh.append)) == whole[name]
        assert fresh == list(range(iteration, config.iterations))  # nothing finished is done twice
        assert bits(train(gaussian(), config, context(folder), killed_at(0))) == whole[name]  # nothing left to do


def test_killed_again_and_again(whole, tmp_path, monkeypatch):
    """Checkpoints older than the kill, several kills in one run, and one that falls on the round's boundary."""
    for iteration, every in ((2, 0), (5, 3), (6, 1), (7, 1), (11, 4)):
        due = lambda what, content, n=every: n and json.loads(str(content["plain"]))["iteration"] % n == 0
        store = Sparing(tmp_path, due)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(training, "SAVE_SECONDS", -1.0)
            train(gaussian(), SHORT, Context(store=store, identity="a Gaussian"), killed_at(iteration))
    assert kept(tmp_path)["iteration"] == 8  # not 11: three iterations were lost
    assert bits(train(gaussian(), SHORT, context(tmp_path))) == whole["cached"]


class Sparing(Store):
    """A store that writes a checkpoint only where `due`."""

    def __init__(self, folder, due):
        super().__init__(folder)
        self.due = due

    def save(self, what, content):
        if what != CHECKPOINT or self.due(what, content):
            super().save(what, content)


def test_checkpoint_holds_nothing_in_vain(whole, tmp_path, monkeypatch):
    """The comparison would notice a part of the state that is missing."""
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    with pytest.raises(Killed):
        train(gaussian(), SHORT, context(tmp_path), killed_at(9))
    content = Store(tmp_path).load(CHECKPOINT)
    plain = json.loads(str(content["plain"]))
    changes: Dict[str, Dict[str, np.ndarray]] = {
        name: {name: np.zeros_like(content[name])} for name in content if name.startswith(("policy.", "critic."))
    }
    assert len(changes) == 2 * 4  # weights, and Adam's count, mean and square
    changes.update({"paths": {"paths": content["paths"][:-1]}, "knots.0": {"knots.0": content["knots.0"] ** 1.01}})
    for name, value in (("gamma", plain["gamma"] + 1e-9), ("iteration", 8), ("history", plain["history"][1:]),
                        ("evaluations", 3)):
        changes[name] = {"plain": np.array(json.dumps({**plain, name: value}))}
    for name, change in changes.items():
        Store(tmp_path).save(CHECKPOINT, {**content, **change})
        assert bits(train(gaussian(), SHORT, context(tmp_path))) != whole["cached"], name
    Store(tmp_path).save(CHECKPOINT, content)
    assert bits(train(gaussian(), SHORT, context(tmp_path))) == whole["cached"]


@pytest.mark.parametrize("name, iteration", [("cached", 4), ("live", 2)])
def test_stopped_politely(name, iteration, whole, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped) as stopped:
        train(gaussian(), CONFIGS[name], context(tmp_path),
              lambda done: signal.raise_signal(signal.SIGINT) if done == iteration else None)
    assert f"after {iteration + 1} of {CONFIGS[name].iterations}" in str(stopped.value)
    assert f"saved in {tmp_path}, run the same command again to continue" in str(stopped.value)
    assert signal.getsignal(signal.SIGINT) is before
    assert bits(train(gaussian(), CONFIGS[name], context(tmp_path))) == whole[name]


class Interrupting(GaussianDenoiser):
    """A Gaussian during whose fifth call someone presses Ctrl-C."""

    calls = 0

    def denoise(self, x, sigma, class_labels):
        self.calls += 1
        if self.calls == 5:
            signal.raise_signal(signal.SIGINT)
        return super().denoise(x, sigma, class_labels)


def test_stopped_while_measuring_the_profile(whole, tmp_path):
    with pytest.raises(Stopped, match=f"while measuring the profile; finished parts are in {tmp_path}"):
        train(gaussian(Interrupting), SHORT, context(tmp_path))
    assert bits(train(gaussian(), SHORT, context(tmp_path))) == whole["cached"]
    with pytest.raises(Stopped) as stopped:
        train(gaussian(Interrupting), SHORT)
    assert "finished parts" not in str(stopped.value)  # there is no file to be saved in


def jumping() -> EmpiricalDenoiser:
    """Few images far apart: a path settles on one of them at once."""
    return EmpiricalDenoiser(3 * torch.randn(8, 1, 2, 2, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("kind, wide", [(gaussian, False), (jumping, True)])
def test_killed_while_measuring_it_keeps_the_first_third(kind, wide, tmp_path, monkeypatch):
    """Whether the rest are as the first or many short ones: same bytes, and the first third is not measured again."""
    config = SHORT.changed(method="direct", trajectories=24, points=30, tolerance=1e-12)
    alone = train(kind(), config).profile
    assert (len(alone.norm) > 24) == wide
    model, original = kind(), type(kind()).denoise

    def failing(self, *args):
        if self is model and self.evaluations > 300:
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "denoise", failing)
        with pytest.raises(Killed):
            train(model, config, context(tmp_path))
    model = kind()
    again = train(model, config, context(tmp_path)).profile
    assert again.norm.tobytes() == alone.norm.tobytes() and again.evaluations == alone.evaluations
    assert model.evaluations == alone.evaluations - 8 * 30


def test_unfinished_work_of_other_settings_is_left_aside(whole, tmp_path, capsys):
    """And named, unless all are to be quiet; an error is made of it where the context resumes."""
    train(gaussian(), SHORT.changed(seed=5), context(tmp_path))
    assert bits(train(gaussian(), SHORT, context(tmp_path, quiet=False))) == whole["cached"]
    assert capsys.readouterr().err.strip() == (
        f"{tmp_path} holds a run with seed=5, this run has seed=0; starting at the beginning")
    assert bits(train(gaussian(), SHORT, context(tmp_path / "new", resume=True))) == whole["cached"]  # nothing there


def test_what_other_code_has_left_is_not_continued(whole, tmp_path, monkeypatch, capsys):
    """Checkpoint and profile of an older version: begun anew; with the same code, nothing is evaluated again."""
    train(gaussian(), SHORT.changed(iterations=2), context(tmp_path))
    for module in (objectives, training):
        monkeypatch.setattr(module, "code_version", lambda: "newer")
    model = gaussian()
    assert bits(train(model, SHORT, context(tmp_path, quiet=False))) == whole["cached"] and model.evaluations > 0
    assert "this run has" in capsys.readouterr().err
    model = gaussian()
    assert bits(train(model, SHORT, context(tmp_path))) == whole["cached"] and model.evaluations == 0


def test_a_context_without_identity_finds_nothing(tmp_path):
    """Two networks cannot be distinguished: what one left is not taken for the other's, on disk or in memory."""
    for store in (Store(tmp_path), Store()):
        here = Context(store=store)
        first = train(gaussian(), SHORT, here)
        other = GaussianDenoiser(0.0, 4.0, (1, 2, 2))
        assert bits(train(other, SHORT, here)) == bits(train(other, SHORT)) != bits(first)


@pytest.mark.parametrize("change, message", [
    ({"seed": 3}, "holds a run with seed=0, this run has seed=3"),
    ({"batch": 16}, "holds a run with batch=8, this run has batch=16"),
    ({"clock": "edm"}, "holds a run with clock=gaussian, this run has clock=edm"),
    ({"clock_sigma_data": 0.7}, "holds a run with clock_sigma_data=None, this run has clock_sigma_data=0.7"),
])
def test_checkpoint_of_other_settings_is_refused_where_one_resumes(change, message, tmp_path):
    config = SHORT.changed(iterations=2)
    train(gaussian(), config, context(tmp_path))
    before = Store(tmp_path).path(CHECKPOINT).read_bytes()
    with pytest.raises(CheckpointMismatch, match=message) as found:
        train(gaussian(), config.changed(**change), context(tmp_path, resume=True))
    assert "leave --resume out" in str(found.value) and str(tmp_path) in str(found.value)
    with pytest.raises(CheckpointMismatch, match="network=a Gaussian, this run has network=net-b"):
        train(gaussian(), config, context(tmp_path, "net-b", resume=True))
    assert Store(tmp_path).path(CHECKPOINT).read_bytes() == before
    train(gaussian(), config, context(tmp_path, resume=True))


@pytest.mark.parametrize("damage", ["garbage", "empty", "truncated", "pickle"])
def test_a_damaged_checkpoint_costs_time_only(damage, whole, tmp_path):
    train(gaussian(), SHORT, context(tmp_path))
    path = Store(tmp_path).path(CHECKPOINT)
    if damage == "pickle":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"garbage": b"garbage", "empty": b"", "truncated": content[: len(content) // 2]}[damage])
    done = []
    assert bits(train(gaussian(), SHORT, context(tmp_path, resume=True), done.append)) == whole["cached"]
    assert done == list(range(12))


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


@pytest.mark.slow
@pytest.mark.parametrize("calls", [3, 8, 9, 200, 500, 800])
def test_failing_network_leaves_a_checkpoint_from_which_a_good_one_goes_on(calls, whole, tmp_path):
    """Calls: one for each of 8 points of the profile, then 34 for each of 4 noises in each iteration."""
    model = gaussian(Failing)
    model.limit = calls
    with pytest.raises(NonFiniteOutput) as failed:
        train(model, LIVE, context(tmp_path))
    assert f"sigma = {model.failed_at:.6g}" in str(failed.value)
    assert (f"What was learned so far is in {tmp_path}" in str(failed.value)) == (calls >= 8)
    assert (kept(tmp_path) or {"iteration": None})["iteration"] == ((calls - 8) // (4 * 34) if calls >= 8 else None)
    again = gaussian()
    assert bits(train(again, LIVE, context(tmp_path)))[:4] == whole["live"][:4]
    done = 0 if calls < 8 else 4 * 8 + (calls - 8) // (4 * 34) * 4 * 34 * 3 // 2
    assert again.evaluations <= 4 * 8 + 6 * 8 * 3 * 17 - done
    shutil.rmtree(tmp_path)
    model = gaussian(Failing)
    model.limit = calls
    with pytest.raises(NonFiniteOutput) as failed:
        train(model, LIVE)
    assert "learned so far" not in str(failed.value)


def test_direct_method_learns_nothing(tmp_path):
    config = SHORT.changed(method="direct")
    result = train(gaussian(), config, context(tmp_path))
    assert result.learned is None and result.terminal_error is None and not result.history
    assert result.evaluations == {"step": 0, "profile": 4 * 8, "rl": 0}
    again = train(gaussian(Failing), config, context(tmp_path))  # needs no call any more
    assert again.profile.norm.tobytes() == result.profile.norm.tobytes()


def test_default_preset_is_the_default():
    assert TrainConfig() == PRESETS["default"]
    assert all(config.preset == name for name, config in PRESETS.items())
    assert isinstance(make_clock("edm", 80.0, 0.5), EdmClock)


# --- what only a closed form tells ----------------------------------------------------------------------


@pytest.mark.parametrize("rho", [0.1, 0.25])
def test_the_temperature_is_rho_c_squared(rho):
    """|Q| = 9 everywhere on [0, T]: c = 3, J* = 9 T; of order 2 the cost curves three times as much."""
    profile = Profile(make_clock("linear", 4.0, 1.0), np.array([4.0, 1e-3]), np.full((2, 2), 9.0), 0, 0.0)
    paper = SHORT.changed(exploration=rho, normalise=False)
    assert rollout_settings(paper, profile).temperature == pytest.approx((rho * 3) ** 2)
    ours = rollout_settings(SHORT.changed(exploration=rho), profile)  # in units of c^2
    assert ours.temperature == pytest.approx(rho**2) != pytest.approx(rho**4)
    second = replace(profile, order=2, _fine={})
    unit = rollout_settings(SHORT.changed(exploration=rho, solver="heun"), second).temperature
    assert unit == pytest.approx(rho**2 / 3)


@pytest.mark.parametrize("solver, start", [(None, -2.0), ("heun", -3.0)])
def test_the_multiplier_starts_at_its_value_at_the_optimum(solver, start):
    """-(p + 1) c in units of c; with a rate of zero it stays there."""
    config = SHORT.changed(solver=solver, multiplier_rate=0.0, iterations=1, points=12)
    assert train(gaussian(), config).history[0]["gamma"] == pytest.approx(start, rel=1e-12)


def test_a_policy_of_time_learns_on_the_mean_of_many_jumping_paths():
    """Without exploration the first rollouts cost J of the base clock exactly, whoever of the many they follow."""
    config = SHORT.changed(trajectories=24, points=30, tolerance=1e-12, iterations=1, temperature=1e-12,
                           train_steps=128)
    found = {kind: train(jumping(), config.changed(policy_inputs=kind)) for kind in ("time", "path")}
    for kind, exact in (("time", True), ("path", False)):
        profile = found[kind].profile
        base = profile.cost(np.append(profile.clock.sigma(np.linspace(0, 1, 4097))[:-1], 0.0)) / profile.optimum
        assert len(profile.norm) > 24
        assert (abs(found[kind].history[0]["cost"] / base - 1) < 0.02) == exact
