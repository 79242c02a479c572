"""What experiments share: networks and references by their official names, runs and samples that are kept.

Symbols
-------
resource    a file that NVIDIA publishes, looked for in one folder under its official name
lacking     (resource or option, where it is had) for what an experiment needs and this machine does not have
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Dict, List, Optional, Tuple

import torch
from networks.cifar10 import load_cifar10

from art_edm.compare.sample_cache import Work
from art_edm.compare.score_grids import mnist_reference, true_images
from art_edm.learning.config import PRESETS, TrainConfig
from art_edm.metrics.detectors import INCEPTION_URL, Detector, load_detector
from art_edm.metrics.dinov2 import DINO_URL, load_dinov2
from art_edm.metrics.feature_stats import METRICS
from art_edm.metrics.mnist import load_mnist
from art_edm.metrics.panel import Panel
from art_edm.metrics.references import load_reference
from art_edm.models.loading import Network, load_network
from art_edm.runtime.distributed import World
from art_edm.runtime.progress import GracefulStop
from art_edm.runtime.store import Content, Store
from paper.kept_runs import Run, learn

__all__ = ["INCEPTION", "Lab", "address_of"]

_CDN = "https://nvlabs-fi-cdn.nvidia.com"
INCEPTION, DINO = (url.rpartition("/")[2] for url in (INCEPTION_URL, DINO_URL))
IS_PARTS = 2  # of the Inception score, in each block
_FOLDERS = {"edm-": f"{_CDN}/edm/pretrained", "edm2-": f"{_CDN}/edm2/posthoc-reconstructions",
            "img512": f"{_CDN}/edm2/dataset-refs", "inception": INCEPTION_URL.rpartition("/")[0]}


def address_of(name: str) -> str:
    """Where the file of this official name is published."""
    folder = next((url for start, url in _FOLDERS.items() if name.startswith(start)), f"{_CDN}/edm/fid-refs")
    return f"{folder}/{name}"


@dataclass
class Lab:
    """Where things are, and how work is done.

    Args:
        store: finished work.
        networks: folder with the files of `address_of`.
        mnist: folder with MNIST's four files; None downloads them once.
        cifar10: archive or folder of CIFAR-10 as JPEGs, train/CLASS/NNNN.jpg.
        num: images per cell in place of an experiment's own number.
        seed: of training and of sampling.
        forced: the device was asked for by name: networks that need a GPU are run without one.
        trust: run the code of pickles that are not known.
        resample: rule of Table 5, paper or clock.
    """

    store: Store
    world: World
    out: Path
    networks: Optional[Path] = None
    mnist: Optional[Path] = None
    cifar10: Optional[Path] = None
    num: Optional[int] = None
    seed: int = 0
    batch: int = 64
    quiet: bool = True
    forced: bool = False
    trust: bool = False
    stop: Optional[GracefulStop] = None
    resample: str = "paper"
    _networks: Dict[str, Network] = field(default_factory=dict)
    _images: Dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where networks are evaluated."""
        return self.world.device

    @property
    def lead(self) -> bool:
        """Whether this process writes and prints."""
        return self.world.rank == 0

    def work(self, batch: Optional[int] = None) -> Work:
        """How samples are made."""
        return Work(self.store, self.world, batch or self.batch, stop=self.stop)

    def file(self, name: str) -> Optional[Path]:
        """The file of this official name, if it is there."""
        path = None if self.networks is None else self.networks / name
        return path if path is not None and path.is_file() else None

    def lacking(self, names: List[str]) -> List[Tuple[str, str]]:
        """What of these files is not there, and a GPU where any is used."""
        found = [(name, f"`curl -LO {address_of(name)}`, in the folder for --networks")
                 for name in names if self.file(name) is None]
        if names and self.device.type == "cpu" and not self.forced:
            found.append(("a GPU", "weeks on a CPU; --device=cpu to do it all the same, with --num=N"))
        return found

    def network(self, name: str) -> Network:
        """A network by its official file name, or as `load_network` names it; loaded once."""
        if name not in self._networks:
            path = self.file(name)
            self._networks[name] = load_network(str(path or name), self.device, trust=self.trust)
        return self._networks[name]

    def detector(self, name: str, network: Network, scores: bool = False) -> Detector:
        """A bundled detector, or Inception from the folder of the networks."""
        shape = network.denoiser.img_shape
        if name == "inception":
            name = str(self.file(INCEPTION) or INCEPTION)
            shape = (3, shape[1], shape[2])
        return load_detector(name, shape, self.device, scores, trust=self.trust, quiet=True)

    def panel(self, metric: str, detector: str, reference: str, network: Network) -> Panel:
        """A metric by its detector's name and, where the reference and the folder of networks have it, FD-DINOv2."""
        metrics, detectors = [metric], {"detector": self.detector(detector, network, metric == "is")}
        weights, statistics = self.file(DINO), self.file(reference)
        known = load_reference(str(statistics), quiet=True).sets if weights and statistics else {}
        if "fd_dinov2" in known:
            metrics.append("fd_dinov2")
            detectors["dinov2"] = load_dinov2(str(weights), self.device, quiet=True)
        return Panel(metrics, detectors, IS_PARTS)

    def true_images(self, name: str) -> torch.Tensor:
        """Images of mnist:SPLIT or cifar10:SPLIT, uint8 [N, C, H, W], those of CIFAR-10 by class; read once.

        Raises a ValueError if they are not there.
        """
        kind, _, split = name.partition(":")
        if name not in self._images:
            self._images[name] = (load_mnist(split, self.mnist)[0][:, None] if kind == "mnist" else
                                  load_cifar10(split, str(self.cifar10))[0])
        return self._images[name]

    def identity_of(self, name: str) -> Dict[str, str]:
        """What tells these images from all others: those of MNIST are known, those of CIFAR-10 may be any files."""
        known = name.startswith("mnist:")
        digest = "" if known else hashlib.sha256(self.true_images(name).numpy().tobytes()).hexdigest()
        return {"kind": name, "images": digest}

    def references(self, name: str, panel: Panel) -> Dict[str, Content]:
        """Metric -> statistics of mnist:train, cifar10:train or an official file, for those that compare with one."""
        comparing = [metric for metric in panel.metrics if METRICS[metric].needs_reference]
        if not comparing:
            return {}
        if name == "mnist:train":
            return mnist_reference("train", panel, self.device, self.store, self.mnist)
        if name == "cifar10:train":
            images = self.true_images(name)
            found = true_images(self.identity_of(name), lambda: images, len(images), panel, self.device, self.store)
            return {metric: found.of[metric][0].statistics() for metric in comparing}
        reference = load_reference(str(self.file(name) or name), quiet=True)
        for metric in comparing:
            detector = panel.detectors[METRICS[metric].detector]
            reference.notes_for(metric, detector.name, detector.sha256, detector.dim)
        return {metric: reference.of(metric) for metric in comparing}

    def run(self, network: Network, **settings: object) -> Run:
        """A run of ART-RL by the default recipe but for `settings`; kept."""
        config: TrainConfig = PRESETS["default"].changed(**{"seed": self.seed, **settings})
        return learn(network, config, self.store, self.world, self.quiet or not self.lead)
