"""The front door from Python: grids and records of a denoiser, its noise levels, names of files, what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from art_edm import schedule
from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import load_grid
from art_edm.measure.field import rms
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import Network
from art_edm.runtime.errors import Stopped
from art_edm.sampling.budget import candidates, recommended, steps_of
from art_edm.sampling.solvers import nfe, sample
from art_edm.schedule import ScheduleOptions, learn_schedule, parse_steps

DIRECT = ScheduleOptions(method="direct", trajectories=4)


def gaussian(**limits: float) -> GaussianDenoiser:
    return GaussianDenoiser(0.0, 0.25, (1, 2, 2), **limits)


def test_a_denoiser_gives_grids_and_their_records(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learned = learn_schedule(gaussian(), (3, 10), DIRECT)
    assert list(learned) == [3, 10] and os.listdir() == []  # nothing is written, or left
    for k, (grid, record, path) in learned.items():
        exact = GaussianClock(80.0, 0.5).sigma(np.arange(1, k) / k)
        np.testing.assert_allclose(grid.values[1:-1], exact, rtol=5e-3)
        assert (record["num_steps"], record["device"], path) == (k, "cpu", None)
        assert record["evaluations"] == 4 * 85 and record["J_over_J_star"] == pytest.approx(1, abs=1e-4)
    assert np.abs(learned[10].grid.values[1:-1] / GaussianClock(80.0, 1.0).sigma(np.arange(1, 10) / 10) - 1).max() > 0.1
    learned[3].save("mine.npy")
    assert load_grid("mine.npy") == learned[3].grid
    assert json.loads(Path("mine.json").read_text())["settings"]["points"] == 85


class Constant(Denoiser):
    """Data of one image: |Q| = 0."""

    noise = 0.0

    def denoise(self, x, sigma, class_labels):
        return torch.full_like(x, 0.3) + self.noise * torch.sin(1e5 * x)


@pytest.mark.parametrize("options", [DIRECT, ScheduleOptions(method="direct", trajectories=4, objective="solver")])
def test_a_weight_of_zero_is_said_to_be_zero(options):
    """Also where it is rounding noise of float32."""
    model = Constant(1, 2)
    with pytest.raises(ValueError, match="= 0 but for rounding.*expected a denoiser whose image changes"):
        learn_schedule(model, (4,), options)
    model.noise = 3e-7 if options is DIRECT else 0.0
    with pytest.raises(ValueError, match="= 0 but for rounding"):
        learn_schedule(model, (4,), options)
    model.noise = 0.3
    assert learn_schedule(model, (4,), options)[4].grid.num_steps == 4


def test_the_range_of_noise_levels_is_asked_for_and_left_as_it_was():
    model = gaussian()
    learned = learn_schedule(model, (6,), ScheduleOptions(method="direct", sigma_max=20.0, sigma_min=0.01))[6]
    exact = GaussianClock(20.0, 0.5).sigma(np.arange(1, 6) / 6)
    np.testing.assert_allclose(learned.grid.values[1:-1], exact, rtol=5e-3)
    assert (learned.record["sigma_max"], learned.record["sigma_min"]) == (20.0, 0.01)
    assert (model.sigma_max, model.sigma_min) == (80.0, 0.002)
    for wrong in ({"sigma_max": 81.0}, {"sigma_min": -1.0}, {"sigma_max": float("nan")}, {"sigma_min": 80.0},
                  {"sigma_min": 0.0}, {"sigma_min": 0.01, "sigma_max": 81.0}):
        with pytest.raises(ValueError, match="--sigma-m"):
            learn_schedule(model, (6,), ScheduleOptions(method="direct", **wrong))
        assert (model.sigma_max, model.sigma_min) == (80.0, 0.002)


class Discrete(GaussianDenoiser):
    """A network that was trained at some levels only, few of them low."""

    levels = torch.tensor(np.geomspace(0.05, 80.0, 60))

    def round_sigma(self, sigma):
        sigma = torch.as_tensor(sigma, dtype=torch.float64)
        return self.levels[(sigma.reshape(-1, 1) - self.levels).abs().argmin(dim=1)].reshape(sigma.shape)

    @property
    def sigma_limits(self):
        return float(self.levels[0]), float(self.levels[-1])


@pytest.mark.parametrize("steps", [18, 40, 59, 60])
def test_levels_that_collide_move_to_free_ones(steps):
    model = Discrete(0.0, 0.25, (1, 2, 2), sigma_min=0.05)
    values = learn_schedule(model, (steps,), DIRECT)[steps].grid.values
    assert set(values[:-1]) <= set(model.levels.tolist()) and len(set(values)) == steps + 1 and values[0] == 80
    if steps == 60:
        np.testing.assert_array_equal(values[:-1], np.flip(model.levels.numpy()))
    with pytest.raises(ValueError, match="found 61 steps, but the network has 60 noise levels .*use at most 60"):
        learn_schedule(model, (5, 61), DIRECT)


def iddpm_levels(count: int = 1000) -> np.ndarray:
    """The levels above 0 of iDDPM's cosine schedule, ascending (equation of u_j in table 1 of 2206.00364)."""
    alpha = lambda j: np.sin(0.5 * np.pi * j / count / 1.008) ** 2
    u = [0.0]
    for j in range(count, 0, -1):
        u.append(np.sqrt((u[-1] ** 2 + 1) / max(alpha(j - 1) / alpha(j), 0.001) - 1))
    return np.array(u[1:])


