"""A stage of a refinement: each piece of its work is found in the store or done now, and counts once.

Symbols
-------
entry  rows of numbers for one batch of noises, and the evaluations and the seconds that they took
key    SHA-256 of all that decides the rows, down to the bytes of the batch (see `store`)

A refinement is a function of such rows alone, and deterministic: run again after a stop, it goes the same way through
what it finds, and on from there. So no other state is kept.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Callable, Dict, Optional, Set, Type

import torch

from art_edm.models.denoiser import Denoiser
from art_edm.runtime.context import Context
from art_edm.runtime.errors import Stopped
from art_edm.runtime.progress import GracefulStop, Progress
from art_edm.runtime.store import Store, code_version, key_of

__all__ = ["Stage"]


class Stage:
    """A context in which Ctrl-C and SIGTERM end the work at the next `tell`.

    Args:
        context: its store keeps the entries; one in a folder is used only where the denoiser has an identity.
        label: of the progress, with the unit of `total`, such as "refining, images".
        total: evaluations of all processes, as far as can be known before.
    """

    def __init__(self, denoiser: Denoiser, context: Context, label: str = "", total: int = 0) -> None:
        self.denoiser, self.context, self.label = denoiser, context, label.partition(",")[0]
        self.evaluations, self.seconds = 0, 0.0  # of this process's entries, found or made
        self._store = context.store if context.identity else Store()
        self._counted: Set[str] = set()
        self._share, self._began = total // context.world.size, denoiser.evaluations
        self._progress, self._stop = Progress(self._share, label, context.quiet or not total), GracefulStop()

    def find(self, what: Dict[str, Any]) -> Optional[torch.Tensor]:
        """The rows that `what`, JSON data, describes; None where the store does not have them."""
        content = self._store.load(self._whole(what))
        return None if content is None else self._count(what, content, found=True)

    def make(self, what: Dict[str, Any], work: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The rows that `work` gives, which become the entry; raises an OSError where it cannot be written."""
        self._began, began = self.denoiser.evaluations, time.perf_counter()
        rows = work().cpu().numpy()
        seconds, evaluations = max(time.perf_counter() - began, 0.0), self.denoiser.evaluations - self._began
        content = {"rows": rows, "evaluations": evaluations, "seconds": seconds}
        self._store.save(self._whole(what), content)
        return self._count(what, content, found=False)

    def tell(self) -> None:
        """Called between pieces of work: shows progress, and raises where another process failed or a stop is due."""
        self.context.world.check()
        self._progress.update(min(self.evaluations + self.denoiser.evaluations - self._began, self._share))
        if self._stop.requested:
            folder = self._store.folder
            kept = f"; what was finished is in {folder}, run the same command again to continue" if folder else ""
            raise Stopped(f"stopped during {self.label}{kept}")

    def _whole(self, what: Dict[str, Any]) -> Dict[str, Any]:
        device = self.denoiser.device.type
        return {"version": code_version(), "denoiser": self.context.identity, "device": device, **what}

    def _count(self, what: Dict[str, Any], content: Dict[str, Any], found: bool) -> torch.Tensor:
        key = key_of(what)
        if key not in self._counted:
            self._counted.add(key)
            self.evaluations += int(content["evaluations"])
            self.seconds += float(content["seconds"])
            self._progress.start += int(content["evaluations"]) if found else 0  # it tells nothing of the rate
        self._began = self.denoiser.evaluations
        self.tell()
        return torch.from_numpy(content["rows"])

    def __enter__(self) -> "Stage":
        self._stop.__enter__()
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self._stop.__exit__(kind, value, trace)
        self._progress.close()
