"""Files that are either whole or absent: atomic writes, hashes, early checks of a destination."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Callable, Tuple, Union

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "HEAD_BYTES", "atomic_write", "cache_dir", "check_destination", "file_kind", "save_tensors", "sha256_of",
    "write_json",
]

PathLike = Union[str, "os.PathLike[str]"]

HEAD_BYTES = 1024  # as many as `file_kind` looks at

# First bytes of a file -> what it is, in words that fit behind "found"
_MAGIC = (
    (b"\x93NUMPY", "a .npy array"),
    (b"PK\x03\x04", "a zip archive (a .zip, a .npz, or a checkpoint of torch.save)"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"BZh", "a bzip2 file"),
    (b"\xfd7zXZ\x00", "an xz file"),
    (b"(\xb5/\xfd", "a zstd file"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer, not the file it stands for; run: git lfs pull"),
    (b"%PDF-", "a PDF"),
)


def atomic_write(path: PathLike, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write` on a temporary file beside `path`, then rename it into place.

    A reader sees the old file or the new one, never a part; on any error (a full disk too) the old
    file stays as it was and the temporary one is removed. What a killed process left of it, the next one uses.
    """
    path = Path(path)
    handle, part = _open_part(path)
    lock = os.dup(handle) if fcntl else None  # keeps others away until the file has its name
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, 0o666 & ~_umask())  # mkstemp makes files private; ours are ordinary ones
        os.replace(part, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(part)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _open_part(path: Path) -> Tuple[int, str]:
    """An empty temporary file beside `path` that is this process's alone, open for writing, and its name.

    Its name is always the same, so that no number of killed processes leaves more than one; another only where
    that one is in use, someone else's, or cannot be locked.
    """
    part = path.with_name(f".{path.name}.part")
    if fcntl:
        with suppress(OSError):
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                mine, named = os.fstat(handle), os.stat(part)  # it may just have got its final name
                if mine.st_ino == named.st_ino and mine.st_nlink == 1 and mine.st_uid == os.geteuid():
                    os.ftruncate(handle, 0)
                    return handle, str(part)
            except OSError:
                os.close(handle)
                raise
            os.close(handle)
    return tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)


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


def file_kind(source: Union[PathLike, bytes]) -> str:
    """What a file is by its first bytes: "a gzip file"; "a file of unknown kind" where they say nothing.

    Args:
        source: a path, or the first `HEAD_BYTES` bytes (fewer where the file is shorter).
    Raises:
        OSError: the file cannot be read.
    """
    if isinstance(source, bytes):
        head = source
    else:
        with open(source, "rb") as file:
            head = file.read(HEAD_BYTES)
    if not head:
        return "an empty file"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if len(head) > 1 and head[0] == 0x80 and head[1] in range(2, 6):
        return "a pickle"
    if len(head) > 9 and head[8:10] == b'{"' and int.from_bytes(head[:8], "little") < 1 << 30:
        return "a .safetensors file"
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()  # a byte-order mark
    if re.match(rb"<(!doctype\s+html|html|head|body|!--)", text[:64].lower()):
        return "a web page (HTML)"
    if text[:1] in (b"{", b"["):
        return "a JSON text"
    return "a file of unknown kind"


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
