"""Derivatives of a sampler's end point by its levels: against autograd, against full runs, and their exact cost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.grid import edm
from art_edm.models.analytic import MixtureDenoiser
from art_edm.refining import levenberg_marquardt as lm
from art_edm.refining.solver_jacobian import Noises, Scheme, SolverRuns, solve_ends
from art_edm.refining.stage import Stage
from art_edm.runtime.context import Context
from art_edm.sampling.solvers import SOLVERS, integrate, nfe, slope_of

LEVELS = np.array([20.0, 6.0, 2.2, 1.1, 0.55, 0.2, 0.0])
COUNT, SHAPE = 5, (1, 2, 2)


def mixture():
    generator = torch.Generator().manual_seed(3)
    means = torch.randn(3, *SHAPE, generator=generator, dtype=torch.float64)
    return MixtureDenoiser([0.5, 0.3, 0.2], means, [0.3, 0.4, 0.6], sigma_min=0.01, sigma_max=20.0)


def drawn(count=COUNT):
    latents = torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    return solve_ends("rk4", latents, None, edm(60, 0.01, 20.0).values, Stage(mixture(), Context(batch=2)))[0]


def runs_of(solver, batch=2):
    return SolverRuns(solver, drawn(), Stage(mixture(), Context(batch=batch)))


def exact_jacobian(solver, levels=LEVELS):
    """d x_K / d sigma_j by autograd [M, K-1, d], and the residual [M, d]."""
    model, noises = mixture(), drawn()
    x = model.initial(noises.latents, float(levels[0]))
    first, last = torch.tensor(levels[:1]), torch.tensor(levels[-1:])

    def end(inner):
        return integrate(slope_of(model), x, torch.cat([first, inner, last]), solver)[0]

    inner = torch.tensor(levels[1:-1])
    jacobian = torch.autograd.functional.jacobian(end, inner)  # [M, C, H, W, K-1]
    return jacobian.flatten(1, 3).transpose(1, 2), (end(inner) - noises.ends).flatten(1)


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_differences_are_those_of_autograd(solver):
    job = runs_of(solver)
    # its ends bend more: the difference's own error is linear in the step, 1e-6 at 1e-6
    jtj, jtr = job.derivatives(job.run(Scheme(LEVELS)), step=1e-7 if solver == "clock-denoised" else 1e-6)
    jacobian, residual = exact_jacobian(solver)
    d = residual.shape[1]
    assert jtj == pytest.approx((jacobian @ jacobian.transpose(1, 2) / d).numpy(), rel=1e-4, abs=1e-7)
    assert jtr == pytest.approx((jacobian @ residual[:, :, None] / d)[:, :, 0].numpy(), rel=1e-4, abs=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["dpmpp2m", "ipndm2", "ipndm", "clock"])
def test_a_multistep_solver_needs_its_past(solver, monkeypatch):
    job = runs_of(solver)
    run = job.run(Scheme(LEVELS))
    right = job.derivatives(run, step=1e-6)[1]
    kept = {i: each._replace(starts=[start._replace(past=()) for start in each.starts])
            for i, each in run.kept.items()}
    wrong = runs_of(solver).derivatives(run._replace(kept=kept), step=1e-6)[1]
    assert np.abs(wrong - right).max() > 0.1 * np.abs(right).max()


@pytest.mark.slow
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_restart_gives_the_bits_of_a_full_run_at_the_expected_cost(solver):
    job, step = runs_of(solver, batch=COUNT), 0.01
    run = job.run(Scheme(LEVELS))
    assert job.evaluations == COUNT * nfe(solver, 6)
    jtj, _ = job.derivatives(run, step)
    # each level costs a run from the first step that it changes, without the first evaluation, which is known
    runs = (nfe(solver, min(n + SOLVERS[solver].reach, 6)) - 1 for n in range(2, 7))
    assert job.evaluations == COUNT * (nfe(solver, 6) + sum(runs))
    columns = []
    for j in range(1, 6):
        moved = LEVELS.copy()
        moved[j] += step * min(LEVELS[j - 1] - LEVELS[j], LEVELS[j] - LEVELS[j + 1])
        columns.append((job.run(Scheme(moved)).kept[0].end - run.kept[0].end).flatten(1) / (moved[j] - LEVELS[j]))
    full = torch.stack(columns, dim=1)
    assert np.array_equal(jtj, (full @ full.transpose(1, 2) / 4).numpy())


def whole_differences(solver, levels=LEVELS, step=1e-5):
    """jtr by central differences of whole runs, each with weights of its own; float64."""
    model, noises = mixture(), drawn()
    x = model.initial(noises.latents, float(levels[0]))
    end = lambda at: integrate(slope_of(model), x, torch.tensor(at), solver)[0]
    residual, columns = (end(levels) - noises.ends).flatten(1), []
    with torch.no_grad():
        for j in range(1, len(levels) - 1):
            up, down = levels.copy(), levels.copy()
            up[j], down[j] = levels[j] * (1 + step), levels[j] * (1 - step)
            columns.append((end(up) - end(down)).flatten(1) / (up[j] - down[j]))
    return (torch.stack(columns, dim=1) @ residual[:, :, None] / residual.shape[1])[:, :, 0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["clock", "clock-denoised", "unipc", "deis"])
def test_a_move_changes_the_weights_of_steps_before_it(solver, monkeypatch):
    """The learned clock runs through all levels: a step's weights know the level after its end."""
    reach = SOLVERS[solver].reach
    derivatives = lambda job: job.derivatives(job.run(Scheme(LEVELS)), step=1e-6)[1]
    whole = whole_differences(solver)
    assert derivatives(runs_of(solver)) == pytest.approx(whole, rel=1e-4, abs=1e-6)
    for wrong in range(reach):
        monkeypatch.setitem(SOLVERS, solver, SOLVERS[solver]._replace(reach=wrong))
        assert np.abs(derivatives(runs_of(solver)) - whole).max() > 0.01 * np.abs(whole).max()
    assert reach == (1 if solver.startswith("clock") else 0)


