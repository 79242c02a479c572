"""The main command on network pickles: what it learns, records and refuses; on stand-ins and upstream's own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from art_edm.grids.clocks import GaussianClock
from art_edm.grids.grid import load_grid
from art_edm.pickles import known_sources as upstream_sources
from art_edm.pickles import trusted
from tests.support.loopback import Loopback, isolate, whole
from tests.support.pickle_stand_ins import dumps, sha256, write_lock
from tests.support.upstream import run_python, upstream

SCRIPT = Path(__file__).parents[2] / "tools" / "train_schedule.py"
SMALL = ["--iterations=4", "--trajectories=4"]
QUIET = [*SMALL, "--quiet"]
DIRECT = ["--method=direct", "--trajectories=4", "--quiet"]
STEP = 2 * 3 * 7  # evaluations that choose the difference's step, where its first choice is good

# Two-class Gaussian data: class k has the standard deviation `stds[k]`.
GAUSSIAN = '''
import torch
from torch_utils import persistence


@persistence.persistent_class
class Gaussian(torch.nn.Module):
    def __init__(self, stds, **attributes):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 4, 1, len(stds) if len(stds) > 1 else 0
        self.register_buffer("stds", torch.tensor(stds))
        self.__dict__.update(attributes)

    def forward(self, x, sigma, class_labels=None, force_fp32=False):
        index = class_labels.argmax(1) if self.label_dim else torch.zeros(len(x), dtype=torch.int64)
        variance = self.stds[index].square().reshape(-1, 1, 1, 1)
        s = sigma.to(torch.float32).reshape(-1, 1, 1, 1)
        return variance / (variance + s.square()) * x.to(torch.float32)
'''


@pytest.fixture
def run(tool, tmp_path, monkeypatch):
    """Call the tool in an empty folder, where the stand-in's source is listed."""
    lock = write_lock(tmp_path / "lock.json", GAUSSIAN)
    monkeypatch.setattr(upstream_sources, "lock_file", lambda: lock)
    return tool("train_schedule")


def pickled(name, *stds, source=GAUSSIAN, **attributes):
    Path(name).write_bytes(dumps(lambda c: {"ema": c["Gaussian"](list(stds), **attributes)}, source))
    return name


def record_of(result, name):
    assert result.exit_code == 0, (result.stderr, result.exception)
    return json.loads(Path(name).with_suffix(".json").read_text())


def refused(result, *texts):
    message = result.stderr.strip()
    assert result.exit_code == 2, (result.exit_code, message, result.exception)
    assert message.count("\n") == 0 and message.startswith("Error: ")
    for text in texts:
        assert text in message, message


def test_a_pickle_gives_the_optimum_of_its_data(run):
    pickled("net.pkl", 0.5)
    record = record_of(run("--network=net.pkl", "--steps=8", *DIRECT), "art_net8.npy")
    values = load_grid("art_net8.npy").values
    exact = GaussianClock(80.0, 0.5).sigma(np.arange(9) / 8)  # of N(0, 0.5^2) data, in closed form
    np.testing.assert_allclose(values[:-2], exact[:-2], rtol=0.02)
    assert not np.allclose(values[:-2], GaussianClock(80.0, 0.3).sigma(np.arange(9) / 8)[:-2], rtol=0.1)
    assert record["network"]["name"] == "net" and record["network"]["class"] == "Gaussian"
    assert record["network"]["sources"] == {"ours/net.py": {sha256(GAUSSIAN): "commit0"}}
    assert record["network_calls"] == record["evaluations"] == 4 * 85


