"""From a name or a file to a network: nothing foreign is used, nothing in a file is executed."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pickle
import re
import shutil
import sys

import pytest
import torch

from art_edm.models import loading
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.lenet import LeNet
from art_edm.models.loading import NetworkError, load_classifier, load_network, save_classifier, save_network
from art_edm.models.resnet import ResNet
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.files import sha256_of
from tests.support.loopback import Loopback, isolate, whole

SMALL = dict(img_resolution=8, img_channels=1, sigma_data=0.4, data_mean=-0.2, width=8, deep_width=12, emb=8)


def small_net(seed=0):
    torch.manual_seed(seed)
    net = ScoreUNet(**SMALL)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "mine.pt"
    save_network(path, small_net())
    return path


def refused(path, *parts):
    """One line that names the file."""
    with pytest.raises(NetworkError) as caught:
        load_network(str(path))
    text = str(caught.value)
    assert "\n" not in text and str(path) in text
    for part in parts:
        assert part in text


# --- names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, found", [
    ("mnits", "unknown network 'mnits'"), ("", "unknown network ''"), ("nowhere.pt", "no file nowhere.pt"),
    (os.path.join("runs", "x"), f"no file {os.path.join('runs', 'x')}"),
])
def test_unknown_names(name, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NetworkError) as caught:
        load_network(name)
    expected = ("mnist, cifar10, oned, gaussian:S, the path or address of a network pickle or weight file, or "
                "package.module:factory")
    assert str(caught.value) == f"{found}; expected {expected}"


def test_oned():
    network = load_network("oned")
    assert (network.name, network.sha256) == ("oned", None)


@pytest.mark.parametrize("text, std", [("0.5", 0.5), ("2", 2.0), ("1e-3", 1e-3)])
def test_gaussian(text, std):
    network = load_network(f"gaussian:{text}")
    assert network.name == f"gaussian{text}" and network.sha256 is None
    assert isinstance(network.denoiser, GaussianDenoiser)
    x = torch.randn(2, *network.denoiser.img_shape, dtype=torch.float64)
    expected = std**2 / (std**2 + 9) * x  # E[y | x] of N(0, std^2) data at sigma = 3
    assert torch.allclose(network.denoiser(x, 3.0), expected, rtol=1e-12)
    assert not torch.allclose(network.denoiser(x, 3.0), std / (std + 3) * x, rtol=1e-3)


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "half", "1,5"])
def test_gaussian_refuses(text):
    with pytest.raises(NetworkError, match=rf"standard deviation '{text}'; expected a positive number, e\.g\."):
        load_network(f"gaussian:{text}")


@pytest.mark.parametrize("name, shape, judge", [("mnist", (1, 28, 28), LeNet), ("cifar10", (3, 32, 32), ResNet)])
def test_bundled_networks_are_those_of_their_cards(name, shape, judge):
    network, card = load_network(name), json.loads(loading.bundled(f"{name}.json").read_text())
    assert network.name == name and network.denoiser.img_shape == shape == judge.img_shape
    assert card["sha256"] == {file: sha256_of(loading.bundled(file)) for file in card["sha256"]}
    assert set(card["sha256"]) == {f"{name}.pt", f"{judge.__name__.lower()}.pt"}
    assert network.sha256 == card["sha256"][f"{name}.pt"]
    assert card["parameters"] == sum(p.numel() for p in network.denoiser.parameters())
    assert network.denoiser.sigma_data == pytest.approx(card["sigma_data"])


def test_a_bundled_name_is_no_other_file(path, tmp_path, monkeypatch):
    """Nor is a file of that name in the current folder the bundled network."""
    (tmp_path / "cifar10").write_bytes(b"text")
    monkeypatch.chdir(tmp_path)
    assert load_network("cifar10").sha256 == sha256_of(loading.bundled("cifar10.pt"))
    with pytest.raises(ValueError, match="cifar10: found a damaged instruction"):
        load_network(os.path.join(".", "cifar10"))


# --- round trip --------------------------------------------------------------------------------------


def test_round_trip_is_the_half_precision_weights(path):
    network = load_network(str(path))
    assert network.name == "mine" and network.sha256 == sha256_of(path)
    net = network.denoiser
    assert net.config == SMALL and not net.training
    changed = 0
    for (name, read), (_, written) in zip(net.state_dict().items(), small_net().state_dict().items()):
        assert read.dtype == torch.float32 and torch.equal(read, written.half().float()), name
        changed += int(not torch.equal(read, written))
    assert changed > 10  # the weights were not representable: a twin in full precision would differ
    assert not any(p.requires_grad for p in net.parameters())


def test_what_is_read_denoises_as_what_was_written(path):
    rounded = small_net()
    rounded.load_state_dict({k: v.half().float() for k, v in rounded.state_dict().items()})
    x, sigma = torch.randn(3, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0])
    read = load_network(str(path)).denoiser
    assert torch.allclose(read(x, sigma), rounded(x, sigma), atol=1e-6)
    other = ScoreUNet(**{**SMALL, "data_mean": 0.0}).eval()
    other.load_state_dict(rounded.state_dict())
    assert not torch.allclose(read(x, sigma), other(x, sigma), atol=1e-3)  # the configuration matters too


@pytest.mark.parametrize("kind, shape", [(LeNet, (1, 28, 28)), (ResNet, (3, 32, 32))])
def test_classifier_round_trip(tmp_path, kind, shape):
    torch.manual_seed(0)
    net, images, path = kind(), torch.randn(4, *shape), tmp_path / "a.pt"
    net(images)  # moves the running means of a ResNet
    save_classifier(path, net.eval())
    read = load_classifier(kind, path)
    assert all(torch.equal(a, b.half().float()) for a, b in zip(read.parameters(), net.parameters()))
    difference = (read(images) - net(images)).abs().max()
    assert 0 < difference < 0.1 * (kind().eval()(images) - net(images)).abs().max()
    assert net.features(images).shape == (4, kind().num_features)
    with pytest.raises(NetworkError, match=f"holds 'art_edm.{kind.__name__.lower()}/1', expected 'art_edm.score/1'"):
        load_network(str(path))


# --- foreign files -----------------------------------------------------------------------------------


def test_an_empty_file(path):
    path.write_bytes(b"")
    refused(path, "is empty", "written by train_mnist.py")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_file(path, share):
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, "is truncated or not a weight file")


@pytest.mark.parametrize("content", [b"hello, world\n" * 50, b"\x89PNG\r\n\x1a\n" + bytes(100), bytes(1000)])
def test_another_kind_of_file(path, content):
    path.write_bytes(content)
    refused(path, "is truncated or not a weight file")


@pytest.mark.parametrize("content, found", [
    ({"weight": torch.zeros(3)}, "None"), (torch.zeros(3), "'Tensor'"), ([1, 2], "'list'"),
    ({"format": "art_edm.score/9"}, "'art_edm.score/9'"),
])
def test_a_torch_file_of_something_else(path, content, found):
    torch.save(content, path)
    refused(path, f"holds {found}, expected 'art_edm.score/1'")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))],
                         ids=["torch file", "plain pickle"])
def test_code_in_a_file_is_not_executed(path, tmp_path, write):
    marker = tmp_path / "executed"
    write({"format": "art_edm.score/1", "config": Malicious(marker)}, path)
    with pytest.raises(ValueError, match="is truncated or not a weight file.*posix.mkdir|reference to posix.mkdir"):
        load_network(str(path))
    assert not marker.exists()
    if write is torch.save:  # the twin: the file does carry code
        torch.load(path, weights_only=False)
        assert marker.is_dir()


@pytest.mark.parametrize("change, reason", [
    (lambda c: c["config"].update(width=16), "size mismatch|Error"), (lambda c: c["config"].update(depth=3), "depth"),
    (lambda c: c.pop("config"), "config"), (lambda c: c.pop("state"), "state"),
    (lambda c: c["state"].popitem(), "Error"), (lambda c: c.update(state=[1]), "list"),
    (lambda c: c["state"].update({"conv_in.bias": 3}), "int"),
])
def test_weights_that_do_not_fit(path, change, reason):
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    refused(path, "does not fit ScoreUNet", "train it again")
    with pytest.raises(NetworkError) as caught:
        load_network(str(path))
    assert re.search(reason, str(caught.value))


# --- recognised by first bytes; folders; ~ ------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pkl", ".pt", ""])
@pytest.mark.parametrize("content, found", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    (b"\x1f\x8b" + bytes(50), "a gzip file"),
    (b"\x93NUMPY" + bytes(50), "a .npy array"), (b"<!DOCTYPE html><html>", "a web page"), (b'{"a": 1}', "a JSON text"),
    ((2).to_bytes(8, "little") + b'{"a":{}}', "a .safetensors file"),
])
def test_the_kind_of_a_foreign_file_is_named(tmp_path, suffix, content, found):
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"net{suffix}.*found {found}|truncated.*found {found}") as caught:
        load_network(str(path))
    assert "\n" not in str(caught.value)


def test_a_pickle_named_as_a_weight_file_is_read_as_a_pickle(tmp_path):
    (tmp_path / "net.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="a pickle without a network"):
        load_network(str(tmp_path / "net.pt"))


def test_a_folder(tmp_path, path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(NetworkError, match=r"the folder .*runs without network pickles \(\*.pkl\); expected mnist"):
        load_network(str(tmp_path / "runs"))
    for number in range(5):
        (tmp_path / "runs" / f"network-snapshot-{number}.pkl").touch()
    with pytest.raises(NetworkError, match="the folder .*runs with network-snapshot-0.pkl, .*-2.pkl, ...; give one"):
        load_network(str(tmp_path / "runs"))


def test_home(tmp_path, path, monkeypatch):
    monkeypatch.setenv("HOME", str(path.parent))
    assert load_network(f"~/{path.name}").sha256 == sha256_of(path)


# --- package.module:factory ---------------------------------------------------------------------------

FACTORY = """
import torch
from art_edm.models.analytic import GaussianDenoiser
ran = True
def make(): return GaussianDenoiser(0.25, 1.0, (1, 2, 2))
def plain(): return torch.nn.Linear(1, 1)
def fails(): raise KeyError("no weights\\nhere")
value = 3
"""


def test_a_factory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_factory.py").write_text(FACTORY)
    network = load_network("own_factory:make")
    assert network.name == "make" and network.details == {"factory": "own_factory:make"}
    x = torch.ones(1, 1, 2, 2, dtype=torch.float64)
    assert torch.equal(network.denoiser(x, 1.0), GaussianDenoiser(0.25, 1.0, (1, 2, 2))(x, 1.0))
    sys.modules.pop("own_factory")
    (tmp_path / "own_factory.py").write_text(FACTORY.replace("0.25", "0.5"))
    shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
    assert load_network("own_factory:make").identity != network.identity  # other weights are another network
    for name, match in (("plain", "returned a Linear, expected an art_edm.models.denoiser.Denoiser; .*NetworkDenoiser"),
                        ("fails", "could not be called .KeyError: .no weights.*here"), ("value", "TypeError"),
                        ("absent", "AttributeError")):
        with pytest.raises(NetworkError, match=match) as caught:
            load_network(f"own_factory:{name}")
        assert "\n" not in str(caught.value)
    with pytest.raises(NetworkError, match="No module named 'own_absent'.*on PYTHONPATH"):
        load_network("own_absent:make")
    with pytest.raises(NetworkError, match="takes no --gnet"):
        load_network("own_factory:make", class_idx=1)
    assert str(tmp_path) not in sys.path
    sys.modules.pop("own_factory")


OWN_CODE = """
from art_edm.models.denoiser import Denoiser
class Own(Denoiser):
    def denoise(self, x, sigma, labels): return 0.5 * x
