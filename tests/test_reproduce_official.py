"""The recipes for NVIDIA's networks, end to end on small networks of the same classes under the official names.

A stand-in of Inception (a TorchScript of the same call) and references of its own features; images of 8 x 8 pixels.
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
from fid_standin import StandIn
from upstream import run_python, upstream

from art_edm import laboratory, latent_images, reproduction
from art_edm.cells import Cells
from art_edm.config import PRESETS
from art_edm.detectors import CallDetector
from art_edm.distributed import World
from art_edm.evaluation import generate, to_pixels
from art_edm.experiment import Samples, features
from art_edm.frechet import frechet_distance, moments
from art_edm.grid import edm, resample
from art_edm.laboratory import INCEPTION, Lab
from art_edm.loading import load_network
from art_edm.recipes import AFHQ, CIFAR, FFHQ, IMAGENET, TABLES, XS
from art_edm.references import save_reference
from art_edm.result import read_results
from art_edm.solvers import supported

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
NUM = 24
TINY = dict(iterations=6, batch=16, repeats=4, trajectories=2, points=12, train_steps=6, keep=32)
OFFICIAL = [name for name, item in TABLES.items() if item.official]

SMALL = dict(model_channels=16, channel_mult=[1], num_blocks=1, attn_resolutions=[], img_resolution=8, img_channels=3)
EDM_NETS = {
    CIFAR: dict(model_type="SongUNet", label_dim=3, **SMALL), AFHQ: dict(model_type="SongUNet", **SMALL),
    FFHQ: dict(model_type="SongUNet", **SMALL), IMAGENET: dict(model_type="DhariwalUNet", label_dim=3, **SMALL),
}
EDM2_NETS = {XS: dict(img_resolution=8, img_channels=3, label_dim=3, model_channels=64, num_blocks=1, channel_mult=[1],
                      attn_resolutions=[])}
MAKE = """
import json, pickle, sys
import torch
out, module, kind, nets = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
networks = __import__('training.' + module, fromlist=['x'])
for seed, (name, options) in enumerate(nets.items()):
    torch.manual_seed(seed)
    net = getattr(networks, kind)(**options)
    with torch.no_grad():  # what starts at zero would hide a broken network
        for p in net.parameters():
            if p.abs().max() < 1e-3:
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim else 1.0) * (p[0].numel() if p.ndim > 1 else 1) ** -0.5)
    content = dict(ema=net.eval().requires_grad_(False))
    if kind == 'Precond':
        from training.encoders import StandardRGBEncoder
        content['encoder'] = StandardRGBEncoder()
    with open(f'{out}/{name}', 'wb') as f:
        pickle.dump(content, f)
