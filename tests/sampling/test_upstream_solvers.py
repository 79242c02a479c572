"""--solver in the patched scripts, on their stand-ins, and `upstream.solve`: no checkout is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from art_edm.grids.grid import GridError, edm, save_grid
from art_edm.models.analytic import GaussianDenoiser
from art_edm.sampling.solvers import SOLVERS, sample
from art_edm.upstream import solve
from tests.sampling.test_upstream_options import BOTH, EDM, EDM2, program

NEW = tuple(name for name in SOLVERS if name not in ("euler", "heun"))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stand-in beside a grid of 9 steps; returns the result and what the command's function got."""
    monkeypatch.chdir(tmp_path)
    save_grid("a9.npy", edm(9, 0.002, 80), {})

    def invoke(names, *args, **more):
        seen = {}
        return CliRunner().invoke(program(names, seen), ["--network=absent.pkl", *args], **more), seen

    return invoke


def test_a_solver_that_is_added_to_the_table_is_offered(run, monkeypatch):
    assert run(EDM2, "--schedule=a9.npy", "--solver=toy")[0].exit_code == 2
    monkeypatch.setitem(SOLVERS, "toy", SOLVERS["rk4"])
    assert run(EDM2, "--schedule=a9.npy", "--solver=toy")[1]["grid_solver"] == "toy"


# --- options -----------------------------------------------------------------------------------------


@BOTH
def test_a_solver_that_upstream_lacks(run, names):
    for solver in NEW:
        result, seen = run(names, "--schedule=a9.npy", f"--solver={solver}")
        assert result.exit_code == 0, result.output
        assert seen["grid_solver"] == solver and seen["num_steps"] == 9 and seen.get("solver") is None
    _, seen = run(names, "--schedule=a9.npy", "--solver=ipndm", "--steps=4", "--S_churn=0", "--S_noise=1")
    assert seen["grid"].num_steps == 4 and seen["grid_solver"] == "ipndm"


def test_upstreams_own_solvers_stay_upstreams(run):
    for solver in ("euler", "heun"):
        for grid in ([], ["--schedule=a9.npy", "--S_churn=3"]):
            result, seen = run(EDM, f"--solver={solver}", *grid)
            assert result.exit_code == 0 and seen["solver"] == solver and "grid_solver" not in seen
    for grid in ([], ["--schedule=a9.npy", "--S_churn=3"]):  # EDM2's sampler is Heun's; it has no other
        result, seen = run(EDM2, "--solver=heun", *grid)
        assert result.exit_code == 0 and "solver" not in seen and "grid_solver" not in seen
    assert run(EDM2, "--schedule=a9.npy", "--solver=euler")[1]["grid_solver"] == "euler"
    assert run(EDM, "--schedule=a9.npy", default_map={"solver": "rk4"})[1]["grid_solver"] == "rk4"


@pytest.mark.parametrize("names, solver", [*((names, each) for names in (EDM, EDM2) for each in NEW), (EDM2, "euler")])
def test_without_a_grid_or_with_noise_it_is_a_usage_error(run, names, solver):
    grids = [[]] + ([["--schedule=vp"]] if names else [])
    for grid in grids:
        result, seen = run(names, f"--solver={solver}", *grid)
        assert result.exit_code == 2 and not seen and result.output.count("Error") == 1
        assert f"found --solver={solver} without a grid; add --schedule=FILE.npy" in result.output
    for option in ("--S_churn=40", "--S_noise=1.003"):
        result, seen = run(names, f"--solver={solver}", "--schedule=a9.npy", option)
        assert result.exit_code == 2 and not seen
        assert f"found {option.split('=')[0]} with --solver={solver}, which adds no noise" in result.output


