"""CIFAR-10 from a folder and from an archive: the same pixels and labels, and one line for what cannot be used."""

from __future__ import annotations

import os
import tarfile

import numpy as np
import pytest
import torch
from networks.cifar10 import CLASSES, load_cifar10
from PIL import Image


@pytest.fixture
def folder(tmp_path):
    """Three images of colours that say where they are, and files that are no part of the data set."""
    for split, name, number, colour in (("train", "truck", 0, (9, 90, 200)), ("train", "airplane", 1, (1, 2, 3)),
                                        ("train", "truck", 1, (4, 5, 6)), ("test", "cat", 0, (7, 8, 9))):
        place = tmp_path / "data" / split / name
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), colour).save(place / f"{number:04d}.png")
    (tmp_path / "data" / "train" / "other").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "data" / "train" / "other" / "0000.png")
    (tmp_path / "data" / "train" / "truck" / "readme.txt").write_text("x")
    return tmp_path / "data"


def test_a_folder(folder):
    pixels, labels = load_cifar10("train", str(folder))
    assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.uint8
    assert [CLASSES[label] for label in labels] == ["airplane", "truck", "truck"]  # by path
    assert pixels[:, :, 5, 7].tolist() == [[1, 2, 3], [9, 90, 200], [4, 5, 6]]
    assert load_cifar10("test", str(folder))[1].tolist() == [CLASSES.index("cat")]


@pytest.mark.parametrize("mode", ["w", "w:xz", "w:gz"])
def test_an_archive_gives_the_same(folder, tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        archive.add(folder, "somewhere/cifar")
    for split in ("train", "test"):
        for found, expected in zip(load_cifar10(split, str(tmp_path / "a.tar")), load_cifar10(split, str(folder))):
            assert torch.equal(found, expected)


def test_rows_and_columns_stay_what_they_are(folder):
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(array).save(folder / "test" / "cat" / "0000.png")
    pixels = load_cifar10("test", str(folder))[0][0].numpy()
    assert np.array_equal(pixels.transpose(1, 2, 0), array) and not np.array_equal(pixels.transpose(2, 1, 0), array)


def test_what_cannot_be_used(folder, tmp_path):
    with pytest.raises(ValueError, match="found no --data, expected a folder or .tar archive"):
        load_cifar10("train", None)
    with pytest.raises(ValueError, match="cannot read .*nowhere"):
        load_cifar10("train", str(tmp_path / "nowhere"))
    (tmp_path / "bad.tar").write_bytes(b"text")
    with pytest.raises(ValueError, match="cannot read .*bad.tar"):
        load_cifar10("train", str(tmp_path / "bad.tar"))
    with pytest.raises(ValueError, match="has no train/CLASS"):
        load_cifar10("train", str(tmp_path / "data" / "test"))
    Image.new("L", (32, 32)).save(folder / "test" / "cat" / "0001.png")
    with pytest.raises(ValueError, match=r"cat/0001.png: found uint8 \[32, 32\], expected 32x32 pixels in colour"):
        load_cifar10("test", str(folder))
    (folder / "test" / "cat" / "0001.png").write_bytes(b"")
    with pytest.raises(ValueError, match="cat/0001.png is damaged or no image"):
        load_cifar10("test", str(folder))


def test_postscript_named_png_starts_no_program(folder):
    path = folder / "test" / "cat" / "0001.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n")
    with Image.open(path) as image:
        assert image.format == "EPS"  # the twin: without a list of formats Pillow would start Ghostscript to load it
    with pytest.raises(ValueError, match="cat/0001.png is damaged or no image"):
        load_cifar10("test", str(folder))


@pytest.mark.slow
def test_the_true_data_set():
    """Counts of $ART_EDM_CIFAR10 (a folder or an archive): 5,000 and 1,000 images of every class."""
    place = os.environ.get("ART_EDM_CIFAR10", "")
    if not os.path.exists(place):
        pytest.skip("ART_EDM_CIFAR10 names no folder or archive of CIFAR-10")
    for split, count in (("train", 5000), ("test", 1000)):
        assert torch.bincount(load_cifar10(split, place)[1]).tolist() == [count] * 10
