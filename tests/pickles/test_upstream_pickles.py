"""Pickles written by NVlabs' own code: loaded here bit for bit as by its own unpickling, and only listed code is run.

Needs the checkouts of EDM and EDM2 (see `upstream`); skipped without them.
"""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from art_edm.pickles.known_sources import lock_file
from art_edm.pickles.network import UnknownSource, load_network_pickle
from tests.support.upstream import export, run_python, upstream

EDM, EDM2 = (json.loads(lock_file().read_text())[name] for name in ("edm", "edm2"))
EDM_VERSIONS = list(EDM["sources"]["training/networks.py"].values())
ENCODERS = list(EDM2["sources"]["training/encoders.py"].values())

# Run in upstream's tree. Weights that start at zero would hide a wrong network, so all are drawn.
COMMON = """
import pickle, sys, numpy as np, torch, dnnlib

def randomise(net):
    generator = torch.Generator().manual_seed(1)
    for tensor in [*net.parameters(), *net.buffers()]:
        if tensor.is_floating_point() and tensor.ndim != 1 or isinstance(tensor, torch.nn.Parameter):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + (tensor.ndim < 2) * 0.7)
    return net.eval().requires_grad_(False)

def inputs(net, batch=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, net.img_channels, net.img_resolution, net.img_resolution, generator=generator)
    labels = torch.eye(net.label_dim)[:batch] if net.label_dim else None
    return x, torch.tensor([0.05, 1.0, 60.0]).reshape(-1, 1, 1, 1), labels

def save(folder, name, content, protocol):
    path = f"{folder}/{name}-{protocol}.pkl"
    with open(path, "wb") as file:
        pickle.dump(content, file, protocol)
    with open(path, "rb") as file:
        net = pickle.load(file)["ema"].eval()  # as upstream loads it
    with torch.no_grad():
        torch.save(dict(inputs=inputs(net), output=net(*inputs(net)), forced=net(*inputs(net), force_fp32=True)),
                   f"{folder}/{name}.pt")
"""

MAKE_EDM = COMMON + """
from training import networks
from training.augment import AugmentPipe
from training.loss import EDMLoss
small = dict(img_resolution=8, img_channels=3, model_channels=16, channel_mult=[1, 2], num_blocks=1,
             attn_resolutions=[4])
song = dict(small, model_type="SongUNet", channel_mult_emb=2)
ncsn = dict(song, embedding_type="fourier", encoder_type="residual", decoder_type="standard", channel_mult_noise=2,
            resample_filter=[1, 3, 3, 1])
skip = dict(song, encoder_type="skip", decoder_type="skip", resample_filter=[1, 3, 3, 1])
adm = dict(small, model_type="DhariwalUNet", label_dim=5)
for name, cls, kwargs in [
    ("edm-ddpmpp", "EDMPrecond", dict(song, label_dim=5, augment_dim=9)), ("edm-ncsnpp", "EDMPrecond", ncsn),
    ("edm-skip", "EDMPrecond", skip), ("edm-adm", "EDMPrecond", adm), ("vp", "VPPrecond", song),
    ("vp-adm", "VPPrecond", adm), ("ve", "VEPrecond", ncsn), ("ve-adm", "VEPrecond", adm),
    ("iddpm", "iDDPMPrecond", adm), ("iddpm-song", "iDDPMPrecond", dict(song, label_dim=5)),
    ("edm-fp16", "EDMPrecond", dict(song, use_fp16=True)),
]:
    torch.manual_seed(0)
    net = randomise(getattr(networks, cls)(**kwargs))
    content = dict(ema=net, loss_fn=EDMLoss(), augment_pipe=AugmentPipe(p=0.12, xflip=1e8, scale=1),
                   dataset_kwargs=dnnlib.EasyDict(path="a.zip", xflip=False))
    for protocol in (2, 4, 5):
        save(sys.argv[1], name, content if protocol != 4 else dict(ema=net), protocol)
"""
EDM_NAMES = ["edm-ddpmpp", "edm-ncsnpp", "edm-skip", "edm-adm", "vp", "vp-adm", "ve", "ve-adm", "iddpm", "iddpm-song",
             "edm-fp16"]

