"""NVlabs/edm's generate.py, every version, patched: the same samples without a grid, and a grid as it is with one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.grid import Grid, edm, load_grid, read_off, save_grid
from tests.support.patched import COMMITS, images, make_networks, of, script_pairs
from tests.support.shim import run_jobs
from tests.support.upstream import upstream

VERSION = pytest.mark.parametrize("commit", COMMITS["edm"])

# Without a .npy: name -> arguments. All are run by the original and by the patched script.
PLAIN = {
    "default": [], "vp": ["--schedule=vp"], "ve": ["--schedule=ve"], "linear": ["--schedule=linear"],
    "twice": ["--schedule=linear", "--schedule=vp"], "euler": ["--solver=euler"], "heun": ["--solver=heun"],
    "churn": ["--S_churn=40"], "heun churn": ["--solver=heun", "--S_churn=40"], "rho": ["--rho=3"],
    "all vp": ["--solver=euler", "--disc=vp", "--schedule=vp", "--scaling=vp"], "iddpm": ["--disc=iddpm"],
    "class": ["--class=1", "--steps=7"], "range": ["--sigma_min=0.1", "--sigma_max=10"],
}
# With the noise levels of `default` as a grid: name -> arguments; equal to the plain run of that name.
SAME = {name: PLAIN[name] for name in ("default", "churn", "euler", "heun", "heun churn")}

FROM_PYTHON = """
import pickle, torch
with open({network!r}, 'rb') as file:
    net = pickle.load(file)['ema']
rnd = script.StackedRandomGenerator('cpu', [0, 1, 2])
latents = rnd.randn([3, 3, 8, 8])
labels = torch.eye(4)[rnd.randint(4, size=[3])]
try:
    script.{sampler}(net, latents, labels, randn_like=rnd.randn_like, grid={grid}, {arguments})
except ValueError as error:
    record['exit_code'] = str(error)
