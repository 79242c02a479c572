"""Reference statistics: what upstream writes is read, what is written upstream can read, and nothing else is taken."""

from __future__ import annotations

import io
import json
import pickle
import zipfile

import numpy as np
import pytest

from art_edm.metrics import references
from art_edm.metrics.references import StatisticsError, check_reference_destination, load_reference, save_reference
from art_edm.runtime.download import DownloadError
from tests.support.loopback import Loopback, status, whole

D = 4
DINO = {"mu": np.arange(2.0), "sigma": np.diag([1.0, 3.0])}


def moments_of(reference, metric="fid"):
    return reference.of(metric)["mu"], reference.of(metric)["sigma"]


def save(path, mu, cov, count=5000, provenance=()):
    save_reference(path, {"fid": {"mu": mu, "sigma": cov}}, count, dict(provenance))


@pytest.fixture
def stats():
    rng = np.random.default_rng(0)
    half = rng.standard_normal((D, 9))
    return rng.standard_normal(D), half @ half.T


def write(path, **content):
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        path.write_bytes(pickle.dumps({"num_images": 5000, "fid": content, "fd_dinov2": DINO, "future": {"x": 1}}))
    return str(path)


@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_upstreams_files(tmp_path, stats, kind):
    mu, cov = stats
    found = load_reference(write(tmp_path / f"r.{kind}", mu=mu, sigma=cov))
    assert all((a == b).all() for a, b in zip(moments_of(found), stats)) and not found.notes
    assert (found.of("fid")["sigma"] != cov * (1 + 1e-15)).any()
    if kind == "npz":
        with pytest.raises(StatisticsError, match="r.npz has statistics for fid, not for fd_dinov2; change --metrics"):
            found.of("fd_dinov2")
    else:
        assert list(found.sets) == ["fid", "fd_dinov2"] and found.provenance == {"num_images": 5000}
        assert all((a == b).all() for a, b in zip(moments_of(found, "fd_dinov2"), DINO.values()))


@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_what_is_written_upstream_reads(tmp_path, stats, kind):
    mu, cov = stats
    path = tmp_path / f"r.{kind}"
    save(path, mu, cov, 50, {"detector": "lenet"})
    with open(path, "rb") as file:
        content = dict(np.load(file)) if kind == "npz" else pickle.load(file)["fid"]
    assert (content["mu"] == mu).all() and (content["sigma"] == cov).all()
    assert content["mu"].dtype == content["sigma"].dtype == np.float64
    found = load_reference(str(path))
    assert all((a == b).all() for a, b in zip(moments_of(found), stats))
    assert found.provenance == {"num_images": 50, "detector": "lenet"}
    assert ["found 50 images behind the reference, fewer than 2048" in note for note in found.notes] == [True]
    save(path, mu, cov, 5000)
    assert load_reference(str(path)).notes == []


def test_the_pickle_names_what_every_numpy_has(tmp_path, stats):
    save(tmp_path / "r.pkl", *stats, 50)
    blob = (tmp_path / "r.pkl").read_bytes()
    assert b"numpy.core.multiarray" in blob and b"_core" not in blob
    content = pickle.loads(blob)
    assert content["num_images"] == 50 and json.loads(content["provenance"]) == {"num_images": 50}
    if int(np.__version__.split(".")[0]) > 1:
        assert b"numpy._core" in pickle.dumps(stats[0], protocol=3)  # what older ones cannot import


class Runs:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [
    Runs(), {"fid": {"mu": Runs(), "sigma": np.eye(2)}}, {"fid": {"mu": np.zeros(2), "sigma": np.eye(2)}, "x": Runs()},
], ids=["alone", "as an array", "beside arrays"])
def test_a_pickle_with_more_than_arrays_is_refused_and_not_run(tmp_path, capsys, content):
    path = tmp_path / "r.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(StatisticsError) as error:
        load_reference(str(path))
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value) and "print" in str(error.value)
    assert capsys.readouterr().out == ""
    pickle.loads(path.read_bytes())
    assert capsys.readouterr().out == "ran\n"  # what Python's own reader does


