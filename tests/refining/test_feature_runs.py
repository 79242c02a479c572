"""Refinement by features: distance, gradient and optimum against closed forms; what is kept and recorded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from art_edm.grids.grid import Grid
from art_edm.metrics.detectors import Detector
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining import feature_runs
from art_edm.refining.feature_runs import FeatureRuns, feature_residuals
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.refine import refine, refine_grids
from art_edm.refining.solver_jacobian import Noises, Scheme
from art_edm.refining.stage import Stage
from art_edm.runtime.context import Context
from art_edm.runtime.store import Store
from tests.support.refine_fields import SHORT, mixture, pairs, start

VARIANCE = 0.03
TOP = (VARIANCE + 20.0**2) ** 0.5  # x / z at sigma = 20


class Linear(Detector):
    """Features W x of images of n pixels."""

    name, sha256, classes = "linear", "0" * 64, 0

    def __init__(self, pixels: int, dim: int, seed: int = 1) -> None:
        self.dim, self.W = dim, torch.randn(pixels, dim, generator=torch.Generator().manual_seed(seed)).double()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return (images.double() / 127.5 - 1).flatten(1) @ self.W


class Squares(Linear):
    """And their squares, so that errors do not only scale the features."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return super().features(images) ** 2 + super().features(images)


def gaussian() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, VARIANCE, (1, 2, 2), sigma_max=20.0)


def gain(levels: np.ndarray) -> float:
    """x_K / z of Euler's method on Gaussian data: f = x sigma / (v + sigma^2)."""
    sigma = np.asarray(levels)
    return TOP * np.prod(1 + np.diff(sigma) * sigma[:-1] / (VARIANCE + sigma[:-1] ** 2))


EXACT = VARIANCE**0.5


def runs_of(model, detector, solver="euler", config=SHORT, **context):
    noises = draw_noises(model, config, 20.0, pairs())
    return FeatureRuns(solver, noises.train, Stage(model, pairs(**context)), detector)


@pytest.mark.parametrize("noises, dim", [(5, 12), (12, 5), (40, 3), (2, 6)])
def test_the_mean_of_the_errors_is_the_frechet_distance(noises, dim):
    rng = np.random.default_rng(noises)
    exact = rng.normal(size=(noises, dim)) @ rng.normal(size=(dim, dim))
    features = exact + 0.4 * rng.normal(size=(noises, dim)) + 0.2
    features[:, 0] = exact[:, 0] = 0.0  # a feature that is never on
    shift, rest = feature_residuals(features, exact)
    whole = np.square(shift).sum() + np.square(rest).sum() / (noises - 1)
    assert whole == pytest.approx(frechet_distance(*moments(features), *moments(exact)), rel=1e-6)
    plain = np.square(shift).sum() + np.square(features - exact - shift).sum() / (noises - 1)
    assert noises == 2 or plain > 1.02 * whole  # twin: without Q it is the distance noise by noise
    assert max(np.abs(part).max() for part in feature_residuals(exact, exact)) < 1e-12


