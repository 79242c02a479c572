"""Network pickles of a stand-in whose source is listed: loaded without running anything else."""

from __future__ import annotations

import argparse
import collections
import datetime
import io
import json
import pathlib
import pickle
import sys
import zipfile

import numpy as np
import pytest
import torch

from art_edm.pickles import known_sources as upstream_sources
from art_edm.pickles.known_sources import Listed, listed_sources, lock_file, run_source
from art_edm.pickles.network import NetworkPickleError, UnknownSource, load_network_pickle
from tests.support.pickle_stand_ins import SOURCE, EasyDict, classes, dumps, plain_loads, sha256, write_lock
from tests.support.upstream import run_python

X = torch.arange(16.0).reshape(1, 1, 4, 4)


@pytest.fixture
def lock(tmp_path):
    return write_lock(tmp_path / "lock.json", SOURCE)


def save(path, make, **kwargs):
    path.write_bytes(dumps(make, **kwargs))
    return path


def refused(path, match, kind=NetworkPickleError, **kwargs):
    with pytest.raises(kind, match=match) as caught:
        load_network_pickle(path, **kwargs)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("kind", [dict, EasyDict])
def test_the_output_is_that_of_plain_unpickling(tmp_path, lock, protocol, kind):
    path = save(tmp_path / "n.pkl", lambda c: kind(ema=c["Net"](), dataset_kwargs=EasyDict(a=1)), protocol=protocol)
    loaded = load_network_pickle(path, lock=lock)
    expected = plain_loads(path.read_bytes())["ema"]
    assert torch.equal(loaded.net(X, 1), expected.eval()(X, 1)) and loaded.class_name == "Net"
    assert not torch.equal(loaded.net(X, 1), expected.train()(X, 1))  # evaluation mode is not what it was saved in
    assert loaded.sources == {"ours/net.py": {sha256(SOURCE): "commit0"}} and loaded.encoder is None
    assert not any(module.training for module in loaded.net.modules())
    assert not any(parameter.requires_grad for parameter in loaded.net.parameters())
    assert type(loaded.net.root) is np.float64 and loaded.net.sizes == [1, 2]


def test_one_weight_more_or_less_changes_the_output(tmp_path, lock):
    def make(classes):
        net = classes["Net"]()
        net.layers["b"].weight.data[1] += 1e-6
        return {"ema": net}

    nets = [load_network_pickle(save(tmp_path / "n.pkl", m, protocol=4), lock=lock).net
            for m in (make, lambda c: {"ema": c["Net"]()})]
    assert not torch.equal(nets[0](X, 1), nets[1](X, 1))


def test_weights_keep_their_type_and_their_sharing(tmp_path, lock):
    def make(classes):
        net = classes["Net"]()
        net.layers["b"].weight = net.layers["a"].weight
        return {"ema": net.half()}

    net = load_network_pickle(save(tmp_path / "n.pkl", make), lock=lock).net
    assert net.layers["a"].weight is net.layers["b"].weight and net.layers["a"].weight.dtype == torch.float16


def test_only_listed_sources_are_compiled_and_nothing_else_is_imported(tmp_path, lock, monkeypatch):
    other = SOURCE + "# another version\n"
    path = save(tmp_path / "n.pkl", lambda c: {"ema": c["Net"]()}, protocol=2, memo=False)
    loss = dumps(lambda c: c["Net"](), other, protocol=2, memo=False)
    path.write_bytes(path.read_bytes()[:-1] + b"X\x04\x00\x00\x00loss" + loss[2:-1] + b"s.")
    monkeypatch.setattr(upstream_sources, "_RUN", {})
    run, path_before, modules_before = [], list(sys.path), set(sys.modules)

    def spy(source, *args):
        run.append(source)
        return compile(source, *args)

    monkeypatch.setattr(upstream_sources, "compile", spy, raising=False)
    assert load_network_pickle(path, lock=lock).class_name == "Net" and run == [SOURCE]
    assert sys.path == path_before and set(sys.modules) == modules_before
    load_network_pickle(path, lock=lock)
    assert run == [SOURCE]  # once for all networks


