"""DINOv2's features: the loaded network against Meta's public code, and one line for what cannot be loaded."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch

from art_edm.metrics import dinov2
from art_edm.metrics.detectors import DetectorError
from art_edm.metrics.dinov2 import architecture, as_timm, load_dinov2, prepared

CPU = torch.device("cpu")
META = Path(os.environ.get("ART_EDM_DINOV2", ""))  # a checkout of facebookresearch/dinov2


class Small(torch.nn.Module):
    """Stands for timm's network: one matrix on the means of the prepared images, and a table of positions."""

    num_features = 5

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 5))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + 16 * 16, 2))

    def forward(self, x):
        return x.mean(dim=(2, 3)) @ self.weight


@pytest.fixture
def timm(monkeypatch):
    """A module of that name, which makes `Small`."""
    asked = []
    module = types.ModuleType("timm")
    module.create_model = lambda name, **options: asked.append((name, options)) or Small()
    monkeypatch.setitem(sys.modules, "timm", module)
    return asked


def weights():
    rng = torch.Generator().manual_seed(0)
    return {"weight": torch.randn(3, 5, generator=rng), "pos_embed": torch.randn(1, 1 + 37 * 37, 2, generator=rng),
            "mask_token": torch.zeros(1, 2)}


def test_features_of_a_file_of_weights(tmp_path, timm):
    torch.save(weights(), tmp_path / "w.pth")
    detector = load_dinov2(str(tmp_path / "w.pth"), CPU)
    assert timm == [("vit_large_patch14_dinov2", {"img_size": 224, "num_classes": 0})]
    assert (detector.name, detector.dim, detector.classes) == ("dinov2", 5, 0) and len(detector.sha256) == 64
    for channels in (1, 3):
        images = torch.randint(0, 256, (2, channels, 32, 32), dtype=torch.uint8)
        expected = prepared(images).mean(dim=(2, 3)) @ weights()["weight"]
        torch.testing.assert_close(detector.features(images), expected)
        if channels == 1:
            torch.testing.assert_close(detector.features(images.repeat(1, 3, 1, 1)), expected)


def test_what_cannot_be_loaded_is_one_line(tmp_path, timm, monkeypatch):
    path = tmp_path / "w.pth"
    for content, found in (({"weight": torch.zeros(2)}, "KeyError"), (weights(), "size mismatch")):
        if found == "size mismatch":
            content["weight"] = torch.zeros(4, 4)
        torch.save(content, path)
        with pytest.raises(DetectorError, match=f"w.pth: found .* does not fit .*{found}.*--dino-weights") as error:
            load_dinov2(str(path), CPU)
        assert "\n" not in str(error.value)
    path.write_bytes(b"<html>")
    with pytest.raises(DetectorError, match="w.pth: found a web page .*does not fit"):
        load_dinov2(str(path), CPU)
    with pytest.raises(DetectorError, match="none.pth: found no such file"):
        load_dinov2("none.pth", CPU)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(DetectorError, match="needs the package timm, .*pip install timm, or leave fd_dinov2 out"):
        load_dinov2(str(path), CPU)


def test_without_weights_metas_are_downloaded(tmp_path, timm, monkeypatch):
    torch.save(weights(), tmp_path / "meta.pth")
    asked = []
    monkeypatch.setattr(dinov2, "download", lambda url, **options: asked.append(url) or tmp_path / "meta.pth")
    assert load_dinov2(None, CPU).dim == 5
    assert asked == ["https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"]


@pytest.mark.skipif(not (META / "dinov2" / "models").is_dir() or not str(META),
                    reason="ART_EDM_DINOV2 does not name a checkout of facebookresearch/dinov2")
def test_the_class_token_is_that_of_metas_code(monkeypatch):
    """Random weights of the small architecture, the same code path as the large one's, in both programs."""
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(str(META))
    monkeypatch.setenv("XFORMERS_DISABLED", "1")
    from dinov2.models.vision_transformer import vit_small

    torch.manual_seed(0)
    theirs = vit_small(img_size=518, patch_size=14, init_values=1.0, block_chunks=0).eval()
    with torch.no_grad():
        for value in theirs.parameters():
            value.normal_(std=3 * value[0].numel() ** -0.5 if value.ndim > 1 else 0.3)
        theirs.pos_embed.normal_()
    ours = architecture("vit_small_patch14_dinov2").eval()
    ours.load_state_dict(as_timm(theirs.state_dict()))
    images = prepared(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    with torch.no_grad():
        found, expected = ours(images), theirs(images)
        assert found.shape == (2, 384)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        state = as_timm(theirs.state_dict())  # the twin: a table that is resized without Meta's offset
        patches = theirs.pos_embed[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
        plain = torch.nn.functional.interpolate(patches, size=(16, 16), mode="bicubic").permute(0, 2, 3, 1)
        state["pos_embed"] = torch.cat([theirs.pos_embed[:, :1], plain.flatten(1, 2)], dim=1)
        ours.load_state_dict(state)
        assert (ours(images) - expected).abs().max() > 1e-3 * float(expected.abs().max())
