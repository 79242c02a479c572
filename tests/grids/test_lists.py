"""Lists of noise levels from and for other programs: read as they stand, ended by a stated choice, exact to the bit."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from art_edm.grids.grid import Grid, GridError, edm, load_grid, load_provenance
from art_edm.grids.lists import FORMATS, finish, list_text, read_list, write_list
from tests.tools.test_make_grid import assert_refused, files, run

__all__ = ["run"]  # a fixture

GITS = [80.0, 5.1092, 1.584, 0.47, 0.002]  # published for CIFAR-10, 4 evaluations
AYS = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]  # Stable Diffusion 1.5, 10


# --- reading -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "80, 5.1092, 1.584, .47, .002", "[80,5.1092,1.584,0.47,0.002]", "80 5.1092 1.584 .47 2e-3",
    " [80., 5.1092,\n 1.584,\n .47, .002,]\n", "+80\n5.1092\n1.584\n4.7E-1\n0.002\n", "80\t5.1092 , 1.584,.47 ,0.0020",
])
def test_text(text, tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())  # a byte-order mark is no number
    assert read_list(text).tolist() == read_list(str(tmp_path / "list.txt")).tolist() == GITS


FILES = {
    "list.json": ["[80, 5.1092, 1.584, 0.47, 0.002]", '{"sigmas": [80, 5.1092, 1.584, 0.47, 0.002], "name": "x"}'],
    "list.csv": [
        "80, 5.1092, 1.584, .47, .002\n", "80\r\n5.1092\r\n1.584\r\n.47\r\n.002\r\n\r\n",
        "step,sigma\n0,80\n1,5.1092\n2,1.584\n3,.47\n4,.002\n", "Sigma, time\n80,9\n5.1092,9\n1.584,9\n.47,9\n.002\n",
        "sigma\n80\n5.1092\n1.584\n.47\n.002",
    ],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in FILES.items() for text in texts])
def test_files(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_list(str(tmp_path / name)).tolist() == GITS


BAD_LISTS = {
    "a .npy under another name": ("l.txt", b"\x93NUMPY\x01\x00", "found a .npy array, expected a list"),
    "a zip": ("l.csv", b"PK\x03\x04", "found a zip archive"),
    "a page": ("l.txt", "<!doctype html>", "found a web page"),
    "a pointer": ("l.json", "version https://git-lfs.github.com/spec/v1\n", "found a Git LFS pointer"),
    "endless digits": ("l.txt", "1" * 1_000_000 + "x", "at place 1, expected a number"),  # minutes, if it were tried
    "endless digits in JSON": ("l.json", "[" + "1" * 1_000_000 + "]", "found no valid JSON"),
    "a word": ("l.txt", "80, five, 0", "found 'five' at place 2, expected a number"),
    "nan": ("l.txt", "80, nan, 0", "found 'nan' at place 2"),
    "two commas": ("l.txt", "80,, 5, 0", "found '' at place 2"),
    "grouped digits": ("l.txt", "1_000, 5, 0", "found '1_000' at place 1"),
    "brackets within": ("l.txt", "[[80, 5], 0]", "found '[80' at place 1"),
    "no JSON": ("l.json", "[80, 5", "found no valid JSON"),
    "deep JSON": ("l.json", "[" * 100_000, "found no valid JSON"),
    "JSON of text": ("l.json", '["80", 5]', "found other JSON"),
    "JSON of truths": ("l.json", "[true, false]", "found other JSON"),
    "JSON of lists": ("l.json", "[[80, 5, 0]]", "found other JSON"),
    "JSON without sigmas": ("l.json", '{"timesteps": [9, 1]}', "found other JSON"),
    "CSV of columns": ("l.csv", "0,80\n1,5\n", "found 2 rows of several columns, none with the title sigma"),
    "CSV with a gap": ("l.csv", "step,sigma\n0,80\n1\n", "found '' at place 2"),
    "CSV of words": ("l.csv", "noise\n80\n", "found 'noise' at place 1"),
    "not text": ("l.txt", b"\xff\xfe\x00", "found no readable list (not text in UTF-8)"),
    "a grid": ("l.npy", b"\x93NUMPY", "a grid needs no import"),
}


@pytest.mark.parametrize(("name", "content", "message"), BAD_LISTS.values(), ids=BAD_LISTS)
def test_bad_lists(run, name, content, message):
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(run("import", name, "--out=g.npy"), f"Error: {name}: ", message)
    assert files() == [name]


@pytest.mark.parametrize("levels", ["999, 900, 800, 1", "961.0, 721.0, 481.0, 241.0, 1.0", "80, 5, 1"])
def test_lists_that_may_be_of_timesteps_are_noted(run, levels):
    result = run("import", levels, "--end=append", "--out=a.npy")
    assert result.exit_code == 0 and "note: all levels are whole numbers" in result.output
    other = run("import", levels.replace(", ", ".5, "), "--end=append", "--out=b.npy") if "." not in levels else None
    assert other is None or (other.exit_code == 0 and "whole numbers" not in other.output)


# --- the end -----------------------------------------------------------------------------------------


def test_append_is_one_step_more_and_replace_is_none():
    assert finish(GITS, "append") == Grid([80.0, 5.1092, 1.584, 0.47, 0.002, 0.0])
    assert finish(GITS, "replace") == Grid([80.0, 5.1092, 1.584, 0.47, 0.0])
    assert finish([*GITS, 0.0]) == finish([*GITS, 0.0], "replace") == finish(GITS, "append")
    assert finish(AYS, "replace").num_steps == 10 and finish(AYS, "append").num_steps == 11


@pytest.mark.parametrize(("levels", "end", "message"), [
    (GITS, None, "ends at 0.002, expected 0; choose --end=append .0 after it, 5 steps. or --end=replace .*4 steps"),
    (GITS, "clamp", "found end = 'clamp', expected one of append, replace"),
    (GITS[::-1], "append", "values ascend"),
    ([80.0, 5.0, 5.0, 0.1], "append", "found 5 twice"),
    ([80.0, 5.0, -1.0], "replace", "found -1 at index 2; expected no negative noise level"),  # not hidden by the 0
    ([80.0, 0.1, 0.2], "replace", "values ascend"),
    ([80.0, float("inf"), 0.2], "append", "found inf at index 1"),
    ([80.0, 0.0, 0.2], "append", "values ascend"),
    ([80.0], "replace", "found 1 value"),
    ([], "append", "found 0 value"),
])
def test_lists_that_are_no_grid(levels, end, message):
    with pytest.raises(GridError, match=message):
        finish(levels, end)


def test_import_says_what_it_costs(run):
    appended = run("import", "80, 5.1092, 1.584, .47, .002", "--end=append", "--out=a.npy")
    assert appended.exit_code == 0 and load_grid("a.npy") == finish(GITS, "append")
    assert "wrote a.npy: 5 steps, sigma from 80 to 0.002, then 0" in appended.output
    assert "0 follows 0.002: one step more than the list has" in appended.output
    assert "evaluations per image: 5 (euler, dpmpp2m" in appended.output and "9 (heun), 17 (rk4)" in appended.output

    replaced = run("import", "[80, 5.1092, 1.584, .47, .002]", "--end=replace", "--out=r.npy")
    assert replaced.exit_code == 0 and load_grid("r.npy") == finish(GITS, "replace")
    assert "0 takes the place of 0.002: as many steps as the list has" in replaced.output
    assert "evaluations per image: 4 (euler, dpmpp2m" in replaced.output and "7 (heun), 13 (rk4)" in replaced.output
    origin = load_provenance("r.npy")
    assert (origin["rule"], origin["end"], origin["last_level"], origin["num_steps"]) == ("import", "replace", 0.002, 4)
    assert origin["source"] == "[80, 5.1092, 1.584, .47, .002]"


def test_import_of_a_file_records_it(run):
    Path("ays.csv").write_text("\n".join(map(str, AYS)))
    assert run("import", "ays.csv", "--end=replace", "--out=g.npy").exit_code == 0
    origin = load_provenance("g.npy")
    assert origin["source"] == "ays.csv"
    assert origin["source_sha256"] == hashlib.sha256(Path("ays.csv").read_bytes()).hexdigest()


def test_import_refuses(run):
    Path("sigmas.json").write_text("[80, 1]")
    before = files()
    assert_refused(run("import", "80, 1", "--out=g.npy"), "found a list that ends at 1, expected 0; choose --end=")
    assert_refused(run("import", "sigmas.json", "--out=g.npy"), "sigmas.json: found a list that ends at 1")
    assert_refused(run("import", "sigmas.json", "--end=append", "--out=sigmas.npy"), "expected a grid's provenance")
    assert_refused(run("import", "80, 1", "--end=clamp", "--out=g.npy"), "'clamp' is not one of")
    assert_refused(run("import", "none.txt", "--out=g.npy"), "found no file none.txt, expected a .json, .csv or text")
    assert_refused(run("import", "none", "--out=g.npy"), "found no file of that name and no list of numbers", "'none'")
    Path("lists.csv").mkdir()
    assert_refused(run("import", "lists.csv", "--out=g.npy"), "found a folder lists.csv, expected a .json, .csv")
    Path("lists.csv").rmdir()
    assert_refused(run("import", "80, " * 5000, "--out=g.npy"), "found 80 twice")  # too long for a name
    assert_refused(run("import", "", "--out=g.npy"), "found 0 value(s)")
    assert_refused(run("import", "80, 1, 0"), "Missing option '--out'")
    assert files() == before
    result = run("import", "80, 1, 0", "--end=append", "--out=g.npy")
    assert "note: the list ends at 0 already; --end=append changes nothing" in result.output
    assert load_grid("g.npy") == Grid([80.0, 1.0, 0.0]) and load_provenance("g.npy")["end"] is None


# --- writing -----------------------------------------------------------------------------------------


LEVELS = st.sets(st.floats(min_value=0, exclude_min=True, allow_infinity=False), min_size=1, max_size=20)


@given(values=LEVELS, kind=st.sampled_from(FORMATS))
def test_what_is_written_is_read_to_the_bit(values, kind, tmp_path_factory):
    grid = Grid([*sorted(values, reverse=True), 0.0])
    path = tmp_path_factory.getbasetemp() / f"list{kind}"
    write_list(path, grid)
    assert finish(read_list(str(path))) == grid


def test_nine_digits_would_not_be_enough():
    grid = edm(18, 0.002, 80)
    assert finish([float(f"{v:.9g}") for v in grid.values]) != grid
    assert finish(json.loads(list_text(grid, ".json"))) == grid


@pytest.mark.parametrize("kind", FORMATS)
def test_export_and_import(run, kind):
    run("edm", "--steps=18", "--out=g.npy")
    result = run("export", "g.npy", f"--out=sigmas{kind}")
    assert result.output == f"wrote sigmas{kind}: 18 steps, sigma from 80 to 0.002, then 0\n"
    assert run("import", f"sigmas{kind}", "--out=h.npy").exit_code == 0
    assert Path("g.npy").read_bytes() == Path("h.npy").read_bytes()


def test_the_formats():
    grid = Grid([80.0, 1 / 3, 0.0])
    assert list_text(grid, ".json") == "[80.0, 0.3333333333333333, 0.0]\n"
    assert list_text(grid, ".csv") == "step,sigma\n0,80.0\n1,0.3333333333333333\n2,0.0\n"
    assert list_text(grid, ".txt") == "80.0\n0.3333333333333333\n0.0\n"


def test_export_prints(run):
    np.save("g.npy", [3.0, 0.1, 0.0])
    result = run("export", "g.npy")
    assert result.output == "[3.0, 0.1, 0.0]\n"
    assert run("import", result.output, "--out=h.npy").exit_code == 0 and load_grid("h.npy") == load_grid("g.npy")


def test_export_refuses(run, monkeypatch):
    run("edm", "--steps=4", "--out=g.npy")
    np.save("other.npy", [3.0, 1.0, 0.0])
    np.save("bad.npy", [3.0, 1.0])
    before = {name: Path(name).read_bytes() for name in files()}
    assert_refused(run("export", "g.npy", "--out=g.json"), "g.json is where the provenance of g.npy goes")
    assert_refused(run("export", "g.npy", "--out=other.json"), "where the provenance of other.npy goes")
    assert_refused(run("export", "g.npy", "--out=g.yaml"), "expected one that ends in .json, .csv, .txt")
    assert_refused(run("export", "g.npy", "--out=no/g.txt"), "there is no folder no")
    assert_refused(run("export", "bad.npy", "--out=b.txt"), "bad.npy: found 1 at the end")
    assert_refused(run("export", "none.npy"), "none.npy: found no readable file")

    class FullDisk(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("art_edm.runtime.files.os.fdopen", lambda handle, mode: os.close(handle) or FullDisk())
    assert_refused(run("export", "g.npy", "--out=g.txt"), "cannot write g.txt: No space left on device")
    assert {name: Path(name).read_bytes() for name in files()} == before
