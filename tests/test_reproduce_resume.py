"""A reproduction that is killed continues: no finished piece is done again, and the figures are the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from art_edm import reproduction
from art_edm.cells import Cells
from art_edm.distributed import World
from art_edm.laboratory import Lab
from art_edm.recipes import TABLES
from art_edm.references import save_reference
from art_edm.result import Result, read_results

ROOT = Path(__file__).parents[1]

# The tool on small experiments; it kills itself at the given call of the given function.
DRIVER = """
import importlib.util, os, signal, sys
from dataclasses import replace
from art_edm import cells, laboratory, recipes, training
from art_edm.config import PRESETS

place, count = sys.argv.pop(1), int(sys.argv.pop(1))
laboratory.PRESETS["default"] = replace(PRESETS["default"], iterations=6, batch=16, repeats=4, trajectories=4,
                                        points=12, train_steps=6, keep=32)
mnist = replace(recipes.TABLES["table4"], solver="euler", steps=(2, 4), grids=("edm", "art_rl"), num=8, blocks=2,
                reference="ref.npz", name="table4")
recipes.TABLES.clear()
recipes.TABLES.update(table1=replace(recipes.Experiment("table1", "t", "oned", "oned", solver="euler", steps=(2, 5)),
                                     num=400), table4=mnist)
training.SAVE_SECONDS = 0

def dying(owner, name):
    real, calls = getattr(owner, name), []
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, name, call)

if place:
    owner, name = {"save": (cells.Cells, "save"), "iteration": (training._Run, "_iterate"),
                   "images": (__import__("art_edm.experiment", fromlist=["x"]), "_images")}[place]
    dying(owner, name)
spec = importlib.util.spec_from_file_location("reproduce", sys.argv.pop(1))
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
tool.main(sys.argv[1:])
"""


def reproduce(folder, place="", count=0):
    """Exit status; results in folder/out, cells in folder/cells."""
    command = [sys.executable, "-c", DRIVER, place, str(count), str(ROOT / "tools" / "reproduce.py"),
               f"--out={folder / 'out'}", f"--cache={folder / 'cells'}", "--device=cpu", "--batch=2",
               f"--networks={folder.parent / 'networks'}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def numbers(folder):
    """All figures, without what depends on time."""
    found = {}
    for name in ("table1", "table4"):
        data = json.loads((folder / "out" / f"{name}.json").read_text())
        found[name] = {key: data[key] for key in ("rows", "stderr", "more", "nfe")}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "networks").mkdir()
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(84, 84))
    save_reference(folder / "networks" / "ref.npz", rng.normal(size=84), factor @ factor.T, 1000, {})
    (folder / "networks" / "inception-2015-12-05.pt").write_bytes(b"not needed for LeNet")
    assert reproduce(folder / "whole") == 0
    return folder


def test_killed_in_three_places_and_continued(whole):
    folder = whole / "killed"
    seen = {}
    for place, count in (("iteration", 9), ("save", 20), ("images", 7)):
        assert reproduce(folder, place, count) == -signal.SIGKILL
        kept = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.npz")
                if ".part" not in path.name}
        assert len(kept) > len(seen) or place == "iteration"
        assert all(kept[name] == time for name, time in seen.items())  # nothing finished was written again
        seen = kept
    assert reproduce(folder) == 0
    after = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.npz")}
    assert all(after[name] == time for name, time in seen.items()) and len(after) > len(seen)
    assert numbers(folder) == numbers(whole / "whole")
    assert set(after) == {path.name for path in (whole / "whole" / "cells").glob("*.npz")}  # no parts, no strays


def test_another_run_computes_nothing_and_another_seed_differs(whole):
    folder = whole / "whole"
    before = {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    first = numbers(folder)
    assert reproduce(folder, "images", 1) == 0  # it would die at the first image
    assert {path.name: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()} == before
    assert numbers(folder) == first
    assert first["table4"]["rows"]["edm"] != first["table4"]["rows"]["art_rl"]


def test_what_fails_or_is_lacking_does_not_stop_the_rest(tmp_path, monkeypatch):
    def runner(kind):
        def run(experiment, lab):
            if experiment.name == "table4":
                raise ValueError("found no digits, expected some; get them")
            return Result(experiment.name, "t", "m", ["a"], {"edm": [1.0]}, settings={"seconds": 90.0})
        return run

    monkeypatch.setattr(reproduction, "_runner", runner)
    said = []
    chosen = [TABLES[name] for name in ("table1", "table2", "table4", "ablation-price")]
    assert reproduction.reproduce(chosen, Lab(Cells(tmp_path / "c"), World(), tmp_path), said.append) == 1
    assert [result.name for result in read_results(tmp_path)] == ["table1", "ablation-price"]
    report = (tmp_path / "README.md").read_text()
    assert "- table4: found no digits, expected some; get them" in report and "3.0 minutes in all" in report
    assert "| table2 | edm-cifar10-32x32-cond-vp.pkl: `curl -LO https://nvlabs" in report
    assert said[0] == "runs now: table1, table4, ablation-price"