"""


@pytest.mark.parametrize("where", ["own_factory", "own_classes"])
def test_a_factory_whose_code_changes_is_another_network(where, tmp_path, monkeypatch):
    """The same weights, here none, with other code: what the store has of the old one must not be found again."""
    monkeypatch.chdir(tmp_path)

    def identity(code):
        for name in ("own_factory", "own_classes"):
            sys.modules.pop(name, None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        (tmp_path / f"{where}.py").write_text(code)
        if where == "own_classes":
            (tmp_path / "own_factory.py").write_text("from own_classes import Own\n")
        with open(tmp_path / "own_factory.py", "a") as file:
            file.write("def make(): return Own(1, 2)\n")
        return load_network("own_factory:make").identity

    first = identity(OWN_CODE)
    assert identity(OWN_CODE) == first
    assert identity(OWN_CODE.replace("0.5", "0.6")) != first


PLAIN = """
from art_edm.models.denoiser import Denoiser
class Own(Denoiser):
    def denoise(self, x, sigma, labels):
        {inside}
        return shrink(x)
def make(): return Own(1, 2)
"""


@pytest.mark.parametrize("top, inside, file", [
    ("from own_helper import shrink", "", "own_helper.py"), ("import own_helper; shrink = own_helper.shrink", "", None),
    ("", "from own_helper import shrink", "own_helper.py"), ("from own_far import shrink", "", "own_helper.py"),
    ("from own_package.inner import shrink", "", "own_package/inner.py"),
])
def test_a_plain_function_of_another_module_is_a_part_of_the_network(top, inside, file, tmp_path, monkeypatch):
    """Functions have no class that names their module: imported at the top, in a function, or from a third module."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").touch()
    (tmp_path / "own_far.py").write_text("from own_helper import shrink\n")
    (tmp_path / "own_beside.py").write_text("value = 1\n")
    (tmp_path / "own_factory.py").write_text(top + PLAIN.format(inside=inside))

    def identity(factor):
        for name in [name for name in sys.modules if name.startswith("own_")]:
            sys.modules.pop(name)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        (tmp_path / (file or "own_helper.py")).write_text(f"def shrink(x): return {factor} * x\n")
        importlib.invalidate_caches()
        network = load_network("own_factory:make")
        return network.identity, float(network.denoiser(torch.ones(1, 1, 2, 2), 1.0)[0, 0, 0, 0])

    first = identity(0.5)
    (tmp_path / "own_beside.py").write_text("value = 2\n")  # nothing imports it
    assert identity(0.5) == first and first[1] == 0.5
    other = identity(0.25)
    assert other[0] != first[0] and other[1] == 0.25


