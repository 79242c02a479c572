"""The end-point objective: Gaussian data know the growth of errors in closed form, and the solver finds it."""

from __future__ import annotations

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch.distributed import HashStore

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining.error_growth import choose_growth, optimum_of, remaining, weighted
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import RefineConfig
from art_edm.runtime.distributed import ALONE
from art_edm.runtime.errors import Stopped
from art_edm.sampling.solvers import integrate, sample, slope_of
from tests.support.refine_fields import SHORT, Rounded, Threads

S, TOP = 0.5, 80.0
CONFIG = RefineConfig(noises=8, held=8, batch=8)


def art(tau):
    """The clock of density (s^2 + sigma^2)^(-3/4), ART's optimum for Gaussian data."""
    return GaussianClock(TOP, S).sigma(tau)


def asinh(tau):
    """The clock of density (s^2 + sigma^2)^(-1/2)."""
    return S * np.sinh((1 - np.asarray(tau)) * np.arcsinh(TOP / S))


def gaussian():
    return GaussianDenoiser(0.0, S**2, (1, 2, 2), sigma_max=TOP)


def chosen(solver, steps, sigma_of=art, model=None, noises=None, **more):
    model = model or gaussian()
    noises = noises or draw_noises(model, CONFIG, TOP)
    plain = weighted(sigma_of, 0.0, model.sigma_data, steps)
    return choose_growth(model, sigma_of, plain, solver, noises, CONFIG.batch, **more)


def test_an_error_of_gaussian_data_shrinks_by_w():
    """The end of the exact path moves by w times what its state is moved by: x_0 = x / sqrt(1 + (sigma / s)^2)."""
    fine = torch.tensor(np.append(3.0 * np.linspace(1, 0.01, 400) ** 3, 0.0))
    states = [torch.full((1, 1, 2, 2), value, dtype=torch.float64) for value in (0.0, 0.1)]
    ends = [integrate(slope_of(gaussian()), x, fine, "rk4")[0] for x in states]
    assert float((ends[1] - ends[0]).mean() / 0.1) == pytest.approx(float(remaining(3.0, S)), rel=1e-4)


@pytest.mark.parametrize("beta, agrees", [(1.0, True), (-1.0, False), (0.5, False)])
def test_a_density_becomes_another(beta, agrees):
    """(s^2 + sigma^2)^(-1/2) times w^(1/2) is the density of the Gaussian clock."""
    levels, expected = weighted(asinh, beta, S, 12).values, art(np.arange(13) / 12)
    assert np.allclose(levels, expected, rtol=1e-5, atol=1e-9) == agrees


