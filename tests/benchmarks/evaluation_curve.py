"""J/J* over evaluated images: how many trajectories and points a profile needs, and with them the defaults chosen.

Each profile's own optimum, and the clock that ART-RL learns from it, are scored on a reference of other noises: 256
trajectories x 256 points, with differences about each point, three evaluations (one with --quick-reference).

Run by hand: python -m tests.benchmarks.evaluation_curve mnist empirical-mnist empirical-cifar10 --cifar10=ARCHIVE
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import click
import numpy as np
import torch

from art_edm.clock import GaussianClock
from art_edm.denoiser import Denoiser
from art_edm.files import write_json
from art_edm.image_fields import cifar10_images, empirical, mnist_images
from art_edm.loading import load_network
from art_edm.profile import Profile
from art_edm.training import PRESETS, train
from art_edm.trajectories import measure_along, measure_profile

POINTS, TRAJECTORIES = (22, 43, 85, 128), (2, 4, 8, 16, 24, 48)
THREE = (8, 16, 28)  # points of the profiles with three evaluations each
IMAGES = 2000  # of the data sets known by heart


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
                whole = measure(denoiser, latents, clock, points, batch=16, class_labels=labels)
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

    figure, axes = plt.subplots(1, len(found), figsize=(4 * len(found), 3.6), sharey=True, squeeze=False)
    for axis, (name, record) in zip(axes[0], found.items()):
        for cost, sizes, marker in ((1, POINTS, "o-"), (3, THREE, "s--")):
            for points in sizes:
                rows = [r for r in record["curve"] if (r["points"], r["evaluations_per_point"]) == (points, cost)]
                spent = sorted({r["evaluations"] for r in rows})
                mean = [np.mean([r["J_over_J_star"] - 1 for r in rows if r["evaluations"] == n]) for n in spent]
                label = f"{points} points" + (", 3 evaluations each" if cost == 3 else "")
                axis.loglog(spent, mean, marker, markersize=3, linewidth=1, label=label)
        runs = record["art_rl"]
        axis.loglog([r["evaluations"] for r in runs], [r["J_over_J_star"] - 1 for r in runs], "k*", markersize=9,
                    label="ART-RL, defaults")
        axis.axhline(0.01, color="grey", linewidth=0.8)
        axis.axvline(2048, color="grey", linewidth=0.8)
        axis.set(title=name, xlabel="evaluated images")
    axes[0, 0].set_ylabel("J/J* - 1")
    axes[0, -1].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=90)


@click.command()
@click.argument("names", nargs=-1, required=True)
@click.option("--mnist", type=click.Path(path_type=Path, exists=True), help="Folder with MNIST.")
@click.option("--cifar10", type=click.Path(path_type=Path, exists=True), help="CIFAR-10 as JPEGs.")
@click.option("--reference", default="256x256", show_default=True, help="Trajectories x points.")
@click.option("--quick-reference", is_flag=True, help="One evaluation for each point of the reference.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default="evaluation_curve.json", show_default=True)
def main(
    names: Tuple[str, ...], mnist: Optional[Path], cifar10: Optional[Path], reference: str, quick_reference: bool,
    seeds: int, out: Path,
) -> None:
    """One line per field; JSON, and the curve as a picture beside it."""
    found: Dict[str, Any] = {}
    many, points = (int(part) for part in reference.split("x"))
    for name in names:
        denoiser = field(name, mnist, cifar10)
        clock = GaussianClock(denoiser.sigma_max, denoiser.sigma_data)
        latents, labels = noises(denoiser, many, 10**6)
        measure = measure_along if quick_reference else measure_profile
        standard = measure(denoiser, latents, clock, points, batch=32, class_labels=labels)
        runs = []
        for seed in range(seeds):
            result = train(denoiser, replace(PRESETS["default"], seed=seed))
            values = result.learned.sigma(np.linspace(0, 1, 4097))
            values[0], values[-1] = standard.horizon, 0.0
            runs.append({"seed": seed, "J_over_J_star": standard.cost(values) / standard.optimum,
                         "optimum": excess(result.profile, standard), "evaluations": sum(result.evaluations.values()),
                         "expected_excess": result.profile.sampling_excess, "rl_seconds": result.seconds["rl"]})
        label = Path(name).stem
        found[label] = {"reference": f"{reference}, {1 if quick_reference else 3} evaluations each",
                        "art_rl": runs, "curve": curve(denoiser, standard, seeds)}
        scores = ", ".join(f"{run['J_over_J_star']:.4f} ({run['evaluations']:,})" for run in runs)
        click.echo(f"{label:<20} J/J* of ART-RL (evaluations): {scores}")
        write_json(out, found)
        draw(out.with_suffix(".png"), found)


if __name__ == "__main__":
    main()
