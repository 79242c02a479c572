"""tools/fid.py, `calc` and `ref`: numbers, files, and one line for everything that cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import fid
import numpy as np
import pytest
import torch
from PIL import Image

from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.image_folders import open_images
from art_edm.metrics.mnist import load_mnist, to_images
from art_edm.models.lenet import LeNet
from art_edm.models.loading import load_classifier
from tests.support.commands import invoke
from tests.support.fid_standin import ROOT, StandIn, save_pickle
from tests.support.judging import features_of

DIM, SIZE = 16, 6


def draw(folder, seed, num, offset=0):
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for i, pixels in enumerate(rng.integers(offset, 256, (num, SIZE, SIZE, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two sets of images, a detector, and the statistics of one of the sets."""
    folder = tmp_path_factory.mktemp("fid")
    draw(folder / "a", 0, 50), draw(folder / "b", 1, 60, offset=40)
    save_pickle(folder / "net.pkl", StandIn(3 * SIZE * SIZE, DIM))
    result = run(folder, "ref", "--data=b", "--dest=b.npz")
    assert result.exit_code == 0, result.output
    return folder


def run(folder, *args, detector="--detector=net.pkl"):
    """The tool, in `folder`."""
    old = os.getcwd()
    os.chdir(folder)
    try:
        return invoke(fid.main, [args[0], detector, "--trust-pickle", "--device=cpu", *args[1:]])
    finally:
        os.chdir(old)


def features(folder):
    images = open_images(folder)
    pixels = torch.from_numpy(np.stack([images.load(i) for i in range(len(images))]))
    return StandIn(3 * SIZE * SIZE, DIM)(pixels, return_features=True).numpy()


def fid_of(work, *args):
    result = run(work, "calc", "--images=a", "--ref=b.npz", "--num=50", f"--out={work / 'o.json'}", *args)
    assert result.exit_code == 0, result.output
    return json.loads((work / "o.json").read_text())


def assert_refused(result, *parts, code=2):
    """The exit code, a single line, no traceback."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    assert isinstance(result.exception, SystemExit)
    for part in parts:
        assert part in result.stderr, result.stderr


# --- numbers -----------------------------------------------------------------------------------------


def test_calc_and_its_record(work):
    record = fid_of(work, "--metrics=fid,is", "--splits=4")
    exact = frechet_distance(*moments(features(work / "a")), *moments(features(work / "b")))
    assert record["fid"] == pytest.approx(exact, rel=1e-9)
    assert abs(frechet_distance(*moments(features(work / "a")[:-1]), *moments(features(work / "b"))) / exact - 1) > 1e-4
    p = StandIn(3 * SIZE * SIZE, DIM).choose.double()
    p = torch.softmax(torch.from_numpy(features(work / "a")) @ p, dim=1).numpy()
    parts = [p[50 * j // 4 : 50 * (j + 1) // 4] for j in range(4)]
    scores = [np.exp((part * np.log(part / part.mean(0))).sum(1).mean()) for part in parts]
    assert record["is"] == pytest.approx(np.mean(scores), rel=1e-9)
    assert record["is_splits_std"] == pytest.approx(np.std(scores), rel=1e-9)
    assert (record["num_images"], record["seed"], record["features"], record["image_shape"]) == (50, 0, DIM, [3, 6, 6])
    reference = record["reference"]
    assert reference["num_images"] == 60 and reference["detector_sha256"] == record["detector_sha256"]
    assert ["found 60 images behind the reference" in note for note in record["notes"]] == [True, False]
    assert record["notes"][1].startswith("found 50 images, fewer than 2048")


def test_what_is_printed(work):
    result = run(work, "calc", "--images=a", "--ref=b.npz", "--num=50")
    assert result.stdout == f"{fid_of(work)['fid']:g}\n"  # the number alone, as upstream
    assert result.stderr.splitlines()[1].startswith("note: found 50 images, fewer than 2048")
    both = run(work, "calc", "--images=a", "--metrics=is", "--num=50")
    assert both.stdout.startswith("IS ") and both.exit_code == 0  # no --ref needed


@pytest.mark.parametrize("args", [["--batch=1"], ["--batch=7", "--workers=0"], ["--batch=50", "--workers=5"]])
def test_batches_and_workers_change_nothing(work, args):
    assert fid_of(work, *args)["fid"] == pytest.approx(fid_of(work)["fid"], rel=1e-9)


def test_names_and_packing_change_nothing(work):
    """The order in which files are found is the names'; the FID of renamed files is the same."""
    renamed = work / "renamed"
    renamed.mkdir()
    for i, path in enumerate(sorted((work / "a").iterdir())):
        (renamed / f"{(i * 7) % 50:03d}.png").write_bytes(path.read_bytes())
    with zipfile.ZipFile(work / "a.zip", "w") as archive:
        for path in sorted((work / "a").iterdir(), reverse=True):
            archive.write(path, f"x/{path.name}")
    expected = fid_of(work)["fid"]
    for images in ("renamed", "a.zip"):
        assert fid_of(work, f"--images={images}")["fid"] == pytest.approx(expected, rel=1e-9)
    assert fid_of(work, "--num=40")["fid"] != pytest.approx(expected, rel=1e-4)
    assert fid_of(work, "--num=40", "--seed=1")["fid"] != pytest.approx(fid_of(work, "--num=40")["fid"], rel=1e-4)