def test_an_unlisted_source_is_named_and_not_run(tmp_path, lock):
    other = SOURCE + "\nraise AssertionError('this ran')\n"
    path = tmp_path / "n.pkl"
    with pytest.raises(AssertionError, match="this ran"):
        dumps(lambda c: None, other)
    path.write_bytes(dumps(lambda c: {"ema": c["Net"]()}).replace(SOURCE.encode(), other.encode())
                     .replace(len(SOURCE).to_bytes(4, "little"), len(other).to_bytes(4, "little")))
    for remedy in ("--trust-pickle", "add the hash to third_party/upstream.json"):
        refused(path, f"class Net comes .* {sha256(other)}.*{remedy}", UnknownSource, lock=lock)
    refused(save(tmp_path / "n.pkl", lambda c: {"ema": c["Net"]()}), "class Net comes", UnknownSource)  # the real list


def test_a_single_unlisted_layer_deep_inside_is_enough(tmp_path, lock, monkeypatch):
    other = SOURCE.replace("0.5", "0.25")

    def make(stand_ins):
        net = stand_ins["Net"]()
        net.more[1] = torch.nn.Sequential(classes(other)["Scale"](3.0))
        return {"ema": net}

    monkeypatch.setattr(upstream_sources, "_RUN", {})
    path = save(tmp_path / "n.pkl", make)
    refused(path, f"class Scale comes .* {sha256(other)}", UnknownSource, lock=lock)
    assert upstream_sources._RUN == {}  # not even the listed one was run
    loaded = load_network_pickle(path, lock=write_lock(tmp_path / "both.json", SOURCE, other))
    assert set(loaded.sources["ours/net.py"]) == {sha256(SOURCE), sha256(other)}


def test_run_source_refuses_another_text():
    with pytest.raises(AssertionError):
        run_source(Listed("ours/net.py", sha256(SOURCE), "c"), SOURCE + " ")


@pytest.mark.parametrize("change, match", [
    (lambda net: net.__dict__.update(forward=1), "attribute"),
    (lambda net: net.__dict__.update(__class__=1), "attribute"),
    (lambda net: net._forward_hooks.update({1: 2}), "hook"),
    (lambda net: net._modules.update(a=3), "entry in _modules"),
    (lambda net: net._parameters.update(a=torch.ones(1)), "entry in _parameters"),
    (lambda net: net._buffers.update(a=[1]), "entry in _buffers"),
    (lambda net: net.__dict__.pop("_buffers"), "_buffers"),
    (lambda net: net.__dict__.pop("label_dim"), "without label_dim"),
    (lambda net: net.__dict__.update(img_channels="3"), "without img_channels"),
])
def test_a_state_that_a_network_does_not_have_is_refused(tmp_path, lock, change, match):
    def make(classes):
        net = classes["Net"]()
        change(net)
        return {"ema": net}

    refused(save(tmp_path / "n.pkl", make), match, lock=lock)


@pytest.mark.parametrize("name, match", [
    ("helpe", "does not define"), ("torch", "does not define"), ("np", "does not define"), ("Nope", "does not define"),
    ("0x", "arguments"),
])
def test_a_class_name_that_is_no_class_of_the_source(tmp_path, lock, name, match):
    path = save(tmp_path / "n.pkl", lambda c: {"ema": c["Net"]()}, protocol=2)
    old, new = b"X\x03\x00\x00\x00Net", b"X" + len(name).to_bytes(4, "little") + name.encode()
    assert path.read_bytes().count(old) == 1
    path.write_bytes(path.read_bytes().replace(old, new))
    refused(path, match, lock=lock)


