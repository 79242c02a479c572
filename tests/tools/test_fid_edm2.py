"""FID and FD-DINOv2 of one folder by EDM2's own calculate_metrics.py and by tools/fid.py, with the same stand-ins."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from art_edm.compare import options
from art_edm.metrics.dinov2 import DinoDetector, prepared
from tests.support.edm2_metrics import Dino, run_edm2
from tests.support.fid_standin import StandIn
from tests.support.upstream import upstream

pytestmark = pytest.mark.upstream
SIZE = 24


@pytest.fixture
def run(tool, monkeypatch):
    """Call the tool in a folder with images a/ and b/ and the stand-ins net.pkl and dino.pkl."""
    command, rng = tool("fid"), np.random.default_rng(0)
    from pathlib import Path

    for name, low in (("a", 0), ("b", 60)):
        Path(name).mkdir()
        for i, pixels in enumerate(rng.integers(low, 256, (40, SIZE, SIZE, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(f"{name}/{i:06d}.png")
    Path("net.pkl").write_bytes(pickle.dumps(StandIn(3 * SIZE * SIZE, 10)))
    Path("dino.pkl").write_bytes(pickle.dumps(Dino()))
    monkeypatch.setattr(options, "load_dinov2", lambda *args: DinoDetector(Dino(), "0" * 64, 12))
    return lambda *args: command(args[0], "--detector=net.pkl", "--trust-pickle", "--device=cpu", *args[1:])


def edm2(*commands):
    from pathlib import Path

    return run_edm2(upstream("edm2"), Path("net.pkl").resolve(), Path("dino.pkl").resolve(), list(commands))


def ours(run, *args):
    result = run("calc", "--images=a", "--num=40", "--out=o.json", *args)
    assert result.exit_code == 0, result.output
    with open("o.json") as file:
        return json.load(file)


def test_both_metrics_are_edm2s_whoever_made_the_reference(run):
    calc = ["calc", "--images=a", "--num=40", "--workers=0"]
    assert run("ref", "--data=b", "--dest=ours.pkl", "--metrics=fid,fd_dinov2").exit_code == 0
    _, theirs, crossed = edm2(["ref", "--data=b", "--dest=theirs.pkl", "--workers=0"], [*calc, "--ref=theirs.pkl"],
                              [*calc, "--ref=ours.pkl"])
    assert set(theirs) == {"fid", "fd_dinov2"} and theirs["fid"] > 0.1 and theirs["fd_dinov2"] > 0.01
    for reference in ("theirs.pkl", "ours.pkl"):
        found = ours(run, f"--ref={reference}")  # what an EDM2 reference carries is the default
        assert found["metrics"] == ["fid", "fd_dinov2"]
        for metric in theirs:
            assert found[metric] == pytest.approx(theirs[metric], rel=1e-6)
            assert crossed[metric] == pytest.approx(theirs[metric], rel=1e-6)
    fewer = ours(run, "--ref=theirs.pkl", "--num=39")  # the twin: one image less
    assert all(abs(fewer[metric] / theirs[metric] - 1) > 1e-5 for metric in theirs)


@pytest.mark.parametrize("size", [SIZE, 300])
def test_images_are_prepared_as_edm2_prepares_them(run, size):
    images = torch.randint(0, 256, (3, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    np.save("x.npy", images.numpy())
    edm2(["prepare", "x.npy"])
    exact = torch.from_numpy(np.load("x.npy.out.npy"))
    torch.testing.assert_close(prepared(images), exact, rtol=1e-6, atol=1e-6)
    plain = torch.nn.functional.interpolate(images.float(), size=(224, 224), mode="bicubic")
    if size > 224:
        assert (plain / 255 - (exact * 0.229 + 0.485)).abs().max() > 0.05  # the twin: without antialiasing
