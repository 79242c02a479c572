"""Reading MNIST: only the true bytes pass, from a folder, a mirror or the cache."""

from __future__ import annotations

import gzip
import hashlib
import struct

import numpy as np
import pytest
import torch

from art_edm.metrics import mnist
from art_edm.metrics.mnist import load_mnist, to_images
from tests.support.loopback import Loopback, isolate, status, whole

SIZES = {"train": 5, "t10k": 3}


def fake_files():
    """The four files of a tiny data set: name -> content."""
    rng, content = np.random.default_rng(0), {}
    for prefix, n in SIZES.items():
        pixels, labels = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        content[f"{prefix}-images-idx3-ubyte"] = struct.pack(">4i", 2051, n, 28, 28) + pixels.tobytes()
        content[f"{prefix}-labels-idx1-ubyte"] = struct.pack(">2i", 2049, n) + labels.tobytes()
    return content


CONTENT = fake_files()


def answers(content):
    """Kinds of mirrors: `good`, or a way to fail -> their answer for a file."""
    blob = gzip.compress(content)
    return {"good": whole(blob), "missing": status(404), "truncated": whole(blob[:-20]), "short": whole(blob, cut=20),
            "html": whole(b"<html>sign in</html>"), "corrupt": whole(gzip.compress(content[:-1] + b"!"))}


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Mirrors on this computer, an empty cache, and the checksums of the fake files."""
    monkeypatch.setattr(mnist, "FILES", {name: hashlib.sha256(c).hexdigest() for name, c in CONTENT.items()})
    isolate(monkeypatch, tmp_path / "cache")
    with Loopback() as server:
        for name, content in CONTENT.items():
            for kind, answer in answers(content).items():
                server.on(f"/{kind}/{name}.gz", answer)
        yield server


def mirrors(server, *kinds):
    return [server.url(f"/{kind}/") for kind in kinds]


def asked(server):
    return [request.path[1:] for request in server.asked]


def kept(tmp_path):
    """Names of the finished files in the cache."""
    return sorted(path.name for path in (tmp_path / "cache" / "mnist").glob("*.gz"))


@pytest.fixture
def folder(tmp_path, server):
    folder = tmp_path / "data"
    folder.mkdir()
    for name, content in CONTENT.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
    return folder


def assert_true(split, pixels, labels):
    """The very bytes of the fake files."""
    prefix = {"train": "train", "test": "t10k"}[split]
    n = SIZES[prefix]
    assert pixels.shape == (n, 28, 28) and pixels.dtype == torch.uint8
    assert pixels.numpy().tobytes() == CONTENT[f"{prefix}-images-idx3-ubyte"][16:]
    assert labels.dtype == torch.int64 and labels.shape == (n,)
    assert labels.tolist() == list(CONTENT[f"{prefix}-labels-idx1-ubyte"][8:])


# --- mirrors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["missing", "truncated", "corrupt", "html", "short"])
def test_the_second_mirror_serves_when_the_first_fails(server, tmp_path, bad):
    assert_true("train", *load_mnist("train", mirrors=mirrors(server, bad, "good")))
    assert [a.split("/")[0] for a in asked(server)] == [bad, "good"] * 2  # the next mirror is the next attempt
    assert kept(tmp_path) == ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]


def test_a_good_first_mirror_is_enough(server):
    assert_true("test", *load_mnist("test", mirrors=mirrors(server, "good", "missing")))
    assert asked(server) == ["good/t10k-images-idx3-ubyte.gz", "good/t10k-labels-idx1-ubyte.gz"]


def test_every_mirror_and_its_failure_is_named(server, tmp_path):
    tried = [*mirrors(server, "missing", "corrupt", "html"), "http://127.0.0.1:9/"]  # nobody listens there
    with pytest.raises(ConnectionError) as caught:
        load_mnist("train", mirrors=tried)
    text, name = str(caught.value), "train-images-idx3-ubyte.gz"
    reasons = ["the server answered 404 Not Found", "checksum differs",
               "the address answered with a web page, not a file", "no connection"]
    for mirror, why in zip(tried, reasons):
        assert f"{mirror}{name}: {why}" in text
    assert text.endswith("put the files in a folder and give --data") and "\n" not in text
    assert kept(tmp_path) == []  # nothing false is kept


# --- the cache ---------------------------------------------------------------------------------------


def test_a_cached_file_needs_no_network(server, tmp_path):
    load_mnist("train", mirrors=mirrors(server, "good"))
    server.asked.clear()
    nowhere = ["http://127.0.0.1:9/"]
    assert_true("train", *load_mnist("train", mirrors=nowhere))
    assert server.asked == []
    with pytest.raises(ConnectionError):  # the other split is not in the cache
        load_mnist("test", mirrors=nowhere)


@pytest.mark.parametrize("record", [True, False])
@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: gzip.compress(b"other")])
def test_a_damaged_cache_is_downloaded_again(server, tmp_path, damage, record):
    load_mnist("train", mirrors=mirrors(server, "good"))
    cached = tmp_path / "cache" / "mnist" / "train-images-idx3-ubyte.gz"
    cached.write_bytes(damage(cached.read_bytes()))
    if not record:  # as an earlier version of this package left it
        cached.with_name(cached.name + ".json").unlink()
    server.asked.clear()
    assert_true("train", *load_mnist("train", mirrors=mirrors(server, "good")))
    assert asked(server) == ["good/train-images-idx3-ubyte.gz"]  # only that one
    assert hashlib.sha256(gzip.decompress(cached.read_bytes())).hexdigest() == mnist.FILES[cached.stem]


# --- a folder ----------------------------------------------------------------------------------------


def test_a_folder_of_compressed_or_plain_files(server, folder):
    for split in ("train", "test"):
        assert_true(split, *load_mnist(split, str(folder)))
    for path in list(folder.glob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    assert_true("train", *load_mnist("train", str(folder)))
    assert server.asked == []


def test_a_missing_file_is_named(folder):
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"data has no train-labels-idx1-ubyte\.gz; give the folder"):
        load_mnist("train", str(folder))
    assert_true("test", *load_mnist("test", str(folder)))


def test_a_missing_folder_is_named(folder):
    with pytest.raises(ValueError, match=r"nowhere has no train-images-idx3-ubyte\.gz"):
        load_mnist("train", str(folder / "nowhere"))


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"not gzip", lambda b: gzip.compress(b"other")])
def test_a_damaged_file_is_named(folder, damage):
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte\.gz is damaged or not MNIST: .* fetch it again"):
        load_mnist("test", str(folder))


# --- values ------------------------------------------------------------------------------------------


def test_images_are_in_the_scale_of_edm():
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(3, 1, 1)
    images = to_images(pixels)
    assert images.shape == (3, 1, 1, 1) and images.dtype == torch.float32
    assert images.flatten().tolist() == pytest.approx([-1, -0.6, 1], abs=1e-7)


def test_the_real_files(mnist_folder):
    pixels, labels = load_mnist("test", mnist_folder)
    assert pixels.shape == (10000, 28, 28)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert torch.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(pixels.double().mean()) / 255 == pytest.approx(0.1325, abs=1e-4)  # the test set's known mean