@pytest.mark.slow
@pytest.mark.parametrize("top, steps", [(80.0, 22), (80.0, 64), (80.0, 79), (80.0, 128), (None, 128)])
def test_levels_of_iddpm_in_many_steps(top, steps):
    levels = iddpm_levels()
    model = Discrete(0.0, 0.25, (1, 2, 2), sigma_min=float(levels[0]), sigma_max=float(levels[levels <= 81][-1]))
    model.levels = torch.from_numpy(levels)
    options = DIRECT if top else ScheduleOptions(method="direct", trajectories=4, sigma_max=float(levels[-1]))
    values = learn_schedule(model, (steps,), options)[steps].grid.values
    assert set(values[:-1]) <= set(levels) and len(set(values)) == steps + 1
    assert values[0] == (model.sigma_max if top else levels[-1])


def test_too_many_steps_are_refused_before_any_evaluation():
    model = Discrete(0.0, 0.25, (1, 2, 2), sigma_min=0.05)
    with pytest.raises(ValueError, match="at most 60"):
        learn_schedule(model, (61,), DIRECT)
    assert model.evaluations == 0


class Low(GaussianDenoiser):
    """Levels from 0.5 up: far fewer than half of the optimum's levels are there."""

    @property
    def sigma_limits(self):
        return 0.5, 80.0


@pytest.mark.parametrize("steps", [5, 100])
def test_levels_below_the_lowest_are_spread_above_it(steps):
    values = learn_schedule(Low(0.0, 0.25, (1, 2, 2), sigma_min=0.5), (steps,), DIRECT)[steps].grid.values
    assert values[-2] == 0.5 and (np.diff(values) < 0).all() and len(values) == steps + 1
    free = GaussianClock(80.0, 0.5).sigma(np.arange(1, steps) / steps)
    assert (free < 0.5).sum() >= steps // 5  # as many would have been lost


# --- files ----------------------------------------------------------------------------------------------


def test_names_tell_networks_classes_guidance_and_steps_apart(tmp_path, monkeypatch):
    """gaussian0.5 in 13 steps and gaussian0.51 in 3, two classes, two guides; legal on every system."""
    monkeypatch.chdir(tmp_path)
    guided = {"class_idx": 3, "guidance": 1.4, "gnet": "small.pkl"}
    cases = [("gaussian0.5", {}, 13), ("gaussian0.51", {}, 3), ("net", {"class_idx": 1}, 3),
             ("net", {"class_idx": 2}, 3), ("net", guided, 3), ("net", {**guided, "gnet": "big.pkl"}, 3),
             ("net", {**guided, "guidance": 2.0}, 3),
             ("a b%2F:c?", {}, 3), ("n" * 300, {}, 3)]
    for name, details, k in cases:
        learn_schedule(Network(gaussian(), name, None, details), (k,), DIRECT, "art_{network}{steps}.npy")
    names = [path.name for path in Path().glob("*.npy")]
    assert len(names) == len(cases) and "art_gaussian0.5-13.npy" in names and "art_net-class1-3.npy" in names
    assert all(len(name) < 130 and not set(name) & set('<>:"/\\|?* %') for name in names)


