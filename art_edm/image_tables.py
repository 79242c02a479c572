"""Tables 2 to 8: FID or Inception score of images on several grids, in seed blocks.

Symbols
-------
cell    one grid, number of steps and solver; its images are those of all blocks
pooled  the FID of all images of a cell at once: its bias is that of their whole number, as in the paper
group   images left out together for the standard error: every 20th where features are kept, else a block
IS      mean over blocks, each in 2 parts: for 5 blocks of 10,000 just the usual 10 parts of 5,000
"""

from __future__ import annotations

import time
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch

from .denoiser import Denoiser
from .detectors import Detector
from .evaluation import Moments, to_pixels
from .experiment import Samples, Work, end_points, features
from .frechet import frechet_distance, moments
from .grid import Grid, resample
from .laboratory import Lab
from .latent_images import Decode, decoder_of, latent_features
from .learned import Run
from .loading import Network
from .progress import Progress
from .recipes import Experiment
from .report import clock_score, hand_made
from .result import Result
from .result_plots import plot_clock, plot_sheets
from .solvers import nfe, supported
from .tallies import moments_of, score_of
from .uncertainty import Measurement, difference, groups_of

__all__ = ["grids_of", "pooled", "pooled_moments", "run_images"]

Content = Dict[str, np.ndarray]
_PARTS = 2  # of the Inception score, in each block
_SHOWN = 9  # images on a sheet for each grid and number of steps


def grids_of(experiment: Experiment, denoiser: Denoiser, run: Run) -> Dict[str, Dict[int, Grid]]:
    """Row -> number of steps -> grid, as the network takes them.

    Raises a ValueError for a grid that it does not support.
    """
    kept = resample_source(experiment, run)
    table: Dict[str, Dict[int, Grid]] = {name: {} for name in experiment.grids}
    for k in experiment.steps:
        rules = hand_made(denoiser, k)
        for name in experiment.grids:
            grid = rules[name] if name in rules else run.grid(k)
            if name == "art_rl" and kept is not None:
                grid = resample(kept, k)
            table[name][k] = supported(denoiser, _fitted(grid, denoiser))
    return table


def resample_source(experiment: Experiment, run: Run) -> Optional[Grid]:
    """The grid that is resampled to every K, if the experiment asks for one."""
    return run.grid(experiment.resampled_from) if experiment.resampled_from else None


def _fitted(grid: Grid, denoiser: Denoiser) -> Grid:
    """A grid of another network, its ends brought into this one's range; interior levels stay."""
    low, high = denoiser.sigma_limits
    values = np.minimum(grid.values, high)
    values[:-1] = np.maximum(values[:-1], low)
    return Grid(values)


def run_images(experiment: Experiment, lab: Lab) -> Result:
    """Sample and score every cell, and draw what shows them."""
    began, network = time.monotonic(), lab.network(experiment.network)
    teacher = lab.network(experiment.learned_on) if experiment.learned_on else network
    decode = decoder_of(experiment.network, lab)
    run = lab.run(teacher)
    table = grids_of(experiment, network.denoiser, run)
    scores = experiment.metric == "is"
    detector = lab.detector(experiment.detector, network, scores)
    reference = None if scores else lab.reference(experiment.reference, detector)
    cells = _measure(experiment, network, table, detector, reference, decode, lab)
    title = {"is": "Inception score"}.get(experiment.metric, "LeNet-FID" if detector.name == "lenet" else "FID")
    evaluations = [nfe(experiment.solver, k) for k in experiment.steps]
    result = Result(
        experiment.name, experiment.title, title, [f"NFE {n}" for n in evaluations], *_numbers(cells),
        paper=experiment.paper, nfe=evaluations, steps=list(experiment.steps),
        solver=experiment.solver, better="higher" if scores else "lower",
    )
    if lab.lead:
        size = block_size(experiment, lab)
        result.more = _comparisons(cells, result.paper)
        result.settings = {
            "network": {"name": network.name, "sha256": network.sha256}, "solver": experiment.solver,
            "images": f"{experiment.blocks} x {size}", "seed": lab.seed, "detector": detector.name,
            "detector_sha256": detector.sha256, "reference": experiment.reference or None,
            "grid learned on": teacher.name, "J/J* of the clock": clock_score(run),
            "price of distillation": run.profile.price, "evaluations of training": sum(run.evaluations.values()),
            "stderr from": {"is": "blocks"}.get(experiment.metric, cells[0][0].value.basis),
            "seconds of sampling": sum(cell.seconds for row in cells for cell in row),
            "seconds": time.monotonic() - began,
        }
        result.notes = _notes(experiment, experiment.blocks * size)
        if detector.name not in ("lenet", "inception"):
            result.notes.append("The detector is not NVIDIA's Inception: no figure compares with the paper's.")
    _draw(experiment, network, table, run, result, decode, lab)
    return result