@pytest.mark.parametrize("make", [
    lambda c: {"G_ema": c["Net"]()}, lambda c: c["Net"](), lambda c: [c["Net"]()], lambda c: {"ema": 1}, lambda c: 1,
    lambda c: {"ema": {"a": torch.ones(2)}}, lambda c: {"ema": torch.nn.ModuleList([c["Net"]()])},
])
def test_a_pickle_without_a_network(tmp_path, lock, make):
    refused(save(tmp_path / "n.pkl", make), "without a network in it.*network-snapshot", lock=lock)


def test_ema_must_be_a_whole_network(tmp_path, lock):
    refused(save(tmp_path / "n.pkl", lambda c: {"ema": c["Scale"](1.0)}), "Scale without img_resolution", lock=lock)
    path = save(tmp_path / "n.pkl", lambda c: {"ema": c["OtherEncoder"]()})
    refused(path, "found a OtherEncoder as its network", lock=lock)


def test_encoders_are_made_when_asked_for(tmp_path, lock):
    def load(make, **kwargs):
        path = save(tmp_path / "n.pkl", lambda c: EasyDict(encoder=make(c), ema=c["Net"]()))
        return load_network_pickle(path, lock=lock, **kwargs).encoder

    rgb = load(lambda c: c["StandardRGBEncoder"]())
    assert rgb.class_name == "StandardRGBEncoder" and rgb.state["scale"].tolist() == [2, 3]
    assert rgb.realise().decode(torch.ones(2)).tolist() == [2, 3]
    assert load(lambda c: c["StabilityVAEEncoder"]()).realise().vae_name == "stabilityai/sd-vae-ft-mse"
    for make, match in ((lambda c: c["StabilityVAEEncoder"]("evil/vae"), "another VAE"),
                        (lambda c: c["OtherEncoder"](), "found the encoder OtherEncoder")):
        with pytest.raises(NetworkPickleError, match=match):
            load(make).realise()


