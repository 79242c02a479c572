"""Where a refinement begins, and what it returns where noises held out refuse its best step."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid
from art_edm.learning.config import TrainConfig
from art_edm.learning.training import train
from art_edm.measure.field import rms
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining import refine as refine_module
from art_edm.refining.config import RefineConfig, better
from art_edm.refining.error_growth import weighted
from art_edm.refining.refine import draw_noises, refine
from art_edm.refining.refine_all import OWN, refined_grids, start_state, starts
from art_edm.refining.solver_jacobian import Travel
from art_edm.runtime.distributed import ALONE
from art_edm.sampling.solvers import sample
from tests.support.refine_fields import SHORT, Threads, clusters, mixture, start

TOP = 80.0
CLOCK = GaussianClock(TOP, 0.5)
TAILS = replace(SHORT, noises=8, held=24, batch=8, iterations=8)


class Killed(Exception):
    """Stands for the end of the process."""


def grid_of(num_steps: int, beta: float = 0.0) -> Grid:
    return weighted(CLOCK.sigma, beta, 0.5, num_steps)


def errors_of(model, grid, noises, solver) -> np.ndarray:
    """RMS errors [M] by sampling, not by `Travel`."""
    return rms(sample(model, noises.latents, grid, solver) - noises.ends).numpy()


@pytest.fixture(scope="module")
def images():
    return clusters()


def test_it_begins_with_the_best_of_the_grids_it_is_given():
    model, config = mixture(), replace(SHORT, iterations=1, more=0)
    first = start()
    near = refine(model, first, "heun", SHORT).grid
    worse = Grid(np.append(np.geomspace(20.0, 0.001, 5), 0.0))
    drawn = draw_noises(model, config, 20.0)
    result = refine(model, first, "heun", config, noises=drawn, others={"worse": worse, "near": near})
    total = {name: sum(errors_of(model, grid, part, "heun").sum() for part in drawn[:2])
             for name, grid in {"given": first, "worse": worse, "near": near}.items()}
    assert result.start == min(total, key=total.get) == "near" and max(total, key=total.get) == "worse"
    assert result.history[0]["held"] == pytest.approx(errors_of(model, near, drawn.held, "heun").mean(), rel=1e-9)
    assert result.error_before.mean == pytest.approx(errors_of(model, first, drawn.held, "heun").mean(), rel=1e-9)
    assert result.record()["start"] == "near"
    alone = refine(model, first, "heun", config, noises=drawn, others={"worse": worse})
    assert alone.start == "given" and alone.grid == refine(model, first, "heun", config, noises=drawn).grid
    runs = 10 * 9  # of all noises over five steps
    assert alone.evaluations - refine(model, first, "heun", config, noises=drawn).evaluations == runs


def test_noises_held_out_may_refuse_a_start(monkeypatch):
    """The better start over all noises, of which those held out are at their best on the given grid."""
    model, first = mixture(), start()
    near, drawn = refine(model, first, "heun", SHORT).grid, draw_noises(model, SHORT, 20.0)
    ends = sample(model, drawn.held.latents, first, "heun")
    shifted = drawn._replace(held=drawn.held._replace(ends=ends + 0.01 * (ends - drawn.held.ends)))
    go = lambda: refine(model, first, "heun", SHORT, noises=shifted, others={"near": near})
    errors = {grid: [errors_of(model, grid, part, "heun") for part in shifted[:2]] for grid in (first, near)}
    assert errors[near][1].mean() > errors[first][1].mean()
    result = go()
    assert result.start == "given" and result.error_after.mean <= result.error_before.mean
    monkeypatch.setattr(refine_module, "better", lambda before, after: True)  # a twin that does not ask them
    least = min((first, near), key=lambda grid: sum(each.sum() for each in errors[grid]))
    assert go().start == ("near" if least is near else "given") == "near"


def test_a_grid_between_is_returned_where_the_best_step_is_refused(images, monkeypatch):
    """Few paths that end on another image outweigh what most gain: half the way may be better for all."""
    given, config = grid_of(3), replace(TAILS, seed=4)
    drawn = draw_noises(images, config, TOP)
    result = refine(images, given, "dpmpp2m", config, noises=drawn)
    assert result.share in refine_module.BETWEEN
    before, after = (errors_of(images, grid, drawn.held, "dpmpp2m") for grid in (given, result.grid))
    assert better(before, after) and tuple(result.error_after)[0] == pytest.approx(after.mean(), rel=1e-9)
    with monkeypatch.context() as patch:
        patch.setattr(refine_module, "BETWEEN", ())
        assert refine(images, given, "dpmpp2m", config, noises=drawn).grid == given
    monkeypatch.setattr(refine_module, "better", lambda before, after: after.mean() <= before.mean())
    careless = refine(images, given, "dpmpp2m", config, noises=drawn)  # the step itself
    assert careless.share == 1 and not better(before, errors_of(images, careless.grid, drawn.held, "dpmpp2m"))
    step, found = (np.log(grid.values[1:-1] / given.values[1:-1]) for grid in (careless.grid, result.grid))
    assert found / step == pytest.approx(result.share, rel=1e-6)


def test_between_is_between_the_given_grid_and_the_best_step(images, monkeypatch):
    """Also where another grid was the start; and the best of the three shares is taken, not the first."""
    given, config, asked = grid_of(3), replace(TAILS, seed=4), []
    drawn, original = draw_noises(images, config, TOP), refine_module._Refinement._settle

    def settle(self, train, held):
        asked.append((self.state.least.numpy(), self.state.best_total, held))
        original(self, train, held)

    monkeypatch.setattr(refine_module._Refinement, "_settle", settle)
    result = refine(images, given, "dpmpp2m", config, noises=drawn, others={"other": grid_of(3, 0.3)})
    assert result.start == "other" and result.share < 1
    (least, before, _), top = asked[0], given.values[0]
    inner = lambda share: np.exp((1 - share) * np.log(given.values[1:-1]) + share * np.log(least[1:-1]))
    found = {share: Grid([top, *inner(share), 0.0]) for share in refine_module.BETWEEN}
    np.testing.assert_allclose(result.grid.values, found[result.share].values, rtol=1e-9)
    errors = {share: [errors_of(images, grid, part, "dpmpp2m") for part in drawn[:2]] for share, grid in found.items()}
    first = errors_of(images, given, drawn.held, "dpmpp2m")
    total = {share: a.sum() + b.sum() for share, (a, b) in errors.items() if better(first, b)}
    assert result.share == min(total, key=total.get) and total[result.share] < before


def test_counts_hold_when_noises_are_shared_only_before_or_after_a_stop(tmp_path):
    """Exact ends count in the run that draws them, whatever the other run was given."""
    model, state = mixture(), tmp_path / "state"
    drawn = draw_noises(model, SHORT, 20.0)
    whole, given = refine(model, start(), "heun", SHORT), refine(model, start(), "heun", SHORT, noises=drawn)
    assert whole.evaluations - given.evaluations == drawn.evaluations and whole.grid == given.grid
    for first, second, expected in ((None, drawn, whole), (drawn, None, whole), (drawn, drawn, given)):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(refine_module._Refinement, "_settle", lambda *a: (_ for _ in ()).throw(Killed()))
            refine(model, start(), "heun", SHORT, checkpoint=state, noises=first)
        before = model.evaluations
        again = refine(model, start(), "heun", SHORT, checkpoint=state, noises=second, resume=True)
        assert (again.evaluations, again.grid) == (expected.evaluations, whole.grid)
        assert model.evaluations - before == (drawn.evaluations if (first, second) == (drawn, None) else 0)
        state.unlink()


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_starts_and_what_lies_between(images, size):
    config, seeded = replace(TAILS, seed=4), RefineConfig(seed=3, noises=4, held=4, batch=2, iterations=2, more=0)

    def work(world):
        result = refine(clusters(), grid_of(3), "dpmpp2m", config, world=world, others={"other": grid_of(3, 0.3)})
        model = GaussianDenoiser(0.0, 0.25, (1, 2, 2), sigma_max=TOP)
        found = refined_grids(model, {3: grid_of(3)}, "heun", seeded, lambda *told: None, world=world)[3]
        return [(one.grid.values.tobytes(), one.start, one.share, one.evaluations) for one in (result, found)]

    store, barrier, box = HashStore(), threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        every = list(pool.map(lambda rank: work(Threads(rank, size, store, barrier, box)), range(size)))
    assert every == [work(ALONE)] * size and every[0][0][2] < 1


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp2m", "ipndm"])
@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_returned_that_noises_held_out_find_worse(images, solver, seed):
    given, config = grid_of(4), replace(TAILS, seed=seed)
    drawn = draw_noises(images, config, TOP)
    result = refine(images, given, solver, config, noises=drawn, others={"other": grid_of(4, 0.5)})
    before, after = (errors_of(images, grid, drawn.held, solver) for grid in (given, result.grid))
    assert result.grid == given or better(before, after)
    assert result.error_after.mean == pytest.approx(after.mean(), rel=1e-9)


def test_a_kill_while_it_looks_between_loses_nothing(images, tmp_path, monkeypatch):
    config, original, settled = replace(TAILS, seed=4), refine_module._Refinement._settle, []
    go = lambda **more: refine(images, grid_of(3), "dpmpp2m", config, others={"other": grid_of(3, 1.0)}, **more)
    whole = go()

    def kill(self, *arguments):
        settled.append(1)
        with monkeypatch.context() as patch:
            patch.setattr(Travel, "run", lambda *a: (_ for _ in ()).throw(Killed()))
            original(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(refine_module._Refinement, "_settle", kill)
        go(checkpoint=tmp_path / "state")
    again = go(checkpoint=tmp_path / "state", resume=True)
    assert settled and again.grid.values.tobytes() == whole.grid.values.tobytes() and whole.share < 1
    assert (again.share, again.start, again.evaluations) == (whole.share, whole.start, whole.evaluations)
    before = images.evaluations
    assert go(checkpoint=tmp_path / "state", resume=True).grid == whole.grid and images.evaluations == before


def test_a_start_of_another_kind_is_refused():
    for other in (start(4), Grid([10.0, 3.0, 1.0, 0.3, 0.1, 0.0])):
        with pytest.raises(ValueError, match="in the grid other, expected 5 from 20, .* leave it out"):
            refine(mixture(), start(), "heun", SHORT, others={"other": other})
    with pytest.raises(ValueError, match="of the name 'given'.*use another name"):
        refine(mixture(), start(), "heun", SHORT, others={"given": start()})


class High(GaussianDenoiser):
    sigma_limits = (0.4, TOP)


def test_the_other_clock_is_that_of_the_solver_s_own_errors(tmp_path):
    """Measured once for all K, counted, kept for a run that is resumed."""
    model, costs = GaussianDenoiser(0.0, 0.25, (1, 2, 2), sigma_max=TOP), []
    config = RefineConfig(noises=4, held=4, batch=8, iterations=2, more=0)
    count = lambda stage, began, evaluations: costs.append((stage, evaluations))
    states = {k: tmp_path / f"{k}.ckpt" for k in (3, 5)}
    grids = {k: grid_of(k) for k in states}
    before = model.evaluations
    found = refined_grids(model, grids, "heun", config, count, "it", states)
    assert sum(evaluations for _, evaluations in costs) == model.evaluations - before
    assert [stage for stage, _ in costs] == ["start", "ends", "refine", "refine"]
    own = train(model, TrainConfig(method="direct", solver="heun")).profile
    noises = draw_noises(model, config, TOP)
    for k, grid in grids.items():
        other = starts(model, own, k)
        np.testing.assert_allclose(other[OWN].values, own.direct(k).values)
        alone = refine(model, grid, "heun", config, noises=noises, others=other)
        assert found[k].grid == alone.grid and found[k].start == alone.start
    assert {found[3].start, refine(model, grids[3], "heun", config, noises=noises).start} == {OWN, "given"}
    assert sorted(os.listdir(tmp_path)) == ["3.ckpt", "3.ckpt.start", "5.ckpt"]
    assert start_state(states[3]).name == "3.ckpt.start"
    before = model.evaluations
    again = refined_grids(model, grids, "heun", config, count, "it", states, resume=True)
    assert model.evaluations - before == noises.evaluations  # several K share them, and they are drawn again
    assert all(again[k].grid == found[k].grid for k in grids)
    plain = refined_grids(model, {3: grids[3]}, "heun", config, count, own_clock=False)
    assert plain[3].start == "given" and costs[-1][0] == "refine" and costs[-2][0] == "refine"
    assert starts(High(0.0, 0.25, (1, 2, 2), sigma_max=TOP), own, 18) == {}  # no such low levels
    assert torch.equal(torch.tensor(starts(model, own, 1)[OWN].values), torch.tensor([TOP, 0.0], dtype=torch.float64))
