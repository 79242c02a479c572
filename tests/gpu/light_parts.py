"""The parts of first light, each a function of a `Light`; run by `first_light` as python -m tests.gpu.light_parts."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import torch
from cost.measure import profile_share
from cost.networks import SIZES
from PIL import Image

from art_edm.grids.clocks import make_clock
from art_edm.grids.grid import edm, load_grid, save_grid
from art_edm.measure.dense_paths import PathOptions, measure_along
from art_edm.models.analytic import GaussianDenoiser
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.models.nvlabs import NetworkDenoiser
from art_edm.runtime.files import write_json
from art_edm.schedule import ScheduleOptions, learn_schedule
from tests.support import survival
from tests.support.fid_standin import StandIn, save_pickle

ROOT = Path(__file__).resolve().parents[2]
RELATIVE_BAR = 1e-3  # relative, of the GPU's figures to the CPU's
SMALL = {  # in place of the official sizes
    "songunet56m": dict(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1),
    "adm296m": dict(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1, label_dim=10),
    "edm2xs": dict(img_resolution=8, model_channels=8, channel_mult=[1, 2], num_blocks=1, label_dim=10),
}
FIGURES = ("evaluations", "seconds", "evaluations_by_stage", "seconds_by_stage", "device")  # of a grid's record
MAKE = """
import importlib, json, pickle, sys, torch
from cost.networks import fill_zeros
for path, module, kind, options in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    net = getattr(importlib.import_module(module), kind)(**options).eval().requires_grad_(False)
    fill_zeros(net)
    rgb = 'edm2' in module and options['img_channels'] == 3
    more = dict(encoder=importlib.import_module('training.encoders').StandardRGBEncoder()) if rgb else {}
    with open(path, 'wb') as file:
        pickle.dump(dict(ema=net, **more), file)
"""


class Skipped(Exception):
    """Why a part cannot run here."""


class Light:
    """What a part is given, and what it found.

    Attributes:
        work: folder of the part.
        small: networks a hundredth as wide.
        short: options of a short training, in a rehearsal.
        found, checks: as in the report.
    """

    def __init__(self, name: str, settings: Dict[str, Any]) -> None:
        self.out, self.device, self.small = Path(settings["out"]), settings["device"], settings["scale"] == "small"
        self.folders, self.work = {key: settings[key] for key in ("edm", "edm2")}, self.out / "work" / name
        self.found: Dict[str, Any] = {}
        self.checks: Dict[str, List[Any]] = {}
        self.cuda, self.short = self.device == "cuda", {"iterations": 20} if self.small else {}
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir(parents=True)

    def check(self, name: str, found: Any, bar: str, met: bool) -> None:
        """Hold a figure to a bar."""
        shown = found if not isinstance(found, float) else float(f"{found:.3g}") if np.isfinite(found) else str(found)
        self.checks[name] = [shown, bar, bool(met)]

    def close(self, name: str, found: float, bar: float = RELATIVE_BAR) -> None:
        """A relative difference."""
        self.check(name, float(found), f"at most {bar:g}", found <= bar)

    def checkout(self, name: str) -> Path:
        """Of NVlabs' edm or edm2."""
        if self.folders[name] is None:
            raise Skipped(f"no checkout of {name}: give --{name}")
        return Path(self.folders[name])

    def run(self, *command: Any, path: Any = "", expected: int = 0, **environment: str) -> None:
        """A command of its own process; what it says goes to the log."""
        print("$", *command, flush=True)
        env = {**os.environ, "PYTHONPATH": f"{path}", "PYTHONDONTWRITEBYTECODE": "1", **environment}
        code = subprocess.run([sys.executable, *map(str, command)], cwd=self.work, env=env).returncode
        if code != expected:
            raise RuntimeError(f"found exit code {code} of {Path(str(command[0])).name}, expected {expected}")

    def tool(self, name: str, *args: str) -> None:
        """One of tools/ on the device."""
        self.run(ROOT / "tools" / f"{name}.py", *args, f"--device={self.device}", path=ROOT)

    def network(self, name: str) -> str:
        """The pickle that the part `networks` made."""
        if name == "mnist":
            return name
        path = self.out / "networks" / f"{name}.pkl"
        if not path.exists():
            raise Skipped(f"{path.name} was not made: run the part networks before")
        return str(path)