def test_class_and_guidance_reach_the_field_and_the_record(run):
    """One class, or the other, or guided: each has a grid of its own; the sidecar tells which."""
    net, guide = pickled("net.pkl", 0.2, 2.0), pickled("guide.pkl", 1.0)
    common = [f"--network={net}", "--steps=8", *DIRECT, "--trajectories=8"]
    grids = {}
    for name, more in {"a": ["--class=0"], "b": ["--class=1"], "mixed": [],
                       "guided": ["--class=0", f"--gnet={guide}", "--guidance=1.5"]}.items():
        record = record_of(run(*common, *more, f"--out={name}.npy"), f"{name}.npy")
        grids[name] = load_grid(f"{name}.npy").values
        guided = name == "guided"
        assert record["network_calls"] == record["evaluations"] * (2 if guided else 1)
        assert record["network"]["class_idx"] == (None if name == "mixed" else int(name == "b"))
        assert (record["network"].get("guidance"), record["network"].get("gnet")) == (
            (1.5, "guide.pkl") if guided else (None, None))
    for name, std in (("a", 0.2), ("b", 2.0)):
        np.testing.assert_allclose(grids[name][:5], GaussianClock(80.0, std).sigma(np.arange(9) / 8)[:5], rtol=0.02)
    middle = {name: values[4] for name, values in grids.items()}
    assert middle["a"] < middle["mixed"] < middle["b"]
    assert abs(middle["guided"] / middle["a"] - 1) > 0.02


def test_guided_calls_are_told(run):
    net, guide = pickled("net.pkl", 0.2), pickled("guide.pkl", 1.0)
    small = [*SMALL, "--trajectories=16"]
    result = run(f"--network={net}", f"--gnet={guide}", "--guidance=2", *small)
    assert result.exit_code == 0 and "1,360 images evaluated (2,720 by either network)" in result.stdout, result.stdout
    plain = run(f"--network={net}", *small)
    assert "1,360 images evaluated; " in plain.stdout


def test_the_step_of_differences_is_chosen_for_live_rollouts_alone(run):
    """A profile differences along its paths; a rollout that calls the network differences about each point."""
    path = pickled("net.pkl", 0.5)
    record = record_of(run(f"--network={path}", *QUIET), "art_net18.npy")
    assert record["evaluations_by_stage"] == {"step": 0, "profile": 4 * 85, "rl": 0}
    more = ("--rollout=live", "--iterations=1", "--force")
    record = record_of(run(f"--network={path}", *QUIET, *more), "art_net18.npy")
    assert record["evaluations_by_stage"] == {"step": STEP, "profile": 4 * 85, "rl": 3 * 8 * (2 * 48 + 1)}


def test_an_address_is_downloaded_once(run, tmp_path, monkeypatch):
    isolate(monkeypatch, tmp_path)
    with Loopback() as server:
        url = server.on("/nets/far.pkl", whole(Path(pickled("net.pkl", 0.5)).read_bytes()))
        for _ in range(2):
            record = record_of(run(f"--network={url}", *DIRECT), "art_far18.npy")
        assert len(server.asked) == 1
    assert record["network"]["name"] == "far"


@pytest.mark.parametrize("more, text", [
    (["--guidance=2"], "found guidance 2 without a guiding network; add --gnet"),
    (["--gnet=guide.pkl"], "found a guiding network and guidance 1"),
    (["--class=2"], "found class 2, but the network has classes 0 to 1; change or omit --class"),
    (["--gnet=nowhere.pkl", "--guidance=2"], "no file nowhere.pkl"),
    (["--gnet=text.pkl", "--guidance=2"], "text.pkl"),
])
def test_options_that_do_not_fit(run, more, text):
    pickled("guide.pkl", 1.0)
    Path("text.pkl").write_text("hello")
    refused(run(f"--network={pickled('net.pkl', 0.2, 2.0)}", *more, *QUIET), text)
    assert not list(Path().glob("art_*"))


@pytest.mark.parametrize("network", ["mnist", "oned", "gaussian:0.5"])
def test_what_is_no_pickle_takes_no_class(run, network):
    refused(run(f"--network={network}", "--class=1", *QUIET), f"{network} takes no --gnet, --guidance or --class")


