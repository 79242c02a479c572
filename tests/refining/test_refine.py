"""Refined grids: the known best one is reached, every solver gains, and nothing is worse than the start."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid, edm, uniform
from art_edm.measure.field import rms
from art_edm.metrics.end_point import better
from art_edm.models.analytic import one_dimensional
from art_edm.refining import levenberg_marquardt as descent
from art_edm.refining.config import RefineConfig
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import refine
from art_edm.runtime.context import Context
from art_edm.sampling.solvers import SOLVERS, sample
from tests.support.refine_fields import SHORT, mixture, pairs, start

LINE = RefineConfig(noises=4, validation=4, fine_steps=60, iterations=40, tolerance=1e-7, patience=10)


def best_euler(num_steps):
    """The grid of the least end error in the one-dimensional example: levels equidistant in arctan(sigma)."""
    return Grid(np.append(np.tan((1 - np.arange(num_steps) / num_steps) * np.arctan(3)), 0.0))


def end_error(grid):
    """|x_K - 1| from the path that ends at 1; all errors of Euler's method are multiples of it."""
    model = one_dimensional()
    return abs(float(sample(model, torch.ones(1, 1, 1, 1), grid, "euler")) - 1)


def art(num_steps, sigma_max):
    """ART's grid of the one-dimensional example."""
    return Grid(GaussianClock(sigma_max, 1.0).sigma(np.linspace(0, 1, num_steps + 1)))


@pytest.mark.parametrize("num_steps", [2, 5, 10])
@pytest.mark.parametrize("rule", [uniform, art])
def test_the_best_grid_of_the_one_dimensional_example_is_reached(num_steps, rule):
    grid = refine(one_dimensional(), rule(num_steps, 3.0), "euler", LINE, Context(batch=4)).grid
    best = best_euler(num_steps)
    assert end_error(best) <= end_error(grid) < 1.001 * end_error(best)
    assert grid.values == pytest.approx(best.values, rel=0.1)
    assert end_error(rule(num_steps, 3.0)) > 1.01 * end_error(best)


def test_uphill_nothing_is_won(monkeypatch):
    original = descent.proposal
    monkeypatch.setattr(descent, "proposal", lambda *a: (-original(*a)[0], original(*a)[1]))
    first = uniform(5, 3.0)
    result = refine(one_dimensional(), first, "euler", LINE, Context(batch=4))
    assert result.grid == first and result.error_after == result.error_before
    assert len(result.history) == 1  # no step was accepted


def trained(iterations):
    """The least mean error of ten steps of Adams-Bashforth on a mixture after so many iterations."""
    model = mixture()
    first = Grid(GaussianClock(20.0, model.sigma_data).sigma(np.linspace(0, 1, 11)))
    config = RefineConfig(noises=16, validation=1, iterations=iterations, cheap_iterations=0, patience=99, tolerance=0)
    return refine(model, first, "ab4-sigma", config).history[-1]["train"]


def test_without_the_secant_it_is_slower(monkeypatch):
    learned = trained(6)
    monkeypatch.setattr(descent, "secant", lambda S, H, step, change: S)
    assert learned < 0.96 * trained(6)


@pytest.mark.slow
def test_without_reweighting_the_least_mean_error_is_not_found(monkeypatch):
    original, best = descent.model, trained(12)
    monkeypatch.setattr(descent, "model", lambda errors, *a: original(np.full_like(errors, errors.mean()), *a))
    assert best < 0.99 * trained(12)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_gains_on_fresh_noises(solver):
    model, first = mixture(), start()
    result = refine(model, first, solver, replace(SHORT, noises=8, validation=8, iterations=6, cheap_iterations=6),
                    Context(batch=8))
    latents = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    fine = sample(model, latents, edm(80, 0.01, 20.0), "rk4")
    before, after = (float(rms(sample(model, latents, grid, solver) - fine).mean()) for grid in (first, result.grid))
    assert after < 0.97 * before
    trained = [row["train"] for row in result.history]
    assert all(b < a for a, b in zip(trained, trained[1:])) and len(trained) > 2
    allowed = [row for row in result.history if row["validation"] <= result.error_before.mean]
    assert result.error_after.mean == min(allowed, key=lambda row: row["validation"] + row["train"])["validation"]


def test_the_grid_that_validation_prefers_is_returned(monkeypatch):
    """Noises of which those of validation are at their best from the start: nothing else may be returned."""
    model, config = mixture(), replace(SHORT, patience=2)
    drawn, first = draw_noises(model, config, 20.0, pairs()), start()
    with torch.no_grad():
        ends = sample(model, drawn.validation.latents, first, "heun")
    drawn = drawn._replace(validation=drawn.validation._replace(ends=ends))
    result = refine(model, first, "heun", config, pairs(), drawn)
    assert result.grid == first and result.error_after == (0, 0, 0, 0, 0)
    assert len(result.history) == 3  # the start, and the patience


def test_figures_are_those_of_the_validation_noises():
    model, drawn = mixture(), draw_noises(mixture(), SHORT, 20.0, pairs())
    result = refine(model, start(), "heun", SHORT, pairs(), drawn)
    each = rms(sample(model, drawn.validation.latents, result.grid, "heun") - drawn.validation.ends).numpy()
    square = np.square(each)
    rms_error = np.sqrt(square.mean())
    expected = (rms_error, square.std(ddof=1) / 4 / rms_error, each.mean(), each.std(ddof=1) / 2, np.median(each))
    assert tuple(result.error_after) == pytest.approx(expected, rel=1e-9)


def test_better_asks_mean_geometric_mean_and_mean_square():
    """Each alone refuses; the floor of the geometric mean is a hundredth of the mean error."""
    before = np.array([1.0, 2.0, 4.0, 8.0])
    assert better(before, 0.99 * before) and not better(before, before) and not better(before, 1.01 * before)
    most_worse = np.array([1.5, 3.0, 5.0, 4.0])  # mean 3.4 < 3.75, mean square 15 < 21, geometric mean 3.1 > 2.8
    assert most_worse.mean() < before.mean() and np.square(most_worse).mean() < np.square(before).mean()
    assert not better(before, most_worse)
    one_worse = np.array([0.1, 0.5, 2.0, 9.5])  # mean 3.03, geometric mean 0.98, mean square 23.6
    assert one_worse.mean() < before.mean() and not better(before, one_worse)
    mean_worse = np.array([0.01, 4.0, 4.9, 6.2])  # mean 3.78, geometric mean 1.46, mean square 19.6
    assert not better(before, mean_worse)
    tiny = np.array([1e-9, 2.1, 4.1, 7.5])  # without a floor one error of nothing would outweigh all others
    assert np.exp(np.log(tiny).mean()) < 0.1 and not better(np.array([0.03, 2.0, 4.0, 8.0]), tiny)
    assert better(np.array([0.06, 2.0, 4.0, 8.0]), tiny)  # the twin: above the floor it counts
