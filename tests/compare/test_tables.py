"""Tables as text, Markdown, CSV, JSON and picture, and grids as a user names them."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from art_edm.compare import tables
from art_edm.grids.grid import dpm, edm, edm_unpinned, read_off, save_grid
from art_edm.models.analytic import GaussianDenoiser, one_dimensional
from art_edm.sampling.baselines import choose_grids

DENOISER = GaussianDenoiser(0, 1, (1, 2, 2))
ROWS = [
    {"name": "edm", "steps": 5, "nfe": 9, "images": 100, "blocks": 5, "fid": 3.14159, "fid_stderr": 0.0213,
     "fid_min": 3.1, "fid_blocks": [3.1, 3.2], "origin": "rule"},
    {"name": "a|b", "steps": 5, "nfe": 9, "images": 100, "blocks": 5, "fid": 30.0, "fid_stderr": 12.3, "fid_min": 20.0,
     "fid_difference": 26.9, "fid_difference_stderr": 1.26, "origin": "resampled from 18"},
    {"name": "edm", "steps": 9, "nfe": 17, "images": 100, "blocks": 5, "fid": 2.5, "fid_stderr": None, "fid_min": 2.5},
]


def test_text_shows_as_many_digits_as_are_known():
    assert tables.lines(ROWS) == [
        "name  K  NFE  images   FID             min    difference    grid",
        "edm   5  9    5 x 100  3.142 +- 0.021  3.100",
        "a|b   5  9    5 x 100  30 +- 12        20     +26.9 +- 1.3  resampled from 18",
        "edm   9  17   5 x 100  2.5             2.5",
    ]
    negative = {**ROWS[1], "fid_difference": -0.123, "fid_difference_stderr": 0.05}
    assert "-0.123 +- 0.050" in tables.lines([negative])[1]
    assert "+0 +- 0" in tables.lines([{**ROWS[1], "fid_difference": 0.0, "fid_difference_stderr": 0.0}])[1]
    assert "min" not in tables.lines([{**ROWS[0], "blocks": 1}])[0]


def test_markdown_escapes():
    text = tables.markdown(ROWS).splitlines()
    assert text[1] == "| --- | --- | --- | --- | --- | --- | --- | --- |"
    assert text[3] == "| a\\|b | 5 | 9 | 5 x 100 | 30 ± 12 | 20 | +26.9 ± 1.3 | resampled from 18 |"


def test_csv_and_json_hold_all_digits(tmp_path):
    tables.write(tmp_path / "t.csv", ROWS, {})
    rows = list(csv.DictReader(open(tmp_path / "t.csv", newline="")))
    assert [float(row["fid"]) for row in rows] == [3.14159, 30, 2.5] and rows[1]["name"] == "a|b"
    assert rows[0]["fid_difference"] == "" and "fid_blocks" not in rows[0]
    tables.write(tmp_path / "t.json", ROWS, {"seed": 3})
    assert json.loads((tmp_path / "t.json").read_text()) == {"seed": 3, "rows": ROWS}


def test_plot_is_a_line_for_each_name(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    seen = []
    original, Figure.savefig = Figure.savefig, lambda self, *args, **kwargs: (
        seen.append(self.axes[0]), original(self, *args, **kwargs))[1]
    try:
        tables.write(tmp_path / "t.png", ROWS, {})
    finally:
        Figure.savefig = original
    with Image.open(tmp_path / "t.png") as picture:
        assert picture.format == "PNG"
    lines = {text.get_text(): box.lines[0].get_xydata() for text, box in
             zip(seen[0].get_legend().get_texts(), seen[0].containers)}
    assert lines["edm"].tolist() == [[9, 3.14159], [17, 2.5]] and lines["a|b"].tolist() == [[9, 30]]
    assert seen[0].get_xscale() == seen[0].get_yscale() == "log"
    assert seen[0].get_ylabel() == "FID"
    with pytest.raises(ValueError, match="found no NFE to draw .*NAME@NFE=DIR"):
        tables.plot(tmp_path / "u.png", [{**ROWS[0], "nfe": None}])


# --- grid_choice -------------------------------------------------------------------------------------


def choices(specs, steps, denoiser=DENOISER):
    return [(each.name, each.origin, each.grid) for each in choose_grids(specs, steps, denoiser)]


def test_rules_are_those_of_the_denoiser():
    assert choices(["edm", "dpm"], [3, 5]) == [
        *(("edm", "rule", edm(k, 0.002, 80)) for k in (3, 5)), *(("dpm", "rule", dpm(k, 0.002, 80)) for k in (3, 5))
    ]
    assert choices(["edm"], [4], one_dimensional()) == [("edm", "rule", edm_unpinned(4, 3.0))]


def test_files_are_used_resampled_or_chosen_by_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    five, three = edm(5, 0.01, 80), edm(3, 0.1, 80)
    save_grid("art5.npy", five, {})
    save_grid("art3.npy", three, {})
    assert choices(["art5.npy"], [5, 9]) == [("art5", "file", five), ("art5", "resampled from 5", read_off(five, 9))]
    assert choices(["art{steps}.npy"], [5, 3]) == [("art", "file", five), ("art", "file", three)]
    assert choices(["x=art5.npy", "art5.npy"], [5]) == [("x", "file", five), ("art5", "file", five)]
    save_grid("art9.npy", five, {})
    for specs, steps, text in (
        (["art{steps}.npy"], [9], "art9.npy: found 5 steps, expected 9"), (["art{steps}.npy"], [4], "art4.npy"),
        (["none"], [5], "found the grid 'none', expected uniform"), (["=art5.npy"], [5], "expected NAME=F.npy"),
        (["art5.npy", "./art5.npy"], [5], "two grids of the name art5"), (["edm", "edm=art5.npy"], [5], "two grids"),
    ):
        with pytest.raises(ValueError, match=text):
            choices(specs, steps)


def test_a_grid_that_the_network_does_not_support(tmp_path):
    save_grid(tmp_path / "high.npy", edm(5, 0.01, 99), {})
    with pytest.raises(ValueError, match="high in 5 steps: the grid starts at sigma = 99"):
        choices([str(tmp_path / "high.npy")], [5])
    assert np.isclose(choices(["edm"], [5])[0][2].sigma_max, 80)