class Cell(NamedTuple):
    """A measured cell."""

    name: str
    value: Measurement
    seconds: float


def block_size(experiment: Experiment, lab: Lab) -> int:
    """Images of each block."""
    return max(2, (lab.num or experiment.num) // experiment.blocks)


def _measure(
    experiment: Experiment, network: Network, table: Dict[str, Dict[int, Grid]], detector: Detector,
    reference: Optional[Moments], decode: Optional[Decode], lab: Lab,
) -> List[List[Cell]]:
    """Every cell, [rows][columns]; on process 0 only, nothing on the others."""
    size, work = block_size(experiment, lab), lab.work()
    total = experiment.blocks * size * len(table) * sum(nfe(experiment.solver, k) for k in experiment.steps)
    work.progress = Progress(total, experiment.name, lab.quiet or not lab.lead)
    rows = []
    for name, grids in table.items():
        row = []
        for k, grid in grids.items():
            work.note = f"{name} K = {k}"
            contents = []
            for block in range(experiment.blocks):
                samples = Samples(network, grid, experiment.solver, size, lab.seed, block * size)
                contents.append(_features(samples, detector, work, reference is None, decode))
            if lab.lead:
                value = Measurement([score_of(content)[0] for content in contents]) if reference is None else pooled(
                    contents, size, reference)
                row.append(Cell(name, value, sum(float(content["seconds"]) for content in contents)))
        if row:
            rows.append(row)
    work.progress.close()
    return rows


def _features(
    samples: Samples, detector: Detector, work: Work, scores: bool, decode: Optional[Decode]
) -> Optional[Content]:
    splits = _PARTS if scores else 0
    if decode is not None:
        return latent_features(samples, detector, work, decode, splits)
    return features(samples, detector, work, splits)


def pooled(contents: Sequence[Content], size: int, reference: Moments) -> Measurement:
    """FID of all images of blocks of `size` at once, and without each group of them."""
    if "features" in contents[0]:
        every = np.concatenate([content["features"] for content in contents])
        group = groups_of(len(every))
        parts = [every[group != j] for j in range(group.max() + 1)] if len(every) >= 2 * (group.max() + 1) else []
        value = frechet_distance(*moments(every), *reference)
        return Measurement([value], [frechet_distance(*moments(part), *reference) for part in parts])
    counted = [(size, *moments_of(content)) for content in contents]
    value = frechet_distance(*pooled_moments(counted), *reference)
    rest = [counted[:i] + counted[i + 1:] for i in range(len(counted))] if len(counted) > 1 else []
    return Measurement([value], [frechet_distance(*pooled_moments(some), *reference) for some in rest])


def pooled_moments(parts: Sequence[Tuple[int, np.ndarray, np.ndarray]]) -> Moments:
    """Mean and covariance (n - 1) of all from (number, mean, covariance) of each part."""
    total = sum(count for count, _, _ in parts)
    mean = sum(count * mu for count, mu, _ in parts) / total
    scatter = sum((count - 1) * cov + count * np.outer(mu - mean, mu - mean) for count, mu, cov in parts)
    return mean, scatter / (total - 1)


def _numbers(cells: List[List[Cell]]) -> Tuple[Dict[str, List[Any]], Dict[str, List[Any]]]:
    rows = {row[0].name: [cell.value.mean for cell in row] for row in cells}
    return rows, {row[0].name: [cell.value.stderr for cell in row] for row in cells}


def _comparisons(cells: List[List[Cell]], paper: Dict[str, List[Optional[float]]]) -> Dict[str, Any]:
    """ART-RL against EDM: the ratio beside the paper's, and the difference in units of its standard error."""
    rows = {row[0].name: row for row in cells}
    if not {"edm", "art_rl"} <= set(rows):
        return {}
    pairs = list(zip(rows["art_rl"], rows["edm"]))
    ratios = {"here": [b.value.mean / a.value.mean for a, b in pairs]}
    if "edm" in paper:
        ratios["paper"] = [b / a if a and b else None for a, b in zip(paper["art_rl"], paper["edm"])]
    gaps = [difference(a.value, b.value, paired=True) for a, b in pairs]
    return {
        "edm / art_rl": ratios,
        "art_rl less edm, from the same noise": {
            "difference": [gap.value for gap in gaps], "stderr": [gap.stderr for gap in gaps]},
    }


def _notes(experiment: Experiment, images: int) -> List[str]:
    notes = []
    if images < experiment.num:
        notes.append(f"{images:,} images per cell, where the paper has {experiment.num:,}: such a FID is biased "
                     "upwards and does not compare with the paper's.")
    if experiment.learned_on:
        notes.append(f"The grid was learned on {experiment.learned_on} and is used unchanged.")
    if experiment.resampled_from:
        own = "; art_rl_own: the learned clock read off at each K" if "art_rl_own" in experiment.grids else ""
        rule = f"art_rl: the grid of K = {experiment.resampled_from}, resampled log-linearly (section 6.5.1)"
        notes.append(f"{rule}{own}.")
    if experiment.network == "mnist":
        notes.append("The network and the LeNet are this project's own: the paper's level of LeNet-FID is another one, "
                     "only ratios compare.")
    return notes


def _draw(
    experiment: Experiment, network: Network, table: Dict[str, Dict[int, Grid]], run: Run, result: Result,
    decode: Optional[Decode], lab: Lab,
) -> None:
    """Sheets of images for each grid and K, and the learned clock; all processes, as images may have to be made."""
    work = lab.work()
    count = min(_SHOWN, block_size(experiment, lab))
    sheets: Dict[str, List[np.ndarray]] = {}
    for name, grids in table.items():
        for grid in grids.values():
            points = end_points(Samples(network, grid, experiment.solver, count, lab.seed), work)
            if points is not None:
                sheets.setdefault(name, []).append(_pixels(points, network, decode))
    if lab.lead:
        name, clock = f"{experiment.name}-sheets.png", f"{experiment.name}-clock.png"
        columns = [f"K = {k}, NFE {n}" for k, n in zip(experiment.steps, result.nfe)]
        plot_sheets(lab.out / name, experiment.title, sheets, columns)
        plot_clock(lab.out / clock, result.settings["grid learned on"], run)
        result.figures = [
            [name, f"{experiment.title}: the same {count} noises on every grid."],
            [clock, f"Speed and clock learned on {result.settings['grid learned on']}."]]


def _pixels(points: np.ndarray, network: Network, decode: Optional[Decode]) -> np.ndarray:
    """uint8 [n, C, H, W] of end points [n, C H W]."""
    images = torch.from_numpy(points).reshape(-1, *network.denoiser.img_shape)
    if decode is not None:
        return decode(images.to(network.denoiser.device)).cpu().numpy()
    return to_pixels(images).reshape(images.shape).numpy()
