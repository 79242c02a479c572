"""Solvers: order against a closed form, exact cost, the paper's one-dimensional rows, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import Grid, dpm_unpinned, edm, edm_unpinned, uniform
from art_edm.measure.local_errors import measure_errors
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.errors import NonFiniteOutput
from art_edm.sampling.sde import sample_sde
from art_edm.sampling.solvers import (
    SOLVERS,
    Solver,
    euler_step,
    heun_step,
    integrate,
    nfe,
    order_of,
    rk4_step,
    sample,
    slope_of,
)


class Gaussian(Denoiser):
    """Data N(label, variance), whose path is x = label + (x0 - label) sqrt((v + sigma^2) / (v + sigma0^2))."""

    def __init__(self, variance=1.0, shape=(1, 1, 1)):
        super().__init__(shape[0], shape[1], shape[2])
        self.variance = variance

    def mean(self, class_labels):
        return 0.0 if class_labels is None else class_labels.argmax(dim=1).to(torch.float64).reshape(-1, 1, 1, 1)

    def denoise(self, x, sigma, class_labels):
        shrink = self.variance / (self.variance + sigma.reshape(-1, 1, 1, 1) ** 2)
        return self.mean(class_labels) + shrink * (x - self.mean(class_labels))

    def initial(self, latents, sigma):
        return latents.to(torch.float64) * math.sqrt(self.variance + sigma**2)


class Rounding(Gaussian):
    """A model that knows whole noise levels only."""

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma).to(torch.float32).round()


def segment_error(step, num_steps, start=4.0, end=0.5, variance=1.0):
    """Error after a uniform grid over a curved part of the path that does not end at 0."""
    levels = torch.linspace(start, end, num_steps + 1, dtype=torch.float64)
    start_x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    x, _ = integrate(slope_of(Gaussian(variance)), start_x, levels, Solver(step, 0, ""))
    return abs(float(x) - math.sqrt((variance + end**2) / (variance + start**2)))


def fitted_order(step):
    counts = np.array([32, 64, 128, 256])
    errors = [segment_error(step, int(n)) for n in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def skewed_heun(slope, x, sigma, sigma_next, past, weights):
    h, k1 = sigma_next - sigma, slope(x, sigma)
    return x + h * (0.25 * k1 + 0.75 * slope(x + h * k1, sigma_next)), past


def equal_weights_rk4(slope, x, sigma, sigma_next, past, weights):
    h, k1 = sigma_next - sigma, slope(x, sigma)
    k2 = slope(x + h / 2 * k1, sigma + h / 2)
    k3 = slope(x + h / 2 * k2, sigma + h / 2)
    return x + h * (k1 + k2 + k3 + slope(x + h * k3, sigma_next)) / 4, past


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2), (rk4_step, 4)])
def test_order_of_convergence(step, order):
    assert fitted_order(step) == pytest.approx(order, abs=0.15)


def test_wrong_weights_lose_the_order():
    assert fitted_order(skewed_heun) < 1.5
    assert fitted_order(equal_weights_rk4) < 2.5


def test_heun_repeats_the_edm_sampler():
    model, grid = Gaussian(0.25), edm(7, 0.002, 80)
    x, t = 1.5 * math.sqrt(0.25 + grid.sigma_max**2), grid.values
    for i in range(7):  # algorithm 1 of EDM, in plain floats
        d = (x - 0.25 / (0.25 + t[i] ** 2) * x) / t[i]
        after = x + (t[i + 1] - t[i]) * d
        if i < 6:
            slope = (after - 0.25 / (0.25 + t[i + 1] ** 2) * after) / t[i + 1]
            after = x + (t[i + 1] - t[i]) * (0.5 * d + 0.5 * slope)
        x = after
    assert float(sample(model, torch.full((1, 1, 1, 1), 1.5), grid, "heun")) == pytest.approx(x, rel=1e-13)


# Table 1 of the paper without its sampling error: |std - 1| at sigma = 0 for data N(0, 1), T = 3.
STEPS = (2, 5, 10, 20, 50, 100)
ROWS = {
    "uniform": (lambda k: uniform(k, 3), (0.465, 0.212, 0.11, 0.057, 0.023, 0.012)),
    "dpm": (lambda k: dpm_unpinned(k, 1e-4, 3), (0.667, 0.398, 0.208, 0.11, 0.045, 0.023)),
    "edm": (lambda k: edm_unpinned(k, 3), (0.662, 0.316, 0.174, 0.091, 0.037, 0.019)),
    # the least error of any grid: levels equidistant in arctan(sigma)
    "limit": (lambda k: Grid(np.tan((1 - np.arange(k + 1) / k) * np.arctan(3))),
              (0.3419, 0.1459, 0.0752, 0.0383, 0.0155, 0.0078)),
}


def end_error(grid, solver="euler"):
    return abs(float(sample(Gaussian(), torch.ones(1, 1, 1, 1), grid, solver)) - 1)


@pytest.mark.parametrize(("rule", "printed"), ROWS.values(), ids=ROWS)
def test_rows_of_the_one_dimensional_example(rule, printed):
    assert [end_error(rule(k)) for k in STEPS] == pytest.approx(printed, abs=1e-3)


def test_the_rows_are_not_those_of_the_pinned_edm_rule_or_of_heun():
    printed = ROWS["edm"][1][STEPS.index(20)]
    assert abs(end_error(edm_unpinned(20, 3)) - printed) < 1e-3
    assert abs(end_error(edm(20, 0.002, 3)) - printed) > 0.02
    assert abs(end_error(edm_unpinned(20, 3), "heun") - printed) > 0.05


@pytest.mark.parametrize("num_steps", [1, 2, 3, 18])
@pytest.mark.parametrize(("solver", "cost"), [
    ("euler", lambda k: k), ("heun", lambda k: 2 * k - 1), ("rk4", lambda k: 4 * (k - 1) + 1),
    *((solver, lambda k: k) for solver in SOLVERS if SOLVERS[solver].past),
])
def test_cost_is_exact(solver, cost, num_steps):
    model = Gaussian(shape=(2, 3, 3))
    sample(model, torch.randn(5, 2, 3, 3), uniform(num_steps, 80), solver, batch=2)
    assert model.evaluations == 5 * cost(num_steps) == 5 * nfe(solver, num_steps)


def test_only_a_step_to_zero_evaluates_nothing_at_its_end():
    assert list(SOLVERS)[:3] == ["euler", "heun", "rk4"]
    for solver, stages in zip(SOLVERS, [1, 2, 4] + [1] * (len(SOLVERS) - 3)):
        model, x = Gaussian(), torch.ones(1, 1, 1, 1, dtype=torch.float64)
        integrate(slope_of(model), x, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), solver)
        assert model.evaluations == 2 * stages  # by its index, the last step would cost 1


def test_one_step_is_the_denoised_image():
    model, z = Gaussian(0.3, (1, 2, 2)), torch.randn(3, 1, 2, 2)
    x = model.initial(z, 80.0)
    for solver in SOLVERS:
        torch.testing.assert_close(sample(model, z, Grid([80.0, 0.0]), solver), model(x, 80.0), rtol=0, atol=1e-12)


def test_batches_labels_and_callback():
    model, z = Gaussian(0.01, (1, 2, 2)), torch.randn(7, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.eye(7)
    grid, seen = edm_unpinned(40, 80), []
    whole = sample(model, z, grid, class_labels=labels)
    parts = sample(model, z, grid, class_labels=labels, batch=3, on_step=lambda k, s, x: seen.append((k, s, len(x))))
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert whole.dtype == torch.float64 and whole.shape == z.shape
    assert whole.mean(dim=(1, 2, 3)).tolist() == pytest.approx(range(7), abs=0.35)  # every image has its own label
    assert [(k, s) for k, s, _ in seen] == 3 * list(enumerate(grid.values[1:].tolist(), start=1))
    assert [n for _, _, n in seen] == [3] * 40 + [3] * 40 + [1] * 40
    assert sample(model, z[:0], grid).shape == (0, 1, 2, 2)


def test_pure_noise_starts_at_sigma_max_and_no_graph_is_kept():
    class Network(Gaussian):
        initial = Denoiser.initial

    z = torch.randn(2, 1, 1, 1, requires_grad=True)
    x = sample(Network(), z, Grid([3.0, 0.0]))
    torch.testing.assert_close(x, 3 * z.detach().double() / (1 + 9), rtol=1e-12, atol=0)
    assert not x.requires_grad


def test_levels_are_rounded_to_the_model():
    seen = []
    levels = Grid([9.8, 4.3, 1.2, 0.0])
    x = sample(Rounding(), torch.ones(1, 1, 1, 1), levels, "euler", None, lambda k, s, x: seen.append(s))
    assert seen == [4.0, 1.0, 0.0]
    exact = sample(Gaussian(), torch.ones(1, 1, 1, 1), Grid([10.0, 4.0, 1.0, 0.0]), "euler")
    torch.testing.assert_close(x, exact, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("values", "message"), [
    ([9.0, 4.3, 4.1, 0.0], r"steps 1 and 2 \(sigma = 4.3 and 4.1\) are the same noise level, 4"),
    ([9.0, 4.0, 0.3, 0.0], r"steps 2 and 3 \(sigma = 0.3 and 0\) are the same noise level, 0"),
])
def test_steps_lost_by_rounding_are_named(values, message):
    model = Rounding()
    with pytest.raises(ValueError, match=message):
        sample(model, torch.ones(1, 1, 1, 1), Grid(values))
    assert model.evaluations == 0
    sample(Gaussian(), torch.ones(1, 1, 1, 1), Grid(values))  # twin: without rounding the grid is good


def test_a_grid_above_the_model_is_refused():
    model = Gaussian()
    sample(model, torch.ones(1, 1, 1, 1), uniform(3, 80 * (1 + 1e-9)))  # rounding of a rule
    with pytest.raises(ValueError, match="starts at sigma = 81, above the network's sigma_max = 80; .*--sigma-max=80"):
        sample(model, torch.ones(1, 1, 1, 1), uniform(3, 81))


def test_bad_arguments():
    model, z, grid = Gaussian(), torch.ones(2, 1, 1, 1), uniform(3, 80)
    with pytest.raises(ValueError, match="found solver 'dopri', expected one of euler, heun, rk4, dpmpp2m, ipndm2,"):
        sample(model, z, grid, "dopri")
    with pytest.raises(ValueError, match="found 3 class labels for 2 latents"):
        sample(model, z, grid, class_labels=torch.eye(3))
    with pytest.raises(ValueError, match="found batch = 0"):
        sample(model, z, grid, batch=0)
    with pytest.raises(ValueError, match="expected one of"):
        nfe("dopri", 3)
    with pytest.raises(ValueError, match="num_steps = 0"):
        nfe("heun", 0)
    assert model.evaluations == 0


def test_nan_from_the_model_is_an_error():
    class Broken(Gaussian):
        def denoise(self, x, sigma, class_labels):
            return super().denoise(x, sigma, class_labels) * (math.nan if sigma[0] < 50 else 1)

    with pytest.raises(NonFiniteOutput, match="sigma = 40 for 1 of 1 images;"):
        sample(Broken(), torch.ones(1, 1, 1, 1), uniform(4, 80), "euler")


class Product(Gaussian):
    """A network whose matrix product follows what is switched on around it."""

    def denoise(self, x, sigma, class_labels):
        product = x.flatten(1).float() @ torch.eye(x[0].numel())
        self.seen = (product.dtype, torch.backends.cuda.matmul.allow_tf32)
        return super().denoise(product.reshape(x.shape).to(x.dtype), sigma, class_labels)


@pytest.mark.parametrize("sampler", [sample, sample_sde])
def test_samples_do_not_follow_the_callers_autocast_and_tf32(sampler):
    model, z, grid = Product(0.25, (1, 4, 4)), torch.randn(2, 1, 4, 4, dtype=torch.float64), edm_unpinned(5, 80)
    alone, matmul = sampler(model, z, grid), torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(z, 1.0)
            assert model.seen == (torch.bfloat16, True)  # without the guard they would
            found = sampler(model, z, grid)
        assert model.seen == (torch.float32, False) and torch.equal(found, alone) and matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


# --- the table ---------------------------------------------------------------------------------------


def midpoint_step(slope, x, sigma, sigma_next, past, weights):
    """A solver that the table lacks."""
    h = sigma_next - sigma
    return x + h * slope(x + h / 2 * slope(x, sigma), sigma + h / 2), ()


def test_adding_a_solver_is_one_entry_and_one_function(monkeypatch):
    with pytest.raises(ValueError, match="found solver 'midpoint'"):
        nfe("midpoint", 3)
    monkeypatch.setitem(SOLVERS, "midpoint", Solver(midpoint_step, 2, "the explicit midpoint rule", stages=2))
    model, z, grid = Gaussian(0.25), torch.ones(1, 1, 1, 1), edm_unpinned(80, 80)
    end = float(sample(model, z, grid, "midpoint"))
    assert model.evaluations == nfe("midpoint", 80) == 159 and order_of("midpoint") == 2
    error = {solver: abs(float(sample(model, z, grid, solver)) - 0.5) for solver in ("midpoint", "heun", "euler")}
    assert end == pytest.approx(0.5, rel=0.01) and error["midpoint"] < error["euler"] / 5
    profile = measure_errors(model, z, GaussianClock(80.0, 0.5), 40, solver="midpoint")
    assert profile.order == 2 and np.isfinite(profile.norm).all()


def test_every_entry_says_what_it_is():
    for name, solver in SOLVERS.items():
        assert solver.source and (solver.rule is None) == (solver.past == 0) and solver.order >= 1, name
        assert solver.last_order in (1, 2) and (solver.stages == 1 or solver.last_order == 1)