def test_a_grid_of_other_settings_is_not_overwritten(tmp_path):
    model, out = Network(gaussian(), "it", "a" * 64), str(tmp_path / "g.npy")
    first = learn_schedule(model, (4,), DIRECT, out)[4].grid
    assert learn_schedule(model, (4,), DIRECT, out)[4].grid == first  # the same settings may
    other = ScheduleOptions(method="direct", trajectories=6)
    with pytest.raises(ValueError, match=r"other settings \(settings\.trajectories is 4 there, 6 here"):
        learn_schedule(model, (4,), other, out)
    with pytest.raises(ValueError, match="network.sha256"):
        learn_schedule(Network(gaussian(), "it", "b" * 64), (4,), DIRECT, out)
    assert load_grid(out) == first and sorted(os.listdir(tmp_path)) == ["g.json", "g.npy"]
    forced = learn_schedule(model, (4,), ScheduleOptions(method="direct", trajectories=6, force=True), out)[4].grid
    assert load_grid(out) == forced != first
    (tmp_path / "g.json").unlink()  # what it is cannot be known
    with pytest.raises(ValueError, match="other settings"):
        learn_schedule(model, (4,), other, out)


class Late(GaussianDenoiser):
    """While it is measured, another run writes its grid there."""

    out = None

    def denoise(self, x, sigma, class_labels):
        if self.out and float(sigma[0]) < 0.01 and not Path(self.out).exists():
            learn_schedule(Network(gaussian(), "other", None), (4,), DIRECT, self.out)
        return super().denoise(x, sigma, class_labels)


def test_the_later_of_two_runs_on_one_name_does_not_overwrite_silently(tmp_path):
    model = Late(0.0, 0.25, (1, 2, 2))
    model.out = str(tmp_path / "g.npy")
    with pytest.raises(ValueError, match="network.name"):
        learn_schedule(Network(model, "it", None), (4,), DIRECT, model.out)
    assert json.loads((tmp_path / "g.json").read_text())["network"]["name"] == "other"


def test_a_place_that_cannot_be_written_is_found_before_the_network_is_loaded(monkeypatch):
    monkeypatch.setattr("art_edm.schedule.load_network", lambda *args: pytest.fail("loaded"))
    for out, text in (("no/g.npy", "no folder"), ("g.txt", ".npy"), ("no/{network}{steps}.npy", "no folder")):
        with pytest.raises(ValueError, match=text):
            learn_schedule("http://127.0.0.1:9/far.pkl", (4,), DIRECT, out)
    with pytest.raises(ValueError, match="one file for 2 grids"):
        learn_schedule("mnist", (4, 5), DIRECT, "g.npy")


# --- evaluations in place of steps ----------------------------------------------------------------------


def test_so_many_evaluations_give_the_recommended_solver_and_its_grid():
    plain = learn_schedule(gaussian(), (1, 5, 7), DIRECT)
    learned = learn_schedule(gaussian(), options=replace(DIRECT, nfe=(7, 1, 5)))
    assert list(learned) == [7, 1, 5]
    for n, (grid, record, _) in learned.items():
        assert (record["nfe"], record["solver"]) == (n, recommended(n, 1))
        assert record["num_steps"] == steps_of(recommended(n, 1), n)
        assert grid == plain[n].grid and "candidates" not in record
        model = gaussian()
        sample(model, torch.zeros(1, 1, 2, 2), grid, record["solver"])
        assert model.evaluations == n
    assert len({record["solver"] for _, record, _ in learned.values()}) == 3
    assert plain[5].record["solver"] is None and "nfe" not in plain[5].record  # a grid for any solver names none


def test_what_is_recommended_depends_on_whether_images_have_colours():
    found = {shape[0]: learn_schedule(GaussianDenoiser(0.0, 0.25, shape), options=replace(DIRECT, nfe=(4, 1)))
             for shape in ((1, 2, 2), (3, 2, 2))}
    solvers = {channels: [one.record["solver"] for one in each.values()] for channels, each in found.items()}
    assert solvers == {1: ["clock-denoised", "euler"], 3: ["ipndm3", "euler"]}


def test_a_solver_that_is_asked_for_stays_and_its_steps_follow():
    learned = learn_schedule(gaussian(), options=replace(DIRECT, nfe=(9, 13), solver="rk4"))
    assert [(one.record["solver"], one.grid.num_steps) for one in learned.values()] == [("rk4", 3), ("rk4", 4)]
    own = replace(DIRECT, nfe=(9,), solver="heun", objective="solver")
    steps = replace(own, nfe=None)
    assert learn_schedule(gaussian(), options=own)[9].grid == learn_schedule(gaussian(), (5,), steps)[5].grid


