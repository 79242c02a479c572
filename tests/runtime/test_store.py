"""Cells: the same bytes back, or nothing; a description that differs in one bit is another cell."""

import hashlib
import json
import math

import numpy as np
import pytest

from art_edm.runtime.store import Cells, canonical, key_of

WHAT = {"network": "abc", "levels": [80.0, 0.1, 0.0], "seed": 3, "details": {"class_idx": None}}


def content():
    rng = np.random.default_rng(0)
    return {"mu": rng.standard_normal(3), "rows": rng.standard_normal((2, 3)).astype(np.float32),
            "covered": np.array([[0, 2], [5, 9]]), "seconds": np.float64(0.1), "none": np.empty((0, 4))}


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].shape == other[key].shape
        and one[key].tobytes() == other[key].tobytes() for key in one
    )


def test_key_is_the_hash_of_the_canonical_text():
    text = '{"details":{"class_idx":null},"levels":[80.0,0.1,0.0],"network":"abc","seed":3}'
    assert canonical(WHAT) == text
    assert key_of(dict(reversed(list(WHAT.items())))) == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("change", [
    {"levels": [80.0, math.nextafter(0.1, 1), 0.0]},
    {"levels": [80.0, 0.0]}, {"seed": 4}, {"network": "abd"}, {"details": {"class_idx": 0}}, {"more": 0},
])
def test_one_change_is_another_cell(tmp_path, change):
    cells = Cells(tmp_path)
    cells.save(WHAT, content())
    other = {**WHAT, **change}
    assert key_of(other) != key_of(WHAT) and cells.load(other) is None
    assert cells.load(json.loads(json.dumps(WHAT))) is not None  # the twin: nothing changed


def test_nan_describes_nothing():
    with pytest.raises(ValueError):
        canonical({"levels": [float("nan")]})


def test_a_cell_comes_back_to_the_same_bytes(tmp_path):
    cells = Cells(tmp_path / "made" / "here")
    assert cells.load(WHAT) is None
    cells.save(WHAT, content())
    assert same(cells.load(WHAT), content())
    changed = {**content(), "mu": content()["mu"] + 1e-16}
    assert not same(cells.load(WHAT), {**changed, "mu": np.nextafter(content()["mu"], 9)})
    assert [path.name for path in cells.folder.iterdir()] == [f"{key_of(WHAT)}.npz"]


def test_every_damaged_byte_is_found(tmp_path):
    """A file with one byte changed gives the true content (the byte did not matter) or nothing."""
    cells = Cells(tmp_path)
    cells.save(WHAT, content())
    path = cells.path(WHAT)
    blob, refused = path.read_bytes(), 0
    for i in range(0, len(blob), 7):
        path.write_bytes(blob[:i] + bytes([blob[i] ^ 0x41]) + blob[i + 1 :])
        loaded = cells.load(WHAT)
        refused += loaded is None
        assert loaded is None or same(loaded, content()), i
    assert refused > len(blob) / 7 / 2
    for size in (0, 1, 100, len(blob) // 2, len(blob) - 1):
        path.write_bytes(blob[:size])
        assert cells.load(WHAT) is None
    path.write_bytes(blob)
    assert same(cells.load(WHAT), content())


def test_a_file_with_a_valid_zip_but_other_numbers_is_not_believed(tmp_path):
    """What the checksums of a zip cannot find: another cell's file, or numbers replaced by hand."""
    cells = Cells(tmp_path)
    other = {**WHAT, "seed": 4}
    cells.save(other, content())
    cells.path(other).rename(cells.path(WHAT))
    assert cells.load(WHAT) is None
    cells.save(WHAT, content())
    with np.load(cells.path(WHAT)) as file:
        arrays = dict(file)
    np.savez(cells.path(WHAT), **arrays)
    assert same(cells.load(WHAT), content())  # the twin: written again as it was
    arrays["mu"][0] += 1e-9
    np.savez(cells.path(WHAT), **arrays)
    assert cells.load(WHAT) is None


def test_a_pickle_is_not_opened(tmp_path):
    cells = Cells(tmp_path)
    np.savez(cells.path(WHAT), what=np.array(canonical(WHAT)), checksum=np.array([object()], dtype=object))
    assert cells.load(WHAT) is None


def test_parts_by_rank_until_the_cell_is_finished(tmp_path):
    cells = Cells(tmp_path)
    for rank in (10, 0, 2):
        cells.save_part(WHAT, rank, {"rank": np.array(rank)})
    cells.save_part({**WHAT, "seed": 4}, 0, {"rank": np.array(99)})
    (tmp_path / f"{key_of(WHAT)}.part-1.npz").write_bytes(b"half")
    (tmp_path / f"{key_of(WHAT)}.part-x.npz").write_bytes(b"")
    assert [(rank, int(part["rank"])) for rank, part in cells.parts(WHAT)] == [(0, 0), (2, 2), (10, 10)]
    assert cells.load(WHAT) is None
    cells.save(WHAT, content())
    assert cells.parts(WHAT) == [] and len(cells.parts({**WHAT, "seed": 4})) == 1


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the folder .*file.*; choose another --cache"):
        Cells(tmp_path / "file")
