"""Weights refined with the levels: derivatives, their cost, exact weights found, never worse, and the same again."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from art_edm.grids.grid import Grid, edm
from art_edm.measure.field import rms
from art_edm.models.analytic import GaussianDenoiser
from art_edm.refining import levenberg_marquardt
from art_edm.refining import refine as refine_module
from art_edm.refining.config import RefineConfig
from art_edm.refining.levenberg_marquardt import scales
from art_edm.refining.noise_sets import draw_noises
from art_edm.refining.parameters import Parameters, free_places
from art_edm.refining.refine import between, refine, refine_grids
from art_edm.refining.solver_jacobian import Scheme, SolverRuns, solve_ends
from art_edm.refining.stage import Stage
from art_edm.runtime.context import Context
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import integrate, sample, slope_of
from art_edm.sampling.weighted import table_of, weighted
from tests.support.refine_fields import art, clusters, mixture, start, together

LEVELS = np.array([20.0, 5.0, 1.5, 0.4, 0.0])
CONFIG = RefineConfig(noises=8, validation=8, fine_steps=20, iterations=6, cheap_iterations=6, weights=True)
PLACES = free_places(4, 3)
COUNT = 4


def eights(**more):
    return Context(**{"batch": 8, **more})


def job(batch=2):
    latents = torch.randn(COUNT, 1, 2, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    noises, _ = solve_ends("rk4", latents, None, edm(40, 0.01, 20.0).values, Stage(mixture(), Context(batch=COUNT)))
    return SolverRuns("clock", noises, Stage(mixture(), Context(batch=batch)))


def central(runs, scheme, step=1e-5):
    """jtr [M, P] by central differences of whole runs, by another way than `SolverRuns`."""
    model, noises = mixture(), runs.noises
    x = model.initial(noises.latents, 20.0)

    def end(levels, weights):
        with torch.no_grad():
            return integrate(slope_of(model), x, torch.tensor(levels), weighted(weights))[0]

    columns = []
    for j in range(1, len(scheme.levels) - 1):
        e = step * np.eye(len(scheme.levels))[j]
        columns.append((end(scheme.levels + e, scheme.weights) - end(scheme.levels - e, scheme.weights)) / (2 * step))
    for place in PLACES:
        e = np.zeros_like(scheme.weights)
        e[place] = step
        columns.append((end(scheme.levels, scheme.weights + e) - end(scheme.levels, scheme.weights - e)) / (2 * step))
    residual = (end(*scheme) - noises.ends).flatten(1)
    J = torch.stack([column.flatten(1) for column in columns], dim=1)
    return (J @ residual[:, :, None] / residual.shape[1])[:, :, 0].numpy()


def test_columns_are_those_of_whole_runs_and_cost_what_follows_their_step():
    runs, scheme = job(), Scheme(LEVELS, table_of("clock", LEVELS))
    run = runs.run(scheme)
    assert runs.evaluations == COUNT * 4
    jtj, jtr = runs.derivatives(run, 1e-6, PLACES)
    expected = central(runs, scheme)
    assert jtr == pytest.approx(expected, rel=1e-4, abs=1e-4 * np.abs(expected).max())
    assert jtj.shape == (COUNT, 12, 12) and np.allclose(jtj, jtj.transpose(0, 2, 1), rtol=1e-12)
    # levels: 3 + 2 + 1; weights of step k = 0..3, (1, 2, 3, 3) of them: 3 - k each
    assert runs.evaluations == COUNT * (4 + 6 + 3 * 1 + 2 * 2 + 1 * 3 + 0 * 3)
    first = {i: each._replace(starts=[each.starts[0]._replace(slope=start.slope) for start in each.starts])
             for i, each in run.kept.items()}  # the twin: what another step began with
    wrong = job().derivatives(run._replace(kept=first), 1e-6, PLACES)[1]
    assert np.abs(wrong - expected).max() > 0.1 * np.abs(expected).max()


def test_parameters_are_levels_and_weights():
    scheme = Scheme(LEVELS, table_of("clock", LEVELS))
    form = Parameters(20.0, 0.0, PLACES, scheme.weights)
    p = form.vector(scheme)
    again = form.scheme(p)
    assert len(p) == 3 + 9 and again.levels == pytest.approx(LEVELS, rel=1e-12)
    assert np.array_equal(again.weights, scheme.weights)
    moved = [form.scheme(p + e) for e in 1e-6 * np.eye(12)]
    differences = [np.append(m.levels[1:-1] - again.levels[1:-1], [(m.weights - again.weights)[at] for at in PLACES])
                   for m in moved]
    assert form.chain(p, again) == pytest.approx(np.array(differences).T / 1e-6, rel=1e-4, abs=1e-6)
    assert Parameters(20.0, 0.0).scheme(p[:3]).weights is None
    assert free_places(3, 2) == ((0, 0), (1, 0), (1, 1), (2, 0), (2, 1))


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_the_exact_weight_of_one_step_is_found(s, monkeypatch):
    """Data N(0, s^2): w = (1 - s / sqrt(s^2 + sigma_0^2)) (s^2 + sigma_0^2) / sigma_0^2 ends exactly; see
    test_weighted.py. The paths' own error is 4e-8 here."""
    monkeypatch.setattr(refine_module, "ERROR_FLOOR", 0)  # else it ends at 1e-4 of the error
    model, total = GaussianDenoiser(0.0, s**2, (1, 2, 2), 0.002, 20.0), s**2 + 400
    config = replace(CONFIG, fine_steps=300, iterations=20, tolerance=1e-12, patience=20)
    result = refine(model, Grid([20.0, 0.0]), "clock", config, eights())
    assert result.weights.shape == (1, 1) and result.grid == Grid([20.0, 0.0])
    assert result.weights[0, 0] == pytest.approx((1 - s / total**0.5) * total / 400, rel=1e-6)
    assert result.error_after.mean < 1e-5 * result.error_before.mean
    # with a ridge the least of f_0 |1 - d / a| + rho / 2 f_0 d^2, d = w - 1 and a its value above: d = 1 / (rho a)
    held = refine(model, Grid([20.0, 0.0]), "clock", replace(config, ridges=(1e4,)), eights()).weights[0, 0]
    assert held - 1 == pytest.approx(1e-4 / (result.weights[0, 0] - 1), rel=0.02)


