"""J/J* over evaluated images: how many trajectories and points a profile needs, and with them the defaults chosen.

Each profile's own optimum, and the clock that ART-RL learns from it, are scored on a reference of other noises: 256
trajectories x 256 points, with differences about each point, three evaluations (one with --quick-reference). The
curve is of profiles of one kind: all trajectories with the same points, their plain mean.

Run by hand: python -m tests.benchmarks.evaluation_curve mnist empirical-mnist empirical-cifar10 songunet.pkl
    --cifar10=ARCHIVE --references=FOLDER --picture=art_edm/docs/evaluations.png
    (songunet.pkl: tests/benchmarks/train_songunet.py makes it)
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click
import numpy as np
import torch
from paper.tables.empirical_fields import cifar10_images, empirical, mnist_images
from PIL import Image

from art_edm.grids.clocks import GaussianClock
from art_edm.learning.training import PRESETS, train
from art_edm.measure.dense_paths import PathOptions, measure_along, measure_profile
from art_edm.measure.profile import Profile, smoothed
from art_edm.models.denoiser import Denoiser
from art_edm.models.loading import load_network
from art_edm.runtime.files import write_json

POINTS, TRAJECTORIES = (22, 43, 85, 128), (2, 4, 8, 16, 24, 48)
THREE = (8, 16, 28)  # points of the profiles with three evaluations each
IMAGES = 2000  # of the memorised data sets


def field(name: str, mnist: Optional[Path], cifar10: Optional[Path]) -> Denoiser:
    """A network, or the exact denoiser of the first images of a data set."""
    if name == "empirical-mnist":
        return empirical(name, mnist_images(mnist, IMAGES), torch.device("cpu")).denoiser
    if name == "empirical-cifar10":
        if cifar10 is None:
            raise click.UsageError("empirical-cifar10 needs --cifar10")
        return empirical(name, cifar10_images(cifar10, IMAGES), torch.device("cpu")).denoiser
    return load_network(name).denoiser


def noises(denoiser: Denoiser, count: int, seed: int) -> Tuple[torch.Tensor, Optional[torch.Tensor]]:
    """Latents [count, C, H, W] and labels."""
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn((count, *denoiser.img_shape), generator=generator, dtype=torch.float64)
    return latents, denoiser.draw_labels(count, generator)


def excess(profile: Profile, reference: Profile) -> float:
    """J/J* on the reference of the profile's own optimum."""
    return reference.cost(profile.direct(4096).values) / reference.optimum


def curve(denoiser: Denoiser, reference: Profile, seeds: int) -> List[Dict[str, Any]]:
    """J/J* of the optimum for all numbers of trajectories and points."""
    clock, rows = reference.clock, []
    for seed in range(seeds):
        latents, labels = noises(denoiser, max(TRAJECTORIES), 2000 + seed)
        for cost, measure, sizes in ((1, measure_along, POINTS), (3, measure_profile, THREE)):
            for points in sizes:
                whole = measure(denoiser, latents, clock, points, PathOptions(labels, 16))
                for count in TRAJECTORIES:
                    score = excess(replace(whole, norm=whole.norm[:count], _fine={}), reference)
                    rows.append({"trajectories": count, "points": points, "evaluations_per_point": cost, "seed": seed,
                                 "evaluations": cost * count * points, "J_over_J_star": score})
    return rows


