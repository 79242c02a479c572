"""Reference statistics: the moments of a data set's features, in the files of EDM and EDM2.

    .npz    EDM: arrays mu [d] and sigma [d, d], of the metric fid
    .pkl    EDM2: {"num_images": n, "fid": {"mu": [d], "sigma": [d, d]}, "fd_dinov2": {...}}

Both carry here, beside what upstream reads, `provenance`: JSON text that says how they were made; and where they were
made for kid, "kid": {"features": [n, d]} (in an .npz, the array kid_features). A .pkl is read as plain data; nothing in
it is run.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Sequence, Tuple

import numpy as np

from art_edm.metrics.frechet import negative_part
from art_edm.pickles.values import load_data
from art_edm.runtime.download import download, is_url
from art_edm.runtime.files import PathLike, atomic_write, check_destination, file_kind, sha256_of

__all__ = [
    "Reference", "StatisticsError", "check_npz", "check_reference_destination", "few_images", "load_reference",
    "save_reference",
]

METRICS = ("fid", "fd_dinov2", "kid")  # whose statistics a file may hold
FEW = 2048  # images, below which the covariance of Inception's features is singular
ASYMMETRY = 1e-6  # relative to the largest entry; rounding in float32 stays below
NEGATIVE = 1e-2  # of the trace: negative eigenvalues that rounding of a file can explain, float16 included
MAX_BYTES = 2**30  # of one array; 50,000 images of 2,048 features in float32 are 400 MB

Content = Dict[str, np.ndarray]


class StatisticsError(ValueError):
    """A file that holds no usable reference statistics; one line that names it."""


@dataclass(frozen=True)
class Reference:
    """Statistics of a data set's features and what is known of them."""

    sets: Dict[str, Content]  # metric -> "mu" [d] and "sigma" [d, d] float64, or "features" [n, d]
    source: str  # path or address
    sha256: str = ""  # of the file
    provenance: Dict[str, Any] = field(default_factory=dict)  # {} in files of upstream
    notes: Sequence[str] = ()  # what the user should know of the numbers

    def of(self, metric: str) -> Content:
        """The statistics for a metric; raises a StatisticsError that names what there is."""
        if metric not in self.sets:
            raise StatisticsError(f"{self.source} has statistics for {', '.join(self.sets)}, not for {metric}; change "
                                  f"--metrics, or make a reference with: fid.py ref --metrics={metric}")
        return self.sets[metric]

    def notes_for(self, metric: str, name: str, sha256: str, dim: int) -> List[str]:
        """What the user should know who compares this with the features of another detector file.

        Raises a StatisticsError if the detector `name` has not as many features.
        """
        found = next(iter(self.of(metric).values())).shape[-1]
        if found != dim:
            raise StatisticsError(f"{self.source} has {found} features, {name} gives {dim}; expected the same "
                                  "detector: change --ref or --detector")
        own = self.provenance.get("detectors", {}).get(metric) or self.provenance
        made = own.get("detector_sha256", sha256)
        if made == sha256:
            return []
        other = own.get("detector", "?")
        return [f"{self.source} was made with the detector {other} (SHA-256 {made}), not with {name} ({sha256}); if "
                f"they are two networks, the {metric} means nothing"]


def few_images(count: int, what: str = "images") -> List[str]:
    """A note where `count` images are too few for a FID of 2,048 features."""
    if count >= FEW:
        return []
    return [f"found {count} {what}, fewer than {FEW}: the FID is biased upwards and compares only with that of as many "
            "images"]


def load_reference(spec: str, quiet: bool = False) -> Reference:
    """Read and check the statistics at a path or address; the content tells the format.

    Raises:
        StatisticsError: missing, damaged or not statistics.
        DownloadError, DownloadRefused: of an address.
    """
    if spec.startswith("mnist:"):
        raise StatisticsError(f"found --ref={spec}, which is for gen and compare; make a file of it with fid.py ref")
    path = download(spec, quiet=quiet) if is_url(spec) else Path(spec)
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
        content, provenance = (_read_npz if zipped else _read_pkl)(path)
        notes: List[str] = []
        sets = {metric: _checked(metric, part, notes) for metric, part in content.items()}
    except OSError as error:
        raise StatisticsError(f"cannot read {spec}: {error.strerror or error}; correct --ref") from None
    except StatisticsError as error:
        raise StatisticsError(f"{spec}: {error}") from None
    count = provenance.get("num_images")
    if isinstance(count, int):
        notes += few_images(count, "images behind the reference")
    return Reference(sets, spec, sha256_of(path), provenance, [f"{spec}: {note}" for note in notes])