def judged(model, result):
    """Mean errors on other noises before and after, by sampling."""
    latents = torch.randn(128, *model.img_shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    fine = sample(model, latents, edm(60, model.sigma_min, 20.0), "rk4")
    grids = ((start(4), "clock"), (result.grid, weighted(result.weights)))
    return [float(rms(sample(model, latents, grid, solver) - fine).mean()) for grid, solver in grids]


def test_it_gains_more_than_levels_alone_on_fresh_noises():
    model = mixture()
    before, after = judged(model, refine(model, start(4), "clock", CONFIG, eights()))
    levels = refine(model, start(4), "clock", replace(CONFIG, weights=False), eights())
    assert levels.weights is None
    _, alone = judged(model, replace(levels, weights=table_of("clock", levels.grid.values)))
    assert after < 0.8 * alone < alone < before


def test_figures_are_those_of_the_grid_and_weights_that_are_returned():
    model, drawn = mixture(), draw_noises(mixture(), CONFIG, 20.0, eights())
    result = refine(model, start(4), "clock", CONFIG, eights(), drawn)
    validation = drawn.validation
    errors = [rms(sample(model, validation.latents, grid, solver) - validation.ends).numpy() for grid, solver in
              ((start(4), "clock"), (result.grid, weighted(result.weights)))]
    assert [result.error_before.mean, result.error_after.mean] == pytest.approx([each.mean() for each in errors])
    assert result.error_after.mean == min(row["validation"] for row in result.history)
    assert "weights" not in result.record() and result.settings["weights"] is True


def test_nothing_is_returned_that_validation_noises_find_worse():
    """Noises of which those of validation end where the given grid ends: its own weights come back."""
    model, first = mixture(), start(4)
    drawn = draw_noises(model, CONFIG, 20.0, eights())
    ends = sample(model, drawn.validation.latents, first, "clock")
    same = drawn._replace(validation=drawn.validation._replace(ends=ends))
    result = refine(model, first, "clock", CONFIG, eights(), same)
    assert result.grid == first and np.array_equal(result.weights, table_of("clock", first.values))
    assert refine(model, first, "clock", CONFIG, eights(), drawn).grid != first  # the twin


def test_between_goes_a_share_of_levels_and_weights():
    one, two = (Scheme(np.array([20.0, x, 0.0]), np.array([[w, 0], [1.0, w]])) for x, w in ((1.0, 0.0), (4.0, 1.0)))
    middle = between(one, two, 0.5)
    assert middle.levels == pytest.approx([20.0, 2.0, 0.0]) and middle.weights.tolist() == [[0.5, 0], [1.0, 0.5]]


def bits(result):
    return result.grid.values.tobytes(), result.weights.tobytes(), result.evaluations, result.history


def test_it_is_replayed_from_the_store_and_shared_by_processes(tmp_path):
    context = Context(batch=2, store=Store(tmp_path), identity="it")
    whole = bits(refine(mixture(), start(4), "clock", CONFIG, context))
    again = mixture()
    assert bits(refine(again, start(4), "clock", CONFIG, context)) == whole and again.evaluations == 0
    for found in together(3, lambda world: bits(refine(mixture(), start(4), "clock", CONFIG, Context(world, batch=2)))):
        assert found == whole


def test_of_several_solvers_the_one_that_ends_nearest_gives_the_weights_to_begin_with():
    grids = {"clock": art(4), "dpmpp2m": art(4)}
    found = refine_grids(clusters(), {4: grids}, CONFIG, eights(), own_clock=False)
    result, tried = found.results[4], found.tried[4]
    nearest = min(tried, key=lambda solver: tried[solver].mean)
    assert result.settings["solver"] == nearest
    assert result.error_before.mean == pytest.approx(tried[nearest].mean, rel=1e-6)


@pytest.mark.parametrize("field, steps, solver, begun", [
    (mixture, 4, "clock", "clock-denoised"), (mixture, 5, "clock", "ipndm3"), (clusters, 4, "clock-denoised", "given"),
])
def test_it_begins_with_the_weights_that_end_nearest(field, steps, solver, begun):
    model, grid = field(), start(steps)
    found, drawn = refine(model, grid, solver, CONFIG, eights()), draw_noises(model, CONFIG, grid.sigma_max, eights())
    errors = {}
    for name in dict.fromkeys((solver, *refine_module.WEIGHTS_OF)):
        ends = sample(model, drawn.validation.latents, grid, weighted(table_of(name, grid.values)))
        errors["given" if name == solver else name] = rms(ends - drawn.validation.ends).mean().item()
    assert found.start == min(errors, key=errors.get) == begun
    # the gain is over the solver asked for
    assert found.error_before.mean == pytest.approx(errors["given"], rel=1e-9)


def test_a_solver_without_weights_is_refused_before_any_work():
    model = mixture()
    with pytest.raises(ValueError, match="found heun, which evaluates 2 times in a step"):
        refine(model, start(4), "heun", CONFIG, eights())
    assert model.evaluations == 0


def test_weights_of_short_steps_are_scaled_by_their_own_curvature(monkeypatch):
    """A step's curvature goes as the square of its length in sigma: scaled by the largest, late ones hardly move."""
    found = scales(np.array([1e4, 10.0, 1e-3]), 2.0, weights=True)
    assert found == pytest.approx(np.sqrt([1e4 + 2 / 3, 10 + 2 / 3, 1e-2 + 2 / 3]))
    assert scales(np.array([1e4, 10.0, 1e-3]), 2.0, weights=False)[1:] == pytest.approx(np.sqrt(1e3 + 2 / 3))
    config = replace(CONFIG, noises=32, validation=32, iterations=20)
    errors = []
    for least in (levenberg_marquardt.MIN_SCALE_WEIGHTS, levenberg_marquardt.MIN_SCALE):
        monkeypatch.setattr(levenberg_marquardt, "MIN_SCALE_WEIGHTS", least)
        errors.append(refine(mixture(), start(5), "clock", config, eights()).error_after.mean)
    assert errors[0] < 0.7 * errors[1]
