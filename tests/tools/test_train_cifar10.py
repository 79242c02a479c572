"""tools/train_cifar10.py on a few images: the files and the card that it leaves, and going on to more iterations."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import train_cifar10 as tool
from click.testing import CliRunner
from networks import command as training
from networks.cifar10 import CLASSES, load_cifar10
from networks.classifier import accuracy
from networks.options import training_command
from PIL import Image

from art_edm.models.loading import load_classifier, load_network
from art_edm.models.resnet import ResNet
from art_edm.runtime.files import sha256_of


@pytest.fixture
def folder(tmp_path):
    """Five images of each class in two splits, whose colour says the class."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, name in enumerate(CLASSES):
            place = tmp_path / "data" / split / name
            place.mkdir(parents=True)
            for number in range(5):
                pixels = rng.integers(0, 40, (32, 32, 3)) + [20 * label, 200 - 20 * label, 7 * number]
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{number:04d}.png")
    return tmp_path / "data"


def run(monkeypatch, *arguments):
    small = replace(
        tool.CIFAR10, score=replace(tool.CIFAR10.score, width=8, deep_width=12),
        judge_config=replace(tool.CIFAR10.judge_config, iterations=4, batch=25),
    )
    monkeypatch.setattr(training, "SHEET_STEPS", 2)
    options = ["--batch=4", "--snapshots=2", "--floor-samples=40", "--floor-steps=2", "--snapshot-samples=0"]
    result = CliRunner().invoke(training_command(small, tool.HELP), [*arguments, *options])
    assert result.exit_code == 0, result.output
    return result


@pytest.mark.slow
def test_files_and_card_and_more_iterations(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = run(monkeypatch, f"--data={folder}", f"--out={out}", "--iterations=2")
    assert "CIFAR-FID floor" in result.stdout and "note: ResNet's accuracy is below" in result.stderr
    again = run(monkeypatch, f"--data={folder}", f"--out={out}", "--iterations=4", "--resume")
    assert "cifar10.pt" in again.stdout
    card = json.loads((out / "cifar10.json").read_text())
    network, judge = load_network(str(out / "cifar10.pt")).denoiser, load_classifier(ResNet, out / "resnet.pt")
    assert network.img_shape == (3, 32, 32) and network.config["deep_width"] == 12
    assert (card["iterations"], card["images_seen"], len(card["losses"])) == (4, 16, 2)
    assert card["sha256"] == {name: sha256_of(out / name) for name in ("cifar10.pt", "resnet.pt")}
    assert card["resnet_accuracy"] == accuracy(judge, *load_cifar10("test", str(folder))) < 1
    assert 0 < card["cifar_fid_test_vs_train"] < card["cifar_fid_floor"]["fid"]
    train = load_cifar10("train", str(folder))[0] / 127.5 - 1
    assert card["sigma_data"] == pytest.approx(float(train.std()), rel=1e-4)
    with Image.open(out / "cifar10.png") as picture:
        assert (picture.mode, picture.size) == ("RGB", (320, 320))


def test_data_is_required_and_said_so(tmp_path):
    result = CliRunner().invoke(tool.main, [f"--out={tmp_path / 'out'}"])
    assert result.exit_code == 2 and "found no --data, expected a folder or .tar archive" in result.output
