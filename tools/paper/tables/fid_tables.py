"""Tables 2 to 8: FID or Inception score of images on several grids, in seed blocks, and what helps to read it.

Symbols
-------
row         a grid rule; column: a number of steps
difference  of two scores from the same noises, which cancels most of their error; its own standard error tells
end points  RMS distance to the fine solution from the same noise: what a grid does to the images, detector or not
"""

from __future__ import annotations

import time
from typing import Any, Dict, List, Optional

import numpy as np
import torch

from art_edm.grids.grid import Grid, read_off, resample
from art_edm.learning.provenance import clock_score
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.standard_errors import Difference, Measurement, difference, jackknife
from art_edm.models.denoiser import Denoiser
from art_edm.models.latents import Decode, decoder_of
from art_edm.models.loading import BUNDLED, Network
from art_edm.runtime.progress import Progress
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.generate import to_pixels
from art_edm.sampling.solvers import nfe, supported
from paper.context import Lab
from paper.experiments import Experiment
from paper.kept_runs import Run
from paper.plots import plot_clock, plot_sheets
from paper.report import Result
from paper.tables.fid_cells import FINE_STEPS, Bench, Cell

__all__ = ["END_POINTS", "grids_of", "ratio", "run_images"]

END_POINTS = "End-point error (RMS over pixels and noises)"
Rows = Dict[str, List[Cell]]
_SHOWN = 9  # images on a sheet for each grid and number of steps


RESAMPLE = {"paper": (resample, "resampled log-linearly (section 6.5.1)"),
            "clock": (read_off, "its clock read off at each K")}


def grids_of(experiment: Experiment, denoiser: Denoiser, run: Run, rule: str = "paper") -> Dict[str, Dict[int, Grid]]:
    """Row -> number of steps -> grid, as the network takes them; `rule` of `RESAMPLE` is Table 5's.

    Raises a ValueError for a grid that it does not support.
    """
    kept = resample_source(experiment, run)
    table: Dict[str, Dict[int, Grid]] = {name: {} for name in experiment.grids}
    for k in experiment.steps:
        rules = hand_made(denoiser, k)
        for name in experiment.grids:
            grid = rules[name] if name in rules else run.grid(k)
            if name == "art_rl" and kept is not None:
                grid = RESAMPLE[rule][0](kept, k)
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
    decode = decoder_of(network)
    run = lab.run(teacher)
    table = grids_of(experiment, network.denoiser, run, lab.resample)
    scores = experiment.metric == "is"
    panel = lab.panel(experiment.metric, experiment.detector, experiment.reference, network)
    detector = panel.detectors["detector"]
    references = lab.references(experiment.reference, panel)
    bench = Bench(experiment, network, panel, references, decode, lab, lab.work())
    cells = _measure(bench, table)
    fid = {"lenet": "LeNet-FID", "resnet": "CIFAR-FID"}.get(detector.name, "FID")
    title = {"is": "Inception score"}.get(experiment.metric, fid)
    evaluations = [nfe(experiment.solver, k) for k in experiment.steps]
    result = Result(
        experiment.name, experiment.title, title, [f"NFE {n}" for n in evaluations],
        {name: [cell.value.mean for cell in row] for name, row in cells.items()},
        {name: [cell.value.stderr for cell in row] for name, row in cells.items()},
        paper=experiment.paper, nfe=evaluations, steps=list(experiment.steps), solver=experiment.solver,
        better="higher" if scores else "lower", yardsticks=bench.yardsticks(),
    )
    bench.work.progress.close()
    if lab.lead:
        _comparisons(cells, result)
        result.settings = {**_settings(bench, run, teacher, cells), "seconds": time.monotonic() - began}
        result.notes = _notes(bench)
    _draw(bench, table, run, result)
    return result


def _settings(bench: Bench, run: Run, teacher: Network, cells: Rows) -> Dict[str, Any]:
    """All that the figures depend on, and what they cost."""
    experiment, network, detector = bench.experiment, bench.network, bench.detector
    every = [cell for row in cells.values() for cell in row]
    return {
        "network": {"name": network.name, "sha256": network.sha256}, "solver": experiment.solver,
        "images": f"{experiment.blocks} x {bench.size}", "seed": bench.lab.seed, "detector": detector.name,
        "detector_sha256": detector.sha256, "reference": experiment.reference or None,
        "grid learned on": teacher.name, "J/J* of the clock": clock_score(run),
        "price of distillation": run.profile.price, "evaluations of training": sum(run.evaluations.values()),
        "stderr from": {"is": "blocks"}.get(experiment.metric, every[0].value.basis),
        "noises of end points": bench.noises, "fine solution": f"Heun, {FINE_STEPS} steps, EDM's rule",
        "seconds of sampling": sum(cell.seconds for cell in every),
    }


def _measure(bench: Bench, table: Dict[str, Dict[int, Grid]]) -> Rows:
    """Every cell, row -> [columns]; on process 0 only, nothing on the others."""
    lab, name = bench.lab, bench.experiment.name
    total = bench.evaluations(bench.experiment.steps, len(table))
    bench.work.progress = Progress(total, name, lab.quiet or not lab.lead)
    rows: Rows = {}
    for row, grids in table.items():
        for k, grid in grids.items():
            bench.work.note = f"{row} K = {k}"
            cell = bench.cell(grid)
            if cell is not None:
                rows.setdefault(row, []).append(cell)
    return rows


