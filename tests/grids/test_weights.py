"""Weights in a grid's sidecar: what is written is read, and what does not fit the grid is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from art_edm.grids.grid import GridError, edm, load_provenance, save_grid
from art_edm.grids.weights import checked_rows, recorded_weights, stale_weights, written_rows

ROWS = [[0.9], [1.25, -0.5], [1.5, -0.75, 0.25]]


def test_rows_become_a_table_and_rows_again():
    table = checked_rows(ROWS, 3)
    assert table.tolist() == [[0.9, 0, 0], [1.25, -0.5, 0], [1.5, -0.75, 0.25]]
    assert written_rows(table) == ROWS
    assert written_rows(np.diag([0.0, 0.0]) + [[1.0, 0], [2.0, 0]]) == [[1.0], [2.0]]
    assert checked_rows([[1], [1]], 2).tolist() == [[1, 0], [1, 0]]  # JSON has no 1.0 where 1 is written
    assert written_rows(np.zeros((1, 1))) == [[0.0]]


@pytest.mark.parametrize("rows, message", [
    ("abc", "found str of weights for 3 steps"), (ROWS[:2], "found 2 rows of weights for 3 steps"),
    ([*ROWS, [1.0]], "found 4 rows"), ([[0.9], 1.0, [1.0]], "found 1.0 in row 1, expected 1 to 2"),
    ([[0.9], [], [1.0]], "found 0 weights in row 1"), ([[0.9, 0.1], [1.0], [1.0]], "found 2 weights in row 0"),
    ([[float("nan")], [1.0], [1.0]], "found nan as weight 0 of row 0"), ([[1.0], [1.0], [float("inf")]], "found inf"),
    ([[1.0], [1.0, "1"], [1.0]], "found '1' as weight 1 of row 1"), ([[True], [1.0], [1.0]], "found True"),
    ([[1.0], [1.0], [10**400]], "as weight 0 of row 2"), ([[1.0], [None], [1.0]], "found None"),
    ({"0": [1.0]}, "found dict of weights"), ([[1.0], [[1.0]], [1.0]], "found [1.0] as weight"),
])
def test_what_is_no_weights_of_three_steps_is_refused(rows, message):
    with pytest.raises(GridError) as error:
        recorded_weights({"weights": rows}, 3)
    assert message in str(error.value) and len(str(error.value)) < 250 and "--refine=weights" in str(error.value)
    assert recorded_weights({"weights": ROWS}, 3) is not None  # the twin
    assert recorded_weights({}, 3) is None and recorded_weights({"weights": None}, 3) is None


def test_weights_of_another_grid_are_told_from_a_sidecar_without(tmp_path):
    path = tmp_path / "g3.npy"
    save_grid(path, edm(3, 0.002, 80), {"weights": ROWS})
    assert load_provenance(path)["weights"] == ROWS
    record = json.loads(path.with_suffix(".json").read_text())
    save_grid(path, edm(4, 0.002, 80), {})
    assert not stale_weights(path)
    path.with_suffix(".json").write_text(json.dumps(record))
    with pytest.raises(GridError, match="the provenance of another file"):
        load_provenance(path)
    assert stale_weights(path)
    for text in ("{", "3", "[]", '"a"'):
        path.with_suffix(".json").write_text(text)
        assert not stale_weights(path)
    assert not stale_weights(tmp_path / "none.npy")
