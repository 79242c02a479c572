"""NVlabs' own networks behind the contract: the surrogate against double-backward, the samplers against theirs."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from art_edm.grids.clocks import make_clock
from art_edm.grids.grid import Grid, edm, save_grid
from art_edm.measure.dense_paths import measure_profile
from art_edm.measure.field import choose_step, surrogate
from art_edm.models.loading import load_network
from art_edm.sampling.noise import noise_and_labels
from art_edm.sampling.solvers import sample, supported
from tests.support.patched import script_pairs
from tests.support.shim import run_jobs
from tests.support.upstream import run_python, upstream

LEVELS = (0.01, 0.1, 1.0, 10.0, 60.0)
SMALL = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
EDM_NETS = {
    "song": ("EDMPrecond", dict(model_type="SongUNet", **SMALL)),
    "ncsn": ("EDMPrecond", dict(
        model_type="SongUNet", embedding_type="fourier", channel_mult_noise=2, encoder_type="residual",
        resample_filter=[1, 3, 3, 1], **SMALL)),
    "dhariwal": ("EDMPrecond", dict(model_type="DhariwalUNet", label_dim=4, **SMALL)),
    "vp": ("VPPrecond", dict(model_type="SongUNet", **SMALL)),
    "ve": ("VEPrecond", dict(model_type="SongUNet", **SMALL)),
    "iddpm": ("iDDPMPrecond", dict(model_type="DhariwalUNet", **SMALL)),
}
SMALL2 = dict(img_channels=3, model_channels=64, num_blocks=1)
EDM2_NETS = {
    "edm2": ("Precond", dict(label_dim=4, channel_mult=[1, 2], attn_resolutions=[8], **SMALL2)),
    "edm2-uncond": ("Precond", dict(label_dim=0, channel_mult=[1], **SMALL2)),
}

MAKE = """
import json, pickle, sys
import torch
out, module, nets = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
networks = __import__('training.' + module, fromlist=['x'])
for seed, (name, (kind, options)) in enumerate(nets.items()):
    torch.manual_seed(seed)
    options = {'img_resolution': 16, 'img_channels': 1, 'label_dim': 0, **options}
    net = getattr(networks, kind)(**options)
    with torch.no_grad():  # what starts at zero would hide a broken network
        for p in net.parameters():
            if p.abs().max() < 1e-3:
                p.copy_(torch.randn_like(p) * (0.3 if p.ndim else 1.0) * (p[0].numel() if p.ndim > 1 else 1) ** -0.5)
    net.eval().requires_grad_(False)
    with open(f'{out}/{name}.pkl', 'wb') as f:
        pickle.dump(dict(ema=net), f)
    torch.save((kind, options, net.state_dict()), f'{out}/{name}.pt')
"""

pytestmark = pytest.mark.upstream

# In a copy of the tree whose networks compute in float64. The double backward is torch.autograd.functional.jvp.
EXACT = """
import sys
import torch
out, module, names = sys.argv[1], sys.argv[2], sys.argv[3].split(',')
levels = [float(s) for s in sys.argv[4].split(',')]
networks = __import__('training.' + module, fromlist=['x'])
results = {}
for name in names:
    kind, options, state = torch.load(f'{out}/{name}.pt', weights_only=False)
    net = getattr(networks, kind)(**options).double().eval()
    net.load_state_dict(state)
    labels = torch.eye(4, dtype=torch.float64)[[0, 3]] if options['label_dim'] else None
    for s in levels:
        rng = torch.Generator().manual_seed(5)
        y = torch.rand(2, options['img_channels'], 16, 16, generator=rng, dtype=torch.float64) * 2 - 1
        x = y + s * torch.randn(y.shape, generator=rng, dtype=torch.float64)
        sigma = torch.tensor(s, dtype=torch.float64)
        D = lambda x, sigma: net(x, sigma.reshape(1).expand(2), labels, force_fp32=True)
        v = (x - D(x, sigma)).detach() / s
        zero = torch.zeros([], dtype=torch.float64)
        _, slope = torch.autograd.functional.jvp(lambda t: D(x + t * v, sigma + t), zero, torch.ones_like(zero))
        results[name, s] = (x, labels, slope.detach())
torch.save(results, f'{out}/exact-{module}.pt')
"""

SAMPLE = """
import sys
import torch
import generate
out, names = sys.argv[1], sys.argv[2].split(',')
import pickle
results = {}
for name in names:
    net = pickle.load(open(f'{out}/{name}.pkl', 'rb'))['ema']
    rnd = generate.StackedRandomGenerator(torch.device('cpu'), range(3))
    latents = rnd.randn([3, 1, 16, 16])
    labels = torch.eye(net.label_dim)[rnd.randint(net.label_dim, size=[3])] if net.label_dim else None
    heun = generate.edm_sampler(net, latents, labels, num_steps=7)
    euler = generate.ablation_sampler(net, latents, labels, num_steps=7, solver='euler')
    results[name] = (latents, labels, heun, euler)
