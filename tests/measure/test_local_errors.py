"""Local errors of solvers against one exact step of the closed form; and ART-RL for costs of a higher power."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.clocks import GaussianClock
from art_edm.learning.config import PRESETS, live
from art_edm.learning.training import train
from art_edm.measure.dense_paths import place_points
from art_edm.measure.local_errors import measure_errors
from art_edm.measure.profile import Profile
from art_edm.models.analytic import GaussianDenoiser
from art_edm.sampling.multistep import on_path
from art_edm.sampling.solvers import SOLVERS, integrate, order_of, slope_of

VARIANCE = 0.25
STRIDE, POINTS = 6, 160


def denoiser() -> GaussianDenoiser:
    return GaussianDenoiser(0.0, VARIANCE, (1, 2, 2))


def uneven() -> GaussianDenoiser:
    """Pixels of unequal variance: C_4 of equal ones is zero at some levels."""
    return GaussianDenoiser(0.0, VARIANCE * torch.logspace(-1, 1, 16).double().reshape(1, 4, 4), (1, 4, 4))


def draw(count: int = 3) -> torch.Tensor:
    return torch.randn((count, 1, 2, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def exact(latents: torch.Tensor, sigma: float) -> torch.Tensor:
    """The path that starts at 80 z: x is proportional to the standard deviation sqrt(v + sigma^2)."""
    return 80 * latents * ((VARIANCE + sigma**2) / (VARIANCE + 80.0**2)) ** 0.5


def expected(solver: str, levels: np.ndarray, k: int, past: int) -> np.ndarray:
    """C_p of the step that ends at level k, from exact states, with so many exact steps before it."""
    slope, order = slope_of(denoiser()), order_of(solver)
    kept, ends = (), [levels[k - STRIDE * j] for j in range(past + 1, -1, -1)]
    for j, start in enumerate(ends[:-1]):
        end, kept = integrate(slope, exact(draw(), start), torch.tensor(ends), solver, kept, steps=[j])
        kept = on_path(kept, exact(draw(), start))
    error = (end - exact(draw(), ends[-1])).flatten(1).square().mean(dim=1).sqrt()
    return (error / (ends[-2] - ends[-1]) ** (order + 1)).numpy()


@pytest.mark.parametrize("solver, past, cost", [
    ("euler", 0, 1), ("heun", 0, 2), ("dpmpp2m", 1, 1), ("ab4-sigma", 3, 1), ("deis", 3, 1), ("rk4", 0, 4),
])
def test_the_error_of_a_step_is_that_from_the_exact_path(solver, past, cost):
    clock = GaussianClock(80.0, VARIANCE**0.5)
    net = denoiser()
    profile = measure_errors(net, draw(), clock, POINTS, solver=solver, stride=STRIDE)
    levels = place_points(clock, net.sigma_min, POINTS)
    assert profile.order == order_of(solver) and profile.norm.shape == (3, POINTS - STRIDE + 2)
    fine = order_of(solver) == 4  # RK4 follows the path
    path = POINTS + 3 * (POINTS - 1) if fine else POINTS
    assert profile.evaluations == net.evaluations == 3 * (path + (cost - 1) * (POINTS - STRIDE))
    apart = []
    for k in (70, 90, 110):  # sigma = 3 to 0.2
        found = profile.norm[:, k - STRIDE + 1]
        np.testing.assert_allclose(found, expected(solver, levels, k, past), rtol=0.1)
        assert profile.sigma[k - STRIDE + 1] == pytest.approx((levels[k] * levels[k - STRIDE]) ** 0.5)
        other = ("dpmpp2m", levels, k, 1) if solver == "heun" else ("heun", levels, k, 0)
        twin = expected(*other)
        apart.append(np.abs(found / twin - 1).max())
    assert max(apart) > 0.3  # another solver's


# sigma(s), s(sigma): three clocks that bend differently at sigma = 1.3
BENDS = {"even": (lambda s: 4 - s, lambda sigma: 4 - sigma), "log": (lambda s: 4 * np.exp(-s), lambda x: np.log(4 / x)),
         "rho 7": (lambda s: (1.3 - s / 4) ** 7, lambda sigma: 4 * (1.3 - sigma ** (1 / 7)))}


def constant(solver: str, clock: str, steps: int = 100) -> float:
    """e / h^(p + 1) of the step from sigma = 1.3 of a grid of that clock, after exact ones."""
    (sigma_of, place), past, first = BENDS[clock], (), SOLVERS[solver].past + 2
    grid = sigma_of(place(1.3) + (np.arange(first + 4) - first) / steps)
    for k in range(2, first + 1):
        x = exact(draw(1), grid[k])
        end, past = integrate(slope_of(denoiser()), x, torch.tensor(grid), solver, past, steps=[k])
        past = on_path(past, x)
    error = (end - exact(draw(1), grid[first + 1])).mean()
    return float(error) / (grid[first] - grid[first + 1]) ** (order_of(solver) + 1)


@pytest.mark.parametrize("solver", SOLVERS)
def test_which_solvers_have_a_local_error_of_their_own_step(solver):
    """In the limit of short steps C_p is the same on every clock, or there is none: |Q| would not know it."""
    found = np.array([constant(solver, clock) for clock in BENDS])
    spread = np.ptp(found) / np.abs(found).max()
    if SOLVERS[solver].alone or solver == "unipc":  # whose next step corrects it
        assert spread < 0.03
    else:
        assert spread > 0.4
        with pytest.raises(ValueError, match=f"found the local errors of {solver}, which follow from the steps around"):
            measure_errors(denoiser(), draw(), GaussianClock(80.0, 0.5), 40, solver=solver)


def test_what_remains_of_unipc_s_error_after_the_next_step():
    """Less than a tenth on short steps: no C_p of a single step tells the error of a run."""
    grid, past = 4 * np.exp(-np.arange(8) / 100), ()
    for k in range(5):
        x = exact(draw(1), grid[k])
        end, past = integrate(slope_of(denoiser()), x, torch.tensor(grid), "unipc", past, steps=[k])
        past = on_path(past, x) if k < 4 else past
    corrected = integrate(slope_of(denoiser()), end, torch.tensor(grid), "unipc", past, steps=[5])[1][-1][2]
    before, after = (float((state - exact(draw(1), grid[5])).abs().mean()) for state in (end, corrected))
    assert 0 < after < before / 10
    with pytest.raises(ValueError, match="found the local errors of unipc"):
        measure_errors(denoiser(), draw(), GaussianClock(80.0, 0.5), 40, solver="unipc")


def test_euler_s_error_is_half_of_q():
    """e = h^2 x'' / 2: C_1 = |Q| / 2, up to the length of a step."""
    clock = GaussianClock(80.0, VARIANCE**0.5)
    profile = measure_errors(denoiser(), draw(), clock, 400, solver="euler", stride=2)
    sigma = np.array([0.1, 0.5, 2.0])
    path = (VARIANCE + 80.0**2) ** 0.5
    size = draw().flatten(1).square().mean(dim=1).sqrt().numpy()[:, None]
    second = VARIANCE / (VARIANCE + sigma**2) ** 1.5 * 80 / path * size
    np.testing.assert_allclose(profile.norms(sigma), second / 2, rtol=0.03)


def test_few_levels_and_unknown_solvers_are_refused():
    clock = GaussianClock(80.0, 0.5)
    with pytest.raises(ValueError, match="rk5"):
        measure_errors(denoiser(), draw(), clock, 40, solver="rk5")
    with pytest.raises(ValueError, match="at least 10"):
        measure_errors(denoiser(), draw(), clock, 9)
    with pytest.raises(ValueError, match="cached"):
        train(denoiser(), live(PRESETS["default"].changed(solver="heun")))


@pytest.mark.slow
@pytest.mark.parametrize("solver, bound", [("heun", 1.05), ("rk4", 1.15)])
def test_art_rl_reaches_the_optimum_of_its_solver(solver, bound):
    """In a third of the default's iterations, most of the way from the base clock to J* of the order's objective."""
    config = PRESETS["default"].changed(solver=solver, trajectories=6, iterations=120, batch=96, train_steps=64)
    result = train(uneven(), config)

    def score(profile: Profile, sigma: np.ndarray) -> float:
        values = np.append(sigma[:-1], 0.0)
        values[0] = 80.0
        return profile.cost(values) / profile.optimum

    tau = np.linspace(0, 1, 2049)
    reached = score(result.profile, result.learned.sigma(tau))
    start = score(result.profile, result.profile.clock.sigma(tau))
    assert 1 - 1e-3 < reached < bound and start > 1.05 and reached - 1 < (start - 1) / 3
    euler = train(uneven(), config.changed(solver=None, iterations=1)).profile
    assert score(result.profile, euler.direct(2048).values) > 1.05  # ART's own optimum is not this one