def levels(path: Path) -> np.ndarray:
    """Those of a grid but the last, which is 0."""
    return load_grid(path).values[:-1]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """The largest relative distance of two grids' levels."""
    return float(np.abs(one / other - 1).max())


# --- the parts -----------------------------------------------------------------------------------------


def tests(light: Light) -> None:
    """The unit tests marked gpu; on a CPU, those that run on both."""
    where = [ROOT / "tests", "-m", "gpu"] if light.cuda else [ROOT / "tests" / "gpu" / "test_device.py"]
    light.run("-m", "pytest", "-q", *where, "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c",
              ROOT / ".pytest.ini", path=ROOT)


def networks(light: Light) -> None:
    """Pickles of NVlabs' classes, as their training writes them, with random weights."""
    folder = light.out / "networks"
    folder.mkdir(exist_ok=True)
    tiny = dict(SIZES["songunet56m"].options, **SMALL["songunet56m"])
    rgb = dict(SIZES["edm2xs"].options, **SMALL["edm2xs"], img_channels=3)
    wanted = {name: size._replace(options={**size.options, **(SMALL[name] if light.small else {})})
              for name, size in SIZES.items()}
    wanted["fp16"] = SIZES["songunet56m"]._replace(options={**tiny, "use_fp16": True})
    wanted["fp32"] = SIZES["songunet56m"]._replace(options=tiny)
    wanted["edm2rgb"] = SIZES["edm2xs"]._replace(options=rgb)
    for repository in filter(light.folders.get, light.folders):
        jobs = [(str(folder / f"{name}.pkl"), file.partition("/")[2][:-3].replace("/", "."), kind, options)
                for name, (file, kind, options) in wanted.items() if file.startswith(f"{repository}/")]
        light.run("-c", MAKE, json.dumps(jobs),
                  path=os.pathsep.join(map(str, (light.checkout(repository), ROOT, ROOT / "tools"))))
    light.found.update({path.stem: path.stat().st_size for path in sorted(folder.iterdir())})
    if not light.found:
        raise Skipped("no checkouts: give --edm and --edm2")


def schedule(light: Light, name: str) -> None:
    """train_schedule.py, and what its evaluations cost beside the network alone."""
    path = light.network(name)
    short = [f"--{key}={value}" for key, value in light.short.items()]
    light.tool("train_schedule", f"--network={path}", "--steps=5,18", "--out=art{steps}.npy", *short)
    record = json.loads((light.work / "art18.json").read_text())
    after = record["seconds"] - record["seconds_by_stage"]["load"]
    light.found.update(run={key: record[key] for key in FIGURES}, seconds_after_load=after)
    denoiser = load_network(path, light.device).denoiser
    light.found["parameters"] = sum(value.numel() for value in denoiser.parameters())
    share = profile_share(denoiser, 16, 24, batch=8)
    light.found.update(profile=share, networks_share=1 / share["share_wall"], **waits(light, denoiser))
    if light.cuda:
        light.found["peak_bytes"] = torch.cuda.max_memory_allocated()
    if light.cuda and name == "songunet56m" and not light.small:
        light.check("seconds after load", after, "at most 20", after <= 20)
        light.check("network's own share", 1 / share["share_wall"], "at least 0.9", share["share_wall"] <= 1 / 0.9)
    light.close("denoiser to the CPU's", against_cpu(denoiser, path))
    if name == "mnist":
        options = ScheduleOptions(device="cpu", **light.short)
        light.close("grid to the CPU's", distance(levels(light.work / "art18.npy"),
                                              learn_schedule(path, (18,), options)[18].grid.values[:-1]))


