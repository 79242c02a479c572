"""Training of a score network.

Symbols
-------
y, n       clean image and unit noise, [B, C, H, W]
weight     (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, EDM's loss weighting
gamma      exponent of the power-function average: beta = (1 - 1/t)^(gamma + 1)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch

from art_edm.models.loading import save_network
from art_edm.models.unet import ScoreUNet
from art_edm.sampling.noise import seeded_generator
from networks.config import ScoreConfig
from networks.loop import Run, to_unit, train

__all__ = ["ScoreConfig", "score_loss", "snapshot_path", "stratified_sigma", "train_score"]


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
    fall = 1 - iteration / config.iterations
    if config.rate_steps:
        fall = min(1.0, (config.rate_steps / (iteration + 1)) ** 0.5)
    return config.learning_rate * min(1, (iteration + 1) / config.warmup) * fall


def _step(
    net: ScoreUNet, ema: ScoreUNet, optimizer: torch.optim.Optimizer, images: torch.Tensor, config: ScoreConfig, it: int
) -> float:
    """One optimizer step and one step of the average; returns the loss."""
    rng = seeded_generator(config.seed, it)
    y = to_unit(images[torch.randint(len(images), (config.batch,), generator=rng)])
    if config.flips:
        y = torch.where(torch.rand(len(y), 1, 1, 1, generator=rng) < 0.5, y, y.flip(3))
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
    std, mean = torch.std_mean(to_unit(images))
    size = dict(img_resolution=images.shape[-1], img_channels=images.shape[1], width=config.width,
                deep_width=config.deep_width)
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
    images: torch.Tensor, config: ScoreConfig, run: Run, device: str = "cpu", snapshot_every: int = 0,
    start: Optional[ScoreUNet] = None,
) -> Dict[str, Any]:
    """Train the score network on images [N, C, H, W], uint8 or in [-1, 1].

    Args:
        run: where its state is kept, see `networks.loop.train`, whose errors are raised here too.
        snapshot_every: keep the averaged weights of every so many steps beside the checkpoint; 0 for none.
        start: the network to go on from, whose weight file `config.start` names; random weights without.
    Returns:
        the loop's log, with `snapshots`: iteration -> seconds until then; and `ema`, the averaged network.
    """
    build, parts = _parts(images, config, device, start)

    def saving(log: Dict[str, Any]) -> None:
        if snapshot_every and log["iteration"] % snapshot_every == 0:
            save_network(snapshot_path(run.checkpoint, log["iteration"]), parts["ema"])
            log.setdefault("snapshots", {})[log["iteration"]] = log["seconds"]

    log = train(parts, lambda it: _step(*parts.values(), images, config, it), config, build, run, saving)
    return {"snapshots": {}, **log, "ema": parts["ema"]}


def snapshot_path(checkpoint: Path, iteration: int) -> Path:
    """Where `train_score` keeps the averaged weights after `iteration` steps."""
    return checkpoint.with_name(f"ema_{iteration:06d}.pt")
