"""Comparisons of folders: numbers against direct computations, uncertainties against repetitions, and refusals."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from art_edm.compare.score_folders import Entry, blocks_of, compare, open_entries, parse_entries
from art_edm.compare.tables import lines
from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.panel import Panel
from art_edm.metrics.standard_errors import Measurement, difference, groups_of, jackknife
from art_edm.runtime.context import Context
from art_edm.runtime.store import Store
from tests.compare.test_sample_cache import Linear

REFERENCE = np.zeros(3), 400 * np.eye(3)


def pixels(count, seed, mean=120, std=15):
    values = np.random.default_rng(seed).normal(mean, std, (count, 2, 2))
    return values.clip(0, 255).astype(np.uint8)


def folder(path, images, names=None):
    for i, image in enumerate(images):
        file = path / (names[i] if names else f"{i:06d}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return str(path)


def run(tmp_path, entries, block=50_000, num=None, detector=None, reference=REFERENCE, splits=0):
    detector = detector or Linear(classes=3)
    sets, blocks = open_entries(entries, block, num)
    context = Context(store=Store(tmp_path / "cells"), batch=16)
    panel = Panel(["fid", "is"] if splits else ["fid"], {"detector": detector}, splits)
    return compare(entries, sets, blocks, panel, {"fid": dict(zip(("mu", "sigma"), reference))}, context, workers=0)


def fid(images):
    values = images.reshape(len(images), -1) @ Linear().matrix.numpy().T
    return frechet_distance(*moments(values), *REFERENCE)


# --- uncertainty -------------------------------------------------------------------------------------


def test_measurement_of_blocks():
    found = Measurement([3.0, 5.0, 10.0])
    assert (found.mean, found.minimum, found.basis) == (6, 3, "3 blocks")
    assert found.stderr == pytest.approx(np.sqrt((9 + 1 + 16) / 2 / 3))
    assert found.stderr != pytest.approx(np.std([3, 5, 10]) / np.sqrt(3))  # the twin: divided by n
    single = Measurement([3.0])
    assert (single.mean, single.stderr, single.basis) == (3, None, None)


def test_jackknife_of_a_mean_is_its_standard_error():
    """With one image a group it is std / sqrt(n) exactly."""
    values = np.random.default_rng(0).standard_normal(50)
    left_out = [values[groups_of(50, 50) != j].mean() for j in range(50)]
    assert jackknife(left_out) == pytest.approx(values.std(ddof=1) / np.sqrt(50), rel=1e-12)
    assert jackknife(np.add(left_out, 7)) == pytest.approx(jackknife(left_out), rel=1e-9)


def test_paired_and_independent_differences():
    one, base = Measurement([5.0, 8.0, 14.0]), Measurement([4.0, 6.0, 11.0])
    paired, independent = difference(one, base, True), difference(one, base, False)
    assert paired.value == independent.value == 2
    assert paired.stderr == pytest.approx(1 / np.sqrt(3)) and paired.basis == "paired over 3 blocks"
    assert independent.stderr == pytest.approx(np.sqrt((21 + 13) / 3)) and independent.basis == "independent"
    assert difference(base, one, True).value == -2
    assert difference(Measurement([1.0]), Measurement([2.0]), True) == (-1, None, None)
    left = difference(Measurement([1.0], [1.1, 1.2, 0.9]), Measurement([0.5], [0.6, 0.7, 0.4]), True)
    assert left.value == 0.5 and left.stderr == pytest.approx(0, abs=1e-12)
    assert left.basis == "paired jackknife of 3 groups"


def test_standard_error_of_a_paired_difference_is_the_spread_of_repetitions():
    """Two methods on the same noise: the pair knows that the noise cancels, independence does not."""
    rng, results = np.random.default_rng(1), []
    for _ in range(400):
        noise = rng.standard_normal(5)
        one, base = (Measurement(noise + 0.2 * rng.standard_normal(5) + mean) for mean in (1, 0))
        results.append((difference(one, base, True), difference(one, base, False)))
    spread = np.std([paired.value for paired, _ in results])
    typical = [np.sqrt(np.mean([np.square(pair[i].stderr) for pair in results])) for i in (0, 1)]
    assert typical[0] == pytest.approx(spread, rel=0.15) and typical[1] > 3 * spread


# --- entries -----------------------------------------------------------------------------------------


def test_entries():
    assert parse_entries(["a=x", "edm@35=o/e=m@2", "edm@9=p"]) == [
        Entry("a", None, "x"), Entry("edm", 35, "o/e=m@2"), Entry("edm", 9, "p")
    ]
    for texts in (["x"], ["=x"], ["a="], ["a@=x"], ["a@b=x"], ["a@0=x"], ["a@9=x", "a@9=y"], ["a=x", "a=y"]):
        with pytest.raises(ValueError, match="^found .*expected"):
            parse_entries(texts)


def test_blocks():
    assert [blocks_of(*pair) for pair in ((5, 50), (50, 50), (100, 50))] == [1, 1, 2]
    with pytest.raises(ValueError, match="found 120 images, expected whole blocks of 50; .*--num=100"):
        blocks_of(120, 50)


def test_other_counts_and_sizes_are_refused(tmp_path):
    a, b = folder(tmp_path / "a", pixels(6, 0)), folder(tmp_path / "b", pixels(4, 1))
    c = folder(tmp_path / "c", np.zeros((6, 3, 2), np.uint8))
    with pytest.raises(ValueError, match="found 6 images in .*a and 4 in .*b, expected as many"):
        open_entries(parse_entries([f"a={a}", f"b={b}"]), 50)
    sets, _ = open_entries(parse_entries([f"a={a}", f"b={b}"]), 50, num=4)
    assert [images.names for images in sets] == [[f"{i:06d}.png" for i in range(4)]] * 2
    with pytest.raises(ValueError, match="b: found 4 images, expected at least 5"):
        open_entries(parse_entries([f"a={a}", f"b={b}"]), 50, num=5)
    with pytest.raises(ValueError, match="found 2x2 L in .*a and 2x3 L in .*c"):
        open_entries(parse_entries([f"a={a}", f"c={c}"]), 50)


# --- folders -----------------------------------------------------------------------------------------


def test_blocks_of_folders_against_direct_numbers(tmp_path):
    one, two = pixels(90, 0), pixels(90, 1, 118)
    entries = parse_entries([f"one={folder(tmp_path / 'one', one)}", f"two={folder(tmp_path / 'two', two)}"])
    (first, second), notes = run(tmp_path, entries, block=30, splits=5)
    fids = [[fid(images[i : i + 30]) for i in (0, 30, 60)] for images in (one, two)]
    assert first["fid_blocks"] == pytest.approx(fids[0], rel=1e-9)
    assert second["fid_blocks"] == pytest.approx(fids[1], rel=1e-9)
    assert second["fid"] == pytest.approx(np.mean(fids[1])) and second["fid_min"] == pytest.approx(min(fids[1]))
    apart = np.subtract(fids[1], fids[0])
    assert second["fid_difference"] == pytest.approx(apart.mean()) and second["difference_to"] == "one"
    assert second["fid_difference_stderr"] == pytest.approx(apart.std(ddof=1) / np.sqrt(3))
    assert second["fid_difference_from"] == "paired over 3 blocks" and "fid_difference" not in first
    p = torch.tensor(one[:30].reshape(30, 4)[:, :3] / 20).softmax(dim=1).numpy().reshape(5, 6, 3)
    scores = np.exp((p * np.log(p / p.mean(axis=1, keepdims=True))).sum(axis=2).mean(axis=1))
    assert first["is_blocks"][0] == pytest.approx(scores.mean(), rel=1e-9)
    assert notes == [] and first["images"] == 30 and first["blocks"] == 3


NAMES = {
    "subdirs": lambda i: f"{i // 20 * 20:06d}/{i:06d}.png", "one top folder": lambda i: f"out/{i:06d}.png",
    "bmp": lambda i: f"{i:06d}.bmp", "short": lambda i: f"{i}.png", "seed0001": lambda i: f"seed{i:04d}.png",
}


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("naming", NAMES)
def test_images_are_paired_by_seed(tmp_path, naming, zipped):
    """Wherever the seed's image lies; the paired error is far below the independent one."""
    one = pixels(60, 0)
    two = (one.astype(int) + np.random.default_rng(2).integers(0, 3, one.shape)).clip(0, 255).astype(np.uint8)
    a, b = folder(tmp_path / "a", one), folder(tmp_path / "b", two, list(map(NAMES[naming], range(60))))
    if zipped:
        b = shutil.make_archive(tmp_path / "b", "zip", b)
    flat = run(tmp_path, parse_entries([f"a={a}", f"b={folder(tmp_path / 'c', two)}"]))[0][1]
    for block in (30, 60):
        (first, second), notes = run(tmp_path, parse_entries([f"a={a}", f"b={b}"]), block=block)
        assert second["fid_difference_from"].startswith("paired") and second["not_paired"] is None and not notes
        assert second["fid_difference_stderr"] < 0.2 * np.hypot(first["fid_stderr"], second["fid_stderr"])
    assert second["fid_difference_stderr"] == pytest.approx(flat["fid_difference_stderr"], rel=1e-6)


