"""Finished work kept in a folder: nothing is computed twice, and nothing is lost when a run is killed.

Symbols
-------
what     JSON data that decides an entry's numbers, and nothing else; floats are distinguished to the last bit
key      SHA-256 of the canonical JSON of `what`
content  named arrays, the entry's numbers
entry    KEY.npz, whole or absent
part     KEY.part-RANK.npz, an unfinished entry as far as one process has come

A file is believed only if it says what it is and its checksum agrees; any other costs time, never a wrong number.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from art_edm.runtime.files import PathLike, atomic_write

__all__ = ["Content", "Store", "canonical", "code_version", "key_of"]

Content = Dict[str, np.ndarray]

_PACKAGE = Path(__file__).resolve().parents[1]
_OWN = re.compile(r"[0-9a-f]{64}(\.part-[0-9]+)?\.npz|\.[0-9a-f]{64}(\.part-[0-9]+)?\.npz(\.\w+)?\.part")


def canonical(what: Any) -> str:
    """JSON with sorted keys and no spaces; a NaN or what JSON does not know raises a ValueError or TypeError."""
    return json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(what: Any) -> str:
    """Name of the entry that `what` describes."""
    return hashlib.sha256(canonical(what).encode()).hexdigest()


@functools.lru_cache(maxsize=None)
def code_version() -> str:
    """Of torch and of this package's files: what a killed run has left is not continued by other code."""
    import torch

    digest = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return f"torch {torch.__version__}, art_edm {digest.hexdigest()[:16]}"


class Store:
    """The entries of one folder, which is made if it is missing; those of `Store(None)` are in memory.

    Several processes and several runs may use one folder at once. Writing raises an OSError that says what to do.

    Raises:
        ValueError: the folder cannot be made.
    """

    def __init__(self, folder: Optional[PathLike] = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._memory: Dict[Tuple[str, Optional[int]], Content] = {}  # (key, rank of a part) -> content, of no folder
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            hint = "remove that file, or choose" if isinstance(error, FileExistsError) else "choose"
            raise ValueError(f"cannot make the folder {folder} for unfinished work: {error.strerror}; {hint} another "
                             "--out or --cache") from None

    def path(self, what: Any) -> Path:
        """Where the entry is or will be; only of a store in a folder."""
        return self._file(key_of(what))

    def load(self, what: Any) -> Optional[Content]:
        """The finished entry, or None if it is absent or damaged."""
        return self._read(what)

    def save(self, what: Any, content: Mapping[str, np.ndarray]) -> None:
        """Write the finished entry and remove its parts."""
        self._write(what, content)
        for rank in self._ranks(what):
            self._memory.pop((key_of(what), rank), None)
            if self.folder is not None:
                self._file(key_of(what), rank).unlink(missing_ok=True)

    def memo(self, what: Any, work: Callable[[], Mapping[str, np.ndarray]]) -> Content:
        """The finished entry; where there is none, what `work` gives, which becomes it."""
        content = self.load(what)
        if content is None:
            content = {name: np.asarray(value) for name, value in work().items()}
            self.save(what, content)
        return content

    def parts(self, what: Any) -> List[Tuple[int, Content]]:
        """(rank, content) of the readable parts, by rank."""
        read = ((rank, self._read(what, rank)) for rank in self._ranks(what))
        return [(rank, content) for rank, content in read if content is not None]

    def save_part(self, what: Any, rank: int, content: Mapping[str, np.ndarray]) -> None:
        """Write what process `rank` has of an entry that is not finished."""
        self._write(what, content, rank)

    def remove(self) -> None:
        """Delete all entries, parts and what killed writers left of them, and the folder if nothing else is in it."""
        self._memory.clear()
        if self.folder is not None:
            with suppress(OSError):  # another run has removed it
                for name in os.listdir(self.folder):
                    if _OWN.fullmatch(name):
                        (self.folder / name).unlink(missing_ok=True)
            with suppress(OSError):  # something else is in it
                self.folder.rmdir()

    def _file(self, key: str, rank: Optional[int] = None) -> Path:
        if self.folder is None:
            raise ValueError("found a store in memory, expected one in a folder; give it one")
        return self.folder / (f"{key}.npz" if rank is None else f"{key}.part-{rank}.npz")

    def _ranks(self, what: Any) -> List[int]:
        """Of the parts that there are."""
        key = key_of(what)
        if self.folder is None:
            return sorted(rank for name, rank in self._memory if name == key and rank is not None)
        found = (path.stem.rpartition("-")[2] for path in self.folder.glob(f"{key}.part-*.npz"))
        return sorted(int(rank) for rank in found if rank.isdecimal())

    def _read(self, what: Any, rank: Optional[int] = None) -> Optional[Content]:
        key = key_of(what)
        if self.folder is None:
            found = self._memory.get((key, rank))
            return None if found is None else {name: array.copy() for name, array in found.items()}
        return _read(self._file(key, rank), canonical(what))

    def _write(self, what: Any, content: Mapping[str, np.ndarray], rank: Optional[int] = None) -> None:
        key, arrays = key_of(what), {name: np.array(value) for name, value in content.items()}
        if self.folder is None:
            self._memory[key, rank] = arrays
            return
        try:
            try:
                _write(self._file(key, rank), canonical(what), arrays)
            except FileNotFoundError:  # another run of this folder has ended and removed it
                self.folder.mkdir(parents=True, exist_ok=True)
                _write(self._file(key, rank), canonical(what), arrays)
        except OSError as error:
            reason, remedy = error.strerror or error, "remove the cause and run the same command again"
            raise OSError(f"cannot write to {self.folder}: {reason}; what was finished is kept: {remedy}") from None


def _checksum(what: str, content: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the description, and every array's name, type, shape and bytes."""
    digest = hashlib.sha256(what.encode())
    for name in sorted(content):
        array = np.ascontiguousarray(content[name])
        digest.update(f"\n{name} {array.dtype.str} {content[name].shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _write(path: Path, what: str, arrays: Content) -> None:
    labels = {"what": np.array(what), "checksum": np.array(_checksum(what, arrays))}
    buffer = io.BytesIO()
    np.savez(buffer, **labels, **arrays)
    atomic_write(path, lambda file: file.write(buffer.getbuffer()))


def _read(path: Path, what: str) -> Optional[Content]:
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        labels = [str(content.pop(name)[()]) for name in ("what", "checksum")]
    except (OSError, ValueError, KeyError, EOFError, TypeError, IndexError, AttributeError, MemoryError, SyntaxError,
            NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error):
        return None
    return content if labels == [what, _checksum(what, content)] else None
