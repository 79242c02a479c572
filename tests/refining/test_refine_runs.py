"""Refinements as long runs: same bytes after any stop and on any processes; what cannot be refined is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch

from art_edm.grids.grid import Grid, edm_unpinned
from art_edm.models.analytic import MixtureDenoiser
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import refine, refine_grids
from art_edm.runtime.errors import CheckpointMismatch, NonFiniteOutput, Stopped
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import nfe
from tests.support.refine_fields import SHORT, Rounded, mixture, pairs, start, together

RANDOM = random.Random(5)
ENDS = nfe(SHORT.fine_solver, SHORT.fine_steps)  # evaluations for one exact path
BATCH = 2 * max(ENDS, sum(nfe("heun", n) - 1 for n in range(2, 6)))  # of the dearest entry


def bits(result):
    return result.grid.values.tobytes(), str((result.history, result.error_before, result.error_after)), \
        result.evaluations


@pytest.fixture(scope="module")
def whole():
    """A run that nobody disturbed."""
    return bits(refine(mixture(), start(), "heun", SHORT, pairs()))


def test_one_seed_one_result(whole):
    assert bits(refine(mixture(), start(), "heun", SHORT, pairs())) == whole
    assert bits(refine(mixture(), start(), "heun", replace(SHORT, seed=1), pairs()))[0] != whole[0]


def test_every_evaluation_is_counted_and_shared_noises_serve_all(whole):
    model = mixture()
    assert bits(refine(model, start(), "heun", SHORT, pairs()))[2] == model.evaluations
    drawn, before = draw_noises(model, SHORT, 20.0, pairs()), model.evaluations
    result = refine(model, start(), "heun", SHORT, pairs(), drawn)
    assert result.evaluations == model.evaluations - before == whole[2] - drawn.evaluations
    assert drawn.evaluations == 10 * (4 * 19 + 1) and result.grid.values.tobytes() == whole[0]


def test_the_record_says_what_was_done():
    result = refine(mixture(), start(3), "ipndm", SHORT, pairs())
    record = json.loads(json.dumps(result.record(), allow_nan=False))
    assert record["settings"]["solver"] == "ipndm" and record["settings"]["noises"] == 6
    assert record["settings"]["batch"] == 2 and record["error_after"] == result.error_after._asdict()
    assert record["evaluations"] == result.history[-1]["evaluations"] and len(record["history"]) == len(result.history)


# --- stops -----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As kill -9: nothing is written when it comes."""


class Disturbed(MixtureDenoiser):
    """Something happens at evaluation number `at`: `kill`, `signal` or, from then on, `nan`."""

    at, what = None, ""

    def denoise(self, x, sigma, class_labels):
        due = self.at is not None and self.evaluations + len(x) > self.at
        if due and self.what == "kill":
            raise Killed
        if due and self.what == "signal":
            self.at = None
            os.kill(os.getpid(), signal.SIGINT)
        y = super().denoise(x, sigma, class_labels)
        return y * float("nan") if due and self.what == "nan" else y


def disturbed(what="", at=None):
    base = mixture()
    model = Disturbed(base.weights, base.means, base.std, 0.01, 20.0)
    model.what, model.at = what, at
    return model


def kept(folder, **more):
    return pairs(store=Store(folder), identity="it", **more)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, *(RANDOM.random() for _ in range(19))])
def test_killed_at_any_of_20_moments_it_ends_alike_and_loses_one_batch(share, whole, tmp_path):
    model = disturbed("kill", int(share * whole[2]))
    with pytest.raises(Killed):
        refine(model, start(), "heun", SHORT, kept(tmp_path))
    again = disturbed()
    assert bits(refine(again, start(), "heun", SHORT, kept(tmp_path))) == whole
    redone = model.evaluations + again.evaluations - whole[2]
    assert 0 <= redone <= BATCH + 6 * nfe("heun", 5)  # what was under way, and a run whose steps derivatives begin with
    last = disturbed()
    assert bits(refine(last, start(), "heun", SHORT, kept(tmp_path))) == whole
    assert last.evaluations == 0  # there was nothing left to do


def test_without_a_store_all_is_lost(whole):
    """The twin: the same kill, and nothing to find."""
    with pytest.raises(Killed):
        refine(disturbed("kill", whole[2] - 5), start(), "heun", SHORT, pairs())
    model = disturbed()
    assert bits(refine(model, start(), "heun", SHORT, pairs())) == whole and model.evaluations == whole[2]


def test_killed_again_and_again_it_gets_there(whole, tmp_path):
    """Every life has a tenth of the evaluations; the sum is little more than one."""
    lives = 0
    for _ in range(40):
        model = disturbed("kill", whole[2] // 10)
        try:
            found = bits(refine(model, start(), "heun", SHORT, kept(tmp_path)))
        except Killed:
            lives += 1
        else:
            break
    assert found == whole and 9 <= lives <= 25


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "flipped", "another's"])
def test_damaged_entries_cost_time_alone(whole, tmp_path, damage):
    refine(mixture(), start(), "heun", SHORT, kept(tmp_path))
    paths = sorted(tmp_path.glob("*.npz"))
    for path, other in zip(paths[::3], paths[1::3]):
        content = path.read_bytes()
        middle = len(content) // 2
        if damage == "another's":
            shutil.copy(other, path)
        else:
            flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1:]
            path.write_bytes(content[:middle] if damage == "cut" else flipped)
    model = mixture()
    assert bits(refine(model, start(), "heun", SHORT, kept(tmp_path))) == whole
    assert 0 < model.evaluations < 0.7 * whole[2]


