"""The main command: what it writes, what it refuses, and that nothing is lost when it is stopped."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import train_schedule
from click.testing import CliRunner
from scipy.integrate import trapezoid

from art_edm.grids.grid import load_grid
from art_edm.learning.rollouts import rollout
from art_edm.learning.training import CHECKPOINT
from art_edm.models.loading import save_network
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.store import Store

SCRIPT = Path(__file__).parents[2] / "tools" / "train_schedule.py"
SMALL = ["--iterations=8", "--trajectories=4", "--quiet"]


@pytest.fixture
def run(tool):
    """Call the tool in an empty folder, in this process."""
    return tool("train_schedule")


@pytest.fixture
def network(tmp_path):
    """A tiny score network with random weights, as a weight file."""
    torch.manual_seed(0)
    net = ScoreUNet(img_resolution=8, sigma_data=0.5, width=8, deep_width=12, emb=8)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    path = tmp_path / "tiny.pt"
    save_network(path, net)
    return path


def refused(result, *texts):
    """Exit code 2 and one line that contains the texts."""
    message = result.stderr.strip()
    assert result.exit_code == 2, (result.exit_code, message, result.exception)
    assert message.count("\n") == 0 and message.startswith("Error: ")
    for text in texts:
        assert text in message, message


# --- what it writes ------------------------------------------------------------------------------------


def test_one_run_serves_every_number_of_steps(run):
    result = run("--network=gaussian:0.5", "--steps=2,3,18", "--out=g{steps}.npy", *SMALL[:2])
    assert result.exit_code == 0, result.stderr
    assert sorted(os.listdir()) == sorted(f"g{k}.{kind}" for k in (2, 3, 18) for kind in ("json", "npy"))
    records = [json.loads(Path(f"g{k}.json").read_text()) for k in (2, 3, 18)]
    for k, record in zip((2, 3, 18), records):
        grid = load_grid(f"g{k}.npy")
        assert grid.num_steps == record["num_steps"] == k and grid.sigma_max == 80
        assert record["evaluations"] == 4 * 85  # the profile alone: one for all, none in the RL loop
        assert record["J_over_J_star_grids"]["direct"] >= 1
    assert len({record["J"] for record in records}) == 1
    for name in ("uniform", "dpm", "edm", "ART-RL"):
        assert name in result.stdout
    assert "340 images evaluated" in result.stdout


def test_sidecar_tells_everything(run):
    assert run("--network=oned", "--steps=5", *SMALL).exit_code == 0
    record = json.loads(Path("art_oned5.json").read_text())
    expected = {
        "num_steps", "sigma_max", "method", "preset", "J", "J_star", "J_over_J_star", "J_over_J_star_rules",
        "price_of_distillation", "terminal_error", "evaluations", "seconds", "seed", "network", "versions", "command",
    }
    assert expected <= set(record)
    assert record["network"] == {"name": "oned", "sha256": None} and "--network=oned" not in record["versions"]
    assert record["J"] / record["J_star"] == pytest.approx(record["J_over_J_star"])
    # 1-D, uniform: J = E|x_0| int (1 + s^2)^(-3/2) ds, J* = E|x_0| (int (1 + s^2)^(-3/4) ds)^2 / 3
    s = np.linspace(0, 3, 30001)
    whole, root = (trapezoid((1 + s**2) ** power, s) for power in (-1.5, -0.75))
    assert record["J_over_J_star_rules"]["uniform"] == pytest.approx(3 * whole / root**2, rel=1e-3)
    assert record["J_over_J_star_rules"]["uniform"] != pytest.approx(3 * whole / root**2 * 1.02, rel=1e-3)


def test_direct_writes_the_optimum(run):
    assert run("--network=oned", "--steps=10", "--method=direct", "--out=d.npy", "--quiet").exit_code == 0
    values, record = load_grid("d.npy").values, json.loads(Path("d.json").read_text())
    lines = [np.linspace(0, v, 4001) for v in values]
    mass = np.array([trapezoid((1 + line**2) ** -0.75, line) for line in lines])
    assert np.diff(mass) == pytest.approx(-mass[0] / 10, rel=2e-3)  # equal steps of int sqrt(q)
    assert record["J_over_J_star"] == pytest.approx(1, abs=1e-4) and record["terminal_error"] is None


@pytest.mark.slow
def test_seed_decides_the_bytes(run):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert run("--network=gaussian:0.5", "--steps=6", f"--out={name}.npy", f"--seed={seed}", *SMALL).exit_code == 0
    a, b, c = (Path(f"{name}.npy").read_bytes() for name in "abc")
    assert a == b and a != c


@pytest.mark.slow
def test_weight_file_by_path_and_plot(run, network):
    pytest.importorskip("matplotlib")
    result = run(f"--network={network}", "--steps=4", "--plot", *SMALL)
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("art_tiny4.json").read_text())
    assert record["network"]["name"] == "tiny" and len(record["network"]["sha256"]) == 64
    assert Path("art_tiny4.png").read_bytes().startswith(b"\x89PNG")


def test_paper_preset_runs_once_for_each_number_of_steps(run):
    result = run("--network=oned", "--steps=3,4", "--preset=paper", "--out=p{steps}.npy", *SMALL)
    assert result.exit_code == 0, result.stderr
    for k in (3, 4):
        record = json.loads(Path(f"p{k}.json").read_text())
        settings = record["settings"]
        assert [settings[key] for key in ("train_steps", "clock", "gae_lambda", "batch")] == [k, "linear", 0.0, 1]
        assert record["evaluations_by_stage"] == {"step": 0, "profile": 4 * 85, "rl": 8 * k * 3}  # of one path


@pytest.mark.slow
def test_evaluations_in_place_of_steps(run):
    """Names, the line that says what was chosen and why, and the solver that generate.py reads."""
    result = run("--network=gaussian:0.5", "--nfe=4,6", *SMALL[:2])
    assert result.exit_code == 0, result.stderr
    assert "NFE = 4, 6: profile of |Q|" in result.stdout
    for n in (4, 6):
        record = json.loads(Path(f"art_gaussian0.5_nfe{n}.json").read_text())
        assert load_grid(f"art_gaussian0.5_nfe{n}.npy").num_steps == n == record["nfe"]
        assert f"NFE {n}: {record['solver']} in {n} steps; recommended\n" in result.stdout
    assert run("--network=gaussian:0.5", "--nfe=9", "--solver=heun", "--out=h{nfe}.npy", *SMALL[:2]).exit_code == 0
    assert load_grid("h9.npy").num_steps == 5
    plain = run("--network=gaussian:0.5", "--steps=4", *SMALL[:2])
    assert "NFE" not in plain.stdout and Path("art_gaussian0.5-4.npy").is_file()


def test_with_refinement_the_line_has_the_error_of_each_candidate(run):
    result = run("--network=gaussian:0.5", "--method=direct", "--trajectories=4", "--nfe=5", "--refine")
    assert result.exit_code == 0, result.stderr
    record = json.loads(Path("art_gaussian0.5_nfe5.json").read_text())
    line = next(line for line in result.stdout.splitlines() if line.startswith("NFE 5:"))
    assert f"NFE 5: {record['solver']} in 5 steps; end-point errors on validation noises" in line
    for name, one in record["tried"].items():
        assert f"{'heun in 3 steps' if name == 'heun' else name} {one['mean']:.4g}" in line


# --- what it refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "text"), [
    ("0", "found '0'"), ("-3", "found '-3'"), ("many", "found 'many'"), ("2,,3", "found ''"), ("5,5", "found 5 twice"),
    ("2.5", "found '2.5'"), ("", "found ''"),
])
def test_bad_steps(run, steps, text):
    refused(run("--network=oned", f"--steps={steps}"), text)
    assert os.listdir() == []


@pytest.mark.parametrize(("options", "text"), [
    (("--nfe=5", "--steps=5"), "found --nfe=5 and --steps=5"), (("--nfe=x",), "found 'x'"), (("--nfe=",), "found ''"),
    (("--nfe=8", "--solver=heun"), "take 7 (K = 4) or 9 (K = 5)"), (("--nfe=5,5",), "found 5 twice"),
    (("--nfe=5", "--out=g{steps}.npy"), "put {nfe} into the name"), (("--nfe=5", "--solver=rk5"), "rk5"),
])
def test_bad_numbers_of_evaluations(run, options, text):
    refused(run("--network=oned", *options), text)
    assert os.listdir() == []


@pytest.mark.parametrize(("network", "text"), [
    ("cifar", "unknown network 'cifar'; expected mnist, cifar10, oned, gaussian:S"),
    ("gaussian:", "expected a positive number"),
    ("gaussian:-1", "expected a positive number"), ("gaussian:x", "expected a positive number"),
    ("none.pt", "no file none.pt"), ("folder/none.pt", "no file folder/none.pt"),
])
def test_bad_network_name(run, network, text):
    refused(run(f"--network={network}"), text)
    assert os.listdir() == []


def test_bad_weight_files(run, network):
    whole = network.read_bytes()
    for name, content in (("empty.pt", b""), ("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"not a network")):
        Path(name).write_bytes(content)
        refused(run(f"--network={name}", "--quiet"), name, "expected a weight file")
    torch.save({"weights": torch.zeros(3)}, "foreign.pt")
    refused(run("--network=foreign.pt", "--quiet"), "expected 'art_edm.score/1'")
    assert not list(Path().glob("*.npy")) and not list(Path().glob("*.unfinished"))


def test_bad_destinations_are_found_before_the_work(run, monkeypatch):
    monkeypatch.setattr("art_edm.schedule.train", lambda *a, **k: pytest.fail("training began"))
    refused(run("--network=oned", "--out=no/g.npy"), "there is no folder no")
    refused(run("--network=oned", "--out=g.txt"), ".npy")
    refused(run("--network=oned", "--out="), ".npy")
    refused(run("--network=oned", "--steps=2,3", "--out=g.npy"), "{steps}")
    refused(run("--network=oned", "--device=warp"), "warp")
    assert os.listdir() == []


def test_folder_that_cannot_be_written(run, monkeypatch):
    """Simulated, since root may write everywhere."""
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", denied)
    refused(run("--network=oned", "--out=g.npy"), "cannot write g.npy: Permission denied; choose another --out")


@pytest.mark.slow
def test_network_that_returns_nan_names_the_level_and_keeps_what_was_learned(run, monkeypatch):
    from art_edm.models.analytic import GaussianDenoiser

    honest = GaussianDenoiser.denoise
    evaluated = {"images": 0}

    def failing(self, x, sigma, class_labels):
        evaluated["images"] += len(x)
        out = honest(self, x, sigma, class_labels)
        broken = (sigma.reshape(-1, 1, 1, 1) < 0.5) & (evaluated["images"] > 2000)
        return torch.where(broken, torch.nan, 1.0) * out

    monkeypatch.setattr(GaussianDenoiser, "denoise", failing)
    arguments = ("--network=gaussian:0.5", "--steps=4", "--rollout=live", "--out=g.npy", *SMALL[:2])
    refused(run(*arguments), "NaN", "sigma = 0.", "g.unfinished")
    assert os.listdir() == ["g.unfinished"]
    monkeypatch.setattr(GaussianDenoiser, "denoise", honest)
    assert run(*arguments, "--resume", "--quiet").exit_code == 0
    resumed = Path("g.npy").read_bytes()
    assert run(*arguments, "--quiet").exit_code == 0
    assert Path("g.npy").read_bytes() == resumed


def test_full_disk_leaves_the_old_grid(run, monkeypatch):
    assert run("--network=oned", "--steps=4", "--out=g.npy", *SMALL).exit_code == 0
    old = Path("g.npy").read_bytes(), Path("g.json").read_bytes()
    real = os.fsync

    def full(handle):
        name = os.readlink(f"/proc/self/fd/{handle}") if os.path.exists(f"/proc/self/fd/{handle}") else ".npy"
        if ".npy" in name or ".json" in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", full)
    refused(run("--network=oned", "--steps=4", "--out=g.npy", "--seed=3", "--force", *SMALL),
            "No space left", "g.npy", "run the same command again")
    assert (Path("g.npy").read_bytes(), Path("g.json").read_bytes()) == old
    assert not list(Path().glob(".*")) and Path("g.unfinished").is_dir()


def test_plot_without_matplotlib_is_found_first(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(run("--network=oned", "--plot"), "pip install 'art_edm[plot]'")
    assert os.listdir() == []


# --- stopping and resuming -----------------------------------------------------------------------------

LONG = ["--network=oned", "--steps=5", "--iterations=24", "--trajectories=4"]  # two rounds of 12


def start(folder, *args):
    """The tool as a process of its own, saving after every iteration."""
    code = f"import sys; sys.argv[0] = {str(SCRIPT)!r}; import art_edm.learning.training as t; t.SAVE_SECONDS = 0.0; " \
           "import runpy; runpy.run_path(sys.argv[0], run_name='__main__')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *LONG, *args], cwd=folder, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def saved(path):
    """Iterations that are kept in this folder."""
    content = Store(path).load(CHECKPOINT) if path.is_dir() else None
    return -1 if content is None else json.loads(str(content["plain"]))["iteration"]


def wait_for_iteration(path, process, iteration):
    """Until the checkpoint has got that far."""
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        if saved(path) >= iteration:
            return
        time.sleep(0.02)
    pytest.fail("no checkpoint in time")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The bytes of a whole run; one iteration less gives others."""
    folder = tmp_path_factory.mktemp("whole")
    for name, more in (("whole", []), ("shorter", ["--iterations=23"])):
        arguments = [*LONG, *more, f"--out={folder}/{name}.npy", "--quiet"]
        assert CliRunner().invoke(train_schedule.main, arguments).exit_code == 0
    whole, shorter = ((folder / f"{name}.npy").read_bytes() for name in ("whole", "shorter"))
    assert whole != shorter
    return whole


