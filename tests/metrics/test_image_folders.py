"""Images from folders and zips: which, in what order, to the pixel; and one line for each that cannot be used."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from art_edm.metrics import image_folders as module
from art_edm.metrics.image_folders import ImageError, choose, format_notes, open_images, pixels_of


def draw(i, size=(6, 5), channels=3):
    """Pixels of image i, [H, W] or [H, W, 3]."""
    shape = (size[1], size[0]) if channels == 1 else (size[1], size[0], 3)
    return np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)


def save(path, i=0, size=(6, 5), channels=3, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(draw(i, size, channels))
    (picture.convert(mode) if mode else picture).save(path)


@pytest.fixture
def folder(tmp_path):
    """Five RGB images in two subfolders, and things that are no images."""
    for i, name in enumerate(["b/2.png", "a/10.png", "a/9.png", "top.png", "b/1.PNG"]):
        save(tmp_path / "set" / name.replace(".PNG", ".x.png"), i)
        (tmp_path / "set" / name.replace(".PNG", ".x.png")).rename(tmp_path / "set" / name)
    (tmp_path / "set" / "dataset.json").write_text("{}")
    (tmp_path / "set" / "notes.txt").write_text("x")
    return tmp_path / "set"


ORDER, DRAWN = ["a/10.png", "a/9.png", "b/1.PNG", "b/2.png", "top.png"], [1, 2, 4, 0, 3]


def pack(folder, target, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(target, "w", compression) as archive:
        for path in sorted(folder.rglob("*.*"), reverse=True):
            archive.write(path, path.relative_to(folder))
    return target


def loaded(images, workers=0, batch=2):
    ranges = [range(i, min(i + batch, len(images))) for i in range(0, len(images), batch)]
    return np.concatenate([pixels for _, pixels in images.batches(ranges, workers)])


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("zipped", [False, True])
def test_order_and_pixels(folder, tmp_path, zipped, workers):
    images = open_images(pack(folder, tmp_path / "s.zip") if zipped else folder)
    assert images.names == ORDER and images.shape == (3, 5, 6)
    expected = np.stack([draw(i).transpose(2, 0, 1) for i in DRAWN])
    assert (loaded(images, workers) == expected).all() and (loaded(images, workers) != expected[::-1]).any()
    assert images.check(range(5)) == {"PNG": 0} and format_notes(images, {"PNG": 0}) == [] and images.notes == []


def test_grey(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", i, channels=1)
    images = open_images(tmp_path)
    assert images.shape == (1, 5, 6) and (images.load(2)[0] == draw(2, channels=1)).all()


def test_the_chosen_are_a_seeds(folder):
    assert choose(5, None, 0).tolist() == choose(5, 5, 3).tolist() == list(range(5))
    order = np.arange(100)
    np.random.RandomState(4).shuffle(order)
    assert choose(100, 30, 4).tolist() == sorted(order[:30]) != choose(100, 30, 5).tolist()
    assert choose(100, 30, 4 + 2**31).tolist() == sorted(order[:30])  # upstream's seed wraps
    assert open_images(folder, 2, 4).names == [ORDER[i] for i in choose(5, 2, 4)]


def test_hidden_files_are_left_out_and_named(folder):
    save(folder / "__MACOSX" / "a.png", 7)
    save(folder / ".cache" / "b.png", 8)
    (folder / "._top.png").write_bytes(b"fork")
    images = open_images(folder)
    assert images.names == ORDER and len(images.notes) == 1 and "left out 3 hidden images" in images.notes[0]


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_links(folder, tmp_path):
    (folder / "a" / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "z.png").symlink_to(folder / "top.png")
    images = open_images(folder)
    assert images.names == [*ORDER, "z.png"] and (images.load(5) == images.load(4)).all()
    (folder / "zz.png").symlink_to(tmp_path / "gone.png")
    images = open_images(folder)
    with pytest.raises(ImageError, match="cannot read .*zz.png: No such file"):
        images.check(range(7))


# --- what cannot be used -----------------------------------------------------------------------------


def test_no_images_or_too_few(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    for path, message in ((tmp_path / "empty", "found no images"), (tmp_path / "none", "found nothing there"),
                          (tmp_path / "text.txt", "found a file of unknown kind, expected a folder")):
        with pytest.raises(ImageError, match=message):
            open_images(path)
    with pytest.raises(ImageError, match="found 5 images, expected at least 6; generate more, or lower --num"):
        open_images(folder, 6)
    save(tmp_path / "one" / "a.png")
    with pytest.raises(ImageError, match="found 1 images, expected at least 2"):
        open_images(tmp_path / "one")
    assert len(open_images(folder, 5)) == 5


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width, height, depth, kind, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA", "1", "RGB;16", "L;16"])
def test_modes_are_refused_by_name(folder, mode):
    path = folder / "c.png"
    if mode == "RGB;16":
        path.write_bytes(png(6, 5, 16, 2, (b"\0" + bytes(36)) * 5))
        assert Image.open(path).mode == "RGB"  # PIL alone would drop half of the bits
    elif mode == "L;16":
        path.write_bytes(png(6, 5, 16, 0, (b"\0" + bytes(12)) * 5))
    else:
        save(path, mode=mode)
    images = open_images(folder)
    with pytest.raises(ImageError, match=f"c.png: found mode {mode}, expected 8-bit grey .L. or RGB; convert"):
        images.check(range(len(images)))


@pytest.mark.parametrize("change, found", [(dict(size=(6, 4)), "6x4 RGB"), (dict(channels=1), "6x5 L")])
def test_mixed_sizes_and_modes_name_two_files(folder, change, found):
    save(folder / "b" / "3.png", **change)
    images = open_images(folder)
    with pytest.raises(ImageError) as error:
        images.check(range(len(images)))
    assert f"b/3.png, {found}, and " in str(error.value) and "a/10.png, 6x5 RGB" in str(error.value)
    with pytest.raises(ImageError, match="b/3.png: found shape"):
        images.load(4)  # also if it was replaced after the check


def test_every_altered_byte_of_a_png_is_found(folder):
    """A byte of the pixels may pass PIL; a chunk's checksum tells."""
    whole = (folder / "top.png").read_bytes()
    assert (pixels_of(whole) == draw(3).transpose(2, 0, 1)).all()
    unseen = 0
    for at in range(len(whole)):
        bad = whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]
        with pytest.raises(ImageError, match="found"):
            pixels_of(bad)
        try:
            (folder / "top.png").write_bytes(bad)
            np.asarray(Image.open(folder / "top.png"))
            unseen += 1
        except Exception:
            pass
    assert unseen > 0  # PIL by itself