def test_distance_and_gradient_on_gaussian_data_in_closed_form():
    """F = G Z W with one gain G for all pixels, so that FD = (G - G*)^2 (|mean ZW|^2 + tr cov ZW)."""
    levels, detector = np.array([20.0, 3.0, 0.8, 0.3, 0.0]), Linear(4, 3)
    latents = torch.randn((6, 1, 2, 2), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    noises = Noises(latents, None, EXACT * latents)
    runs = FeatureRuns("euler", noises, Stage(gaussian(), pairs()), detector)
    run = runs.run(Scheme(levels))
    scale = (latents.flatten(1) @ detector.W).numpy()
    size = np.square(scale.mean(axis=0)).sum() + scale.var(axis=0, ddof=1).sum()
    assert run.errors.mean() == pytest.approx((gain(levels) - EXACT) ** 2 * size, rel=1e-4)
    gradient, H, scales = runs.model(run, np.eye(3), 5e-3, ())
    moves = 5e-3 * np.minimum(-np.diff(levels)[:-1], -np.diff(levels)[1:])
    slope = np.array([(gain(levels + move * e) - gain(levels)) / move for move, e in zip(moves, np.eye(5)[1:4])])
    np.testing.assert_allclose(gradient, 2 * (gain(levels) - EXACT) * slope * size, rtol=5e-3)
    np.testing.assert_allclose(H, 2 * np.outer(slope, slope) * size, rtol=1e-2)  # without G''
    assert (scales > 0).all() and scales.shape == (3,)


def distance_by_moments(runs, levels):
    figures = runs.run(Scheme(levels), False).figures[:, 1:]
    return frechet_distance(*moments(figures), *moments(runs.exact))


@pytest.mark.parametrize("solver", ["heun", "clock-denoised"])
def test_the_gradient_is_that_of_the_frechet_distance(monkeypatch, solver):
    """Against central differences of `frechet_distance`; the twin lacks Q."""
    runs = runs_of(mixture(), Squares(4, 5), solver, replace(SHORT, noises=12))
    levels = start(4).values.copy()
    run = runs.run(Scheme(levels))
    gradient = runs.model(run, np.eye(3), 1e-3, ())[0]
    expected = []
    for j in (1, 2, 3):
        step = np.zeros(5)
        step[j] = 2e-3 * levels[j]
        ends = [distance_by_moments(runs, levels + sign * step) for sign in (1, -1)]
        expected.append((ends[0] - ends[1]) / (2 * step[j]))
    np.testing.assert_allclose(gradient, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())

    def without(features, exact):
        shift = features.mean(axis=0) - exact.mean(axis=0)
        return shift, features - exact - shift

    monkeypatch.setattr(feature_runs, "feature_residuals", without)
    twin = runs.model(run, np.eye(3), 1e-3, ())[0]
    assert np.abs(twin - expected).max() > 0.05 * np.abs(expected).max()


def test_the_refined_level_is_the_optimum_of_the_closed_form():
    """Two Euler steps on Gaussian data: the gain's square error has its least where FD has."""
    config = replace(SHORT, noises=8, validation=8, iterations=20, cheap_iterations=20)
    noises = draw_noises(gaussian(), config, 20.0, pairs())._replace(detector=Linear(4, 3))
    given = Grid([20.0, 2.0, 0.0])
    result = refine(gaussian(), given, "euler", config, pairs(), noises)
    best = minimize_scalar(lambda s: (gain([20.0, s, 0.0]) - EXACT) ** 2, bounds=(0.02, 5), method="bounded").x
    assert result.grid.values[1] == pytest.approx(best, rel=2e-2) and abs(best - 2.0) > 0.3
    assert result.distances["after"] < 0.9 * result.distances["before"]
    assert result.record()["distances"] == result.distances
    assert result.settings["detector"].startswith("linear, SHA-256 000")
    plain = refine(gaussian(), given, "euler", config, pairs(), noises._replace(detector=None))
    assert "distances" not in plain.record() and "detector" not in plain.settings


def test_validation_decides_by_the_distance_and_a_run_that_is_there_is_replayed(tmp_path):
    """The same numbers from the store without an evaluation; another detector finds nothing there but exact ends."""
    context = lambda: Context(batch=2, store=Store(tmp_path), identity="it", quiet=True)
    config, grids = replace(SHORT, noises=8, validation=8), {4: {"dpmpp2m": start(4)}}
    first = refine_grids(mixture(), grids, config, context(), False, Squares(4, 5)).results[4]
    assert first.distances["after"] < first.distances["before"]
    assert first.history[0]["validation"] == first.distances["before"]
    model = mixture()
    again = refine_grids(model, grids, config, context(), False, Squares(4, 5)).results[4]
    assert again.record() == first.record() and again.grid == first.grid and model.evaluations == 0
    other = Squares(4, 5, seed=2)
    other.sha256 = "1" * 64
    assert refine_grids(model, grids, config, context(), False, other).results[4].grid != first.grid
    assert model.evaluations > 0


def test_of_several_solvers_the_distance_chooses():
    config, grids = replace(SHORT, noises=8, validation=8, iterations=1, cheap_iterations=1), {
        4: {"euler": start(4), "dpmpp2m": start(4)}}
    found = refine_grids(mixture(), grids, config, pairs(), own_clock=False, detector=Squares(4, 5))
    noises = draw_noises(mixture(), config, 20.0, pairs()).validation
    distances = {name: FeatureRuns(name, noises, Stage(mixture(), pairs()), Squares(4, 5)).run(
        Scheme(start(4).values), False).errors.mean() for name in grids[4]}
    assert found.results[4].settings["solver"] == min(distances, key=distances.get)
    assert found.results[4].distances["before"] == pytest.approx(min(distances.values()))
