"""The end-point objective as a whole: what few noises chose, others confirm or refute."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid
from art_edm.measure.field import rms
from art_edm.models.analytic import EmpiricalDenoiser, GaussianDenoiser
from art_edm.refining import endpoint_objective as endpoint_module
from art_edm.refining.config import EndError
from art_edm.refining.endpoint_objective import confirm, draw_apart, end_point_grids
from art_edm.refining.error_growth import Weighted, choose_growth, measure_growth, weighted
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import RefineConfig
from art_edm.runtime.distributed import ALONE
from art_edm.sampling.solvers import sample
from tests.support.refine_fields import SHORT, Threads, clusters

S, TOP, STEPS = 0.5, 80.0, 5
CONFIG = RefineConfig(noises=6, held=6, batch=8)
CLOCK = GaussianClock(TOP, S)


@pytest.fixture(scope="module")
def images() -> EmpiricalDenoiser:
    return clusters()


def gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, S**2, (1, 2, 2), sigma_max=TOP)


def plain_of(steps: int = STEPS) -> Grid:
    return weighted(CLOCK.sigma, 0.0, S, steps)


def pretended(grid: Grid, beta: "float | None" = 0.7) -> Weighted:
    """A choice that was not made."""
    some = EndError(0.5, 0.1, 0.5)
    return Weighted(grid, beta, some, None, EndError(0.4, 0.1, 0.4), {}, 100, 1.0, "heun")


def errors_of(model, grid: Grid, noises) -> np.ndarray:
    """RMS errors over all noises, by sampling and not by `Travel`."""
    latents, ends = (torch.cat([getattr(part, name) for part in noises[:2]]) for name in ("latents", "ends"))
    return rms(sample(model, latents, grid, "heun") - ends).numpy()


def test_the_noises_apart_are_many_and_others(images):
    config = RefineConfig(noises=6, held=4, batch=8)
    first, apart = draw_noises(images, config, TOP), draw_apart(images, config, TOP)
    assert [len(part.latents) for part in apart[:2]] == [18, 12]
    every = torch.cat([first.train.latents, first.held.latents, apart.train.latents, apart.held.latents]).flatten(1)
    assert len(torch.unique(every, dim=0)) == 40
    again, other = draw_apart(images, config, TOP), draw_apart(images, RefineConfig(seed=1, noises=6, held=4), TOP)
    assert torch.equal(again.train.ends, apart.train.ends)
    assert not torch.equal(other.train.latents, apart.train.latents)
    one = draw_apart(gaussian(), config, TOP)  # of exact paths: x_0 = x s / sqrt(s^2 + sigma_max^2)
    expected = one.train.latents * TOP * S / np.hypot(S, TOP)
    torch.testing.assert_close(one.train.ends, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("better_grid", [True, False])
def test_noises_apart_confirm_a_better_grid_and_refute_a_worse_one(images, better_grid):
    apart = draw_apart(images, CONFIG, TOP)
    grids = [plain_of(), weighted(CLOCK.sigma, 1.0, S, STEPS)]  # steps where Gaussian data want them are bad here
    tried, plain = grids if better_grid else grids[::-1]
    before, after = (errors_of(images, grid, apart) for grid in (plain, tried))
    assert (after.mean() < 0.8 * before.mean()) == better_grid and len(before) == 36
    count = images.evaluations
    found = confirm(images, pretended(tried), plain, apart, 8)
    assert [each.mean for each in found.apart] == pytest.approx([before.mean(), after.mean()], rel=1e-9)
    assert found.evaluations - 100 == images.evaluations - count == 2 * 36 * (2 * STEPS - 1)
    assert found.refuted != better_grid
    np.testing.assert_array_equal(found.grid.values, (tried if better_grid else plain).values)
    assert (found.beta, found.error_after.mean) == ((0.7, 0.4) if better_grid else (0.0, 0.5))
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["noises_apart"]["refuted"] == (not better_grid)
    assert record["noises_apart"]["after"]["mean"] == pytest.approx(after.mean())
    assert record["weight"] == ("beta = 0.7" if better_grid else "beta = 0: other noises refute what seemed better")


def test_few_large_errors_refute_what_most_gain(images, monkeypatch):
    """The mean square decides with the mean: a twin that looks at the mean alone takes the grid."""
    plain, tried, apart = plain_of(), plain_of(STEPS + 1), draw_apart(images, CONFIG, TOP)
    rare = np.full(36, 0.2)
    rare[0] = 2.0
    runs = {len(plain.values): np.full(36, 0.3), len(tried.values): rare}

    class Told:
        evaluations = 0

        def __init__(self, denoiser, solver, noises, *more):
            self.part = slice(0, 18) if noises is apart.train else slice(18, 36)

        def run(self, levels, keep):
            return type("Run", (), {"errors": runs[len(levels)][self.part]})

    monkeypatch.setattr(endpoint_module, "Travel", Told)
    assert rare.mean() < 0.3 and np.square(rare).mean() > 1.02 * 0.3**2
    assert confirm(images, pretended(tried), plain, apart, 8).refuted
    monkeypatch.setattr(endpoint_module, "better", lambda before, after, slack: after.mean() < before.mean())
    assert not confirm(images, pretended(tried), plain, apart, 8).refuted


def test_the_plain_grid_needs_no_confirmation(images):
    found = pretended(plain_of(), beta=0.0)
    count = images.evaluations
    assert confirm(images, found, plain_of(), draw_apart(images, CONFIG, TOP), 8) is found
    assert images.evaluations - count == draw_apart(images, CONFIG, TOP).evaluations


def test_all_numbers_of_steps_share_one_measurement_and_one_confirmation():
    """As the parts by themselves; what is told of costs is all that was evaluated."""
    model, costs = gaussian(), []
    noises = draw_noises(model, CONFIG, TOP)
    grids, start = {k: plain_of(k) for k in (1, 3, 5)}, model.evaluations
    count = lambda stage, began, evaluations: costs.append((stage, evaluations))
    found = end_point_grids(model, CLOCK.sigma, grids, "euler", CONFIG, noises, count)
    assert sum(evaluations for _, evaluations in costs) == model.evaluations - start
    assert [stage for stage, _ in costs].count("ends") == 1 and found[1].beta == 0 and found[1].apart is None
    growth = measure_growth(model, CLOCK.sigma, "euler", noises, CONFIG.batch)
    for k in (3, 5):
        alone = choose_growth(model, CLOCK.sigma, grids[k], "euler", noises, CONFIG.batch, growth=growth)
        np.testing.assert_array_equal(found[k].grid.values, alone.grid.values)
        assert found[k].beta == alone.beta != 0 and not found[k].refuted
        assert found[k].apart[1].mean / found[k].apart[0].mean == pytest.approx(0.845, abs=0.02)  # Gaussian data
    few = end_point_grids(model, CLOCK.sigma, {1: grids[1]}, "euler", CONFIG, noises, count)
    assert few[1].beta == 0 and costs[-1][0] == "endpoint" and few[1].grid.num_steps == 1


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_noises_apart(size):
    """Choice, confirmation and costs are those of one process, to the byte."""

    def work(world):
        model, costs = gaussian(), []
        noises = draw_noises(model, SHORT, TOP, world=world)
        count = lambda stage, began, evaluations: costs.append((stage, evaluations))
        found = end_point_grids(model, CLOCK.sigma, {4: plain_of(4)}, "euler", SHORT, noises, count, world=world)[4]
        return found.grid.values.tobytes(), found.beta, found.apart, found.refuted, costs

    store, barrier, box = HashStore(), threading.Barrier(size), [None] * size
    with ThreadPoolExecutor(size) as pool:
        every = list(pool.map(lambda rank: work(Threads(rank, size, store, barrier, box)), range(size)))
    assert every == [work(ALONE)] * size
    assert every[0][1] != 0 and [stage for stage, _ in every[0][-1]].count("ends") == 1
