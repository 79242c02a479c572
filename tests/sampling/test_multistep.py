"""Multistep solvers: order on uneven grids against exact paths, the published formulas, pasts and gradients."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from art_edm.grids.grid import Grid, edm
from art_edm.models.analytic import GaussianDenoiser, MixtureDenoiser
from art_edm.sampling.multistep import MULTISTEP, adams_weights, dpmpp2m_step
from art_edm.sampling.solvers import SOLVERS, euler_step, integrate, sample, slope_of

ORDERS = {"euler": 1, "heun": 2, "rk4": 4, "dpmpp2m": 2, "ipndm2": 2, "ipndm3": 3, "ipndm": 4}
CLASSIC = {2: (-1 / 2, 3 / 2), 3: (5 / 12, -16 / 12, 23 / 12), 4: (-9 / 24, 37 / 24, -59 / 24, 55 / 24)}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def uneven(num_steps, start=4.0, end=0.5):
    """Levels whose steps are 1 : 3 : 1 : 3 ... along a smooth curve, so that refining does not make them even."""
    widths = np.resize([1.0, 3.0], num_steps)
    return double(*(start * (end / start) ** (np.append(0, np.cumsum(widths)) / widths.sum())))


def classic(slope, x, sigma, sigma_next, past):
    """Adams-Bashforth of 2 to 4 slopes with the coefficients of an even grid, whatever the grid; iPNDM's own."""
    known = [*(kept for _, kept in past), slope(x, sigma)]
    mean = sum(weight * kept for weight, kept in zip(CLASSIC[len(known)], known))
    return x + (sigma_next - sigma) * mean, tuple((sigma, kept) for kept in known[1:])


def even_dpmpp2m(slope, x, sigma, sigma_next, past):
    """DPM-Solver++(2M) with r = 1, which holds on a grid even in log sigma alone."""
    denoised = x - sigma * slope(x, sigma)
    mean = 1.5 * denoised - 0.5 * past[-1][1]
    return sigma_next / sigma * x + (1 - sigma_next / sigma) * mean, ((sigma, denoised),)


def exact_gaussian(variance=1.0):
    return lambda sigma: torch.sqrt(variance + sigma**2).reshape(1, 1, 1, 1)


def on_path(path, slope, solver, sigma):
    """The past of `solver` at sigma[3], from exact states at sigma[:3]."""
    step, past = SOLVERS.get(solver, solver), ()
    for k in range(3):
        _, past = step(slope, path(sigma[k]), sigma[k], sigma[k + 1], past)
    return past


def fitted_order(path, slope, solver, counts=(33, 65, 129, 257), past_of=None):
    """Order of the error over the grid's part from sigma[3] on, where the solver already has its past."""
    errors = []
    for count in counts:
        sigma = uneven(count)
        past = on_path(path, slope, past_of or solver, sigma)
        x, _ = integrate(slope, path(sigma[3]), sigma[3:], solver, past)
        errors.append(float((x - path(sigma[-1])).abs().max()))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


GAUSSIAN = slope_of(GaussianDenoiser(0.0, 1.0, (1, 1, 1)))


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_on_uneven_grids(solver):
    assert fitted_order(exact_gaussian(), GAUSSIAN, solver) == pytest.approx(ORDERS[solver], abs=0.15)


@pytest.fixture(scope="module")
def mixture():
    """(path, slope) of a mixture, the path by many steps of RK4."""
    means = double(-1.0, 0.4, 1.5).reshape(3, 1, 1, 1)
    slope = slope_of(MixtureDenoiser([0.5, 0.3, 0.2], means, 0.5))
    fine = torch.exp(torch.linspace(math.log(4.0), math.log(0.5), 1001, dtype=torch.float64))
    states = {4.0: double(2.0).reshape(1, 1, 1, 1)}
    integrate(slope, states[4.0], fine, "rk4", on_step=lambda k, s, x: states.update({s: x}))

    def path(sigma):  # from the nearest state above, by one more step
        above = min(level for level in states if level >= float(sigma) * (1 - 1e-12))
        return integrate(slope, states[above], double(above, float(sigma)), "rk4")[0]

    return path, slope


