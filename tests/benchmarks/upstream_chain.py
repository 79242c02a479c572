"""The whole chain on a trained SongUNet: train_schedule.py -> patched generate.py -> end-point error.

End points are those of the patched generate.py itself, taken before they become PNGs, at equal seeds; the reference
is its own EDM rule in many steps. With --detector and --ref, the Frechet distance of the images to a data set, too.
Run by hand, after train_songunet.py:

    ART_EDM_UPSTREAM=DIR python tests/benchmarks/upstream_chain.py --network=songunet.pkl --out=chain.json
    ART_EDM_UPSTREAM=DIR python tests/benchmarks/upstream_chain.py --network=songunet.pkl --detector=cifar10 \
        --ref=cifar10.npz --out=chain.json
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import click
import torch

from art_edm.grids.grid import load_grid
from art_edm.measure.field import rms
from art_edm.metrics.detectors import load_detector
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.references import load_reference
from art_edm.models.loading import load_network
from art_edm.runtime.cli import Command
from art_edm.runtime.files import sha256_of, write_json
from art_edm.sampling.generate import to_pixels
from art_edm.sampling.solvers import sample

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from tests.support.shim import run_jobs  # noqa: E402


def patched_copy(folder: Path) -> Path:
    """A copy of EDM's checkout with a patched generate.py."""
    copy = folder / "edm"
    source = Path(os.environ["ART_EDM_UPSTREAM"]) / "edm"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git", "docs"))
    subprocess.run([sys.executable, str(ROOT / "tools" / "patch_upstream.py"), str(copy)], check=True)
    return copy


def learned(network: Path, steps: str, folder: Path) -> float:
    """Grids art5.npy ... by the main command; returns J/J*."""
    out = folder / "art{steps}.npy"
    command = [sys.executable, str(ROOT / "tools" / "train_schedule.py"), f"--network={network}", f"--steps={steps}",
               f"--out={out}"]
    subprocess.run(command, check=True)
    return json.loads((folder / f"art{steps.split(',')[0]}.json").read_text())["J_over_J_star"]


def error(points: torch.Tensor, fine: torch.Tensor) -> Dict[str, float]:
    """RMS distance over seeds and pixels, its standard error, and the median over seeds."""
    each = rms(points - fine)
    total = float(each.square().mean().sqrt())
    stderr = float(each.square().std() / len(each) ** 0.5 / (2 * total))
    return {"rms": total, "stderr": stderr, "median": float(each.median())}


def agreement(network: Path, grid: Path, points: torch.Tensor) -> float:
    """Largest relative distance of our Heun to the patched edm_sampler, on the first images of a batch of 64."""
    denoiser = load_network(str(network)).denoiser
    z = torch.stack([torch.randn(denoiser.img_shape, generator=torch.Generator().manual_seed(i)) for i in range(64)])
    ours = sample(denoiser, z, load_grid(grid), "heun")
    return float((ours - points[:64]).abs().max() / points[:64].abs().max())


class Judge:
    """The Frechet distance between the features of images and of a data set."""

    def __init__(self, detector: str, ref: str, shape: Tuple[int, int, int]) -> None:
        self.detector = load_detector(detector, shape, torch.device("cpu"))
        self.moments = load_reference(ref).of("fid")

    def fid(self, points: torch.Tensor) -> float:
        """Of end points [N, C, H, W]."""
        pixels = to_pixels(points).reshape(points.shape)
        found = torch.cat([self.detector.features(part) for part in pixels.split(500)]).double().numpy()
        return frechet_distance(*moments(found), self.moments["mu"], self.moments["sigma"])


@click.command(cls=Command)
@click.option("--network", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--steps", default="5,10,18", show_default=True)
@click.option("--seeds", default=256, show_default=True, help="A multiple of 64.")
@click.option("--fine", default=100, show_default=True, help="Steps of the reference.")
@click.option("--detector", help="With --ref: of the distance to a data set.")
@click.option("--ref", help="Statistics of the data set's features.")
@click.option("--out", type=click.Path(path_type=Path))
def main(
    network: Path, steps: str, seeds: int, fine: int, detector: Optional[str], ref: Optional[str], out: Path
) -> None:
    """One line per number of steps: EDM's rule and the learned grid."""
    network = network.resolve()
    judge = Judge(detector, ref, load_network(str(network)).denoiser.img_shape) if detector else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkout = patched_copy(folder)
        score = learned(network, steps, folder)
        common = [f"--network={network}", f"--outdir={folder}/png", f"--seeds=0-{seeds - 1}", "--batch=64"]
        jobs: Dict[str, Any] = {"fine": [f"--steps={fine}"]}
        for k in steps.split(","):
            jobs[f"edm {k}"], jobs[f"art {k}"] = [f"--steps={k}"], [f"--schedule={folder}/art{k}.npy"]
        script = str(checkout / "generate.py")
        jobs = {name: {"script": script, "argv": [*common, *argv]} for name, argv in jobs.items()}
        (records,) = run_jobs(checkout, jobs, folder, timeout=7200)
        last = steps.split(",")[-1]
        found = table(records, steps, judge)
        agreed = agreement(network, folder / f"art{last}.npy", records[f"art {last}"]["samples"])
        floor = {"fid_of_fine": judge.fid(records["fine"]["samples"])} if judge else {}
    result = {"network_sha256": sha256_of(network), "J_over_J_star": score, "seeds": seeds, "fine": fine, **floor,
              "table": found, "distance_of_our_heun": agreed}
    click.echo(f"J/J* {score:.4f}; our Heun against edm_sampler on the learned grid: {agreed:.1e}")
    if out:
        write_json(out, result)


def table(records: Dict[str, Any], steps: str, judge: Optional[Judge] = None) -> Dict[str, Dict[str, Dict[str, float]]]:
    """Errors by number of steps, printed as they are found."""
    rows: Dict[str, Dict[str, Dict[str, float]]] = {}
    for k in steps.split(","):
        edm, art = errors_of(records, k)
        rows[k] = {"edm": edm, "art": art}
        if judge:
            for name, row in rows[k].items():
                row["fid"] = judge.fid(records[f"{name} {k}"]["samples"])
                click.echo(f"K = {k}: {name} Frechet distance {row['fid']:.2f}")
        click.echo(f"K = {k}: EDM {edm['rms']:.4f} +- {edm['stderr']:.4f} (median {edm['median']:.4f}), "
                   f"learned {art['rms']:.4f} +- {art['stderr']:.4f} (median {art['median']:.4f})")
    return rows


def errors_of(records: Dict[str, Any], k: str) -> Tuple[Dict[str, float], Dict[str, float]]:
    """Of EDM's rule and of the learned grid."""
    for name in ("fine", f"edm {k}", f"art {k}"):
        assert records[name]["exit_code"] == 0, records[name]["output"]
    fine = records["fine"]["samples"]
    return error(records[f"edm {k}"]["samples"], fine), error(records[f"art {k}"]["samples"], fine)


if __name__ == "__main__":
    main()
