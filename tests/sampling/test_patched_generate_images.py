"""NVlabs/edm2's generate_images.py, every version, patched: the same without a grid, a grid as it is with one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.grids.grid import Grid, edm, load_grid, read_off, save_grid
from tests.support.patched import COMMITS, images, make_networks, of, script_pairs
from tests.support.shim import run_jobs
from tests.support.upstream import upstream

VERSION = pytest.mark.parametrize("commit", COMMITS["edm2"])
CHURN = ["--S_churn=40", "--S_min=0.05", "--S_max=50", "--S_noise=1.003"]

# Without a .npy: name -> arguments, and whether guided. All are run by the original and by the patched script.
PLAIN = {
    "default": ([], False), "churn": (["--S_churn=40"], False), "churn range": (CHURN, False),
    "guided": (["--guidance=2"], True), "guided churn": (["--guidance=2", *CHURN], True),
    "rho": (["--rho=3"], False), "range": (["--sigma_min=0.1", "--sigma_max=10"], False),
    "class": (["--class=1"], False),
}
# With the noise levels of `default` as a grid; equal to the plain run of that name.
SAME = {name: PLAIN[name] for name in ("default", "churn", "churn range", "guided", "guided churn")}

FROM_PYTHON = """
from torch_utils import distributed
distributed.init()
images = script.generate_images({net!r}, gnet={gnet!r}, seeds=[0, 1, 2], guidance=2, grid={grid}, {arguments})
try:
    for batch in images:
        pass
except ValueError as error:
    record['exit_code'] = str(error)
