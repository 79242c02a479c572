"""Finished work kept in a folder: nothing is computed twice, and nothing is lost when a run is killed.

Symbols
-------
what     JSON data that decides a cell's numbers, and nothing else; floats are told apart to the last bit
key      SHA-256 of the canonical JSON of `what`
content  named arrays, the cell's numbers
cell     KEY.npz, whole or absent
part     KEY.part-RANK.npz, an unfinished cell as far as one process has come

A file is believed only if it says what it is and its checksum agrees; any other costs time, never a wrong number.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

from art_edm.runtime.files import PathLike, atomic_write

__all__ = ["Cells", "canonical", "key_of"]

Content = Dict[str, np.ndarray]


def canonical(what: Any) -> str:
    """JSON with sorted keys and no spaces; a NaN or what JSON does not know raises a ValueError or TypeError."""
    return json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)


def key_of(what: Any) -> str:
    """Name of the cell that `what` describes."""
    return hashlib.sha256(canonical(what).encode()).hexdigest()


class Cells:
    """The cells of one folder, which is made if it is missing.

    Raises:
        ValueError: the folder cannot be made or written.
    """

    def __init__(self, folder: PathLike) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the folder {folder}: {error.strerror}; choose another --cache") from None

    def path(self, what: Any) -> Path:
        """Where the cell is or will be."""
        return self.folder / f"{key_of(what)}.npz"

    def load(self, what: Any) -> Optional[Content]:
        """The finished cell, or None if it is absent or damaged."""
        return _read(self.path(what), canonical(what))

    def save(self, what: Any, content: Mapping[str, np.ndarray]) -> None:
        """Write the finished cell and remove its parts."""
        _write(self.path(what), canonical(what), content)
        for path in self._part_paths(what).values():
            path.unlink(missing_ok=True)

    def parts(self, what: Any) -> List[Tuple[int, Content]]:
        """(rank, content) of the readable parts, by rank."""
        read = ((rank, _read(path, canonical(what))) for rank, path in sorted(self._part_paths(what).items()))
        return [(rank, content) for rank, content in read if content is not None]

    def save_part(self, what: Any, rank: int, content: Mapping[str, np.ndarray]) -> None:
        """Write what process `rank` has of a cell that is not finished."""
        _write(self._part(what, rank), canonical(what), content)

    def _part(self, what: Any, rank: int) -> Path:
        return self.folder / f"{key_of(what)}.part-{rank}.npz"

    def _part_paths(self, what: Any) -> Dict[int, Path]:
        found = self.folder.glob(f"{key_of(what)}.part-*.npz")
        ranks = ((path.stem.rpartition("-")[2], path) for path in found)
        return {int(rank): path for rank, path in ranks if rank.isdecimal()}


def _checksum(what: str, content: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the description, and every array's name, type, shape and bytes."""
    digest = hashlib.sha256(what.encode())
    for name in sorted(content):
        array = np.ascontiguousarray(content[name])
        digest.update(f"\n{name} {array.dtype.str} {content[name].shape}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _write(path: Path, what: str, content: Mapping[str, np.ndarray]) -> None:
    arrays = {name: np.asarray(value) for name, value in content.items()}
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
