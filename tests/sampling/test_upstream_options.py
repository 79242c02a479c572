"""The option --schedule and the levels of a grid, on a stand-in of upstream's scripts: no checkout is needed."""

from __future__ import annotations

import subprocess
import sys

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from art_edm.grids.grid import SIGMA_SLACK, Grid, GridError, edm, read_off, resample, save_grid
from art_edm.upstream import grid_levels, schedule_option


def program(names=(), seen=None):
    """A command with the options that matter: EDM's if `names` are the schedules it knows, else EDM2's."""

    def main(**options):
        if seen is not None:
            seen.update(options)
        if options.get("grid") is not None:
            grid_levels(options["grid"], Network(), torch.zeros([], dtype=torch.float64))

    choices = [click.Option(["--schedule"], type=click.Choice(list(names)), help="Pick a curve.")] if names else []
    solver = click.Option(["--solver"], type=click.Choice(["euler", "heun"]), help="Pick a step.")
    ablations = [click.Option(["--disc", "discretization"]), click.Option(["--scaling"]), solver] if names else []
    return schedule_option(click.Command("main", callback=main, params=[
        click.Option(["--network"], required=True), click.Option(["--steps", "num_steps"], type=int, default=18),
        click.Option(["--rho"], type=float, default=7), click.Option(["--sigma_min"], type=float),
        click.Option(["--sigma_max"], type=float), click.Option(["--S_churn", "S_churn"], type=float, default=0),
        click.Option(["--S_noise", "S_noise"], type=float, default=1), *ablations, *choices,
    ]))


EDM, EDM2 = ("vp", "ve", "linear"), ()
BOTH = pytest.mark.parametrize("names", [EDM, EDM2], ids=["edm", "edm2"])


class Network:
    """What the samplers ask a network for; rounds to multiples of `unit`."""

    def __init__(self, sigma_min=0.0, sigma_max=float("inf"), unit=None):
        self.sigma_min, self.sigma_max, self.unit = sigma_min, sigma_max, unit

    def round_sigma(self, sigma):
        return torch.as_tensor(sigma) if self.unit is None else (sigma / self.unit).round() * self.unit


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the stand-in in a folder with grids; returns the result and what the command's function got."""
    monkeypatch.chdir(tmp_path)
    save_grid("a9.npy", edm(9, 0.002, 80), {})
    save_grid("one.npy", Grid([80.0, 0.0]), {})
    np.save("up.npy", np.array([0.0, 1.0, 80.0]))
    np.save("name with spaces.npy", edm(3, 0.1, 1).values)

    def invoke(names, *args, network=("--network=absent.pkl",), **more):
        seen = {}
        return CliRunner().invoke(program(names, seen), [*network, *args], **more), seen

    return invoke


# --- options -----------------------------------------------------------------------------------------


@BOTH
def test_without_a_grid_the_function_gets_what_it_got(run, names):
    result, seen = run(names, "--steps=5", "--rho=3")
    plain = dict(network="absent.pkl", num_steps=5, rho=3.0, sigma_min=None, sigma_max=None, S_churn=0, S_noise=1)
    ablations = dict(discretization=None, scaling=None, schedule=None, solver=None) if names else {}
    assert result.exit_code == 0 and seen == {**plain, **ablations}  # no `grid` at all


def test_upstreams_own_values_are_passed_on(run):
    for name in EDM:
        assert run(EDM, f"--schedule={name}")[1]["schedule"] == name
    assert run(EDM, "--schedule=ve", "--schedule", "vp", "--rho=5")[1]["schedule"] == "vp"  # the last, as before
    assert run(EDM, default_map={"schedule": "linear"})[1]["schedule"] == "linear"
    seen = {}
    program(EDM, seen).callback(schedule="vp", num_steps=3)  # called from Python
    assert seen == {"schedule": "vp", "num_steps": 3}


@BOTH
def test_a_grid_brings_its_number_of_steps(run, names):
    result, seen = run(names, "--schedule=a9.npy", "--S_churn=3")
    assert result.exit_code == 0 and result.output == ""
    assert seen["grid"] == edm(9, 0.002, 80) and seen["num_steps"] == 9 and seen["S_churn"] == 3
    assert "schedule" not in seen and "grid_solver" not in seen
    assert run(names, "--schedule", "name with spaces.npy")[1]["num_steps"] == 3
    assert run(names, default_map={"schedule": "a9.npy"})[1]["num_steps"] == 9
    assert run(names, "--steps=9", "--schedule=a9.npy")[0].output == ""