def noise(denoiser: Denoiser, count: int) -> Any:
    """Unit noise, float64, and labels, on the denoiser's device."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(count, *denoiser.img_shape, generator=generator, dtype=torch.float64)
    return latents.to(denoiser.device), denoiser.draw_labels(count, generator)


def against_cpu(denoiser: Denoiser, path: str) -> float:
    """The largest distance of D to that on a CPU, relative to its RMS, for two images at three levels."""
    worst, (latents, labels) = 0.0, noise(denoiser, 2)
    there = load_network(path, "cpu").denoiser
    for level in (0.02, 0.5, 20.0):
        with torch.inference_mode():
            found = denoiser(latents * level, level, labels).cpu()
            expected = there(latents.cpu() * level, level, None if labels is None else labels.cpu())
        worst = max(worst, float((found - expected).abs().max() / expected.square().mean().sqrt()))
    return worst


def waits(light: Light, denoiser: Denoiser) -> Dict[str, Any]:
    """How often the host waits in a profile of 12 and of 24 levels: as often, as none is in the loop."""
    kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if light.cuda else [])]

    def count(points: int) -> Dict[str, int]:
        latents, _ = noise(denoiser, 8)
        labels = denoiser.draw_labels(8, torch.Generator().manual_seed(0))
        options = PathOptions(labels, 8)
        clock = make_clock("gaussian", denoiser.sigma_max, denoiser.sigma_data)
        with torch.profiler.profile(activities=kinds) as seen:
            measure_along(denoiser, latents, clock, points, options)
        wanted = ("Synchronize", "Memcpy DtoH", "Memcpy HtoD")
        return {item.key: item.count for item in seen.key_averages() if any(word in item.key for word in wanted)}

    few, many = count(12), count(24)
    total = [sum(number for key, number in each.items() if "Synchronize" in key) for each in (few, many)]
    if not light.cuda:
        return {"host_synchronisations": "not applicable: a CPU"}
    light.check("host synchronisations of 12 and 24 levels", total, "equal, above 0", total[0] == total[1] > 0)
    return {"host_synchronisations": {"12 levels": few, "24 levels": many}}


def refine(light: Light) -> None:
    """--refine at K = 5."""
    for name in ("songunet56m",) if light.small else ("mnist", "songunet56m"):
        path = light.network(name)
        light.tool("train_schedule", f"--network={path}", "--steps=5", "--refine", f"--out={name}.npy",
                   "--method=direct")
        record = json.loads((light.work / f"{name}.json").read_text())
        before, after = (record["refined"][key]["mean"] for key in ("error_before", "error_after"))
        light.found[name] = {key: record[key] for key in FIGURES}
        light.check(f"{name}: error after over before", after / before, "at most 1", after <= before)


def generate(light: Light, name: str, script: str, network: str) -> None:
    """NVlabs' script as a user runs it: unpatched, patched without a grid, and with two."""
    path, option = light.network(network), "--network" if name == "edm" else "--net"
    for kind in ("original", "patched"):
        shutil.copytree(light.checkout(name), light.work / kind, ignore=shutil.ignore_patterns(".git", "docs"))
    patch = ROOT / "tools" / "patch_upstream.py"
    light.run(patch, light.work / "patched", path=ROOT)
    light.run(patch, light.work / "original", "--revert", path=ROOT)
    save_grid(light.work / "same.npy", edm(5, 0.002, 80), {})
    save_grid(light.work / "other.npy", edm(5, 0.002, 80, rho=5), {})
    shim = [] if light.cuda else [ROOT / "tests" / "support" / "shim.py"]  # the scripts hard-code CUDA and NCCL

    def images(kind: str, *more: str) -> List[bytes]:
        folder = light.work / f"images-{len(list(light.work.glob('images-*')))}"
        began = time.perf_counter()
        paths = os.pathsep.join(map(str, (light.work / kind, ROOT)))
        light.run(*shim, light.work / kind / script, f"{option}={path}", f"--outdir={folder}", "--seeds=0-7",
                  "--batch=4", *more, path=paths)
        light.found[f"{kind} {' '.join(more)}".replace(str(light.work), "")] = time.perf_counter() - began
        return [image.read_bytes() for image in sorted(folder.rglob("*.png"))]

    plain, ours = images("original", "--steps=5"), images("patched", "--steps=5")
    light.check("images", len(plain), "8", len(plain) == 8)
    light.check("patched without a grid", plain == ours, "bit-identical", plain == ours)
    if plain != ours:
        light.found["original is itself again"] = plain == images("original", "--steps=5")
    same = images("patched", f"--schedule={light.work / 'same.npy'}")
    light.check("EDM's rule as a grid", same == plain, "bit-identical", same == plain)
    other = images("patched", f"--schedule={light.work / 'other.npy'}")
    changed = len(other) == 8 and other != plain
    light.check("another grid", changed, "8 other images", changed)


