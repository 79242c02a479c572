"""Images per second of tools/fid.py and of EDM's own fid.py, same images and detector, on the CPU, in one run.

Symbols
-------
ref        seconds of the whole command `ref`: start, reading, detector, moments
calc       seconds of the whole command `calc`: the same, and the distance
ratio      upstream's seconds over ours

Upstream's script is run unchanged but for the CPU in place of a GPU (tests/fid_standin.py). The detector is a small
one, so that what is compared is all the rest; Inception would take the same time in both. Needs ART_EDM_UPSTREAM
or third_party.

    python -m tests.benchmarks.fid_throughput --out tests/benchmarks/results/fid_throughput.json
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Callable, Dict, List, Optional

import click
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from art_edm.metrics.detectors import CallDetector
from art_edm.metrics.image_folders import ImageSet, open_images
from art_edm.metrics.panel import Accumulators, Panel
from art_edm.runtime.cli import versions
from art_edm.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.support.fid_standin import StandIn, run_upstream, save_pickle  # noqa: E402
from tests.support.upstream import checkouts  # noqa: E402

DIM = 2048  # upstream's script knows no other


class Loadable(Dataset):
    """Our images for torch's workers."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.images.load(i)


def draw(folder: Path, num: int, size: int) -> None:
    """PNGs that compress about as photographs do."""
    rng = np.random.default_rng(0)
    for i in range(num):
        small = rng.integers(0, 256, (max(size // 4, 1), max(size // 4, 1), 3), dtype=np.uint8)
        Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:06d}.png")


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def run_ours(arguments: List[str], detector: Path, threads: int) -> None:
    """tools/fid.py in a process of its own."""
    call = [sys.executable, str(ROOT / "tools" / "fid.py"), *arguments, f"--detector={detector}", "--trust-pickle",
            "--device=cpu"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    subprocess.run(call, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def readers(folder: Path, workers: int) -> Dict[str, float]:
    """Seconds to read all images by threads, and by torch's worker processes."""
    images = open_images(folder)
    ranges = [range(i, min(i + 64, len(images))) for i in range(0, len(images), 64)]
    loader = DataLoader(Loadable(images), batch_size=64, num_workers=workers, multiprocessing_context="spawn")
    return {
        "none": seconds(lambda: list(images.batches(ranges, 0))),
        "threads": seconds(lambda: list(images.batches(ranges, workers))),
        "processes": seconds(lambda: list(loader)),
    }


def share_of_scores(size: int, repeats: int = 10, batches: int = 10) -> Dict[str, float]:
    """CPU seconds of FID alone and of FID with the Inception score, 1008 classes, by turns, and their median ratio.

    Inception's own time, the same in both, is left out: with it the ratio is nearer to 1.
    """
    net = StandIn(3 * size * size, DIM, 1008, torch.float32)
    detector = CallDetector(net, "stand-in", "0" * 64, (3, size, size), torch.device("cpu"), scores=True)
    pixels = torch.randint(0, 256, (64, 3, size, size), dtype=torch.uint8)

    def cost(metrics: List[str]) -> float:
        found = Accumulators(Panel(metrics, {"detector": detector}), 64 * batches)
        began = time.process_time()
        for i in range(batches):
            found.update(pixels, range(64 * i, 64 * (i + 1)), ["image"] * 64)
        return time.process_time() - began

    pairs = np.array([(cost(["fid"]), cost(["fid", "is"])) for _ in range(repeats)])
    alone, both = np.median(pairs, axis=0)
    return {"fid": alone, "fid,is": both, "ratio": float(np.median(pairs[:, 1] / pairs[:, 0]))}


@click.command()
@click.option("--num", default=5000, show_default=True, help="Images.")
@click.option("--size", default=32, show_default=True, help="Their width and height.")
@click.option("--threads", default=2, show_default=True, help="Of torch, in both.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the results as JSON.")
def main(num: int, size: int, threads: int, out: Optional[Path]) -> None:
    """Print the times of both."""
    if checkouts() is None:
        raise click.ClickException("found no edm/ and edm2/, expected them in ART_EDM_UPSTREAM or third_party")
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder, "images")
        images.mkdir()
        draw(images, num, size)
        detector = save_pickle(Path(folder, "standin.pkl"), StandIn(3 * size * size, DIM, dtype=torch.float32))
        commands = {
            "ref": lambda name: ["ref", f"--data={images}", f"--dest={folder}/{name}.npz"],
            "calc": lambda name: ["calc", f"--images={images}", f"--ref={folder}/{name}.npz", f"--num={num}"],
        }
        results = {}
        for key, command in commands.items():
            ours = seconds(lambda: run_ours(command("ours"), detector, threads))
            theirs = seconds(lambda: run_upstream(detector, 0, [command("theirs")], threads))
            results[key] = {"ours": ours, "upstream": theirs, "ratio": theirs / ours, "images_per_s": num / ours}
            click.echo(f"{key:5} ours {ours:6.2f} s ({num / ours:5.0f} images/s)  upstream {theirs:6.2f} s  "
                       f"ratio {theirs / ours:.2f}")
        results["reading"] = readers(images, threads)
    results["scores"] = share_of_scores(size)
    click.echo("fid,is over fid: {ratio:.3f} ({fid:.2f} and {fid,is:.2f} s of CPU)".format(**results["scores"]))
    click.echo("reading alone: " + ", ".join(f"{key} {value:.2f} s" for key, value in results["reading"].items()))
    if out is not None:
        write_json(out, {"num": num, "size": size, "torch_threads": threads, **results, "versions": versions()})


if __name__ == "__main__":
    main()
