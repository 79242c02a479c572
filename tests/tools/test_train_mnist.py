"""The command line of tools/train_mnist.py on a tiny data set: its files, its figures, its refusals."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import shutil
import signal
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import train_mnist as tool
from click.testing import CliRunner
from networks import classifier, config, options
from networks import command as training
from networks.classifier import accuracy
from PIL import Image

from art_edm.compare import sample_cache
from art_edm.grids.grid import edm
from art_edm.metrics import mnist
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.mnist import load_mnist, to_images
from art_edm.models.lenet import LeNet
from art_edm.models.loading import load_classifier, load_network
from art_edm.runtime.files import sha256_of
from art_edm.sampling.generate import generate
from art_edm.sampling.solvers import sample
from tests.support.judging import features_of, fid_of

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "train_mnist.py"
OPTIONS = [
    "--iterations=4", "--batch=4", "--snapshots=2", "--floor-samples=40", "--floor-steps=2", "--snapshot-samples=40",
]
RESULTS = ["lenet.pt", "mnist.json", "mnist.png", "mnist.pt"]


def write_data(folder):
    """Bright squares whose place is the label; returns the checksums."""
    rng, hashes = np.random.default_rng(0), {}
    for prefix, n in (("train", 256), ("t10k", 100)):
        labels = rng.integers(0, 10, n).astype(np.uint8)
        pixels = rng.integers(0, 60, (n, 28, 28)).astype(np.uint8)
        for i, label in enumerate(labels):
            row, column = divmod(int(label), 4)
            pixels[i, 9 * row:9 * row + 8, 7 * column:7 * column + 6] += 150
        for name, content in (
            ("images-idx3", struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes()),
            ("labels-idx1", struct.pack(">2i", 2049, n) + labels.tobytes()),
        ):
            (folder / f"{prefix}-{name}-ubyte.gz").write_bytes(gzip.compress(content))
            hashes[f"{prefix}-{name}-ubyte"] = hashlib.sha256(content).hexdigest()
    return hashes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder in MNIST's format, and everything else made small."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "FILES", write_data(folder))
        patch.setattr(training, "SHEET_STEPS", 2)
        patch.setattr(training, "SNAPSHOT_STEPS", 2)
        small = replace(tool.MNIST, judge_config=replace(tool.MNIST.judge_config, iterations=40),
                        score=replace(tool.MNIST.score, width=16, deep_width=24, bfloat16=False))
        patch.setattr(tool, "main", options.training_command(small, tool.HELP))
        yield folder


def run(data, out, *more):
    return CliRunner().invoke(tool.main, [f"--data={data}", f"--out={out}", *OPTIONS, *more])


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """One complete run: its result and its folder."""
    out = tmp_path_factory.mktemp("runs") / "deep" / "mnist"
    result = run(data, out)
    assert result.exit_code == 0, result.output
    return result, out


@pytest.fixture
def copy(done, tmp_path):
    return shutil.copytree(done[1], tmp_path / "copy")


@pytest.fixture
def card(done):
    return json.loads((done[1] / "mnist.json").read_text())


def assert_refused(result, *parts):
    """Exit code 2, a single line, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    for part in parts:
        assert part in result.output


# --- going on from earlier weights -------------------------------------------------------------------


@pytest.mark.slow
def test_start_goes_on_from_the_weights_of_a_folder(done, data, tmp_path):
    """A rate of next to nothing leaves them as they are; an ordinary one does not."""
    for name, rate in (("still", "1e-12"), ("moved", "2e-3")):
        result = run(data, tmp_path / name, f"--start={done[1]}", f"--learning-rate={rate}")
        assert result.exit_code == 0, result.output
    folders = (done[1], tmp_path / "still", tmp_path / "moved")
    old, still, moved = (load_network(str(folder / "mnist.pt")).denoiser.state_dict() for folder in folders)
    largest = [max(float((new[key] - old[key]).abs().max()) for key in old) for new in (still, moved)]
    assert largest[0] < 1e-6 < 1e-5 < largest[1]
    assert (tmp_path / "moved" / "lenet.pt").read_bytes() == (done[1] / "lenet.pt").read_bytes()
    card = json.loads((tmp_path / "moved" / "mnist.json").read_text())
    assert card["start"]["sha256"] == sha256_of(done[1] / "mnist.pt") and card["start"]["card"]["iterations"] == 4
    assert "--start=DIR" in card["command"] and str(done[1]) not in card["command"]


