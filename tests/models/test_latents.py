"""Pixels of EDM2's latents: a real AutoencoderKL of diffusers, small and random, through upstream's encoder class."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from art_edm.models.latents import decoder_of
from art_edm.models.loading import load_network
from tests.support.upstream import run_python, upstream

MEAN, STD = [5.81, 3.25, 0.12, -2.15], [4.17, 4.62, 3.71, 3.28]  # of Stable Diffusion's latents, as EDM2 assumes

MAKE = """
import pickle, sys
import diffusers, numpy as np, torch
from training import encoders, networks_edm2
torch.manual_seed(0)
blocks = dict(down_block_types=('DownEncoderBlock2D',) * 4, up_block_types=('UpDecoderBlock2D',) * 4)
vae = diffusers.models.AutoencoderKL(latent_channels=4, block_out_channels=(8, 8, 8, 8), norm_num_groups=4, **blocks)
vae.save_pretrained('vae', safe_serialization=False)
diffusers.models.AutoencoderKL.from_pretrained = lambda name, **where: vae  # in place of the download
encoder = encoders.StabilityVAEEncoder()
net = networks_edm2.Precond(8, 4, 0, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
with open('net.pkl', 'wb') as file:
    pickle.dump(dict(ema=net.eval().requires_grad_(False), encoder=encoder), file)
latents = 0.5 * torch.randn(11, 4, 8, 8)  # more than one batch of the VAE
with torch.no_grad():
    np.savez('upstream.npz', latents=latents.numpy(), pixels=encoder.decode(latents).numpy())
"""


@pytest.mark.upstream
def test_a_real_vae_decodes_as_upstreams_encoder_does(tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra: pip install diffusers")
    run_python(MAKE, path=upstream("edm2"), cwd=tmp_path, env={"DNNLIB_CACHE_DIR": str(tmp_path / "cache")})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DNNLIB_CACHE_DIR", str(tmp_path / "cache"))
    found = np.load("upstream.npz")
    latents = torch.from_numpy(found["latents"])
    vae = diffusers.models.AutoencoderKL.from_pretrained("vae").eval()
    names = []
    monkeypatch.setattr(diffusers.models.AutoencoderKL, "from_pretrained",
                        lambda name, **where: names.append(name) or vae)
    pixels = decoder_of(load_network("net.pkl"))(latents)
    assert names == ["stabilityai/sd-vae-ft-mse"]
    assert pixels.dtype == torch.uint8 and pixels.shape == (11, 3, 64, 64)
    assert np.array_equal(pixels.numpy(), found["pixels"]) and pixels.float().std() > 5

    def by_hand(mean):
        scale, shift = (torch.tensor(each).reshape(1, 4, 1, 1) for each in (STD, mean))
        with torch.no_grad():
            image = torch.cat([vae.decode(part).sample for part in (latents * scale / 0.5 + shift).split(8)])
        return (image.clamp(0, 1) * 255).to(torch.int16)

    assert int((by_hand(MEAN) - pixels).abs().max()) <= 1  # another order of rounding
    assert int((by_hand([0.0] * 4) - pixels).abs().max()) > 1  # the twin: latents that are not moved back