@pytest.mark.parametrize("solver", SOLVERS)
def test_order_for_a_mixture(mixture, solver):
    assert fitted_order(*mixture, solver, (49, 97, 193)) == pytest.approx(ORDERS[solver], abs=0.25)


def test_weights_of_an_even_grid_lose_the_order():
    for solver in ("ipndm2", "ipndm3", "ipndm"):
        order = fitted_order(exact_gaussian(), GAUSSIAN, classic, past_of=solver)
        assert order < ORDERS[solver] - 0.7
    assert fitted_order(exact_gaussian(), GAUSSIAN, even_dpmpp2m, past_of="dpmpp2m") < 1.3


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_adams_bashforth_is_exact_for_slopes_polynomial_in_sigma(degree):
    sigma = uneven(7, 3.0, 0.2)

    def path(level):
        return (level ** (degree + 1) / (degree + 1)).reshape(1, 1, 1, 1)

    def slope(x, level):
        return (level**degree).reshape(1, 1, 1, 1)

    for solver in ("ipndm2", "ipndm3", "ipndm"):
        x, _ = integrate(slope, path(sigma[3]), sigma[3:], solver, on_path(path, slope, solver, sigma))
        error = float((x - path(sigma[-1])).abs())
        assert error < 1e-14 if degree < ORDERS[solver] else error > 1e-3
    x, _ = integrate(slope, path(sigma[3]), sigma[3:], classic, on_path(path, slope, "ipndm", sigma))
    assert degree == 0 or float((x - path(sigma[-1])).abs()) > 1e-3


def test_weights_of_an_even_grid_are_the_classic_ones():
    levels = double(5.0, 4.0, 3.0, 2.0)
    for order, weights in CLASSIC.items():
        found = adams_weights(list(levels[4 - order:]), double(1.0)[0])
        assert [float(w) for w in found] == pytest.approx(weights, abs=1e-15)
    wide = adams_weights(list(double(5.0, 4.0, 2.0)), double(1.0)[0])  # twin: an uneven one has others
    assert [float(w) for w in wide] == pytest.approx((4 / 9, -11 / 12, 53 / 36), abs=1e-14)


def published_dpmpp2m(model, x, t, power=1):
    """Algorithm 2 of 2211.01095 with alpha = 1, in plain arrays; the end is its first-order step at lambda = inf."""
    lam, kept = -np.log(t[:-1]), None
    for i in range(1, len(t)):
        denoised = model(torch.from_numpy(x), t[i - 1]).numpy()
        if t[i] == 0:
            return denoised
        h, mean = lam[i] - lam[i - 1], denoised
        if kept is not None:
            r = ((lam[i - 1] - lam[i - 2]) / h) ** power
            mean = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * kept
        x, kept = t[i] / t[i - 1] * x - (np.exp(-h) - 1) * mean, denoised
    return x


@pytest.mark.parametrize("grid", [edm(8, 0.002, 80), Grid(np.append(uneven(9, 80, 0.01).numpy(), 0.0))])
def test_dpmpp2m_is_the_published_algorithm(grid):
    model = MixtureDenoiser([0.5, 0.5], torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2), 0.1)
    z = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(3))
    ours, x = sample(model, z, grid, "dpmpp2m").numpy(), z.double().numpy() * grid.sigma_max
    np.testing.assert_allclose(ours, published_dpmpp2m(model, x, grid.values), rtol=0, atol=1e-12)
    for power in (0, -1):  # twins: r = 1, and r upside down
        assert np.abs(ours - published_dpmpp2m(model, x, grid.values, power)).max() > 1e-3


