"""200 short jobs in one process, and 20 kills of a process: what they leave behind.

Symbols
-------
job        one run of tools/train_schedule.py (few iterations), then a batch sampled on its grid
resident   memory of this process, MB; descriptors, threads: their numbers; temporary: files that no job names
growth     from 50 jobs to all, when caches and the allocator's pools are full
kill -9    at a random moment of a stage (its measured time times a random number), 5 in each of 4 stages, followed
           by --resume; `same_bytes`: all grids are those of an uninterrupted run; `clean`: nothing else is left

    python -m tests.benchmarks.soak --out tests/benchmarks/results/soak.json
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence

import click
import torch

from art_edm.grids.grid import load_grid
from art_edm.learning.training import CHECKPOINT
from art_edm.models.loading import load_network
from art_edm.runtime.cli import versions
from art_edm.runtime.files import write_json
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import sample

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tests.support.survival import SCRIPT, STAGES, durations, finished, grids, kill_in, whole_or_absent  # noqa: E402

NETWORKS = ("oned", "gaussian:0.5", "mnist")
LONG = ["--network=mnist", "--steps=2,3,5,7,10,18", "--out=g{steps}.npy", "--trajectories=4", "--iterations=24"]
Job = Callable[[int], Any]


def tool() -> click.Command:
    """tools/train_schedule.py, in this process."""
    spec = importlib.util.spec_from_file_location("train_schedule", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def make_job(networks: Sequence[str] = NETWORKS) -> Job:
    """Job i trains on the i-th network, in turn, with seed i, and samples; in the working folder."""
    main = tool()

    def job(i: int) -> None:
        network = networks[i % len(networks)]
        arguments = [f"--network={network}", "--steps=6", "--out=job.npy", "--trajectories=2", "--iterations=4",
                     f"--seed={i}", "--force", "--quiet", "--device=cpu"]
        main.main(arguments, standalone_mode=False)
        denoiser = load_network(network, "cpu", quiet=True).denoiser
        with torch.inference_mode():
            sample(denoiser, torch.randn(4, *denoiser.img_shape), load_grid("job.npy"), "heun")

    return job


def census(folders: Sequence[Path]) -> Dict[str, float]:
    """What this process holds now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = [path.name for folder in folders for path in folder.rglob("*")]
    return {
        "resident": pages * os.sysconf("SC_PAGE_SIZE") / 1e6,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "temporary": len([name for name in files if name not in ("job.npy", "job.json")]),
    }


def soak(job: Job, jobs: int, marks: Sequence[int]) -> Dict[int, Dict[str, float]]:
    """The census after so many jobs, in a fresh working folder and a fresh one for temporary files."""
    found, here, before = {}, os.getcwd(), tempfile.tempdir
    with tempfile.TemporaryDirectory() as work, tempfile.TemporaryDirectory() as temporary:
        os.chdir(work)
        tempfile.tempdir = temporary
        try:
            for i in range(jobs):
                job(i)
                if i + 1 in marks:
                    found[i + 1] = census([Path(work), Path(temporary)])
        finally:
            os.chdir(here)
            tempfile.tempdir = before
    return found


def growth(found: Dict[int, Dict[str, float]]) -> Dict[str, float]:
    """From the first mark to the last."""
    first, last = found[min(found)], found[max(found)]
    return {key: last[key] - first[key] for key in first}


def one_kill(stage: str, delay: float, folder: Path, expected: Dict[str, bytes]) -> Optional[Dict[str, Any]]:
    """Kill, look, resume, compare; None if the run had ended before."""
    killed = kill_in(folder, LONG, stage, delay)
    if not killed.died or killed.stage == "end":
        return None
    intact = whole_or_absent(folder, expected)
    unfinished = folder / "g2.unfinished"
    content = Store(unfinished).load(CHECKPOINT) if unfinished.is_dir() else None
    iteration = None if content is None else json.loads(str(content["plain"]))["iteration"]
    status, said = finished(folder, [*LONG, "--resume"])
    (folder / "marks.txt").unlink()
    clean = sorted(path.suffix for path in folder.iterdir()) == [".json"] * len(expected) + [".npy"] * len(expected)
    return {
        "aimed_at": stage, "delay": delay, "met": killed.stage, "iteration_saved": iteration, "intact": intact,
        "parts_left_by_kill": sum(name.endswith(".part") for name in killed.left),
        "status": status, "clean": clean, "same_bytes": grids(folder) == expected,
    }


def kills(count: int, seed: int) -> Dict[str, Any]:
    """`count` kills at moments drawn from `seed`."""
    rng = random.Random(seed)
    rows: List[Dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place, "whole")
        whole.mkdir()
        status, said = finished(whole, LONG)
        if status:
            raise click.ClickException(said)
        expected, seconds = grids(whole), durations(whole)
        while len(rows) < count:
            folder = Path(tempfile.mkdtemp(dir=place))
            stage = STAGES[len(rows) % len(STAGES)]
            row = one_kill(stage, rng.random() * seconds[stage], folder, expected)
            if row is None:
                continue
            rows.append(row)
            click.echo(f"kill {len(rows):2}: {row['met']:8} {row['delay']:6.3f} s into {stage:8} iteration saved "
                       f"{row['iteration_saved']}, same bytes: {row['same_bytes']}, clean: {row['clean']}")
    met = {stage: sum(row["met"] == stage for row in rows) for stage in STAGES}
    return {"seconds_of_stages": seconds, "met": met, "of": count, "rows": rows,
            **{key: sum(row[key] for row in rows) for key in ("intact", "clean", "same_bytes")}}


def fingerprint() -> str:
    """SHA-256 of the code under test, which must not change meanwhile."""
    sources = sorted((SCRIPT.parents[1] / "art_edm").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*sources, SCRIPT))).hexdigest()


@click.command()
@click.option("--jobs", default=200, show_default=True, help="Jobs in one process.")
@click.option("--kills", "count", default=20, show_default=True, help="Processes killed.")
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the results as JSON.")
def main(jobs: int, count: int, seed: int, out: Optional[Path]) -> None:
    """Print what is left behind."""
    began, code = time.monotonic(), fingerprint()
    found = soak(make_job(), jobs, range(min(50, jobs), jobs + 1, 50))
    for number, row in found.items():
        click.echo(f"{number:4} jobs: " + ", ".join(f"{key} {value:.6g}" for key, value in row.items()))
    grown = growth(found)
    click.echo("growth: " + ", ".join(f"{key} {value:+.3g}" for key, value in grown.items()))
    killed = kills(count, seed)
    click.echo(f"{killed['same_bytes']} of {count} killed runs gave the same bytes when resumed; met {killed['met']}")
    if fingerprint() != code:
        raise click.ClickException("the package changed during the run; run it again")
    if out is not None:
        content = {"jobs": jobs, "networks": NETWORKS, "census": {str(n): row for n, row in found.items()},
                   "growth": grown, "kills": killed, "command": LONG, "seconds": time.monotonic() - began}
        write_json(out, {**content, "versions": versions()})


if __name__ == "__main__":
    main()
