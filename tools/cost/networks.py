"""Networks to measure time and memory on: NVlabs' architectures at their official sizes, with random weights.

    songunet56m   CIFAR-10's DDPM++, 32x32x3, 56 M parameters
    adm296m       ImageNet-64's ADM, 64x64x3, 1,000 classes, 296 M parameters
    edm2xs        EDM2-XS, 64x64x4 latents, 1,000 classes, 125 M parameters

The modules are read from a checkout and run only if third_party/upstream.json lists them. What starts at zero is
drawn, too, as a trained network has no branch that does nothing; its grids mean nothing, its cost is the real one's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Dict, NamedTuple

import torch

from art_edm.models.loading import Network, load_network
from art_edm.models.nvlabs import NetworkDenoiser
from art_edm.pickles.known_sources import checkout_folder, listed_sources, run_source
from art_edm.runtime.files import sha256_of

__all__ = ["SIZES", "NoCheckout", "Size", "benchmark_network", "fill_zeros"]


class NoCheckout(ValueError):
    """Upstream's modules are not at hand, or of no known version."""


class Size(NamedTuple):
    """An architecture of upstream: file in its repositories, class, and arguments."""

    file: str
    kind: str
    options: Dict[str, Any]


SIZES: Dict[str, Size] = {
    "songunet56m": Size("edm/training/networks.py", "EDMPrecond", dict(
        img_resolution=32, img_channels=3, model_type="SongUNet", model_channels=128, channel_mult=[2, 2, 2],
        channel_mult_noise=1, resample_filter=[1, 1], augment_dim=9)),
    "adm296m": Size("edm/training/networks.py", "EDMPrecond", dict(
        img_resolution=64, img_channels=3, label_dim=1000, model_type="DhariwalUNet", model_channels=192,
        channel_mult=[1, 2, 3, 4])),
    "edm2xs": Size("edm2/training/networks_edm2.py", "Precond", dict(
        img_resolution=64, img_channels=4, label_dim=1000, model_channels=128)),
}


def benchmark_network(name: str, device: "str | torch.device" = "cpu", **others: Any) -> Network:
    """One of `SIZES` with random weights, else what `load_network` makes of the name and the `others`.

    Raises a NoCheckout if upstream's modules are needed and missing, and what `load_network` raises.
    """
    if name not in SIZES:
        return load_network(name, device, **others)
    net = random_network(SIZES[name])
    denoiser = NetworkDenoiser(net.to(device)).eval().requires_grad_(False)
    denoiser.trial(name)
    return Network(denoiser, name, None, {"weights": "random"})


def random_network(size: Size, seed: int = 0) -> torch.nn.Module:
    """Upstream's network of this size, all of its weights drawn."""
    module = _upstream_module(size.file)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = getattr(module, size.kind)(**size.options)
        fill_zeros(net)
    return net


@torch.no_grad()
def fill_zeros(net: torch.nn.Module) -> None:
    """Draw the matrices and filters that are (nearly) zero, at the scale that keeps a signal's; set gains to 1/2."""
    for value in net.parameters():
        if value.ndim > 1 and value.abs().max() < 1e-3:
            value.normal_(0, 0.5 * value[0].numel() ** -0.5)
        elif value.ndim == 0 and not value:
            value.fill_(0.5)


def _upstream_module(file: str) -> Any:
    """Upstream's module `file` of a checkout in $ART_EDM_UPSTREAM or third_party/."""
    folders = [os.environ.get("ART_EDM_UPSTREAM"), checkout_folder()]
    path = next((Path(f) / file for f in folders if f and (Path(f) / file).is_file()), None)
    if path is None:
        raise NoCheckout(f"found no {file} in $ART_EDM_UPSTREAM or third_party/, expected a checkout of NVlabs' code; "
                         "get it with: python tools/patch_upstream.py")
    known = listed_sources().get(sha256_of(path))
    if known is None:
        raise NoCheckout(f"found a version of {path} that third_party/upstream.json does not list, expected an "
                         "unaltered one; get it with: python tools/patch_upstream.py")
    return run_source(known, path.read_text(encoding="utf-8"))
