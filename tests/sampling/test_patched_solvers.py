"""--solver=NAME on a grid in NVlabs' patched scripts, every version: the samples have the bits of our own sampler."""

from __future__ import annotations

import pytest
import torch

from art_edm.grids.grid import Grid, save_grid
from art_edm.grids.weights import written_rows
from art_edm.models.loading import load_network
from art_edm.sampling.noise import noise_and_labels
from art_edm.sampling.solvers import SOLVERS, integrate, sample, slope_of
from art_edm.sampling.weighted import table_of, weighted
from tests.support.patched import COMMITS, make_networks, of, script_pairs
from tests.support.shim import run_jobs
from tests.support.upstream import upstream

NEW = tuple(name for name in SOLVERS if name not in ("euler", "heun"))
EDM = pytest.mark.parametrize("commit", COMMITS["edm"])
EDM2 = pytest.mark.parametrize("commit", COMMITS["edm2"])
GRID = Grid([80.0, 31.0, 9.0, 2.2, 0.61, 0.07, 0.0])
WEIGHTS = 0.98 * table_of("clock", GRID.values)  # of no solver by name

# Both samplers on one grid, from Python: upstream's own Heun, and ours through the patch's `grid_solver`.
HEUN = """
import pickle, torch
load = lambda name: pickle.load(open(f'{folder}/{{name}}.pkl', 'rb'))['ema']
rnd = script.StackedRandomGenerator('cpu', [0, 1, 2])
noise = rnd.randn([3, 3, 8, 8])
labels = torch.eye(4)[rnd.randint(4, size=[3])]
try:
    script.edm_sampler({nets}, noise, labels, {more} grid={grid}, {solver})
except ValueError as error:
    record['exit_code'] = str(error)
"""

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solvers")
    for name in ("edm", "edm2"):
        make_networks(name, folder)
    save_grid(folder / "grid.npy", GRID, {})
    save_grid(folder / "weighted.npy", GRID, {"solver": "clock", "weights": written_rows(WEIGHTS)})
    return folder


def from_python(script, folder, name, solver, grid=GRID):
    """A job that calls edm_sampler."""
    edm2 = name == "edm2"
    return {"script": script, "python": HEUN.format(
        folder=folder, nets="load('main')" if edm2 else "load('edm')", grid=grid and grid.values.tolist(),
        more="load('guiding'), guidance=2," if edm2 else "", solver=solver)}


@pytest.fixture(scope="module")
def records(folder):
    """All runs of this file, in a process for each repository."""
    found = {}
    common = [f"--outdir={folder}/out", "--seeds=0-2", "--batch=3"]
    guided = [f"--gnet={folder}/guiding.pkl", "--guidance=2"]
    for name, nets in (("edm", ("edm", "iddpm")), ("edm2", ("main", "guided"))):
        jobs = {}
        for commit, (_, script) in script_pairs(name, folder / name).items():

            def add(title, net, *more, script=script, commit=commit, option="--net" if name == "edm2" else "--network"):
                file, guide = ("main", guided) if net == "guided" else (net, [])
                jobs[f"{commit} {title}"] = {
                    "script": script, "argv": [*common, f"{option}={folder}/{file}.pkl", *guide, *more]}

            for net in nets:
                for solver in NEW if net in ("edm", "guided") else ("dpmpp2m", "clock"):
                    add(f"{net} {solver}", net, f"--schedule={folder}/grid.npy", f"--solver={solver}")
            add("weights", nets[-1] if name == "edm2" else "edm", f"--schedule={folder}/weighted.npy")
            add("euler", nets[0], f"--schedule={folder}/grid.npy", "--solver=euler")
            add("heun", nets[0], f"--schedule={folder}/grid.npy", "--solver=heun")
            add("default", nets[0], f"--schedule={folder}/grid.npy")
            add("no grid", nets[0], "--solver=dpmpp2m")
            add("churn", nets[0], f"--schedule={folder}/grid.npy", "--solver=ipndm", "--S_churn=40")
            add("help", nets[0], "--help")
            double = [(f"double {solver}", f"grid_solver='{solver}', dtype=torch.float64", GRID)
                      for solver in (NEW if name == "edm2" else ())]  # EDM's sampler has no other type
            for title, solver, grid in [("theirs", "", GRID), ("ours", "grid_solver='heun'", GRID), *double,
                                        ("api no grid", "grid_solver='heun'", None),
                                        ("api churn", "grid_solver='heun', S_churn=4", GRID)]:
                jobs[f"{commit} {title}"] = from_python(script, folder, name, solver, grid)
        found.update(run_jobs(upstream(name), jobs, folder)[0])
    return found


def distance(x, y):
    return float((x - y).abs().max() / y.abs().max())


def ours(network, solver, dtype):
    """Our own sampler from the same seeds, all of it in one type."""
    noise, labels = noise_and_labels(network.denoiser, 0, range(3))
    with torch.no_grad():
        if dtype == torch.float64:
            return sample(network.denoiser, noise, GRID, solver, labels)
        sigma = torch.tensor(GRID.values, dtype=dtype)
        return integrate(slope_of(network.denoiser, labels), noise.to(dtype) * sigma[0], sigma, solver)[0]


