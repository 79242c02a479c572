"""Several processes learn one grid: the bytes of one process, and one line when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from art_edm.learning.training import CHECKPOINT
from art_edm.models.loading import save_network
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.store import Store

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "tools" / "train_schedule.py"
SMALL = ["--trajectories=20", "--iterations=6", "--steps=6", "--quiet"]


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A float32 network with random weights: its rounding depends on the images that are evaluated together."""
    torch.manual_seed(0)
    net = ScoreUNet(img_resolution=8, sigma_data=0.5, width=8, deep_width=12, emb=8)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    path = tmp_path_factory.mktemp("net") / "tiny.pt"
    save_network(path, net)
    return path


def start(folder, size, *arguments, script=SCRIPT):
    """`size` processes of the command, or of another script, as torchrun starts them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                   "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([sys.executable, str(script), *map(str, arguments)], cwd=folder, text=True,
                         env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(size)
    ]


def finished(processes):
    """Exit codes and the errors that were shown."""
    shown = [process.communicate(timeout=120)[1] for process in processes]
    return [process.returncode for process in processes], shown


@pytest.mark.parametrize("more, sizes", [
    ((), (1, 2, 3)), (("--rollout=live", "--iterations=1", "--trajectories=4"), (1, 3)),
])
def test_the_grid_does_not_depend_on_the_number_of_processes(network, tmp_path, more, sizes):
    found = {}
    for size in sizes:
        codes, shown = finished(start(tmp_path, size, f"--network={network}", *SMALL, *more, f"--out=n{size}.npy"))
        assert codes == [0] * size, shown
        found[size] = (tmp_path / f"n{size}.npy").read_bytes()
        record = json.loads((tmp_path / f"n{size}.json").read_text())
        assert record["processes"] == size
        assert record["evaluations"] == json.loads((tmp_path / "n1.json").read_text())["evaluations"]
    assert len(set(found.values())) == 1
    codes, _ = finished(start(tmp_path, 1, f"--network={network}", *SMALL, *more, "--seed=1", "--out=other.npy"))
    assert codes == [0] and (tmp_path / "other.npy").read_bytes() != found[1]
    assert not list(tmp_path.glob("*.unfinished"))


JUMPING = """
import hashlib, sys, torch
from art_edm.models.analytic import MixtureDenoiser
from art_edm.learning.config import TrainConfig
from art_edm.runtime.context import Context
from art_edm.runtime.distributed import world
from art_edm.learning.training import train

images = torch.randn(12, 1, 6, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
with world("cpu") as here:
    config = TrainConfig(method="direct", trajectories=60, points=40)
    result = train(MixtureDenoiser([1 / 12] * 12, images, 0.01), config, Context(here))
    profile = result.profile
    line = [hashlib.sha256(profile.direct(18).values.tobytes()).hexdigest(), *profile.norm.shape, profile.evaluations]
    with open(f"{here.size}-{here.rank}.txt", "w") as file:
        print(*line, file=file)
"""


def test_paths_that_jump_are_measured_alike_by_any_number_of_processes(tmp_path):
    """The second stage, of many short trajectories placed by what the first has seen."""
    (tmp_path / "jumping.py").write_text(JUMPING)
    found = {}
    for size in (1, 2, 3):
        processes = start(tmp_path, size, script=tmp_path / "jumping.py")
        codes, shown = finished(processes)
        assert codes == [0] * size, shown
        found.update({(size, rank): (tmp_path / f"{size}-{rank}.txt").read_text().split() for rank in range(size)})
    assert len(found) == 6 and all(each == found[1, 0] for each in found.values())
    # 20 trajectories of 40 levels, then 80 of 20: 100 in all, and no more evaluations than 60 of 40
    assert int(found[1, 0][1]) == 100 and int(found[1, 0][3]) == 20 * 40 + 80 * 20


@pytest.mark.parametrize("more", [(), ("--rollout=live",)])
def test_a_network_that_fails_ends_all_with_one_line(tmp_path, more):
    net = ScoreUNet(img_resolution=8, sigma_data=0.5, width=8, deep_width=12, emb=8)
    with torch.no_grad():
        net.conv_in.weight.fill_(float("nan"))
    save_network(tmp_path / "nan.pt", net)
    codes, shown = finished(start(tmp_path, 2, "--network=nan.pt", *SMALL, *more))
    assert codes == [2, 2] and "NaN or infinity at sigma" in shown[0]
    assert shown[0].startswith("Error: ") and shown[0].count("\n") == 1
    assert "Traceback" not in shown[1]  # torch itself may report there that process 0 has left
    assert not list(tmp_path.glob("*.npy"))


def test_stopped_together_and_resumed_by_another_number(network, tmp_path):
    common = [f"--network={network}", "--trajectories=20", "--iterations=40", "--steps=6", "--quiet"]
    assert finished(start(tmp_path, 1, *common, "--out=whole.npy"))[0] == [0]
    processes = start(tmp_path, 2, *common, "--iterations=4000", "--out=part.npy")
    while not Store(tmp_path / "part.unfinished").load(CHECKPOINT):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.02)
    for process in processes:
        process.send_signal(signal.SIGTERM)
    codes, shown = finished(processes)
    assert codes == [1, 1] and "run the same command again to continue" in shown[0]
    os.rename(tmp_path / "part.unfinished", tmp_path / "other.unfinished")
    codes, shown = finished(start(tmp_path, 3, *common, "--iterations=41", "--out=other.npy", "--resume"))
    assert codes == [2, 2, 2] and "iterations=4000" in shown[0]  # of other settings
    os.rename(tmp_path / "other.unfinished", tmp_path / "part.unfinished")
    processes = start(tmp_path, 2, *common, "--out=again.npy")
    assert finished(processes)[0] == [0, 0]
    assert (tmp_path / "again.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()