def ratio(one: Measurement, base: Measurement) -> Difference:
    """`one` over `base`, which share the seeds; the standard error by leaving out what they share."""
    value = one.mean / base.mean
    if len(one.values) == len(base.values) > 1:  # blocks: the mean of the others, for each
        parts = [(np.sum(each.values) - np.asarray(each.values)) / (len(each.values) - 1) for each in (one, base)]
        return Difference(value, jackknife(parts[0] / parts[1]), f"jackknife of {len(one.values)} blocks")
    if len(one.left_out) == len(base.left_out) > 0:
        stderr = jackknife(np.divide(one.left_out, base.left_out))
        return Difference(value, stderr, f"paired jackknife of {len(one.left_out)} groups")
    return Difference(value, None, None)


def _comparisons(rows: Rows, result: Result) -> None:
    """What helps to read the table: ART-RL against EDM, all rows against EDM, and end points."""
    more, errors = result.more, result.more_stderr
    if {"edm", "art_rl"} <= set(rows):
        found = [ratio(b.value, a.value) for a, b in zip(rows["art_rl"], rows["edm"])]
        more["edm / art_rl"] = {"here": [each.value for each in found]}
        errors["edm / art_rl"] = {"here": [each.stderr for each in found]}
        if "edm" in result.paper:
            more["edm / art_rl"]["paper"] = [
                b / a if a and b else None for a, b in zip(result.paper["art_rl"], result.paper["edm"])]
    if "edm" in rows:
        title = "Difference to edm, from the same noise"
        gaps = {name: [difference(a.value, b.value, paired=True) for a, b in zip(row, rows["edm"])]
                for name, row in rows.items() if name != "edm"}
        more[title] = {name: [gap.value for gap in row] for name, row in gaps.items()}
        errors[title] = {name: [gap.stderr for gap in row] for name, row in gaps.items()}
    for metric in next(iter(rows.values()))[0].others:
        title = METRICS[metric].title
        more[title] = {name: [cell.others[metric].mean for cell in row] for name, row in rows.items()}
        errors[title] = {name: [cell.others[metric].stderr for cell in row] for name, row in rows.items()}
    more[END_POINTS] = {name: [cell.error.rms for cell in row] for name, row in rows.items()}
    errors[END_POINTS] = {name: [cell.error.rms_stderr for cell in row] for name, row in rows.items()}


def _notes(bench: Bench) -> List[str]:
    experiment, images, notes = bench.experiment, bench.experiment.blocks * bench.size, []
    if images < experiment.num:
        notes.append(f"{images:,} images per cell, where the paper has {experiment.num:,}: such a FID is biased "
                     "upwards and does not compare with the paper's.")
    if experiment.learned_on:
        notes.append(f"The grid was learned on {experiment.learned_on} and is used unchanged.")
    if experiment.resampled_from:
        own = "; art_rl_own: the learned clock read off at each K" if "art_rl_own" in experiment.grids else ""
        rule = f"art_rl: the grid of K = {experiment.resampled_from}, {RESAMPLE[bench.lab.resample][1]}"
        notes.append(f"{rule}{own}.")
    if experiment.network in BUNDLED:
        notes.append("The network and the detector are this project's own: the paper's level is another one, only "
                     "ratios compare. Where rows come down to the network's floor, the metric cannot tell them "
                     "apart; their end-point errors can.")
    if experiment.network not in BUNDLED and bench.detector.name != "inception":
        notes.append("The detector is not NVIDIA's Inception: no figure compares with the paper's.")
    return notes


def _draw(bench: Bench, table: Dict[str, Dict[int, Grid]], run: Run, result: Result) -> None:
    """Sheets of images for each grid and K, and the learned clock; all processes, as images may have to be made."""
    experiment, lab, sheets = bench.experiment, bench.lab, {}
    bench.work = lab.work()
    for name, grids in table.items():
        for grid in grids.values():
            points = bench.points(grid)
            if points is not None:
                sheets.setdefault(name, []).append(_pixels(points[:_SHOWN], bench.network, bench.decode))
    if lab.lead:
        name, clock = f"{experiment.name}-sheets.png", f"{experiment.name}-clock.png"
        columns = [f"K = {k}, NFE {n}" for k, n in zip(experiment.steps, result.nfe)]
        plot_sheets(lab.out / name, experiment.title, sheets, columns)
        plot_clock(lab.out / clock, result.settings["grid learned on"], run)
        result.figures = [
            [name, f"{experiment.title}: the same {min(_SHOWN, bench.noises)} noises on every grid."],
            [clock, f"Speed and clock learned on {result.settings['grid learned on']}."]]


def _pixels(points: np.ndarray, network: Network, decode: Optional[Decode]) -> np.ndarray:
    """uint8 [n, C, H, W] of end points [n, C H W]."""
    images = torch.from_numpy(points).reshape(-1, *network.denoiser.img_shape)
    if decode is not None:
        return decode(images.to(network.denoiser.device)).cpu().numpy()
    return to_pixels(images).reshape(images.shape).numpy()
