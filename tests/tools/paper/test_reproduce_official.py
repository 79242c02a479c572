"""The recipes for NVIDIA's networks, end to end on trained small networks of the same classes, under official names.

A stand-in of Inception (a TorchScript of the same call), references of its features of images like those that the
networks were trained on, and tens of images of 8 x 8 pixels, or of 64 x 64 decoded from latents.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from paper import context as laboratory
from paper import run_all as reproduction
from paper.context import INCEPTION, Lab
from paper.experiments import AFHQ, CIFAR, FFHQ, IMAGENET, TABLES, XS
from paper.report import read_results
from paper.tables.transfer import Fine, endpoint

from art_edm.compare.sample_cache import Samples, scored
from art_edm.grids.grid import edm, resample
from art_edm.learning.config import PRESETS
from art_edm.metrics.detectors import CallDetector, load_detector
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.panel import Panel
from art_edm.metrics.references import load_reference, save_reference
from art_edm.models.latents import decoder_of
from art_edm.models.loading import load_network
from art_edm.runtime.distributed import World
from art_edm.runtime.store import Store
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.generate import generate, to_pixels
from art_edm.sampling.solvers import nfe, supported
from tests.support.fid_standin import StandIn
from tests.support.trained_networks import DIFFUSERS, NETWORKS, loss, skip_loss, spots, trained
from tests.support.upstream import upstream

ROOT = Path(__file__).parents[3]
pytestmark = [pytest.mark.upstream, pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")]
NUM = 48
SHORT = dict(tolerance=0.0, iterations=100, train_steps=40, batch=64, distill_paths=512)  # enough here; all share
OFFICIAL = [name for name, item in TABLES.items() if item.official]


class Pooled(torch.nn.Module):
    """The stand-in of Inception for images of any size: it sees 8 x 8 pixels."""

    def __init__(self):
        super().__init__()
        self.net = StandIn(3 * 8 * 8, 6, dtype=torch.float32)

    def forward(self, images: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        return self.net(torch.nn.functional.adaptive_avg_pool2d(images.float(), 8), return_features, no_output_bias)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """The folder for --networks; beside it, python/ with a package `diffusers` for the decoder of latents."""
    trees = {"edm-": upstream("edm"), "edm2": upstream("edm2")}
    folder = tmp_path_factory.mktemp("files") / "networks"
    (folder.parent / "python" / "diffusers").mkdir(parents=True)
    (folder.parent / "python" / "diffusers" / "__init__.py").write_text(DIFFUSERS)
    folder.mkdir()
    for name in NETWORKS:
        (folder / name).write_bytes(trained(name, trees[name[:4]]).read_bytes())
    torch.jit.script(Pooled()).save(str(folder / INCEPTION))
    true = Pooled()(to_pixels(spots(2000, 1234)[0]).reshape(-1, 3, 8, 8), return_features=True).double().numpy()
    for name in {item.reference for item in TABLES.values() if item.official}:
        save_reference(folder / name, {"fid": dict(zip(("mu", "sigma"), moments(true)))}, 2000, {})
    return folder


@pytest.fixture(scope="module")
def done(networks, tmp_path_factory):
    """All recipes in one run: (lab, results by name)."""
    out = tmp_path_factory.mktemp("out")
    tables = [replace(TABLES[name], steps=(2, 5), num=NUM, blocks=2, noises=16) for name in OFFICIAL]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(networks.parent / "python")
        patch.setitem(laboratory.PRESETS, "default", PRESETS["default"].changed(**SHORT))
        patch.setattr(laboratory, "load_detector",  # the stand-in does not have the pinned hash
                      lambda *args, **options: load_detector(*args, **{**options, "trust": True}))
        lab = Lab(Store(out / "cells"), World(), out, networks, forced=True)
        said = []
        assert reproduction.reproduce(tables, lab, said.append) == 0, said
        yield lab, {result.name: result for result in read_results(out)}
    sys.modules.pop("diffusers", None)


def decoded(latents):
    """What the stand-in of the VAE makes of them, seen by Pooled: the first three channels are half the colours."""
    return ((2 * latents[:, :3] + 1) / 2).clamp(0, 1).mul(255).to(torch.uint8)


def independent(lab, network, grid, reference, solver="heun"):
    """FID of the first images by other means than the store."""
    net = load_network(str(lab.networks / network)).denoiser
    images = generate(net, supported(net, grid), solver, NUM, batch=NUM).reshape(NUM, *net.img_shape)
    pixels = decoded(images.float()) if network == XS else to_pixels(images).reshape(images.shape)
    found = Pooled()(pixels, return_features=True).double().numpy()

    exact = load_reference(str(lab.networks / reference)).of("fid")
    return frechet_distance(*moments(found), exact["mu"], exact["sigma"])


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_learned(networks, name):
    net = load_network(str(networks / name)).denoiser
    denoise = lambda x, sigma, labels: net(x, sigma, labels if net.label_dim else None).float()
    found = loss(denoise, net.img_channels)
    assert found < 0.4 * skip_loss(net.img_channels)  # which is what it lost before
    if net.label_dim:
        assert loss(denoise, net.img_channels, shuffled=True) > 1.05 * found  # it looks at the class


def test_every_recipe_ran(done):
    lab, results = done
    assert sorted(results) == sorted(OFFICIAL)
    report = (lab.out / "README.md").read_text()
    for name, result in results.items():
        data = json.loads((lab.out / f"{name}.json").read_text())
        assert data["nfe"] == [nfe(TABLES[name].solver, k) for k in (2, 5)] and data["steps"] == [2, 5]
        assert set(data["rows"]) == set(data["stderr"]) == set(TABLES[name].grids)
        assert all(np.isfinite(data[key][row]).all() for key in ("rows", "stderr") for row in data["rows"])
        assert all(len(row) == 2 for row in data["paper"].values()) and set(data["paper"]) <= set(data["rows"])
        assert data["settings"]["images"] == "2 x 24" and data["settings"]["solver"] == TABLES[name].solver
        assert f"## {name}:" in report and len(result.figures) == 2
        assert all((lab.out / file).stat().st_size > 5000 for file, _ in result.figures)
    assert results["table2"].paper["edm"] == [TABLES["table2"].paper["edm"][0], TABLES["table2"].paper["edm"][2]]
    assert "Not run" not in report and (lab.out / "overview.png").stat().st_size > 10_000


def test_more_steps_bring_the_images_nearer_to_the_data(done):
    for result in done[1].values():
        if result.better == "lower" and result.solver == "heun":
            assert result.rows["edm"][1] < 0.7 * result.rows["edm"][0], result.name
            errors = result.more["End-point error (RMS over pixels and noises)"]
            assert errors["edm"][1] < 0.7 * errors["edm"][0]


@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_the_learned_grid_ends_nearer_than_edms_on_ddpmpp(done, solver):
    lab, _ = done
    network, fine = lab.network(CIFAR), Fine(64)
    learned, rule = lab.run(network).grid(5), hand_made(network.denoiser, 5)["edm"]
    ours, theirs = (endpoint(network, grid, solver, fine, lab) for grid in (learned, rule))
    assert ours.rms + 2 * ours.rms_stderr < theirs.rms - 2 * theirs.rms_stderr
    exact = edm(100, 0.002, 80)
    assert endpoint(network, exact, "heun", fine, lab).rms < 1e-6 < ours.rms  # the yardstick itself


@pytest.mark.parametrize("name, network", [
    ("table2", CIFAR), ("table3", CIFAR), ("table6-ffhq", FFHQ), ("table6-imagenet64", IMAGENET), ("table7", XS),
])
def test_figures_are_those_of_an_independent_computation(done, name, network):
    lab, results = done
    item = TABLES[name]
    exact = independent(lab, network, edm(5, 0.002, 80), item.reference, item.solver)
    assert results[name].rows["edm"][1] == pytest.approx(exact, rel=1e-4)
    assert results[name].rows["dpm"][1] != pytest.approx(exact, rel=1e-3)


def test_transfer_uses_the_grid_of_cifar10_unchanged(done):
    lab, results = done
    cifar, own = (lab.run(lab.network(name)).grid(5) for name in (CIFAR, AFHQ))
    found = results["table6-afhqv2"].rows["art_rl"][1]
    assert found == pytest.approx(independent(lab, AFHQ, cifar, "afhqv2-64x64.npz"), rel=1e-3)
    assert cifar != own and found != pytest.approx(independent(lab, AFHQ, own, "afhqv2-64x64.npz"), rel=1e-6)
    assert results["table6-afhqv2"].settings["grid learned on"] == Path(CIFAR).stem


def test_table_5_resamples_the_grid_of_18_steps(done):
    lab, results = done
    grid = resample(lab.run(lab.network(CIFAR)).grid(18), 5)
    exact = independent(lab, CIFAR, grid, "cifar10-32x32.npz")
    assert results["table5"].rows["art_rl"][1] == pytest.approx(exact, rel=1e-3)


def test_table_8_is_the_inception_score(done):
    lab, results = done
    net = load_network(str(lab.networks / XS)).denoiser
    images = generate(net, supported(net, edm(5, 0.002, 80)), "heun", NUM, batch=NUM).reshape(NUM, *net.img_shape)
    p = Pooled()(decoded(images.float()), no_output_bias=True).double()
    parts = [part for block in p.chunk(2) for part in block.chunk(2)]
    exact = np.mean([float((q * (q.log() - q.mean(0).log())).sum(1).mean().exp()) for q in parts])
    assert results["table8"].rows["edm"][1] == pytest.approx(exact, rel=1e-3) and exact > 1.0001
    assert results["table8"].better == "higher" and "not NVIDIA's Inception" in results["table8"].notes[-1]


def test_latents_are_decoded_before_they_become_pixels(done, tmp_path):
    lab, _ = done
    lab = replace(lab, store=Store(tmp_path / "cells"))
    network, decode = lab.network(XS), decoder_of(lab.network(XS))
    latents = spots(5, 7, channels=4)[0]
    pixels = decode(latents)
    assert pixels.shape == (5, 3, 64, 64) and torch.equal(pixels[:, :, ::8, ::8], pixels[:, :, 7::8, 7::8])
    colours = (spots(5, 7)[0] + 1) / 2 * 255  # of the images whose latents these are
    assert (pixels[:, :, ::8, ::8].float() - colours.floor()).abs().max() <= 1
    samples = Samples(network, edm(2, 0.002, 80), "euler", 6)
    seen = [CallDetector(Pooled(), "d", digit * 64, (3, 8, 8), torch.device("cpu")) for digit in "01"]
    kept = lambda detector, decode: scored(samples, Panel(["kid"], {"detector": detector}), lab.work(), 1, decode).of[
        "kid"][0].content()["features"]
    found, inverted = kept(seen[0], decode), kept(seen[1], lambda x: 255 - decode(x))
    images = generate(network.denoiser, edm(2, 0.002, 80), "euler", 6).reshape(6, 4, 8, 8)
    exact = Pooled()(decoded(images.float()), return_features=True).numpy()
    assert found == pytest.approx(exact, abs=1e-4) and np.abs(inverted - found).max() > 0.01
    with pytest.raises(Exception, match="6x256 and 192x6"):  # of latents, the detector can make nothing
        kept(CallDetector(StandIn(192, 6), "d", "2" * 64, (3, 8, 8), torch.device("cpu")), None)
    assert decoder_of(lab.network(CIFAR)) is None


def test_without_the_package_that_decodes_one_line_says_so(networks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    lab = Lab(Store(tmp_path / "cells"), World(), tmp_path, networks, forced=True)
    with pytest.raises(ValueError, match=r"makes latents, and decoding them needs diffusers; pip install diffusers"):
        decoder_of(lab.network(XS))


DRIVER = """
import json, os, sys
from dataclasses import replace
from paper import context as laboratory, experiments as recipes, kept_runs as learned
from art_edm.learning.config import PRESETS
laboratory.PRESETS["default"] = PRESETS["default"].changed(**json.loads(sys.argv.pop(1)))
num, shares = int(sys.argv.pop(1)), sys.argv.pop(1)
for name in ("table2", "table7"):
    recipes.TABLES[name] = replace(recipes.TABLES[name], steps=(2, 5), num=num, blocks=2, noises=16)
