"""The command line of tools/make_grid.py: files it writes, and one line for every mistake."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from art_edm.grids.grid import RULES, Grid, edm, load_grid, load_provenance, read_off, resample

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "make_grid.py"


@pytest.fixture
def run(tool):
    """Run the tool in an empty folder."""
    return tool("make_grid")


def files(folder="."):
    return sorted(p.name for p in Path(folder).iterdir())


def assert_refused(result, *parts):
    """Exit code 2, a single line, no traceback."""
    assert result.exit_code == 2, result.output
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in result.output


# --- making ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
def test_every_rule(run, name):
    result = run(name, "--steps=5", "--sigma-max=40", "--sigma-min=0.01", "--rho=5", "--out=g.npy")
    assert result.exit_code == 0 and "wrote g.npy: 5 steps, sigma from 40 to" in result.output
    assert load_grid("g.npy") == RULES[name](5, 0.01, 40, 5)
    used = {"uniform": (), "dpm": ("sigma_min",), "edm": ("sigma_min", "rho"), "edm-unpinned": ("rho",),
            "dpm-unpinned": ("sigma_min",)}[name]
    settings = {"sigma_max": 40, **{key: {"sigma_min": 0.01, "rho": 5}[key] for key in used}}
    assert {**load_provenance("g.npy"), "npy_sha256": 0} == {"rule": name, "num_steps": 5, "npy_sha256": 0, **settings}
    assert result.output.count("the option changes nothing") == 2 - len(used)


def test_defaults_are_edms(run):
    assert run("edm", "--steps=18", "--out=g.npy").exit_code == 0
    assert load_grid("g.npy") == edm(18, 0.002, 80, 7)


def test_an_option_without_effect_is_not_silent(run):
    assert "the rule uniform has no rho" in run("uniform", "--steps=4", "--rho=3", "--out=g.npy").output
    assert "note" not in run("uniform", "--steps=4", "--out=g.npy").output


def test_help_has_pasteable_commands(run):
    commands = ("edm", "resample", "show", "import", "export")
    for args in ((), ("--help",), *((command, "--help") for command in commands)):
        result = run(*args)
        assert result.exit_code == 0 and "python tools/make_grid.py" in result.output
    assert "(not used by this rule)" in run("uniform", "--help").output


BAD_OPTIONS = {
    "0 steps": (["--steps=0"], "num_steps = 0"),
    "negative steps": (["--steps=-4"], "num_steps = -4"),
    "text": (["--steps=many"], "'many' is not a valid integer"),
    "fraction": (["--steps=2.5"], "not a valid integer"),
    "enormous": (["--steps=1000000000000"], "expected a whole number"),
    "no steps": ([], "Missing option '--steps'"),
    "sigma order": (["--steps=4", "--sigma-min=90"], "sigma_min = 90"),
    "nan": (["--steps=4", "--sigma-max=nan"], "sigma_max = nan"),
    "rho": (["--steps=4", "--rho=0"], "rho = 0"),
    "unknown option": (["--steps=4", "--sigma=3"], "--sigma"),
    "missing folder": (["--steps=4", "--out=no/g.npy"], "cannot write no/g.npy: there is no folder no"),
    "a folder": (["--steps=4", "--out=d.npy"], "it is a folder"),
    "other suffix": (["--steps=4", "--out=g.npz"], "ends in .npy"),
    "foreign json": (["--steps=4", "--out=mine.npy"], "found mine.json, not a grid's provenance"),
}


@pytest.mark.parametrize(("args", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options_write_nothing(run, args, message):
    Path("d.npy").mkdir()
    Path("mine.json").write_text("{}")
    before = files()
    assert_refused(run("edm", *([] if any("--out" in a for a in args) else ["--out=g.npy"]), *args), message)
    assert files() == before and Path("mine.json").read_text() == "{}"


def test_unknown_rule_and_missing_out(run):
    assert_refused(run("karras", "--steps=4", "--out=g.npy"), "No such command 'karras'")
    assert_refused(run("edm", "--steps=4"), "Missing option '--out'")


def test_a_folder_that_cannot_be_written(run, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("art_edm.runtime.files.tempfile.mkstemp", refuse)
    assert_refused(run("edm", "--steps=4", "--out=g.npy"), "cannot write g.npy: Permission denied")
    assert files() == []


def test_a_full_disk_leaves_the_old_files(run, monkeypatch):
    run("edm", "--steps=4", "--out=g.npy")
    before = {name: Path(name).read_bytes() for name in files()}

    class FullDisk(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("art_edm.runtime.files.os.fdopen", lambda handle, mode: os.close(handle) or FullDisk())
    assert_refused(run("edm", "--steps=5", "--out=g.npy"), "cannot write g.npy: No space left on device")
    assert_refused(run("resample", "g.npy", "--steps=3"), "cannot write g-3.npy: No space left on device")
    assert {name: Path(name).read_bytes() for name in files()} == before


# --- resampling --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "default"), [
    ("art-18.npy", "art-9.npy"), ("art18.npy", "art9.npy"), ("18.npy", "9.npy"), ("art.npy", "art-9.npy"),
    ("art-118.npy", "art-118-9.npy"), ("art-20.npy", "art-20-9.npy"), ("18-art.npy", "18-art-9.npy"),
])
def test_resample_chooses_a_name(run, name, default):
    run("edm", "--steps=18", f"--out={name}")
    result = run("resample", name, "--steps=9")
    assert result.exit_code == 0 and f"wrote {default}: 9 steps" in result.output
    assert load_grid(default) == read_off(edm(18, 0.002, 80), 9)
    run("resample", name, "--steps=9", "--resample=paper", "--out=paper.npy")
    assert load_grid("paper.npy") == resample(edm(18, 0.002, 80), 9) != load_grid(default)
    assert [load_provenance(file)["resample"] for file in (default, "paper.npy")] == ["clock", "paper"]


def test_resample_records_its_source(run):
    run("edm", "--steps=18", "--out=g.npy")
    assert run("resample", "g.npy", "--steps=9", "--out=h.npy").exit_code == 0
    origin = load_provenance("h.npy")
    assert (origin["rule"], origin["source"], origin["source_num_steps"]) == ("resample", "g.npy", 18)
    assert origin["source_provenance"]["rule"] == "edm"
    assert origin["source_sha256"] == load_provenance("g.npy")["npy_sha256"]


@pytest.mark.parametrize("steps, every", [(1, 18), (54, 1)])
def test_resample_to_one_step_and_to_more(run, steps, every):
    """Levels in common stay to the bit; a finer grid goes below the file's last level, as the clock does."""
    run("edm", "--steps=18", "--out=g.npy")
    assert run("resample", "g.npy", f"--steps={steps}", "--out=h.npy").exit_code == 0
    found, old = load_grid("h.npy").values, edm(18, 0.002, 80).values
    assert np.array_equal(found[::max(steps // 18, 1)], old[::every]) and len(found) == steps + 1
    assert (found[-2] < old[-2]) == (steps > 18)


def test_resample_refuses(run):
    run("edm", "--steps=18", "--out=g-18.npy")
    run("edm", "--steps=1", "--out=one.npy")
    before = files()
    assert_refused(run("resample", "g-18.npy", "--steps=18"), "has 18 steps already")
    assert_refused(run("resample", "g-18.npy", "--steps=0"), "num_steps = 0")
    assert_refused(run("resample", "one.npy", "--steps=4"), "found a grid of 1 step")
    assert_refused(run("resample", "g-18.npy", "--steps=9", "--out=no/g.npy"), "there is no folder")
    assert_refused(run("resample", "none.npy", "--steps=9"), "none.npy: found no readable file")
    assert files() == before


# --- showing -----------------------------------------------------------------------------------------


def test_show_prints_values_steps_and_origin(run):
    run("dpm", "--steps=3", "--sigma-max=100", "--sigma-min=0.01", "--out=g.npy")
    lines = run("show", "g.npy").output.splitlines()
    assert lines[0] == "g.npy: 3 steps, sigma from 100 to 0.01, then 0"
    assert [line.split() for line in lines[1:6]] == [
        ["step", "sigma", "size", "ratio"], ["0", "100", "99", "100"], ["1", "1", "0.99", "100"],
        ["2", "0.01", "0.01", "-"], ["3", "0"],
    ]
    assert lines[6].startswith("checks passed: ") and lines[7].startswith("provenance: {")
    assert '"rule": "dpm"' in "\n".join(lines)


def test_show_without_or_with_a_stale_sidecar(run):
    np.save("g.npy", [3.0, 1.0, 0.0])
    assert "provenance: no sidecar" in run("show", "g.npy").output
    Path("g.json").write_text(json.dumps({"npy_sha256": "0"}))
    result = run("show", "g.npy")
    assert result.exit_code == 0 and "found the provenance of another file" in result.output


@pytest.mark.parametrize("num_steps", [1, 18])
def test_show_plots(run, num_steps):
    pytest.importorskip("matplotlib")
    run("edm", f"--steps={num_steps}", "--out=g.npy")
    assert "wrote g.png" in run("show", "g.npy", "--plot").output
    assert Path("g.png").read_bytes().startswith(b"\x89PNG")
    assert files() == ["g.json", "g.npy", "g.png"]


def test_show_without_matplotlib(run, monkeypatch):
    run("edm", "--steps=4", "--out=g.npy")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert_refused(run("show", "g.npy", "--plot"), "pip install 'art_edm[plot]'")
    assert run("show", "g.npy").exit_code == 0 and files() == ["g.json", "g.npy"]


# --- bad files ---------------------------------------------------------------------------------------


class Payload:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("trace",)


BAD_FILES = {
    "nan": ([3.0, math.nan, 0.0], "found nan at index 1"),
    "inf": ([math.inf, 1.0, 0.0], "found inf at index 0"),
    "ascending": ([0.0, 1.0, 3.0], "values ascend; expected noise levels from sigma_max down to 0"),
    "duplicates": ([3.0, 1.0, 1.0, 0.0], "found 1 twice, at steps 1 and 2"),
    "negative": ([3.0, -1.0, 0.0], "found -1 at index 1"),
    "no final 0": ([3.0, 1.0], "expected exactly 0 there"),
    "two dimensions": (np.array([[3.0, 0.0]]), "found shape (1, 2)"),
    "integers": (np.array([3, 1, 0]), "type int64"),
    "objects": (np.array([3.0, 0.0], object), "Object arrays cannot be loaded"),
    "malicious objects": (np.array([Payload(), 0.0], object), "Object arrays cannot be loaded"),
}


@pytest.mark.parametrize(("values", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_values(run, values, message):
    np.save("bad.npy", values, allow_pickle=True)
    assert_refused(run("show", "bad.npy"), "bad.npy: ", message)
    assert_refused(run("resample", "bad.npy", "--steps=2"), "bad.npy: ", message)
    assert files() == ["bad.npy"]


def test_bad_bytes(run):
    np.save("good.npy", Grid([3.0, 1.0, 0.0]).values)
    good = Path("good.npy").read_bytes()
    contents = {b"": "an empty file", good[:-3]: "damaged", good[:30]: "damaged", b"hello": "a file of unknown kind",
                pickle.dumps(Payload()): "a pickle"}
    for content, message in contents.items():
        Path("bad.npy").write_bytes(content)
        assert_refused(run("show", "bad.npy"), message)
        assert_refused(run("resample", "bad.npy", "--steps=2"), message)
    assert_refused(run("show", "missing.npy"), "missing.npy: found no readable file")
    assert files() == ["bad.npy", "good.npy"]


# --- as a process ------------------------------------------------------------------------------------


def process(folder, *args):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([sys.executable, str(SCRIPT), *args], cwd=folder, env={**os.environ, "PYTHONPATH": path},
                          capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.slow
def test_as_a_process_from_another_folder(tmp_path):
    done = process(tmp_path, "edm", "--steps=3", "--out=g.npy")
    assert (done.returncode, done.stderr) == (0, "") and files(tmp_path) == ["g.json", "g.npy"]
    assert load_grid(tmp_path / "g.npy") == edm(3, 0.002, 80)


@pytest.mark.slow
def test_a_mistake_as_a_process(tmp_path):
    done = process(tmp_path, "edm", "--steps=0", "--out=g.npy")
    assert (done.returncode, done.stdout) == (2, "") and files(tmp_path) == []
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1
