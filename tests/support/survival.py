"""The main command as a process that says where it has got to, and dies on request.

Symbols
-------
stage  load (from the interpreter's start), profile, rl, write (grids and sidecars), end (all is done)
marks  a file with a line for every stage that has begun: its name and the seconds of a steady clock
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "train_schedule.py"
STAGES = ("load", "profile", "rl", "write")

# A checkpoint after every iteration, so that many kills fall into the writing of one.
DRIVER = """
import atexit, os, runpy, sys, time
marks = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
tell = lambda stage: os.write(marks, f"{stage} {time.monotonic()}\\n".encode())
tell("load")
atexit.register(tell, "end")
sys.argv[0] = sys.argv.pop(1)
import art_edm.learning.training as training
training.SAVE_SECONDS = -1.0
import art_edm.schedule as schedule
measure, train = training.measure_objective, schedule.train
training.measure_objective = lambda *args: (tell("profile"), measure(*args), tell("rl"))[1]
schedule.train = lambda *args: (train(*args), tell("write"))[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Killed(NamedTuple):
    """What a kill met."""

    stage: str  # in which it was
    died: bool  # False: it had ended before
    left: List[str]  # names of the files that lay there afterwards


def command(folder: Path, arguments: Sequence[str]) -> "subprocess.Popen[str]":
    """The command in `folder`, started; its marks are in marks.txt."""
    call = [sys.executable, "-c", DRIVER, "marks.txt", str(SCRIPT), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(call, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)


def stages(folder: Path) -> Dict[str, float]:
    """The stages that have begun, in their order, and when."""
    marks = folder / "marks.txt"
    lines = marks.read_text().splitlines() if marks.exists() else []
    return {name: float(moment) for name, moment in (line.split() for line in lines if " " in line)}


def durations(folder: Path) -> Dict[str, float]:
    """Seconds of every stage of a run that has ended."""
    began = stages(folder)
    names = list(began)
    return {a: began[b] - began[a] for a, b in zip(names, names[1:])}


def finished(folder: Path, arguments: Sequence[str]) -> "tuple[int, str]":
    """Run to the end: exit status, and what was said on stderr."""
    process = command(folder, arguments)
    _, said = process.communicate(timeout=300)
    return process.returncode, said


def kill_in(folder: Path, arguments: Sequence[str], stage: str, delay: float, limit: float = 120.0) -> Killed:
    """Run, and kill -9 `delay` seconds after `stage` has begun."""
    process = command(folder, arguments)
    end = time.monotonic() + limit
    while stage not in stages(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    met = list(stages(folder))[-1] if stages(folder) else "load"
    (folder / "marks.txt").unlink(missing_ok=True)
    left = sorted(path.name for path in folder.iterdir())
    return Killed(met, process.returncode == -signal.SIGKILL, left)


def whole_or_absent(folder: Path, expected: Dict[str, bytes]) -> bool:
    """Whether each grid is absent or has the expected bytes, and each sidecar is absent or can be read."""
    for name, content in expected.items():
        grid, sidecar = folder / name, (folder / name).with_suffix(".json")
        if grid.exists() and grid.read_bytes() != content:
            return False
        if sidecar.exists() and "npy_sha256" not in json.loads(sidecar.read_text()):
            return False
    return True


def grids(folder: Path) -> Dict[str, bytes]:
    """The bytes of all grids of a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npy"))}