# --- addresses ---------------------------------------------------------------------------------------


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """A server, and an empty folder where upstream's scripts would keep downloads."""
    isolate(monkeypatch, tmp_path / "cache")
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "dnnlib"))
    (tmp_path / "dnnlib" / "downloads").mkdir(parents=True)
    with Loopback() as server:
        yield server, tmp_path / "dnnlib" / "downloads"


def test_what_upstream_has_downloaded_is_not_downloaded_again(downloads, tmp_path):
    server, theirs = downloads
    url = server.on("/net.pkl", whole(pickle.dumps([1])))
    digest, hostile = hashlib.md5(url.encode()).hexdigest(), f"cos\nsystem\n(S'touch {tmp_path}/ran'\ntR."
    (theirs / f"tmp_1_{digest}_net.pkl").write_bytes(b"half of it")
    copy = theirs / f"{digest}_net.pkl"
    copy.write_bytes(b"\x80\x04" + hostile.encode())
    with pytest.raises(ValueError, match=re.escape(str(copy))):
        load_network(url)  # read, by the reader that runs nothing
    assert server.asked == [] and not (tmp_path / "ran").exists() and loading.local_copy(url) is None


@pytest.mark.parametrize("names", [[], ["{}_a.pkl", "{}_b.pkl"], ["tmp_1_{}_a.pkl"], ["{}.pkl"]])
def test_what_upstream_would_not_take_is_downloaded(downloads, names):
    server, theirs = downloads
    url = server.on("/net.pkl", whole(pickle.dumps([1])))
    for name in names:
        (theirs / name.format(hashlib.md5(url.encode()).hexdigest())).write_bytes(b"\x80\x04].")
    with pytest.raises(ValueError):
        load_network(url)
    copy = loading.local_copy(url)
    assert len(server.asked) == 1 and copy.read_bytes() == pickle.dumps([1]) and theirs not in copy.parents


def test_a_page_in_upstreams_cache_is_downloaded_anew(downloads, path):
    server, theirs = downloads
    url = server.on("/mine.pt", whole(path.read_bytes()))
    (theirs / (hashlib.md5(url.encode()).hexdigest() + "_mine.pt")).write_bytes(b"<html>Sign in</html>")
    assert load_network(url).sha256 == sha256_of(path) and len(server.asked) == 1
    assert loading.local_copy(url) is None is loading.local_copy("mnist")  # no pickle: upstream's script reads no other
