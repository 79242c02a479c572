"""Store: the same bytes back, or nothing; a description that differs in one bit is another entry."""

import errno
import hashlib
import json
import math
import os

import numpy as np
import pytest

import art_edm.runtime.store as store_module
from art_edm.runtime.store import Store, canonical, code_version, key_of

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
def test_one_change_is_another_entry(tmp_path, change):
    store = Store(tmp_path)
    store.save(WHAT, content())
    other = {**WHAT, **change}
    assert key_of(other) != key_of(WHAT) and store.load(other) is None
    assert store.load(json.loads(json.dumps(WHAT))) is not None  # the twin: nothing changed


def test_nan_describes_nothing():
    with pytest.raises(ValueError):
        canonical({"levels": [float("nan")]})


def test_an_entry_comes_back_to_the_same_bytes(tmp_path):
    store = Store(tmp_path / "made" / "here")
    assert store.load(WHAT) is None
    store.save(WHAT, content())
    assert same(store.load(WHAT), content())
    changed = {**content(), "mu": content()["mu"] + 1e-16}
    assert not same(store.load(WHAT), {**changed, "mu": np.nextafter(content()["mu"], 9)})
    assert [path.name for path in store.folder.iterdir()] == [f"{key_of(WHAT)}.npz"]


def test_every_damaged_byte_is_found(tmp_path):
    """A file with one byte changed gives the true content (the byte did not matter) or nothing."""
    store = Store(tmp_path)
    store.save(WHAT, content())
    path = store.path(WHAT)
    blob, refused = path.read_bytes(), 0
    for i in range(0, len(blob), 7):
        path.write_bytes(blob[:i] + bytes([blob[i] ^ 0x41]) + blob[i + 1 :])
        loaded = store.load(WHAT)
        refused += loaded is None
        assert loaded is None or same(loaded, content()), i
    assert refused > len(blob) / 7 / 2
    for size in (0, 1, 100, len(blob) // 2, len(blob) - 1):
        path.write_bytes(blob[:size])
        assert store.load(WHAT) is None
    path.write_bytes(blob)
    assert same(store.load(WHAT), content())


def test_a_file_with_a_valid_zip_but_other_numbers_is_not_believed(tmp_path):
    """What the checksums of a zip cannot find: another entry's file, or numbers replaced by hand."""
    store = Store(tmp_path)
    other = {**WHAT, "seed": 4}
    store.save(other, content())
    store.path(other).rename(store.path(WHAT))
    assert store.load(WHAT) is None
    store.save(WHAT, content())
    with np.load(store.path(WHAT)) as file:
        arrays = dict(file)
    np.savez(store.path(WHAT), **arrays)
    assert same(store.load(WHAT), content())  # the twin: written again as it was
    arrays["mu"][0] += 1e-9
    np.savez(store.path(WHAT), **arrays)
    assert store.load(WHAT) is None


def test_a_pickle_is_not_opened(tmp_path):
    store = Store(tmp_path)
    np.savez(store.path(WHAT), what=np.array(canonical(WHAT)), checksum=np.array([object()], dtype=object))
    assert store.load(WHAT) is None


def test_parts_by_rank_until_the_entry_is_finished(tmp_path):
    store = Store(tmp_path)
    for rank in (10, 0, 2):
        store.save_part(WHAT, rank, {"rank": np.array(rank)})
    store.save_part({**WHAT, "seed": 4}, 0, {"rank": np.array(99)})
    (tmp_path / f"{key_of(WHAT)}.part-1.npz").write_bytes(b"half")
    (tmp_path / f"{key_of(WHAT)}.part-x.npz").write_bytes(b"")
    assert [(rank, int(part["rank"])) for rank, part in store.parts(WHAT)] == [(0, 0), (2, 2), (10, 10)]
    assert store.load(WHAT) is None
    store.save(WHAT, content())
    assert store.parts(WHAT) == [] and len(store.parts({**WHAT, "seed": 4})) == 1


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot make the folder .*file.*; remove that file, or choose another --out"):
        Store(tmp_path / "file")
    with pytest.raises(ValueError, match="cannot make the folder .*: Not a directory; choose another --out"):
        Store(tmp_path / "file" / "inside")


@pytest.mark.parametrize("folder", ["made", None])
def test_memo_works_once(tmp_path, folder):
    """In a folder also across stores; in memory what a caller does to its arrays changes no entry."""
    store, calls = Store(folder and tmp_path / folder), []
    work = lambda: calls.append(1) or content()
    for number in range(3):
        found = store.memo(WHAT, work)
        assert same(found, content()) and len(calls) == 1
        found["mu"] += 1
    assert len(calls) == 1 and same(store.memo({**WHAT, "seed": 4}, work), content()) and len(calls) == 2  # the twin
    if folder:
        Store(tmp_path / folder).memo(WHAT, work)
        assert len(calls) == 2
        store.path(WHAT).write_bytes(b"damaged")
        assert same(store.memo(WHAT, work), content()) and len(calls) == 3
    with pytest.raises(ZeroDivisionError):
        store.memo({**WHAT, "seed": 5}, lambda: 1 / 0)
    assert store.load({**WHAT, "seed": 5}) is None


def test_a_store_in_memory_has_parts_and_forgets_them(tmp_path):
    store = Store()
    for rank in (2, 0):
        store.save_part(WHAT, rank, {"rank": np.array(rank)})
    assert [(rank, int(part["rank"])) for rank, part in store.parts(WHAT)] == [(0, 0), (2, 2)]
    store.save(WHAT, content())
    assert store.parts(WHAT) == [] and same(store.load(WHAT), content())
    store.remove()
    assert store.load(WHAT) is None
    with pytest.raises(ValueError, match="store in memory, expected one in a folder"):
        store.path(WHAT)


def test_remove_deletes_what_is_its_own_and_nothing_else(tmp_path):
    store, key = Store(tmp_path / "kept"), key_of(WHAT)
    store.save({**WHAT, "seed": 4}, content())
    store.save_part(WHAT, 3, content())
    for name in (f".{key}.npz.part", f".{key}.part-3.npz.part", f".{key}.npz.a1_b2c3d.part"):  # of killed writers
        (store.folder / name).write_text("half")
    others = ["notes.npz", f"{key}.npy", f"{key[:-1]}.npz", f"copy-{key}.npz", f"{key}.part-x.npz", f".{key}.part"]
    for name in others:
        (store.folder / name).write_text("a user's")
    store.remove()
    assert sorted(os.listdir(store.folder)) == sorted(others)
    for name in others:
        (store.folder / name).unlink()
    store.save(WHAT, content())
    store.remove()
    assert os.listdir(tmp_path) == []
    store.remove()
    store.save(WHAT, content())  # another run of the same folder has ended and removed it: this one goes on
    assert same(store.load(WHAT), content())


def test_a_full_disk_is_one_line_and_what_was_written_stays(tmp_path, monkeypatch):
    store = Store(tmp_path / "kept")
    store.save(WHAT, content())

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = "cannot write to .*kept: No space left on device; what was finished is kept: .* same command again"
        with pytest.raises(OSError, match=message):
            store.memo({**WHAT, "seed": 4}, content)
    assert same(store.load(WHAT), content()) and os.listdir(store.folder) == [f"{key_of(WHAT)}.npz"]


def test_every_file_of_the_package_decides_the_code_version(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("a = 1\n")
    monkeypatch.setattr(store_module, "_PACKAGE", tmp_path)
    first = code_version.__wrapped__()
    (tmp_path / "notes.txt").write_text("no code")
    assert code_version.__wrapped__() == first
    (tmp_path / "sub" / "a.py").write_text("a = 2\n")
    assert code_version.__wrapped__() != first != code_version()
