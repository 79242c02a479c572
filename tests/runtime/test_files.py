"""Files are whole or absent, destinations are checked before the work."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch

from art_edm.runtime.files import (
    HEAD_BYTES,
    atomic_write,
    cache_dir,
    check_destination,
    file_kind,
    sha256_of,
    write_json,
)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def failing(error):
    def write(file):
        file.write(b"half of the new")
        file.flush()
        raise error

    return write


def in_place(path, write):
    """What atomic_write must not be: the failing twin."""
    with open(path, "wb") as file:
        write(file)


def test_atomic_write_replaces(tmp_path):
    path = tmp_path / "a.bin"
    for content in (b"first", b"second, longer", b""):
        atomic_write(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("x"),
                                   KeyboardInterrupt()], ids=["disk full", "error", "Ctrl-C"])
def test_a_failure_keeps_the_old_file_and_leaves_no_part(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        atomic_write(path, failing(error))
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]
    with pytest.raises(type(error)):
        in_place(path, failing(error))
    assert path.read_bytes() != b"old"


def test_a_failure_to_rename_leaves_no_part(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        atomic_write(tmp_path / "folder", lambda file: file.write(b"x"))
    assert names(tmp_path) == ["folder"]


def test_the_new_file_is_complete_before_it_appears(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    seen = []

    def write(file):
        file.write(b"new")
        file.flush()
        seen.append(path.read_bytes())

    atomic_write(path, write)
    assert seen == [b"old"] and path.read_bytes() == b"new"


@pytest.mark.skipif(os.name != "posix", reason="file modes are POSIX's")
def test_the_mode_is_an_ordinary_files(tmp_path):
    mask = os.umask(0o027)
    try:
        atomic_write(tmp_path / "a", lambda file: file.write(b"x"))
        assert os.umask(0o027) == 0o027  # looking at the mask does not change it
    finally:
        os.umask(mask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_check_destination_accepts_and_leaves_nothing(tmp_path):
    assert check_destination(tmp_path / "new.npy") == tmp_path / "new.npy"
    (tmp_path / "old.npy").write_bytes(b"old")
    assert check_destination(tmp_path / "old.npy").read_bytes() == b"old"
    assert names(tmp_path) == ["old.npy"]


def test_check_destination_says_what_stands_in_the_way(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*nowhere; create it or choose another --out"):
        check_destination(tmp_path / "nowhere" / "a.npy")
    with pytest.raises(ValueError, match="it is a folder; give a file name"):
        check_destination(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="there is no folder"):
        check_destination(tmp_path / "file" / "a.npy")


def test_check_destination_of_a_folder_that_takes_no_file(tmp_path, monkeypatch):
    def refuse(**kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.mkstemp", refuse)  # a mode would not stop the superuser
    with pytest.raises(ValueError, match="a.npy: Permission denied; choose another --out"):
        check_destination(tmp_path / "a.npy")


def test_write_json(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"fid": 1.5, "steps": [1, 2]})
    assert json.loads(path.read_text()) == {"fid": 1.5, "steps": [1, 2]} and path.read_text().endswith("}\n")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_write_json_refuses_what_json_has_not(tmp_path, bad):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(ValueError):
        write_json(path, {"fid": bad})
    assert path.read_text() == "old" and names(tmp_path) == ["a.json"]
    assert json.dumps({"fid": bad}) in ('{"fid": NaN}', '{"fid": Infinity}')  # the default would write it


def test_sha256_of(tmp_path):
    content = bytes(range(256)) * 10000  # more than one block
    (tmp_path / "a").write_bytes(content)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest()


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("ART_EDM_CACHE", str(tmp_path / "c"))
    assert cache_dir() == tmp_path / "c" and cache_dir().is_dir()
    monkeypatch.delenv("ART_EDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "art_edm"


def in_memory(write):
    """The bytes that a program of another package writes."""
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


KINDS = {  # made by the programs that make such files
    "npy": (in_memory(lambda file: np.save(file, np.zeros(3))), "a .npy array"),
    "npz": (in_memory(lambda file: np.savez(file, a=np.zeros(3))), "a zip archive"),
    "pt": (in_memory(lambda file: torch.save({"a": torch.zeros(2)}, file)), "a zip archive"),
    "empty zip": (in_memory(lambda file: zipfile.ZipFile(file, "w").close()), "an empty zip archive"),
    "gzip": (gzip.compress(b"80, 5, 0"), "a gzip file"),
    "pickle": (pickle.dumps([80.0, 0.0]), "a pickle"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a Git LFS pointer"),
    "safetensors": (struct.pack("<Q", 16) + b'{"a":{"shape":[]}', "a .safetensors file"),
    "page": (b"\n <!DOCTYPE html><html>", "a web page"), "page without a type": (b"<html lang=en>", "a web page"),
    "json": (b'\xef\xbb\xbf {"sigmas": [80, 0]}', "a JSON text"), "list": (b"[80, 0]", "a JSON text"),
    "text": (b"80, 5, 0", "a file of unknown kind"), "nothing": (b"", "an empty file"),
}


@pytest.mark.parametrize(("data", "kind"), KINDS.values(), ids=KINDS)
def test_file_kind_by_first_bytes(tmp_path, data, kind):
    (tmp_path / "grid.npy").write_bytes(data)  # the name says nothing
    assert file_kind(tmp_path / "grid.npy").startswith(kind) and file_kind(data[:HEAD_BYTES]).startswith(kind)
    others = {name for _, name in KINDS.values() if name != kind}
    assert not any(file_kind(data).startswith(other) for other in others)


def test_file_kind_of_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        file_kind(tmp_path / "absent")