pytestmark = pytest.mark.upstream

MAKE_EDM2 = COMMON + """
import types
sys.modules["psutil"] = types.ModuleType("psutil")  # imported by the training loop, and not needed here
from training import encoders, networks_edm2
from training.training_loop import EDM2Loss
small = dict(img_resolution=8, img_channels=4, model_channels=16, channel_mult=[1, 2], num_blocks=1,
             attn_resolutions=[4])
for name, encoder, label_dim, dtype in [
    ("rgb", encoders.StandardRGBEncoder(), 0, torch.float32),
    ("vae", encoders.StabilityVAEEncoder(vae_name="stabilityai/sd-vae-ft-mse"), 5, torch.float16),
]:
    torch.manual_seed(0)
    net = networks_edm2.Precond(**small, label_dim=label_dim, use_fp16=True)
    net = randomise(net).to(dtype)
    content = dnnlib.EasyDict(encoder=encoder, dataset_kwargs=dnnlib.EasyDict(a=1), loss_fn=EDM2Loss())
    content.ema = net
    for protocol in (2, 4, 5):
        save(sys.argv[1], name, content, protocol)
        torch.save(encoder.encode_latents(torch.arange(64.0).reshape(1, 4, 4, 4) * 2) if name == "rgb" else
                   [torch.from_numpy(item) for item in (encoder.scale, encoder.bias)],
                   f"{sys.argv[1]}/{name}-encoder.pt")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(repository, commit) is the folder of the pickles by one version of its code, and of its tree."""
    folders = {}

    def make(name, commit):
        if commit not in folders:
            folder = tmp_path_factory.mktemp(name)
            tree = export(name, commit, folder / "tree")
            run_python(MAKE_EDM if name == "edm" else MAKE_EDM2, folder, path=tree)
            folders[commit] = folder
        return folders[commit]

    return make


def short(commit):
    return commit[:7]


