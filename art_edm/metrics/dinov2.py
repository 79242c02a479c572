"""DINOv2's features as EDM2's calculate_metrics.py takes them: ViT-L/14, class token of 224 x 224 pixels, [b, 1024].

The architecture is that of the package timm (an extra: pip install timm); its code runs. The weights are Meta's
(facebookresearch/dinov2, Apache 2.0), downloaded once from Meta's address, or a file that is given; it is read as data,
and nothing in it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional

import torch
from torch.nn import functional

from art_edm.metrics.detectors import Detector, DetectorError
from art_edm.pickles.archives import load_tensors
from art_edm.runtime.download import download, is_url
from art_edm.runtime.files import file_kind, sha256_of

__all__ = ["DINO_URL", "DinoDetector", "load_dinov2", "prepared"]

DINO_URL = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
SIZE = 224  # pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, per channel
ARCHITECTURE = "vit_large_patch14_dinov2"


def prepared(images: torch.Tensor) -> torch.Tensor:
    """uint8 [b, 1 or 3, H, W] -> float32 [b, 3, 224, 224]: bicubic with antialiasing, ImageNet's mean and deviation."""
    x = images.expand(-1, 3, -1, -1).to(torch.float32)
    x = functional.interpolate(x, size=(SIZE, SIZE), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(values, device=x.device).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std


class DinoDetector(Detector):
    """The class token of a vision transformer on prepared images."""

    classes = 0

    def __init__(self, net: torch.nn.Module, sha256: str, dim: int = 1024) -> None:
        self.name, self.sha256, self.dim, self._net = "dinov2", sha256, dim, net

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self._net(prepared(images))


def load_dinov2(weights: Optional[str], device: torch.device, quiet: bool = False) -> DinoDetector:
    """The detector with Meta's weights, or those at a path or address.

    Raises:
        DetectorError: timm is missing, or the file does not hold these weights.
        DownloadError, DownloadRefused: of an address.
    """
    net = architecture()
    spec = weights or DINO_URL
    path = download(spec, quiet=quiet) if is_url(spec) else Path(spec)
    if not path.is_file():
        raise DetectorError(f"{path}: found no such file, expected weights of DINOv2 ViT-L/14; correct --dino-weights")
    try:
        state = load_tensors(path)
        net.load_state_dict(as_timm(state))
    except Exception as error:  # torch raises a dozen kinds for damaged files and weights of other networks
        reason = " ".join(str(error).split())[:150]
        raise DetectorError(f"{path}: found {file_kind(path)} that does not fit DINOv2 ViT-L/14 "
                            f"({type(error).__name__}: {reason}); expected Meta's dinov2_vitl14_pretrain.pth: correct "
                            "--dino-weights") from None
    return DinoDetector(net.to(device).eval().requires_grad_(False), sha256_of(path), net.num_features)


def architecture(name: str = ARCHITECTURE, **options: Any) -> torch.nn.Module:
    """timm's network without weights, for images of 224 pixels."""
    try:
        import timm
    except ImportError:
        raise DetectorError("fd_dinov2 needs the package timm, which has DINOv2's architecture; pip install timm, or "
                            "leave fd_dinov2 out with --metrics=fid") from None
    except Exception as error:  # a torchvision of another build raises more than ImportError
        raise DetectorError(f"timm is installed and cannot be imported ({type(error).__name__}: {error}); install a "
                            "torchvision that fits torch, or leave fd_dinov2 out with --metrics=fid") from None
    return timm.create_model(name, img_size=SIZE, num_classes=0, **options)


def as_timm(state: Dict[str, torch.Tensor], grid: int = SIZE // 14) -> Dict[str, torch.Tensor]:
    """Meta's names and position table to timm's: [1, 1 + 37 * 37, d] is resized to [1, 1 + grid * grid, d]."""
    state = {key: value for key, value in state.items() if key != "mask_token"}
    table = state["pos_embed"]
    side = round((table.shape[1] - 1) ** 0.5)
    if side != grid:
        patches = table[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2).float()
        scale = (grid + 0.1) / side  # Meta's offset, which decides where the cubic is read
        patches = functional.interpolate(patches, scale_factor=(scale, scale), mode="bicubic", antialias=False)
        state["pos_embed"] = torch.cat([table[:, :1], patches.permute(0, 2, 3, 1).flatten(1, 2).to(table)], dim=1)
    return state