def test_the_first_slope_is_not_reused_for_another_step(monkeypatch):
    job = runs_of("heun")
    run, right = job.run(Scheme(LEVELS)), None
    right = job.derivatives(run, 1e-6)[1]
    late = {i: each._replace(starts=[a._replace(slope=b.slope) for a, b in zip(each.starts, each.starts[1:] * 2)])
            for i, each in run.kept.items()}
    wrong = runs_of("heun").derivatives(run._replace(kept=late), 1e-6)[1]
    assert np.abs(wrong - right).max() > 0.1 * np.abs(right).max()


def test_errors_are_those_of_a_plain_run():
    job = runs_of("heun")
    model, noises = mixture(), drawn()
    with torch.no_grad():
        x = model.initial(noises.latents, 20.0)
        end, _ = integrate(slope_of(model), x, torch.tensor(LEVELS), "heun")
    plain = (end - noises.ends).square().mean(dim=(1, 2, 3)).sqrt().numpy()
    assert job.run(Scheme(LEVELS)).errors == pytest.approx(plain, rel=1e-12)


def test_labels_go_with_their_noises():
    class Labelled(MixtureDenoiser):
        label_dim = 2

        def denoise(self, x, sigma, class_labels):
            return super().denoise(x, sigma, None) + class_labels[:, :1, None, None]

    base = mixture()
    model = Labelled(base.weights, base.means, base.std, 0.01, 20.0)
    labels = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    noises = drawn()._replace(labels=labels)
    errors_of = lambda part: SolverRuns("heun", part, Stage(model, Context(batch=2))).run(Scheme(LEVELS)).errors
    one, two = map(errors_of, (noises, noises.part(slice(1, 4))))
    assert two == pytest.approx(one[1:4], rel=1e-12)
    swapped = errors_of(noises._replace(labels=labels.flip(1)))
    assert np.abs(swapped - one).min() > 1e-3