def test_two_runs_at_once_in_one_folder_and_one_removes_it(whole, tmp_path):
    """While one is at work another ends, and takes the folder away."""
    other = []

    class Interrupted(Disturbed):
        def denoise(self, x, sigma, class_labels):
            if not other and self.evaluations > whole[2] // 2:
                other.append(1)
                context = kept(tmp_path / "kept")
                other.append(bits(refine(mixture(), start(), "heun", SHORT, context)))
                context.store.remove()
                assert not (tmp_path / "kept").exists()
            return super().denoise(x, sigma, class_labels)

    base, context = mixture(), kept(tmp_path / "kept")
    model = Interrupted(base.weights, base.means, base.std, 0.01, 20.0)
    assert bits(refine(model, start(), "heun", SHORT, context)) == whole == other[1]
    context.store.remove()
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_ctrl_c_says_what_is_kept(share, whole, tmp_path):
    model = disturbed("signal", int(share * whole[2]))
    stage = "exact paths" if share < 0.4 else "refining"
    with pytest.raises(Stopped, match=f"stopped during {stage}; what was finished is in .*, run the same command "):
        refine(model, start(), "heun", SHORT, kept(tmp_path))
    again = disturbed()
    assert bits(refine(again, start(), "heun", SHORT, kept(tmp_path))) == whole
    assert model.evaluations + again.evaluations - whole[2] <= BATCH + 6 * nfe("heun", 5)
    with pytest.raises(Stopped, match=f"stopped during {stage}$"):
        refine(disturbed("signal", int(share * whole[2])), start(), "heun", SHORT, pairs())


def test_nan_is_told_and_what_was_done_is_kept(whole, tmp_path):
    model = disturbed("nan", int(0.7 * whole[2]))
    with pytest.raises(NonFiniteOutput, match=r"NaN or infinity at sigma = "):
        refine(model, start(), "heun", SHORT, kept(tmp_path))
    again = disturbed()
    assert bits(refine(again, start(), "heun", SHORT, kept(tmp_path))) == whole and again.evaluations < whole[2] / 2


def test_seconds_are_those_of_the_whole_work(tmp_path):
    """Of what was found, too; sums of what the entries say."""
    first = refine(mixture(), start(), "heun", SHORT, kept(tmp_path))
    again = refine(mixture(), start(), "heun", SHORT, kept(tmp_path))
    said = [float(np.load(path)["seconds"]) for path in tmp_path.glob("*.npz")]
    assert again.seconds == pytest.approx(sum(said), rel=1e-9) and first.seconds == pytest.approx(sum(said), rel=1e-9)


def test_an_unnamed_denoiser_finds_nothing_in_a_folder(whole, tmp_path):
    """Nothing tells it from another one."""
    for identity, files in (("", 0), ("it", 10)):
        context = pairs(store=Store(tmp_path), identity=identity)
        assert bits(refine(mixture(), start(), "heun", SHORT, context)) == whole
        assert len(os.listdir(tmp_path)) >= files and (files > 0 or not os.listdir(tmp_path))


def test_other_settings_are_named(tmp_path, capsys):
    """With `resume` an error; without it a line, and the work begins anew."""
    go = lambda solver="heun", config=SHORT, **more: refine_grids(
        mixture(), {3: {solver: start(3)}}, config, kept(tmp_path, quiet=False, **more), own_clock=False)
    go()
    assert capsys.readouterr().err == ""
    go(resume=True)  # the twin: the same settings
    with pytest.raises(CheckpointMismatch, match="holds a refinement with solver=heun, this run has solver=euler; use"):
        go("euler", resume=True)
    with pytest.raises(CheckpointMismatch, match="with seed=0, this run has seed=2"):
        go(config=replace(SHORT, seed=2), resume=True)
    go("euler")
    assert "with solver=heun, this run has solver=euler; starting at the beginning" in capsys.readouterr().err
    go("euler", resume=True)


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


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_change_nothing_and_any_number_goes_on(size, tmp_path):
    """Each writes entries of its own; one process goes on with what all had."""
    config = replace(SHORT, noises=8, validation=5, iterations=3, cheap_iterations=3)
    alone = bits(refine(Rounded(), start(4), "heun", config, pairs()))

    def work(world, made=Rounded):
        model = made()
        return bits(refine(model, start(4), "heun", config, kept(tmp_path, world=world))), model.evaluations

    first = together(size, work)
    assert [each for each, _ in first] == [alone] * size and sum(count for _, count in first) == alone[2]
    assert together(size, work) == [(alone, 0)] * size
    model = Rounded()
    assert bits(refine(model, start(4), "heun", config, kept(tmp_path))) == alone and model.evaluations == 0
    for path in sorted(tmp_path.glob("*.npz"))[::2]:
        path.unlink()
    assert bits(refine(model, start(4), "heun", config, kept(tmp_path))) == alone
    assert 0 < model.evaluations < 0.8 * alone[2]
