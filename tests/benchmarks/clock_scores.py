"""LeNet-FID of the clocks of `solver_clocks`: what their gains in end-point error are worth in samples.

All grids of a solver are sampled from the same noises, so that differences to ART's grid are paired.
Run by hand, after solver_clocks has made the grids:
    python -m tests.benchmarks.clock_scores --clocks=cells --mnist=DIR --cache=cells --out=clock_scores.json
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import click
from paper.context import Lab

from art_edm.compare.sample_cache import Samples, scored
from art_edm.grids.grid import Grid
from art_edm.metrics.metric import measure
from art_edm.metrics.panel import Panel
from art_edm.metrics.standard_errors import Measurement, difference
from art_edm.runtime.distributed import ALONE
from art_edm.runtime.files import write_json
from art_edm.runtime.store import Store
from art_edm.sampling.solvers import nfe

from .solver_clocks import RULES, STEPS, Bench

NETWORK = "mnist"


def measured(lab: Lab, grid: Grid, solver: str, num: int) -> Measurement:
    """LeNet-FID against the training set."""
    network = lab.network(NETWORK)
    panel = Panel(["fid"], {"detector": lab.detector("lenet", network)})
    found = scored(Samples(network, grid, solver, num, lab.seed), panel, lab.work(), panel.groups(num))
    return measure([found.of["fid"]], lab.references("mnist:train", panel)["fid"])


@click.command()
@click.option("--solvers", default="euler,heun,rk4,dpmpp2m,ipndm", show_default=True)
@click.option("--steps", default=",".join(map(str, STEPS)), show_default=True)
@click.option("--rules", default=",".join(RULES), show_default=True)
@click.option("--num", default=1000, show_default=True, help="Images per grid.")
@click.option("--noises", default=256, show_default=True, help="As for solver_clocks, whose grids are taken.")
@click.option("--mnist", type=click.Path(path_type=Path), help="Folder with MNIST.")
@click.option("--clocks", type=click.Path(path_type=Path, exists=True), required=True, help="Its --cache.")
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Where features are kept.")
@click.option("--out", type=click.Path(path_type=Path), default="clock_scores.json", show_default=True)
def main(solvers: str, steps: str, rules: str, num: int, noises: int, mnist: Optional[Path], clocks: Path, cache: Path,
         out: Path) -> None:
    """A line for each solver and rule: LeNet-FID, and less ART's."""
    lab = Lab(Store(cache), ALONE, out.parent, mnist=mnist)
    bench, counts = Bench(lab.network(NETWORK), noises, Store(clocks)), [int(k) for k in steps.split(",")]
    table: Dict[str, Any] = {}
    for solver in solvers.split(","):
        values = {rule: [measured(lab, Grid(bench.cell(rule, solver, k)["levels"]), solver, num) for k in counts]
                  for rule in dict.fromkeys(["art", *rules.split(",")])}
        for rule, row in values.items():
            gaps = [difference(one, base, paired=True) for one, base in zip(row, values["art"])]
            table.setdefault(solver, {})[rule] = [
                {"fid": one.mean, "stderr": one.stderr, "less_art": gap.value, "less_art_stderr": gap.stderr}
                for one, gap in zip(row, gaps)]
            shown = "  ".join(f"{one.mean:.4g}±{one.stderr:.2g} ({gap.value:+.3g}±{gap.stderr:.2g})"
                              for one, gap in zip(row, gaps))
            click.echo(f"{solver:<8} {rule:<9} {shown}")
        cost = {each: [nfe(each, k) for k in counts] for each in table}
        write_json(out, {"network": NETWORK, "steps": counts, "nfe": cost, "images": num, "table": table})


if __name__ == "__main__":
    main()