def fid(light: Light) -> None:
    """fid.py ref, calc and gen with a stand-in detector, against the same on the CPU."""
    detector = save_pickle(light.work / "detector.pkl", StandIn(3 * 28 * 28, 16))
    generator = np.random.default_rng(0)
    for folder, least in (("data", 0), ("images", 40)):
        (light.work / folder).mkdir()
        for i, pixels in enumerate(generator.integers(least, 256, (64, 28, 28, 3), dtype=np.uint8)):
            Image.fromarray(pixels).save(light.work / folder / f"{i:03d}.png")
    common = [f"--detector={detector}", "--trust-pickle", "--quiet"]
    light.tool("fid", "ref", "--data=data", "--dest=ref.npz", *common)
    values: Dict[str, Dict[str, float]] = {}
    device = light.device
    for light.device in (device, "cpu"):
        began, name = time.perf_counter(), light.device
        light.tool("fid", "calc", "--images=images", "--ref=ref.npz", "--num=64", f"--out={name}-calc.json", *common)
        light.tool("fid", "gen", "--network=mnist", "--grid=edm", "--steps=5", "--num=64", "--ref=ref.npz",
                   "--reference-error", "--error-noises=32", "--error-steps=10", f"--cache=cache-{name}",
                   f"--out={name}-gen.json", *common)
        row = json.loads((light.work / f"{name}-gen.json").read_text())["rows"][0]
        values[name] = {"calc": json.loads((light.work / f"{name}-calc.json").read_text())["fid"], "gen": row["fid"],
                        "error": row["error_rms"]}
        light.found[name] = {**values[name], "seconds": time.perf_counter() - began}
    light.device = device
    for key, value in values[device].items():
        light.close(f"{key} to the CPU's", abs(value / values["cpu"][key] - 1))


