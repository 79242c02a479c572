"""Other projects' grids, made by their own code, beside ours: one network, the same noises, one run.

Symbols
-------
levels   a grid as its authors use it, descending; GITS and DM-NonUniform end at sigma_min, SDM and ours at 0
theirs   the authors' solver on their levels, by their code where they have one
ours     a solver of this project on the same levels, the last of which becomes 0
error    RMS over pixels between an end point and the exact one from the same noise; mean and RMS over noises
FID      Frechet distance of the bundled judge's features to those of the training images: LeNet-FID or CIFAR-FID

--peers is a folder with checkouts: diff-sampler (zju-pi), DM-NonUniform (scxue), sdm (aiimaginglab; needs diffusers).
A peer that is not there is skipped with its reason. Each has a process of its own, as their modules share names.
The exact ends of the judging noises are kept beside --out, and computed once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import click
import numpy as np
import torch
from networks.cifar10 import load_cifar10

from art_edm.grids.grid import Grid, edm, load_grid
from art_edm.measure.field import rms
from art_edm.metrics.detectors import load_detector
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.mnist import load_mnist
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.pickles.archives import load_tensors
from art_edm.runtime.files import save_tensors, write_json
from art_edm.sampling.solvers import sample
from tests.benchmarks.refine_search import search

SEEDS = {"judge": 31001, "make": 31002, "images": 31003}
TEACHER, WARMUP, COEFFICIENT = 61, 256, 1.15  # GITS's own settings for CIFAR-10
SEARCHED, EACH, ITERATIONS = 64, 8, 500  # of the gradient search: noises, of a step, steps
FINE = 100  # Heun steps of the exact solution
BATCH = 128


class Net(torch.nn.Module):
    """A denoiser as the peers call it: upstream's network."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser, (self.img_channels, self.img_resolution, _) = denoiser, denoiser.img_shape
        self.label_dim, self.sigma_min, self.sigma_max = denoiser.label_dim, denoiser.sigma_min, denoiser.sigma_max
        self.device_of = torch.nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x: torch.Tensor, sigma: Any, class_labels: Any = None, **_: Any) -> torch.Tensor:
        level = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1)
        level = level[0] if len(level) == 1 or bool((level == level[0]).all()) else level
        return self.denoiser(x, level, class_labels).to(x.dtype)

    def round_sigma(self, sigma: Any) -> torch.Tensor:
        return torch.as_tensor(sigma)


def noise(denoiser: Denoiser, which: str, count: int) -> torch.Tensor:
    """Unit noise of one purpose, [count, C, H, W] float64."""
    generator = torch.Generator().manual_seed(SEEDS[which])
    return torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)


# --- the peers: each gives levels for a number of evaluations, and perhaps a solver ---------------------------


class Gits:
    """Dynamic programming over a teacher's trajectories; iPNDM of order 4, ends at sigma_min."""

    def __init__(self, folder: Path, net: Net) -> None:
        sys.path.insert(0, str(folder / "diff-sampler" / "gits-main"))
        import gits_utils
        import solvers

        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        self.net, self.utils, self.solvers = net, gits_utils, solvers

    def levels(self, nfe: int) -> np.ndarray:
        torch.manual_seed(SEEDS["make"])
        settings = dict(
            dataset_name="cifar10", num_warmup=WARMUP, max_batch_size=WARMUP, sigma_min=self.net.sigma_min,
            sigma_max=self.net.sigma_max, num_steps=nfe + 1, num_steps_tea=TEACHER, schedule_type="polynomial",
            schedule_rho=7, afs=False, metric="dev", coeff=COEFFICIENT, model_source="edm", solver="ipndm",
            solver_tea="euler", prompt=None)
        chosen = self.utils.get_dp_list(self.net, torch.device("cpu"), **settings)
        return self._rule()[chosen].double().numpy()

    def _rule(self) -> torch.Tensor:
        return self.solvers.get_schedule(TEACHER, self.net.sigma_min, self.net.sigma_max, device="cpu")

    def sample(self, latents: torch.Tensor, levels: np.ndarray) -> torch.Tensor:
        return self.solvers.ipndm_sampler(self.net, latents, t_steps=torch.from_numpy(levels), max_order=4)