def test_start_is_checked_before_any_work(data, done, tmp_path):
    assert_refused(run(data, tmp_path / "a", f"--start={tmp_path}"), "mnist.pt")
    again = run(data, shutil.copytree(done[1], tmp_path / "b"), f"--start={done[1]}", "--resume")
    assert_refused(again, "score.ckpt", "start=")


# --- results -----------------------------------------------------------------------------------------


def test_files(done):
    result, out = done
    names = sorted(p.name for p in out.iterdir())
    assert names == sorted([*RESULTS, "score.ckpt", "judge.ckpt", "ema_000002.pt", "ema_000004.pt", "floors"])
    assert len(list((out / "floors").iterdir())) == 2  # two snapshots, of which the last is the network
    with Image.open(out / "mnist.png") as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "L", (280, 280))
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[0].startswith("wrote ") and "\r" not in result.output


def test_card_says_what_was_done(card, done):
    assert card["command"] == "python tools/train_mnist.py --iterations=4 --batch=4 --learning-rate=0.002 --seed=0 " \
        "--snapshots=2 --device=cpu --floor-samples=40 --floor-steps=2 --snapshot-samples=40"
    assert str(done[1].parent) not in (done[1] / "mnist.json").read_text()  # no folder of this computer
    assert (card["iterations"], card["batch"], card["seed"]) == (4, 4, 0)
    assert card["sha256"] == {name: sha256_of(done[1] / name) for name in ("mnist.pt", "lenet.pt")}
    assert card["versions"]["torch"] == torch.__version__
    assert card["seconds"] > 0 and card["lenet_fid_floor"]["seconds"] > 0
    assert card["losses"][-1] == card["final_loss"] and len(card["losses"]) == 2


def test_card_figures_are_those_of_the_files(card, done, data):
    out = done[1]
    lenet, net = load_classifier(LeNet, out / "lenet.pt"), load_network(str(out / "mnist.pt")).denoiser
    train, test = (to_images(load_mnist(split, str(data))[0]) for split in ("train", "test"))
    assert card["parameters"] == sum(p.numel() for p in net.parameters())
    assert card["sigma_data"] == pytest.approx(float(train.double().std()), rel=1e-5)
    assert card["data_mean"] == pytest.approx(float(train.double().mean()), rel=1e-5)
    assert card["lenet_accuracy"] == accuracy(lenet, test, load_mnist("test", str(data))[1]) > 0.8
    reference = moments(features_of(lenet, train))
    yardstick = frechet_distance(*moments(features_of(lenet, test)), *reference)
    assert card["lenet_fid_test_vs_train"] == pytest.approx(yardstick, rel=1e-5)
    assert card["lenet_fid_test_vs_train"] < 0.5 * card["lenet_fid_floor"]["fid"]  # four steps teach no digits
    samples = generate(net, edm(2, 0.002, 80), "heun", 40)
    floor = card["lenet_fid_floor"]
    assert floor["fid"] == pytest.approx(fid_of(lenet, samples, reference), rel=1e-4)
    other = fid_of(lenet, generate(net, edm(2, 0.002, 80), "heun", 40, seed=1), reference)
    assert abs(other / floor["fid"] - 1) > 1e-3  # the twin: other samples
    assert (floor["samples"], floor["solver"], floor["nfe"]) == (40, "heun", 3) and 0 < floor["stderr"] < floor["fid"]
    assert floor["grid"] == {"rule": "edm", "num_steps": 2, "sigma_min": 0.002, "sigma_max": 80, "rho": 7}


def test_floor_over_training(card):
    rows = card["floor_over_training"]
    assert [(r["iteration"], r["samples"], r["nfe"]) for r in rows] == [(2, 40, 3), (4, 40, 3)]
    assert 0 < rows[0]["seconds"] < rows[1]["seconds"] <= card["seconds"]
    # The last snapshot is the network itself, on the same noise.
    assert rows[1]["fid"] == card["lenet_fid_floor"]["fid"] != rows[0]["fid"]


# --- resuming ----------------------------------------------------------------------------------------