@BOTH
def test_the_sidecar_s_solver_is_used_and_said(run, names, monkeypatch):
    save_grid("c5.npy", edm(5, 0.002, 80), {"solver": "clock"})
    result, seen = run(names, "--schedule=c5.npy")
    assert seen["grid_solver"] == "clock" and result.exit_code == 0
    assert result.output == "Solver clock, as c5.json says; --solver=NAME takes another.\n"
    result, seen = run(names, "--schedule=c5.npy", "--solver=dpmpp2m")  # overrides
    assert seen["grid_solver"] == "dpmpp2m" and result.output == ""
    result, seen = run(names, "--schedule=c5.npy", "--solver=heun")
    assert "grid_solver" not in seen and result.output == ""
    result, seen = run(names, "--schedule=c5.npy", "--S_churn=3")
    assert result.exit_code == 2 and "found --S_churn with --solver=clock, which adds no noise" in result.output
    for solver, kept in (("heun", None), ("euler", "euler")):
        save_grid("h5.npy", edm(5, 0.002, 80), {"solver": solver})
        result, seen = run(names, "--schedule=h5.npy")
        assert seen.get("solver" if names else "grid_solver") == kept and f"Solver {solver}, as" in result.output
    monkeypatch.setenv("RANK", "1")
    assert run(names, "--schedule=c5.npy")[0].output == ""


@BOTH
def test_a_sidecar_that_names_no_solver_of_ours(run, names):
    save_grid("n5.npy", edm(5, 0.002, 80), {"solver": None})
    assert run(names, "--schedule=n5.npy")[0].output == "" and "grid_solver" not in run(names, "--schedule=n5.npy")[1]
    save_grid("o5.npy", edm(5, 0.002, 80), {"solver": "dopri"})
    result, seen = run(names, "--schedule=o5.npy")
    assert result.exit_code == 2 and not seen and "found the solver 'dopri' in o5.json, expected" in result.output
    for solver in (["clock"], {"name": "clock"}, 3):
        save_grid("l5.npy", edm(5, 0.002, 80), {"solver": solver})
        result, seen = run(names, "--schedule=l5.npy")
        assert result.exit_code == 2 and not seen and f"found the solver {solver!r} in l5.json" in result.output
    Path("n5.json").write_text("{}")  # of another file
    result, seen = run(names, "--schedule=n5.npy")
    assert result.exit_code == 0 and "note: n5.json: found the provenance of another file" in result.output


ROWS = [[0.9], [1.25, -0.5], [1.5, -0.75, 0.25]]


@BOTH
def test_the_sidecar_s_weights_are_used_and_said(run, names, monkeypatch):
    grid, net = edm(3, 0.002, 80), GaussianDenoiser(0.0, 0.25, (3, 4, 4))
    save_grid("w3.npy", grid, {"solver": "clock", "weights": ROWS})
    result, seen = run(names, "--schedule=w3.npy")
    assert result.exit_code == 0 and seen["grid"] == grid and seen["num_steps"] == 3
    assert result.output == "Weights of w3.json for its 3 steps; --solver=NAME takes a solver without them.\n"
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = lambda solver: solve(solver, grid, lambda x, sigma: net(x, sigma), noise, torch.tensor(grid.values))
    by_hand, slopes = noise * 80, []  # step after step, from the rows as they are written
    for k, row in enumerate(ROWS):
        slopes.insert(0, (by_hand - net(by_hand, torch.tensor(grid.values[k]))) / grid.values[k])
        by_hand = by_hand + (grid.values[k + 1] - grid.values[k]) * sum(w * f for w, f in zip(row, slopes))
    assert torch.allclose(ends(seen["grid_solver"]), by_hand, rtol=1e-12, atol=1e-12)
    assert (ends("clock") - by_hand).abs().max() > 1e-3  # the twin
    assert run(names, "--schedule=w3.npy", "--steps=3")[0].output == result.output
    result, seen = run(names, "--schedule=w3.npy", "--solver=dpmpp2m")  # overrides
    assert seen["grid_solver"] == "dpmpp2m" and result.output == ""
    result, seen = run(names, "--schedule=w3.npy", "--steps=5")  # they cannot be resampled
    assert seen["grid_solver"] == "clock" and seen["grid"].num_steps == 5
    assert "note: the weights of w3.json are for 3 steps, not 5; they are left out\nSolver clock" in result.output
    result, seen = run(names, "--schedule=w3.npy", "--S_churn=3")
    assert result.exit_code == 2 and not seen and "found --S_churn with the grid's weights, which add" in result.output
    monkeypatch.setenv("RANK", "1")
    assert run(names, "--schedule=w3.npy")[0].output == ""


