"""What every long function is given: where finished work is kept, who shares the work, and what is shown."""

from __future__ import annotations

from dataclasses import dataclass, field

from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.store import Store

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """How work is done; it changes no result beyond rounding."""

    world: World = ALONE  # processes that share the work; all get the same arguments and the same result
    store: Store = field(default_factory=Store)  # finished work, kept and found again; by default in memory
    quiet: bool = True  # show no progress
    identity: str = ""  # of the denoiser, its name and its file's hash: part of the keys in the store
    batch: int = 16  # images per evaluation
    resume: bool = False  # stored work of other settings is an error, else it is named and the work begins anew
