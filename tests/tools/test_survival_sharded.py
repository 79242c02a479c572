"""A network of which each process holds a part: all call `train` alike, and get the grid of one process."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tools.test_survival_processes import free_port, start

pytestmark = pytest.mark.slow

# D of a Gaussian with sigma_data 0.5, half of it on each of two processes; the whole of it where there is but one.
DRIVER = """
import os, sys
import numpy as np, torch
from torch import distributed
from art_edm.learning.config import PRESETS
from art_edm.models.denoiser import Denoiser
from art_edm.learning.training import train

rank, size, out = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), sys.argv[1]
if size > 1:
    distributed.init_process_group("gloo")

class Sharded(Denoiser):
    def __init__(self):
        super().__init__(img_channels=2, img_resolution=2)
        self.scale = torch.nn.Parameter(torch.tensor([0.25, 0.25][rank :: size], dtype=torch.float64))

    def denoise(self, x, sigma, class_labels):
        mine = sum(scale * x / (0.25 + sigma.reshape(-1, 1, 1, 1) ** 2) / 2 for scale in self.scale)  # its share of D
        if size > 1:
            distributed.all_reduce(mine)
        return mine.to(x.dtype)

config = PRESETS["default"].changed(iterations=4, trajectories=20, points=12, seed=int(sys.argv[2]))
result = train(Sharded(), config)
np.save(f"{out}{rank}.npy", result.learned.grid(6).values)
"""


def grid(folder, out, size, seed=0):
    (folder / "driver.py").write_text(DRIVER)
    common = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = [start(folder, ["driver.py", out, seed], RANK=rank, LOCAL_RANK=rank, **common) for rank in range(size)]
    said = [process.communicate(timeout=180)[1] for process in running]
    assert [process.returncode for process in running] == [0] * size, said
    return [np.load(folder / f"{out}{rank}.npy") for rank in range(size)]


def test_a_sharded_network_gives_the_grid_of_the_whole_one(tmp_path):
    (one,), (first, second) = grid(tmp_path, "one", 1), grid(tmp_path, "two", 2)
    assert np.array_equal(first, second) and np.abs(first - one).max() < 1e-9 * one[0]
    assert np.abs(grid(tmp_path, "other", 1, seed=1)[0] - one).max() > 1e-6