@BOTH
def test_weights_that_do_not_belong_to_the_grid_are_refused(run, names):
    for rows, message in ((ROWS[:2], "found 2 rows of weights for 3 steps"), ([[1.0], [float("inf")], [1.0]], None)):
        save_grid("w3.npy", edm(3, 0.002, 80), {"weights": ROWS})
        Path("w3.json").write_text(json.dumps({**json.loads(Path("w3.json").read_text()), "weights": rows}))
        result, seen = run(names, "--schedule=w3.npy")
        assert result.exit_code == 2 and not seen and (message or "found inf") in result.output
        assert "w3.json: " in result.output and "name a solver with --solver" in " ".join(result.output.split())
        assert run(names, "--schedule=w3.npy", "--solver=clock")[0].exit_code == 0
    save_grid("w4.npy", edm(4, 0.002, 80), {})
    Path("w4.json").write_bytes(Path("w3.json").read_bytes())  # another grid's
    result, seen = run(names, "--schedule=w4.npy")
    assert result.exit_code == 2 and not seen and "w4.json: found the provenance of another file" in result.output
    result, seen = run(names, "--schedule=w4.npy", "--solver=clock")
    assert result.exit_code == 0 and seen["grid_solver"] == "clock"


@BOTH
def test_unknown_solvers_and_help(run, names):
    result, seen = run(names, "--schedule=a9.npy", "--solver=dopri")
    assert result.exit_code == 2 and not seen and "'dpmpp2m'" in result.output
    text = " ".join(run(names, "--help")[0].output.split()).replace("| ", "|")
    assert "|".join(SOLVERS) in text and ("Pick a step." in text) == bool(names)
    assert ("own]" in text) != bool(names)


def test_a_command_of_python_without_a_solver():
    seen = {}
    program(EDM2, seen).callback(num_steps=3)
    assert seen == {"num_steps": 3}


@pytest.mark.slow
def test_naming_a_solver_loads_nothing_more():
    code = """
import sys, art_edm.upstream as upstream
print("torch" in sys.modules)
import torch
upstream.solve("ipndm", [1.0, 0.0], lambda x, t: x, torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.0]))
print(*sorted(m for m in sys.modules if m.split(".")[0] in ("art_edm", "scipy", "requests", "PIL")))
"""
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert output.split() == ["False", "art_edm", *(f"art_edm.{name}" for name in (
        "grids", "grids.grid", "grids.weights", "models", "models.denoiser", "models.evaluate", "runtime",
        "runtime.errors", "runtime.files", "runtime.memory", "runtime.precision", "sampling", "sampling.multistep",
        "sampling.solvers", "upstream"))]


# --- solve -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", SOLVERS)
def test_solve_is_sample_in_the_samplers_precision(solver):
    model, grid = GaussianDenoiser(0.3, 0.25, (2, 2, 2)), edm(7, 0.002, 80)
    model.initial = lambda latents, sigma: latents.double() * sigma  # upstream's start
    z = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(1))
    other = "euler" if solver != "euler" else "heun"
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        found = solve(solver, grid, model, z, torch.tensor(grid.values).to(dtype))
        assert found.dtype == dtype and float((found - sample(model, z, grid, solver)).abs().max()) < bar
        assert float((found - sample(model, z, grid, other)).abs().max()) > 1e-3


def test_solve_refuses():
    x, levels = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.0])
    with pytest.raises(GridError, match="grid_solver = 'rk4' without a grid"):
        solve("rk4", None, lambda x, t: x, x, levels)
    with pytest.raises(GridError, match="found S_churn = 40 with grid_solver = 'rk4', which adds no noise"):
        solve("rk4", [1.0, 0.0], lambda x, t: x, x, levels, 40)
    with pytest.raises(ValueError, match="found solver 'dopri', expected one of euler,"):
        solve("dopri", [1.0, 0.0], lambda x, t: x, x, levels)
    assert solve("rk4", [1.0, 0.0], lambda x, t: x / 4, x, levels).item() == 0.25