@pytest.mark.parametrize("name, reason", [
    (lambda i: f"x{i:06d}.png", "b has names that are no seeds, or a seed twice (such as x000000.png)"),
    (lambda i: f"{i // 30}/{i % 30:06d}.png", "b has names that are no seeds, or a seed twice (such as 0/000000.png)"),
    (lambda i: f"{i + 1:06d}.png", "the seeds differ, such as 0"),
])
def test_other_names_are_not_paired_and_said_so(tmp_path, name, reason):
    names = list(map(name, range(60)))
    a, b = folder(tmp_path / "a", pixels(60, 0)), folder(tmp_path / "b", pixels(60, 1), names)
    (first, second), notes = run(tmp_path, parse_entries([f"a={a}", f"b={b}"]), block=30)
    assert second["fid_difference_from"] == "independent" and second["not_paired"].endswith(reason)
    assert second["fid_difference_stderr"] == pytest.approx(np.hypot(first["fid_stderr"], second["fid_stderr"]))
    assert notes == [f"b and a are not paired: {second['not_paired']}"]
    shown = lines([first, second])
    assert shown[0].endswith("pairing") and shown[2].endswith(f"not paired: {second['not_paired']}")
    assert second["fid_images_paired"] is None


@pytest.mark.slow
def test_images_needed_are_those_that_make_the_difference_two_standard_errors(tmp_path):
    """Of folders that differ a little: with as many images as is said, the error is half of the difference."""
    one = pixels(400, 0)
    two = (one.astype(int) + np.random.default_rng(2).integers(-3, 5, one.shape)).clip(0, 255).astype(np.uint8)
    entries = parse_entries([f"a={folder(tmp_path / 'a', one)}", f"b={folder(tmp_path / 'b', two)}"])
    row = run(tmp_path, entries)[0][1]
    gap, error = row["fid_difference"], row["fid_difference_stderr"]
    assert row["fid_images_paired"] == np.ceil(400 * (2 * error / gap) ** 2)
    assert row["fid_images_unpaired"] > 10 * row["fid_images_paired"] > 0
    needed = row["fid_images_paired"]
    fewer = [run(tmp_path / str(i), parts_of(tmp_path / str(i), one, two, i, needed))[0][1] for i in range(3)]
    ratios = [part["fid_difference"] / part["fid_difference_stderr"] for part in fewer]
    assert 1 < np.mean(ratios) < 4
    assert difference(Measurement([1.0]), Measurement([2.0]), True).images_needed(9) is None


