"""Refinements as long runs: same bytes after any stop and on any processes; what cannot be refined is refused."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch.distributed import HashStore

from art_edm.grids.grid import Grid, edm_unpinned
from art_edm.models.analytic import MixtureDenoiser
from art_edm.refining.refine import draw_noises, refine
from art_edm.refining.solver_jacobian import Travel
from art_edm.runtime.errors import CheckpointMismatch, NonFiniteOutput, Stopped
from tests.support.refine_fields import SHORT, Rounded, Threads, mixture, start


def bits(result):
    return result.grid.values.tobytes(), str((result.history, result.error_before, result.error_after)), \
        result.evaluations


@pytest.fixture(scope="module")
def whole():
    """A run that nobody disturbed."""
    return bits(refine(mixture(), start(), "heun", SHORT))


def test_one_seed_one_result(whole):
    assert bits(refine(mixture(), start(), "heun", SHORT)) == whole
    assert bits(refine(mixture(), start(), "heun", replace(SHORT, seed=1)))[0] != whole[0]


def test_every_evaluation_is_counted_and_shared_noises_serve_all(whole):
    model = mixture()
    assert bits(refine(model, start(), "heun", SHORT))[2] == model.evaluations
    drawn, before = draw_noises(model, SHORT, 20.0), model.evaluations
    result = refine(model, start(), "heun", SHORT, noises=drawn)
    assert result.evaluations == model.evaluations - before == whole[2] - drawn.evaluations
    assert drawn.evaluations == 10 * (4 * 19 + 1) and result.grid.values.tobytes() == whole[0]


def test_the_record_says_what_was_done():
    result = refine(mixture(), start(3), "ipndm", SHORT)
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["settings"]["solver"] == "ipndm" and record["settings"]["noises"] == 6
    assert record["error_after"] == {"mean": result.error_after.mean, "stderr": result.error_after.stderr,
                                     "median": result.error_after.median}
    assert record["evaluations"] == result.history[-1]["evaluations"] and len(record["history"]) == len(result.history)


class Killed(Exception):
    """Stands for the end of the process."""


def killed(monkeypatch, method, at, checkpoint):
    """A run that ends at call number `at`, from 0, of this method of `Travel`."""
    original, calls = getattr(Travel, method), []

    def kill(self, *arguments):
        calls.append(1)
        if len(calls) > at:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Travel, method, kill)
        refine(mixture(), start(), "heun", SHORT, checkpoint=checkpoint)


@pytest.mark.parametrize("at", [0, 1, 2, 4])
@pytest.mark.parametrize("method", ["derivatives", "run"])
def test_resumed_after_any_kill_gives_the_same_bytes(at, method, whole, tmp_path, monkeypatch):
    checkpoint = tmp_path / "state"
    killed(monkeypatch, method, at, checkpoint)
    assert bits(refine(mixture(), start(), "heun", SHORT, checkpoint=checkpoint, resume=True)) == whole
    model = mixture()
    assert bits(refine(model, start(), "heun", SHORT, checkpoint=checkpoint, resume=True)) == whole
    assert model.evaluations == 0  # there was nothing left to do


def test_a_checkpoint_without_its_curvature_is_noticed(whole, tmp_path, monkeypatch):
    """The comparison above would see a part of the state that is missing."""
    checkpoint = tmp_path / "state"
    killed(monkeypatch, "derivatives", 3, checkpoint)
    for name in ("secant", "damping", "gradient"):
        content = torch.load(checkpoint, weights_only=True)
        assert len(content["state"]["history"]) == 4
        content["state"][name] = content["state"][name] * 3
        torch.save(content, tmp_path / "other")
        other = refine(mixture(), start(), "heun", SHORT, checkpoint=tmp_path / "other", resume=True)
        assert bits(other)[1] != whole[1]


class Disturbed(MixtureDenoiser):
    """Something happens at an evaluation; D is NaN at and after the number `bad`."""

    happens, bad = None, None

    def denoise(self, x, sigma, class_labels):
        if self.happens and self.evaluations > self.happens:
            self.happens = None
            os.kill(os.getpid(), signal.SIGINT)
        y = super().denoise(x, sigma, class_labels)
        return y * float("nan") if self.bad and self.evaluations >= self.bad else y


def disturbed(**kwargs):
    base = mixture()
    model = Disturbed(base.weights, base.means, base.std, 0.01, 20.0)
    for name, value in kwargs.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_ctrl_c_saves(share, whole, tmp_path):
    checkpoint = tmp_path / "state"
    with pytest.raises(Stopped) as caught:
        refine(disturbed(happens=int(share * whole[2])), start(), "heun", SHORT, checkpoint=checkpoint)
    assert ("--resume" in str(caught.value)) == checkpoint.exists() == (share > 0.4)  # before, there was nothing
    assert bits(refine(mixture(), start(), "heun", SHORT, checkpoint=checkpoint, resume=True)) == whole


def test_nan_is_told_and_what_was_done_is_kept(whole, tmp_path):
    checkpoint = tmp_path / "state"
    with pytest.raises(NonFiniteOutput, match=r"NaN or infinity at sigma = .*; what was finished is in .*--resume"):
        refine(disturbed(bad=int(0.7 * whole[2])), start(), "heun", SHORT, checkpoint=checkpoint)
    assert bits(refine(mixture(), start(), "heun", SHORT, checkpoint=checkpoint, resume=True)) == whole


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoint = tmp_path / "state"
    refine(mixture(), start(), "heun", SHORT, "this", checkpoint)
    for what in (dict(solver="euler"), dict(config=replace(SHORT, seed=2)), dict(grid=start(4)), dict(identity="that")):
        arguments = {"grid": start(), "solver": "heun", "config": SHORT, "identity": "this", **what}
        with pytest.raises(CheckpointMismatch, match="use the same settings"):
            refine(mixture(), checkpoint=checkpoint, resume=True, **arguments)
    checkpoint.write_bytes(b"no")
    with pytest.raises(CheckpointMismatch, match="is not a refinement's checkpoint"):
        refine(mixture(), start(), "heun", SHORT, checkpoint=checkpoint, resume=True)


class Discrete(MixtureDenoiser):
    def round_sigma(self, sigma):
        return 2.0 ** (torch.as_tensor(sigma).log2() * 8).round().div(8)


def test_what_cannot_be_refined_is_refused():
    base = mixture()
    model = Discrete(base.weights, base.means, base.std, 2.0**-6, 16.0)
    with pytest.raises(ValueError, match="discrete noise levels .* without --refine"):
        refine(model, Grid([16.0, 4.0, 1.0, 0.0]), "heun", SHORT)
    assert model.evaluations == 0
    with pytest.raises(ValueError, match="expected one of euler"):
        refine(base, start(), "dopri", SHORT)
    with pytest.raises(ValueError, match="above the network's sigma_max"):
        refine(base, edm_unpinned(5, 80.0), "heun", SHORT)
    with pytest.raises(ValueError, match="found noises = 0"):
        refine(base, start(), "heun", replace(SHORT, noises=0))


def test_one_step_has_nothing_to_refine():
    result = refine(mixture(), Grid([20.0, 0.0]), "heun", SHORT)
    assert result.grid == Grid([20.0, 0.0]) and result.error_after == result.error_before and len(result.history) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_processes_change_nothing(size):
    config = replace(SHORT, noises=8, held=5, iterations=3, more=3)
    alone = bits(refine(Rounded(), start(4), "heun", config))
    store, barrier, box = HashStore(), threading.Barrier(size), [None] * size
    work = lambda rank: refine(Rounded(), start(4), "heun", config, world=Threads(rank, size, store, barrier, box))
    with ThreadPoolExecutor(size) as pool:
        assert [bits(result) for result in pool.map(work, range(size))] == [alone] * size
