"""Refinement that chooses its solver: errors against plain sampling, cost to the evaluation, and any solver's gain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from art_edm.measure.field import rms
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining import refine as refine_module
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import refine, refine_grids
from art_edm.runtime.context import Context
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import sample
from tests.support.refine_fields import SHORT, TOP, art, mixture, start, together

SHORTER = replace(SHORT, validation=6, iterations=2, cheap_iterations=2)
GRIDS = {5: {"clock": start(5), "dpmpp2m": start(5), "heun": start(3)},
         4: {"clock": start(4), "clock-denoised": start(4)}}


def eights(**more):
    return Context(**{"batch": 8, **more})


def mean_error(model, grid, noises, solver):
    return float(rms(sample(model, noises.latents, grid, solver) - noises.ends).mean())


@pytest.mark.slow
def test_the_solver_that_ends_nearest_on_validation_noises_is_refined():
    model, noises = mixture(), draw_noises(mixture(), SHORTER, 20.0, eights())
    before = model.evaluations
    found = refine_grids(model, GRIDS, SHORTER, eights())
    assert sum(found.evaluations.values()) == model.evaluations - before
    assert list(found.evaluations) == ["ends", "choose", "refine"]  # the chosen have no clock of their own
    for key, grids in GRIDS.items():
        errors = {solver: mean_error(model, grid, noises.validation, solver) for solver, grid in grids.items()}
        others = {solver: mean_error(model, grid, noises.train, solver) for solver, grid in grids.items()}
        assert {solver: one.mean for solver, one in found.tried[key].items()} == pytest.approx(errors, rel=1e-9)
        assert max(abs(others[solver] / errors[solver] - 1) for solver in errors) > 0.01  # the twin: other noises
        result, solver = found.results[key], min(errors, key=errors.get)
        assert result.settings["solver"] == solver and result.grid.num_steps == grids[solver].num_steps
        assert result.error_before.mean == pytest.approx(errors[solver], rel=1e-9)
        alone = refine_grids(mixture(), {key: {solver: grids[solver]}}, SHORTER, eights())
        assert alone.results[key].grid == result.grid and alone.tried == {}


def test_one_of_several_is_not_always_the_first():
    model, worst = mixture(), {"heun": start(2), "clock": start(3)}
    errors = refine_grids(model, {3: worst}, SHORTER, eights(), own_clock=False).tried[3]
    assert errors["heun"].mean > 1.1 * errors["clock"].mean
    for order in (("heun", "clock"), ("clock", "heun")):
        found = refine_grids(model, {3: {name: worst[name] for name in order}}, SHORTER, eights(), own_clock=False)
        assert found.results[3].settings["solver"] == "clock"


@pytest.mark.slow
def test_a_choice_is_continued_from_the_store(tmp_path, monkeypatch):
    """Ended in the refinement, it goes on with the same result and figures, and evaluates nothing that it had."""
    go = lambda model: refine_grids(model, GRIDS, SHORTER, eights(store=Store(tmp_path), identity="it"))
    whole = refine_grids(mixture(), GRIDS, SHORTER, eights())
    with monkeypatch.context() as patch:
        patch.setattr(refine_module, "refine", lambda *a, **k: (_ for _ in ()).throw(KeyError))
        with pytest.raises(KeyError):
            go(mixture())
    again = mixture()
    found = go(again)
    assert found.evaluations == whole.evaluations and again.evaluations < sum(whole.evaluations.values())
    assert {k: one.grid for k, one in found.results.items()} == {k: one.grid for k, one in whole.results.items()}
    assert found.tried == whole.tried
    over = mixture()
    assert go(over).evaluations == whole.evaluations and over.evaluations == 0


def test_processes_choose_alike():
    def work(world):
        found = refine_grids(mixture(), {5: GRIDS[5]}, SHORTER, Context(batch=2, world=world), own_clock=False)
        return found.results[5].grid.values.tobytes(), found.tried, found.evaluations

    alone, = together(1, work)
    assert together(2, work) == [alone, alone]


@pytest.mark.parametrize("solver", ["clock", "clock-denoised", "unipc", "deis"])
def test_solvers_of_few_evaluations_gain(solver):
    """On Gaussian data, whose ends are known, and on other noises."""
    model = GaussianDenoiser(0.0, 0.25, (1, 2, 2), sigma_max=TOP)
    latents = torch.randn((64, 1, 2, 2), generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    ends = model.initial(latents, TOP) * 0.5 / np.hypot(TOP, 0.5)
    error = lambda grid: float((sample(model, latents, grid, solver) - ends).square().mean().sqrt())
    given, config = art(5), replace(SHORT, fine_steps=40, noises=8, iterations=12, cheap_iterations=12)
    assert error(refine(model, given, solver, config, eights()).grid) < 0.7 * error(given)
