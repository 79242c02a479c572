"""Multistep solvers: orders on several clocks against exact paths, weights, published formulas, pasts, gradients."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import PchipInterpolator

from art_edm.grids.grid import Grid, edm
from art_edm.models.analytic import GaussianDenoiser, MixtureDenoiser
from art_edm.sampling import multistep
from art_edm.sampling.solvers import SOLVERS, Solver, euler_step, integrate, sample, slope_of

MULTISTEP = {name: solver for name, solver in SOLVERS.items() if solver.past}
CLASSIC = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
# sigma over s in [0, 1], from 4 to 1/2: how densely the levels lie
CLOCKS = {
    "rho 7": lambda s: (4 ** (1 / 7) + s * (0.5 ** (1 / 7) - 4 ** (1 / 7))) ** 7, "even": lambda s: 4 - 3.5 * s,
    "arctan": lambda s: torch.tan((1 - s) * math.atan(4) + s * math.atan(0.5)), "log": lambda s: 4 * 0.125**s,
}
LEVELS = torch.tensor([80.0, 22.0, 5.1, 1.9, 0.7, 0.21, 0.002, 0.0], dtype=torch.float64)  # no rule's


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def uneven(num_steps, start=4.0, end=0.5):
    """Levels whose steps are 1 : 3 : 1 : 3 ... along a smooth curve, so that refining does not make them even."""
    widths = np.resize([1.0, 3.0], num_steps)
    return double(*(start * (end / start) ** (np.append(0, np.cumsum(widths)) / widths.sum())))


def exact_gaussian(sigma):
    return torch.sqrt(1 + sigma**2).reshape(1, 1, 1, 1)


GAUSSIAN = slope_of(GaussianDenoiser(0.0, 1.0, (1, 1, 1)))


# --- order -------------------------------------------------------------------------------------------


def fitted_order(levels, solver, path=exact_gaussian, slope=GAUSSIAN, counts=(33, 65, 129, 257)):
    """Order of the error over the grid's part from sigma[3] on, where the solver has its past from exact states."""
    errors = []
    for count in counts:
        sigma, past = levels(count), ()
        for k in range(3):
            _, past = integrate(slope, path(sigma[k]), sigma, solver, past, steps=[k])
            past = multistep.on_path(past, path(sigma[k]))
        x, _ = integrate(slope, path(sigma[3]), sigma, solver, past, steps=range(3, len(sigma) - 1))
        errors.append(float((x - path(sigma[-1])).abs().max()))
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


