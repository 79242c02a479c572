"""Transfer: a grid learned on one field, used on another; what it costs not to learn again.

Symbols
-------
field    mnist and cifar10, the bundled networks; mnist-set and cifar10-set, the exact fields of real images
error    RMS distance of end points to a fine Heun solution from the same noise
cost     error of a grid over that of the grid learned on the field itself
"""

from __future__ import annotations

import time
from typing import Dict, NamedTuple, Tuple

from art_edm.compare.sample_cache import Samples, end_points
from art_edm.grids.grid import Grid
from art_edm.metrics.end_point import EndPointError, end_point_error
from art_edm.models.loading import BUNDLED, Network
from art_edm.sampling.baselines import hand_made
from art_edm.sampling.solvers import SOLVERS, nfe, supported
from paper.context import Lab
from paper.experiments import Experiment
from paper.report import Result
from paper.tables.empirical_fields import cifar10_images, empirical, mnist_images

__all__ = ["Fine", "endpoint", "fields", "run_transfer"]

SET = 2000  # images of an exact field


class Fine(NamedTuple):
    """The solution that end points are compared with: steps of Heun's method on EDM's grid, from these noises."""

    noises: int
    num_steps: int = 100


def fields(lab: Lab, size: int = SET) -> Dict[str, Network]:
    """The fields of digits and, where CIFAR-10 can be had here, of its images."""
    images = mnist_images(lab.mnist, size)
    found = {"mnist": lab.network("mnist"), "mnist-set": empirical("mnist-set", images, lab.device)}
    if lab.cifar10 is not None:
        found["cifar10-set"] = empirical("cifar10-set", cifar10_images(lab.cifar10, size), lab.device)
    return found


def endpoint(network: Network, grid: Grid, solver: str, fine: Fine, lab: Lab) -> EndPointError:
    """End-point error of a grid; on processes other than the first, zeros."""
    denoiser = network.denoiser
    exact = hand_made(denoiser, fine.num_steps)["edm"]
    work = lab.work(batch=fine.noises)
    points = end_points(Samples(network, supported(denoiser, grid), solver, fine.noises, lab.seed + 1), work)
    reference = end_points(Samples(network, exact, "heun", fine.noises, lab.seed + 1), work)
    return end_point_error(points, reference) if points is not None else EndPointError(0.0, 0.0, 0.0, 0.0, 0.0)


def run_transfer(experiment: Experiment, lab: Lab) -> Result:
    """Rows: where the grid was learned, and EDM's; columns: field, solver, number of steps."""
    began = time.monotonic()
    of_networks = experiment.name == "transfer-networks"  # these with all solvers of the product
    known = {name: lab.network(name) for name in BUNDLED} if of_networks else fields(lab)
    solvers: Tuple[str, ...] = tuple(SOLVERS) if of_networks else ("heun", "euler")
    runs = {name: lab.run(network) for name, network in known.items()}
    fine = Fine(lab.num or experiment.num)
    columns = [(field, solver, k) for field in known for solver in solvers for k in experiment.steps]

    def error(row: str, field: str, solver: str, num_steps: int) -> EndPointError:
        grid = runs[row].grid(num_steps) if row in runs else hand_made(known[field].denoiser, num_steps)[row]
        return endpoint(known[field], grid, solver, fine, lab)

    found = {row: [error(row, *column) for column in columns] for row in [*known, "edm", "dpm"]}
    own = [found[field][i].rms for i, (field, _, _) in enumerate(columns)]
    result = Result(
        experiment.name, experiment.title, "end-point error (RMS over pixels and noises)",
        [f"{field} {solver} {k}" for field, solver, k in columns],
        {_title(row): [error.rms for error in errors] for row, errors in found.items()},
        {_title(row): [error.rms_stderr for error in errors] for row, errors in found.items()},
        more={
            "Median over noises": {_title(row): [error.median for error in errors] for row, errors in found.items()},
            "Cost: error over that of the grid learned on the field itself": {
                _title(row): [error.rms / mine if mine else None for error, mine in zip(errors, own)]
                for row, errors in found.items()},
        },
    )
    result.settings = {
        **({} if of_networks else {"images of an exact field": SET}), "noises": fine.noises,
        "fine": f"Heun, {fine.num_steps} steps, EDM's rule", "seed": lab.seed,
        "NFE": {f"{solver} {k}": nfe(solver, k) for solver in solvers for k in experiment.steps},
        "price of distillation": {name: run.profile.price for name, run in runs.items()},
        "seconds": time.monotonic() - began,
    }
    result.notes = ["Rows: the field the grid was learned on. mnist and cifar10 are the bundled networks."]
    if not of_networks:
        result.notes.append(f"The sets are exact: the score of {SET:,} training images, whose paths end on one of "
                            "them. A path that ends on another image than the fine solution's dominates the RMS; the "
                            "median is hardly touched by it.")
    return result


def _title(row: str) -> str:
    return row if row in ("edm", "dpm") else f"learned on {row}"
