"""Training of the two small networks this project ships: the score network and LeNet.

Symbols
-------
y, n       clean image and unit noise, [B, C, H, W]
weight     (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, EDM's loss weighting
gamma      exponent of the power-function average: beta = (1 - 1/t)^(gamma + 1)

Every iteration draws from a generator seeded by (seed, iteration), so a resumed run sees exactly
the draws of an uninterrupted one.
"""

from __future__ import annotations

import math
import pickle
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
from torch.nn import functional

from art_edm.models.lenet import LeNet
from art_edm.models.unet import ScoreUNet
from art_edm.runtime.errors import Stopped
from art_edm.runtime.files import save_tensors
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.sampling.noise import seeded_generator

__all__ = [
    "ScoreConfig", "read_checkpoint", "read_snapshot", "score_loss", "snapshot_path", "stratified_sigma", "train_lenet",
    "train_score",
]

# What torch.load raises for a file that is truncated (an OSError too), or of another kind.
_DAMAGED = (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError, ValueError, LookupError)


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of `train_score`; a checkpoint of other settings is refused."""

    iterations: int = 20_000  # optimizer steps
    batch: int = 128  # images per step
    learning_rate: float = 2e-3  # after warm-up; then linear to zero
    warmup: int = 500  # steps of linear warm-up
    sigma_mean: float = -0.5  # mean of log sigma
    sigma_std: float = 1.3  # standard deviation of log sigma
    ema_gamma: float = 16.97  # width of the average: 5 % of the training so far
    bfloat16: bool = True  # run the convolutions in bfloat16 (half the time where the CPU has it)
    seed: int = 0
    start: str = ""  # SHA-256 of the weight file the training starts from; random weights without


def stratified_sigma(batch: int, mean: float, std: float, generator: torch.Generator) -> torch.Tensor:
    """Log-normal noise levels [B], one in each of B equally likely intervals (less noisy gradients)."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return (mean + std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))).exp()


def score_loss(net: ScoreUNet, y: torch.Tensor, sigma: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    """EDM's denoising loss, mean over batch and pixels: weight(sigma) (D(y + sigma n; sigma) - y)^2."""
    s = sigma.reshape(-1, 1, 1, 1)
    weight = (s.square() + net.sigma_data**2) / (s * net.sigma_data).square()
    return (weight * (net(y + s * n, sigma) - y).square()).mean()


def _learning_rate(config: ScoreConfig, iteration: int) -> float:
    return config.learning_rate * min(1, (iteration + 1) / config.warmup) * (1 - iteration / config.iterations)


def _step(
    net: ScoreUNet, ema: ScoreUNet, optimizer: torch.optim.Optimizer, images: torch.Tensor, config: ScoreConfig, it: int
) -> float:
    """One optimizer step and one step of the average; returns the loss."""
    rng = seeded_generator(config.seed, it)
    y = images[torch.randint(len(images), (config.batch,), generator=rng)]
    sigma = stratified_sigma(config.batch, config.sigma_mean, config.sigma_std, rng)
    n = torch.randn(y.shape, generator=rng)
    device = next(net.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16):
        loss = score_loss(net, y.to(device), sigma.to(device), n.to(device))
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(config, it)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    beta = (1 - 1 / (it + 1)) ** (config.ema_gamma + 1)
    with torch.no_grad():
        for average, value in zip(ema.parameters(), net.parameters()):
            average.lerp_(value, 1 - beta)
    return float(loss.detach())


def _parts(
    images: torch.Tensor, config: ScoreConfig, device: str, start: Optional[ScoreUNet]
) -> Tuple[Dict[str, Any], Dict[str, Any]]:
    """What the network is built with, and all that a checkpoint holds the state of, by name."""
    torch.manual_seed(config.seed)
    std, mean = torch.std_mean(images)
    size = dict(img_resolution=images.shape[-1], img_channels=images.shape[1])
    build = dict(size, sigma_data=float(std), data_mean=float(mean)) if start is None else dict(start.config)
    net, ema = (ScoreUNet(**build).to(device, memory_format=torch.channels_last) for _ in range(2))
    if start is not None:
        net.load_state_dict(start.state_dict())
    ema.load_state_dict(net.state_dict())
    fused = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 4)  # on the CPU only from there on
    optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99), fused=fused)
    parts = {"net": net, "ema": ema, "optimizer": optimizer}
    return build, parts


