"""Weights of a grid's own: every solver of one evaluation a step is such a method, and the exact one is reached."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from art_edm.grids.grid import Grid, save_grid
from art_edm.grids.weights import written_rows
from art_edm.models.analytic import GaussianDenoiser
from art_edm.sampling.solvers import SOLVERS, integrate, nfe, sample, slope_of
from art_edm.sampling.weighted import table_of, weighted
from tests.support.refine_fields import mixture

LEVELS = np.array([20.0, 6.0, 2.2, 1.1, 0.55, 0.2, 0.0])
SINGLE = [name for name, entry in SOLVERS.items() if entry.stages == 1]


def ends(solver):
    x = 20 * torch.randn(5, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        return integrate(slope_of(mixture()), x, torch.tensor(LEVELS), solver)[0]


@pytest.mark.parametrize("solver", SINGLE)
def test_a_solver_of_one_evaluation_a_step_is_its_table(solver):
    table, expected = table_of(solver, LEVELS), ends(solver)
    assert (ends(weighted(table)) - expected).abs().max() < 1e-12
    assert table.sum(axis=1) == pytest.approx(np.ones(6), abs=1e-9)  # exact for slopes that are constant
    assert all(not table[k, k + 1:].any() for k in range(6))
    if solver != "euler":  # the twin: the newest slope alone is Euler's method
        assert (ends(weighted(np.eye(6)[:1].repeat(6, axis=0))) - expected).abs().max() > 1e-3


def test_it_evaluates_once_in_a_step_and_keeps_what_it_needs():
    entry = weighted(table_of("clock", LEVELS))
    assert nfe(entry, 6) == 6 and entry.past == 3 and weighted(np.eye(1)).past == 0
    assert weighted(table_of("unipc", LEVELS)).past == 4


@pytest.mark.parametrize("solver", ["heun", "rk4"])
def test_a_solver_of_more_evaluations_has_no_table(solver):
    with pytest.raises(ValueError, match=f"found {solver}, which evaluates .* in a step, expected one .* euler, "):
        table_of(solver, LEVELS)


def test_a_grid_of_other_steps_is_refused():
    with pytest.raises(ValueError, match="found weights of 3 steps for a grid of 6"):
        ends(weighted(np.eye(3)))


def test_one_step_with_its_exact_weight_ends_where_the_path_ends():
    """Data N(0, s^2): D = s^2 x / (s^2 + sigma^2), the path is x_0 sqrt(s^2 + sigma^2) / sqrt(s^2 + sigma_0^2), and so
    w = (1 - s / sqrt(s^2 + sigma_0^2)) (s^2 + sigma_0^2) / sigma_0^2."""
    s, top = 0.5, 80.0
    model, grid = GaussianDenoiser(0.0, s**2, (1, 2, 2)), Grid([top, 0.0])
    latents = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = s**2 + top**2
    weight = (1 - s / total**0.5) * total / top**2
    exact = latents * s  # it starts at x_0 = sqrt(s^2 + sigma_0^2) latents
    assert (sample(model, latents, grid, weighted(np.array([[weight]]))) - exact).abs().max() < 1e-12
    assert (sample(model, latents, grid, "euler") - exact).abs().max() > 0.1


def test_the_ten_lines_of_the_docs_sample_as_we_do(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / "art_edm" / "docs" / "grids.md"
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
               if "def sample_weighted" in block)
    monkeypatch.chdir(tmp_path)
    grid, table = Grid(LEVELS), table_of("clock", LEVELS) * 0.99
    save_grid("art5.npy", grid, {"weights": written_rows(table)})
    model = mixture()
    noise = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    names = {"model": lambda x, sigma: model(x, sigma), "noise": noise}
    with torch.no_grad():
        exec(code, names)
    assert (names["images"] - sample(model, noise, grid, weighted(table))).abs().max() < 1e-12
    assert (names["images"] - sample(model, noise, grid, "clock")).abs().max() > 1e-3  # the twin