def test_resume_repeats_nothing_expensive(copy, card, data, monkeypatch):
    monkeypatch.setattr(sample_cache, "sample", None)  # sampling for a FID would fail
    monkeypatch.setattr(classifier, "_batch", None)  # and so would a step
    result = run(data, copy, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((copy / "mnist.json").read_text()) == card


def test_stop_in_the_floor_and_resume(copy, card, data, monkeypatch):
    shutil.rmtree(copy / "floors")
    (copy / "mnist.json").unlink()

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return sample(*args, **kwargs)

    monkeypatch.setattr(sample_cache, "sample", interrupted)
    result = run(data, copy, "--resume")
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert result.output.startswith("stopped; what is done is kept")
    assert "continue with: python " in result.output and " --resume" in result.output
    assert not (copy / "mnist.json").exists()
    monkeypatch.undo()
    assert run(data, copy, "--resume", "--snapshot-samples=0").exit_code == 0
    again = json.loads((copy / "mnist.json").read_text())
    assert again["sha256"] == card["sha256"] and again["lenet_fid_floor"]["fid"] == card["lenet_fid_floor"]["fid"]
    assert again["floor_over_training"] == []


def test_a_damaged_lenet_is_written_again(copy, card, data):
    (copy / "lenet.pt").write_bytes(b"text")
    result = run(data, copy, "--resume", "--snapshot-samples=0")
    assert result.exit_code == 0 and sha256_of(copy / "lenet.pt") == card["sha256"]["lenet.pt"]


def test_a_full_disk(copy, data, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "write_json", full)
    result = run(data, copy, "--resume")
    assert result.exit_code == 1 and result.output.count("\n") == 1
    assert "No space left on device; remove the cause, then continue with: " in result.output


# --- refusals ----------------------------------------------------------------------------------------


def test_an_earlier_run_is_not_overwritten(done, data):
    before = sha256_of(done[1] / "score.ckpt")
    assert_refused(run(data, done[1]), "score.ckpt of an earlier run; add --resume", "choose another --out")
    assert sha256_of(done[1] / "score.ckpt") == before


@pytest.mark.parametrize("option, parts", [
    ("--iterations=0", ["--iterations", "0 is not in the range"]),
    ("--batch=x", ["--batch", "'x' is not a valid integer"]),
    ("--floor-samples=39", ["--floor-samples", "39 is not in the range x>=40"]),
    ("--snapshot-samples=1", ["--snapshot-samples=1", "expected 0 or at least 2"]),
    ("--device=abacus", ["--device=abacus", "expected auto, cpu, or cuda"]),
    ("--iterationz=3", ["No such option", "--iterationz"]),
])
def test_options_that_cannot_be_used(data, tmp_path, option, parts):
    assert_refused(run(data, tmp_path / "out", option), *parts)
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used(tmp_path, data, monkeypatch):
    monkeypatch.setattr(training, "_work", None)  # it must not get that far
    assert_refused(run(tmp_path / "nowhere", tmp_path / "out"), "nowhere has no train-images-idx3-ubyte.gz")
    bad = shutil.copytree(data, tmp_path / "bad")
    (bad / "t10k-labels-idx1-ubyte.gz").write_bytes(b"text")
    assert_refused(run(bad, tmp_path / "out"), "t10k-labels-idx1-ubyte.gz is damaged or not MNIST")


def test_a_place_that_cannot_be_written(tmp_path, data):
    (tmp_path / "file").write_text("x")
    assert_refused(run(data, tmp_path / "file"), "cannot make the folder", "choose another")
    (tmp_path / "out" / "mnist.json").mkdir(parents=True)
    assert_refused(run(data, tmp_path / "out"), "mnist.json: it is a folder")


def test_other_settings_are_refused_before_any_work(copy, data, monkeypatch):
    monkeypatch.setattr(training, "_work", None)
    assert_refused(run(data, copy, "--resume", "--seed=1"), "was trained with seed=0, not 1")
    (copy / "score.ckpt").write_bytes(b"")
    assert_refused(run(data, copy, "--resume"), "score.ckpt is damaged", "remove it to start again")


# --- small parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("snapshots, steps", [(0, 250), (2500, 250), (100, 100), (750, 250), (300, 150), (7, 7)])
def test_checkpoints_fall_on_snapshots(snapshots, steps):
    assert config.save_every(snapshots) == steps and snapshots % steps == 0


def test_coarse_losses():
    assert training.coarse([1.0, 3.0]) == [1, 3]
    assert training.coarse(list(range(80)))[:2] == [1.5, 5.5] and len(training.coarse(list(range(80)))) == 20
