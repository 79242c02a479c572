"""Small results of long work, kept on the way: a killed run finds them again, and none is computed twice.

Symbols
-------
piece     what one process computed of one batch: a tensor, the evaluations and the seconds that it took
key       SHA-256 of all that decides a piece, down to the bytes of the batch
checksum  SHA-256 of the key and what belongs to it; a piece is right or not found

Every process writes a file of its own and reads those of all that it can see.
"""

from __future__ import annotations

import hashlib
import re
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Set, Type

import torch

from art_edm import __version__
from art_edm.models.denoiser import Denoiser
from art_edm.runtime.files import save_tensors
from art_edm.runtime.store import key_of

__all__ = ["Pieces"]

EVERY = 2.0  # s between two writes, but at least SHARE times what one takes
SHARE = 5.0
RANK = "(-[0-9]{1,5})?"  # what it adds to a file's name


class Piece(NamedTuple):
    """One of them."""

    value: torch.Tensor
    evaluations: int
    seconds: float

    def checksum(self, key: str) -> str:
        """Of all of it; told apart by type and shape, too."""
        value = self.value
        told = f"{key} {value.dtype} {tuple(value.shape)} {self.evaluations} {self.seconds!r}\n"
        return hashlib.sha256(told.encode() + value.contiguous().numpy().tobytes()).hexdigest()


class Pieces:
    """The pieces of one command; as a context, it writes what is left when the work ends with an error.

    Args:
        path: file for them; process r > 0 adds -r to the name. None keeps them in memory alone.
        identity: what the denoiser is (name and hash).
        resume: begin with what earlier runs left there.
        rank: of this process.
    """

    def __init__(self, path: Optional[Path] = None, identity: str = "", resume: bool = False, rank: int = 0) -> None:
        self.path, self.identity, self.rank = path, identity, rank
        self.recovered, self.seconds = 0, 0.0  # evaluations and seconds that earlier runs spent on what was used
        self._pieces: Dict[str, Piece] = {}
        self._used: Set[str] = set()
        self._own: Set[str] = set()  # what this process's file holds or is to hold
        self._unsaved, self._written, self._took = False, time.monotonic(), 0.0
        for file in self._files() if resume else ():
            found = _read(file)
            self._pieces.update(found)
            self._own.update(found if file == self._file() else ())

    def spent(self, denoiser: Denoiser) -> int:
        """Evaluations so far, those of earlier runs among them as soon as what they gave was used."""
        return denoiser.evaluations + self.recovered

    def get(self, denoiser: Denoiser, what: List[Any], work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The piece that `what`, JSON data, describes: found, or else what `work` gives; on the denoiser's device.

        Raises an OSError where it cannot be written.
        """
        before, began = denoiser.evaluations, time.perf_counter()
        key = key_of([__version__, self.identity, denoiser.device.type, *what])
        if key not in self._pieces:
            value = work().cpu()
            self._pieces[key] = Piece(value, denoiser.evaluations - before, time.perf_counter() - began)
            self._used.add(key)
            self._own.add(key)
            self._unsaved = True
            idle = time.monotonic() - self._written
            if not 0 <= idle < max(EVERY, SHARE * self._took):  # below 0 where the clock jumped back
                self.save()
        piece = self._pieces[key]
        if key not in self._used:
            self._used.add(key)
            self.recovered, self.seconds = self.recovered + piece.evaluations, self.seconds + piece.seconds
        return piece.value.to(denoiser.device)

    def done(self) -> float:
        """A stage is: write what is new; the seconds that earlier runs spent on what was used since the last stage."""
        self.save()
        recovered, self.seconds = self.seconds, 0.0
        return recovered

    def save(self) -> None:
        """Write this process's pieces, if there are new ones, atomically."""
        if self.path is None or not self._unsaved:
            return
        began, path = time.monotonic(), self._file()
        try:
            own = {key: self._pieces[key] for key in sorted(self._own)}
            save_tensors(path, {key: [*piece, piece.checksum(key)] for key, piece in own.items()})
        except OSError as error:
            kept = "the one before is kept" if path.exists() else "there is none yet"
            reason = error.strerror or error
            raise OSError(f"cannot write the checkpoint {path}: {reason}; {kept}; make room and use --resume") from None
        self._unsaved, self._written = False, time.monotonic()
        self._took = self._written - began

    def remove(self) -> None:
        """Delete the files, those of processes that there no longer are, too, and what killed writers left of them."""
        for file in (*self._files(), *self._files(r"\.{}\.part")):
            file.unlink(missing_ok=True)

    def _file(self) -> Path:
        return self.path if self.rank == 0 else self.path.with_name(f"{self.path.name}-{self.rank}")

    def _files(self, pattern: str = "{}") -> List[Path]:
        """Those of all processes that are there; with a pattern those of names made from theirs."""
        if self.path is None or not self.path.parent.is_dir():
            return []
        name = re.compile(pattern.format(re.escape(self.path.name) + RANK))
        return [file for file in sorted(self.path.parent.iterdir()) if name.fullmatch(file.name) and file.is_file()]

    def __enter__(self) -> "Pieces":
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        if kind is not None:
            try:
                self.save()
            except OSError:  # the error under way says more
                pass


def _read(file: Path) -> Dict[str, Piece]:
    """The sound pieces in a file; none where it is not one of ours."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        read = {key: (Piece(*fields), checksum) for key, (*fields, checksum) in content.items()}
        return {key: piece for key, (piece, checksum) in read.items() if piece.checksum(key) == checksum}
    except Exception:  # torch raises many kinds for a file that is not one of its own
        return {}
