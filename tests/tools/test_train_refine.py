"""`train_schedule.py --refine`: better for its solver, recorded, resumable, refused where it cannot be."""

from __future__ import annotations

import json
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from art_edm.grids.grid import load_grid
from art_edm.grids.weights import recorded_weights
from art_edm.measure import local_errors
from art_edm.metrics.detectors import Detector
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.loading import load_network
from art_edm.refining import feature_runs
from art_edm.refining.refine import WEIGHTS_OF
from art_edm.sampling.solvers import sample
from art_edm.sampling.weighted import weighted

SCRIPT = Path(__file__).parents[2] / "tools" / "train_schedule.py"
DIRECT = ("--network=gaussian:0.5", "--method=direct", "--trajectories=4", "--quiet")


@pytest.fixture
def run(tool):
    return tool("train_schedule")


def end_error(path: str, solver: str) -> float:
    """RMS distance to the exact end point sigma_data x / sqrt(sigma_max^2 + sigma_data^2), of other noises."""
    latents = torch.randn((64, 1, 8, 8), generator=torch.Generator().manual_seed(77), dtype=torch.float64)
    exact = 0.5 * 80 * latents / np.hypot(80, 0.5)
    return float((sample(load_network("gaussian:0.5").denoiser, latents, load_grid(path), solver) - exact).square()
                 .mean().sqrt())


@contextmanager
def stopped_in(owner, name: str, number: int = signal.SIGINT):
    """Where this function is called, the process is asked to stop."""
    original = getattr(owner, name)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["heun", "dpmpp2m", "clock"])
def test_the_refined_grid_is_better_for_its_solver(run, solver):
    assert run(*DIRECT, "--steps=5", "--out=plain.npy").exit_code == 0
    result = run(*DIRECT, "--steps=5", "--out=refined.npy", "--refine", f"--solver={solver}")
    assert result.exit_code == 0, result.stderr
    assert end_error("refined.npy", solver) < 0.7 * end_error("plain.npy", solver)
    record = json.loads(Path("refined.json").read_text())
    refined = record["refined"]
    assert refined["error_after"]["mean"] < 0.7 * refined["error_before"]["mean"]
    assert refined["settings"]["solver"] == solver
    assert record["evaluations_by_stage"]["refine"] == refined["evaluations"] > 0
    assert record["evaluations"] == sum(record["evaluations_by_stage"].values())
    assert sorted(os.listdir()) == ["plain.json", "plain.npy", "refined.json", "refined.npy"]  # no state is left


@pytest.mark.slow
def test_it_may_start_from_the_clock_of_the_solver_s_own_errors(run):
    """Heun in three steps on Gaussian data; the other clock is learned once, counted, and leaves no state."""
    result = run(*DIRECT, "--steps=3,4", "--out=g{steps}.npy", "--refine")
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("g3.json").read_text())
    assert record["refined"]["start"] == "own local errors"
    stages = record["evaluations_by_stage"]
    own = run(*DIRECT, "--steps=3", "--out=own.npy", "--objective=solver", "--trajectories=24")
    assert own.exit_code == 0
    assert stages["start"] == json.loads(Path("own.json").read_text())["evaluations_by_stage"]["profile"] > 0
    assert record["evaluations"] == sum(stages.values())
    assert sorted({Path(name).suffix for name in os.listdir()}) == [".json", ".npy"]
    again = run(*DIRECT, "--steps=3", "--out=own.npy", "--objective=solver", "--refine", "--force")
    record = json.loads(Path("own.json").read_text())
    assert again.exit_code == 0 and record["refined"]["start"] == "given"
    assert "start" not in record["evaluations_by_stage"]


@pytest.mark.slow
def test_what_was_learned_survives_a_stop_in_the_other_clock(run):
    options = ("--network=gaussian:0.5", "--method=direct", "--steps=3", "--refine", "--quiet")
    assert run(*options, "--out=whole.npy").exit_code == 0
    with stopped_in(local_errors, "evaluate"):
        result = run(*options, "--out=g.npy")
    assert result.exit_code == 1 and "g.unfinished, run the same command again" in str(result.exception)
    assert "g.unfinished" in os.listdir()
    assert run(*options, "--out=g.npy").exit_code == 0
    assert Path("g.npy").read_bytes() == Path("whole.npy").read_bytes()
    assert sorted(os.listdir()) == ["g.json", "g.npy", "whole.json", "whole.npy"]


