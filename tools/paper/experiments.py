"""Every experiment of the paper and of this project, described once.

The paper does not name its networks' files; those chosen here are the ones whose published FIDs fit its EDM rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Dict, List, Optional, Sequence, Tuple

from paper.context import INCEPTION
from paper.report import paper_table

__all__ = ["TABLES", "Experiment", "select"]


@dataclass(frozen=True)
class Experiment:
    """One table.

    Attributes:
        kind: oned; images: a distance between images and a data set; transfer, ablation: of exact fields.
        network: built-in name or official file.
        files: official files it needs beside those of the network and its reference.
        num, blocks: images per cell, in so many seed blocks.
        learned_on: the network whose grid is used unchanged; the experiment's own if empty.
        resampled_from: the K whose learned grid is resampled to all others (section 6.5.1); 0: the clock is read off.
        noises: of the end-point errors beside the metric.
        floor: steps of Heun's method on EDM's rule that show what the network itself can do; 0 leaves it out.
        printed: the paper's table that its rows stand beside; the one of its name if empty.
        figures: the paper's figures that show it.
    """

    name: str
    title: str
    kind: str
    network: str = ""
    reference: str = ""
    detector: str = "inception"
    metric: str = "fid"
    solver: str = ""
    steps: Tuple[int, ...] = ()
    grids: Tuple[str, ...] = ("uniform", "dpm", "edm", "art_rl")
    num: int = 50_000
    blocks: int = 5
    learned_on: str = ""
    resampled_from: int = 0
    noises: int = 64
    floor: int = 0
    printed: str = ""
    figures: Tuple[str, ...] = ()

    @property
    def official(self) -> List[str]:
        """The official files it needs."""
        names = [self.network, self.learned_on, self.reference]
        needed = [name for name in names if name.endswith((".pkl", ".npz"))]
        return [*dict.fromkeys(needed), INCEPTION] if needed else []

    @property
    def paper(self) -> Dict[str, List[Optional[float]]]:
        """What the paper prints for its rows, None where it prints nothing for a number of steps."""
        printed = paper_table(self.printed or self.name)
        known = {k: i for i, k in enumerate(printed.get("steps", []))}
        return {name: [row[known[k]] if k in known else None for k in self.steps]
                for name, row in printed.get("rows", {}).items()}


CIFAR, AFHQ = "edm-cifar10-32x32-cond-vp.pkl", "edm-afhqv2-64x64-uncond-vp.pkl"
FFHQ, IMAGENET = "edm-ffhq-64x64-uncond-vp.pkl", "edm-imagenet-64x64-cond-adm.pkl"
XS = "edm2-img512-xs-2147483-0.135.pkl"
COMMON = (2, 3, 5, 7, 10, 18)
PUBLISHED = ("dpm", "edm", "art_rl")

_OFFICIAL = Experiment(
    "table2", "CIFAR-10, Heun", "images", CIFAR, "cifar10-32x32.npz", solver="heun", steps=COMMON,
    figures=("figure3", "figure5", "figure6"),
)
_MNIST = Experiment(
    "table4", "MNIST, RK4", "images", "mnist", "mnist:train", "lenet", solver="rk4", steps=COMMON, num=10_000,
    noises=256, floor=50, figures=("figure3", "figure11"),
)
_SMALL = Experiment(
    "table2-small", "CIFAR-10, bundled network, Heun", "images", "cifar10", "cifar10:train", "cifar10", solver="heun",
    steps=COMMON, num=10_000, noises=256, floor=50, printed="table2", figures=("figure3",),
)
_LATENT = replace(_OFFICIAL, name="table7", title="ImageNet-512 latents, EDM2-XS, grid of CIFAR-10", network=XS,
                  reference="img512.pkl", grids=PUBLISHED, learned_on=CIFAR, figures=("figure3", "figure14"))
_ALL = (
    Experiment("table1", "one-dimensional example, Euler", "oned", "oned", solver="euler",
               steps=(2, 5, 10, 20, 50, 100), num=1_000_000, figures=("figure4", "figure8")),
    _OFFICIAL,
    replace(_OFFICIAL, name="table3", title="CIFAR-10, Euler", solver="euler", steps=(2, 3, 5, 7, 12, 30, 50, 80),
            figures=("figure3", "figure7")),
    _SMALL,
    replace(_SMALL, name="table3-small", title="CIFAR-10, bundled network, Euler", solver="euler",
            steps=(2, 3, 5, 7, 12, 30), printed="table3"),
    _MNIST,
    replace(_MNIST, name="table4-euler", title="MNIST, Euler", solver="euler", figures=("figure3",)),
    replace(_MNIST, name="table4-heun", title="MNIST, Heun", solver="heun", figures=("figure3",)),
    replace(_OFFICIAL, name="table5", title="CIFAR-10, the grid of K = 18 resampled, Heun", steps=(4, 6, 9, 12, 15, 20),
            grids=PUBLISHED, resampled_from=18, figures=("figure9", "figure10")),
    replace(_SMALL, name="table5-small", title="CIFAR-10, bundled network, the grid of K = 18 resampled, Heun",
            steps=(4, 6, 9, 12, 15, 20), grids=("dpm", "edm", "art_rl", "art_rl_own"), resampled_from=18,
            printed="table5", figures=("figure10",)),
    replace(_MNIST, name="table5-mnist", title="MNIST, the grid of K = 18 resampled, Heun", solver="heun",
            steps=(4, 6, 9, 12, 15, 20), grids=("dpm", "edm", "art_rl", "art_rl_own"), resampled_from=18,
            figures=("figure10",)),
    replace(_OFFICIAL, name="table6-afhqv2", title="AFHQv2 64x64, grid of CIFAR-10", network=AFHQ, grids=PUBLISHED,
            reference="afhqv2-64x64.npz", learned_on=CIFAR, figures=("figure3", "figure12")),
    replace(_OFFICIAL, name="table6-ffhq", title="FFHQ 64x64, grid of CIFAR-10", network=FFHQ, grids=PUBLISHED,
            reference="ffhq-64x64.npz", learned_on=CIFAR, figures=("figure3", "figure13")),
    replace(_OFFICIAL, name="table6-imagenet64", title="ImageNet 64x64, grid of CIFAR-10", network=IMAGENET,
            grids=PUBLISHED, reference="imagenet-64x64.npz", learned_on=CIFAR, figures=("figure3", "figure14")),
    _LATENT,
    replace(_LATENT, name="table8", title=f"{_LATENT.title}: Inception score", metric="is", figures=("figure14",)),
    Experiment("transfer", "grids learned on one field and used on another", "transfer", "mnist", steps=(5, 10, 18),
               num=64),
    Experiment("transfer-networks", "grids of the two bundled networks, each also on the other", "transfer", "cifar10",
               steps=(5, 10), num=64),
    Experiment("ablation-variance", "variance of the policy: adaptive against fixed", "ablation"),
    Experiment("ablation-clock", "training clock: as fine as the grid, or finer", "ablation"),
    Experiment("ablation-live", "rollouts on the field itself against the cached ones", "ablation"),
    Experiment("ablation-price", "price of distillation", "ablation"),
    Experiment("ablation-solver", "grids learned for Euler under Heun and RK4", "ablation", num=256),
    Experiment("ablation-budget", "iterations to converge", "ablation"),
)
TABLES: Dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}


def select(names: Sequence[str]) -> List[Experiment]:
    """Experiments by name, by a pattern (table4*), by the start of names (table6, ablation), or by the paper's figure.

    Without names, all.

    Raises a ValueError for a name that none has.
    """
    chosen: "set[str]" = set()
    for name in names or list(TABLES):
        found = _matching(name)
        if not found:
            figures = sorted({figure for item in _ALL for figure in item.figures}, key=lambda text: int(text[6:]))
            raise ValueError(f"found {name!r}, expected some of {', '.join([*TABLES, *figures])}")
        chosen.update(found)
    return [item for key, item in TABLES.items() if key in chosen]


def _matching(name: str) -> List[str]:
    """Names of the experiments that `name` means; the nearest meaning counts."""
    meanings = (
        [key for key in TABLES if key == name], [key for key in TABLES if fnmatch(key, name)],
        [key for key in TABLES if key.startswith(f"{name}-")],
        [key for key, item in TABLES.items() if name in item.figures],
    )
    return next((keys for keys in meanings if keys), [])
