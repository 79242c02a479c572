"""Reference statistics: what upstream writes is read, what is written upstream can read, and nothing else is taken."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from art_edm.metrics.references import StatisticsError, check_reference_destination, load_reference, save_reference
from art_edm.runtime.download import DownloadError
from tests.support.loopback import Loopback, status, whole

D = 4


@pytest.fixture
def stats():
    rng = np.random.default_rng(0)
    half = rng.standard_normal((D, 9))
    return rng.standard_normal(D), half @ half.T


def write(path, **content):
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        path.write_bytes(pickle.dumps({"num_images": 9, "fid": content, "fd_dinov2": {"mu": np.zeros(2)}}))
    return str(path)


@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_upstreams_files(tmp_path, stats, kind):
    mu, cov = stats
    found = load_reference(write(tmp_path / f"r.{kind}", mu=mu, sigma=cov))
    assert (found.mu == mu).all() and (found.cov == cov).all() and found.dim == D and found.provenance == {}
    assert (found.cov != cov * (1 + 1e-15)).any()


@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_what_is_written_upstream_reads(tmp_path, stats, kind):
    mu, cov = stats
    path = tmp_path / f"r.{kind}"
    save_reference(path, mu, cov, 50, {"detector": "lenet"})
    with open(path, "rb") as file:
        content = dict(np.load(file)) if kind == "npz" else pickle.load(file)["fid"]
    assert (content["mu"] == mu).all() and (content["sigma"] == cov).all()
    assert content["mu"].dtype == content["sigma"].dtype == np.float64
    found = load_reference(str(path))
    assert (found.mu == mu).all() and (found.cov == cov).all()
    assert found.provenance == {"num_images": 50, "detector": "lenet"}


def test_the_pickle_names_what_every_numpy_has(tmp_path, stats):
    save_reference(tmp_path / "r.pkl", *stats, 50, {})
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
    assert (found.cov == found.cov.T).all() and abs(found.cov - nearly).max() < 1e-6 * abs(cov).max()


@pytest.mark.parametrize("content, message", [
    (b"", "found an empty file"), (b"PK\x03\x04 cut", "found a damaged .npz"), (b"hello", "."),
    (pickle.dumps([1]), "found list, expected a dict with 'fid'"),
    (pickle.dumps({"fd_dinov2": {"mu": 1}}), "found keys fd_dinov2, expected a dict with 'fid'"),
], ids=["empty", "cut", "text", "list", "no fid"])
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
        assert (load_reference(url, quiet=True).mu == stats[0]).all() and load_reference(url).source == url
        assert len(server.asked) == 1  # the second time from the cache
        gone = server.on("/gone.npz", status(500))
        with pytest.raises(DownloadError, match="gone.npz"):
            load_reference(gone, quiet=True)


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