def test_a_source_that_is_not_listed(run, monkeypatch):
    other = GAUSSIAN.replace("float32", "float64", 1)
    path = pickled("net.pkl", 0.5, source=other)
    refused(run(f"--network={path}", *QUIET), "class Gaussian", sha256(other), "--trust-pickle", "upstream.json")
    monkeypatch.setattr(trusted, "find_checkout", lambda: None)  # whatever third_party/ has
    refused(run(f"--network={path}", "--trust-pickle", *QUIET), "python tools/patch_upstream.py")


def test_a_network_without_a_range_of_its_own(run):
    """A pickle that says sigma_min and sigma_max is learned within them."""
    path = pickled("net.pkl", 0.5, sigma_min=0.05, sigma_max=20.0)
    record_of(run(f"--network={path}", "--steps=6", *DIRECT), "art_net6.npy")
    assert load_grid("art_net6.npy").sigma_max == 20


MAKE_EDM2 = """
import pickle, sys
import torch
from training import encoders, networks_edm2
for name, label_dim in (('net', 4), ('gnet', 0)):
    torch.manual_seed(label_dim)
    net = networks_edm2.Precond(16, 3, label_dim, model_channels=64, channel_mult=[1], num_blocks=1)
    for p in net.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.5) if p.ndim else p.data.fill_(0.5)
    ema = net.eval().requires_grad_(False).to(torch.float16)
    with open(f'{sys.argv[1]}/{name}.pkl', 'wb') as f:
        pickle.dump(dict(ema=ema, encoder=encoders.StandardRGBEncoder(), dataset_kwargs={}), f)
"""


@pytest.mark.upstream
def test_upstreams_guided_edm2_networks(tmp_path, monkeypatch):
    """The command itself, in float16 weights as snapshots have them, with the list that is shipped."""
    run_python(MAKE_EDM2, tmp_path, path=upstream("edm2"))
    monkeypatch.chdir(tmp_path)
    code = "import runpy, sys; sys.argv = ['train_schedule.py', *sys.argv[2:]]; runpy.run_path(%r, run_name='__main__')"
    run_python(code % str(SCRIPT), "-", "--network=net.pkl", "--gnet=gnet.pkl", "--guidance=1.8", "--class=2",
               "--steps=5", "--out=art_net5.npy", *QUIET, cwd=tmp_path)
    record = json.loads(Path("art_net5.json").read_text())
    assert record["network_calls"] == 2 * record["evaluations"] == 2 * 4 * 85
    assert record["network"]["class_idx"] == 2
    assert list(record["network"]["sources"]) == ["edm2/training/networks_edm2.py"]
    assert load_grid("art_net5.npy").num_steps == 5


def test_levels_below_the_network_s_lowest_are_raised_and_kept_apart(run):
    """A lowest level of 0.5, which the optimum leaves after a few steps: the last one is there, the others above it."""
    pickled("net.pkl", 0.5, sigma_min=0.5, sigma_max=20.0)
    assert run("--network=net.pkl", "--out=k{steps}.npy", "--steps=5,100", *QUIET).exit_code == 0
    few, many = (load_grid(f"k{k}.npy").values for k in (5, 100))
    assert few[-2] == many[-2] == 0.5 and (few[:-2] > 0.5).all() and (many[:-2] > 0.5).all()
    assert many[0] == 20 and (np.diff(many) < 0).all()


@pytest.mark.parametrize("arguments, text", [
    (["--network=ftp://host/x.pkl"], "found the address ftp://host/x.pkl, expected http:// or https://"),
    (["--network=net.pkl", "--gnet=mnist", "--guidance=2"], "--gnet: unknown network 'mnist'; expected the path or"),
    (["--network=state.pt"], "give network-snapshot-*.pkl, not a training state"),
])
def test_what_is_no_network(run, arguments, text):
    import torch

    pickled("net.pkl", 0.5)
    torch.save({"net": {"weight": torch.zeros(2)}, "optimizer_state": {}}, "state.pt")
    refused(run(*arguments, *QUIET), text)