class DmNonUniform:
    """An error bound of UniPC, minimised without a network; UniPC-3 (bh2), ends at sigma_min."""

    def __init__(self, folder: Path, net: Net) -> None:
        self.source = (folder / "DM-NonUniform" / "step_optim.py").read_text()
        sys.path.insert(0, str(folder / "diff-sampler" / "gits-main"))
        import solvers

        self.net, self.solvers = net, solvers

    def levels(self, nfe: int) -> np.ndarray:
        constant = "truncNum = 3" if nfe <= 7 else "truncNum = 0"  # as the comment beside it asks for
        module = SimpleNamespace(__name__="step_optim")
        exec(self.source.replace("truncNum = 3", constant), module.__dict__)
        schedule = module.NoiseScheduleVP("linear", dtype=torch.float64)
        optimum = module.StepOptim(schedule)
        top, end = (schedule.edm_inverse_sigma(torch.tensor(s, dtype=torch.float64)).reshape(-1)
                    for s in (self.net.sigma_max, self.net.sigma_min))
        optimum.T = top
        _, log_snr = optimum.get_ts_lambdas(nfe, end, "unif")
        return np.exp(-np.asarray(log_snr, np.float64))

    def sample(self, latents: torch.Tensor, levels: np.ndarray) -> torch.Tensor:
        return self.solvers.unipc_sampler(
            self.net, latents, t_steps=torch.from_numpy(levels), num_steps=len(levels), max_order=3)


class Sdm:
    """Steps of a bounded Wasserstein distance, resampled to so many; Euler, ends at 0."""

    def __init__(self, folder: Path, net: Net) -> None:
        sys.path.insert(0, str(folder / "sdm"))
        from modules import sampler, utils

        self.net, self.sampler, self.utils = net, sampler, utils
        latents = noise(net.denoiser, "make", BATCH)
        common = dict(rho=7.0, solver="euler", discretization="edm")
        ends = (net.sigma_min, net.sigma_max)
        _, self.path, _ = sampler.ablation_sampler_adaptive_scheduling(
            net, latents, None, torch.randn_like, 40, *ends, eta_min=0.02, eta_max=0.20, eta_p=1.0, use_grid_snap=False,
            **common)
        log = sampler.calc_wasserstein_bound(
            net, latents, num_steps=len(self.path) - 1, sigma_min=ends[0], sigma_max=ends[1],
            sigmas=np.array(self.path), **common)
        self.eta = log["eta_log"]

    def levels(self, nfe: int) -> np.ndarray:
        return self.utils.resample_sigmas_uniform_cum_eta(self.path, self.eta, num_steps=nfe, power=0.5, q=0.25)

    def sample(self, latents: torch.Tensor, levels: np.ndarray) -> torch.Tensor:
        return sample(self.net.denoiser, latents, Grid(levels), "euler")


class Formula:
    """Rules that need only the denoiser along noised data, here the exact ends of some noises; Euler."""

    def __init__(self, folder: Path, net: Net) -> None:
        self.net, self.rule = net, edm(TEACHER - 1, net.sigma_min, net.sigma_max).values[:-1]
        latents = noise(net.denoiser, "make", 64)
        self.data = exact(net.denoiser, latents)
        generator = torch.Generator().manual_seed(SEEDS["make"] + 1)
        steps = np.sqrt(-np.diff(np.append(np.square(self.rule), 0.0)))[::-1]
        brownian = np.cumsum(np.stack([s * torch.randn(latents.shape, generator=generator, dtype=torch.float64).numpy()
                                       for s in steps]), axis=0)[::-1]  # the same path at all levels, [P, M, C, H, W]
        with torch.inference_mode():
            self.denoised = torch.stack([
                net(self.data + torch.from_numpy(w.copy()), s).double()
                for s, w in zip(self.rule, brownian)])

    def sample(self, latents: torch.Tensor, levels: np.ndarray) -> torch.Tensor:
        return sample(self.net.denoiser, latents, Grid(levels), "euler")


class Entropic(Formula):
    """Equal parts of the rescaled conditional entropy (2504.13612): density of sigma E|y - D|^2 / sigma^3."""

    def levels(self, nfe: int) -> np.ndarray:
        rate = (self.denoised - self.data).square().mean(dim=(1, 2, 3, 4)).numpy() / self.rule**2
        parts = np.cumsum(np.append(0.0, 0.5 * (rate[1:] + rate[:-1]) * -np.diff(self.rule)))
        return np.append(np.interp(np.linspace(0, 1, nfe), parts / parts[-1], self.rule), 0.0)


