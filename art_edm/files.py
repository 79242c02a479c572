"""Files that are either whole or absent: atomic writes, hashes, early checks of a destination."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any, BinaryIO, Callable, Union

__all__ = ["atomic_write", "cache_dir", "check_destination", "save_tensors", "sha256_of", "write_json"]

PathLike = Union[str, "os.PathLike[str]"]


def atomic_write(path: PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it into place.

    A reader sees the old file or the new one, never a part; on any error (a full disk too) the old
    file stays as it was and the temporary one is removed.
    """
    path = Path(path)
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())  # mkstemp makes files private; ours are ordinary ones
        os.replace(part, path)
    except BaseException:
        if os.path.exists(part):
            os.unlink(part)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: PathLike, data: Any) -> None:
    """Write `data` as indented JSON, atomically; NaN is refused, as JSON has none."""
    text = json.dumps(data, indent=1, allow_nan=False) + "\n"
    atomic_write(path, lambda file: file.write(text.encode()))


def save_tensors(path: PathLike, content: Any) -> None:
    """`torch.save`, atomically, and with a full disk an OSError as for any file (torch's own is another)."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    atomic_write(path, lambda file: file.write(buffer.getbuffer()))


def sha256_of(path: PathLike) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def check_destination(path: PathLike) -> Path:
    """Fail now rather than after the work: the folder must exist and take a file of this name.

    Raises:
        ValueError: what stands in the way and what to do.
    """
    path = Path(path)
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {folder}; create it or choose another --out")
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; give a file name")
    try:
        handle, probe = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=folder)
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}; choose another --out") from None
    os.close(handle)
    os.unlink(probe)
    return path


def cache_dir() -> Path:
    """Per-user cache: $ART_EDM_CACHE, else ~/.cache/art_edm. Created on first use."""
    folder = Path(os.environ.get("ART_EDM_CACHE") or Path.home() / ".cache" / "art_edm")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
