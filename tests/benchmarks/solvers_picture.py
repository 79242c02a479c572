"""The picture of docs/solvers.md: end-point error and LeNet-FID over evaluations, on EDM's rule and on ART's grids.

    python -m tests.benchmarks.solvers_picture

It draws results/solvers.json (of solvers.py), results/peers.json (of peers.py) and results/solvers_fid.json (of
fid.py gen --reference-error), and measures nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, List, Tuple

from matplotlib.figure import Figure

from art_edm.runtime.files import atomic_write

RESULTS = Path(__file__).parent / "results"
OUT = RESULTS.parents[2] / "art_edm" / "docs" / "solvers.png"
SOLVERS = ["heun", "dpmpp2m", "unipc", "ipndm3", "clock-denoised", "clock"]
EDM_SOLVERS = ["clock-denoised", "clock"]
PEERS = {"gits": "GITS, its iPNDM", "dm-nonuniform": "DM-NonUniform, its UniPC"}


def read(name: str) -> Dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def curve(cells: Dict[str, Any]) -> Tuple[List[int], List[float]]:
    """NFE -> error, ascending."""
    pairs = sorted((int(nfe), cell) for nfe, cell in cells.items())
    return [nfe for nfe, _ in pairs], [cell for _, cell in pairs]


def errors(axes: Any) -> None:
    """Mean end-point errors of the judging noises."""
    table, peers = read("solvers.json")["solvers"], read("peers.json")
    for i, solver in enumerate(SOLVERS):
        rows = table[solver]["art"]
        axes.plot(*curve({nfe: row["judge"]["mean"] for nfe, row in rows.items()}), f"C{i}o-", label=solver, ms=4)
    for solver in EDM_SOLVERS:
        rows = {nfe: row["cells"][solver]["mean"] for nfe, row in peers["edm"].items()}
        axes.plot(*curve(rows), f"C{SOLVERS.index(solver)}--", label=f"{solver}, EDM's rule")
    for name, mark in zip(PEERS, "^v"):
        rows = {nfe: row["cells"]["theirs"]["mean"] for nfe, row in peers[name].items()}
        axes.plot(*curve(rows), f"k{mark}:", label=PEERS[name], ms=4)
    axes.set(yscale="log", xlabel="evaluations of an image", ylabel="mean end-point error", title="mnist, ART's grids",
             ylim=(0.008, 0.6))


def fids(axes: Any) -> None:
    """LeNet-FID against data, and that of the exact ends."""
    rows = read("solvers_fid.json")["rows"]
    for solver in dict.fromkeys(row["solver"] for row in rows):
        mine = {row["nfe"]: row["fid"] for row in rows if row["solver"] == solver}
        axes.plot(*curve(mine), f"C{SOLVERS.index(solver)}o-", label=solver, ms=4)
    axes.axhline(rows[0]["fid_of_exact"], color="k", lw=1, label="exact ends")
    axes.set(yscale="log", xlabel="evaluations of an image", ylabel="LeNet-FID", title="mnist, ART's grids")


def main() -> None:
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    errors(left)
    fids(right)
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7, ncols=1 + (axes is left))
    atomic_write(OUT, lambda file: figure.savefig(file, format="png", dpi=130))


if __name__ == "__main__":
    main()
