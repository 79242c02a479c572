"""The small score network (paper section 6.4) with EDM's preconditioning.

Symbols (x is centred by the data's mean, so that sigma_data is a standard deviation)
-------
D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)
c_skip = sigma_data^2 / (sigma^2 + sigma_data^2)        c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2)
c_in = 1 / sqrt(sigma^2 + sigma_data^2)                 c_noise = log(sigma) / 4

F is a U-Net of two resolutions. The image enters by pixel-unshuffle (28x28x1 -> 14x14x4): the
full resolution, where a convolution costs most and knows least, is never convolved.
"""

from __future__ import annotations

from typing import Optional

import torch
from torch import nn
from torch.nn import functional

from art_edm.models.denoiser import Denoiser

__all__ = ["ResBlock", "ScoreUNet"]


def _zero(layer: nn.Module) -> nn.Module:
    """Zero a layer's parameters: a residual branch starts as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class PixelNorm(nn.Module):
    """Layer norm over the channels of each pixel: in channels_last memory one contiguous pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, C, H, W] -> [B, C, H, W]."""
        return self.norm(h.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ResBlock(nn.Module):
    """Pre-activation residual block whose second norm is scaled and shifted by the noise embedding."""

    def __init__(self, c_in: int, c_out: int, emb: int) -> None:
        super().__init__()
        self.norm0 = PixelNorm(c_in)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.affine = _zero(nn.Linear(emb, 2 * c_out))
        self.norm1 = PixelNorm(c_out)
        self.conv1 = _zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, h: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """h [B, c_in, H, W], emb [B, emb] -> [B, c_out, H, W]."""
        out = self.conv0(functional.silu(self.norm0(h)))
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, dim=1)
        out = self.conv1(functional.silu(torch.addcmul(shift, self.norm1(out), scale + 1)))
        return self.skip(h) + out


class SelfAttention(nn.Module):
    """Multi-head self-attention over the pixels of the coarse level."""

    def __init__(self, channels: int, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.norm = PixelNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h [B, C, H, W] -> [B, C, H, W]."""
        b, c, height, width = h.shape
        qkv = self.qkv(self.norm(h)).flatten(2).transpose(1, 2)  # [B, HW, 3C]
        q, k, v = qkv.reshape(b, height * width, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        # Written out: with 49 pixels the fused kernel's backward pass costs a tenth of a training step on CPU.
        weight = (q * (c // self.heads) ** -0.5 @ k.transpose(-1, -2)).softmax(dim=-1)  # [B, heads, HW, HW]
        out = weight @ v  # [B, heads, HW, C / heads]
        return h + self.proj(out.transpose(1, 2).reshape(b, height, width, c).permute(0, 3, 1, 2))


class ScoreUNet(Denoiser):
    """EDM-preconditioned U-Net for square images of even size; unconditional.

    Args:
        img_resolution, img_channels: size of the images.
        sigma_data: standard deviation of the data (measured, see tools/train_mnist.py).
        data_mean: mean of the data, subtracted from x and added to the output.
        width, deep_width: channels of the fine and of the coarse level.
        emb: width of the noise embedding.
    """

    def __init__(
        self, img_resolution: int = 28, img_channels: int = 1, sigma_data: float = 0.5, data_mean: float = 0.0,
        width: int = 64, deep_width: int = 96, emb: int = 64,
    ) -> None:
        super().__init__(img_channels, img_resolution)
        if img_resolution % 4:
            raise ValueError(f"img_resolution is {img_resolution}, expected a multiple of 4")
        self.config = dict(
            img_resolution=img_resolution, img_channels=img_channels, sigma_data=sigma_data, data_mean=data_mean,
            width=width, deep_width=deep_width, emb=emb,
        )
        self.sigma_data, self.data_mean = float(sigma_data), float(data_mean)
        self.register_buffer("freqs", torch.exp(torch.linspace(0.0, 4.0, emb // 2)), persistent=False)
        self.embed = nn.Sequential(nn.Linear(emb, emb), nn.SiLU(), nn.Linear(emb, emb), nn.SiLU())
        self.conv_in = nn.Conv2d(4 * img_channels, width, 3, padding=1)
        self.enc0 = ResBlock(width, width, emb)
        self.enc1 = ResBlock(width, width, emb)
        self.down = nn.Conv2d(width, deep_width, 3, stride=2, padding=1)
        self.deep0 = ResBlock(deep_width, deep_width, emb)
        self.attention = SelfAttention(deep_width)
        self.deep1 = ResBlock(deep_width, deep_width, emb)
        self.up = nn.Conv2d(deep_width, width, 1)
        self.dec0 = ResBlock(2 * width, width, emb)
        self.dec1 = ResBlock(2 * width, width, emb)
        self.norm_out = PixelNorm(width)
        self.conv_out = _zero(nn.Conv2d(width, 4 * img_channels, 3, padding=1))

    def network(self, x: torch.Tensor, c_noise: torch.Tensor) -> torch.Tensor:
        """F(x; c_noise): x [B, C, H, W] of unit variance, c_noise [B] -> [B, C, H, W]."""
        angle = c_noise[:, None] * self.freqs  # [B, emb / 2]
        emb = self.embed(torch.cat([angle.cos(), angle.sin()], dim=1))
        h = functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last)
        skip0 = self.enc0(self.conv_in(h), emb)  # [B, width, H/2, W/2]
        skip1 = self.enc1(skip0, emb)
        deep = self.deep0(self.down(skip1), emb)  # [B, deep_width, H/4, W/4]
        deep = self.deep1(self.attention(deep), emb)
        h = functional.interpolate(self.up(deep), scale_factor=2.0, mode="nearest")
        h = self.dec0(torch.cat([h, skip1], dim=1), emb)
        h = self.dec1(torch.cat([h, skip0], dim=1), emb)
        return functional.pixel_shuffle(self.conv_out(functional.silu(self.norm_out(h))), 2)

    def denoise(self, x: torch.Tensor, sigma: torch.Tensor, class_labels: Optional[torch.Tensor]) -> torch.Tensor:
        """D(x; sigma) by EDM's preconditioning, computed in the parameters' float type."""
        dtype = next(self.parameters()).dtype  # float32; float64 for the reference of a difference quotient
        s = sigma.to(dtype).reshape(-1, 1, 1, 1)  # [B, 1, 1, 1]
        centred = x.to(dtype) - self.data_mean
        c_in = (s.square() + self.sigma_data**2).rsqrt()
        c_out = s * self.sigma_data * c_in
        c_skip = (self.sigma_data * c_in).square()
        out = self.network(c_in * centred, s.flatten().log() / 4)
        return (self.data_mean + c_skip * centred + c_out * out).to(x.dtype)