def check_reference_destination(path: PathLike) -> Path:
    """Raise a ValueError now if `save_reference(path)` would fail; makes the folder, as upstream does."""
    if Path(path).suffix.lower() not in (".npz", ".pkl"):
        raise StatisticsError(f"found the name {path}, expected one that ends in .npz or .pkl; change --dest")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        return check_destination(path)
    except OSError as error:
        text = f"cannot create the folder {Path(path).parent}: {error.strerror}; choose another --dest"
        raise StatisticsError(text) from None
    except ValueError as error:
        raise StatisticsError(str(error).replace("--out", "--dest")) from None


def save_reference(path: PathLike, sets: Dict[str, Content], count: int, provenance: Dict[str, Any]) -> None:
    """Write statistics (see `Reference.sets`) as the file's ending says, atomically; upstream's scripts read them.

    Raises a StatisticsError where an .npz has no place for them.
    """
    text = json.dumps({"num_images": count, **provenance}, allow_nan=False)
    if Path(path).suffix.lower() == ".npz":
        check_npz(sets)
        arrays = {(key if metric == "fid" else f"{metric}_{key}"): value
                  for metric, part in sets.items() for key, value in part.items()}
        atomic_write(path, lambda file: np.savez(file, provenance=np.array(text), **arrays))
    else:
        blob = _dumps({"num_images": count, **sets, "provenance": text})
        atomic_write(path, lambda file: file.write(blob))


def check_npz(metrics: Iterable[str]) -> None:
    """Raise a StatisticsError for metrics that EDM's .npz has no place for."""
    foreign = [metric for metric in metrics if metric not in ("fid", "kid")]
    if foreign:
        raise StatisticsError(f"found {', '.join(foreign)} for an .npz, which holds fid alone; give a --dest that ends "
                              "in .pkl")


def _dumps(content: Dict[str, Any]) -> bytes:
    """A pickle that every numpy reads: version 2 writes a module name that versions before 1.26 do not have.

    In protocol 3 names are lines of text; the first one comes before any number, and later ones refer to it.
    """
    blob = pickle.dumps(content, protocol=3)
    return blob.replace(b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\n_reconstruct\n", 1)


def _read_npz(path: Path) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Any]]:
    """Metric -> named arrays, and the provenance."""
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as file:
            names = ("mu", "sigma", "kid_features", "provenance")
            found = {key: file[key] for key in names if key in file}
            shown = ", ".join(file.files) or "nothing"
    except StatisticsError:
        raise
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        reason = " ".join(str(error).split())[:100]
        raise StatisticsError(f"found a damaged .npz or one with objects ({reason}), expected mu and sigma; "
                              "get it again") from None
    sets: Dict[str, Dict[str, Any]] = {"fid": {key: found[key] for key in ("mu", "sigma") if key in found}}
    if len(sets["fid"]) < 2:
        raise StatisticsError(f"found {shown[:100]}, expected mu and sigma; is it a reference of EDM or EDM2?")
    if "kid_features" in found:
        sets["kid"] = {"features": found["kid_features"]}
    return sets, _provenance(found.get("provenance"))


def _check_sizes(path: Path) -> None:
    """Raise a StatisticsError for arrays too large to be statistics, before one is unpacked."""
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            if info.file_size > MAX_BYTES:
                raise StatisticsError(f"found {info.filename} of {info.compress_size} bytes that unpack to "
                                      f"{info.file_size}, expected statistics; it may be made to exhaust the memory")


def _read_pkl(path: Path) -> Tuple[Dict[str, Dict[str, Any]], Dict[str, Any]]:
    try:
        content = None if path.stat().st_size == 0 else load_data(path)
    except ValueError as error:
        found = "" if file_kind(path) == "a pickle" else f"found {file_kind(path)}; "
        raise StatisticsError(found + str(error).replace(f"{path}: ", "", 1)) from None
    if isinstance(content, dict):
        sets = {metric: part for metric, part in content.items()
                if isinstance(part, dict) and isinstance(metric, str) and metric in METRICS}
        if sets or "mu" in content:
            known = {"num_images": content["num_images"]} if isinstance(content.get("num_images"), int) else {}
            return sets or {"fid": content}, {**known, **_provenance(content.get("provenance"))}
    found = f"keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
    found = "an empty file" if content is None else found
    raise StatisticsError(f"found {found[:100]}, expected a dict with 'fid': mu and sigma; get another reference")


