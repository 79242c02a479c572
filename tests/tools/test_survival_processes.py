"""A process of several is killed: the others end soon, with one line; a rerun gives the same bytes. Two machines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.survival import SCRIPT, finished, grids

JOB = ["--network=gaussian:0.5", "--steps=6", "--out=g.npy", "--trajectories=20", "--iterations=4", "--quiet"]
SOON = 45.0  # s, of which a busy computer needs most; without a line a process waits for ever

# Process $VICTIM dies at its 20th call of the network, or in the RL stage, and writes when.
DRIVER = """
import os, runpy, signal, sys, time
import art_edm.models.analytic as analytic, art_edm.learning.training as training
place, calls, real = sys.argv.pop(1), [], analytic.GaussianDenoiser.denoise
def die():
    if os.environ["RANK"] == os.environ.get("VICTIM"):
        open("died.txt", "w").write(str(time.monotonic()))
        os.kill(os.getpid(), signal.SIGKILL)
def denoise(*args):
    calls.append(1)
    if place == "profile" and len(calls) == 20:
        die()
    time.sleep(0.005)
    return real(*args)
def measure(*args, real=training.measure_objective):
    profile = real(*args)
    if place == "rl":
        die()
        time.sleep(0.5)  # the others are on their way into the stage or in it
    return profile
analytic.GaussianDenoiser.denoise, training.measure_objective = denoise, measure
sys.argv[0] = sys.argv.pop(1)
runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder, call, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in variables.items()}}
    return subprocess.Popen([sys.executable, *map(str, call)], cwd=folder, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def alone(folder, size, place, victim, arguments):
    """`size` processes without torchrun, whose end nobody else would notice."""
    common = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "VICTIM": victim}
    (folder / "driver.py").write_text(DRIVER)
    call = ["driver.py", place, SCRIPT, *arguments]
    processes = [start(folder, call, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(size)]
    said = [process.communicate(timeout=180)[1] for process in processes]
    return [process.returncode for process in processes], said


def torchrun(folder, options, place, victim, arguments):
    (folder / "driver.py").write_text(DRIVER)
    return start(folder, ["-m", "torch.distributed.run", *options, "driver.py", place, SCRIPT, *arguments],
                 VICTIM=victim)


def seconds_since_death(folder):
    path = Path(folder, "died.txt")
    seconds = time.monotonic() - float(path.read_text())
    path.unlink()
    return seconds


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The grid of one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert finished(folder, JOB) == (0, "")
    return grids(folder)


@pytest.mark.parametrize("size, victim, place, more", [
    (3, 1, "profile", ()), (2, 0, "rl", ()), (2, 1, "rl", ("--rollout=live",)),
], ids=["1 of 3 in the profile", "0 of 2 in the RL stage", "1 of 2 in a live rollout"])
def test_the_others_end_with_one_line(tmp_path, size, victim, place, more):
    codes, said = alone(tmp_path, size, place, victim, [*JOB, *more])
    assert seconds_since_death(tmp_path) < SOON
    assert codes[victim] == -signal.SIGKILL and all(code == 1 for rank, code in enumerate(codes) if rank != victim)
    speaker = 0 if victim else 1
    lines = [line for line in said[speaker].splitlines() if line.startswith(f"process {victim} has ended before")]
    assert len(lines) == 1 and said[speaker].rstrip().endswith(lines[0]) and "--resume" in lines[0]
    assert "Traceback" not in said[speaker]
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".*"))


def test_torchrun_loses_one_and_a_rerun_gives_the_same_bytes(tmp_path, whole):
    options, victim = ["--standalone", "--nproc_per_node=2"], 1
    _, said = torchrun(tmp_path, options, "profile", victim, JOB).communicate(timeout=180)
    assert seconds_since_death(tmp_path) < SOON
    ours = [line for line in said.splitlines() if "--resume" in line or "same command again" in line]
    assert len(ours) == 1, said
    assert ours[0].startswith(f"process {victim} has ended before") or ours[0].startswith("stopped while measuring")
    assert not list(tmp_path.glob("*.npy"))
    again = torchrun(tmp_path, options, "nowhere", "none", [*JOB, "--resume"])
    assert again.communicate(timeout=180) and again.returncode == 0
    assert grids(tmp_path) == whole and not list(tmp_path.glob("*.unfinished"))


def test_two_machines_by_torchruns_own_options(tmp_path, whole):
    """Both on this computer, in folders of their own; process 0, of the first, writes."""
    port, nodes = free_port(), []
    for node in range(2):
        folder = tmp_path / str(node)
        folder.mkdir()
        options = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={node}", "--master_addr=127.0.0.1",
                   f"--master_port={port}"]
        nodes.append(torchrun(folder, options, "nowhere", "none", JOB))
    said = [node.communicate(timeout=180)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert grids(tmp_path / "0") == whole and not list((tmp_path / "1").glob("g.*"))
