"""Small networks of upstream's classes, trained for a minute on spots of colour, under the official names.

A pickle of them embeds upstream's source, so they are made here when a test first asks, and kept in the user's cache
($ART_EDM_CACHE) alone. The latent network sees latents of the same spots; a stand-in of the VAE decodes them.

    PYTHONPATH=UPSTREAM python tests/support/trained_networks.py FOLDER CLASS NAME=OPTIONS...

trains networks of one class (EDMPrecond or Precond) with a loop of our own.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import torch

SIZE, CLASSES, ITERATIONS, BATCH = 8, 3, 300, 64
SMALL = dict(model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[], img_resolution=SIZE)
EDM = dict(SMALL, img_channels=3, dropout=0)
EDM2 = dict(SMALL, img_channels=4, model_channels=32, channel_mult=[1])
NETWORKS = {  # official name -> (class, options, seed); the paper uses DDPM++, ADM and EDM2's, no NCSN++
    "edm-cifar10-32x32-cond-vp.pkl": ("EDMPrecond", dict(EDM, model_type="SongUNet", label_dim=CLASSES), 0),
    "edm-afhqv2-64x64-uncond-vp.pkl": ("EDMPrecond", dict(EDM, model_type="SongUNet"), 1),
    "edm-ffhq-64x64-uncond-vp.pkl": ("EDMPrecond", dict(EDM, model_type="SongUNet"), 2),
    "edm-imagenet-64x64-cond-adm.pkl": ("EDMPrecond", dict(EDM, model_type="DhariwalUNet", label_dim=CLASSES), 3),
    "edm2-img512-xs-2147483-0.135.pkl": ("Precond", dict(EDM2, label_dim=CLASSES), 4),
}
RAW_MEAN, RAW_STD = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]  # of the VAE's latents, as EDM2 has them

# What EDM2's encoder asks of the package `diffusers`: raw latents [B, 4, h, w] -> images [B, 3, 8 h, 8 w] in [0, 1].
DIFFUSERS = f"""
from types import SimpleNamespace
import torch

class Decoder(torch.nn.Module):
    def decode(self, raw):
        shape = (1, 4, 1, 1)
        z = (raw - torch.tensor({RAW_MEAN}).reshape(shape)) / torch.tensor({RAW_STD}).reshape(shape)
        return dict(sample=((z[:, :3] + 1) / 2).repeat_interleave(8, 2).repeat_interleave(8, 3))

class AutoencoderKL:
    @staticmethod
    def from_pretrained(name, cache_dir, local_files_only=False):
        assert name == "stabilityai/sd-vae-ft-mse", name
        return Decoder()

models = SimpleNamespace(AutoencoderKL=AutoencoderKL)
"""


def spots(num, seed, channels=3):
    """Images of one soft spot each, [num, channels, 8, 8] in [-1, 1], and their classes [num, 3]: the spot's colour.

    With four channels, latents: half the colours, and half their mean.
    """
    rng = np.random.default_rng(seed)
    label, place = rng.integers(CLASSES, size=num), rng.uniform(1, SIZE - 2, size=(2, num, 1, 1))
    width, grid = rng.uniform(0.8, 1.8, size=(num, 1, 1)), np.arange(SIZE)
    distance = (grid[:, None] - place[0]) ** 2 + (grid - place[1]) ** 2  # [num, 8, 8]
    colour = 0.2 + 0.8 * np.eye(CLASSES)[label]  # [num, 3]
    images = 2 * np.exp(-distance / (2 * width**2))[:, None] * colour[:, :, None, None] - 1
    if channels == 4:
        images = 0.5 * np.concatenate([images, images.mean(axis=1, keepdims=True)], axis=1)
    return torch.from_numpy(images).float(), torch.from_numpy(np.eye(CLASSES)[label]).float()


def skip_loss(channels, sigma_data=0.5, seed=99):
    """What an untrained network loses: its output layer is zero, so that it answers c_skip x."""
    return loss(lambda x, sigma, labels: x * sigma_data**2 / (sigma.reshape(-1, 1, 1, 1) ** 2 + sigma_data**2),
                channels, seed)


def loss(denoise, channels, seed=99, shuffled=False, num=512):
    """EDM's loss of images that were not trained on; `shuffled` gives every image another one's class."""
    images, labels = spots(num, seed, channels)
    generator = torch.Generator().manual_seed(seed)
    sigma, noise = draws(num, generator), torch.randn(images.shape, generator=generator)
    with torch.no_grad():
        found = denoise(images + sigma.reshape(-1, 1, 1, 1) * noise, sigma, labels.roll(1, 0) if shuffled else labels)
    return float(weighted(found, images, sigma))


def draws(num, generator):
    """Noise levels, log-normal."""
    return (torch.randn(num, generator=generator) * 1.2 - 0.8).exp()


def weighted(found, images, sigma, sigma_data=0.5):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (D - y)^2, mean over all."""
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return (weight.reshape(-1, 1, 1, 1) * (found - images).square()).mean()