@pytest.mark.slow
def test_several_share_their_noises_and_say_what_was_gained(run):
    result = run(*DIRECT[:-1], "--steps=3,4", "--out=g{steps}.npy", "--refine")
    assert result.exit_code == 0, result.stderr
    assert result.output.count("end-point error of heun on validation noises: ") == 2
    one = run(*DIRECT, "--steps=4", "--out=alone.npy", "--refine")
    assert one.exit_code == 0 and Path("alone.npy").read_bytes() == Path("g4.npy").read_bytes()
    evaluations = [json.loads(Path(name).read_text())["evaluations_by_stage"]["refine"] for name in
                   ("g3.json", "alone.json")]
    assert evaluations[0] < 2 * evaluations[1]


def test_what_cannot_be_refined_is_refused_before_any_work(run):
    result = run("--network=gaussian:0.5", "--refine", "--solver=rk5")
    assert result.exit_code == 2 and "rk5" in result.stderr and result.stderr.count("\n") == 1
    result = run("--network=gaussian:0.5", "--objective=solver", "--solver=clock")
    assert result.exit_code == 2 and "found the local errors of clock" in result.stderr
    assert result.stderr.count("\n") == 1 and os.listdir() == []


def test_the_objective_of_a_solver_gives_a_clock_for_it(run):
    """Heun's own local errors in place of |Q|: better for Heun in few steps, and worse for Euler."""
    assert run(*DIRECT, "--steps=3", "--out=plain.npy").exit_code == 0
    result = run(*DIRECT, "--steps=3", "--out=heun.npy", "--objective=solver")
    assert result.exit_code == 0, result.stderr
    assert end_error("heun.npy", "heun") < 0.6 * end_error("plain.npy", "heun")
    assert end_error("heun.npy", "euler") > end_error("plain.npy", "euler")
    assert json.loads(Path("heun.json").read_text())["settings"]["solver"] == "heun"


def test_a_solver_s_errors_are_not_measured_live(run):
    result = run("--network=gaussian:0.5", "--objective=solver", "--rollout=live")
    assert result.exit_code == 2 and "cached" in result.stderr and result.stderr.count("\n") == 1


def test_the_end_point_objective_is_gone_and_names_what_does_more(run):
    result = run("--network=gaussian:0.5", "--objective=endpoint")
    assert result.exit_code == 2 and "--refine does more" in result.stderr and result.stderr.count("\n") == 1
    assert os.listdir() == []


def test_an_unknown_solver_is_refused_before_any_work(run):
    result = run("--network=gaussian:0.5", "--objective=solver", "--solver=rk5")
    assert result.exit_code == 2 and "rk5" in result.stderr and result.stderr.count("\n") == 1
    result = run("--network=gaussian:0.5", "--objective=solver", "--solver=clock")
    assert result.exit_code == 2 and "found the local errors of clock" in result.stderr
    assert result.stderr.count("\n") == 1 and os.listdir() == []


REFINED = ("--network=gaussian:0.5", "--method=direct", "--refine", "--solver=euler", "--quiet")


class Killed(Exception):
    """As kill -9: nothing is written when it comes."""


def ended_at(count: int, what: str):
    """In this context the network's evaluation number `count` kills the process, or asks it to stop."""
    original = GaussianDenoiser.denoise

    def denoise(self, x, sigma, labels):
        if self.evaluations + len(x) > count and what:
            if what == "kill":
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, x, sigma, labels)

    patch = pytest.MonkeyPatch()
    patch.setattr(GaussianDenoiser, "denoise", denoise)
    return patch


def stages_of(path: str) -> dict:
    return json.loads(Path(path).read_text())["evaluations_by_stage"]


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_ended_anywhere_the_same_command_continues(run, share, what):
    """Two K that share their noises: the same bytes and costs, and no folder is left."""
    assert run(*REFINED, "--steps=3,4", "--out=whole{steps}.npy").exit_code == 0
    whole = stages_of("whole3.json")
    profile, rest = whole["profile"], whole["ends"] + whole["refine"] + whole["start"]
    patch = ended_at(int(profile + share * rest), what)
    result = run(*REFINED, "--steps=3,4", "--out=g{steps}.npy")
    patch.undo()
    assert isinstance(result.exception, Killed) == (what == "kill") and result.exit_code == 1
    if what == "stop" and share > 0.2:
        assert "g3.unfinished, run the same command again to continue" in str(result.exception)
    assert not Path("g3.npy").exists()
    for option in ([], ["--resume"]):
        assert run(*REFINED, "--steps=3,4", "--out=g{steps}.npy", *option).exit_code == 0
        for k in (3, 4):
            assert Path(f"g{k}.npy").read_bytes() == Path(f"whole{k}.npy").read_bytes()
            assert stages_of(f"g{k}.json") == stages_of(f"whole{k}.json")
    assert not [name for name in os.listdir() if "unfinished" in name or "ckpt" in name or "unfinished" in name]


