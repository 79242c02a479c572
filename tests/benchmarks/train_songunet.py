"""Train a small SongUNet of NVlabs/edm on MNIST or CIFAR-10 with a loop of our own; save it as upstream's pickles are.

The pickle embeds upstream's source code, so it is made where it is needed and never shipped. Run by hand:

    ART_EDM_UPSTREAM=DIR python tests/benchmarks/train_songunet.py --data=MNIST_DIR --out=songunet.pkl
    ART_EDM_UPSTREAM=DIR python tests/benchmarks/train_songunet.py --images=cifar10 --data=cifar10.tar.xz
"""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any, Dict, Tuple

import click
import torch
from networks.cifar10 import load_cifar10
from networks.loop import to_unit
from networks.score import score_loss, stratified_sigma

from art_edm.metrics.mnist import load_mnist
from art_edm.runtime.cli import Command
from art_edm.runtime.files import atomic_write, save_tensors
from art_edm.runtime.progress import Progress
from art_edm.sampling.noise import seeded_generator

SIZE = dict(
    model_type="SongUNet", model_channels=24, channel_mult=[1, 2, 2], num_blocks=1, attn_resolutions=[], dropout=0.0,
)


def networks(upstream: Path) -> Any:
    """Upstream's module `training.networks`."""
    sys.path.insert(0, str(upstream))
    from training import networks as module

    return module


def step(net: torch.nn.Module, ema: torch.nn.Module, optimizer: Any, images: torch.Tensor, seed: int, it: int,
         total: int, batch: int) -> float:
    """One step of Adam at a rate that falls linearly to zero, and of the average; colours are half mirrored."""
    rng = seeded_generator(seed, it)
    y, colour = to_unit(images[torch.randint(len(images), (batch,), generator=rng)]), images.shape[1] == 3
    if colour:
        y = torch.where(torch.rand(batch, 1, 1, 1, generator=rng) < 0.5, y, y.flip(3))
    sigma = stratified_sigma(batch, *((-1.2, 1.2) if colour else (-0.5, 1.3)), rng)
    loss = score_loss(net, y, sigma, torch.randn(y.shape, generator=rng))
    for group in optimizer.param_groups:
        group["lr"] = 2e-3 * min(1, (it + 1) / 100) * (1 - it / total)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        for average, value in zip(ema.parameters(), net.parameters()):
            average.lerp_(value, 1 - (1 - 1 / (it + 1)) ** 17.97)
    return float(loss.detach())


def parts(module: Any, shape: torch.Size, seed: int) -> Tuple[Any, Any, Any]:
    """Network, average and optimizer for images [N, C, H, W] of this shape."""
    torch.manual_seed(seed)
    make = lambda: module.EDMPrecond(shape[-1], shape[1], **SIZE).to(memory_format=torch.channels_last)  # noqa: E731
    net, ema = make(), make()
    ema.load_state_dict(net.state_dict())
    return net.train(), ema, torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))


@click.command(cls=Command)
@click.option("--images", default="mnist", show_default=True, type=click.Choice(["mnist", "cifar10"]))
@click.option("--data", help="Folder with the MNIST files, downloaded by default; folder or archive of CIFAR-10.")
@click.option("--iterations", default=3000, show_default=True)
@click.option("--batch", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", default="songunet.pkl", show_default=True, type=click.Path(path_type=Path))
def main(images: str, data: str, iterations: int, batch: int, seed: int, out: Path) -> None:
    """Some minutes of training; continues from OUT.ckpt if there is one."""
    module = networks(Path(os.environ["ART_EDM_UPSTREAM"]) / "edm")
    pixels = load_mnist("train", data)[0][:, None] if images == "mnist" else load_cifar10("train", data)[0]
    net, ema, optimizer = parts(module, pixels.shape, seed)
    checkpoint, first = out.with_suffix(".ckpt"), 0
    state: Dict[str, Any] = dict(net=net, ema=ema, optimizer=optimizer)
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        first = saved.pop("iteration")
        for name, value in saved.items():
            state[name].load_state_dict(value)
    progress = Progress(iterations, "SongUNet", start=first)
    for it in range(first, iterations):
        loss = step(net, ema, optimizer, pixels, seed, it, iterations, batch)
        progress.update(it + 1, f"loss {loss:.4f}")
        if (it + 1) % 250 == 0:
            save_tensors(checkpoint, {**{k: v.state_dict() for k, v in state.items()}, "iteration": it + 1})
            print(f"{it + 1} iterations, loss {loss:.4f}", flush=True)
    content = {"ema": ema.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)}
    atomic_write(out, lambda file: pickle.dump(content, file))


if __name__ == "__main__":
    main()
