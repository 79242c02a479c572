"""Entries of a stage: computed once, counted once, and distinguished by whatever decides their numbers."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from art_edm.grids.grid import edm_unpinned
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining import stage as stage_module
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.solver_jacobian import Noises, Scheme, SolverRuns
from art_edm.refining.stage import Stage
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import nfe, sample
from tests.support.refine_fields import SHORT, TOP, mixture, pairs

LEVELS = np.array([20.0, 3.0, 0.5, 0.0])
ENDS = nfe(SHORT.fine_solver, SHORT.fine_steps)  # evaluations for one exact path


def noises_of(count: int = 3) -> Noises:
    generator = torch.Generator().manual_seed(0)
    latents, ends = (torch.randn(count, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    return Noises(latents, None, ends)


def kept(folder, **more):
    return pairs(store=Store(folder), **{"identity": "it", **more})


def test_an_entry_is_computed_once_and_counted_once_in_each_stage(tmp_path):
    model, noises = mixture(), noises_of()
    plain = SolverRuns("heun", noises, Stage(model, pairs()))
    expected, cost = plain.run(Scheme(LEVELS), keep=False).errors, plain.evaluations
    for fresh in (cost, 0, 0):
        stage, before = Stage(model, kept(tmp_path)), model.evaluations
        runs = SolverRuns("heun", noises, stage)
        for _ in range(2):  # again, in the same stage
            np.testing.assert_array_equal(runs.run(Scheme(LEVELS), keep=False).errors, expected)
            assert (model.evaluations - before, runs.evaluations, stage.evaluations) == (fresh, cost, cost)
        assert stage.seconds > 0


def test_derivatives_of_a_run_that_was_found_are_those_of_one_that_was_run(tmp_path):
    """Its steps are taken once more, which counts nowhere."""
    model, noises = mixture(), noises_of()
    plain = SolverRuns("heun", noises, Stage(model, pairs()))
    expected, cost = plain.derivatives(plain.run(Scheme(LEVELS)), 0.005), plain.evaluations
    SolverRuns("heun", noises, Stage(model, kept(tmp_path))).run(Scheme(LEVELS))
    runs, before = SolverRuns("heun", noises, Stage(model, kept(tmp_path))), model.evaluations
    run = runs.run(Scheme(LEVELS))
    assert model.evaluations == before and not run.kept
    for one, other in zip(runs.derivatives(run, 0.005), expected):
        assert one.tobytes() == other.tobytes()
    assert runs.evaluations == cost and model.evaluations - before == cost  # the run again, the derivatives


OTHERS = ["identity", "solver", "levels", "weights", "latents", "ends", "labels", "batch", "kind", "step", "version",
          "device"]


@pytest.mark.parametrize("other", ["", *OTHERS])
def test_whatever_decides_an_entry_distinguishes_it(tmp_path, monkeypatch, other):
    """Else a wrong number would be believed: each of these alone makes the work be done; without any, none is."""
    model, noises = mixture(), noises_of()
    first = SolverRuns("heun", noises, Stage(model, kept(tmp_path)))
    run = first.run(Scheme(LEVELS))
    first.derivatives(run, 0.005)
    first.run(Scheme(LEVELS, np.eye(3)))
    weights = {"": None, "weights": np.eye(3) * (1 + 1e-15)}.get(other)
    levels = LEVELS * (1 + 1e-15) if other == "levels" else LEVELS
    assert (levels != LEVELS).any() == (other == "levels")
    if other in ("latents", "ends"):
        noises = noises._replace(**{other: getattr(noises, other) + torch.tensor(1e-15, dtype=torch.float64)})
    if other == "labels":
        noises = noises._replace(labels=torch.eye(3))
    if other == "version":
        monkeypatch.setattr(stage_module, "code_version", lambda: "0")
    context = kept(tmp_path, identity="that" if other == "identity" else "it", batch=3 if other == "batch" else 2)
    stage = Stage(model, context)
    if other == "device":
        what = SolverRuns("heun", noises, stage)._what("errors", Scheme(LEVELS), slice(0, 2))
        found = stage.find({"device": "cuda", **what})
        assert found is None
        return
    runs, before = SolverRuns("euler" if other == "solver" else "heun", noises, stage), model.evaluations
    if other in ("kind", "step"):
        runs.derivatives(run, 0.005 if other == "kind" else 0.0051)
        assert (model.evaluations > before) == (other == "step")
    else:
        runs.run(Scheme(levels, weights), keep=False)
        assert (model.evaluations > before) == (other != "")


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path, monkeypatch):
    model, noises = mixture(), noises_of()
    SolverRuns("heun", noises, Stage(model, kept(tmp_path))).run(Scheme(LEVELS))

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="cannot write to .*: No space left on device; .* run the same command again"):
            SolverRuns("euler", noises, Stage(model, kept(tmp_path))).run(Scheme(LEVELS))
    before = model.evaluations
    SolverRuns("heun", noises, Stage(model, kept(tmp_path))).run(Scheme(LEVELS))
    assert model.evaluations == before and len(os.listdir(tmp_path)) == 2


def test_exact_ends_found_again_are_those_that_were_solved(tmp_path):
    """Gaussian data: x_0 = x s / sqrt(s^2 + sigma_max^2); of another top they are others, and solved."""
    model = GaussianDenoiser(0.0, 0.25, (1, 2, 2), sigma_max=TOP)
    for top in (TOP, 20.0):
        for found in (False, True):
            before = model.evaluations
            drawn = draw_noises(model, SHORT, top, kept(tmp_path))
            for part in drawn[:2]:
                expected = part.latents * top * 0.5 / np.hypot(0.5, top)
                torch.testing.assert_close(part.ends, expected, rtol=0, atol=1e-3)
            assert drawn.evaluations == 10 * ENDS and drawn.seconds > 0
            assert model.evaluations - before == (0 if found else drawn.evaluations)


@pytest.mark.parametrize("pinned", [True, False])
def test_exact_paths_of_a_model_without_a_pin_follow_the_rule_without_one(pinned):
    """To the last bit those of `sample` on that rule, and on no other."""
    model = mixture()
    model.pinned = pinned
    part = draw_noises(model, SHORT, 20.0, pairs(batch=16)).train
    free = edm_unpinned(SHORT.fine_steps, 20.0)
    ends = sample(model, part.latents, free, SHORT.fine_solver)
    assert (float((part.ends - ends).abs().max()) < 1e-12) == (not pinned)