def test_every_truncation_of_a_png_is_found(folder):
    whole = (folder / "top.png").read_bytes()
    for size in range(len(whole)):
        with pytest.raises(ImageError, match="truncated|no readable image"):
            pixels_of(whole[:size])


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"not an image, but long enough to be read as one" * 9])
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_no_image_is_named(folder, content, suffix):
    (folder / f"bad.{suffix}").write_bytes(content)
    images = open_images(folder)
    with pytest.raises(ImageError, match=f"bad.{suffix}: found .*, no readable image, expected a whole PNG"):
        images.check(range(len(images)))
    assert len(str(pytest.raises(ImageError, images.load, images.names.index(f"bad.{suffix}")).value).splitlines()) == 1


def test_an_image_of_too_many_pixels(folder):
    (folder / "big.png").write_bytes(png(50000, 50000, 8, 2, b""))
    with pytest.raises(ImageError, match="big.png: found an image too large to decode safely .*2500000000 pixels"):
        open_images(folder).check(range(6))


def test_jpegs_are_noted_with_the_reason(folder):
    save(folder / "photo.jpg", 9)
    images = open_images(folder)
    (note,) = format_notes(images, images.check(range(6)))
    assert "JPEG among PNG, such as" in note and "photo.jpg; compression artefacts change the FID" in note


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n%%EndComments\n(x) print\n%%EOF\n"


