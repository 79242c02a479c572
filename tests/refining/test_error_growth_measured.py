"""Measured growth: Gaussian data know every step's error and its growth in closed form; made-up errors cancel."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

from art_edm.grids.clocks import GaussianClock
from art_edm.learning.config import TrainConfig
from art_edm.learning.training import train
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.loading import load_network
from art_edm.refining import error_growth as growth_module
from art_edm.refining.config import better
from art_edm.refining.error_growth import (
    KNOTS,
    STEPS,
    Growth,
    _density,
    choose_growth,
    measure_growth,
    optimum_of,
    weighted,
)
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import RefineConfig
from art_edm.refining.solver_jacobian import Noises, Travel
from art_edm.runtime.distributed import ALONE
from art_edm.sampling.solvers import integrate, slope_of
from tests.support.refine_fields import SHORT, Rounded, Threads, mixture

S, TOP = 0.5, 80.0
CONFIG = RefineConfig(noises=8, held=8, batch=8)
MIDDLE = (np.arange(STEPS) + 0.5) / STEPS
CLOCK = GaussianClock(TOP, S)


def gaussian():
    return GaussianDenoiser(0.0, S**2, (1, 2, 2), sigma_max=TOP)


def travel(model, solver, count=4):
    latents = torch.randn(count, *model.img_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Travel(model, solver, Noises(latents, None, torch.zeros_like(latents)), batch=3)


def clock_levels(steps=STEPS):
    sigma = CLOCK.sigma(np.linspace(0, 1, 2 * steps + 1))
    return np.append(sigma[:-1:2], 0.0), sigma[1::2]


def euler_errors(levels, grow):
    """E of unit noise for Gaussian data: x = x_0 r, r = hypot(s, sigma) / s, dx/dsigma = sigma x / (s^2 + sigma^2)."""
    a, b = levels[:-1], levels[1:]
    state, after = TOP * np.hypot(S, a) / np.hypot(S, TOP), TOP * np.hypot(S, b) / np.hypot(S, TOP)
    local = state * (1 + (b - a) * a / (S**2 + a**2)) - after
    return local * (S / np.hypot(S, b) if grow else 1.0)


@pytest.mark.parametrize("grow, agrees", [(True, True), (False, False)])
def test_euler_s_errors_of_gaussian_data_grow_as_theory_says(grow, agrees):
    job = travel(gaussian(), "euler")
    levels, middles = clock_levels()
    gram = job.grown(levels, middles)
    expected = euler_errors(levels, grow)
    square = job.noises.latents.square().mean((1, 2, 3)).numpy()
    expected = np.outer(expected, expected) * square[:, None, None]
    assert (np.abs(gram / expected - 1).max() < 0.07) == agrees  # the first step, from 80 to 23: 3 % in E
    assert np.abs(gram / gram.transpose(0, 2, 1) - 1).max() < 1e-9


@pytest.mark.parametrize("solver", ["heun", "dpmpp2m", "ipndm"])
def test_a_step_s_error_is_followed_to_the_end(solver):
    """Against a fine solution from where the step ends; what a multistep solver remembers lies on the exact path."""
    model, (levels, middles) = mixture(), (np.append(np.geomspace(20, 0.02, 24), 0.0),) * 2
    middles = np.append(np.sqrt(levels[:-2] * levels[1:-1]), 0.01)
    job, slope = travel(model, solver), slope_of(model)
    gram = job.grown(levels, middles)
    x, states = model.initial(job.noises.latents, 20.0), []
    between = lambda a, b: torch.tensor(np.append(np.geomspace(a, b, 9) if b else np.geomspace(a, a / 200, 30),
                                                  [] if b else 0.0))
    for a, b in zip(levels, levels[1:]):
        states.append(x)
        x, _ = integrate(slope, x, between(a, b), "rk4")
    for k in (6, 12, 18):
        past = ()
        for j in range(k - 3, k):
            _, past = integrate(slope, states[j], torch.tensor(levels), solver, past, steps=[j])
        end, _ = integrate(slope, states[k], torch.tensor(levels), solver, past, steps=[k])
        for a, b in zip(levels[k + 1 :], levels[k + 2 :]):
            end, _ = integrate(slope, end, between(a, b), "rk4")
        assert gram[:, k, k] ** 0.5 == pytest.approx((end - x).square().mean((1, 2, 3)).sqrt().numpy(), rel=0.1)


def test_the_density_of_gaussian_data_is_w_to_the_half():
    """For Euler's errors, all of one sign, the best density is the clock's times w^(1/2)."""
    model = gaussian()
    growth = measure_growth(model, CLOCK.sigma, "euler", draw_noises(model, CONFIG, TOP), CONFIG.batch)
    found, expected = growth.grid(CLOCK.sigma, 12).values, weighted(CLOCK.sigma, 1.0, S, 12).values
    plain = weighted(CLOCK.sigma, 0.0, S, 12).values
    off = lambda levels: np.abs(np.log(levels[1:-1] / expected[1:-1]))
    assert off(found).max() < 0.25 and off(found)[2:].max() < 0.06 and off(plain).min() > 0.4
    assert abs(growth.log_density.mean()) < 1e-12


def rank_one(errors):
    return np.outer(errors, errors)[None]


def test_errors_of_one_sign_ask_for_the_root_of_their_size():
    """min sum E_k / rho_k at a given mean of rho: rho ~ sqrt(E), here a line between knots in the logarithm."""
    size = np.exp(1.2 * MIDDLE)
    found = np.interp(MIDDLE, np.linspace(0, 1, KNOTS), _density(rank_one(size), np.ones(STEPS)))
    assert np.polyfit(MIDDLE, found, 1)[0] == pytest.approx(0.6, rel=0.15)
    second = np.interp(MIDDLE, np.linspace(0, 1, KNOTS), _density(rank_one(size), np.full(STEPS, 2.0)))
    assert np.polyfit(MIDDLE, second, 1)[0] == pytest.approx(0.4, rel=0.15)  # E^(1 / (p + 1))


def test_errors_that_cancel_count_for_nothing():
    """The first ten errors cancel between neighbours, whatever their size: the steps belong to the other eight."""
    early, late = np.arange(STEPS) < 10, np.arange(KNOTS) > 2
    noises = [np.where(early, size * (-1.0) ** np.arange(STEPS), 1.0) for size in (5.0, -5.0)]
    signs = _density(np.concatenate([rank_one(errors) for errors in noises]), np.ones(STEPS))
    sizes = _density(rank_one(np.abs(noises[0])), np.ones(STEPS))
    assert signs[late].mean() > signs[~late].mean() and sizes[late].mean() < sizes[~late].mean() - 0.5


def test_what_was_measured_is_taken_where_it_serves_the_solver_best():
    """iPNDM in the 1-D example; and not where it is worse than the powers of w, or than nothing."""
    model = load_network("oned").denoiser
    clock = optimum_of(train(model, TrainConfig(method="direct")).profile)
    noises, plain = draw_noises(model, RefineConfig(), model.sigma_max), weighted(clock, 0.0, model.sigma_data, 7)
    growth = measure_growth(model, clock, "ipndm", noises, 16)
    choose = lambda growth: choose_growth(model, clock, plain, "ipndm", noises, 16, growth=growth)
    found, powers = choose(growth), choose(None)
    assert found.beta is None and found.grid == growth.grid(clock, 7) and found.record()["beta"] is None
    assert found.error_measured == found.error_after
    assert found.error_after.mean < 0.8 * powers.error_after.mean <= 0.8 * powers.error_before.mean
    wrong = choose(Growth(-growth.log_density, 0, 0.0))
    assert wrong.beta == powers.beta and wrong.grid == powers.grid
    assert wrong.error_measured.mean > wrong.error_before.mean


@pytest.mark.parametrize("factor, taken", [
    (np.full(16, 0.9), True), (np.full(16, 1.1), False),
    (np.append(np.full(15, 0.5), 2.5), False),  # most gain, and the mean: one loses more, in the mean square
    (np.append(np.full(15, 1.2), 0.1), False),  # one gains, and the mean and the mean square: most lose
])
def test_few_noises_decide_nothing(factor, taken):
    """Errors of the plain grid, the last of them four times as large, and the same times `factor`."""
    before = np.append(np.full(15, 1.0), 4.0 if factor[-1] < 1 else 2.0)
    assert better(before, before * factor, 0.02) == taken
    assert taken or factor[0] == factor[-1] or before.mean() > (before * factor).mean()


def test_the_mean_square_may_rise_by_the_slack_alone():
    before, after = np.full(16, 1.0), np.append(np.full(15, 0.7), 2.95)
    assert after.mean() < 1 and 1.0 < np.square(after).mean() < 1.01
    assert better(before, after, 0.02) and not better(before, after)


def test_a_measured_density_that_serves_few_noises_is_left(monkeypatch):
    model, plain = gaussian(), weighted(CLOCK.sigma, 0.0, S, 5)
    noises = draw_noises(model, CONFIG, TOP)
    growth = measure_growth(model, CLOCK.sigma, "dpmpp2m", noises, CONFIG.batch)
    choose = lambda: choose_growth(model, CLOCK.sigma, plain, "dpmpp2m", noises, 8, growth=growth)
    assert choose().error_measured.mean < choose().error_before.mean
    monkeypatch.setattr(growth_module, "_search", lambda error: None)  # no beta in its way
    assert choose().beta is None
    monkeypatch.setattr(growth_module, "better", lambda *errors: False)
    assert choose().beta == 0.0 and choose().grid == plain


def test_a_model_without_low_levels_is_measured_in_fewer_steps():
    class High(GaussianDenoiser):
        sigma_limits = (0.4, TOP)

    model = High(0.0, S**2, (1, 2, 2), sigma_max=TOP, sigma_min=0.4)
    noises, seen = draw_noises(gaussian(), CONFIG, TOP), []
    original = Travel.grown
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Travel, "grown", lambda self, levels, middles: seen.append(levels) or original(
            self, levels, middles))
        growth = measure_growth(model, CLOCK.sigma, "euler", noises, CONFIG.batch)
    assert len(growth.log_density) == KNOTS and 3 < len(seen[0]) - 1 < STEPS
    assert seen[0][-2] >= 0.4 and (np.diff(seen[0]) < 0).all()
    fewer = len(seen[0]) - 1
    assert CLOCK.sigma(np.array([1 - 2 / (fewer + 1)]))[0] < 0.4 < CLOCK.sigma(np.array([1 - 2 / fewer]))[0]


def test_every_evaluation_is_counted_and_processes_share_the_noises():
    def work(world):
        model = Rounded()
        sigma_of = GaussianClock(20.0, model.sigma_data).sigma
        noises = draw_noises(model, SHORT, 20.0, world=world)
        before = model.evaluations
        found = measure_growth(model, sigma_of, "heun", noises, SHORT.batch, world=world)
        return found.log_density.tobytes(), found.evaluations, model.evaluations - before

    store, barrier, box = HashStore(), threading.Barrier(2), [None] * 2
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda rank: work(Threads(rank, 2, store, barrier, box)), range(2)))
    alone = work(ALONE)
    assert [each[:2] for each in both] == [alone[:2]] * 2
    assert alone[1] == alone[2] == both[0][2] + both[1][2] <= 10 * STEPS * (STEPS + 12)