def test_a_set_against_itself(work):
    assert fid_of(work, "--images=b", "--num=60")["fid"] == pytest.approx(0, abs=1e-9)
    assert run(work, "ref", "--data=b", "--dest=b.pkl").stdout == ("wrote b.pkl: 16 features of 60 images\n")
    assert fid_of(work, "--ref=b.pkl")["fid"] == fid_of(work)["fid"]


@pytest.mark.slow
def test_the_lenet_fid_of_mnist(tmp_path, mnist_folder):
    lenet, exact = load_classifier(LeNet), []
    for split, num in (("train", 2500), ("test", 2100)):
        pixels = load_mnist(split, mnist_folder)[0][:num]
        (tmp_path / split).mkdir()
        for i, digit in enumerate(pixels.numpy()):
            Image.fromarray(digit).save(tmp_path / split / f"{i:05d}.png")
        exact += moments(features_of(lenet, to_images(pixels)))
    assert run(tmp_path, "ref", "--data=train", "--dest=r.npz", detector="--detector=lenet").exit_code == 0
    result = run(tmp_path, "calc", "--images=test", "--ref=r.npz", "--num=2100", "--out=o.json", "--detector=lenet")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads((tmp_path / "o.json").read_text())["fid"]
    assert found == pytest.approx(frechet_distance(*exact), rel=1e-6) and found > 1e-3


# --- processes ---------------------------------------------------------------------------------------


def torchrun(work, processes, *args):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
            str(ROOT / "tools" / "fid.py"), "calc", "--ref=b.npz", "--detector=net.pkl", "--trust-pickle",
            "--device=cpu", "--num-images=50", "--batch=4", *args]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(call, cwd=work, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_processes_change_nothing(work, processes):
    done = torchrun(work, processes, "--images=a", "--metrics=fid,is", "--out=many.json")
    assert done.returncode == 0, done.stderr
    one, many = fid_of(work, "--metrics=fid,is"), json.loads((work / "many.json").read_text())
    for key in ("fid", "is", "is_splits_std"):
        assert many[key] == pytest.approx(one[key], rel=1e-9)
    assert many["processes"] == processes and done.stdout.count("\n") == 2  # printed once


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_with_one_line(work):
    bad = work / "bad"
    bad.mkdir()
    for path in (work / "a").iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    (bad / "005.png").write_bytes((bad / "005.png").read_bytes()[:-20])  # in the second batch: process 1's
    done = torchrun(work, 2, "--images=bad")
    assert done.returncode != 0 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1 and "005.png: found a damaged or truncated image" in lines[0]
    assert "art_edm" not in done.stderr and "exitcode" in done.stderr  # no traceback of ours; the rest is torchrun's


# --- what cannot be used -----------------------------------------------------------------------------


def calc(work, *args, **kwargs):
    return run(work, "calc", "--images=a", "--ref=b.npz", "--num=50", *args, **kwargs)


def other(work, name, change):
    """A copy of the images with one more file, or one changed."""
    folder = work / name
    folder.mkdir()
    for path in (work / "a").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change(folder)
    return f"--images={name}"


def grey(folder):
    Image.fromarray(np.zeros((SIZE, SIZE), np.uint8)).save(folder / "010.png")


def larger(folder):
    Image.fromarray(np.zeros((SIZE + 1, SIZE, 3), np.uint8)).save(folder / "010.png")


def cut(folder):
    (folder / "010.png").write_bytes((folder / "010.png").read_bytes()[:50])


def text(folder):
    (folder / "010.png").write_bytes(b"text")


@pytest.mark.parametrize("change, parts", [
    (grey, ["010.png, 6x6 L, and ", "000.png, 6x6 RGB"]), (larger, ["010.png, 6x7 RGB, and ", "000.png, 6x6 RGB"]),
    (cut, ["010.png: found a damaged or truncated image"]),
    (text, ["010.png: found a file of unknown kind, no readable image"]),
    (lambda folder: [path.unlink() for path in folder.iterdir()], ["found no images"]),
    (lambda folder: (folder / "049.png").unlink(), ["found 49 images, expected at least 50"]),
], ids=["mode", "size", "truncated", "corrupt", "none", "too few"])
def test_images_that_cannot_be_used(work, request, change, parts):
    name = request.node.callspec.id.replace(" ", "-")
    result = calc(work, other(work, name, change))
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and result.stdout == "" and lines[-1].startswith("Error: ")
    assert all(part in lines[-1] for part in parts), lines
    assert all(line.startswith("note: ") for line in lines[:-1]) and Path(work, name).name in lines[-1]


def test_a_jpeg_among_pngs_is_a_note(work):
    photo = Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8))
    result = calc(work, other(work, "jpeg", lambda folder: photo.save(folder / "z.jpg")), "--num=51")
    assert result.exit_code == 0 and "found JPEG among PNG, such as jpeg/z.jpg; compression artefacts" in result.stderr
    assert "JPEG" not in calc(work).stderr


