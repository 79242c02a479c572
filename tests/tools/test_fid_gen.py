"""The commands `gen` and `compare`: what they print and write, what they refuse, and many processes."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from art_edm.compare.sample_cache import Samples
from art_edm.grids.grid import RULES, edm
from art_edm.metrics.detectors import load_detector
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.mnist import load_mnist, to_images
from art_edm.metrics.references import save_reference
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.lenet import LeNet
from art_edm.models.loading import load_classifier, load_network
from art_edm.sampling.generate import generate, to_pixels
from tests.support.judging import features_of

SCRIPT = Path(__file__).parents[2] / "tools" / "fid.py"


class Standin(torch.nn.Module):
    """Five features of 8 x 8 pixels, and three probabilities, called as NVIDIA's Inception is."""

    def __init__(self):
        super().__init__()
        matrix = torch.randn(192, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.register_buffer("matrix", matrix / 14)

    def forward(self, x, return_features: bool = False, no_output_bias: bool = False):
        values = x.to(torch.float64).flatten(1) @ self.matrix
        return values if return_features else values[:, :3].softmax(dim=1)


@pytest.fixture
def run(tool):
    """Call the tool in an empty folder, in this process; det.pt and ref.npz are there."""
    command = tool("fid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Standin()).save("det.pt")
    save_reference("ref.npz", {"fid": {"mu": np.zeros(5), "sigma": 100 * np.eye(5)}}, 1000, {})
    return command


GEN = ["gen", "--network=gaussian:0.2", "--num=50", "--ref=ref.npz", "--detector=det.pt", "--trust-detector",
       "--cache=cells", "--quiet", "--device=cpu"]


def refused(result, *texts):
    """Exit code 2 and one line, after notes, that contains the texts."""
    message = [line for line in result.stderr.strip().splitlines() if not line.startswith("note: ")]
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    assert len(message) == 1 and message[0].startswith("Error: "), result.stderr
    for text in texts:
        assert text in message[0], message


def direct(rule, steps, first=0, num=50, solver="heun"):
    """FID of the stand-in's features of directly sampled images."""
    network = load_network("gaussian:0.2").denoiser
    images = generate(network, RULES[rule](steps, 0.002, 80, 7), solver, range(first, first + num))
    detector = load_detector("det.pt", (1, 8, 8), torch.device("cpu"), trust=True)
    values = detector.features(to_pixels(images)[:, None]).numpy()
    return frechet_distance(*moments(values), np.zeros(5), 100 * np.eye(5))


# --- gen ---------------------------------------------------------------------------------------------


def test_gen_scores_every_cell(run):
    result = run(*GEN, "--grid=edm,dpm", "--steps=3,5", "--solver=heun,euler", "--blocks=2", "--out=t.json",
                 "--out=t.csv", "--metrics=fid,is", "--splits=2")
    assert result.exit_code == 0, result.stderr
    assert "note: found 50 images per block, fewer than 2048" in result.stderr
    data = json.loads(Path("t.json").read_text())
    rows = {(row["name"], row["steps"], row["solver"]): row for row in data["rows"]}
    assert len(rows) == 8
    for (name, steps, solver), row in rows.items():
        expected = [direct(name, steps, first, solver=solver) for first in (0, 50)]
        assert row["fid_blocks"] == pytest.approx(expected, rel=1e-5)
        assert row["nfe"] == row["network_calls"] == (2 * steps - 1 if solver == "heun" else steps)
    assert rows["edm", 3, "heun"]["fid"] != pytest.approx(rows["dpm", 3, "heun"]["fid"], rel=1e-3)
    assert data["detector"] == "det.pt" and data["reference"]["source"] == "ref.npz" and data["seed"] == 0
    assert len(list(csv.DictReader(open("t.csv", newline="")))) == 8
    shown = result.stdout.splitlines()
    assert shown[0].split()[:5] == ["name", "K", "solver", "NFE", "images"] and len(shown) == 10
    assert shown[-1] == "wrote t.json, t.csv"


def test_gen_again_evaluates_nothing_and_says_the_same(run, monkeypatch):
    args = [*GEN, "--grid=edm", "--steps=3", "--reference-error", "--error-noises=9", "--error-steps=20"]
    first = run(*args)
    assert first.exit_code == 0, first.stderr
    monkeypatch.setattr(GaussianDenoiser, "denoise", lambda *args: pytest.fail("evaluated again"))
    assert run(*args).stdout == first.stdout
    monkeypatch.undo()


def test_error_alone_needs_no_reference(run):
    result = run("gen", "--network=gaussian:0.2", "--grid=edm", "--steps=3", "--reference-error", "--error-noises=9",
                 "--error-steps=20", "--cache=cells", "--out=t.json", "--device=cpu")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(Path("t.json").read_text())["rows"]
    network = load_network("gaussian:0.2").denoiser
    ends = [generate(network, edm(k, 0.002, 80), "heun", 9).flatten(1) for k in (3, 20)]
    square = (ends[0] - ends[1]).square().mean(dim=1)  # [9]
    assert row["error_rms"] == pytest.approx(float(square.mean().sqrt()), rel=1e-5)
    assert row["error_median"] == pytest.approx(float(square.sqrt().median()), rel=1e-5)
    assert "fid" not in row and row["images"] == 9


def test_a_detector_without_a_reference_gives_the_feature_distance(run):
    args = ["gen", "--network=gaussian:0.2", "--grid=edm", "--steps=3", "--reference-error", "--error-noises=40",
            "--error-steps=20", "--cache=cells", "--out=t.json", "--device=cpu", "--quiet"]
    assert run(*args, "--detector=det.pt", "--trust-detector").exit_code == 0
    (row,) = json.loads(Path("t.json").read_text())["rows"]
    network = load_network("gaussian:0.2").denoiser
    ends = [to_pixels(generate(network, edm(k, 0.002, 80), "heun", 40)).reshape(40, 1, 8, 8) for k in (3, 20)]
    seen = [Standin()(pixels.repeat(1, 3, 1, 1), return_features=True).numpy() for pixels in ends]
    assert row["fid_to_exact"] == pytest.approx(frechet_distance(*moments(seen[0]), *moments(seen[1])), rel=1e-4)
    assert row["fid_to_exact_stderr"] > 0 and "fid" not in row and row["images"] == 40
    refused(run(*args, "--detector=det.pt"), "found a TorchScript, which is a program", "--trust-detector")


def test_stopped_and_continued(run, monkeypatch):
    whole = run(*GEN, "--grid=edm", "--steps=5", "--batch=8")
    original, made = GaussianDenoiser.denoise, []

    def denoise(self, x, sigma, labels):
        made.append(len(x))
        if len(made) == 31:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, x, sigma, labels)

    monkeypatch.setattr(GaussianDenoiser, "denoise", denoise)
    args = [*(arg.replace("cells", "other") for arg in GEN), "--grid=edm", "--steps=5", "--batch=8"]
    result = run(*args)
    assert result.exit_code == 1 and result.stdout.strip() == (  # there by click's runner, on stderr by Python
        "stopped; what is done is kept: run the same command again to continue")
    assert run(*args).stdout == whole.stdout and whole.exit_code == 0
    assert sum(made) <= (50 + 8) * 9


def test_gen_refuses(run):
    refused(run(*GEN, "--grid=best"), "found the grid 'best', expected uniform")
    refused(run(*GEN, "--steps=0"), "whole numbers from 1")
    refused(run(*GEN, "--solver=ab2"), "found 'ab2', expected euler, heun, rk4")
    refused(run(*GEN, "--out=t.txt"), "t.txt", ".json, .csv, .md, .png")
    refused(run(*GEN, "--out=none/t.json"), "there is no folder none")
    refused(run(*[arg for arg in GEN if not arg.startswith("--ref")]), "found no --ref")
    refused(run(*GEN, "--ref=missing.npz"), "missing.npz")
    refused(run(*GEN, "--detector=lenet"), "expected 28x28 with 1 channel(s) for LeNet")
    refused(run(*GEN, "--reference-error", "--error-steps=1", "--grid=edm,none.npy"), "none.npy")
    refused(run(*GEN, "--metrics=fid,is", "--splits=51"), "--splits=51 for 50 images")
    save_reference("four.npz", {"fid": {"mu": np.zeros(4), "sigma": np.eye(4)}}, 1000, {})
    refused(run(*GEN, "--ref=four.npz"), "four.npz has 4 features", "gives 5")
    assert not list(Path("cells").iterdir())


def started(args, size, **environment):
    """The tool in `size` processes, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                   "OMP_NUM_THREADS": "1"}
    return [subprocess.Popen([sys.executable, str(SCRIPT), *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             text=True, env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(size)]


@pytest.mark.slow
def test_processes_give_the_same(run):
    args = ["--grid=edm", "--steps=5", "--batch=7", "--reference-error", "--error-noises=9", "--error-steps=10"]
    assert run(*GEN, *args, "--out=1.json").exit_code == 0
    for size in (2, 3):
        processes = started([*GEN, *args, f"--cache=cells{size}", f"--out={size}.json"], size)
        outputs = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * size, outputs
        assert all(out == "" for out, _ in outputs[1:])  # only process 0 prints
    rows = [json.loads(Path(f"{size}.json").read_text())["rows"][0] for size in (1, 2, 3)]
    for key in ("fid", "fid_stderr", "error_rms", "error_rms_stderr", "error_median"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-9), key
        assert rows[2][key] == pytest.approx(rows[0][key], rel=1e-9), key


# --- compare -----------------------------------------------------------------------------------------


def folders():
    rng = np.random.default_rng(0)
    for name, mean in (("a", 100), ("b", 110), ("c", 120)):
        Path(name).mkdir()
        for i in range(40):
            Image.fromarray(rng.normal(mean, 20, (8, 8)).clip(0, 255).astype(np.uint8)).save(f"{name}/{i:03d}.png")


COMPARE = ["compare", "--ref=ref.npz", "--detector=det.pt", "--trust-detector", "--cache=cells", "--quiet",
           "--device=cpu"]


def test_compare_agrees_with_calc(run):
    pytest.importorskip("matplotlib")
    folders()
    result = run(*COMPARE, "--block=20", "--out=t", "edm@9=a", "edm@35=b", "art@35=c")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(Path("t.json").read_text())["rows"]
    assert [row.get("difference_to") for row in rows] == [None, None, "edm"]
    assert sorted(path.name for path in Path().glob("t.*")) == ["t.csv", "t.json", "t.md", "t.png"]
    assert "| edm | 9 |" in Path("t.md").read_text() and "paired over 2 blocks" in Path("t.csv").read_text()
    whole = run(*COMPARE, "a=a", "b=b", "--out=u")
    assert sorted(path.name for path in Path().glob("u.*")) == ["u.csv", "u.json", "u.md"]
    for row, name in zip(json.loads(Path("u.json").read_text())["rows"], "ab"):
        calc = run("calc", f"--images={name}", "--ref=ref.npz", "--detector=det.pt", "--trust-detector", "--num=40",
                   "--device=cpu", "--out=calc.json")
        assert calc.exit_code == 0, calc.stderr
        assert row["fid"] == pytest.approx(json.loads(Path("calc.json").read_text())["fid"], rel=1e-9)
    assert whole.exit_code == 0 and run(*COMPARE, "a=a", "b=b", "--out=u").stdout == whole.stdout


def test_compare_refuses(run):
    folders()
    refused(run(*COMPARE), "Missing argument")
    refused(run(*COMPARE, "a"), "found 'a', expected NAME=DIR")
    refused(run(*COMPARE, "a=none"), "none: found nothing there")
    refused(run(*COMPARE, "a=a", "--block=30"), "found 40 images, expected whole blocks of 30")
    Path("b/039.png").unlink()
    refused(run(*COMPARE, "a=a", "b=b"), "found 40 images in a and 39 in b")
    Path("c/007.png").write_bytes(Path("c/007.png").read_bytes()[:50])
    refused(run(*COMPARE, "c=c"), "c/007.png")


# --- LeNet on MNIST ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_lenet_fid_of_the_bundled_network(run, mnist_folder):
    result = run("gen", "--network=mnist", "--grid=edm,edm-unpinned", "--steps=5", "--num=80", "--ref=mnist:test",
                 f"--data={mnist_folder}", "--detector=lenet", "--cache=cells", "--out=t.json", "--device=cpu")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(Path("t.json").read_text())["rows"]
    lenet = load_classifier(LeNet)
    reference = moments(features_of(lenet, to_images(load_mnist("test", mnist_folder)[0])))
    images = generate(load_network("mnist").denoiser, edm(5, 0.002, 80), "heun", 80)
    values = features_of(lenet, to_images(to_pixels(images)))
    assert rows[0]["fid"] == pytest.approx(frechet_distance(*moments(values), *reference), rel=1e-3)
    assert rows[0]["fid_stderr_from"] == "jackknife of 20 groups" and rows[0]["fid_stderr"] > 0
    assert rows[1]["fid_difference"] == pytest.approx(rows[1]["fid"] - rows[0]["fid"])
    assert rows[1]["fid_difference_from"] == "paired jackknife of 20 groups"


def test_a_network_is_known_by_its_file(tmp_path):
    """A cell of the same name and another file, or of the same file and another name."""
    one = load_network("mnist")
    renamed, other = one._replace(name="x"), one._replace(sha256="0" * 64)
    what = Samples(one, edm(3, 0.002, 80), "heun", 2).what
    assert Samples(renamed, edm(3, 0.002, 80), "heun", 2).what == what
    assert Samples(other, edm(3, 0.002, 80), "heun", 2).what != what
    assert Samples(one._replace(details={"class_idx": 3}), edm(3, 0.002, 80), "heun", 2).what != what