class Klub(Formula):
    """Least upper bound of the Kullback-Leibler distance, as Align Your Steps minimises (2404.14507), by programming.

    A step from level i to level j costs the integral of E|D(x_s, s) - D(x_i, i)|^2 / s^3 over the levels s between.
    """

    def levels(self, nfe: int) -> np.ndarray:
        sigma, count = self.rule, len(self.rule)
        flat = self.denoised.flatten(1)
        square = (torch.cdist(flat, flat) ** 2).numpy() / flat.shape[1]  # [P, P]
        cost = np.full((count, count), np.inf)
        for i in range(count):
            rate = square[i, i:] / sigma[i:] ** 3
            cost[i, i:] = np.append(0.0, np.cumsum(0.5 * (rate[1:] + rate[:-1]) * -np.diff(sigma[i:])))
        best, chosen = cost[:, -1].copy(), []
        for _ in range(nfe - 2):  # one level more at each turn
            total = cost + best[None]
            chosen.append(total.argmin(axis=1))
            best = total.min(axis=1)
        places = [0]
        for table in reversed(chosen):
            places.append(int(table[places[-1]]))
        return np.append(sigma[sorted({*places, count - 1})], 0.0)


class Searched:
    """Adam through the solver over the levels, 500 steps from EDM's rule, 8 of 64 noises each, as LD3's kind does."""

    def __init__(self, folder: Path, net: Net) -> None:
        self.net, self.latents = net, noise(net.denoiser, "make", SEARCHED)
        self.ends = exact(net.denoiser, self.latents)

    def levels(self, nfe: int) -> np.ndarray:
        start = edm(nfe, self.net.sigma_min, self.net.sigma_max)
        return search(self.net.denoiser, start, "ipndm3", self.latents, self.ends, ITERATIONS, EACH, EACH)[0].values

    def sample(self, latents: torch.Tensor, levels: np.ndarray) -> torch.Tensor:
        return sample(self.net.denoiser, latents, Grid(levels), "ipndm3")


PEERS: Dict[str, Callable[[Path, Net], Any]] = {
    "gits": Gits, "dm-nonuniform": DmNonUniform, "sdm": Sdm, "entropic": Entropic, "klub": Klub, "search": Searched}


# --- judging ---------------------------------------------------------------------------------------------------


def exact(denoiser: Denoiser, latents: torch.Tensor) -> torch.Tensor:
    """Where the paths end, by a fine solution."""
    return sample(denoiser, latents, edm(FINE, denoiser.sigma_min, denoiser.sigma_max), "heun", batch=BATCH)


def our_end(levels: Sequence[float]) -> Grid:
    """The same levels with ours as the last: 0."""
    values = np.array(levels, np.float64)
    values[-1] = 0.0
    return Grid(values)


def figures(errors: np.ndarray) -> Dict[str, float]:
    """Mean and RMS over noises of errors [M], with standard errors."""
    root = float(np.sqrt(np.square(errors).mean()))
    return {"mean": float(errors.mean()), "mean_stderr": float(errors.std(ddof=1) / len(errors) ** 0.5), "rms": root,
            "rms_stderr": float(np.square(errors).std(ddof=1) / len(errors) ** 0.5 / (2 * root))}


def pixels_of(data: str) -> torch.Tensor:
    """Training images [N, C, H, W] uint8: of CIFAR-10 if `data` is an archive, of MNIST if it is a folder."""
    return load_mnist("train", data)[0][:, None] if Path(data).is_dir() else load_cifar10("train", data)[0]


class Judge:
    """Scores a sampler: end-point error over 256 noises, and the FID of so many images."""

    def __init__(self, denoiser: Denoiser, num: int, data: Optional[str], ends: Path, blocks: int = 5) -> None:
        self.denoiser, self.num, self.blocks = denoiser, num, blocks
        self.latents = noise(denoiser, "judge", 256)
        if not ends.exists():
            save_tensors(ends, exact(denoiser, self.latents))
        self.ends = load_tensors(ends)
        if num:
            self.detector = load_detector("lenet" if denoiser.img_shape[0] == 1 else "cifar10", denoiser.img_shape,
                                          torch.device("cpu"))
            self.images, self.reference = noise(denoiser, "images", num), moments(self._features(pixels_of(data)))

    @torch.inference_mode()
    def _features(self, pixels: torch.Tensor) -> np.ndarray:
        return torch.cat([self.detector.features(part) for part in pixels.split(500)]).numpy()

    def score(self, sampler: Callable[[torch.Tensor], torch.Tensor]) -> Dict[str, Any]:
        run = lambda latents: torch.cat([sampler(part).double() for part in latents.split(BATCH)])
        with torch.inference_mode():
            found: Dict[str, Any] = figures(rms(run(self.latents) - self.ends).numpy())
            if self.num:
                features = self._features((run(self.images) * 127.5 + 128).clip(0, 255).to(torch.uint8))
                found["fid"] = frechet_distance(*moments(features), *self.reference)
                parts = [frechet_distance(*moments(part), *self.reference)
                         for part in np.array_split(features, self.blocks)]
                found["fid_blocks"] = parts
        return found