"""

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    make_networks("edm", folder)
    save_grid(folder / "of9.npy", edm(9, 0.002, 80, rho=5), {})
    save_grid(folder / "of6.npy", read_off(edm(9, 0.002, 80, rho=5), 6), {})
    save_grid(folder / "one.npy", Grid([80.0, 0.0]), {})
    save_grid(folder / "fine.npy", Grid([80.0, 1.0, 0.99999, 0.03, 0.0]), {})
    return folder


@pytest.fixture(scope="module")
def scripts(folder):
    return script_pairs("edm", folder / "scripts")


@pytest.fixture(scope="module")
def records(folder, scripts):
    """All runs of this file, in one process."""
    jobs = {}
    for commit, (original, patched) in scripts.items():

        def add(name, script, *more, network="edm", steps=("--steps=5",), commit=commit, **settings):
            argv = [f"--network={folder}/{network}.pkl", f"--outdir={folder}/out", "--seeds=0-2", "--batch=2"]
            jobs[f"{commit} {name}"] = {"script": script, "argv": [*argv, *steps, *more], **settings}

        for name, arguments in PLAIN.items():
            saved = {"save_grid": f"{folder}/default-{commit}.npy"} if name == "default" else {}
            add(f"original {name}", original, *arguments, **saved)
            add(f"patched {name}", patched, *arguments)
        for name, arguments in SAME.items():
            add(f"grid {name}", patched, f"--schedule={folder}/default-{commit}.npy", *arguments, steps=())
        add("wide", original, steps=["--steps=18"])
        add("resampled", patched, f"--schedule={folder}/of9.npy", steps=["--steps=6"])
        add("file of 6", patched, f"--schedule={folder}/of6.npy", steps=["--steps=6"])
        add("file of 9", patched, f"--schedule={folder}/of9.npy", steps=())
        add("one step", patched, f"--schedule={folder}/one.npy", steps=())
        for network in ("vp", "ve", "iddpm"):
            saved = {"save_grid": f"{folder}/{network}-{commit}.npy"}
            add(f"original net {network}", original, network=network, **saved)
            saved_grid = f"--schedule={folder}/{network}-{commit}.npy"
            add(f"grid net {network}", patched, saved_grid, network=network, steps=())
            add(f"fine {network}", patched, f"--schedule={folder}/fine.npy", network=network, steps=())
            add(f"low {network}", patched, f"--schedule={folder}/of9.npy", network=network, steps=())
        for name, sampler, grid, more in [
            ("api heun", "edm_sampler", load_grid(folder / "of9.npy").values.tolist(), "S_churn=40"),
            ("api euler", "ablation_sampler", load_grid(folder / "of9.npy").values.tolist(), "solver='euler'"),
            ("api ablation", "ablation_sampler", [80.0, 1.0, 0.0], "schedule='vp'"),
            ("api no grid", "edm_sampler", [1.0, 80.0, 0.0], "num_steps=3"),
        ]:
            snippet = FROM_PYTHON.format(network=f"{folder}/edm.pkl", sampler=sampler, grid=grid, arguments=more)
            jobs[f"{commit} {name}"] = {"script": patched, "python": snippet}
        one_batch = ["--batch=3", f"--schedule={folder}/of9.npy"]
        add("cli heun", patched, *one_batch, "--S_churn=40", steps=())
        add("cli euler", patched, *one_batch, "--solver=euler", steps=())
        add("help", patched, "--help")
    return run_jobs(upstream("edm"), jobs, folder)[0]


def equal(a, b):
    """Both ran, and their samples are the same to the bit."""
    assert a["exit_code"] == b["exit_code"] == 0, a["output"] + b["output"]
    assert a["samples"].isfinite().all() and a["samples"].std() > 0.1 and a["sampler"] == b["sampler"]
    return torch.equal(a["samples"], b["samples"])


@VERSION
@pytest.mark.parametrize("name", PLAIN)
def test_without_a_grid_nothing_changes(records, commit, name):
    original, patched = of(records, commit, f"original {name}", f"patched {name}")
    assert equal(original, patched)
    if name not in ("default", "heun", "linear"):  # these three do the same arithmetic in upstream, up to rounding
        assert not torch.equal(patched["samples"], of(records, commit, "original default")["samples"])


@VERSION
@pytest.mark.parametrize("name", SAME)
def test_the_default_levels_as_a_grid_give_the_default_samples(records, commit, name):
    original, grid = of(records, commit, f"original {name}", f"grid {name}")
    assert equal(original, grid) and torch.equal(original["t_steps"], grid["t_steps"])
    assert not torch.equal(grid["samples"], of(records, commit, "original rho")["samples"])


@VERSION
@pytest.mark.parametrize("network", ["vp", "ve", "iddpm"])
def test_other_networks_get_their_rounded_levels(records, commit, network):
    original, grid = of(records, commit, f"original net {network}", f"grid net {network}")
    assert equal(original, grid)


@VERSION
def test_our_rule_is_upstreams(records, commit):
    t_steps = of(records, commit, "wide")["t_steps"].numpy()
    assert t_steps.shape == (19,) and t_steps[-1] == 0
    np.testing.assert_allclose(edm(18, 0.002, 80).values, t_steps, rtol=1e-12, atol=0)
    assert np.abs(edm(18, 0.002, 80, rho=7.000001).values[:-1] / t_steps[:-1] - 1).max() > 1e-12


@VERSION
def test_a_grid_is_used_as_it_is(records, commit, folder):
    record = of(records, commit, "file of 9")
    assert np.array_equal(record["t_steps"].numpy(), load_grid(folder / "of9.npy").values)
    assert record["t_steps"].dtype == record["samples"].dtype == torch.float64
    assert of(records, commit, "one step")["t_steps"].tolist() == [80.0, 0.0]
    assert of(records, commit, "one step")["samples"].isfinite().all()


@VERSION
def test_steps_resample_the_grid(records, commit):
    resampled, as_file, of_9 = of(records, commit, "resampled", "file of 6", "file of 9")
    assert equal(resampled, as_file) and len(resampled["t_steps"]) == 7
    assert not torch.equal(resampled["samples"], of_9["samples"])
    assert "from 9 to 6 steps" in resampled["output"] and "Resampled" not in as_file["output"] + of_9["output"]


@VERSION
@pytest.mark.parametrize("name, parts", [
    ("low ve", ["sigma = 0.002", "below the network's sigma_min = 0.02", "--sigma-min=0.02"]),
    ("fine iddpm", ["steps 1 and 2", "the same noise level", "use fewer steps"]),
])
def test_a_grid_that_does_not_suit_the_network_is_refused_before_the_first_batch(records, commit, name, parts):
    record = of(records, commit, name)
    assert record["exit_code"] == 2 and record["samples"] is None and "Generating" not in record["output"]
    assert all(part in record["output"] for part in [*parts, "--schedule="]) and "Traceback" not in record["output"]
    suitable = of(records, commit, name.replace("iddpm", "ve") if "fine" in name else "low vp")
    assert suitable["exit_code"] == 0 and suitable["samples"] is not None


@VERSION
@pytest.mark.parametrize("solver", ["heun", "euler"])
def test_called_from_python_a_list_of_levels_brings_its_number_of_steps(records, commit, solver):
    api, cli = of(records, commit, f"api {solver}", f"cli {solver}")
    assert api["exit_code"] is None, api["output"]  # S_churn / num_steps and the last step depend on it
    assert torch.equal(api["samples"], cli["samples"])


@VERSION
def test_called_from_python_contradictions_are_value_errors(records, commit):
    ablation, ascending = of(records, commit, "api ablation", "api no grid")
    assert "schedule = 'vp'" in ablation["exit_code"] and "leave these arguments out" in ablation["exit_code"]
    assert "values ascend" in ascending["exit_code"] and ascending["samples"] is None


@VERSION
def test_help_and_the_modules_it_takes(records, commit):
    text = " ".join(of(records, commit, "help")["output"].split())
    assert "--schedule vp|ve|linear|FILE.npy Noise levels from FILE.npy" in text
    ours = [name for name in records["modules"] if name.startswith("art_edm")]
    assert ours == ["art_edm", *(f"art_edm.{name}" for name in (  # 30 ms beside torch, which the script takes itself
        "grids", "grids.grid", "grids.weights", "models", "models.denoiser", "models.evaluate", "runtime",
        "runtime.errors", "runtime.files", "runtime.memory", "runtime.precision", "sampling", "sampling.multistep",
        "sampling.solvers", "sampling.weighted", "upstream"))]


def test_two_processes_fail_alike_and_make_the_images_of_one(folder, scripts):
    patched = next(iter(scripts.values()))[1]

    def job(network, grid, out, *more):
        return {"script": patched, "argv": [f"--network={folder}/{network}.pkl", "--seeds=0-4", "--batch=2",
                                            f"--schedule={grid}", f"--outdir={folder}/{out}", *more]}

    good = folder / "of9.npy"
    jobs = {"good": job("edm", good, "two"), "other": job("edm", good, "other", "--steps=3"),
            "absent": job("edm", "absent.npy", "bad"), "low": job("ve", good, "bad")}
    both = run_jobs(upstream("edm"), jobs, folder, processes=2)
    alone = run_jobs(upstream("edm"), {"good": job("edm", good, "one")}, folder)
    codes = {name: [process[name]["exit_code"] for process in both] for name in jobs}
    assert codes == {"good": [0, 0], "other": [0, 0], "absent": [2, 2], "low": [2, 2]}
    assert all("sigma_min = 0.02" in process["low"]["output"] for process in both) and not (folder / "bad").exists()
    assert ["Resampled" in process["other"]["output"] for process in both] == [True, False]
    one, two, other = (images(folder / out) for out in ("one", "two", "other"))
    assert one == two != other and len(set(one)) == 5 and alone[0]["good"]["exit_code"] == 0