def test_cut_at_every_twentieth(tmp_path, lock):
    raw = dumps(lambda c: {"ema": c["Net"]()})
    path = tmp_path / "n.pkl"
    for part in range(20):
        path.write_bytes(raw[:len(raw) * part // 20])
        refused(path, "end of the file|empty file", lock=lock)
    path.write_bytes(raw)
    assert load_network_pickle(path, lock=lock).class_name == "Net"


def test_other_files(tmp_path):
    path = tmp_path / "n.pkl"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    for content, match in ((b"", "empty"), (b"hello, this is text", "damaged|byte"), (b"<html></html>", "web page"),
                           (file.getvalue(), "a training state"), (bytes(1000), "byte 0")):
        path.write_bytes(content)
        refused(path, match)
    torch.save({"net": torch.ones(1)}, path)
    refused(path, "a training state and not a network snapshot; give network-snapshot")
    refused(tmp_path / "none.pkl", "no readable file")


def test_the_lock_file(tmp_path, monkeypatch):
    sources = listed_sources()
    assert lock_file().name == "upstream.json" and len(sources) == 5
    assert sources["7298880db4bf955d2941496cce3a554a970867b3eae4d22276cb1c293c131fa2"].file == (
        "edm2/training/networks_edm2.py")
    for content in ("", "[]", '{"edm": 1}', '{"edm": {"sources": {"a": ["b"]}}}'):
        (tmp_path / "bad.json").write_text(content)
        refused(tmp_path / "n.pkl", "found no list of known sources", lock=tmp_path / "bad.json")
    refused(tmp_path / "n.pkl", "found no list of known sources", lock=tmp_path / "none.json")
    for entry in json.loads(lock_file().read_text()).values():
        assert len(entry["commit"]) == 40 and all(len(c) == 40 for v in entry["sources"].values() for c in v.values())


TRUST = """
import sys
from art_edm.pickles.network import load_network_pickle
try:
    loaded = load_network_pickle(sys.argv[1], trust=True)
except ValueError as error:
    print(error)
else:
    print(loaded.class_name, loaded.net.training, loaded.sources, loaded.encoder.class_name)
"""
CHECKOUT = '''
def _reconstruct_persistent_obj(meta):
    names = {"__name__": "loaded"}
    exec(meta["module_src"], names)
    obj = names[meta["class_name"]].__new__(names[meta["class_name"]])
    getattr(obj, "__setstate__", obj.__dict__.update)(meta["state"])
    return obj

def persistent_class(cls):
    return cls
'''


@pytest.fixture
def checkout(tmp_path):
    """A folder with edm2/, whose modules are stand-ins of upstream's."""
    for name, text in (("torch_utils/persistence.py", CHECKOUT), ("torch_utils/misc.py", ""), ("dnnlib/util.py", "")):
        file = tmp_path / "checkouts" / "edm2" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "checkouts"


@pytest.mark.slow
def test_a_trusted_pickle_is_run_as_upstream_does(tmp_path, checkout):
    raw = dumps(lambda c: {"encoder": c["StandardRGBEncoder"](), "ema": c["Net"]()}, protocol=2)
    path = tmp_path / "n.pkl"
    path.write_bytes(raw)
    for place in ({"path": checkout / "edm2"}, {"env": {"ART_EDM_UPSTREAM": str(checkout)}}):
        printed = run_python(TRUST, path, cwd=tmp_path, **place).stdout
        assert printed == f"Net False {{'Net': {{'{sha256(SOURCE)}': None}}}} StandardRGBEncoder\n"
    without = f"from art_edm.pickles import trusted\ntrusted.find_checkout = lambda: None\n{TRUST}"
    assert "python tools/patch_upstream.py" in run_python(without, path, cwd=tmp_path).stdout


@pytest.mark.slow
def test_a_trusted_pickle_from_a_gpu_comes_to_the_cpu(tmp_path, checkout):
    net = dumps(lambda c: {"ema": c["Net"](), "encoder": c["StandardRGBEncoder"]()}, protocol=4)
    path = tmp_path / "n.pkl"
    assert net.count(b"X\x03\x00\x00\x00cpu") == 5
    moved = net.replace(b"X\x03\x00\x00\x00cpu", b"X\x03\x00\x00\x00mps")  # of the same length
    path.write_bytes(moved)
    printed = run_python(TRUST, path, cwd=tmp_path, env={"ART_EDM_UPSTREAM": str(checkout)}).stdout
    assert printed.startswith("Net False")
    if not torch.backends.mps.is_available():
        with pytest.raises(RuntimeError):
            plain_loads(moved)


@pytest.mark.slow
def test_errors_of_a_trusted_pickle_are_one_line(tmp_path, checkout):
    path = tmp_path / "n.pkl"
    for content, match in ((pickle.dumps({"a": 1}), "without a network"), (b"hello", "could not be unpickled"),
                           (b"cnonexistent\nx\n.", "ModuleNotFoundError: No module named 'nonexistent'")):
        path.write_bytes(content)
        printed = run_python(TRUST, path, cwd=tmp_path, env={"ART_EDM_UPSTREAM": str(checkout)}).stdout
        assert match in printed and printed.count("\n") == 1


# --- networks of forks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("key, value, shown", [
    ("img_resolution", 0, "0"), ("img_resolution", 10**9, r"1e\+09"), ("img_resolution", 10**400, "nan"),
    ("img_channels", 5000, "5000"), ("label_dim", -1, "-1"), ("label_dim", 10**8, r"1e\+08"), ("sigma_data", 0.0, "0"),
    ("sigma_data", "a", "nan"), ("sigma_data", float("nan"), "nan"), ("sigma_data", [1, 2], "nan"),
    ("sigma_min", -1.0, "-1"), ("sigma_max", 0, "0"),
])
def test_absurd_numbers(tmp_path, lock, key, value, shown):
    def make(classes):
        net = classes["Net"]()
        setattr(net, key, value)
        return {"ema": net}

    path = save(tmp_path / "n.pkl", make)
    assert hasattr(plain_loads(path.read_bytes())["ema"], key)  # the twin takes it
    refused(path, f"found {key} {shown}, expected", lock=lock)