@pytest.mark.slow
def test_more_steps_may_be_asked_for_when_going_on(run):
    """Exact ends serve all K: what one K had found is not solved again, and counts once."""
    assert run(*REFINED, "--steps=3,4", "--out=whole{steps}.npy").exit_code == 0
    whole = stages_of("whole3.json")
    patch = ended_at(whole["profile"] + whole["start"] + whole["ends"] + 500, "kill")
    assert isinstance(run(*REFINED, "--steps=3", "--out=g{steps}.npy").exception, Killed)
    patch.undo()
    solved = sum(float(np.load(path)["seconds"]) for path in Path("g3.unfinished").glob("*.npz")
                 if '"ends"' in str(np.load(path)["what"]))
    assert run(*REFINED, "--steps=3,4", "--out=g{steps}.npy").exit_code == 0
    for k in (3, 4):
        assert Path(f"g{k}.npy").read_bytes() == Path(f"whole{k}.npy").read_bytes()
        assert stages_of(f"g{k}.json") == stages_of(f"whole{k}.json")
        assert json.loads(Path(f"g{k}.json").read_text())["seconds_by_stage"]["ends"] == pytest.approx(solved)


@pytest.mark.slow
def test_another_solver_is_named(run):
    patch = ended_at(21_000, "kill")
    assert isinstance(run(*REFINED, "--steps=3", "--out=g.npy").exception, Killed)
    patch.undo()
    options = ("--network=gaussian:0.5", "--method=direct", "--refine", "--solver=heun", "--steps=3", "--out=g.npy")
    result = run(*options, "--resume")
    assert result.exit_code != 0 and "solver=euler, this run has solver=heun" in f"{result.stderr}{result.exception}"
    result = run(*options)
    assert result.exit_code == 0 and "solver=euler, this run has solver=heun; starting" in result.stderr


def test_the_objective_of_the_reverse_sde_moves_the_levels_down(run):
    """Gaussian data: density sigma^(-1/3) (s^2 + sigma^2)^(-4/3) against ART's (s^2 + sigma^2)^(-3/4)."""
    result = run(*DIRECT, "--steps=10", "--out=sde.npy", "--objective=sde")
    assert result.exit_code == 0, result.stderr
    assert run(*DIRECT, "--steps=10", "--out=plain.npy").exit_code == 0
    sigma = np.geomspace(1e-6, 80, 200_001)
    middle, found = {}, {}
    for name, density in (("sde", sigma ** (-1 / 3) * (0.25 + sigma**2) ** (-4 / 3)),
                          ("plain", (0.25 + sigma**2) ** -0.75)):
        passed = np.concatenate([[0], np.cumsum(np.diff(sigma) * (density[1:] + density[:-1]) / 2)])
        middle[name] = np.interp(0.5, passed / passed[-1], sigma)
        found[name] = load_grid(f"{name}.npy").values[5]
    assert found["plain"] == pytest.approx(middle["plain"], rel=0.01)
    assert found["sde"] == pytest.approx(middle["sde"], rel=0.5)  # its steps are not short: eight of 85 levels
    assert found["sde"] < 0.3 * found["plain"]
    assert json.loads(Path("sde.json").read_text())["settings"]["solver"] == "sde"
    refused = run(*DIRECT, "--objective=sde", "--refine")
    assert refused.exit_code == 2 and "deterministic" in refused.stderr