def check(path, reference):
    """The network loaded from `path` gives what upstream's own unpickling gave; returns it."""
    loaded, expected = load_network_pickle(path), torch.load(reference)
    with torch.no_grad():
        assert torch.equal(loaded.net(*expected["inputs"]), expected["output"])
        assert torch.equal(loaded.net(*expected["inputs"], force_fp32=True), expected["forced"])
        first = next(p for p in loaded.net.parameters() if p.ndim > 1)
        first[(0,) * first.ndim] += 0.5  # the twin: one weight changed
        assert not torch.equal(loaded.net(*expected["inputs"]), expected["output"])
    assert not loaded.net.training and all(p.device.type == "cpu" for p in loaded.net.parameters())
    return load_network_pickle(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", EDM_NAMES)
@pytest.mark.parametrize("commit", EDM_VERSIONS, ids=short)
def test_edm(made, commit, name, protocol):
    folder = made("edm", commit)
    loaded = check(folder / f"{name}-{protocol}.pkl", folder / f"{name}.pt")
    (versions,) = loaded.sources.values()
    assert list(loaded.sources) == ["edm/training/networks.py"] and list(versions.values()) == [commit]
    assert loaded.class_name.lower() == name.split("-")[0] + "precond"
    assert loaded.encoder is None


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", ["rgb", "vae"])
@pytest.mark.parametrize("commit", ENCODERS, ids=short)
def test_edm2(made, commit, name, protocol):
    folder = made("edm2", commit)
    loaded = check(folder / f"{name}-{protocol}.pkl", folder / f"{name}.pt")
    assert list(loaded.sources) == ["edm2/training/networks_edm2.py"] and loaded.class_name == "Precond"
    assert {p.dtype for p in loaded.net.parameters()} == {torch.float16 if name == "vae" else torch.float32}
    encoder, expected = loaded.encoder.realise(), torch.load(folder / f"{name}-encoder.pt")
    if name == "rgb":
        assert torch.equal(encoder.encode_latents(torch.arange(64.0).reshape(1, 4, 4, 4) * 2), expected)
    else:
        assert torch.equal(torch.from_numpy(encoder.scale), expected[0]) and encoder._vae is None
        assert torch.equal(torch.from_numpy(loaded.encoder.state["bias"]), expected[1])


def test_one_byte_altered_in_an_embedded_source(made):
    folder = made("edm", EDM_VERSIONS[0])
    raw = (folder / "vp-4.pkl").read_bytes()
    old = b"import numpy as np"
    assert raw.count(old) == 1
    (folder / "altered.pkl").write_bytes(raw.replace(old, b"import numpy as nq"))
    with pytest.raises(UnknownSource, match="class .* comes with its own source code .SHA-256 [0-9a-f]{64}."):
        load_network_pickle(folder / "altered.pkl")


SPY = """
import hashlib, sys
import torch, numpy  # what they compile on being imported is not the pickle's
from art_edm.pickles.network import load_network_pickle
seen, other = [], []

def hook(event, args):
    if event == "compile" and args[0] is not None:
        source = args[0].encode() if isinstance(args[0], str) else bytes(args[0])
        seen.append(hashlib.sha256(source).hexdigest())
    if event in ("os.system", "subprocess.Popen", "pickle.find_class", "os.exec", "socket.connect"):
        other.append(event)

sys.addaudithook(hook)
load_network_pickle(sys.argv[1])
print(*seen, *other)
print(*[name for name in sys.modules if name.split(".")[0] in ("torch_utils", "dnnlib", "training")])
"""


def test_an_audit_hook_sees_only_listed_sources(made):
    folder, folder2 = made("edm", EDM_VERSIONS[0]), made("edm2", ENCODERS[0])
    for path, repository in ((folder / "edm-adm-5.pkl", EDM), (folder2 / "vae-5.pkl", EDM2)):
        seen, modules = run_python(SPY, path, cwd=folder).stdout.split("\n")[:2]
        listed = {sha256 for versions in repository["sources"].values() for sha256 in versions}
        assert len(seen.split()) == 1 and set(seen.split()) <= listed and modules == ""
    # the twin: upstream's own loading in the same process compiles the other sources of the snapshot too
    plain = SPY.replace("load_network_pickle(sys.argv[1])", "import pickle; pickle.load(open(sys.argv[1], 'rb'))")
    seen = run_python(plain, folder / "edm-adm-5.pkl", path=folder / "tree").stdout.split("\n")[0].split()
    assert "pickle.find_class" in seen and set(seen) - {sha for v in EDM["sources"].values() for sha in v}


@pytest.mark.parametrize("name, entry", [("edm", EDM), ("edm2", EDM2)])
def test_the_lock_file_states_what_the_repository_holds(name, entry, tmp_path):
    for file, versions in entry["sources"].items():
        for sha256, commit in versions.items():
            tree = export(name, commit, tmp_path / commit)
            assert hashlib.sha256((tree / file).read_bytes()).hexdigest() == sha256
    tree, module = upstream(name), "encoders" if name == "edm2" else "networks"
    stored = run_python(f"""
import hashlib, inspect
from training import {module}
print(hashlib.sha256(inspect.getsource({module}).encode()).hexdigest())
""", path=tree).stdout.strip()
    assert stored == next(iter(entry["sources"][f"training/{module}.py"]))  # the newest comes first


TRUST = """
import sys, torch
from art_edm.pickles.network import load_network_pickle
loaded, expected = load_network_pickle(sys.argv[1], trust=True), torch.load(sys.argv[2])
print(torch.equal(loaded.net(*expected["inputs"]), expected["output"]), loaded.class_name, *loaded.sources)
"""


def test_trusting_gives_the_same(made):
    folder = made("edm", EDM_VERSIONS[1])
    environment = {"ART_EDM_UPSTREAM": str(upstream("edm").parent)}
    result = run_python(TRUST, folder / "edm-ddpmpp-5.pkl", folder / "edm-ddpmpp.pt", cwd=folder, env=environment)
    assert result.stdout.split() == ["True", "EDMPrecond", "edm/training/networks.py", "EDMLoss", "AugmentPipe"]
