"""Frechet distance against the square root of a matrix that upstream takes: time and agreement, in one run.

Symbols
-------
d          number of features
rank       of the first covariance: d, or less where there are fewer images than features
ours       seconds of `art_edm.metrics.frechet.frechet_distance`
sqrtm      seconds of the same distance by scipy.linalg.sqrtm, as EDM's and EDM2's scripts take it
exact      the distance from the features themselves: tr (cov1 cov2)^(1/2) is the sum of the singular values of
           X1 X2^T / sqrt((n1 - 1)(n2 - 1)) for centred features X [n, d], and no covariance is formed
error      |distance - exact| / exact

    python -m tests.benchmarks.frechet_speed --out tests/benchmarks/results/frechet_speed.json
"""

from __future__ import annotations

import inspect
import time
import warnings
from pathlib import Path
from typing import Callable, Dict, Optional, Tuple

import click
import numpy as np
import scipy
import scipy.linalg

from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.runtime.cli import versions
from art_edm.runtime.files import write_json

CASES = ((64, 600), (64, 40), (512, 1500), (512, 300), (2048, 5000), (2048, 1500))  # d, images


def by_sqrtm(mu1: np.ndarray, cov1: np.ndarray, mu2: np.ndarray, cov2: np.ndarray) -> float:
    """The distance by the square root of the product, its imaginary part dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = scipy.linalg.sqrtm(cov1 @ cov2, disp=False)[0]
    return float(np.square(mu1 - mu2).sum() + np.trace(cov1 + cov2 - 2 * root).real)


def exact(x1: np.ndarray, x2: np.ndarray) -> float:
    """The distance of features [n1, d] and [n2, d] without covariances."""
    (m1, y1), (m2, y2) = ((x.mean(axis=0), x - x.mean(axis=0)) for x in (x1, x2))
    y1, y2 = y1 / np.sqrt(len(y1) - 1), y2 / np.sqrt(len(y2) - 1)
    # Y1 Y2^T and R1 R2^T of QR decompositions Y^T = Q R have the same singular values, and are smaller
    r1, r2 = (np.linalg.qr(y)[1] if len(y) > y.shape[1] else y for y in (y1, y2))
    cross = np.linalg.svd(r1 @ r2.T, compute_uv=False).sum()
    return float(np.square(m1 - m2).sum() + np.square(y1).sum() + np.square(y2).sum() - 2 * cross)


def features(d: int, images: int, seed: int) -> np.ndarray:
    """Features [images, d] whose variances fall over four decades, all mixed."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0]
    return rng.standard_normal((images, d)) * np.logspace(0, -2, d) @ turn + 0.05 * rng.standard_normal(d)


def timed(function: Callable[..., float], *args: np.ndarray) -> Tuple[float, float]:
    """Value, and seconds of the faster of two runs."""
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        value = function(*args)
        seconds.append(time.perf_counter() - began)
    return value, min(seconds)


def measure(d: int, images: int) -> Dict[str, float]:
    """One row of the table."""
    x1, x2 = features(d, images, 1), features(d, 2 * d + 200, 2)
    stats = (*moments(x1), *moments(x2))
    true = exact(x1, x2)
    (mine, ours), (theirs, sqrtm) = timed(frechet_distance, *stats), timed(by_sqrtm, *stats)
    return {
        "d": d, "rank": min(d, images - 1), "ours": ours, "sqrtm": sqrtm, "ratio": sqrtm / ours, "exact": true,
        "error": abs(mine - true) / true, "sqrtm_error": abs(theirs - true) / true,
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Also write the table as JSON.")
def main(out: Optional[Path]) -> None:
    """Print the table."""
    if "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
        raise click.ClickException(f"scipy {scipy.__version__} has no sqrtm(disp=...); upstream needs one before 1.18")
    click.echo(f"{'d':>5} {'rank':>5} {'ours s':>8} {'sqrtm s':>8} {'ratio':>6} {'error':>9} {'of sqrtm':>9}")
    rows = []
    for d, images in CASES:
        row = measure(d, images)
        rows.append(row)
        click.echo("{d:5} {rank:5} {ours:8.4f} {sqrtm:8.4f} {ratio:6.1f} {error:9.1e} {sqrtm_error:9.1e}".format(**row))
    if out is not None:
        write_json(out, {"rows": rows, "versions": {**versions(), "scipy": scipy.__version__}})


if __name__ == "__main__":
    main()