def cached(name, upstream):
    """Where a trained network is or will be: known by how it is trained and by upstream's source."""
    from art_edm.runtime.files import cache_dir

    kind, options, seed = NETWORKS[name]
    source = (upstream / "training" / ("networks.py" if kind == "EDMPrecond" else "networks_edm2.py")).read_bytes()
    text = json.dumps([kind, options, seed, ITERATIONS, BATCH, torch.__version__])
    text += "".join(map(inspect.getsource, (spots, draws, weighted, train)))
    folder = cache_dir() / "stand-ins"
    folder.mkdir(exist_ok=True)
    return folder / f"{hashlib.sha256(text.encode() + source).hexdigest()[:16]}-{name}"


def trained(name, upstream):
    """The trained network of this official name: from the cache, or trained now; `upstream` is its checkout."""
    from tests.support.upstream import run_python

    path = cached(name, upstream)
    if not path.is_file():
        run_python("import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')",
                   Path(__file__), path, name, path=upstream)
    return path


def train(name):
    """Adam at a rate that rises, then falls to zero; the weights are averaged over the last part of the training."""
    kind, options, seed = NETWORKS[name]
    module = __import__(f"training.{'networks' if kind == 'EDMPrecond' else 'networks_edm2'}", fromlist=["x"])
    torch.manual_seed(seed)
    net, average = (getattr(module, kind)(**options) for _ in range(2))
    images, labels = spots(20_000, seed, options["img_channels"])
    generator = torch.Generator().manual_seed(seed)
    peak = 3e-3 if kind == "EDMPrecond" else 1e-2
    optimizer = torch.optim.Adam(net.train().parameters(), betas=(0.9, 0.99))
    for it in range(ITERATIONS):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        sigma, noise = draws(BATCH, generator), torch.randn(BATCH, *images.shape[1:], generator=generator)
        x = images[chosen] + sigma.reshape(-1, 1, 1, 1) * noise
        optimizer.param_groups[0]["lr"] = peak * min(1, (it + 1) / 50) * (1 - it / ITERATIONS)
        optimizer.zero_grad()
        weighted(net(x, sigma, labels[chosen] if options.get("label_dim") else None), images[chosen], sigma).backward()
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(average.parameters(), net.parameters()):
                mean.lerp_(value, 1 - (1 - 1 / (it + 1)) ** 17.97)
    content = dict(ema=average.eval().requires_grad_(False))
    if kind == "Precond":
        from training.encoders import StabilityVAEEncoder

        content["encoder"] = StabilityVAEEncoder()
    return content


if __name__ == "__main__":
    from art_edm.runtime.files import atomic_write

    made = train(sys.argv[2])
    atomic_write(sys.argv[1], lambda file: pickle.dump(made, file))