@pytest.mark.parametrize("solver", MULTISTEP)
def test_the_first_step_and_a_step_to_zero_are_eulers(solver):
    x, sigma = double(-0.7, 1.9).reshape(2, 1, 1, 1), double(4.0, 1.0, 0.3)
    first, past = integrate(GAUSSIAN, x, sigma[:2], solver)
    torch.testing.assert_close(first, euler_step(GAUSSIAN, x, *sigma[:2])[0], rtol=1e-14, atol=0)
    last, nothing = integrate(GAUSSIAN, first, double(1.0, 0.0), solver, past)
    assert torch.equal(last, euler_step(GAUSSIAN, first, *double(1.0, 0.0))[0]) and nothing == ()
    second = integrate(GAUSSIAN, first, sigma[1:], solver, past)[0]
    assert (second - euler_step(GAUSSIAN, first, *sigma[1:])[0]).abs().min() > 1e-3


def test_a_cold_start_costs_the_higher_orders():
    errors = []
    for count in (64, 128, 256):
        sigma = uneven(count)
        errors.append(float(integrate(GAUSSIAN, exact_gaussian()(sigma[0]), sigma, "ipndm")[0]
                            - exact_gaussian()(sigma[-1])))
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(2, abs=0.25)  # of the first step, Euler's


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_may_be_cut_anywhere(solver):
    sigma, x = uneven(9, 80, 0.01), double(-0.7, 1.9).reshape(2, 1, 1, 1)
    whole, past = integrate(GAUSSIAN, x, sigma, solver)
    for cut in range(1, 9):
        before = integrate(GAUSSIAN, x, sigma[:cut + 1], solver)
        after = integrate(GAUSSIAN, before[0], sigma[cut:], solver, before[1])
        assert torch.equal(after[0], whole)
        if solver in MULTISTEP:  # twin: without its past it is another run
            assert not torch.equal(integrate(GAUSSIAN, before[0], sigma[cut:], solver)[0], whole)
    keeps = {"dpmpp2m": 1, "ipndm2": 1, "ipndm3": 2, "ipndm": 3}.get(solver, 0)
    assert [float(level) for level, _ in past] == sigma[:-1].tolist()[len(sigma) - 1 - keeps:]


@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_with_respect_to_levels_state_and_past(solver):
    sigma = uneven(8).requires_grad_()
    x = double(-0.7, 1.9).reshape(2, 1, 1, 1).requires_grad_()

    def run(x, sigma):
        middle, past = integrate(GAUSSIAN, x, sigma[:4], solver)
        return integrate(GAUSSIAN, middle, torch.cat([sigma[3:], double(0.0)]), solver, past)[0]

    assert torch.autograd.gradcheck(run, (x, sigma))
    gradient = torch.autograd.grad(run(x, sigma).sum(), sigma)[0]
    cut = torch.autograd.grad(integrate(GAUSSIAN, x, torch.cat([sigma.detach()[:4], sigma[4:], double(0.0)]),
                                        solver)[0].sum(), sigma)[0]
    assert (gradient[:4] != 0).all() and (cut[:4] == 0).all() and (cut[5:] != 0).all()


def test_steps_are_pure():
    x, kept = double(-0.7, 1.9).reshape(2, 1, 1, 1), double(0.2, -0.4).reshape(2, 1, 1, 1)
    for step, reuse in itertools.product(MULTISTEP.values(), range(2)):
        past, before = ((double(3.0)[0], kept),), (x.clone(), kept.clone())
        first = step(GAUSSIAN, x, *double(2.0, 1.0), past)
        again = step(GAUSSIAN, x, *double(2.0, 1.0), past)
        assert torch.equal(first[0], again[0]) and torch.equal(x, before[0]) and torch.equal(kept, before[1])
        assert len(past) == 1 and not torch.equal(first[0], step(GAUSSIAN, x, *double(2.0, 1.0))[0])
    assert dpmpp2m_step is SOLVERS["dpmpp2m"]