torch.save(results, f'{out}/samples.pt')
"""

SAMPLE2 = """
import sys, pickle
import torch
import generate_images as g
out = sys.argv[1]
load = lambda name: pickle.load(open(f'{out}/{name}.pkl', 'rb'))['ema']
net, gnet = load('edm2'), load('edm2-uncond')
rnd = g.StackedRandomGenerator(torch.device('cpu'), range(3))
noise = rnd.randn([3, 3, 16, 16])
labels = torch.eye(4)[rnd.randint(4, size=[3])]
plain = g.edm_sampler(net, noise, labels, num_steps=7)
guided = g.edm_sampler(net, noise, labels, gnet, num_steps=7, guidance=1.8)
torch.save((noise, labels, plain, guided), f'{out}/samples2.pt')
"""


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Folder of pickles that upstream made, of networks with no layer at zero."""
    folder = tmp_path_factory.mktemp("nets")
    for tree, module, kinds in (("edm", "networks", EDM_NETS), ("edm2", "networks_edm2", EDM2_NETS)):
        run_python(MAKE, folder, module, json.dumps(kinds), path=upstream(tree))
    return folder


@pytest.fixture(scope="module")
def exact(nets, tmp_path_factory):
    """x, labels and the exact dD/dsigma by network and level, in float64."""
    results = {}
    trees = (("edm", "networks", ("song", "ncsn", "dhariwal")), ("edm2", "networks_edm2", ("edm2",)))
    for tree, module, names in trees:
        copy = tmp_path_factory.mktemp("float64") / tree
        shutil.copytree(upstream(tree), copy, ignore=shutil.ignore_patterns(".git", "docs"))
        source = copy / "training" / f"{module}.py"
        source.write_text(source.read_text().replace("float32", "float64"))
        run_python(EXACT, nets, module, ",".join(names), ",".join(map(str, LEVELS)), path=copy)
        results.update(torch.load(nets / f"exact-{module}.pt"))
    return results


