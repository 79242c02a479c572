"""What every long function is given: where finished work is kept, who shares the work, and what is shown."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from typing import Any, Mapping

import numpy as np

from art_edm.runtime.distributed import ALONE, World
from art_edm.runtime.errors import CheckpointMismatch
from art_edm.runtime.store import Store, canonical

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

    def claim(self, kind: str, settings: Mapping[str, Any]) -> None:
        """Keep the JSON settings of the work of this kind that begins; other ones found in the store are named.

        Raises:
            CheckpointMismatch: they differ, and the work is to be resumed.
            OSError: the store cannot be written.
        """
        with self.world.phase():
            if self.world.rank > 0 or self.store.folder is None or not self.identity:
                return
            what = {"kind": "settings", "of": kind}
            here = json.loads(canonical({**settings, "network": self.identity}))  # as it is read: lists, no tuples
            content = self.store.load(what)
            found = here if content is None else json.loads(str(content["settings"]))
            differing = [name for name, value in here.items() if found.get(name) != value]
            if differing:
                made, new = (f"{differing[0]}={each.get(differing[0])}" for each in (found, here))
                line = f"{self.store.folder} holds a {kind} with {made}, this run has {new}"
                if self.resume:
                    raise CheckpointMismatch(f"{line}; use the same settings, another --out, or leave --resume out")
                if not self.quiet:
                    print(f"{line}; starting at the beginning", file=sys.stderr)
            self.store.save(what, {"settings": np.array(canonical(here))})