@pytest.mark.parametrize("args, parts", [
    (["--ref=none.npz"], ["cannot read none.npz"]), (["--images=x"], ["x: found nothing there"]),
    (["--metrics=fid,prdc"], ["found 'prdc', expected fid, fd_dinov2, is, kid"]),
    (["--metrics=fid,kid"], ["b.npz has statistics for fid, not for kid"]),
    (["--metrics=is", "--splits=51"], ["found 50 images, expected at least one per split (51)"]),
    (["--out=no/o.json"], ["no folder no"]), (["--device=abacus"], ["cannot use --device=abacus"]),
    (["--detector-sha256=00"], ["net.pkl: found SHA-256", "expected 00"]),
], ids=["ref", "images", "metrics", "reference", "splits", "out", "device", "hash"])
def test_options_that_cannot_be_used(work, args, parts):
    result = calc(work, *args)
    lines = result.stderr.splitlines()
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit) and result.stdout == ""
    assert lines[-1].startswith("Error: ") and all(part in lines[-1] for part in parts), lines
    assert calc(work).exit_code == 0


def test_a_reference_of_another_dimension(work):
    np.savez(work / "wide.npz", mu=np.zeros(20), sigma=np.eye(20))
    assert_refused(calc(work, "--ref=wide.npz"), "wide.npz has 20 features, net.pkl gives 16", "--ref or --detector")


def test_a_reference_by_another_detector_is_noted(work):
    save_pickle(work / "other.pkl", StandIn(3 * SIZE * SIZE, DIM, classes=4))
    result = calc(work, detector="--detector=other.pkl")
    assert result.exit_code == 0 and "b.npz was made with the detector net.pkl" in result.stderr
    assert "was made with" not in calc(work).stderr


def test_no_reference_for_fid(work):
    assert_refused(run(work, "calc", "--images=a", "--num=50"), "found no --ref")


def test_a_pickle_is_not_run_unasked(work, monkeypatch):
    monkeypatch.chdir(work)
    result = invoke(fid.main, ["calc", "--images=a", "--ref=b.npz", "--num=50", "--detector=net.pkl"])
    assert_refused(result, "net.pkl: found a pickle, which runs code when read", "--trust-pickle")


def test_ref_checks_its_destination_first(work):
    assert_refused(run(work, "ref", "--data=a", "--dest=r.txt"), "expected one that ends in .npz or .pkl")
    assert_refused(run(work, "ref", "--data=a", "--dest=b.npz/r.npz"), "choose another --dest")
    assert run(work, "ref", "--data=a", "--dest=made/r.npz").exit_code == 0 and (work / "made" / "r.npz").is_file()