def draw(path: Path, found: Dict[str, Any]) -> None:
    """J/J* - 1 over evaluations, a panel for each field."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = -(-len(found) // 2)
    figure, axes = plt.subplots(rows, 2, figsize=(8, 2.6 * rows + 0.8), squeeze=False, sharex=True, sharey=True)
    for axis, (name, record) in zip(axes.flat, found.items()):
        for points in POINTS:
            some = [r for r in record["curve"] if (r["points"], r["evaluations_per_point"]) == (points, 1)]
            spent = sorted({r["evaluations"] for r in some})
            mean = [np.mean([r["J_over_J_star"] - 1 for r in some if r["evaluations"] == n]) for n in spent]
            axis.loglog(spent, mean, "o-", markersize=3, linewidth=1, label=f"{points} points a trajectory")
        runs = record["art_rl"]
        for key, marker, label in (("optimum", "kD", "default, direct"), ("J_over_J_star", "r*", "default, ART-RL")):
            axis.loglog([r["evaluations"] for r in runs], [r[key] - 1 for r in runs], marker, markersize=5, label=label,
                        alpha=0.8)
        axis.axhline(0.01, color="grey", linewidth=0.8, linestyle="--")
        axis.axvline(2048, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(name, fontsize=10)
    for axis in axes[-1]:
        axis.set_xlabel("evaluated images (dashed: 2,048)")
    for axis in axes[:, 0]:
        axis.set_ylabel("J/J* - 1 (dashed: 0.01)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncol=3, loc="lower center")
    figure.tight_layout(rect=(0, 0.8 / (2.6 * rows + 0.8), 1, 1))
    figure.savefig(path, dpi=80)
    Image.open(path).convert("RGB").quantize(64).save(path, optimize=True)


def reference_profile(denoiser: Denoiser, many: int, points: int, quick: bool, kept: Optional[Path]) -> Profile:
    """The reference, from the file where it is kept if there is one."""
    clock = GaussianClock(denoiser.sigma_max, denoiser.sigma_data)
    if kept is not None and kept.exists():
        content = np.load(kept)
        return Profile(clock, content["sigma"], content["norm"], int(content["evaluations"]), 0.0)
    latents, labels = noises(denoiser, many, 10**6)
    measure = measure_along if quick else measure_profile
    profile = measure(denoiser, latents, clock, points, PathOptions(labels, 32))
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(kept, sigma=profile.sigma, norm=profile.norm, evaluations=profile.evaluations)
    return profile


def floor_of(denoiser: Denoiser, standard: Profile, many: int, points: int) -> Dict[str, Any]:
    """Score of the optimum of a profile with far more trajectories: what the reference's own few hold against any."""
    latents, labels = noises(denoiser, many, 777_000)
    profile = measure_along(denoiser, latents, standard.clock, points, PathOptions(labels, 32))
    return {"profile": f"{many}x{points}", "J_over_J_star": excess(smoothed([profile]), standard)}


def default_run(denoiser: Denoiser, standard: Profile, seed: int) -> Dict[str, Any]:
    """Scores of the default run: of its learned clock, and of its profile's own optimum (--method=direct)."""
    result = train(denoiser, PRESETS["default"].changed(seed=seed))
    values = result.learned.sigma(np.linspace(0, 1, 4097))
    values[0], values[-1] = standard.horizon, 0.0
    return {"seed": seed, "J_over_J_star": standard.cost(values) / standard.optimum,
            "optimum": excess(result.profile, standard), "evaluations": sum(result.evaluations.values()),
            "trajectories": len(result.profile.norm), "rl_seconds": result.seconds["rl"]}


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--mnist", type=click.Path(path_type=Path, exists=True), help="Folder with MNIST.")
@click.option("--cifar10", type=click.Path(path_type=Path, exists=True), help="CIFAR-10 as JPEGs.")
@click.option("--reference", default="256x256", show_default=True, help="Trajectories x points.")
@click.option("--quick-reference", is_flag=True, help="One evaluation for each point of the reference.")
@click.option("--references", type=click.Path(path_type=Path), help="Folder that keeps references for another time.")
@click.option("--seeds", default=3, show_default=True, help="Default runs.")
@click.option("--floor", help="Also score the optimum of a profile of so many trajectories x points.")
@click.option("--curve-seeds", default=1, show_default=True, help="Noises of the curve.")
@click.option("--out", type=click.Path(path_type=Path), default="evaluation_curve.json", show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="The curve as a picture.")
def main(
    names: Tuple[str, ...], mnist: Optional[Path], cifar10: Optional[Path], reference: str, quick_reference: bool,
    references: Optional[Path], seeds: int, floor: Optional[str], curve_seeds: int, out: Path,
    picture: Optional[Path],
) -> None:
    """One line per field; JSON, to which other fields are added later, and the curve as a picture."""
    found: Dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    many, points = (int(part) for part in reference.split("x"))
    for name in names:
        denoiser, label = field(name, mnist, cifar10), Path(name).stem
        each = 1 if quick_reference else 3
        kept = references / f"{label}-{reference}-{each}.npz" if references else None
        standard = reference_profile(denoiser, many, points, quick_reference, kept)
        runs = [default_run(denoiser, standard, seed) for seed in range(seeds)]
        found[label] = {"reference": f"{reference}, {each} evaluations each", "art_rl": runs,
                        "curve": curve(denoiser, standard, curve_seeds)}
        scores = ", ".join(f"{run['J_over_J_star']:.4f}/{run['optimum']:.4f} ({run['evaluations']:,})" for run in runs)
        if floor:
            found[label]["floor"] = floor_of(denoiser, standard, *(int(part) for part in floor.split("x")))
            click.echo(f"{label:<20} floor: {found[label]['floor']['J_over_J_star']:.4f}")
        click.echo(f"{label:<20} J/J* of ART-RL/direct (evaluations): {scores}")
        write_json(out, found)
    if picture:
        draw(picture, found)


if __name__ == "__main__":
    main()