def broken(mu, cov):
    skew, nan, inf, negative = cov.copy(), cov.copy(), mu.copy(), cov.copy()
    skew[0, 1] += 0.1
    nan[1, 1], inf[2], negative[0, 0] = np.nan, np.inf, -3
    return {
        "no sigma": (dict(mu=mu), "found mu, expected mu and sigma"),
        "no mu": (dict(sigma=cov, n=np.ones(1)), "expected mu and sigma; is it a reference"),
        "not symmetric": (dict(mu=mu, sigma=skew), "differs from its transpose by 0.1"),
        "NaN": (dict(mu=mu, sigma=nan), "found NaN or infinity in sigma"),
        "infinity": (dict(mu=inf, sigma=cov), "found NaN or infinity in mu"),
        "negative": (dict(mu=mu, sigma=negative), "found the variance -3 in sigma"),
        "other sizes": (dict(mu=mu[1:], sigma=cov), r"mu of shape \(3,\) and sigma of shape \(4, 4\)"),
        "flat": (dict(mu=mu, sigma=mu), r"sigma of shape \(4,\)"),
        "complex": (dict(mu=mu + 1j, sigma=cov), "found mu of type complex128"),
        "text": (dict(mu=np.array(["a"] * 4), sigma=cov), "expected real numbers|of type '<U1'|U1"),
    }


@pytest.mark.parametrize("kind", ["npz", "pkl"])
@pytest.mark.parametrize("case", broken(np.zeros(D), np.eye(D)))
def test_numbers_that_are_no_moments(tmp_path, stats, case, kind):
    content, message = broken(*stats)[case]
    with pytest.raises(StatisticsError, match=message) as error:
        load_reference(write(tmp_path / f"r.{kind}", **content))
    assert str(error.value).startswith(str(tmp_path)) and "\n" not in str(error.value)


def test_rounding_is_no_asymmetry(tmp_path, stats):
    mu, cov = stats
    nearly = cov.astype(np.float32).astype(np.float64)
    nearly[0, 1] *= 1 + 1e-7
    found = load_reference(write(tmp_path / "r.npz", mu=mu.astype(np.float32), sigma=nearly))
    found = found.of("fid")["sigma"]
    assert (found == found.T).all() and abs(found - nearly).max() < 1e-6 * abs(cov).max()


