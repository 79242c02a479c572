"""Small results of long work, kept on the way: a killed run finds them again, and none is computed twice.

Symbols
-------
piece   what one process computed of one batch: a tensor, the evaluations and the seconds that it took
key     SHA-256 of all that decides a piece, down to the bytes of the batch; so a piece is right or not found

Every process writes a file of its own and reads those of all that it can see.
"""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type

import torch

from .cells import key_of
from .denoiser import Denoiser
from .files import save_tensors

__all__ = ["Pieces"]

EVERY = 2.0  # s between two writes, but at least SHARE times what one takes
SHARE = 20.0


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
        self._pieces: Dict[str, Tuple[torch.Tensor, int, float]] = {}
        self._used: Set[str] = set()
        self._unsaved, self._written, self._took = False, time.monotonic(), 0.0
        for file in self._files() if resume else []:
            self._pieces.update(_read(file))

    def spent(self, denoiser: Denoiser) -> int:
        """Evaluations so far, those of earlier runs among them as soon as what they gave was used."""
        return denoiser.evaluations + self.recovered

    def get(self, denoiser: Denoiser, what: List[Any], work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The piece that `what`, JSON data, describes: found, or else what `work` gives; on the denoiser's device.

        Raises an OSError where it cannot be written.
        """
        key, before, began = key_of([self.identity, *what]), denoiser.evaluations, time.perf_counter()
        if key not in self._pieces:
            value = work().cpu()
            self._pieces[key] = value, denoiser.evaluations - before, time.perf_counter() - began
            self._used.add(key)
            self._unsaved = True
            idle = time.monotonic() - self._written
            if not 0 <= idle < max(EVERY, SHARE * self._took):  # below 0 where the clock jumped back
                self.save()
        value, evaluations, seconds = self._pieces[key]
        if key not in self._used:
            self._used.add(key)
            self.recovered, self.seconds = self.recovered + evaluations, self.seconds + seconds
        return value.to(denoiser.device)

    def save(self) -> None:
        """Write all pieces, if there are new ones, atomically."""
        if self.path is None or not self._unsaved:
            return
        began, path = time.monotonic(), self._file()
        try:
            save_tensors(path, {key: list(piece) for key, piece in self._pieces.items()})
        except OSError as error:
            kept = "the one before is kept" if path.exists() else "there is none yet"
            reason = error.strerror or error
            raise OSError(f"cannot write the checkpoint {path}: {reason}; {kept}; make room and use --resume") from None
        self._unsaved, self._written = False, time.monotonic()
        self._took = self._written - began

    def remove(self) -> None:
        """Delete the files, those of processes that there no longer are, too; the pieces stay in memory."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _file(self) -> Path:
        return self.path if self.rank == 0 else self.path.with_name(f"{self.path.name}-{self.rank}")

    def _files(self) -> List[Path]:
        """Of all processes, this one's last."""
        if self.path is None or not self.path.parent.is_dir():
            return []
        name, own = self.path.name, self._file()
        ranked = lambda other: other.startswith(f"{name}-") and other[len(name) + 1 :].isdecimal()
        found = sorted(file for file in self.path.parent.iterdir() if file.name == name or ranked(file.name))
        return sorted(found, key=lambda file: file == own)

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


def _read(file: Path) -> Dict[str, Tuple[torch.Tensor, int, float]]:
    """The pieces in a file; none where it is not one of ours."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return {str(key): (value, int(count), float(seconds)) for key, (value, count, seconds) in content.items()
                if isinstance(value, torch.Tensor)}
    except Exception:  # torch raises many kinds for a file that is not one of its own
        return {}