def parts_of(path, one, two, i, needed):
    """Folders of the i-th `needed` images."""
    path.mkdir()
    count = max(needed, 40)
    return parse_entries([f"{name}={folder(path / name, images[i * count : (i + 1) * count])}"
                          for name, images in (("a", one), ("b", two))])


def test_a_single_block_has_a_jackknife(tmp_path):
    images = pixels(60, 0)
    (row,), _ = run(tmp_path, parse_entries([f"a={folder(tmp_path / 'a', images)}"]))
    left_out = [fid(images[np.arange(60) % 20 != j]) for j in range(20)]
    assert row["fid"] == pytest.approx(fid(images), rel=1e-9)
    assert row["fid_stderr"] == pytest.approx(jackknife(left_out), rel=1e-6)
    assert row["fid_stderr_from"] == "jackknife of 20 groups"


def test_differences_are_to_the_first_name_at_the_same_nfe(tmp_path):
    for i in range(4):
        folder(tmp_path / f"d{i}", pixels(40, i))
    entries = [Entry(name, nfe, str(tmp_path / f"d{i}")) for i, (name, nfe) in
               enumerate([("edm", 9), ("edm", 35), ("art", 35), ("art", 69)])]
    rows, _ = run(tmp_path, entries, block=20)
    assert [row.get("difference_to") for row in rows] == [None, None, "edm", None]
    assert rows[2]["fid_difference"] == pytest.approx(rows[2]["fid"] - rows[1]["fid"])