def check(record, network, solver, dtype):
    """The script's samples have the bits of ours with that solver, and are far from those with another."""
    assert record["exit_code"] in (0, None), record["output"]  # None: called from Python
    assert record["sampler"] == ["edm_sampler"] and len(record["t_steps"]) == 7
    assert record["samples"].dtype == dtype and torch.equal(ours(network, solver, dtype), record["samples"])
    for other in ("heun", *NEW):
        if other != solver:
            assert distance(ours(network, other, dtype), record["samples"]) > 1e-4


@EDM
@pytest.mark.parametrize("solver", NEW)
def test_edm(records, folder, commit, solver):
    check(of(records, commit, f"edm {solver}"), load_network(f"{folder}/edm.pkl"), solver, torch.float64)


@EDM
@pytest.mark.parametrize("solver", ["dpmpp2m", "clock"])
def test_edm_on_a_network_that_rounds_its_levels(records, folder, commit, solver):
    check(of(records, commit, f"iddpm {solver}"), load_network(f"{folder}/iddpm.pkl"), solver, torch.float64)


@pytest.mark.parametrize("solver", NEW)
def test_edm2_guided(records, folder, solver):
    """The newest script, whose guiding network gets the labels, as ours does."""
    network = load_network(f"{folder}/main.pkl", gnet=f"{folder}/guiding.pkl", guidance=2.0)
    record = of(records, COMMITS["edm2"][0], f"guided {solver}")
    check(record, network, solver, torch.float32)
    assert distance(of(records, COMMITS["edm2"][0], f"main {'clock' if solver == 'clock' else 'dpmpp2m'}")["samples"],
                    record["samples"]) > 1e-2


@pytest.mark.parametrize("solver", NEW)
def test_edm2_guided_in_float64(records, folder, solver):
    """What its sampler computes in when Python asks for it."""
    network = load_network(f"{folder}/main.pkl", gnet=f"{folder}/guiding.pkl", guidance=2.0)
    check(of(records, COMMITS["edm2"][0], f"double {solver}"), network, solver, torch.float64)


@pytest.mark.parametrize("commit", COMMITS["edm"])
def test_the_sidecars_weights_in_edm(records, folder, commit):
    record = of(records, commit, "weights")
    check(record, load_network(f"{folder}/edm.pkl"), weighted(WEIGHTS), torch.float64)
    assert "Weights of weighted.json for its 6 steps; --solver=NAME takes" in record["output"]


def test_the_sidecars_weights_in_edm2_with_guidance(records, folder):
    network = load_network(f"{folder}/main.pkl", gnet=f"{folder}/guiding.pkl", guidance=2.0)
    record = of(records, COMMITS["edm2"][0], "weights")
    check(record, network, weighted(WEIGHTS), torch.float32)
    assert "Weights of weighted.json for its 6 steps" in record["output"]


@EDM2
@pytest.mark.parametrize("solver", ["dpmpp2m", "clock"])
def test_edm2_plain(records, folder, commit, solver):
    check(of(records, commit, f"main {solver}"), load_network(f"{folder}/main.pkl"), solver, torch.float32)


@pytest.mark.parametrize("commit", [*COMMITS["edm"], *COMMITS["edm2"]])
def test_our_heun_is_theirs(records, commit):
    """In every version, with its own guidance in EDM2: noise, labels, levels and denoiser reach our solvers."""
    theirs, ours = of(records, commit, "theirs", "ours")
    assert theirs["exit_code"] is None and ours["exit_code"] is None, ours["output"]
    assert torch.equal(ours["samples"], theirs["samples"]) and ours["samples"].dtype == theirs["samples"].dtype
    euler = of(records, commit, "euler")
    assert euler["exit_code"] == 0 and distance(euler["samples"], theirs["samples"]) > 1e-3


@EDM2
def test_edm2s_heun_is_its_own_sampler(records, commit):
    heun, default = of(records, commit, "heun", "default")
    assert heun["exit_code"] == 0 and torch.equal(heun["samples"], default["samples"])
    assert not torch.equal(of(records, commit, "euler")["samples"], default["samples"])


@pytest.mark.parametrize("commit", [*COMMITS["edm"], *COMMITS["edm2"]])
@pytest.mark.parametrize("name, part", [
    ("no grid", "found --solver=dpmpp2m without a grid; add --schedule=FILE.npy"),
    ("churn", "found --S_churn with --solver=ipndm, which adds no noise"),
])
def test_what_does_not_go_together_is_a_usage_error(records, commit, name, part):
    record = of(records, commit, name)
    assert record["exit_code"] == 2 and record["samples"] is None and "Generating" not in record["output"]
    assert part in record["output"] and "Traceback" not in record["output"]


@pytest.mark.parametrize("commit", [*COMMITS["edm"], *COMMITS["edm2"]])
def test_from_python_they_are_value_errors(records, commit):
    no_grid, churn = of(records, commit, "api no grid", "api churn")
    assert "grid_solver = 'heun' without a grid" in no_grid["exit_code"] and no_grid["samples"] is None
    assert "found S_churn = 4 with grid_solver = 'heun'" in churn["exit_code"] and churn["samples"] is None


@pytest.mark.parametrize("commit", [*COMMITS["edm"], *COMMITS["edm2"]])
def test_help_names_them(records, commit):
    text = " ".join(of(records, commit, "help")["output"].split()).replace("| ", "|")
    assert "|".join(SOLVERS) in text
    assert ("Ablate ODE solver. rk4, dpmpp2m," in text) == (commit in COMMITS["edm"])