def train_score(
    images: torch.Tensor, config: ScoreConfig, checkpoint: Path, resume: bool, device: str = "cpu",
    quiet: bool = False, save_every: int = 250, snapshot_every: Optional[int] = None,
    start: Optional[ScoreUNet] = None,
) -> Dict[str, Any]:
    """Train the score network on images [N, C, H, W] in [-1, 1].

    Args:
        checkpoint: file that holds all state, rewritten every `save_every` steps and on a stop.
        resume: continue from `checkpoint` if it exists.
        snapshot_every: keep the averaged weights of every so many steps beside the checkpoint.
        start: the network to go on from, whose weight file `config.start` names; random weights without.
    Returns:
        dict with `ema` (the averaged network), `losses` (mean per `save_every` steps), `seconds`.
    Raises:
        Stopped: Ctrl-C or SIGTERM; the checkpoint is written.
        ValueError: the checkpoint is damaged, or of other settings or images.
    """
    build, parts = _parts(images, config, device, start)
    net, ema, optimizer = parts.values()
    log: Dict[str, Any] = {"iteration": 0, "seconds": 0.0, "losses": [], "running": 0.0}
    if resume and checkpoint.exists():
        log = _restore(checkpoint, config, build, parts)
    progress = Progress(config.iterations, "score network", quiet, log["iteration"])
    began = time.monotonic() - log["seconds"]

    def save() -> None:
        log["seconds"] = time.monotonic() - began
        state = {name: part.state_dict() for name, part in parts.items()}
        save_tensors(checkpoint, {**state, "log": log, "config": asdict(config), "build": build})
        if snapshot_every and log["iteration"] % snapshot_every == 0:
            snapshot = {"config": ema.config, "state": state["ema"], "seconds": log["seconds"]}
            save_tensors(snapshot_path(checkpoint, log["iteration"]), snapshot)

    with GracefulStop() as stop:
        for it in range(log["iteration"], config.iterations):
            log["running"] += _step(net, ema, optimizer, images, config, it)
            log["iteration"] = it + 1
            if (it + 1) % save_every == 0 or it + 1 == config.iterations:
                log["losses"].append(log["running"] / (it % save_every + 1))
                log["running"] = 0.0
                save()
            if stop.requested and it + 1 < config.iterations:
                save()
                progress.close()
                raise Stopped(f"stopped after {it + 1} of {config.iterations} iterations; saved in {checkpoint}")
            progress.update(it + 1, f"loss {log['losses'][-1]:.4f}" if log["losses"] else "")
    progress.close()
    return {"ema": ema, "losses": log["losses"], "seconds": log["seconds"]}


def read_checkpoint(checkpoint: Path, config: ScoreConfig) -> Dict[str, Any]:
    """The state that `train_score` saved; raises a ValueError if it is damaged, foreign or of other settings."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(type(state).__name__)
        saved = {**asdict(ScoreConfig()), **state["config"]}
    except (*_DAMAGED, AttributeError, TypeError) as error:
        what = f"damaged or not a checkpoint of the score network ({type(error).__name__})"
        raise ValueError(f"{checkpoint} is {what}; remove it to start again") from None
    for key, value in asdict(config).items():
        if saved[key] != value:
            found = f"{key}={saved[key]}, not {value}"
            raise ValueError(f"{checkpoint} was trained with {found}; use that or remove the file")
    return state


def snapshot_path(checkpoint: Path, iteration: int) -> Path:
    """Where `train_score` keeps the averaged weights after `iteration` steps."""
    return checkpoint.with_name(f"ema_{iteration:06d}.pt")


def read_snapshot(path: Path, device: str = "cpu") -> Tuple[ScoreUNet, float]:
    """The averaged network of a snapshot, and the seconds of training until then; a ValueError if it is damaged."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        net = ScoreUNet(**content["config"])
        net.load_state_dict(content["state"])
        seconds = float(content["seconds"])
    except (*_DAMAGED, AttributeError, TypeError) as error:
        what = f"damaged or not a snapshot ({type(error).__name__})"
        raise ValueError(f"{path} is {what}; remove it to go without") from None
    return net.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), seconds


def _restore(checkpoint: Path, config: ScoreConfig, build: Dict[str, Any], parts: Dict[str, Any]) -> Dict[str, Any]:
    """Load all state into `parts`; returns the log."""
    state = read_checkpoint(checkpoint, config)
    for key, value in build.items():  # not to the last bit: a mean depends on the number of threads
        if not math.isclose(state["build"][key], value, rel_tol=1e-4, abs_tol=1e-4):
            found = f"{key}={state['build'][key]}, not {value}"
            raise ValueError(f"{checkpoint} was trained on images of {found}; use those or remove the file")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return dict(state["log"])


def train_lenet(
    images: torch.Tensor, labels: torch.Tensor, epochs: int = 12, batch: int = 128, seed: int = 0, quiet: bool = False
) -> LeNet:
    """Train LeNet on images [N, 1, 28, 28] in [-1, 1] and labels [N]; Adam, cosine to zero.

    Raises a `Stopped` on Ctrl-C or SIGTERM; nothing is kept of the minute or two this takes.
    """
    torch.manual_seed(seed)
    net = LeNet()
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    progress = Progress(steps, "LeNet", quiet)
    rng = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    with GracefulStop() as stop:
        for step in range(steps):
            if len(order) < batch:
                order = torch.randperm(len(images), generator=rng)
            pick, order = order[:batch], order[batch:]
            loss = functional.cross_entropy(net(images[pick]), labels[pick])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.update(step + 1)
            if stop.requested:
                progress.close()
                raise Stopped("stopped while training LeNet, which starts anew")
    progress.close()
    return net.eval()