def _checked(metric: str, content: Dict[str, Any], notes: List[str]) -> Content:
    """The arrays of one metric, in float64; adds what the user should know to `notes`."""
    if metric == "kid":
        return {"features": _features(content.get("features"))}
    missing = [key for key in ("mu", "sigma") if content.get(key) is None]
    if missing:
        keys = ", ".join(map(str, content)) or "nothing"
        raise StatisticsError(f"found {keys[:100]}, expected mu and sigma; is it a reference of EDM or EDM2?")
    mu, cov = (_real(key, content[key]) for key in ("mu", "sigma"))
    if mu.ndim != 1 or len(mu) == 0 or cov.shape != (len(mu), len(mu)):
        found = f"mu of shape {mu.shape} and sigma of shape {cov.shape}"
        raise StatisticsError(f"found {found}, expected [d] and [d, d]; make it again with: fid.py ref")
    half = [key for key in ("mu", "sigma") if np.asarray(content[key]).dtype == np.float16]
    if half:
        notes.append(f"found {' and '.join(half)} in float16, whose three digits are few for the {metric}: make the "
                     "reference again with fid.py ref where it can be")
    for key, values in (("mu", mu), ("sigma", cov)):
        if not np.isfinite(values).all():
            raise StatisticsError(f"found NaN or infinity in {key}, expected numbers; make it again with: fid.py ref")
    return {"mu": mu, "sigma": _covariance(metric, cov, notes)}


def _covariance(metric: str, cov: np.ndarray, notes: List[str]) -> np.ndarray:
    """A symmetric copy, if it can be a covariance up to rounding."""
    largest, asymmetry = np.abs(cov).max(), np.abs(cov - cov.T).max()
    if asymmetry > ASYMMETRY * largest:
        found = f"a sigma that differs from its transpose by {asymmetry:.3g}, its largest entry being {largest:.3g}"
        raise StatisticsError(f"found {found}, expected a symmetric one; make it again with: fid.py ref")
    if cov.diagonal().min() < -ASYMMETRY * largest:
        found = f"the variance {cov.diagonal().min():.3g} in sigma"
        raise StatisticsError(f"found {found}, expected none below 0; make it again with: fid.py ref")
    cov = (cov + cov.T) / 2
    share = negative_part(cov)
    if share > NEGATIVE:
        raise StatisticsError(f"found a sigma whose negative eigenvalues are {share:.2%} of its trace, expected none; "
                              "make it again with: fid.py ref")
    if share > 0:
        notes.append(f"sigma has negative eigenvalues (rounded sums or a file in low precision), which count as zero: "
                     f"the {metric} may be off by about {share * np.trace(cov):.2g}")
    return cov


def _features(value: Any) -> np.ndarray:
    features = _real("features", value)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise StatisticsError(f"found features of shape {features.shape}, or with NaN, expected finite numbers [n, d]; "
                              "make it again with: fid.py ref --metrics=kid")
    return features


def _real(key: str, value: Any) -> np.ndarray:
    # Never a list: numpy takes all the paths through lists that share their parts.
    array = np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else np.empty(0, object)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise StatisticsError(f"found {key} of type {array.dtype}, expected real numbers; get another reference")
    if array.nbytes > MAX_BYTES:
        raise StatisticsError(f"found {key} of {array.nbytes} bytes, expected at most {MAX_BYTES}; is it a reference?")
    return array.astype(np.float64)


def _provenance(text: Any) -> Dict[str, Any]:
    """The JSON beside the numbers, {} if there is none or not ours; nothing depends on it but a warning."""
    if isinstance(text, np.ndarray) and text.ndim == 0:
        text = text.item()
    try:
        data = json.loads(text) if isinstance(text, str) else {}
    except (ValueError, RecursionError):
        data = {}
    return data if isinstance(data, dict) else {}
