"""Unpickling as upstream does it: everything that the file asks for is run. Only for files whose maker is trusted."""

from __future__ import annotations

import importlib.util
import io
import os
import pickle
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, Optional, Tuple

import torch

from art_edm.pickles.known_sources import checkout_folder, sha256_of_source
from art_edm.pickles.records import PickleError
from art_edm.runtime.files import PathLike

__all__ = ["find_checkout", "load_trusted"]


def find_checkout() -> Optional[Path]:
    """A checkout of EDM2 or EDM, in $ART_EDM_UPSTREAM or else in third_party/."""
    folders = [os.environ.get("ART_EDM_UPSTREAM"), checkout_folder()]
    places = [Path(folder) / name for folder in folders if folder for name in ("edm2", "edm")]
    return next((place for place in places if (place / "torch_utils" / "persistence.py").is_file()), None)


def load_trusted(path: PathLike) -> Tuple[Any, Dict[str, str]]:
    """The unpickled content, all tensors on the CPU, and the SHA-256 of each source that was run, with a class of it.

    Raises a PickleError if upstream's modules are not found or the file cannot be unpickled.
    """
    sources: Dict[str, str] = {}
    with _upstream_importable():
        try:
            with open(path, "rb") as file:
                return _Unpickler(file, sources).load(), sources
        except Exception as error:  # whatever the code in the pickle raises
            reason = " ".join(str(error).split())[:200]
            raise PickleError(f"could not be unpickled ({type(error).__name__}: {reason}); {_remedy(error)}") from None


def _remedy(error: Exception) -> str:
    missing = (getattr(error, "name", None) or "").partition(".")[0] if isinstance(error, ImportError) else ""
    if missing in ("torch_utils", "dnnlib"):
        return "upstream's modules are needed; get them with: python tools/patch_upstream.py"
    if missing or isinstance(error, AttributeError):
        return "put the folder of the modules that define its classes on PYTHONPATH"
    if "process group" in str(error):
        return "its network is wrapped for training in several processes; save ema.module instead"
    return "check that it is whole and that what it needs is installed"


class _Unpickler(pickle.Unpickler):
    """Brings storages to the CPU and takes down which sources are run; otherwise Python's own."""

    def __init__(self, file: Any, sources: Dict[str, str]) -> None:
        super().__init__(file)
        self.sources = sources

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return lambda raw: torch.load(io.BytesIO(raw), map_location="cpu", weights_only=False)
        found = super().find_class(module, name)
        if (module, name) == ("torch_utils.persistence", "_reconstruct_persistent_obj"):
            return self.noting(found)
        return found

    def noting(self, reconstruct: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def noted(meta: Any) -> Any:
            self.sources[sha256_of_source(meta["module_src"])] = meta["class_name"]  # the outermost comes last
            return reconstruct(meta)

        return noted


@contextmanager
def _upstream_importable() -> Iterator[None]:
    """torch_utils and dnnlib from where they are importable already, else from a checkout if there is one."""
    checkout = find_checkout()
    known = all(importlib.util.find_spec(name) is not None for name in ("torch_utils", "dnnlib"))
    if known or checkout is None:
        yield
        return
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
