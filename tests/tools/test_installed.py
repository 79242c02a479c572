"""The wheel in a fresh environment, far from the checkout: `art-edm` does what tools/ does, and names itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from art_edm import __main__ as front
from art_edm.runtime import cli

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("art_edm", "tools", "patches", "third_party", "setup.py", "README.md", "LICENSE")
LEARN = ["--network=oned", "--steps=5", "--iterations=4", "--trajectories=4", "--quiet"]


def command(*arguments, cwd):
    """A process without the checkout on its path."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "ART_EDM_UPSTREAM")}
    environment.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run([str(part) for part in arguments], cwd=cwd, env=environment, timeout=500,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def build(folder):
    """The wheel of this tree, from a copy of it: what a build leaves behind stays out of the checkout."""
    for name in PARTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "edm", "edm2"))
        elif source.exists():
            shutil.copy(source, folder)
    done = command(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index",
                   "--wheel-dir=wheels", ".", cwd=folder)
    assert done.returncode == 0, done.stderr
    return next((folder / "wheels").glob("*.whl"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The scripts' folder of an environment that has the wheel, and this one's torch and the rest."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, with_pip=False, symlinks=os.name == "posix")
    python = place / ("Scripts" if os.name == "nt" else "bin") / "python"
    packages = command(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).stdout.strip()
    Path(packages, "shared.pth").write_text(str(Path(torch.__file__).parents[1]))
    done = command(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index",
                   build(tmp_path_factory.mktemp("source")), cwd=place)
    assert done.returncode == 0, done.stderr
    found = command(python, "-c", "import art_edm; print(art_edm.__file__)", cwd=place).stdout
    assert Path(found).is_relative_to(Path(packages).resolve())
    return python.parent


pytestmark = pytest.mark.slow


@pytest.mark.slow
def test_it_learns_the_grid_of_the_checkout(installed, tmp_path):
    done = command(installed / "art-edm", "train", *LEARN, "--out=wheel.npy", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    script = ROOT / "tools" / "train_schedule.py"
    for name, more in (("tree", []), ("other", ["--seed=1"])):
        assert command(sys.executable, script, *LEARN, *more, f"--out={name}.npy", cwd=tmp_path).returncode == 0
    wheel, tree, other = ((tmp_path / f"{name}.npy").read_bytes() for name in ("wheel", "tree", "other"))
    assert wheel == tree != other
    record = json.loads((tmp_path / "wheel.json").read_text())
    assert record["command"] == f"art-edm train {' '.join(LEARN)} --out=wheel.npy"


@pytest.mark.slow
def test_the_bundled_network_is_in_it(installed, tmp_path):
    snippet = "from art_edm.models.loading import load_network; print(load_network('mnist').denoiser.img_shape)"
    done = command(installed / "python", "-c", snippet, cwd=tmp_path)
    assert done.stdout.strip() == "(1, 28, 28)", done.stderr


@pytest.mark.slow
def test_every_command_starts_and_names_itself(installed, tmp_path):
    listing = command(installed / "art-edm", cwd=tmp_path).stdout
    for name in front.scripts():
        assert f"  {name} " in listing
        done = command(installed / "art-edm", name, "--help", cwd=tmp_path)
        assert done.returncode == 0 and f"Usage: art-edm {name} " in done.stdout, done.stderr
        assert f"art-edm {name}" in done.stdout.partition("Examples")[2] and "tools/" not in done.stdout
    done = command(installed / "art-edm", "teach", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and "found the command 'teach'" in done.stderr


@pytest.mark.slow
def test_the_paper_s_figures_are_in_it(installed, tmp_path):
    done = command(installed / "art-edm", "reproduce", "table1", "--list", cwd=tmp_path)
    assert done.returncode == 0 and "one-dimensional example" in done.stdout, done.stderr


@pytest.mark.slow
def test_patching(installed, tmp_path):
    """The patches and the list of known versions are there; a script that is no version of NVlabs' stays as it is."""
    script = tmp_path / "mine" / "generate.py"
    script.parent.mkdir()
    script.write_text("import click\n\n@click.command()\ndef main():\n    pass\n")
    done = command(installed / "art-edm", "patch", "mine", cwd=tmp_path)
    assert done.returncode == 2 and "after the imports" in done.stdout and "is no version" in done.stderr
    done = command(installed / "art-edm", "patch", "--check", cwd=tmp_path)
    assert done.returncode == 1 and f"{Path('third_party', 'edm')}: no checkout; art-edm patch" in done.stdout


@pytest.mark.slow
@pytest.mark.upstream
def test_patching_upstreams_script(installed, tmp_path):
    from tests.support.patched import originals

    commit, data = next(iter(originals("edm").items()))
    (tmp_path / "generate.py").write_bytes(data)
    done = command(installed / "art-edm", "patch", ".", cwd=tmp_path)
    assert done.returncode == 0 and f"patched (version of commit {commit})" in done.stdout
    assert b"art_edm" in (tmp_path / "generate.py").read_bytes()


def test_how_a_text_names_the_scripts(monkeypatch):
    text = "make one with tools/make_grid.py\n  python tools/fid.py calc\n  torchrun --nproc=8 tools/fid.py calc"
    assert cli.named(text) == text and not cli.installed()  # of a checkout
    monkeypatch.setattr(cli, "TOOLS", cli._PACKAGE / "tools")
    assert cli.named(text) == ("make one with art-edm grid\n  art-edm fid calc\n"
                               "  torchrun --nproc=8 -m art_edm fid calc")