@pytest.mark.slow
def test_with_refinement_the_solver_of_the_least_error_is_chosen_and_refined():
    """On Gaussian data, whose ends are known: other noises agree on what is least."""
    options = replace(DIRECT, nfe=(4, 5), refine=True)
    learned, model = learn_schedule(gaussian(), options=options), gaussian()
    plain = learn_schedule(gaussian(), (3, 4, 5), DIRECT)
    latents = torch.randn((64, 1, 2, 2), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ends = model.initial(latents, 80.0) * 0.5 / np.hypot(80, 0.5)
    error = lambda grid, solver: float(rms(sample(model, latents, grid, solver) - ends).mean())
    for n, (grid, record, _) in learned.items():
        errors = {solver: error(plain[steps_of(solver, n)].grid, solver) for solver in candidates(n)}
        assert record["candidates"] == list(candidates(n)) == list(record["tried"])
        for solver, tried in record["tried"].items():
            assert tried["mean"] == pytest.approx(errors[solver], rel=0.2) and nfe(solver, tried["num_steps"]) == n
        assert record["solver"] == min(errors, key=errors.get) == record["refined"]["settings"]["solver"]
        assert error(grid, record["solver"]) < 0.5 * min(errors.values())
        assert record["evaluations"] == sum(record["evaluations_by_stage"].values())
    one = learn_schedule(gaussian(), (5,), replace(DIRECT, refine=True, solver=learned[5].record["solver"]))[5]
    assert one.grid == learned[5].grid and "tried" not in one.record  # exactly what it is when asked for


def test_what_it_costs_is_what_was_evaluated():
    model = gaussian()
    record = learn_schedule(model, options=replace(DIRECT, nfe=(3, 5), refine=True))[5].record
    assert record["evaluations"] == model.evaluations
    # no "start": ipndm3, which is chosen, has no local errors of its own
    assert list(record["evaluations_by_stage"]) == ["step", "profile", "rl", "ends", "choose", "refine"]


def test_a_signal_between_two_stages_stops_the_next_one_and_keeps_the_first(tmp_path, monkeypatch):
    options, refine_grids = replace(DIRECT, refine=True), schedule.refine_grids

    def between(*args, **given):
        os.kill(os.getpid(), signal.SIGTERM)  # without anyone to ask, it would end this process
        return refine_grids(*args, **given)

    monkeypatch.setattr(schedule, "refine_grids", between)
    with pytest.raises(Stopped, match="stopped during .*; what was finished is in .*a.unfinished, run the same"):
        learn_schedule("gaussian:0.5", [3], options, str(tmp_path / "a.npy"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.unfinished"]


def test_one_evaluation_has_nothing_to_choose_or_refine():
    grid, record, _ = learn_schedule(gaussian(), options=replace(DIRECT, nfe=(1,), refine=True))[1]
    assert grid.values.tolist() == [80.0, 0.0] and record["solver"] == "euler" and "tried" not in record


def test_files_of_evaluations_are_told_apart_and_not_overwritten(tmp_path):
    model, out = Network(gaussian(), "it", "a" * 64), str(tmp_path / "{network}{nfe}.npy")
    options = replace(DIRECT, nfe=(4, 5))
    learn_schedule(model, None, options, out)
    assert sorted(path.name for path in tmp_path.glob("*.npy")) == ["it4.npy", "it5.npy"]
    learn_schedule(model, None, options, out)  # the same settings may
    before = model.denoiser.evaluations
    for other in (replace(options, refine=True), replace(options, solver="dpmpp2m")):
        with pytest.raises(ValueError, match="other settings"):
            learn_schedule(model, None, other, out)
    for steps, wrong, text in ((None, "{steps}.npy", "has {steps}; put {nfe}"), ((4,), "{nfe}.npy", "put {steps}"),
                               (None, "g.npy", "one file for 2 grids; put {nfe}")):
        with pytest.raises(ValueError, match=re.escape(text)):
            learn_schedule(model, steps, DIRECT if steps else options, str(tmp_path / wrong))
    assert model.denoiser.evaluations == before


@pytest.mark.parametrize("steps, options, text", [
    ((5,), {"nfe": (5,)}, "found --nfe=5 and --steps=5"), ((18,), {"nfe": (5, 6)}, "leave one of them out"),
    (None, {"nfe": (8,), "solver": "heun"}, r"take 7 \(K = 4\) or 9 \(K = 5\)"),
    (None, {"nfe": (4,), "objective": "sde"}, "chooses a deterministic solver"),
    (None, {"nfe": (4,), "objective": "solver"}, "say for which with --solver"),
    (None, {"nfe": (4,), "refine": True, "preset": "paper"}, "say for which with --solver"),
    (None, {"nfe": (0,)}, "found 0"), (None, {"nfe": (4, 4)}, "found 4 twice"), (None, {"nfe": ()}, "no numbers"),
])
def test_evaluations_that_contradict_something_are_refused_before_any_work(steps, options, text):
    model = gaussian()
    with pytest.raises(ValueError, match=text):
        learn_schedule(model, steps, ScheduleOptions(**options))
    assert model.evaluations == 0


def test_the_paper_s_preset_learns_for_the_steps_of_each_number_of_evaluations():
    options = ScheduleOptions(preset="paper", nfe=(3, 5), solver="heun", iterations=2, trajectories=4)
    learned = learn_schedule(gaussian(), options=options)
    assert {n: one.record["settings"]["train_steps"] for n, one in learned.items()} == {3: 2, 5: 3}


# --- what has no effect ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options, text", [
    ({"solver": "heun"}, "--solver=heun, which has no effect"), ({"solver": "heun", "objective": "sde"}, "no effect"),
    ({"method": "direct", "iterations": 7}, "--iterations=7, which has no effect"),
    ({"method": "direct", "clock": "edm"}, "--clock=edm"), ({"method": "direct", "rollout": "live"}, "--rollout=live"),
    ({"objective": "sde", "refine": True}, "deterministic"), ({"objective": "endpoint"}, "--refine does more"),
    ({"preset": "mine"}, "expected default, paper"), ({"refine": True, "solver": "rk5"}, "rk5"),
    ({"class_idx": 1}, "for a Denoiser"), ({"guidance": 2.0}, "for a Denoiser"),
])
def test_options_without_effect_are_refused(options, text):
    model = gaussian()
    with pytest.raises(ValueError, match=text):
        learn_schedule(model, (4,), ScheduleOptions(**options))
    assert model.evaluations == 0


@pytest.mark.parametrize("text", ["0", "x", "2,2", "1.5", "", "1000000", "²"])
def test_numbers_of_steps_that_are_none(text):
    for given in ({"option": "--nfe"}, {}):
        with pytest.raises(ValueError, match=f"found .* in {given.get('option', '--steps')}[,;] (expected|give)"):
            parse_steps(text, **given)
    with pytest.raises(ValueError, match="found 0 in --nfe, expected whole numbers from 1"):
        learn_schedule(gaussian(), options=ScheduleOptions(nfe=(0,)))
    assert parse_steps("18") == (18,) and parse_steps("2, 3,5") == (2, 3, 5)


def test_what_will_be_done_is_said_before_it_is_done(capsys):
    """And no more than that is done."""
    model = gaussian()
    learn_schedule(model, (4,), ScheduleOptions(quiet=False, iterations=2))
    first, second = capsys.readouterr().out.splitlines()
    assert first == "GaussianDenoiser on cpu, noise levels from 80 to 0.002"
    assert second == "K = 4: profile of |Q|, 680 to 2,040 evaluations; ART-RL, 2 iterations, no evaluations"
    assert model.evaluations == 680
    live = ScheduleOptions(quiet=False, iterations=2, rollout="live", trajectories=4)
    learn_schedule(model, (4,), live)
    assert f"2 iterations, {3 * 8 * 97 * 2:,} evaluations" in capsys.readouterr().out
    assert model.evaluations == 680 + 4 * 85 + 3 * 8 * 97 * 2


@pytest.mark.parametrize("network, kept", [
    (Network(gaussian(), "mine", None), False), (Network(gaussian(), "mine", "ab" * 32), True), (gaussian(), False),
    ("gaussian:0.5", True),
])
def test_unfinished_work_is_kept_only_of_networks_that_are_told_apart(tmp_path, monkeypatch, network, kept):
    folders, true = [], schedule.Store
    monkeypatch.setattr(schedule, "Store", lambda folder: folders.append(folder) or true(folder))
    learn_schedule(network, (3,), DIRECT, out=str(tmp_path / "g.npy"))
    assert folders == [tmp_path / "g.unfinished" if kept else None] and (tmp_path / "g.npy").exists()