@pytest.mark.slow
@pytest.mark.parametrize(("number", "iteration", "more"), [
    (signal.SIGKILL, 14, ()), (signal.SIGTERM, 7, ("--resume",)), (signal.SIGINT, 2, ()),
])
def test_stopped_and_resumed_gives_the_same_bytes(tmp_path, run, uninterrupted, number, iteration, more):
    """A process of its own is stopped, and resumed in this one."""
    process = start(tmp_path, "--out=g.npy")
    wait_for_iteration(tmp_path / "g.unfinished", process, iteration)
    process.send_signal(number)
    _, message = process.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert process.returncode == 1 and message.count("\n") == 1
        assert "run the same command again" in message and "of 24 iterations" in message
    assert not (tmp_path / "g.npy").exists()
    done = saved(tmp_path / "g.unfinished")
    assert iteration <= done < 24
    resumed = run(*LONG, "--out=g.npy", *more)
    assert resumed.exit_code == 0, resumed.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if ".part" not in path.name) == ["g.json", "g.npy"]
    assert (tmp_path / "g.npy").read_bytes() == uninterrupted


def test_checkpoint_of_other_settings_is_refused(tmp_path, run, monkeypatch):
    with monkeypatch.context() as patch:  # Ctrl-C in the first iteration
        patch.setattr("art_edm.learning.training.rollout",
                      lambda *args: signal.raise_signal(signal.SIGINT) or rollout(*args))
        assert run(*LONG, "--out=g.npy", "--quiet").exit_code == 1
    before = Store(tmp_path / "g.unfinished").path(CHECKPOINT).read_bytes()
    refused(run(*LONG, "--out=g.npy", "--resume", "--seed=4"), "seed=0", "seed=4", "leave --resume out")
    refused(run("--network=gaussian:0.5", *LONG[1:], "--out=g.npy", "--resume"), "network=oned")
    assert Store(tmp_path / "g.unfinished").path(CHECKPOINT).read_bytes() == before
    assert run(*LONG, "--out=g.npy", "--seed=4", "--quiet").exit_code == 0  # left aside, and gone at the end
    assert sorted(os.listdir()) == ["g.json", "g.npy"]
