"""Training of the judging classifiers: what they learn, what they are shown, and resuming to the same bytes."""

from __future__ import annotations

import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from networks import classifier as module
from networks.classifier import ClassifierConfig, accuracy, train_classifier
from networks.loop import Run, to_unit

from art_edm.models.lenet import LeNet
from art_edm.models.resnet import ResNet
from art_edm.runtime.errors import Stopped

TINY = ClassifierConfig(iterations=40, batch=20)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values()))


def stripes(count, size=28, channels=1):
    """Two classes: horizontal and vertical stripes, under noise."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (count,), generator=rng)
    wave = torch.sin(torch.arange(size) * math.pi / 3).expand(size, size)
    pure = torch.where(labels.reshape(-1, 1, 1).bool(), wave, wave.T)
    noise = 0.3 * torch.randn(count, channels, size, size, generator=rng)
    return ((pure.unsqueeze(1) + noise) * 60 + 128).clip(0, 255).to(torch.uint8), labels


def right(net, pixels, labels):
    return float((net(pixels.float() / 127.5 - 1).argmax(dim=1) == labels).float().mean())


def test_lenet_learns_and_repeats(tmp_path):
    pixels, labels = stripes(300)
    nets = [train_classifier(LeNet, pixels[:200], labels[:200], replace(TINY, seed=seed), Run(tmp_path / "a"))
            for seed in (0, 0, 1)]
    assert same(nets[0], nets[1]) and not same(nets[0], nets[2])
    assert right(nets[0], pixels[200:], labels[200:]) > 0.95
    torch.manual_seed(0)
    assert right(LeNet(), pixels[200:], labels[200:]) < 0.8  # untrained


def test_the_resnet_learns_and_goes_on_after_a_stop_to_the_same_bytes(tmp_path, monkeypatch):
    pixels, labels = stripes(160, 32, 3)
    config = replace(TINY, learning_rate=0.1, rise=0.2, momentum=0.85, shift=2, smoothing=0.1, weight_decay=1e-3)
    monkeypatch.setattr(module, "ResNet", lambda: ResNet((8, 12, 16)), raising=False)
    whole = train_classifier(module.ResNet, pixels[:100], labels[:100], config, Run(tmp_path / "whole"))
    assert right(whole, pixels[100:], labels[100:]) > 0.95

    def stopping(pixels, config, it):
        if it == 27:
            os.kill(os.getpid(), signal.SIGTERM)
        return true(pixels, config, it)

    true, run = module._batch, Run(tmp_path / "judge.ckpt", resume=True)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match="classifier stopped after 28 of 40 iterations"):
        patch.setattr(module, "_batch", stopping)
        train_classifier(module.ResNet, pixels[:100], labels[:100], config, run)
    assert same(train_classifier(module.ResNet, pixels[:100], labels[:100], config, run), whole)
    with pytest.raises(ValueError, match="smoothing=0.1, not 0.2"):
        train_classifier(module.ResNet, pixels[:100], labels[:100], replace(config, smoothing=0.2), run)


def test_the_first_layer_whitens_the_images_and_is_not_trained(tmp_path):
    pixels, labels = stripes(160, 32, 3)
    net = train_classifier(ResNet, pixels, labels, replace(TINY, iterations=2, momentum=0.9), Run(tmp_path / "a"))
    given = net.whiten(to_unit(pixels)).detach().movedim(1, 3).reshape(-1, 24)  # [patches, filters]
    assert torch.equal(given[:, :12], -given[:, 12:])
    assert torch.allclose(given[:, :12].T.cov(), torch.eye(12), atol=0.05)
    assert not torch.allclose(ResNet().whiten(to_unit(pixels)).movedim(1, 3).reshape(-1, 24)[:, :12].T.cov(),
                              torch.eye(12), atol=0.5)


def test_the_learning_rate_rises_and_falls():
    config = replace(TINY, iterations=100, learning_rate=2.0, rise=0.2)
    rate = lambda it, c=config: module._learning_rate(it, c)
    assert rate(0) == pytest.approx(2 / 20) and rate(9) == pytest.approx(math.cos(math.pi * 9 / 200) ** 2)
    assert rate(50) == pytest.approx(1) and rate(99) == pytest.approx(2 * math.sin(math.pi / 200) ** 2)
    assert rate(0, replace(config, rise=0.0)) == 2


def test_momentum_makes_it_sgd():
    kinds = {type(module._optimizer(LeNet(), replace(TINY, momentum=m))) for m in (0.0, 0.9)}
    assert kinds == {torch.optim.AdamW, torch.optim.SGD}


def test_an_epoch_shows_every_image_once():
    pixels = torch.arange(60, dtype=torch.uint8).reshape(60, 1, 1, 1)
    epochs = [[module._batch(pixels, TINY, 3 * epoch + i)[0] for i in range(3)] for epoch in range(2)]
    for epoch in epochs:
        assert torch.cat(epoch).sort().values.tolist() == list(range(60))
    assert not torch.equal(epochs[0][0], epochs[1][0])
    assert torch.equal(module._batch(pixels, TINY, 4)[1].flatten(), epochs[1][1] / 127.5 - 1)


def test_shifts_and_mirrored_images():
    """A single bright pixel at (8, 5) of 16 x 16 lands on all 5 x 5 places around it, and around (8, 10)."""
    pixels = torch.zeros(200, 1, 16, 16, dtype=torch.uint8)
    pixels[:, :, 8, 5] = 255
    config = replace(TINY, batch=200, shift=2)
    places = set()
    for it in range(3):
        images = module._batch(pixels, config, it)[1]
        assert ((images == 1).sum(dim=(1, 2, 3)) == 1).all()
        places |= {(int(i) // 16, int(i) % 16) for i in (images == 1).flatten(1).int().argmax(dim=1)}
    assert places == {(row, column) for row in range(6, 11) for column in (3, 4, 5, 6, 7, 8, 9, 10, 11, 12)}


def test_features_are_the_input_of_the_last_layer():
    for net, last, scale in ((LeNet(), "fc2", 1), (ResNet().eval(), "fc", 1 / 9)):
        images = torch.randn(5, *net.img_shape, generator=torch.Generator().manual_seed(1))
        features = net.features(images)
        assert features.shape == (5, net.num_features)
        assert torch.allclose(getattr(net, last)(features) * scale, net(images), atol=1e-5)


def test_accuracy_counts():
    torch.manual_seed(0)
    lenet, pixels = LeNet(), stripes(8)[0]
    labels = lenet(pixels / 127.5 - 1).argmax(dim=1)
    assert accuracy(lenet, pixels, labels, batch=3) == 1
    labels[:2] = (labels[:2] + 1) % 10
    assert accuracy(lenet, pixels, labels, batch=3) == 0.75