"""

pytestmark = pytest.mark.upstream


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate_images")
    make_networks("edm2", folder)
    save_grid(folder / "of9.npy", edm(9, 0.002, 80, rho=5), {})
    save_grid(folder / "of6.npy", read_off(edm(9, 0.002, 80, rho=5), 6), {})
    # neighbours that float64 tells apart and float32 does not
    save_grid(folder / "close.npy", Grid([80.0, 1.0, 1.0 - 1e-9, 0.03, 0.0]), {})
    save_grid(folder / "huge.npy", Grid([1e39, 1.0, 0.0]), {})
    save_grid(folder / "tiny.npy", Grid([80.0, 1.0, 1e-60, 0.0]), {})
    return folder


@pytest.fixture(scope="module")
def scripts(folder):
    return script_pairs("edm2", folder / "scripts")


@pytest.fixture(scope="module")
def records(folder, scripts):
    """All runs of this file, in one process."""
    jobs = {}
    for commit, (original, patched) in scripts.items():

        def add(name, script, *more, guided=False, steps=("--steps=5",), commit=commit, **settings):
            argv = [f"--net={folder}/main.pkl", f"--outdir={folder}/out", "--seeds=0-2", "--batch=2"]
            guide = [f"--gnet={folder}/guiding.pkl"] if guided else []
            jobs[f"{commit} {name}"] = {"script": script, "argv": [*argv, *guide, *steps, *more], **settings}

        for name, (arguments, guided) in PLAIN.items():
            saved = {"save_grid": f"{folder}/default-{commit}.npy"} if name == "default" else {}
            add(f"original {name}", original, *arguments, guided=guided, **saved)
            add(f"patched {name}", patched, *arguments, guided=guided)
        for name, (arguments, guided) in SAME.items():
            schedule = f"--schedule={folder}/default-{commit}.npy"
            add(f"grid {name}", patched, schedule, *arguments, guided=guided, steps=())
        add("resampled", patched, f"--schedule={folder}/of9.npy", steps=["--steps=6"])
        for name in ("of6", "of9", "close", "huge", "tiny"):
            add(name, patched, f"--schedule={folder}/{name}.npy", steps=())
        add("vp", patched, "--schedule=vp")
        add("rho grid", patched, f"--schedule={folder}/of9.npy", "--rho=7")
        add("absent", patched, "--schedule=absent.npy", "--preset=edm2-img512-s-fid", "--net=absent.pkl")
        add("cli guided", patched, f"--schedule={folder}/of9.npy", "--guidance=2", "--S_churn=40", "--batch=3",
            guided=True, steps=())
        for name, grid in [("api", load_grid(folder / "of9.npy").values.tolist()), ("api bad", [80.0, 1.0, 1.0, 0.0])]:
            snippet = FROM_PYTHON.format(net=f"{folder}/main.pkl", gnet=f"{folder}/guiding.pkl", grid=grid,
                                         arguments="S_churn=40")
            if name == "api bad":  # generate_images checks the grid once the network is there
                snippet = f"try:\n    {snippet.strip().splitlines()[2]}\nexcept ValueError as error:\n" \
                          "    record['exit_code'] = str(error)\n"
            jobs[f"{commit} {name}"] = {"script": patched, "python": snippet}
        add("help", patched, "--help")
    return run_jobs(upstream("edm2"), jobs, folder)[0]


def equal(a, b):
    """Both ran, and their samples are the same to the bit."""
    assert a["exit_code"] == b["exit_code"] == 0, a["output"] + b["output"]
    assert a["samples"].isfinite().all() and a["samples"].std() > 0.1
    return torch.equal(a["samples"], b["samples"])


@VERSION
@pytest.mark.parametrize("name", PLAIN)
def test_without_a_grid_nothing_changes(records, commit, name):
    original, patched = of(records, commit, f"original {name}", f"patched {name}")
    assert equal(original, patched)
    if name != "default":
        assert not torch.equal(patched["samples"], of(records, commit, "original default")["samples"])


@VERSION
@pytest.mark.parametrize("name", SAME)
def test_the_default_levels_as_a_grid_give_the_default_samples(records, commit, name):
    original, grid = of(records, commit, f"original {name}", f"grid {name}")
    assert equal(original, grid) and torch.equal(original["t_steps"], grid["t_steps"])
    assert not torch.equal(grid["samples"], of(records, commit, "original rho")["samples"])


@VERSION
def test_a_grid_is_used_as_it_is_in_float32(records, commit, folder):
    record, values = of(records, commit, "of9"), load_grid(folder / "of9.npy").values
    assert record["t_steps"].dtype == record["samples"].dtype == torch.float32
    assert np.array_equal(record["t_steps"].numpy(), values.astype(np.float32))
    assert not np.array_equal(record["t_steps"].numpy(), np.nextafter(values.astype(np.float32), np.float32(0)))


@VERSION
def test_steps_resample_the_grid(records, commit):
    resampled, as_file, of_9 = of(records, commit, "resampled", "of6", "of9")
    assert equal(resampled, as_file) and len(resampled["t_steps"]) == 7
    assert not torch.equal(resampled["samples"], of_9["samples"])
    assert "from 9 to 6 steps" in resampled["output"] and "Resampled" not in as_file["output"] + of_9["output"]


@VERSION
@pytest.mark.parametrize("name, parts", [
    ("close", ["steps 1 and 2", "the same noise level", "use fewer steps"]),
    ("tiny", ["steps 2 and 3 (sigma = 1e-60 and 0)", "the same noise level"]),
    ("huge", ["sigma = 1e+39 is too large for the sampler's precision"]),
])
def test_a_grid_that_float32_does_not_hold_is_refused_before_the_first_batch(records, commit, name, parts):
    record = of(records, commit, name)
    assert record["exit_code"] == 2 and record["samples"] is None and "Generating" not in record["output"]
    assert all(part in record["output"] for part in [*parts, "--schedule="]) and "Traceback" not in record["output"]


@VERSION
@pytest.mark.parametrize("name, part", [
    ("vp", "found 'vp', expected the name of a .npy file"),
    ("rho grid", "found --rho together with a grid"),
    ("absent", "absent.npy: found no readable file"),
])
def test_mistakes_are_found_before_a_network_is_opened(records, commit, name, part):
    record = of(records, commit, name)
    assert record["exit_code"] == 2 and part in record["output"] and "Loading" not in record["output"]


@VERSION
def test_called_from_python(records, commit):
    api, bad, cli = of(records, commit, "api", "api bad", "cli guided")
    assert api["exit_code"] is None and torch.equal(api["samples"], cli["samples"])
    assert "found 1 twice, at steps 1 and 2" in bad["exit_code"] and bad["samples"] is None


@VERSION
def test_help_and_the_modules_it_takes(records, commit):
    assert "--schedule FILE.npy Noise levels from FILE.npy" in " ".join(of(records, commit, "help")["output"].split())
    ours = [name for name in records["modules"] if name.startswith("art_edm")]
    assert ours == ["art_edm", *(f"art_edm.{name}" for name in (  # 30 ms beside torch, which the script takes itself
        "grids", "grids.grid", "grids.weights", "models", "models.denoiser", "models.evaluate", "runtime",
        "runtime.errors", "runtime.files", "runtime.memory", "runtime.precision", "sampling", "sampling.multistep",
        "sampling.solvers", "sampling.weighted", "upstream"))]


def test_two_processes_fail_alike_and_make_the_images_of_one(folder, scripts):
    patched = next(iter(scripts.values()))[1]

    def job(grid, out, *more):
        return {"script": patched, "argv": [f"--net={folder}/main.pkl", "--seeds=0-4", "--batch=2", "--guidance=2",
                                            f"--gnet={folder}/guiding.pkl", f"--schedule={folder}/{grid}.npy",
                                            f"--outdir={folder}/{out}", *more]}

    jobs = {"good": job("of9", "two"), "other": job("of9", "other", "--steps=3"), "close": job("close", "bad"),
            "absent": job("absent", "bad")}
    both = run_jobs(upstream("edm2"), jobs, folder, processes=2)
    run_jobs(upstream("edm2"), {"good": job("of9", "one")}, folder)
    codes = {name: [process[name]["exit_code"] for process in both] for name in jobs}
    assert codes == {"good": [0, 0], "other": [0, 0], "close": [2, 2], "absent": [2, 2]}
    assert all("the same noise level" in process["close"]["output"] for process in both)
    assert ["Resampled" in process["other"]["output"] for process in both] == [True, False]
    one, two, other = (images(folder / out) for out in ("one", "two", "other"))
    assert one == two != other and len(set(one)) == 5 and not (folder / "bad").exists()
