"""Where a refinement begins, and what it returns where validation noises refuse its best step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from art_edm.grids.grid import Grid
from art_edm.learning.config import TrainConfig
from art_edm.learning.training import train
from art_edm.measure.field import rms
from art_edm.metrics.end_point import better
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining import refine as refine_module
from art_edm.refining import solver_jacobian
from art_edm.refining.config import RefineConfig
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import OWN, own_start, refine, refine_grids
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import ALONE
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import sample
from tests.support.refine_fields import SHORT, TOP, art, clusters, mixture, pairs, start, together

TAILS = replace(SHORT, noises=8, validation=24, iterations=8)


def eights(**more) -> Context:
    return pairs(batch=8, **more)


def errors_of(model, grid, noises, solver) -> np.ndarray:
    """RMS errors [M] by sampling, not by `SolverRuns`."""
    return rms(sample(model, noises.latents, grid, solver) - noises.ends).numpy()


@pytest.fixture(scope="module")
def images():
    return clusters()


def test_it_begins_with_the_best_of_the_grids_it_is_given():
    model, config = mixture(), replace(SHORT, iterations=1, cheap_iterations=0)
    first = start()
    near = refine(model, first, "heun", SHORT, pairs()).grid
    worse = Grid(np.append(np.geomspace(20.0, 0.001, 5), 0.0))
    drawn = draw_noises(model, config, 20.0, pairs())
    result = refine(model, first, "heun", config, pairs(), drawn, {"worse": worse, "near": near})
    total = {name: sum(errors_of(model, grid, part, "heun").sum() for part in drawn[:2])
             for name, grid in {"given": first, "worse": worse, "near": near}.items()}
    assert result.start == min(total, key=total.get) == "near" and max(total, key=total.get) == "worse"
    before, after = (errors_of(model, grid, drawn.validation, "heun").mean() for grid in (first, near))
    assert result.history[0]["validation"] == pytest.approx(after, rel=1e-9)
    assert result.error_before.mean == pytest.approx(before, rel=1e-9)
    assert result.record()["start"] == "near"
    alone = refine(model, first, "heun", config, pairs(), drawn, {"worse": worse})
    assert alone.start == "given" and alone.grid == refine(model, first, "heun", config, pairs(), drawn).grid
    runs = 10 * 9  # of all noises over five steps
    assert alone.evaluations - refine(model, first, "heun", config, pairs(), drawn).evaluations == runs


def test_validation_may_refuse_a_start(monkeypatch):
    """The better start over all noises, of which those of validation are at their best on the given grid."""
    model, first = mixture(), start()
    near, drawn = refine(model, first, "heun", SHORT, pairs()).grid, draw_noises(model, SHORT, 20.0, pairs())
    ends = sample(model, drawn.validation.latents, first, "heun")
    shifted = drawn._replace(validation=drawn.validation._replace(ends=ends + 0.01 * (ends - drawn.validation.ends)))
    go = lambda: refine(model, first, "heun", SHORT, pairs(), shifted, {"near": near})
    errors = {grid: [errors_of(model, grid, part, "heun") for part in shifted[:2]] for grid in (first, near)}
    assert errors[near][1].mean() > errors[first][1].mean()
    result = go()
    assert result.start == "given" and result.error_after.mean <= result.error_before.mean
    monkeypatch.setattr(solver_jacobian, "better", lambda before, after: True)  # a twin that does not ask them
    least = min((first, near), key=lambda grid: sum(each.sum() for each in errors[grid]))
    assert go().start == ("near" if least is near else "given") == "near"


def test_a_grid_between_is_returned_where_the_best_step_is_refused(images, monkeypatch):
    """Few paths that end on another image outweigh what most gain: half the way may be better for all."""
    given, config = art(3), replace(TAILS, seed=4)
    drawn = draw_noises(images, config, TOP, eights())
    result = refine(images, given, "dpmpp2m", config, eights(), drawn)
    assert result.share in refine_module.SHARES
    before, after = (errors_of(images, grid, drawn.validation, "dpmpp2m") for grid in (given, result.grid))
    assert better(before, after) and result.error_after.mean == pytest.approx(after.mean(), rel=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(refine_module, "SHARES", ())
        assert refine(images, given, "dpmpp2m", config, eights(), drawn).grid == given
    monkeypatch.setattr(solver_jacobian, "better", lambda before, after: after.mean() <= before.mean())
    careless = refine(images, given, "dpmpp2m", config, eights(), drawn)  # the step itself
    assert careless.share == 1 and not better(before, errors_of(images, careless.grid, drawn.validation, "dpmpp2m"))
    step, found = (np.log(grid.values[1:-1] / given.values[1:-1]) for grid in (careless.grid, result.grid))
    assert found / step == pytest.approx(result.share, rel=1e-6)


def test_between_is_between_the_given_grid_and_the_best_step(images, monkeypatch):
    """Also where another grid was the start; and the best of the three shares is taken, not the first."""
    given, config = art(3), replace(TAILS, seed=4)
    drawn = draw_noises(images, config, TOP, eights())
    go = lambda: refine(images, given, "dpmpp2m", config, eights(), drawn, {"other": art(3, 0.3)})
    result = go()
    assert result.start == "other" and result.share < 1
    with monkeypatch.context() as patch:  # every step is offered; the least error of the history is the best step
        patch.setattr(solver_jacobian, "better", lambda before, after: True)
        least = go().grid.values
    top, inner = given.values[0], lambda share: np.exp(
        (1 - share) * np.log(given.values[1:-1]) + share * np.log(least[1:-1]))
    found = {share: Grid([top, *inner(share), 0.0]) for share in refine_module.SHARES}
    np.testing.assert_allclose(result.grid.values, found[result.share].values, rtol=1e-9)
    errors = {share: [errors_of(images, grid, part, "dpmpp2m") for part in drawn[:2]] for share, grid in found.items()}
    first = errors_of(images, given, drawn.validation, "dpmpp2m")
    total = {share: a.sum() + b.sum() for share, (a, b) in errors.items() if better(first, b)}
    assert result.share == min(total, key=total.get)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_starts_and_what_lies_between(images, size):
    config = replace(TAILS, seed=4)
    seeded = RefineConfig(seed=3, noises=4, validation=4, iterations=2, cheap_iterations=0)

    def work(world):
        result = refine(clusters(), art(3), "dpmpp2m", config, eights(world=world), starts={"other": art(3, 0.3)})
        model = GaussianDenoiser(0.0, 0.25, (1, 2, 2), sigma_max=TOP)
        found = refine_grids(model, {3: {"heun": art(3)}}, seeded, pairs(world=world)).results[3]
        return [(one.grid.values.tobytes(), one.start, one.share, one.evaluations) for one in (result, found)]

    every = together(size, work)
    assert every == [work(ALONE)] * size and every[0][0][2] < 1


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp2m", "ipndm"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_returned_that_validation_finds_worse(images, solver, seed):
    given, config = art(4), replace(TAILS, seed=seed)
    drawn = draw_noises(images, config, TOP, eights())
    result = refine(images, given, solver, config, eights(), drawn, {"other": art(4, 0.5)})
    before, after = (errors_of(images, grid, drawn.validation, solver) for grid in (given, result.grid))
    assert result.grid == given or better(before, after)
    assert result.error_after.mean == pytest.approx(after.mean(), rel=1e-9)


def test_a_start_of_another_kind_is_refused():
    for other in (start(4), Grid([10.0, 3.0, 1.0, 0.3, 0.1, 0.0])):
        with pytest.raises(ValueError, match="in the grid other, expected 5 from 20, .* leave it out"):
            refine(mixture(), start(), "heun", SHORT, starts={"other": other})
    with pytest.raises(ValueError, match="of the name 'given'.*use another name"):
        refine(mixture(), start(), "heun", SHORT, starts={"given": start()})


class High(GaussianDenoiser):
    sigma_limits = (0.4, TOP)


def test_the_other_clock_is_that_of_the_solver_s_own_errors(tmp_path):
    """Measured once for all K, counted, kept for a run that is continued."""
    model, config = GaussianDenoiser(0.0, 0.25, (1, 2, 2), sigma_max=TOP), replace(SHORT, iterations=2)
    context, grids = eights(store=Store(tmp_path), identity="it"), {k: art(k) for k in (3, 5)}
    before = model.evaluations
    found = refine_grids(model, {k: {"heun": grid} for k, grid in grids.items()}, config, context)
    assert sum(found.evaluations.values()) == model.evaluations - before
    assert list(found.evaluations) == list(found.seconds) == ["ends", "start", "refine"]
    assert found.evaluations["refine"] == sum(one.evaluations for one in found.results.values())
    own = train(model, TrainConfig(method="direct", solver="heun")).profile
    noises = draw_noises(model, config, TOP, eights())
    for k, grid in grids.items():
        other = own_start(model, own, k)
        np.testing.assert_allclose(other[OWN].values, own.direct(k).values)
        alone = refine(model, grid, "heun", config, eights(), noises, other)
        assert found.results[k].grid == alone.grid and found.results[k].start == alone.start
    assert {found.results[3].start, refine(model, grids[3], "heun", config, eights(), noises).start} == {OWN, "given"}
    plain = refine_grids(model, {3: {"heun": grids[3]}}, config, eights(), own_clock=False)
    assert plain.results[3].start == "given" and list(plain.evaluations) == ["ends", "refine"]
    high = own_start(High(0.0, 0.25, (1, 2, 2), sigma_max=TOP), own, 18)[OWN]  # a model without such low levels
    assert own.direct(18).values[-2] < 0.4 == high.values[-2] and own_start(model, None, 18) == {}
    assert own_start(model, own, 1)[OWN] == Grid([TOP, 0.0])