"""


def small_tables():
    """Few steps and images; all else as it is."""
    return {name: replace(TABLES[name], steps=(2, 4), num=NUM, blocks=2) for name in OFFICIAL}


def detector():
    return StandIn(3 * 8 * 8, 6, dtype=torch.float32)


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    edm_tree, edm2_tree = upstream("edm"), upstream("edm2")
    folder = tmp_path_factory.mktemp("networks")
    run_python(MAKE, folder, "networks", "EDMPrecond", json.dumps(EDM_NETS), path=edm_tree)
    run_python(MAKE, folder, "networks_edm2", "Precond", json.dumps(EDM2_NETS), path=edm2_tree)
    torch.jit.script(detector()).save(str(folder / INCEPTION))
    rng = np.random.default_rng(0)
    for name in {item.reference for item in TABLES.values() if item.official}:
        factor = rng.normal(size=(6, 6))
        save_reference(folder / name, rng.normal(size=6), factor @ factor.T, 1000, {})
    return folder


@pytest.fixture(scope="module")
def done(networks, tmp_path_factory):
    """All recipes in one run: (lab, results by name)."""
    out = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(laboratory.PRESETS, "default", replace(PRESETS["default"], **TINY))
        lab = Lab(Cells(out / "cells"), World(), out, networks, forced=True)
        said = []
        assert reproduction.reproduce(list(small_tables().values()), lab, said.append) == 0, said
        yield lab, {result.name: result for result in read_results(out)}


def independent(lab, network, grid, reference, solver="heun"):
    """FID of the first images by other means than cells."""
    net = load_network(str(lab.networks / network))
    images = generate(net.denoiser, supported(net.denoiser, grid), solver, NUM, batch=NUM)
    found = detector()(to_pixels(images).reshape(images.shape), return_features=True).double().numpy()
    with np.load(lab.networks / reference) as data:
        return frechet_distance(*moments(found), data["mu"], data["sigma"])


def test_every_recipe_ran(done):
    lab, results = done
    assert sorted(results) == sorted(OFFICIAL)
    report = (lab.out / "README.md").read_text()
    for name, result in results.items():
        assert set(result.rows) == set(TABLES[name].grids) and np.isfinite(list(result.rows.values())).all()
        assert f"## {name}:" in report and len(result.figures) == 2
        assert all((lab.out / file).stat().st_size > 5000 for file, _ in result.figures)
    assert "Not run" not in report and (lab.out / "overview.png").stat().st_size > 10_000


@pytest.mark.parametrize("name, network, reference", [
    ("table2", CIFAR, "cifar10-32x32.npz"), ("table3", CIFAR, "cifar10-32x32.npz"),
    ("table6-imagenet64", IMAGENET, "imagenet-64x64.npz"), ("table7", XS, "img512.pkl"),
])
def test_figures_are_those_of_an_independent_computation(done, name, network, reference):
    lab, results = done
    item = TABLES[name]
    if reference.endswith(".pkl"):
        from art_edm.references import load_reference

        found = load_reference(str(lab.networks / reference))
        reference = "converted.npz"
        np.savez(lab.networks / reference, mu=found.mu, sigma=found.cov)
    exact = independent(lab, network, edm(4, 0.002, 80), reference, item.solver)
    assert results[name].rows["edm"][1] == pytest.approx(exact, rel=1e-5)
    assert results[name].rows["dpm"][1] != pytest.approx(exact, rel=1e-4)


def test_transfer_uses_the_grid_of_cifar10_unchanged(done):
    lab, results = done
    cifar, own = (lab.run(lab.network(name)).grid(4) for name in (CIFAR, AFHQ))
    found = results["table6-afhqv2"].rows["art_rl"][1]
    assert found == pytest.approx(independent(lab, AFHQ, cifar, "afhqv2-64x64.npz"), rel=1e-3)
    assert cifar != own and found != pytest.approx(independent(lab, AFHQ, own, "afhqv2-64x64.npz"), rel=1e-6)
    assert results["table6-afhqv2"].settings["grid learned on"] == Path(CIFAR).stem


def test_table_5_resamples_the_grid_of_18_steps(done):
    lab, results = done
    grid = resample(lab.run(lab.network(CIFAR)).grid(18), 4)
    exact = independent(lab, CIFAR, grid, "cifar10-32x32.npz")
    assert results["table5"].rows["art_rl"][1] == pytest.approx(exact, rel=1e-3)


def test_table_8_is_the_inception_score(done):
    lab, results = done
    net = load_network(str(lab.networks / XS)).denoiser
    images = generate(net, supported(net, edm(4, 0.002, 80)), "heun", NUM, batch=NUM)
    p = detector()(to_pixels(images).reshape(images.shape), no_output_bias=True).double()
    parts = [part for block in p.chunk(2) for part in block.chunk(2)]
    exact = np.mean([float((q * (q.log() - q.mean(0).log())).sum(1).mean().exp()) for q in parts])
    assert results["table8"].rows["edm"][1] == pytest.approx(exact, rel=1e-3) and exact > 1.0001
    assert results["table8"].better == "higher" and "not NVIDIA's Inception" in results["table8"].notes[-1]


def test_latents_are_decoded_before_they_become_pixels(networks, tmp_path):
    lab = Lab(Cells(tmp_path / "cells"), World(), tmp_path, networks, forced=True)
    network, decode = lab.network(XS), latent_images.decoder_of(XS, lab)
    found = CallDetector(detector(), "d", "0" * 64, (3, 8, 8), torch.device("cpu"))
    samples = Samples(network, edm(2, 0.002, 80), "euler", 6)
    plain = features(samples, found, lab.work())["features"]
    same = latent_images.latent_features(samples, found, lab.work(), decode)["features"]
    assert np.array_equal(plain, same)  # EDM2's RGB encoder is a plain rounding
    other = CallDetector(detector(), "d", "1" * 64, (3, 8, 8), torch.device("cpu"))
    inverted = latent_images.latent_features(samples, other, lab.work(), lambda x: 255 - decode(x))["features"]
    images = generate(network.denoiser, edm(2, 0.002, 80), "euler", 6)
    exact = detector()(255 - to_pixels(images).reshape(images.shape), return_features=True).numpy()
    assert inverted == pytest.approx(exact, rel=1e-5) and np.abs(inverted - plain).max() > 0.01
    assert latent_images.decoder_of(CIFAR, lab) is None


DRIVER = """
import importlib.util, json, sys
from dataclasses import replace
from art_edm import laboratory, recipes
from art_edm.config import PRESETS
laboratory.PRESETS["default"] = replace(PRESETS["default"], **json.loads(sys.argv.pop(1)))
recipes.TABLES["table2"] = replace(recipes.TABLES["table2"], steps=(2, 4), num=int(sys.argv.pop(1)), blocks=2)
spec = importlib.util.spec_from_file_location("reproduce", sys.argv.pop(1))
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
tool.main(sys.argv[1:])
"""


def test_torchrun_gives_the_figures_of_one_process(done, tmp_path):
    lab, results = done
    (tmp_path / "driver.py").write_text(DRIVER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(tmp_path / "driver.py"), json.dumps(TINY), str(NUM), str(ROOT / "tools" / "reproduce.py"), "table2",
               f"--networks={lab.networks}", f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cells'}",
               "--device=cpu", "--batch=3"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=180)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads((tmp_path / "out" / "table2.json").read_text())
    for name, row in results["table2"].rows.items():
        assert found["rows"][name] == pytest.approx(row, rel=1e-3)
    assert run.stdout.count("wrote ") == 1