def on(clock):
    return lambda count: CLOCKS[clock](torch.linspace(0, 1, count + 1, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_order_of_convergence(solver, clock):
    """Their weights make iPNDM of order 2 on a smooth clock, and of its name's on an even grid; an error term of
    DPM-Solver++(2M), UniPC and our clock may change its sign or vanish on one."""
    counts = (129, 257, 513) if solver == "unipc" else (33, 65, 129, 257)
    order, found = SOLVERS[solver].order, fitted_order(on(clock), solver, counts=counts)
    if (solver, clock) in (("ipndm3", "even"), ("ipndm", "even")):
        order = {"ipndm3": 3, "ipndm": 4}[solver]
    assert order - (0.6 if solver == "dpmpp2m" else 0.4) < found < order + {"clock": 2, "unipc": 1.2}.get(solver, 0.7)


@pytest.mark.parametrize("solver", ["heun", "dpmpp2m", "ab4-sigma", "deis", "unipc"])
def test_order_where_steps_are_1_to_3(solver):
    assert fitted_order(uneven, solver) > SOLVERS[solver].order - 0.4


def test_weights_of_an_even_grid_lose_the_order():
    for name in ("ipndm2", "ipndm3", "ipndm"):
        assert fitted_order(uneven, name) < 1.3
        assert fitted_order(on("rho 7"), name) < 2.1 < SOLVERS["clock-denoised"].order - 0.4

    def even_dpmpp2m(sigma):  # q = 1, which holds on a grid even in log sigma alone
        return lambda k, m: double(1) if m == 1 else double(1.5, -0.5)

    twin = Solver(multistep.denoised_step, 2, "", past=1, rule=even_dpmpp2m)
    assert fitted_order(uneven, twin) < 1.3 < fitted_order(uneven, "dpmpp2m") - 0.4


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


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_order_for_a_mixture(mixture, solver):
    found = fitted_order(on("rho 7"), solver, *mixture, counts=(97, 193, 385) if solver == "unipc" else (49, 97, 193))
    assert SOLVERS[solver].order - 0.3 < found < SOLVERS[solver].order + 0.8


def test_a_cold_start_costs_the_higher_orders():
    errors = []
    for count in (64, 128, 256):
        sigma = uneven(count)
        errors.append(float(integrate(GAUSSIAN, exact_gaussian(sigma[0]), sigma, "ab4-sigma")[0]
                            - exact_gaussian(sigma[-1])))
    assert np.log2(errors[-2] / errors[-1]) == pytest.approx(2, abs=0.25)  # of the first step, Euler's


# --- weights -----------------------------------------------------------------------------------------


def lagrange(times, j, t):
    return np.prod([(t - other) / (times[j] - other) for i, other in enumerate(times) if i != j])


def by_scipy(k, m, kind):
    """The weights of the clock's solvers by scipy's interpolation and adaptive quadrature."""
    sigma = LEVELS.numpy()
    height = PchipInterpolator(np.arange(len(sigma)), np.log(sigma + 0.05))
    times = [k - j for j in range(m)]

    def density(t):
        rate = np.exp(height(t)) * height(t, 1)
        return rate if kind == "slopes" else rate / (np.exp(height(t)) - 0.05) ** 2

    def whole(part):
        edges = k + 1 - np.append(0.5 ** np.arange(12), 0)
        return sum(quad(part, a, b, epsabs=0, epsrel=1e-13, limit=200)[0] for a, b in zip(edges, edges[1:]))

    mass = sigma[k + 1] - sigma[k] if kind == "slopes" else 1 / sigma[k] - 1 / sigma[k + 1]
    return [whole(lambda t, j=j: density(t) * lagrange(times, j, t)) / mass for j in range(m)]


@pytest.mark.parametrize("kind", ["slopes", "denoised"])
def test_clock_weights_are_the_integrals(kind):
    row = {"slopes": multistep.clock_slopes, "denoised": multistep.clock_denoised}[kind](LEVELS)
    for k in range(6 + (kind == "slopes")):
        for m in range(1, min(k + 1, 4) + 1):
            found, bar = row(k, m), 1e-12 if kind == "slopes" or k < 5 else 2e-11  # 1/sigma = 500: quad's own error
            assert found.tolist() == pytest.approx(by_scipy(k, m, kind), abs=bar)
            if m > 1:  # twin: those of an even grid differ
                assert np.abs(found.numpy() - CLASSIC[m]).max() > 1e-3
    if kind == "denoised":  # at sigma = 0: the polynomial's value there
        assert row(6, 3).tolist() == pytest.approx([3, -3, 1], abs=1e-13) and row(6, 2).tolist() == [2, -1]


@pytest.mark.parametrize("solver", MULTISTEP)
def test_weights_sum_to_one(solver):
    row = SOLVERS[solver].rule(LEVELS)
    for k in range(len(LEVELS) - 1):
        for m in range(1, min(k, SOLVERS[solver].past) + 2):
            rows = [each for each in row(k, m) if each is not None] if solver == "unipc" else [row(k, m)]
            assert [float(each.sum()) for each in rows] == pytest.approx([1] * len(rows), abs=1e-12)
            assert rows[0].dtype == torch.float64


@pytest.mark.parametrize("solver, last", [("clock", 2), ("clock-denoised", 1), ("ipndm", 2), ("ipndm3", 2),
                                          ("ipndm2", 2), ("dpmpp2m", 1), ("ab4-sigma", 1), ("deis", 1), ("unipc", 1)])
def test_the_step_to_zero_has_the_order_that_the_table_says(solver, last):
    row = SOLVERS[solver].rule(LEVELS)(len(LEVELS) - 2, SOLVERS[solver].past + 1)
    assert len(row[0] if solver == "unipc" else row) == last == SOLVERS[solver].last_order


@pytest.mark.parametrize("degree", range(5))
def test_slopes_that_are_polynomials_in_the_clock_are_integrated_exactly(degree):
    """From the fourth step on to sigma = 0.002; f and its integral by dt are known in closed form or by quadrature."""
    sigma, height = LEVELS[:-1], PchipInterpolator(np.arange(8), np.log(LEVELS.numpy() + 0.05))
    clock = {float(level): k for k, level in enumerate(LEVELS)}
    past = ((sigma[0], double(0.0 if degree else 1.0)), *((sigma[k], double(float(k) ** degree)) for k in (1, 2)))
    x, _ = integrate(lambda x, level: double(float(clock[float(level)]) ** degree), double(0.0), LEVELS, "clock", past,
                     steps=range(3, 6))
    truth = sum(quad(lambda t: t**degree * np.exp(height(t)) * height(t, 1), k, k + 1, epsabs=1e-13)[0]
                for k in (3, 4, 5))
    assert (abs(float(x) - truth) < 1e-11) == (degree < 4)  # twin: one degree more
    if degree == 0:
        assert float(x) == pytest.approx(0.002 - 1.9, abs=1e-13)


@pytest.mark.parametrize("degree", range(4))
def test_images_that_are_polynomials_in_the_clock_are_followed_exactly(degree):
    """d(x/sigma) = D d(1/sigma), to sigma = 0.002 and on to 0, where the exact end is D at the clock's end."""
    height = PchipInterpolator(np.arange(8), np.log(LEVELS.numpy() + 0.05))
    clock = {float(level): k for k, level in enumerate(LEVELS)}
    image = lambda t: float(t) ** degree
    slope = lambda x, level: (x - image(clock[float(level)])) / level
    past = tuple((LEVELS[k], double(image(k))) for k in (0, 1))
    x, past = integrate(slope, double(1.0), LEVELS, "clock-denoised", past, steps=range(2, 6))
    density = lambda t: -np.exp(height(t)) * height(t, 1) / (np.exp(height(t)) - 0.05) ** 2
    edges = np.concatenate([k + 1 - np.append(0.5 ** np.arange(12), 0) for k in range(2, 6)])
    truth = LEVELS[6] * (1 / LEVELS[2] + sum(
        quad(lambda t: image(t) * density(t), a, b, epsrel=1e-13)[0] for a, b in zip(edges, edges[1:]) if b > a))
    assert (abs(float(x - truth)) < 1e-9) == (degree < 3)  # twin: one degree more
    end, _ = integrate(slope, double(image(6)), LEVELS, "clock-denoised", past, steps=[6])
    assert (abs(float(end) - image(7)) < 1e-9) == (degree < 1)  # the last step is Euler's
    second = SOLVERS["clock-denoised"]._replace(rule=multistep.limited(multistep.clock_denoised, 3, 2))
    end, _ = integrate(slope, double(image(6)), LEVELS, second, past, steps=[6])
    assert (abs(float(end) - image(7)) < 1e-9) == (degree < 2)


def test_even_weights_are_adams_bashforths():
    even, sigma = multistep.through_times(lambda sigma: sigma), double(5.0, 4.0, 3.0, 2.0, 1.0)
    for m, weights in CLASSIC.items():
        assert multistep.even_row(LEVELS)(3, m).tolist() == pytest.approx(weights, abs=1e-15)
        assert even(sigma)(3, m).tolist() == pytest.approx(weights, abs=1e-13)
    wide = even(double(5.0, 4.0, 2.0, 1.0))(2, 3)  # twin: an uneven one has others
    assert wide.tolist() == pytest.approx((53 / 36, -11 / 12, 4 / 9), abs=1e-13)


@pytest.mark.parametrize("solver, time", [("ab4-sigma", lambda sigma: sigma), ("deis", multistep.vp_time)])
def test_slopes_that_are_polynomials_in_another_time(solver, time):
    for degree in range(5):
        field = lambda sigma, degree=degree: time(torch.as_tensor(sigma, dtype=torch.float64)) ** degree
        past = tuple((LEVELS[k], field(LEVELS[k])) for k in range(3))
        x, _ = integrate(lambda x, sigma: field(sigma), double(0.0), LEVELS, solver, past, steps=range(3, 6))
        truth = quad(lambda sigma: float(field(sigma)), 1.9, 0.002, epsabs=1e-13)[0]
        assert (abs(float(x) - truth) < 1e-11) == (degree < 4)


def test_the_time_of_deis_is_that_of_the_vp_process():
    t = double(1e-3, 0.1, 0.7, 1.0)
    sigma = torch.sqrt(torch.exp(19.9 * t**2 / 2 + 0.1 * t) - 1)  # (5) of 2011.13456 with beta from 0.1 to 20
    torch.testing.assert_close(multistep.vp_time(sigma), t, rtol=1e-12, atol=0)
    assert float((multistep.vp_time(sigma, 0.1, 10.0) - t).abs().max()) > 0.1


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipcs_weights_are_exact_for_polynomials_in_lambda(order):
    """But for two values, where its authors choose 1/2 in place of what is exact."""
    sigma = double(9.0, 4.0, 1.3, 0.5, 0.2)
    lam, k = -torch.log(sigma), 3
    for corrector in (False, True):
        weights = multistep._unipc_row(sigma, k, order, corrector)
        places = lam[k - order + 1 : k + 1 + corrector].flip(0)
        for degree in range(len(weights)):
            mean = quad(lambda t, d=degree: t**d * np.exp(t), float(lam[k]), float(lam[k + 1]))[0]
            mean /= 1 / sigma[k + 1] - 1 / sigma[k]
            exact = abs(float((weights * places**degree).sum() - mean)) < 1e-9
            assert exact == (len(weights) != 2 or degree == 0)
        if len(weights) == 2:
            gap = float(places[0] - places[1])
            assert abs(float(weights[0]) - (0.5 if corrector else 1 + 0.5 * float(lam[k + 1] - lam[k]) / gap)) < 1e-12


# --- published algorithms --------------------------------------------------------------------------------


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


def published_ipndm(model, x, t, order, last):
    """iPNDM in plain arrays, with the order of the step to 0."""
    slopes = []
    for k in range(len(t) - 1):
        slopes.insert(0, (x - model(torch.from_numpy(x), t[k]).numpy()) / t[k])
        weights = CLASSIC[min(len(slopes), order if t[k + 1] else last)]
        x = x + (t[k + 1] - t[k]) * sum(w * each for w, each in zip(weights, slopes))
    return x


GRIDS = [edm(8, 0.002, 80), Grid(np.append(uneven(9, 80, 0.01).numpy(), 0.0))]


@pytest.fixture(scope="module")
def case():
    model = MixtureDenoiser([0.5, 0.5], torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(2, 3, 2, 2), 0.1)
    return model, torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("solver, published, twins", [
    ("dpmpp2m", published_dpmpp2m, [{"power": 0}, {"power": -1}]),  # r = 1, and r upside down
    ("ipndm2", partial(published_ipndm, order=2, last=2), [{"last": 1}]),
    ("ipndm3", partial(published_ipndm, order=3, last=2), [{"last": 1}, {"order": 2}]),
    ("ipndm", partial(published_ipndm, order=4, last=2), [{"last": 4}, {"order": 3}]),
])
def test_the_published_algorithms(case, grid, solver, published, twins):
    model, z = case
    ours, x = sample(model, z, grid, solver).numpy(), z.double().numpy() * grid.sigma_max
    np.testing.assert_allclose(ours, published(model, x, grid.values), rtol=0, atol=1e-12)
    for twin in twins:
        assert np.abs(ours - published(model, x, grid.values, **twin)).max() > 1e-5


@pytest.mark.parametrize("grid", GRIDS)
def test_unipc_is_that_of_diffusers(case, grid):
    """Their scheduler works on x / sqrt(1 + sigma^2), the same solver but for rounding."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install 'art_edm[diffusers]'")
    model, z = case

    def theirs(order, kind="bh2"):
        scheduler = diffusers.UniPCMultistepScheduler(prediction_type="sample", solver_order=order, solver_type=kind,
                                                      final_sigmas_type="zero")
        scheduler.set_timesteps(grid.num_steps)
        scheduler.sigmas = torch.tensor(grid.values)
        x = z.double() * grid.sigma_max / math.sqrt(1 + grid.sigma_max**2)
        for t, sigma in zip(scheduler.timesteps, scheduler.sigmas):
            x = scheduler.step(model(x * torch.sqrt(1 + sigma**2), sigma), t, x).prev_sample
        return x

    ours = sample(model, z, grid, "unipc")
    torch.testing.assert_close(ours, theirs(3), rtol=0, atol=1e-10)
    assert min(float((ours - twin).abs().max()) for twin in (theirs(2), theirs(3, "bh1"))) > 1e-4


# --- pasts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", MULTISTEP)
def test_the_first_step_is_eulers_and_the_end_needs_no_evaluation(solver):
    x, sigma, seen = double(-0.7, 1.9).reshape(2, 1, 1, 1), double(4.0, 1.0, 0.3, 0.0), []
    first, _ = integrate(GAUSSIAN, x, sigma, solver, steps=[0])
    torch.testing.assert_close(first, euler_step(GAUSSIAN, x, *sigma[:2])[0], rtol=1e-14, atol=0)
    second = integrate(GAUSSIAN, x, sigma, solver, steps=[0, 1])[0]
    assert (second - euler_step(GAUSSIAN, first, *sigma[1:3])[0]).abs().min() > 1e-3
    integrate(lambda x, level: seen.append(float(level)) or GAUSSIAN(x, level), x, sigma, solver)
    assert seen == sigma[:-1].tolist()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_run_may_be_cut_anywhere(solver):
    sigma, x, steps = torch.cat([uneven(8, 80, 0.01), double(0.0)]), double(-0.7, 1.9).reshape(2, 1, 1, 1), range(9)
    whole, past = integrate(GAUSSIAN, x, sigma, solver)
    for cut in range(1, 9):
        before = integrate(GAUSSIAN, x, sigma, solver, steps=steps[:cut])
        after = integrate(GAUSSIAN, before[0], sigma, solver, before[1], steps=steps[cut:])
        assert torch.equal(after[0], whole)
        if solver in MULTISTEP and not (cut == 8 and SOLVERS[solver].last_order == 1):
            # twin: without its past it is another run
            assert not torch.equal(integrate(GAUSSIAN, before[0], sigma, solver, steps=steps[cut:])[0], whole)
        keeps = [float(level[0]) for level in before[1]]  # one too many would be memory for nothing
        assert keeps == sigma[max(cut - SOLVERS[solver].past, 0) : cut].tolist()


def test_how_much_of_the_past_is_kept():
    keeps = {"dpmpp2m": 1, "ipndm2": 1, "ipndm3": 2, "ipndm": 3, "ab4-sigma": 3, "deis": 3, "unipc": 3, "clock": 3,
             "clock-denoised": 2}
    assert {name: solver.past for name, solver in MULTISTEP.items()} == keeps


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_gradients_with_respect_to_levels_state_and_past(solver):
    sigma = uneven(8).requires_grad_()
    x = double(-0.7, 1.9).reshape(2, 1, 1, 1).requires_grad_()

    def run(x, sigma):
        grid = torch.cat([sigma, double(0.0)])
        middle, past = integrate(GAUSSIAN, x, grid, solver, steps=range(3))
        return integrate(GAUSSIAN, middle, grid, solver, past, steps=range(3, 9))[0]

    assert torch.autograd.gradcheck(run, (x, sigma))
    assert (torch.autograd.grad(run(x, sigma).sum(), sigma)[0] != 0).all()


def test_how_far_back_a_level_reaches():
    """Weights of earlier steps that change with a level: one step more where the clock is interpolated."""
    for name, solver in MULTISTEP.items():
        moved = LEVELS.clone()
        moved[4] *= 1.01
        rows, others = solver.rule(LEVELS), solver.rule(moved)
        flat = lambda row: torch.cat([each for each in row if each is not None]) if name == "unipc" else row
        changed = [k for k in range(7) if not torch.equal(*(flat(each(k, min(k, solver.past) + 1))
                                                            for each in (rows, others)))]
        assert not changed or min(changed) >= 3 - solver.reach
        assert (2 in changed) == (solver.reach == 1)


def test_steps_are_pure():
    x, kept = double(-0.7, 1.9).reshape(2, 1, 1, 1), double(0.2, -0.4).reshape(2, 1, 1, 1)
    for solver in MULTISTEP.values():
        past, before = ((LEVELS[1], kept, kept),), (x.clone(), kept.clone())
        row = partial(solver.rule(LEVELS), 2)
        first, again = (solver.step(GAUSSIAN, x, *LEVELS[2:4], past, row) for _ in range(2))
        assert torch.equal(first[0], again[0]) and torch.equal(x, before[0]) and torch.equal(kept, before[1])
        assert len(past) == 1 and not torch.equal(first[0], solver.step(GAUSSIAN, x, *LEVELS[2:4], (), row)[0])
