"""The main job: `tools/train_schedule.py --network=mnist` gives the grid it always gave, for as many evaluations."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import torch

from art_edm.grids.grid import load_grid

# Of seed 0 and one thread, as before the code was arranged in folders.
GRID = [
    80.0, 36.06269258859999, 20.930061337632544, 13.625146292515945, 9.604503492749624, 7.135513530590945,
    5.426668950853044, 4.208861430055929, 3.316871308763544, 2.6105628631336906, 2.025429825325063,
    1.5058402165081937, 1.0674264459356788, 0.7287062792141873, 0.4407475112719962, 0.22200483010412128,
    0.08217845176783214, 0.009763177321732975, 0.0,
]
MADE_BY = ("2.13.0+cpu", "x86_64")  # other builds of torch round otherwise


@pytest.mark.slow
def test_the_default_grid_of_mnist_is_the_same_to_the_bit(tool):
    result = tool("train_schedule")("--network=mnist", "--quiet")
    assert result.exit_code == 0, result.stderr
    values, record = load_grid("art_mnist18.npy").values, json.loads(Path("art_mnist18.json").read_text())
    assert record["evaluations"] == 680 and 1 <= record["J_over_J_star"] <= 1.006
    np.testing.assert_allclose(values, GRID, rtol=5e-3)
    if MADE_BY == (torch.__version__, platform.machine()):
        assert values.tolist() == GRID
    twin = tool("train_schedule")("--network=mnist", "--quiet", "--seed=1", "--iterations=20", "--out=twin.npy")
    assert twin.exit_code == 0 and load_grid("twin.npy").values.tolist() != GRID