@pytest.mark.parametrize("content, message", [
    (b"", "found an empty file"), (b"PK\x03\x04 cut", "found a damaged .npz"), (b"hello", "."),
    (pickle.dumps([1]), "found list, expected a dict with 'fid'"),
    (pickle.dumps({"prdc": {"mu": 1}}), "found keys prdc, expected a dict with 'fid'"),
    (b"<!DOCTYPE html><html>", "found a web page"), (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
], ids=["empty", "cut", "text", "list", "no fid", "page", "pointer"])
def test_files_that_are_no_references(tmp_path, content, message):
    (tmp_path / "r.pkl").write_bytes(content)
    with pytest.raises(StatisticsError, match=message) as error:
        load_reference(str(tmp_path / "r.pkl"))
    assert str(error.value).startswith(str(tmp_path / "r.pkl")) and "\n" not in str(error.value)


def test_objects_in_an_npz_are_not_read(tmp_path, stats, capsys):
    np.savez(tmp_path / "r.npz", mu=np.array([Runs()] * D), sigma=stats[1])
    with pytest.raises(StatisticsError, match="damaged .npz or one with objects"):
        load_reference(str(tmp_path / "r.npz"))
    assert capsys.readouterr().out == ""


def test_no_file(tmp_path):
    with pytest.raises(StatisticsError, match="cannot read .*none.npz: No such file or directory; correct --ref"):
        load_reference(str(tmp_path / "none.npz"))


def test_an_address(tmp_path, monkeypatch, stats):
    monkeypatch.setenv("ART_EDM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("art_edm.runtime.download.DELAYS", ())
    write(tmp_path / "r.npz", mu=stats[0], sigma=stats[1])
    with Loopback() as server:
        url = server.on("/fid-refs/r.npz", whole((tmp_path / "r.npz").read_bytes()))
        assert (load_reference(url, quiet=True).of("fid")["mu"] == stats[0]).all() and load_reference(url).source == url
        assert len(server.asked) == 1  # the second time from the cache
        gone = server.on("/gone.npz", status(500))
        with pytest.raises(DownloadError, match="gone.npz"):
            load_reference(gone, quiet=True)


def test_both_sets_of_moments_and_features(tmp_path, stats):
    """What EDM2 reads is where it looks; features for KID stand beside it."""
    sets = {"fid": {"mu": stats[0], "sigma": stats[1]}, "fd_dinov2": DINO}
    save_reference(tmp_path / "r.pkl", sets, 5000, {})
    found = load_reference(str(tmp_path / "r.pkl"))
    upstream = pickle.loads((tmp_path / "r.pkl").read_bytes())
    assert upstream["num_images"] == 5000
    for metric, content in sets.items():
        for key, value in content.items():
            assert (found.of(metric)[key] == value).all() and (upstream[metric][key] == value).all()
    with pytest.raises(StatisticsError, match="found fd_dinov2 for an .npz, which holds fid alone; .*in .pkl"):
        save_reference(tmp_path / "r.npz", sets, 5000, {})
    sets = {"fid": sets["fid"], "kid": {"features": np.random.default_rng(1).standard_normal((7, D))}}
    for kind in ("npz", "pkl"):
        save_reference(tmp_path / f"k.{kind}", sets, 5000, {})
        assert (load_reference(str(tmp_path / f"k.{kind}")).of("kid")["features"] == sets["kid"]["features"]).all()


def spectrum(dim=64):
    """A covariance whose variances fall off as those of a detector do."""
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((dim, dim)))[0]
    return turn * np.logspace(0, -6, dim) @ turn.T


@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_a_sigma_with_negative_eigenvalues_is_named(tmp_path, kind):
    cov, mu = spectrum(), np.zeros(64)
    half = cov.astype(np.float16)
    half = ((half + half.T) / 2).astype(np.float16)
    notes = load_reference(write(tmp_path / f"r.{kind}", mu=mu, sigma=half)).notes
    assert len(notes) == 2 and "found sigma in float16, whose three digits are few" in notes[0]
    share = -np.linalg.eigvalsh(half.astype(float)).clip(max=0).sum()
    assert f"the fid may be off by about {share:.2g}" in notes[1] and notes[1].startswith(str(tmp_path))
    assert load_reference(write(tmp_path / f"s.{kind}", mu=mu, sigma=cov)).notes == []
    with pytest.raises(StatisticsError, match=r"negative eigenvalues are 18.96% of its trace, expected none; make"):
        load_reference(write(tmp_path / f"t.{kind}", mu=mu, sigma=np.diag([1.0] * 60 + [0.0] * 4) + 3 * swap(64)))


def swap(dim):
    """Off-diagonal entries that no variances allow."""
    return np.eye(dim)[::-1] * 0.5


def test_a_bomb_is_not_unpacked(tmp_path, monkeypatch):
    """An .npz of a few thousand bytes whose array would take gigabytes."""
    with zipfile.ZipFile(tmp_path / "r.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("mu", "sigma"):
            archive.writestr(f"{name}.npy", array_bytes(np.zeros((1000, 1000))))
    unpacked = []
    read = np.lib.format.read_array
    monkeypatch.setattr(np.lib.format, "read_array", lambda *args, **more: unpacked.append(1) or read(*args, **more))
    monkeypatch.setattr(references, "MAX_BYTES", 10**6)
    with pytest.raises(StatisticsError, match=r"found mu.npy of \d+ bytes that unpack to 8000128, .*exhaust"):
        load_reference(str(tmp_path / "r.npz"))
    assert not unpacked
    monkeypatch.setattr(references, "MAX_BYTES", 10**9)  # the twin: without the bound it is built
    with pytest.raises(StatisticsError, match="mu of shape"):
        load_reference(str(tmp_path / "r.npz"))
    assert len(unpacked) == 2


def array_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_destinations(tmp_path):
    assert check_reference_destination(tmp_path / "new" / "r.npz") == tmp_path / "new" / "r.npz"
    with pytest.raises(StatisticsError, match="expected one that ends in .npz or .pkl; change --dest"):
        check_reference_destination(tmp_path / "r.npy")
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(StatisticsError, match="it is a folder"):
        check_reference_destination(tmp_path / "d.npz")
    (tmp_path / "file").write_text("x")
    with pytest.raises(StatisticsError, match="cannot create the folder .*; choose another --dest"):
        check_reference_destination(tmp_path / "file" / "r.npz")
