"""Reference statistics: the moments of a data set's features, in the files of EDM and EDM2.

    .npz    EDM: arrays mu [d] and sigma [d, d]
    .pkl    EDM2: {"num_images": n, "fid": {"mu": [d], "sigma": [d, d]}, ...}; only "fid" is used

Both carry here, beside what upstream reads, `provenance`: JSON text that says how they were made. A .pkl is
read as plain data; nothing in it is run.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np

from art_edm.pickles.values import load_data
from art_edm.runtime.download import download, is_url
from art_edm.runtime.files import PathLike, atomic_write, check_destination, sha256_of

__all__ = [
    "Reference", "StatisticsError", "check_reference_destination", "few_images", "load_reference", "save_reference",
]

METRIC = "fid"
FEW = 2048  # images, below which the covariance of Inception's features is singular
ASYMMETRY = 1e-6  # relative to the largest entry; rounding in float32 stays below


class StatisticsError(ValueError):
    """A file that holds no usable reference statistics; one line that names it."""


class Reference(NamedTuple):
    """Moments of a data set's features and what is known of them."""

    mu: np.ndarray  # [d] float64
    cov: np.ndarray  # [d, d] float64
    source: str  # path or address
    sha256: str  # of the file
    provenance: Dict[str, Any]  # {} in files of upstream

    @property
    def dim(self) -> int:
        """Number of features d."""
        return len(self.mu)

    def notes_for(self, name: str, sha256: str, dim: int) -> List[str]:
        """What the user should know who compares this with the features of another detector file.

        Raises a StatisticsError if the detector `name` has not as many features.
        """
        if self.dim != dim:
            raise StatisticsError(f"{self.source} has {self.dim} features, {name} gives {dim}; expected the same "
                                  "detector: change --ref or --detector")
        made = self.provenance.get("detector_sha256", sha256)
        if made == sha256:
            return []
        other = self.provenance.get("detector", "?")
        return [f"{self.source} was made with the detector {other} (SHA-256 {made}), not with {name} ({sha256}); if "
                "they are two networks, the FID means nothing"]


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
        content = _read_npz(path) if zipped else _read_pkl(path)
        mu, cov = _checked(content)
    except OSError as error:
        raise StatisticsError(f"cannot read {spec}: {error.strerror or error}; correct --ref") from None
    except StatisticsError as error:
        raise StatisticsError(f"{spec}: {error}") from None
    return Reference(mu, cov, spec, sha256_of(path), _provenance(content.get("provenance")))


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


def save_reference(path: PathLike, mu: np.ndarray, cov: np.ndarray, count: int, provenance: Dict[str, Any]) -> None:
    """Write moments as the file's ending says, atomically; upstream's scripts read both kinds."""
    text = json.dumps({"num_images": count, **provenance}, allow_nan=False)
    if Path(path).suffix.lower() == ".npz":
        atomic_write(path, lambda file: np.savez(file, mu=mu, sigma=cov, provenance=np.array(text)))
    else:
        blob = _dumps({"num_images": count, METRIC: {"mu": mu, "sigma": cov}, "provenance": text})
        atomic_write(path, lambda file: file.write(blob))


def _dumps(content: Dict[str, Any]) -> bytes:
    """A pickle that every numpy reads: version 2 writes a module name that versions before 1.26 do not have.

    In protocol 3 names are lines of text; the first one comes before any number, and later ones refer to it.
    """
    blob = pickle.dumps(content, protocol=3)
    return blob.replace(b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\n_reconstruct\n", 1)


def _read_npz(path: Path) -> Dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as content:
            found = {key: content[key] for key in ("mu", "sigma", "provenance") if key in content}
            return {**dict.fromkeys(content), **found}
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        reason = " ".join(str(error).split())[:100]
        raise StatisticsError(f"found a damaged .npz or one with objects ({reason}), expected mu and sigma; "
                              "get it again") from None


def _read_pkl(path: Path) -> Dict[str, Any]:
    blob_is_empty = path.stat().st_size == 0
    try:
        content = None if blob_is_empty else load_data(path)
    except ValueError as error:
        raise StatisticsError(str(error).replace(f"{path}: ", "", 1)) from None
    if isinstance(content, dict) and isinstance(content.get(METRIC), dict):
        return {**content[METRIC], **{key: content[key] for key in ("provenance",) if key in content}}
    if isinstance(content, dict) and "mu" in content:
        return content
    found = f"keys {', '.join(map(str, content))}" if isinstance(content, dict) else type(content).__name__
    found = "an empty file" if blob_is_empty else found
    raise StatisticsError(f"found {found[:100]}, expected a dict with {METRIC!r}: mu and sigma; get another reference")


def _checked(content: Dict[str, Any]) -> Tuple[np.ndarray, np.ndarray]:
    missing = [key for key in ("mu", "sigma") if content.get(key) is None]
    if missing:
        keys = ", ".join(map(str, content)) or "nothing"
        raise StatisticsError(f"found {keys[:100]}, expected mu and sigma; is it a reference of EDM or EDM2?")
    mu, cov = (_real(key, content[key]) for key in ("mu", "sigma"))
    if mu.ndim != 1 or len(mu) == 0 or cov.shape != (len(mu), len(mu)):
        found = f"mu of shape {mu.shape} and sigma of shape {cov.shape}"
        raise StatisticsError(f"found {found}, expected [d] and [d, d]; make it again with: fid.py ref")
    for key, values in (("mu", mu), ("sigma", cov)):
        if not np.isfinite(values).all():
            raise StatisticsError(f"found NaN or infinity in {key}, expected numbers; make it again with: fid.py ref")
    largest, asymmetry = np.abs(cov).max(), np.abs(cov - cov.T).max()
    if asymmetry > ASYMMETRY * largest:
        found = f"a sigma that differs from its transpose by {asymmetry:.3g}, its largest entry being {largest:.3g}"
        raise StatisticsError(f"found {found}, expected a symmetric one; make it again with: fid.py ref")
    if cov.diagonal().min() < -ASYMMETRY * largest:
        found = f"the variance {cov.diagonal().min():.3g} in sigma"
        raise StatisticsError(f"found {found}, expected none below 0; make it again with: fid.py ref")
    return mu, (cov + cov.T) / 2


def _real(key: str, value: Any) -> np.ndarray:
    # Never a list: numpy takes all the paths through lists that share their parts.
    array = np.asarray(value) if isinstance(value, (np.ndarray, np.generic)) else np.empty(0, object)
    if not (np.issubdtype(array.dtype, np.floating) or np.issubdtype(array.dtype, np.integer)):
        raise StatisticsError(f"found {key} of type {array.dtype}, expected real numbers; get another reference")
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