@pytest.mark.parametrize("sigma", LEVELS)
@pytest.mark.parametrize("name", ["song", "ncsn", "dhariwal", "edm2"])
def test_surrogate_against_double_backward(nets, exact, name, sigma):
    x, labels, slope = exact[name, sigma]
    denoiser = load_network(str(nets / f"{name}.pkl")).denoiser
    latents = torch.randn(1, *denoiser.img_shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    step = choose_step(denoiser, latents)
    assert step == (0.003 if name == "ncsn" else 0.01)  # Fourier features of high frequency
    found = surrogate(denoiser, x, sigma, labels, step)
    norm = slope.flatten(1).square().mean(dim=1).sqrt() / sigma
    assert float((found.norm / norm - 1).abs().max()) < 1e-2
    error = (found.slope - slope).flatten(1).norm(dim=1) / slope.flatten(1).norm(dim=1)
    assert float(error.max()) < 2e-2  # pixel by pixel
    if labels is not None:
        other = surrogate(denoiser, x, sigma, labels.flip(0), step)
        assert float((other.slope - slope).norm() / slope.norm()) > 5e-3 or sigma > 50  # the wrong label is seen
    plain = denoiser.denoise
    denoiser.denoise = lambda x, levels, labels: plain(x, torch.full_like(levels, sigma), labels)
    partial = surrogate(denoiser, x, sigma, labels, step)  # without the derivative at fixed x
    assert float((partial.slope - slope).norm() / slope.norm()) > 0.1


@pytest.fixture(scope="module")
def samples(nets):
    run_python(SAMPLE, nets, ",".join(EDM_NETS), path=upstream("edm"))
    return torch.load(nets / "samples.pt")


def distance(x, y):
    return float((x - y).abs().max() / y.abs().max())


@pytest.mark.parametrize("name", ["song", "ncsn", "dhariwal", "vp", "ve", "iddpm"])
def test_upstreams_samplers_on_their_own_rule(nets, samples, name):
    """edm_sampler against our Heun, ablation_sampler --solver=euler against our Euler; float64."""
    latents, labels, heun, euler = samples[name]
    denoiser = load_network(str(nets / f"{name}.pkl")).denoiser
    low = max(0.002, denoiser.sigma_limits[0])
    grid = edm(7, low, 80.0)
    assert distance(sample(denoiser, latents, grid, "heun", labels), heun) <= 1e-10
    assert distance(sample(denoiser, latents, grid, "euler", labels), euler) <= 1e-10
    assert distance(sample(denoiser, latents, edm(7, 1.05 * low, 80.0), "heun", labels), heun) > 1e-7
    assert distance(sample(denoiser, latents, grid, "euler", labels), heun) > 1e-5


def test_edm2s_sampler_on_its_own_rule(nets):
    run_python(SAMPLE2, nets, path=upstream("edm2"))
    noise, labels, plain, guided = torch.load(nets / "samples2.pt")
    path, gpath = (str(nets / f"{name}.pkl") for name in ("edm2", "edm2-uncond"))
    grid = edm(7, 0.002, 80.0)
    ours = sample(load_network(path).denoiser, noise, grid, "heun", labels)
    assert distance(ours, plain) <= 1e-5
    network = load_network(path, gnet=gpath, guidance=1.8)
    both = sample(network.denoiser, noise, grid, "heun", labels)
    assert distance(both, guided) <= 1e-5 and network.denoiser.networks == 2
    assert distance(both, plain) > 1e-2 and distance(ours, guided) > 1e-2
    assert network.details["guidance"] == 1.8 and network.details["gnet"] == "edm2-uncond.pkl"


def test_labels_are_those_upstream_draws(nets, samples):
    latents, labels, _, _ = samples["dhariwal"]
    denoiser = load_network(str(nets / "dhariwal.pkl")).denoiser
    noise, drawn = noise_and_labels(denoiser, 0, range(3))
    assert torch.equal(noise, latents) and torch.equal(drawn, labels)
    assert not torch.equal(noise_and_labels(denoiser, 0, range(1, 4))[0], latents)


GRID = [80.0, 31.0, 9.0, 2.2, 0.61, 0.07, 0.0]


@pytest.fixture(scope="module")
def patched(nets, tmp_path_factory):
    """Samples of the patched scripts on GRID, by repository, network and solver."""
    folder = tmp_path_factory.mktemp("patched")
    save_grid(folder / "grid.npy", Grid(GRID), {})
    common = [f"--schedule={folder / 'grid.npy'}", "--seeds=0-2", "--batch=3", f"--outdir={folder}"]
    records = {}
    for tree, names, option in (("edm", ("song", "dhariwal", "iddpm"), "--network"), ("edm2", ("edm2",), "--net")):
        _, script = script_pairs(tree, folder / tree)[{"edm": "62072d2", "edm2": "4bf8162"}[tree]]
        jobs = {}
        for name in names:
            argv = [*common, f"{option}={nets / name}.pkl"]
            jobs[f"{name} heun"] = dict(script=script, argv=argv)
            if tree == "edm":
                jobs[f"{name} euler"] = dict(script=script, argv=[*argv, "--solver=euler"])
        records.update(run_jobs(upstream(tree), jobs, folder)[0])
    return records


@pytest.mark.parametrize("name, solver, bar", [
    ("song", "heun", 1e-10), ("song", "euler", 1e-10), ("dhariwal", "heun", 1e-10), ("dhariwal", "euler", 1e-10),
    ("iddpm", "heun", 1e-10), ("iddpm", "euler", 1e-10), ("edm2", "heun", 1e-5),
])
def test_the_patched_samplers_on_a_grid(nets, patched, name, solver, bar):
    """From the command line to the end point: theirs, with our grid, against ours; labels drawn by both."""
    record = patched[f"{name} {solver}"]
    assert record["exit_code"] == 0, record["output"]
    denoiser = load_network(str(nets / f"{name}.pkl")).denoiser
    noise, labels = noise_and_labels(denoiser, 0, range(3))
    ours = sample(denoiser, noise, Grid(GRID), solver, labels)
    assert distance(ours, record["samples"]) <= bar
    other = {"heun": "euler", "euler": "heun"}[solver]
    assert distance(sample(denoiser, noise, Grid(GRID), other, labels), record["samples"]) > 1e-4


def test_a_discrete_network(nets):
    """Its profile is taken at its own levels; a direct grid is valid after rounding; duplicates are refused."""
    denoiser = load_network(str(nets / "iddpm.pkl")).denoiser
    levels = set(denoiser.net.u.double().tolist())
    assert {denoiser.sigma_min, denoiser.sigma_max} < levels and len(levels) == 1001
    clock = make_clock("gaussian", denoiser.sigma_max, 0.5)
    profile = measure_profile(denoiser, torch.randn(2, 1, 16, 16, dtype=torch.float64), clock, 40)
    assert set(profile.sigma) <= levels
    grid = supported(denoiser, profile.direct(10))
    assert set(grid.values[:-1]) <= levels and grid.num_steps == 10 and profile.direct(10) != grid
    with pytest.raises(ValueError, match="same noise level.*use fewer steps"):
        supported(denoiser, Grid([80.0, 2.0, 1.9999, 0.0]))


def test_vp_and_ve_ranges(nets):
    vp, ve = (load_network(str(nets / f"{name}.pkl")).denoiser for name in ("vp", "ve"))
    assert vp.sigma_limits[0] == pytest.approx(math.expm1(0.5 * 19.9e-10 + 0.1e-5) ** 0.5, rel=5e-2)  # in float32
    assert vp.sigma_limits[1] == pytest.approx(152.17, abs=0.1) and vp.sigma_max == 80
    assert ve.sigma_limits == (0.02, 100) and ve.sigma_min == 0.02
    with pytest.raises(ValueError, match=r"starts at sigma = 101, above the network's sigma_max = 100"):
        supported(ve, Grid([101.0, 1.0, 0.0]))
    with pytest.raises(ValueError, match=r"is at sigma = 0.01, below the network's sigma_min = 0.02"):
        supported(ve, Grid([80.0, 0.01, 0.0]))
    assert supported(ve, Grid([100.0, 0.02, 0.0])) == Grid([100.0, 0.02, 0.0])