@pytest.mark.parametrize("zipped", [False, True])
def test_postscript_named_png_starts_no_program(folder, tmp_path, monkeypatch, zipped):
    (folder / "top.png").write_bytes(POSTSCRIPT)
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kwargs: started.append(args))
    images = open_images(pack(folder, tmp_path / "s.zip") if zipped else folder)
    for use in (lambda: images.check(range(5)), lambda: images.load(4)):
        with pytest.raises(ImageError, match="top.png: found .*, no readable image"):
            use()
    assert not started
    with Image.open(folder / "top.png") as picture:  # the twin: any format that PIL knows
        with pytest.raises((AttributeError, AssertionError)):  # no picture comes of it
            picture.load()
    assert started


def test_metadata_and_transparency(folder):
    """Text before the pixels of any size up to PIL's limit, and a colour that counts as transparent."""
    note, long = PngImagePlugin.PngInfo(), PngImagePlugin.PngInfo()
    note.add_text("k", "x" * 50_000)
    long.add_text("k", "x" * 2_000_000, zip=True)
    Image.fromarray(draw(3)).save(folder / "top.png", pnginfo=note)
    Image.fromarray(draw(2)).save(folder / "b" / "1.PNG", transparency=(0, 0, 0), format="png")
    images = open_images(folder)
    (found,) = format_notes(images, images.check(range(5)))
    assert "found a PNG with a transparent colour, " in found and "b/1.PNG; the transparency is left out" in found
    assert (images.load(4) == draw(3).transpose(2, 0, 1)).all() and (images.load(2) == draw(2).transpose(2, 0, 1)).all()
    Image.fromarray(draw(3)).save(folder / "top.png", pnginfo=long)
    for use in (lambda: images.check(range(5)), lambda: images.load(4)):
        with pytest.raises(ImageError, match="top.png: found more than 1 MB of text .*; remove the metadata"):
            use()


# --- zips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "a/../../b.png", "C:/a.png", "..\\a.png", "\\a.png"])
def test_unsafe_names_in_a_zip(folder, tmp_path, name):
    target = pack(folder, tmp_path / "s.zip")
    assert len(open_images(target)) == 5
    with zipfile.ZipFile(target, "a") as archive:
        info = zipfile.ZipInfo("x" * len(name))
        info.filename = name
        archive.writestr(info, b"x")
    with pytest.raises(ImageError, match="found the unsafe name"):
        open_images(target)


def test_a_zip_with_backslashes_is_named(folder, tmp_path):
    """Of an old Windows program: its folders would be parts of names, and the order another one."""
    target = pack(folder, tmp_path / "s.zip")
    with zipfile.ZipFile(target, "a") as archive:
        info = zipfile.ZipInfo("xxx")
        info.filename = "a\\b.png"
        archive.writestr(info, b"x")
    with pytest.raises(ImageError, match="with a backslash, expected / between folders; make the zip again"):
        open_images(target)


def test_a_zip_bomb_is_not_unpacked(folder, tmp_path):
    target = pack(folder, tmp_path / "s.zip")
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(20 * 2**20))
    with pytest.raises(ImageError, match="bomb.png, .* bytes that unpack to 20971520, .*exhaust the memory"):
        open_images(target)
    assert 20 * 2**20 < module.MAX_BYTES  # its ratio gives it away


def test_a_damaged_zip(folder, tmp_path):
    target = pack(folder, tmp_path / "s.zip", zipfile.ZIP_STORED)
    blob = target.read_bytes()
    (tmp_path / "cut.zip").write_bytes(blob[:200])
    with pytest.raises(ImageError, match="cut.zip: found no readable zip"):
        open_images(tmp_path / "cut.zip")
    at = blob.index((folder / "top.png").read_bytes()) + 60
    target.write_bytes(blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])
    images = open_images(target)
    with pytest.raises(ImageError, match="s.zip/top.png: damaged or encrypted in the zip .*CRC"):
        images.load(4)
    assert (images.load(0) == draw(1).transpose(2, 0, 1)).all()
    target.write_bytes(blob.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"))  # encrypted
    with pytest.raises(ImageError, match="^[^:]*s.zip[^:]*: damaged or encrypted in the zip .*password"):
        open_images(target)


def test_an_error_ends_the_reading(folder):
    save(folder / "b" / "3.png", size=(1, 1))
    images = open_images(folder)
    for workers in (0, 2):
        with pytest.raises(ImageError, match="b/3.png"):
            loaded(images, workers, batch=1)