def processes(light: Light) -> None:
    """Two processes on one device, which sum by Gloo."""
    script = ROOT / "tools" / "train_schedule.py"
    common = ["--network=mnist", f"--device={light.device}", "--method=direct"]
    light.run(script, *common, "--out=one.npy", path=ROOT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(2):
        env = {**os.environ, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
               "MASTER_ADDR": "127.0.0.1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(script), *common, "--out=two.npy"]
        running.append(subprocess.Popen(command, cwd=light.work, env=env))
    codes = [process.wait() for process in running]
    light.check("exit codes", codes, "[0, 0]", codes == [0, 0])
    record = json.loads((light.work / "two.json").read_text())
    light.found.update(processes=record["processes"], run_seconds=record["seconds"])  # of both, beside each other
    light.close("grid to that of one process", distance(levels(light.work / "two.npy"), levels(light.work / "one.npy")))


class Hungry(GaussianDenoiser):
    """For more than two images it takes more memory than there is."""

    largest = 0

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        """D, or the allocator's own error."""
        torch.empty(1 << 55 if len(x) > 2 else 1, dtype=torch.uint8, device=x.device)
        self.largest = max(self.largest, len(x))
        return super().denoise(x, sigma, class_labels)


def oom(light: Light) -> None:
    """Memory that runs out, in the profile and in the refinement: smaller batches, the same grid."""
    options = ScheduleOptions(device=light.device, method="direct", refine=True, trajectories=8)
    net, grids = Hungry(0.0, 0.25, (1, 8, 8)), {}
    for kind, denoiser in (("hungry", net), ("plain", GaussianDenoiser(0.0, 0.25, (1, 8, 8)))):
        grids[kind] = learn_schedule(denoiser.to(light.device), (3,), options)[3].grid.values[:-1]
    light.check("largest batch that fitted", net.largest, "2", net.largest == 2)
    light.close("grid to that with memory enough", distance(grids["hungry"], grids["plain"]))


def interrupt(light: Light) -> None:
    """Ctrl-C while it learns, and the same command again."""
    args = ["--network=mnist", "--out=a.npy", f"--iterations={50 if light.small else 1000}", f"--device={light.device}"]
    whole, stopped = light.work / "whole", light.work / "stopped"
    whole.mkdir()
    stopped.mkdir()
    process = survival.command(stopped, args)
    while "rl" not in survival.stages(stopped) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    light.found["said"] = said.strip()[-300:]
    first = process.returncode
    light.check("exit code of the stopped", first, "1", first == 1)
    light.check("no traceback", "Traceback" not in said, "True", "Traceback" not in said)
    codes = [survival.finished(folder, args)[0] for folder in (stopped, whole)]
    light.check("exit codes of the others", codes, "[0, 0]", codes == [0, 0])
    same = survival.grids(stopped) == survival.grids(whole)
    light.check("continued grid", same, "the bytes of one that was not stopped", same)


def fp16(light: Light) -> None:
    """A network made for float16: learned for in float32, and sampled in float16 where one asks for that."""
    options = ScheduleOptions(device=light.device, method="direct")
    grids = [learn_schedule(light.network(name), (18,), options)[18].grid.values[:-1] for name in ("fp16", "fp32")]
    light.close("grid to that of its float32 twin", distance(*grids), 0.0)
    half = load_network(light.network("fp16"), light.device).denoiser
    (latents, labels), outputs = noise(half, 4), []
    for denoiser in (half, NetworkDenoiser(half.net, fp32=False)):
        with torch.inference_mode():
            outputs.append(denoiser(latents, 1.0, labels))
    error = float((outputs[1] - outputs[0]).abs().max() / outputs[0].abs().max())
    light.close("float16 to float32", error, 0.02)
    if light.cuda:
        light.check("float16 is used", error, "above 0", error > 0)


PARTS: Dict[str, Callable[[Light], None]] = {
    "tests": tests, "networks": networks, "refine": refine, "fid": fid, "processes": processes, "oom": oom,
    "interrupt": interrupt, "fp16": fp16,
    "generate-edm": lambda light: generate(light, "edm", "generate.py", "songunet56m"),
    "generate-edm2": lambda light: generate(light, "edm2", "generate_images.py", "edm2rgb"),
    **{f"schedule-{name}": lambda light, name=name: schedule(light, name) for name in ("mnist", *SIZES)},
}


def main(name: str, settings: str, result: str) -> None:
    """Run a part and write its result."""
    light, status, reason = Light(name, json.loads(settings)), "passed", {}
    try:
        PARTS[name](light)
        if not all(met for _, _, met in light.checks.values()):
            status = "failed"
    except Skipped as error:
        status, reason = "skipped", {"reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        status, reason = "failed", {"reason": f"{type(error).__name__}: {error}"}
    write_json(Path(result), {"status": status, **reason, "checks": light.checks, **light.found})


if __name__ == "__main__":
    main(*sys.argv[1:])
