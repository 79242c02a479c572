"""Reading MNIST: only the true bytes pass, from a folder, a mirror or the cache."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
import torch

from art_edm import mnist
from art_edm.mnist import load_mnist, to_images

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


class Mirror(BaseHTTPRequestHandler):
    """Paths are /KIND/name.gz; a KIND is a way to fail, or `good`."""

    def do_GET(self):
        _, kind, name = self.path.split("/")
        self.server.asked.append(f"{kind}/{name}")
        blob = gzip.compress(CONTENT[name[:-3]])
        if kind == "missing":
            return self.send_error(404)
        body = {"good": blob, "truncated": blob[:-20], "html": b"<html>sign in</html>",
                "corrupt": gzip.compress(CONTENT[name[:-3]][:-1] + b"!"), "short": blob[:-20]}[kind]
        self.send_response(200)
        self.send_header("Content-Length", str(len(blob) if kind == "short" else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A mirror on this computer, an empty cache, and the checksums of the fake files."""
    monkeypatch.setattr(mnist, "FILES", {name: hashlib.sha256(c).hexdigest() for name, c in CONTENT.items()})
    monkeypatch.setenv("ART_EDM_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Mirror)
    server.asked = []
    server.address = lambda *kinds: [f"http://127.0.0.1:{server.server_port}/{kind}/" for kind in kinds]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


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
def test_the_second_mirror_serves_when_the_first_fails(server, bad):
    assert_true("train", *load_mnist("train", mirrors=server.address(bad, "good")))
    assert [a.split("/")[0] for a in server.asked] == [bad, "good"] * 2


def test_a_good_first_mirror_is_enough(server):
    assert_true("test", *load_mnist("test", mirrors=server.address("good", "missing")))
    assert server.asked == ["good/t10k-images-idx3-ubyte.gz", "good/t10k-labels-idx1-ubyte.gz"]


def test_every_mirror_and_its_failure_is_named(server, tmp_path):
    mirrors = [*server.address("missing", "corrupt"), "http://127.0.0.1:9/"]  # nothing listens on port 9
    with pytest.raises(ConnectionError) as caught:
        load_mnist("train", mirrors=mirrors)
    text = str(caught.value)
    name = "train-images-idx3-ubyte.gz"
    for mirror, why in zip(mirrors, ["HTTPError", "checksum differs", "ConnectionError"]):
        assert f"{mirror}{name}: {why}" in text
    assert "--data" in text and "\n" not in text
    assert not (tmp_path / "cache" / "mnist").exists()  # nothing false is kept


# --- the cache ---------------------------------------------------------------------------------------


def test_a_cached_file_needs_no_network(server, tmp_path):
    load_mnist("train", mirrors=server.address("good"))
    assert len(list((tmp_path / "cache" / "mnist").iterdir())) == 2
    server.asked.clear()
    assert_true("train", *load_mnist("train", mirrors=[]))  # no mirror to ask: a twin without the cache must fail
    assert server.asked == []
    with pytest.raises(ConnectionError):
        load_mnist("test", mirrors=[])


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b"", lambda b: gzip.compress(b"other")])
def test_a_damaged_cache_is_downloaded_again(server, tmp_path, damage):
    load_mnist("train", mirrors=server.address("good"))
    cached = tmp_path / "cache" / "mnist" / "train-images-idx3-ubyte.gz"
    cached.write_bytes(damage(cached.read_bytes()))
    server.asked.clear()
    assert_true("train", *load_mnist("train", mirrors=server.address("good")))
    assert server.asked == ["good/train-images-idx3-ubyte.gz"]  # only that one
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


@pytest.mark.skipif("ART_EDM_MNIST" not in os.environ or not os.path.isdir(os.environ["ART_EDM_MNIST"]),
                    reason="ART_EDM_MNIST does not name a folder with the MNIST files")
def test_the_real_files():
    pixels, labels = load_mnist("test", os.environ["ART_EDM_MNIST"])
    assert pixels.shape == (10000, 28, 28)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert torch.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert float(pixels.double().mean()) / 255 == pytest.approx(0.1325, abs=1e-4)  # the test set's known mean
