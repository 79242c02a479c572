"""tools/benchmark.py: shares against a clock that the test winds, counts against closed forms, networks against papers.

What needs NVlabs' modules is skipped without a checkout.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from click.testing import CliRunner
from cost import measure as benchmarks
from cost import networks as benchmarks_networks
from cost.networks import SIZES, NoCheckout, Size, fill_zeros, random_network
from cost.table import BARS, _imports, start_up, table
from scipy.integrate import quad

from art_edm.grids.clocks import GaussianClock, make_clock
from art_edm.measure.dense_paths import measure_along
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.unet import ScoreUNet

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(img_resolution=8, img_channels=3, model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[8])


class Wound(Denoiser):
    """Each call takes 8 units of a clock that nothing else moves, times the number of images over 4."""

    def __init__(self, clock) -> None:
        super().__init__(1, 4)
        self.clock = clock

    def denoise(self, x, sigma, class_labels):
        self.clock.wall += 2 * len(x)
        self.clock.busy += 4 * len(x)
        return x * (0.25 / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2))


@pytest.fixture
def wound(monkeypatch):
    clock = SimpleNamespace(wall=0.0, busy=0.0)
    monkeypatch.setattr(benchmarks, "_now", lambda device: benchmarks.Seconds(clock.wall, clock.busy))
    return clock


# --- shares ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra, share", [(0, 1), (1, 9 / 8), (8, 2)])
def test_the_share_is_the_time_beside_the_network(extra, share, wound, monkeypatch):
    def slower(*args):
        def step(done):
            args[-1].on_step(done)
            wound.wall += extra  # what the profile takes at each level
            wound.busy += 2 * extra

        return measure_along(*args[:-1], replace(args[-1], on_step=step))

    monkeypatch.setattr(benchmarks, "measure_along", slower)
    found = benchmarks.profile_share(Wound(wound), trajectories=12, points=5, batch=4)
    assert found["evaluations"] == 60 and found["own_seconds_per_image"] == 2
    assert found["share_wall"] == pytest.approx(share, rel=1e-12) == found["share_busy"]


def test_the_network_alone_is_not_counted(wound):
    net = Wound(wound)
    benchmarks.own_evaluation(net, 4)()
    assert (wound.wall, net.evaluations) == (8, 0)


def test_speed_of_layouts_and_what_is_left_of_them(wound, monkeypatch):
    net = Wound(wound)

    def compiled(function, dynamic):
        assert dynamic is False

        def faster(*args):
            result = function(*args)
            wound.busy -= 8  # half of 4 images' time
            return result

        return faster

    monkeypatch.setattr(torch, "compile", compiled)
    found = benchmarks.layouts(net, 4, compiled=True)
    assert (found["plain_seconds_per_image"], found["channels_last"], found["compile"]) == (4, 1, 2)
    before = wound.busy
    net.denoise(torch.zeros(4, 1, 4, 4), torch.ones(4), None)
    assert wound.busy - before == 16  # the plain network again


# --- counts and scores -------------------------------------------------------------------------------


def test_the_papers_budget_is_its_iterations_times_steps_times_two():
    assert benchmarks.budget(18) == 180_000
    assert sum(map(benchmarks.budget, (2, 3, 5, 7, 10, 18))) == 450_000


def test_the_papers_recipe_is_counted():
    net = GaussianDenoiser(0.0, 0.25, (1, 4, 4))
    found = benchmarks.paper(net, (5, 2), iterations=3)
    assert found["evaluations_per_iteration"] == 3 * 5  # a difference about each of K points: three evaluations
    assert net.evaluations == 3 * 15 + 2 * 8  # and the small profile, which is not counted to the paper
    assert found["budget"] == {"5": 50_000, "2": 20_000} and found["budget_all"] == 70_000
    assert found["ours_at_full_length"] == 75_000


def test_the_score_on_a_reference_is_the_closed_form_of_gaussian_data():
    std, top, low = 0.5, 80.0, 0.002
    net = GaussianDenoiser(0.0, std**2, (1, 4, 4))
    profile = benchmarks.reference(net, 4, 200, batch=4)
    scale = profile.norm[:, 0].mean() * (std**2 + top**2) ** 1.5
    q = lambda s: scale * (std**2 + max(s, low) ** 2) ** -1.5  # noqa: E731
    parts = [(0, 0.1), (0.1, 1), (1, 10), (10, top)]
    root = sum(quad(lambda s: q(s) ** 0.5, a, b)[0] for a, b in parts)
    uniform = sum(quad(q, a, b)[0] for a, b in parts) * top / root**2  # J/J* of theta = 1
    best, plain = GaussianClock(top, std), make_clock("linear", top, std)
    score = lambda clock: benchmarks.learned_score(  # noqa: E731
        SimpleNamespace(learned=SimpleNamespace(sigma=clock.sigma)), profile)
    assert score(best) == pytest.approx(1, abs=1e-3)
    assert score(plain) == pytest.approx(uniform, rel=1e-2) and uniform > 10


def test_a_reference_is_of_other_noises_than_a_run():
    net = GaussianDenoiser(0.0, 0.25, (1, 2, 2))
    mine, other = benchmarks._noise(net, 2, 0)[0], benchmarks._noise(net, 2, 10**6)[0]
    assert float((mine - other).abs().min()) > 0 and torch.equal(mine, benchmarks._noise(net, 2, 0)[0])


def test_memory_does_not_grow_with_the_points(monkeypatch):
    net = GaussianDenoiser(0.0, 0.25, (1, 32, 32))
    few, many = (benchmarks.profile_memory(net, points) for points in (10, 60))
    assert 8 * 32 * 32 * 8 * 2 < few < many < 1.1 * few

    def keeping(*args, **kwargs):  # a profile that keeps every state
        kept, denoise = [], net.denoise
        monkeypatch.setattr(net, "denoise", lambda x, *rest: kept.append(x + 0) or denoise(x, *rest))
        return measure_along(*args, **kwargs)

    monkeypatch.setattr(benchmarks, "measure_along", keeping)
    assert benchmarks.profile_memory(net, 60) > 5 * few


# --- networks ----------------------------------------------------------------------------------------


@pytest.mark.upstream
@pytest.mark.parametrize("name, millions", [("songunet56m", 55.7), ("adm296m", 295.9), ("edm2xs", 124.7)])
def test_sizes_are_the_published_ones(name, millions):
    size = SIZES[name]
    with torch.device("meta"):
        net = getattr(benchmarks_networks._upstream_module(size.file), size.kind)(**size.options)
    assert sum(value.numel() for value in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.upstream
def test_no_branch_of_a_random_network_is_zero():
    size = Size("edm/training/networks.py", "EDMPrecond", dict(TINY, model_type="SongUNet"))
    net, twin = random_network(size), random_network(size)
    plain = getattr(benchmarks_networks._upstream_module(size.file), size.kind)(**size.options).eval()
    x, sigma = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.5, 2.0])
    skip = (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1) * x
    with torch.no_grad():
        assert torch.equal(net.eval()(x, sigma), twin.eval()(x, sigma))  # the same weights each time
        assert float((plain(x, sigma) - skip).abs().max()) < 1e-4  # as it is made, nothing but the skip is left
        assert float((net(x, sigma) - skip).std()) > 0.03


def test_zeros_are_filled_and_nothing_else_is():
    net = torch.nn.ParameterList([torch.zeros(400, 100), torch.ones(3, 2), torch.zeros(5), torch.zeros([])])
    fill_zeros(net)
    assert float(net[0].detach().std()) == pytest.approx(0.05, rel=0.02)
    assert torch.equal(net[1], torch.ones(3, 2)) and not net[2].any() and float(net[3].detach()) == 0.5


@pytest.mark.parametrize("text, said", [(None, "found no edm/training/networks.py"), ("x = 1", "does not list")])
def test_missing_and_altered_modules_are_refused(text, said, tmp_path, monkeypatch):
    monkeypatch.setenv("ART_EDM_UPSTREAM", str(tmp_path))
    monkeypatch.setattr(benchmarks_networks, "checkout_folder", lambda: tmp_path / "none")
    if text is not None:
        (tmp_path / "edm" / "training").mkdir(parents=True)
        (tmp_path / "edm" / "training" / "networks.py").write_text(text)
    with pytest.raises(NoCheckout, match=said):
        random_network(SIZES["songunet56m"])
    result = CliRunner().invoke(benchmark.main, ["--network=songunet56m", f"--out={tmp_path}/b.json", "--device=cpu"])
    assert result.exit_code == 2 and said in result.output and result.output.count("\n") == 1


# --- the command -------------------------------------------------------------------------------------


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "b.json"
    result = CliRunner().invoke(benchmark.main, [
        "--network=gaussian:0.5", "--only=share,paper", "--share=8x5", "--paper-iterations=2", "--steps=4,6",
        "--device=cpu", f"--out={out}"])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["share"]["evaluations"] == 40 and found["paper"]["budget_all"] == 100_000
    assert "paper's budget for these K, evaluations                100,000\n" in result.output
    assert "run" not in found and found["memory"]["peak_bytes"] > 10**7


@pytest.mark.parametrize("option, said", [
    ("--only=share,fly", "found 'fly', expected some of start,share,run,paper,costs,layouts"),
    ("--reference=256", "found '256', expected trajectories x points"), ("--steps=3,x", "found '3,x'"),
    ("--out=no/folder/b.json", "there is no folder"),
])
def test_what_cannot_be_used_is_one_line(option, said):
    result = CliRunner().invoke(benchmark.main, [option])
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


def test_bars_are_those_of_the_table():
    run = {"evaluations": 2040, "rl_seconds": 5.2}
    lines = table({"share": {"share_wall": 1.05, "share_busy": 1.0501}, "run": run})
    assert [line.split()[-4:] for line in lines] == [
        ["met", "(at", "most", "1.05)"], ["MISSED", "(at", "most", "1.05)"], ["met", "(at", "most", "2,048)"],
        ["MISSED", "(at", "most", "5)"]]
    assert table({}) == []


@pytest.mark.slow
def test_starting_is_quick(tmp_path):
    found = start_up(ROOT / "tools" / "train_schedule.py")
    assert 0 < found["upstream"] < BARS["upstream"] and 0 <= found["help"] < BARS["help"]
    (tmp_path / "late.py").write_text("import time\ntime.sleep(0.25)\n")
    slow = _imports(["-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import late"])
    assert slow["late"] > 0.25 > BARS["upstream"]


def test_a_small_network_is_of_the_bundled_kind():
    net = benchmarks._small(28)
    assert isinstance(net, ScoreUNet) and all(bool(value.any()) for value in net.parameters())