def one_peer(name: str, options: Dict[str, Any]) -> Dict[str, Any]:
    """All cells of one peer, in this process."""
    denoiser = load_network(options["network"]).denoiser
    net, judge = Net(denoiser).eval(), Judge(denoiser, options["num"], options["data"], options["ends"])
    began, before = time.perf_counter(), denoiser.evaluations
    peer = PEERS[name](Path(options["peers"]), net)
    rows: Dict[str, Any] = {}
    for nfe in options["nfe"]:
        levels = np.asarray(peer.levels(nfe), np.float64)
        cost = {"seconds": time.perf_counter() - began, "evaluations": denoiser.evaluations - before}
        cells = {"theirs": judge.score(partial(peer.sample, levels=levels))}
        for solver in options["ours"]:
            grid = our_end(levels)
            cells[solver] = judge.score(partial(sample, denoiser, grid=grid, solver=solver))
        rows[str(nfe)] = {"levels": levels.tolist(), **cost, "cells": cells}
        began, before = time.perf_counter(), denoiser.evaluations
    return rows


def our_rows(options: Dict[str, Any]) -> Dict[str, Any]:
    """ART's grids, and EDM's rule, with our solvers."""
    denoiser = load_network(options["network"]).denoiser
    judge, found = Judge(denoiser, options["num"], options["data"], options["ends"]), {}
    for name in ("art", "edm"):
        rows: Dict[str, Any] = {}
        for nfe in options["nfe"]:
            grid = (load_grid(options["grids"].replace("{steps}", str(nfe))) if name == "art"
                    else edm(nfe, denoiser.sigma_min, denoiser.sigma_max))
            cells = {solver: judge.score(partial(sample, denoiser, grid=grid, solver=solver))
                     for solver in options["ours"]}
            rows[str(nfe)] = {"levels": grid.values.tolist(), "cells": cells}
        found[name] = rows
    return found


@click.command()
@click.option("--peers", required=True, type=click.Path(exists=True, file_okay=False), help="Folder with checkouts.")
@click.option("--network", default="mnist", show_default=True)
@click.option("--grids", default="art_mnist{steps}.npy", show_default=True, help="Our grids; {steps} becomes K.")
@click.option("--nfe", default="3,4,5,6,7,8,10", show_default=True)
@click.option("--ours", default="clock,ipndm3,dpmpp2m", show_default=True, help="Our solvers.")
@click.option("--num", default=5000, show_default=True, help="Images for the FID; 0 for none.")
@click.option("--data", help="Folder with MNIST's files, or an archive of CIFAR-10; needed for the FID.")
@click.option("--only", help="Names of peers, and `ours`.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--inner", hidden=True, help="Run this peer here.")
def main(out: Path, only: Optional[str], inner: Optional[str], **options: Any) -> None:
    """Every peer's grids with its own solver and with ours."""
    options["nfe"] = [int(part) for part in str(options["nfe"]).split(",")]
    options["ours"] = options["ours"].split(",")
    if inner:
        options["ends"] = out.with_name(f"{out.name.split('.')[0]}.ends.pt")
        rows = our_rows(options) if inner == "ours" else {inner: one_peer(inner, options)}
        write_json(out, rows)
        return
    result: Dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"options": options, "skipped": {}}
    for name in only.split(",") if only else ["ours", *PEERS]:
        part = out.with_suffix(f".{name}.json")
        command = [sys.executable, "-m", "tests.benchmarks.peers", *_again(options), f"--inner={name}", f"--out={part}"]
        done = subprocess.run(command, text=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        if done.returncode:
            result["skipped"][name] = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            click.echo(f"{name}: skipped: {result['skipped'][name]}", err=True)
        else:
            result["skipped"].pop(name, None)
            result.update(json.loads(part.read_text()))
            part.unlink()
        write_json(out, result)
    show(result)


def _again(options: Dict[str, Any]) -> List[str]:
    texts = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in options.items()}
    return [f"--{key}={value}" for key, value in texts.items() if value is not None]


def show(result: Dict[str, Any]) -> None:
    """Mean end-point errors (and FIDs), a line for each grid and solver."""
    for name, rows in result.items():
        if name in ("options", "skipped"):
            continue
        solvers: Tuple[str, ...] = tuple(next(iter(rows.values()))["cells"])
        for solver in solvers:
            cells = [row["cells"][solver] for row in rows.values()]
            shown = [f"{cell['mean']:.3f}" + (f"/{cell['fid']:.1f}" if "fid" in cell else "") for cell in cells]
            click.echo(f"{name:<14}{solver:<16}" + "".join(f"{text:>13}" for text in shown))


if __name__ == "__main__":
    main()
