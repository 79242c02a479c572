"""The same numbers as EDM's own fid.py, run here on a CPU with the same stand-in detector."""

from __future__ import annotations

import inspect
import json
import zipfile
from pathlib import Path

import fid
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from art_edm.metrics.frechet import frechet_distance, moments
from art_edm.metrics.image_folders import open_images
from tests.support.commands import invoke
from tests.support.fid_standin import StandIn, run_upstream, save_pickle

DIM, SIZE = 24, 8

pytestmark = pytest.mark.upstream


def has_sqrtm() -> bool:
    return "disp" in inspect.signature(scipy.linalg.sqrtm).parameters


needs_sqrtm = pytest.mark.skipif(not has_sqrtm(), reason="upstream's distance needs sqrtm(disp=...), before scipy 1.18")


def draw(folder: Path, seed: int, num: int, channels: int, offset: int) -> Path:
    """A folder of random PNGs, in subfolders."""
    rng = np.random.default_rng(seed)
    shape = (num, SIZE, SIZE) if channels == 1 else (num, SIZE, SIZE, 3)
    for i, pixels in enumerate(rng.integers(offset, 256, shape, dtype=np.uint8)):
        path = folder / f"{i % 3:02d}" / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return folder


def pack(folder: Path) -> Path:
    with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as archive:
        for path in sorted(folder.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(folder))
    return folder.with_suffix(".zip")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Images, moments, and upstream's answers about them, all from one process."""
    folder = tmp_path_factory.mktemp("upstream")
    rgb, grey = draw(folder / "rgb", 0, 90, 3, 0), draw(folder / "grey", 1, 70, 1, 60)
    data, zipped = draw(folder / "data", 2, 80, 3, 30), pack(rgb)
    detector = save_pickle(folder / "standin.pkl", StandIn(3 * SIZE * SIZE, DIM))
    rng = np.random.default_rng(5)
    cases = {}
    for name, d, rows in (("full", 64, 300), ("deficient", 64, 30)):
        a = moments(rng.standard_normal((rows, d)) @ rng.standard_normal((d, d)) / 8)
        b = moments(rng.standard_normal((300, d)) * 2 + 0.3)
        cases[name] = (*a, *b)
        np.savez(folder / f"{name}.npz", **dict(zip(("mu1", "cov1", "mu2", "cov2"), cases[name])))
    reference = folder / "theirs.npz"
    calc = ["calc", f"--ref={reference}", "--batch=16"]
    questions = {
        "ref": ["ref", f"--data={data}", f"--dest={reference}"],
        "rgb": [*calc, f"--images={rgb}", "--num=90"],
        "zip": [*calc, f"--images={zipped}", "--num=90"],
        "some": [*calc, f"--images={rgb}", "--num=60", "--seed=3"],
        "grey": [*calc, f"--images={grey}", "--num=70"],
        "names": ["names", str(rgb), 40, 7], "names2": ["names", str(zipped), 40, 2**31 + 7],
        "full": ["distance", str(folder / "full.npz")], "deficient": ["distance", str(folder / "deficient.npz")],
    }
    asked = {key: value for key, value in questions.items() if has_sqrtm() or "names" in key or key == "ref"}
    answers = dict(zip(asked, run_upstream(detector, DIM, list(asked.values()))))
    return folder, detector, questions, answers, cases


def ours(both, tmp_path, *args):
    """The FID by tools/fid.py, in full precision."""
    detector, out = both[1], tmp_path / "out.json"
    result = invoke(
        fid.main, [*args, f"--detector={detector}", "--trust-pickle", "--device=cpu", f"--out={out}"]
    )
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text())["fid"], result.stdout


@needs_sqrtm
@pytest.mark.parametrize("name", ["rgb", "zip", "some", "grey"])
def test_calc_gives_upstreams_fid(both, tmp_path, name):
    _, _, questions, answers, _ = both
    fid, printed = ours(both, tmp_path, *questions[name])
    line, exact = answers[name]
    assert printed.strip() == line and fid == pytest.approx(exact, rel=1e-9)
    others = [answers[key][1] for key in ("rgb", "some", "grey") if key != name and (name, key) != ("zip", "rgb")]
    assert all(abs(fid - other) > 1e-3 * fid for other in others)  # each question has its own answer


def test_ref_gives_upstreams_moments(both, tmp_path):
    folder, detector, *_ = both
    result = invoke(fid.main, [
        "ref", f"--data={folder / 'data'}", f"--dest={tmp_path / 'r.npz'}", f"--detector={detector}", "--trust-pickle",
        "--device=cpu", "--batch=7",
    ])
    assert result.exit_code == 0, result.output
    with np.load(folder / "theirs.npz") as theirs, np.load(tmp_path / "r.npz") as found:
        np.testing.assert_allclose(found["mu"], theirs["mu"], rtol=1e-12)
        np.testing.assert_allclose(found["sigma"], theirs["sigma"], rtol=1e-9, atol=1e-12 * theirs["sigma"].max())
        assert np.abs(found["sigma"] * 79 / 80 - theirs["sigma"]).max() > 1e-3 * theirs["sigma"].max()  # n, not n - 1


@pytest.mark.parametrize("name, path, num, seed", [("names", "rgb", 40, 7), ("names2", "rgb.zip", 40, 2**31 + 7)])
def test_the_same_images_are_chosen(both, name, path, num, seed):
    folder, _, _, answers, _ = both
    assert open_images(folder / path, num, seed).names == answers[name]
    assert open_images(folder / path, num, seed + 1).names != answers[name]


@needs_sqrtm
def test_the_distance_of_full_rank(both):
    answers, cases = both[3], both[4]
    assert frechet_distance(*cases["full"]) == pytest.approx(answers["full"], rel=1e-9)


@needs_sqrtm
def test_the_distance_without_full_rank_is_ours(both):
    """30 images in 64 dimensions: sqrtm takes roots of rounding errors, 1e-8 each. By construction cov1 = F F^T with
    F of the 29 directions that the data span, and the trace is the sum of the roots of F^T cov2 F, all far from 0."""
    mu1, cov1, mu2, cov2 = both[4]["deficient"]
    values, vectors = scipy.linalg.eigh(cov1, subset_by_index=[64 - 29, 63])
    f = vectors * np.sqrt(values)
    cross = np.sqrt(np.linalg.eigvalsh(f.T @ cov2 @ f)).sum()
    exact = np.square(mu1 - mu2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross
    mine, theirs = frechet_distance(mu1, cov1, mu2, cov2), both[3]["deficient"]
    assert mine == pytest.approx(exact, rel=1e-12)
    assert theirs == pytest.approx(exact, rel=1e-6) and abs(theirs - exact) > 100 * abs(mine - exact)