def test_weights_go_into_the_sidecar_and_end_where_the_record_says(run):
    """Data N(0, 0.25): in one and in three steps there are weights that end exactly."""
    result = run(*DIRECT, "--steps=1,3", "--out=w{steps}.npy", "--refine=weights")
    assert result.exit_code == 0, result.stderr
    for steps in (1, 3):
        record = json.loads(Path(f"w{steps}.json").read_text())
        assert record["refine"] == "weights" and record["solver"] == "clock"
        assert record["refined"]["start"] in ("given", *WEIGHTS_OF)
        table = recorded_weights(record, steps)
        assert table is not None and record["refined"]["settings"]["weights"] is True
        assert "start" not in record["evaluations_by_stage"]  # no other clock is measured
        errors = [end_error(f"w{steps}.npy", solver) for solver in ("clock", weighted(table))]
        assert errors[1] < 5e-3 * errors[0]  # what 20 steps of RK4 leave of the exact paths
    again = run(*DIRECT, "--steps=1,3", "--out=w{steps}.npy", "--refine", "--solver=clock")
    assert again.exit_code == 2 and "refine is \"weights\" there, true here" in again.stderr


@pytest.mark.parametrize("given, message", [
    (["--refine=weights", "--solver=heun"], "found heun, which evaluates 2 times in a step"),
    (["--refine=levels", "--solver=dopri"], "dopri"), (["--refine=all"], "'all'"),
])
def test_refinements_that_cannot_be_are_usage_errors(run, given, message):
    result = run(*DIRECT, "--steps=3", "--out=n.npy", *given)
    assert result.exit_code == 2 and message in result.stderr and not list(Path().glob("n*"))


def test_with_nfe_the_weights_begin_with_a_solver_of_one_evaluation_a_step(run):
    result = run(*DIRECT, "--nfe=3", "--out=n{nfe}.npy", "--refine=weights")
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("n3.json").read_text())
    assert "heun" not in record["tried"] and "clock" in record["tried"] and len(record["weights"]) == 3
    best = min(record["tried"], key=lambda solver: record["tried"][solver]["mean"])
    assert record["solver"] == best


# --- by features -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, part", [
    (("--refine", "--refine-by=features"), "found images of 8x8 with 1 channel(s), expected 28x28"),
    (("--refine-by=features",), "found --refine-by=features without --refine"),
    (("--refine", "--detector=lenet"), "found --detector=lenet without --refine-by=features"),
    (("--refine", "--refine-by=eye"), "'eye' is not one of 'error', 'features'"),
])
def test_what_features_need_is_refused_before_any_work(run, options, part):
    detector = ("--detector=lenet",) if options == ("--refine", "--refine-by=features") else ()
    result = run("--network=gaussian:0.5", *options, *detector)
    assert result.exit_code == 2 and part in result.stderr and os.listdir() == []


def test_a_detector_of_whole_numbers_alone_is_refused(monkeypatch):
    class Whole(Detector):
        name = "whole"

        def features(self, images):
            return torch.nn.functional.one_hot(images[:, 0, 0, 0], 256)

    monkeypatch.setattr(feature_runs, "load_detector", lambda *a, **k: Whole())
    with pytest.raises(ValueError, match="whole refuses images that are not of whole numbers"):
        feature_runs.load_judge("features", None, GaussianDenoiser(0.0, 0.25, (1, 28, 28)))


@pytest.mark.slow
@pytest.mark.parametrize("refine, moved", [("--refine", "levels"), ("--refine=weights", "weights")])
def test_the_grid_of_least_distance_is_recorded(run, monkeypatch, refine, moved):
    """Gaussian images for which LeNet is the detector, in few noises: what the sidecar and the summary say."""
    monkeypatch.setattr("art_edm.refining.config.RefineConfig.judged_by", lambda self, detector: replace(
        self, noises=8, validation=12, fine_steps=12, iterations=2, cheap_iterations=2))
    options = ("--network=tests.tools.test_train_refine:grey", "--method=direct", "--steps=3", "--trajectories=4",
               refine, "--solver=clock-denoised", "--refine-by=features", "--out=g.npy")
    result = run(*options)
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("g.json").read_text())
    before, after = (record["refined"]["distances"][name] for name in ("before", "after"))
    assert after < before and f"{after:.4g} refined" in result.stdout
    assert record["refine"].startswith(f"{moved}, by features of lenet ")
    assert ("weights" in record) == (moved == "weights")
    other = run(*[each for each in options if each != "--refine-by=features"])
    assert other.exit_code == 2 and f"is a grid of other settings (refine is \"{moved}, by features" in other.stderr


def grey() -> GaussianDenoiser:
    """Grey images of LeNet's size."""
    return GaussianDenoiser(0.0, 0.25, (1, 28, 28))