def test_without_a_weight_the_clock_is_read_off():
    assert weighted(art, 0.0, S, 7).values == pytest.approx(art(np.arange(8) / 7), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("steps", [10, 40])
def test_euler_s_errors_of_gaussian_data_add_up_with_their_growth(steps):
    """The best beta is 1, and the gain is what two quadratures say: (int sqrt(q w))^2 / (int sqrt(q) int sqrt(q) w)."""
    found = chosen("euler", steps)
    assert found.beta == pytest.approx(1.0, abs=0.06)

    def integral(power):
        return quad(lambda t: (S**2 + np.exp(2 * t)) ** power * np.exp(t), -20, np.log(TOP), limit=200)[0]

    # sqrt(q) = (s^2 + sigma^2)^(-3/4), w = (s^2 + sigma^2)^(-1/2) but for constants
    gain = integral(-1.0) ** 2 / (integral(-0.75) * integral(-1.25))
    assert found.error_after.mean / found.error_before.mean == pytest.approx(gain, rel=0.02)
    assert gain < 0.86


def test_the_wrong_sign_is_worse():
    found = chosen("euler", 10)
    assert found.tried[-0.8] > 1.3 * found.tried[0.0] > 1.3 * found.tried[0.8]


@pytest.mark.parametrize("solver", ["heun", "rk4", "dpmpp2m", "ipndm"])
@pytest.mark.parametrize("steps", [3, 7])
def test_every_solver_gains(solver, steps):
    found = chosen(solver, steps)
    assert found.error_after.mean < 0.9 * found.error_before.mean
    other = torch.randn(32, 1, 2, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    exact = other * TOP * S / np.hypot(TOP, S)
    errors = [float((sample(gaussian(), other, grid, solver) - exact).square().mean())
              for grid in (found.grid, weighted(art, 0.0, S, steps))]
    assert errors[0] < 0.81 * errors[1]


def ends_at(noises, ends_of):
    return noises._replace(**{name: part._replace(ends=ends_of(part)) for name, part in noises._asdict().items()
                              if name != "evaluations"})


def test_a_gain_that_may_be_chance_is_none():
    """Ends anywhere about where the plain grid ends: some beta seems better, by less than it could by chance."""
    noises, plain = draw_noises(gaussian(), CONFIG, TOP), weighted(art, 0.0, S, 5)
    generator = torch.Generator().manual_seed(2)

    def scattered(part):
        ends = sample(gaussian(), part.latents, plain, "euler")
        return ends + 0.3 * torch.randn(ends.shape, generator=generator, dtype=torch.float64)

    found = chosen("euler", 5, noises=ends_at(noises, scattered))
    assert found.beta == 0.0 and found.grid == plain and found.error_after == found.error_before
    assert min(found.tried, key=found.tried.get) != 0.0
    assert chosen("euler", 5, noises=noises).beta != 0.0


def test_one_step_leaves_nothing_to_choose():
    found = chosen("heun", 1)
    assert found.beta == 0.0 and list(found.tried) == [0.0] and found.grid.values.tolist() == [TOP, 0.0]


def test_the_optimum_of_a_profile_is_its_direct_grid():
    sigma = np.geomspace(TOP, 1e-3, 60)
    profile = Profile(GaussianClock(TOP, S), sigma, (S**2 + sigma**2)[None] ** -1.5, 0, 0.0)
    assert weighted(optimum_of(profile), 0.0, S, 9).values == pytest.approx(profile.direct(9).values, rel=1e-5)


def test_every_evaluation_is_counted():
    model = gaussian()
    noises = draw_noises(model, CONFIG, TOP)
    before = model.evaluations
    found = chosen("heun", 4, model=model, noises=noises)
    assert found.evaluations == model.evaluations - before
    assert found.evaluations == 7 * 16 * len(found.tried)


def test_levels_that_a_model_cannot_tell_apart_are_passed_over():
    """A model of discrete levels: what rounds two of them into one is no candidate."""

    class Discrete(GaussianDenoiser):
        def round_sigma(self, sigma):
            return torch.exp(torch.round(torch.log(sigma)))

    model = Discrete(0.0, S**2, (1, 2, 2), sigma_min=1e-3, sigma_max=float(np.exp(4.0)))
    noises = draw_noises(gaussian(), CONFIG, float(np.exp(4.0)))
    sigma_of = GaussianClock(float(np.exp(4.0)), S).sigma
    plain = Grid(np.append(np.exp([4.0, 1.0, 0.0, -1.0, -2.0]), 0.0))
    found = choose_growth(model, sigma_of, plain, "heun", noises, 8)
    assert np.inf in found.tried.values()
    assert "Infinity" not in json.dumps(found.record()) and len(found.record()["tried"]) < len(found.tried)
    assert np.isfinite(found.error_after.mean) and found.error_after.mean <= found.error_before.mean


def test_processes_share_the_noises():
    def work(world):
        model = Rounded()
        sigma_of = GaussianClock(20.0, model.sigma_data).sigma
        plain = weighted(sigma_of, 0.0, model.sigma_data, 4)
        noises = draw_noises(model, SHORT, 20.0, world=world)
        found = choose_growth(model, sigma_of, plain, "heun", noises, SHORT.batch, world=world)
        return found.grid.values.tobytes(), found.tried, found.evaluations

    store, barrier, box = HashStore(), threading.Barrier(2), [None] * 2
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda rank: work(Threads(rank, 2, store, barrier, box)), range(2)))
    assert both == [work(ALONE)] * 2


def test_asked_to_stop_it_stops(monkeypatch):
    noises, original = draw_noises(gaussian(), CONFIG, TOP), GaussianDenoiser.denoise

    def interrupt(self, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *args)

    monkeypatch.setattr(GaussianDenoiser, "denoise", interrupt)
    with pytest.raises(Stopped, match="end-point objective"):
        chosen("heun", 4, noises=noises)
