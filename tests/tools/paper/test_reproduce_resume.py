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
from paper import run_all as reproduction
from paper.context import Lab
from paper.experiments import TABLES
from paper.report import Result, read_results

from art_edm.metrics.references import save_reference
from art_edm.runtime.distributed import World
from art_edm.runtime.store import Store

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.slow

# The tool on small experiments. It kills itself at the given call of the given function in the given experiment, and
# writes down every finished piece of work: entries, images, iterations of training.
DRIVER = """
import os, signal, sys
from dataclasses import replace
from art_edm.compare import sample_cache as experiment
from art_edm.learning import training
from art_edm.runtime import store as finished
from paper import context as laboratory, experiments as recipes, run_all as reproduction
from paper.tables import ablations, fid_cells as image_cells
from art_edm.learning.config import PRESETS

where, place, count, log = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
laboratory.PRESETS["default"] = PRESETS["default"].changed(iterations=6, batch=16, repeats=4, trajectories=4,
                                        points=12, train_steps=6, distill_paths=32)
mnist = replace(recipes.TABLES["table4"], solver="euler", steps=(2, 4), grids=("edm", "art_rl"), num=8, blocks=2,
                reference="ref.npz", noises=2, floor=3)
clock = recipes.TABLES["ablation-clock"]
recipes.TABLES.clear()
recipes.TABLES.update({"table1": replace(recipes.Experiment("table1", "t", "oned", "oned", solver="euler",
                                                            steps=(2, 5)), num=400), "table4": mnist,
                       "ablation-clock": clock})
ablations.cheap_fields = lambda lab: {"oned": lab.network("oned"), "mnist": lab.network("gaussian:0.5")}
ablations.Fine.__new__.__defaults__ = (8,)
image_cells.FINE_STEPS = 4
training.SAVE_SECONDS = 0
work = laboratory.Lab.work
laboratory.Lab.work = lambda lab, batch=None: replace(work(lab, batch), save_every=0)
now, calls = [], []
runner = reproduction._runner
reproduction._runner = lambda kind: lambda item, lab: now.append(item.name) or runner(kind)(item, lab)

def watched(owner, name, kind, text):
    real = getattr(owner, name)
    def call(*args, **kwargs):
        if (where, place) == (now[-1], kind) and text(*args):
            calls.append(1)
            if len(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if text(*args):
            with open(log, "a") as file:
                file.write(f"{kind} {text(*args)}\\n")
        return result
    setattr(owner, name, call)

watched(finished.Store, "save", "save", lambda self, what, content: (  # a checkpoint is no finished piece
    "" if what == training.CHECKPOINT else f"{self.folder.name} {finished.key_of(what)}"))
watched(experiment, "_images", "images", lambda denoiser, samples, indices, work: (
    f"{now[-1]} {samples.solver} {samples.grid.values.tolist()} {samples.first} {samples.num} {indices}"))
watched(training._Run, "_iterate", "iteration", lambda run, *rest: (
    f"{run.context.identity} {run.config} {run.state.iteration}"))
import reproduce
reproduce.main(sys.argv[1:])
"""
NAMES = ("table1", "table4", "ablation-clock")


def reproduce(folder, where="", place="", count=0):
    """Exit status; results in folder/out, cells in folder/cells, what was done in folder/log."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", DRIVER, where, place, str(count), str(folder / "log"),
               f"--out={folder / 'out'}", f"--cache={folder / 'cells'}",
               "--device=cpu", "--batch=2", f"--networks={folder.parent / 'networks'}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tools'}"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def numbers(folder):
    """All figures, without what depends on time."""
    found = {}
    for name in NAMES:
        data = json.loads((folder / "out" / f"{name}.json").read_text())
        found[name] = {key: data[key] for key in ("rows", "stderr", "more", "more_stderr", "yardsticks", "nfe")}
    return found


def times(folder):
    """When each finished cell was written."""
    return {path.name: path.stat().st_mtime_ns for path in (folder / "cells").glob("*.npz")
            if ".part" not in path.name}


def logged(folder):
    """Every piece of work that was done, in order."""
    return (folder / "log").read_text().splitlines()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    (folder / "networks").mkdir()
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(84, 84))
    statistics = {"mu": rng.normal(size=84), "sigma": factor @ factor.T}
    save_reference(folder / "networks" / "ref.npz", {"fid": statistics}, 1000, {})
    (folder / "networks" / "inception-2015-12-05.pt").write_bytes(b"not needed for LeNet")
    assert reproduce(folder / "whole") == 0
    return folder


def test_killed_in_three_places_and_continued(whole):
    folder = whole / "killed"
    seen = {}
    for where, place, count in (("table1", "iteration", 9), ("table4", "images", 7), ("ablation-clock", "save", 12)):
        assert reproduce(folder, where, place, count) == -signal.SIGKILL
        kept = times(folder)
        assert len(kept) > len(seen)
        assert all(kept[name] == time for name, time in seen.items())  # nothing finished was written again
        assert [(folder / "out" / f"{name}.json").exists() for name in NAMES] == [
            NAMES.index(where) > i for i in range(3)]
        seen = kept
    assert reproduce(folder) == 0
    after = times(folder)
    assert all(after[name] == time for name, time in seen.items()) and len(after) > len(seen)
    assert numbers(folder) == numbers(whole / "whole")
    assert sorted(after) == sorted(path.name for path in (folder / "cells").iterdir())  # no parts, no checkpoints
    assert set(after) == set(times(whole / "whole"))


def test_four_runs_did_the_work_of_one(whole):
    done, once = logged(whole / "killed"), logged(whole / "whole")
    for kind in ("save", "images", "iteration"):  # every batch of images and every iteration was kept as it was done
        pieces = [[line for line in each if line.startswith(kind)] for each in (done, once)]
        assert len(set(pieces[0])) == len(pieces[0]) > 20, kind  # none twice
        assert sorted(pieces[0]) == sorted(pieces[1])


def test_another_run_computes_nothing(whole):
    folder = whole / "whole"
    before, first, lines = times(folder), numbers(folder), logged(folder)
    assert reproduce(folder) == 0
    assert times(folder) == before and numbers(folder) == first and logged(folder) == lines
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
    assert reproduction.reproduce(chosen, Lab(Store(tmp_path / "c"), World(), tmp_path), said.append) == 1
    assert [result.name for result in read_results(tmp_path)] == ["table1", "ablation-price"]
    report = (tmp_path / "README.md").read_text()
    assert "- table4: found no digits, expected some; get them" in report and "3.0 minutes in all" in report
    assert "| table2 | edm-cifar10-32x32-cond-vp.pkl: `curl -LO https://nvlabs" in report
    assert said[0] == "runs now: table1, table4, ablation-price"
