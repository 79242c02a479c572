"""Ctrl-C while a tool still imports torch: one line and exit code 1, never a traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
COMMANDS = ["train_schedule.py --network=gaussian:1", "fid.py calc --images=a --ref=b.npz", "reproduce.py table1",
            "make_grid.py import 1,0 --out=a.npy", "benchmark.py", "train_mnist.py", "train_cifar10.py --data=a"]
SLOW = "import pathlib, time; pathlib.Path('importing').touch(); time.sleep(60)\n"


def interrupted(tmp_path, *command):
    """Exit code and stderr of a process that gets Ctrl-C in the import of a torch that takes a minute."""
    (tmp_path / "torch.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(TOOLS.parent)])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in a job of the background
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "importing").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    return process.wait(30), process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split(".")[0])
def test_one_line(tmp_path, command):
    name, *arguments = command.split()
    assert interrupted(tmp_path, str(TOOLS / name), *arguments) == (1, "\nAborted\n")  # the first ends the line of ^C
    assert (tmp_path / "importing").exists()


def test_an_import_at_the_top_would_show_a_traceback(tmp_path):
    code, shown = interrupted(tmp_path, "-c", "import torch")
    assert code == -signal.SIGINT and "Traceback" in shown