@pytest.mark.parametrize("low", [0.0, 0.05])
def test_parameters_are_unconstrained(low):
    q = np.random.default_rng(0).normal(0, 3, (50, 9))
    for row in q:
        levels = lm.levels_of(row, 80.0, low)
        assert (np.diff(levels) < 0).all() and levels[0] == 80 and levels[-1] == 0 and levels[-2] > low
    q = q[0] / 3
    levels = lm.levels_of(q, 80.0, low)
    assert lm.parameters_of(levels, low) == pytest.approx(q, rel=1e-9)
    moved = [(lm.levels_of(q + e, 80.0, low) - lm.levels_of(q - e, 80.0, low))[1:-1] / 2e-6
             for e in 1e-6 * np.eye(9)]
    assert lm.chain(q, levels, low) == pytest.approx(np.array(moved).T, rel=1e-5, abs=1e-8)


def test_a_level_at_the_lowest_is_taken_as_just_above():
    levels = lm.levels_of(lm.parameters_of(np.array([80.0, 1.0, 0.002, 0.0]), 0.002), 80.0, 0.002)
    assert levels[1] == pytest.approx(1.0) and 0.002 < levels[2] < 0.004


def test_the_gradient_is_that_of_the_mean_error():
    """Where errors differ little from noise to noise the smoothing is a thousandth."""
    q, job = lm.parameters_of(LEVELS), runs_of("heun")
    run = job.run(Scheme(LEVELS))
    jtj, jtr = job.derivatives(run, 1e-6)
    gradient, _, _ = lm.model(run.errors, jtj, jtr, lm.chain(q, LEVELS))
    slopes = [(job.run(Scheme(lm.levels_of(q + e, 20.0))).errors.mean()
               - job.run(Scheme(lm.levels_of(q - e, 20.0))).errors.mean()) / 2e-5 for e in 1e-5 * np.eye(5)]
    assert gradient == pytest.approx(np.array(slopes), rel=0.01, abs=1e-3 * np.abs(slopes).max())
    unweighted = lm.chain(q, LEVELS).T @ jtr.mean(axis=0) / run.errors.mean()  # that of the mean square
    assert np.abs(unweighted - slopes).max() > 0.03 * np.abs(slopes).max()


def test_the_secant_learns_a_quadratic():
    generator = np.random.default_rng(1)
    true = generator.normal(size=(4, 4))
    true, H, S = true + true.T, np.eye(4), np.zeros((4, 4))
    for _ in range(4):
        step = generator.normal(size=4)
        S = lm.secant(S, H, step, true @ step)
    assert H + S == pytest.approx(true, abs=1e-9)
    assert np.array_equal(lm.secant(S, H, step, (H + S) @ step), S)  # nothing left to learn


def test_a_step_goes_downhill_where_the_curvature_is_negative():
    gradient, H = np.array([0.01, -0.02]), np.diag([-1.0, 2.0])
    step, promised = lm.proposal(gradient, H, np.ones(2), 0.1)
    assert step == pytest.approx([-0.01 / 1.1, 0.02 / 2.1]) and promised > 0
    far, _ = lm.proposal(100 * gradient, H, np.ones(2), 0.1)
    assert np.abs(far).max() == pytest.approx(lm.MAX_STEP) and far @ gradient < 0


def test_noises_can_be_cut():
    noises = Noises(torch.arange(4.0), torch.arange(4.0) + 10, torch.arange(4.0) + 20).part(slice(1, 3))
    assert [tensor.tolist() for tensor in noises] == [[1, 2], [11, 12], [21, 22]]
    assert Noises(torch.zeros(2), None, torch.zeros(2)).part(slice(0, 1)).labels is None
