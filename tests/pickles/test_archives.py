"""Files of torch.save: the same tensors as torch reads, and nothing that runs or grows."""

from __future__ import annotations

import io
import os
import time
import zipfile
from typing import Tuple

import numpy as np
import pytest
import torch

from art_edm.models.loading import NetworkError, bundled, load_network
from art_edm.pickles.archives import load_tensors
from art_edm.pickles.records import PickleError
from art_edm.runtime.files import save_tensors


class Program(torch.nn.Module):
    """A TorchScript module that writes a file when it is read."""

    def __init__(self) -> None:
        super().__init__()
        self.data = torch.zeros(1)

    @torch.jit.export
    def __getstate__(self) -> Tuple[bool]:
        return (self.training,)

    @torch.jit.export
    def __setstate__(self, state: Tuple[bool]) -> None:
        self.data = torch.from_file("hostile-ran", True, 4)
        self.training = state[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def program(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(Program()), "program.pt")
    return tmp_path / "program.pt"


def refused(path, match):
    with pytest.raises(PickleError, match=match) as caught:
        load_tensors(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def contents():
    torch.manual_seed(0)
    base = torch.randn(4, 6)
    types = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8)
    return {
        "types": [torch.arange(3).to(kind) for kind in types] + [torch.tensor([True, False])],
        "views": {"base": base, "row": base[1], "t": base.t(), "last": base[-1, -1:]}, "empty": torch.zeros(0, 3),
        "module": torch.nn.Linear(3, 2).state_dict(), "parameter": torch.nn.Parameter(torch.ones(2)),
        "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.999)}]},
        "random": torch.get_rng_state(), "number": 3, "text": "é",
        "array": np.arange(3.0),
    }


def equal(a, b):
    if isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(b, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in b)
    if isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return np.array_equal(a, b)


def test_as_torch_reads_it(tmp_path):
    save_tensors(tmp_path / "a.pt", contents())
    read, expected = load_tensors(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=False)
    assert equal(read, expected)
    assert read["views"]["row"].data_ptr() == read["views"]["base"].data_ptr() + 6 * 4  # one storage for both
    expected["views"]["t"][0, 0] += 1
    assert not equal(read, expected)


@pytest.mark.parametrize("name", ["mnist.pt", "lenet.pt"])
def test_the_bundled_networks(name):
    assert equal(load_tensors(bundled(name)), torch.load(bundled(name), weights_only=True))


def test_a_torchscript_program_is_not_run(program):
    refused(program, "found a TorchScript program, expected weights alone; it was not run")
    with pytest.raises(NetworkError, match="TorchScript program"):
        load_network(str(program))
    assert not os.path.exists("hostile-ran")
    torch.jit.load(str(program))  # what torch.load(weights_only=True) did before 2.6
    assert os.path.exists("hostile-ran")


def rewritten(path, change, compression=zipfile.ZIP_STORED):
    """The archive with its parts, {name: bytes}, changed."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)


@pytest.mark.parametrize("change, match", [
    (lambda p: p.update({"a/code/x.py": b""}), "TorchScript"), (lambda p: p.pop("a/data.pkl"), "no data.pkl"),
    (lambda p: p.update({"a/byteorder": b"big"}), "little-endian"), (lambda p: p.pop("a/data/0"), "no whole file"),
    (lambda p: p.update({"a/data/0": b"xx"}), "another length"), (lambda p: p.update({"a/data.pkl": b"x"}), "pickle"),
], ids=["code", "no pickle", "big endian", "no storage", "short storage", "another pickle"])
def test_a_changed_archive(tmp_path, change, match):
    save_tensors(tmp_path / "a.pt", {"a": torch.arange(3.0)})
    rewritten(tmp_path / "a.pt", lambda p: None)
    name = next(iter(zipfile.ZipFile(tmp_path / "a.pt").namelist())).partition("/")[0]
    assert load_tensors(tmp_path / "a.pt")["a"].tolist() == [0, 1, 2]  # written anew but unchanged it is read
    rewritten(tmp_path / "a.pt", lambda p: [p.update({"a" + k[len(name):]: p.pop(k)}) for k in list(p)] and change(p))
    refused(tmp_path / "a.pt", match)


def test_a_compressed_bomb(tmp_path):
    save_tensors(tmp_path / "a.pt", {"a": torch.zeros(5_000_000)})
    rewritten(tmp_path / "a.pt", lambda p: None, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pt").stat().st_size < 100_000
    refused(tmp_path / "a.pt", "compressed or overlapping")
    assert torch.load(tmp_path / "a.pt", weights_only=True)["a"].numel() == 5_000_000  # torch does build it


def test_parts_that_overlap(tmp_path):
    """A hundred storages that lie in one place of the file."""
    save_tensors(tmp_path / "a.pt", [torch.full((1000,), float(i)) for i in range(100)])
    raw = (tmp_path / "a.pt").read_bytes()
    end = raw.rindex(b"PK\x05\x06")
    at = int.from_bytes(raw[end + 16:end + 20], "little")
    directory = raw[at:end]
    (tmp_path / "a.pt").write_bytes(raw[:20_000] + directory + raw[end:end + 16] + (20_000).to_bytes(4, "little")
                                    + raw[end + 20:])
    refused(tmp_path / "a.pt", "compressed or overlapping")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"hello" * 100, bytes(1000)])
def test_no_archive(tmp_path, content):
    (tmp_path / "a.pt").write_bytes(content)
    refused(tmp_path / "a.pt", "found (no whole file of torch.save|an empty file)")


def test_a_config_of_absurd_sizes_takes_no_memory(tmp_path):
    file = io.BytesIO()
    content = load_tensors(bundled("mnist.pt"))
    content["config"]["width"] = 32 * 4096  # its weights would take 70 TB
    torch.save(content, file)
    (tmp_path / "a.pt").write_bytes(file.getvalue())
    start = time.perf_counter()
    with pytest.raises(NetworkError, match="does not fit ScoreUNet: found width = 131072, expected 1 to 1024"):
        load_network(str(tmp_path / "a.pt"))
    assert time.perf_counter() - start < 5