load = laboratory.load_detector
laboratory.load_detector = lambda *args, **options: load(*args, **{**options, "trust": True})  # of the stand-in
train = learned.train
def counted(denoiser, *args, **kwargs):
    before = denoiser.evaluations
    result = train(denoiser, *args, **kwargs)
    with open(f"{shares}-{os.environ['RANK']}", "a") as file:
        file.write(f"{denoiser.evaluations - before}\\n")
    return result
learned.train = counted
import reproduce
reproduce.main(sys.argv[1:])
"""


def test_torchrun_gives_the_figures_of_one_process(done, tmp_path):
    lab, results = done
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(tmp_path / "driver.py"), json.dumps(SHORT), str(NUM), str(tmp_path / "share"),
               "table2", "table7", f"--networks={lab.networks}",
               f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cells'}", "--device=cpu", "--batch=5"]
    places = [lab.networks.parent / "python", ROOT, ROOT / "tools", os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(map(str, places)).rstrip(os.pathsep)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280)
    assert run.returncode == 0, run.stderr[-3000:]
    for name in ("table2", "table7"):
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        for row, values in results[name].rows.items():
            assert found["rows"][row] == pytest.approx(values, rel=2e-3), (name, row)
    assert run.stdout.count("wrote ") == 1
    shares = [list(map(int, (tmp_path / f"share-{rank}").read_text().split())) for rank in (0, 1)]
    every = sum(lab.run(lab.network(CIFAR)).evaluations.values())
    assert shares[0][0] + shares[1][0] == every and 0.3 * every < shares[1][0]  # both have evaluated the network