@BOTH
def test_steps_that_are_given_resample(run, names, monkeypatch):
    for more in (dict(args=["--steps=18"]), dict(args=[], default_map={"num_steps": 18})):  # 18 is the default too
        result, seen = run(names, "--schedule=a9.npy", *more.pop("args"), **more)
        assert seen["grid"] == read_off(edm(9, 0.002, 80), 18) != edm(18, 0.002, 80) and seen["num_steps"] == 18
        assert result.output == "Resampled a9.npy from 9 to 18 steps.\n"
    result, seen = run(names, "--schedule=a9.npy", "--steps=18", "--resample=paper")
    assert seen["grid"] == resample(edm(9, 0.002, 80), 18) and "18 steps by the paper's rule" in result.output
    assert "resample" not in seen
    for steps, levels in ((1, [0, 9]), (3, [0, 3, 6, 9]), (27, range(10))):  # fewer, one, and more than the file's
        found = run(names, "--schedule=a9.npy", f"--steps={steps}")[1]["grid"]
        assert found.num_steps == steps and len(found.values[::max(steps // 9, 1)]) == len(levels)
        assert np.array_equal(found.values[::max(steps // 9, 1)], edm(9, 0.002, 80).values[levels])
    result, seen = run(names, "--schedule=a9.npy", "--resample=paper")
    assert seen["grid"] == edm(9, 0.002, 80) and "--resample=paper changes nothing" in result.output
    monkeypatch.setenv("RANK", "1")
    assert run(names, "--schedule=a9.npy", "--steps=18")[0].output == ""
    result = run(names, "--schedule=one.npy", "--steps=4")[0]
    assert result.exit_code == 2 and "found a grid of 1 step" in result.output and "--schedule=one.npy" in result.output


@pytest.mark.parametrize("names, option", [
    *((names, option) for names in (EDM, EDM2) for option in ("--rho=7", "--sigma_min=0.002", "--sigma_max=80")),
    (EDM, "--disc=edm"), (EDM, "--scaling=none"),
])
def test_options_that_contradict_a_grid(run, names, option):
    result, seen = run(names, "--schedule=a9.npy", option)
    assert result.exit_code == 2 and f"found {option.split('=')[0]} together with a grid" in result.output
    assert not seen and result.output.count("Error") == 1
    assert run(names, option)[0].exit_code == run(names, "--schedule=a9.npy", "--solver=heun")[0].exit_code == 0


@BOTH
def test_a_contradiction_from_a_default_map_or_the_environment(run, names):
    assert run(names, "--schedule=a9.npy", default_map={"rho": 7})[0].exit_code == 2
    variable = dict(auto_envvar_prefix="GEN", env={"GEN_SIGMA_MAX": "80"})
    assert run(names, "--schedule=a9.npy", **variable)[0].exit_code == 2 and run(names, **variable)[0].exit_code == 0


@pytest.mark.parametrize("other", [*EDM, "a9.npy"])
def test_two_schedules(run, other):
    for order in (["--schedule=a9.npy", f"--schedule={other}"], [f"--schedule={other}", "--schedule=a9.npy"]):
        result, seen = run(EDM, *order)
        assert result.exit_code == 2 and "found --schedule 2 times" in result.output and not seen


@BOTH
@pytest.mark.parametrize("value, part", [
    ("up.npy", "up.npy: values ascend"), ("absent.npy", "absent.npy: found no readable file"),
    ("cosine", "found 'cosine', expected"), ("a9.txt", "found 'a9.txt'"), ("", "found ''"),
])
def test_a_bad_value_is_found_while_options_are_parsed(run, names, value, part):
    for network in (["--network=absent.pkl"], []):  # even before a missing option is
        result, seen = run(names, f"--schedule={value}", network=network)
        assert result.exit_code == 2 and part in result.output and not seen, result.output
        assert "Invalid value for '--schedule'" in result.output


def test_messages_name_the_values_there_are(run):
    assert "expected vp, ve, linear or the name of a .npy file" in run(EDM, "--schedule=VP")[0].output
    assert "expected the name of a .npy file" in run(EDM2, "--schedule=vp")[0].output


def test_help(run):
    text = " ".join(run(EDM, "--help")[0].output.split())
    assert "--schedule vp|ve|linear|FILE.npy Noise levels from FILE.npy" in text and "Pick a curve." in text
    text = " ".join(run(EDM2, "--help")[0].output.split())
    assert "--schedule FILE.npy Noise levels from FILE.npy" in text and "Pick a curve." not in text


def test_a_grid_that_the_network_refuses_is_a_usage_error(run, monkeypatch):
    monkeypatch.setattr(Network, "round_sigma", lambda self, sigma: sigma.round())
    result, _ = run(EDM2, "--schedule=a9.npy")
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert result.output.startswith("Error: --schedule=a9.npy: steps ") and "same noise level" in result.output


@pytest.mark.parametrize("message, one_line", [
    ("ProcessGroupNCCL is only supported with GPUs, no GPUs found!", True),
    ("Torch not compiled with CUDA enabled", True),
    ("shapes do not fit", False),
])
def test_without_a_gpu_it_is_one_line(run, monkeypatch, message, one_line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @schedule_option
    @click.command()
    @click.option("--steps", "num_steps", default=18)
    def command(**options):
        raise RuntimeError(message)

    result = CliRunner().invoke(command, ["--schedule=a9.npy"])
    assert ("Error: found no CUDA device" in result.output and result.exit_code == 2) == one_line
    assert isinstance(result.exception, SystemExit if one_line else RuntimeError)
    assert isinstance(CliRunner().invoke(command, []).exception, RuntimeError)  # without a grid as it was


# --- levels ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_levels_are_the_values_in_the_samplers_dtype(dtype):
    values = edm(9, 0.002, 80).values
    for grid in (Grid(values), values, values.tolist()):
        levels = grid_levels(grid, object(), torch.ones(19, dtype=dtype))
        assert levels.dtype == dtype and torch.equal(levels, torch.tensor(values).to(dtype))


def test_levels_are_rounded_except_the_last():
    network = Network(unit=0.5)
    network.round_sigma = lambda sigma: (sigma / 0.5).floor() * 0.5 + 0.25  # would make 0.25 of the final 0
    levels = grid_levels([4.1, 2.6, 0.9, 0.0], network, torch.zeros([], dtype=torch.float64))
    assert levels.tolist() == [4.25, 2.75, 0.75, 0.0]


@pytest.mark.parametrize("values, network, part", [
    ([81.0, 1.0, 0.0], Network(sigma_max=80), "starts at sigma = 81, above the network's sigma_max = 80; make a grid"),
    ([80.0, 0.01, 0.0], Network(sigma_min=0.02), "step 1 is at sigma = 0.01, below the network's sigma_min = 0.02"),
    ([80.0, 3.2, 3.1, 0.0], Network(unit=1), "steps 1 and 2 (sigma = 3.2 and 3.1) are the same noise level, 3, after"),
    ([80.0, 3.2, 0.1, 0.0], Network(unit=1), "steps 2 and 3 (sigma = 0.1 and 0) are the same noise level, 0, after"),
    ([80.0, 3.0, 4.0, 0.0], Network(), "values ascend"), ([80, 3, 0], Network(), "found values of type int64"),
])
def test_levels_that_do_not_suit_the_network(values, network, part):
    with pytest.raises(GridError) as caught:
        grid_levels(values, network, torch.zeros([], dtype=torch.float64))
    assert part in str(caught.value) and "\n" not in str(caught.value) and isinstance(caught.value, ValueError)


def test_the_ends_of_the_range_have_some_slack():
    like, network = torch.zeros([], dtype=torch.float64), Network(sigma_min=0.02, sigma_max=80)
    inside = [80 * (1 + 9e-7), 1.0, 0.02 * (1 - 9e-7), 0.0]
    assert grid_levels(inside, network, like).tolist() == inside and SIGMA_SLACK == 1e-6
    for outside in ([80 * (1 + 2e-6), 1.0, 0.0], [80.0, 0.02 * (1 - 2e-6), 0.0]):
        with pytest.raises(GridError):
            grid_levels(outside, network, like)


@pytest.mark.parametrize("ablation", [dict(discretization="vp"), dict(schedule="ve"), dict(scaling="vp")])
def test_a_grid_is_no_ablation(ablation):
    like = torch.zeros([], dtype=torch.float64)
    with pytest.raises(GridError, match=f"{list(ablation)[0]} = '{list(ablation.values())[0]}'.*leave these"):
        grid_levels([1.0, 0.0], Network(), like, **ablation)
    assert grid_levels([1.0, 0.0], Network(), like, "edm", "linear", "none").tolist() == [1.0, 0.0]


def test_it_loads_nothing_that_upstream_does_not_have():
    code = "import sys, art_edm.upstream; print(*sorted(m for m in sys.modules if m.split('.')[0] in " \
           "('art_edm', 'torch', 'scipy', 'requests', 'PIL')))"
    output = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    assert output.split() == [
        "art_edm", "art_edm.grids", "art_edm.grids.grid", "art_edm.grids.weights", "art_edm.runtime",
        "art_edm.runtime.files", "art_edm.upstream"]