def test_statistics_are_kept_until_a_file_changes(tmp_path):
    images, detector = pixels(40, 0), Linear()
    entries = parse_entries([f"a={folder(tmp_path / 'a', images)}"])
    (row,), _ = run(tmp_path, entries, detector=detector)
    calls = detector.calls
    again = run(tmp_path, entries, detector=detector)[0][0]
    assert again == row and detector.calls == calls > 0
    images[5] = 0
    Image.fromarray(images[5]).save(tmp_path / "a" / "000005.png")
    changed = run(tmp_path, entries, detector=detector)[0][0]
    assert changed["fid"] == pytest.approx(fid(images), rel=1e-9) and changed["fid"] != row["fid"]
    other = run(tmp_path, entries, detector=Linear(4), reference=(np.zeros(4), np.eye(4)))[0][0]
    assert other["fid"] != changed["fid"]
    os.utime(tmp_path / "a" / "000005.png", (1, 1))
    calls = detector.calls
    assert run(tmp_path, entries, detector=detector)[0][0] == changed and detector.calls > calls


def test_notes_come_again_with_kept_statistics(tmp_path):
    path = Path(folder(tmp_path / "a", pixels(40, 0)))
    Image.fromarray(pixels(1, 1)[0]).save(path / "x.jpg")
    entries = parse_entries([f"a={path}"])
    notes = run(tmp_path, entries)[1]
    assert len(notes) == 1 and "JPEG among PNG" in notes[0]
    assert run(tmp_path, entries)[1] == notes


def test_many_features_have_fewer_groups(tmp_path):
    """Detectors whose features are not kept, as Inception: ten groups."""
    images, detector = pixels(40, 0), Linear(300)
    reference = np.zeros(300), np.eye(300)
    (row,), _ = run(tmp_path, parse_entries([f"a={folder(tmp_path / 'a', images)}"]), detector=detector,
                    reference=reference)
    values = images.reshape(40, 4) @ detector.matrix.numpy().T
    left_out = [frechet_distance(*moments(values[np.arange(40) % 10 != j]), *reference) for j in range(10)]
    assert row["fid_stderr"] == pytest.approx(jackknife(left_out), rel=1e-6)
    assert row["fid"] == pytest.approx(frechet_distance(*moments(values), *reference), rel=1e-9)