def test_an_image_of_too_many_numbers(tmp_path, lock):
    def make(classes):
        net = classes["Net"]()
        net.img_resolution, net.img_channels = 8192, 1024
        return {"ema": net}

    refused(save(tmp_path / "n.pkl", make), r"found 1024 channels of 8192\^2 pixels, expected at most", lock=lock)


def test_usual_numbers_pass(tmp_path, lock):
    def make(classes):
        net = classes["Net"]()
        net.sigma_min, net.sigma_max, net.sigma_data, net.label_dim = 0, float("inf"), 0.5, 60_000
        return {"ema": net}

    assert load_network_pickle(save(tmp_path / "n.pkl", make), lock=lock).net.label_dim == 60_000


def test_harmless_objects_beside_the_network(tmp_path, lock):
    beside = {
        "path": pathlib.PurePosixPath("/a/b"), "args": argparse.Namespace(lr=1.0), "dtype": torch.float16,
        "device": torch.device("cpu"), "size": torch.Size([2]), "now": datetime.datetime(2024, 1, 1),
    }
    path = save(tmp_path / "n.pkl", lambda c: {"ema": c["Net"](), **beside})
    assert load_network_pickle(path, lock=lock).class_name == "Net"

    def within(classes):
        net = classes["Net"]()
        net.args = argparse.Namespace(lr=1.0)
        return {"ema": net}

    refused(save(path, within), "call of argparse.Namespace, which is not plain data.*--trust-pickle", lock=lock)
    refused(save(path, lambda c: {"ema": c["Net"](), "x": collections.Counter("a")}),
            "reference to collections.Counter, .*; nothing was run; if you trust the file, add --trust", lock=lock)


OWN = """
import torch

class Own(torch.nn.Module):
    img_resolution, img_channels, label_dim = 4, 1, 0

    def __init__(self):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, sigma, class_labels=None):
        return x * self.gain
"""
WRAPPED = ("plain", "alone", "AveragedModel", "DataParallel", "compile", "DistributedDataParallel")
WRAP = """
import pickle, sys, torch
from own import Own
net = Own()
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
contents = {
    "plain": {"ema": net}, "alone": net, "AveragedModel": {"ema": torch.optim.swa_utils.AveragedModel(net)},
    "DataParallel": {"ema": torch.nn.DataParallel(net)}, "compile": {"ema": torch.compile(net)},
    "DistributedDataParallel": {"ema": torch.nn.parallel.DistributedDataParallel(net)},
}
for name, content in contents.items():
    with open(f"{name}.pkl", "wb") as file:
        pickle.dump(content, file)
"""
TRUST_ALL = """
import sys
from art_edm.pickles.network import load_network_pickle
for path in sys.argv[1:]:
    try:
        loaded = load_network_pickle(path, trust=True)
    except ValueError as error:
        print(error)
    else:
        print(loaded.class_name, loaded.net.training, loaded.sources)
"""


@pytest.mark.slow
def test_networks_of_ones_own_and_wrapped_ones(tmp_path):
    """Each works with --trust-pickle, or the line says what to do."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "own.py").write_text(OWN)
    here, paths = {"PYTHONPATH": str(tmp_path / "modules")}, [tmp_path / f"{name}.pkl" for name in WRAPPED]
    run_python(WRAP, cwd=tmp_path, env=here)
    for path in paths:
        refused(path, "found a reference to .*; if you trust the file, add --trust-pickle")
    *works, parallel = run_python(TRUST_ALL, *paths, cwd=tmp_path, env=here).stdout.splitlines()
    assert works == ["Own False {}"] * 5 and "save ema.module instead" in parallel
    (absent,) = run_python(TRUST_ALL, paths[0], cwd=tmp_path).stdout.splitlines()
    assert "No module named 'own'" in absent and "on PYTHONPATH" in absent
