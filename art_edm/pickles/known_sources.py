"""The known versions of upstream's modules, and running one of them without a checkout.

third_party/upstream.json lists, for each repository, file and SHA-256, the commit that brought this version.
A listed source is run in a module of its own, which is not importable by name. What it imports from upstream's
own packages is served from here; numpy, torch and the like are the installed ones.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, NamedTuple, Optional

import numpy as np
import torch

from art_edm.runtime.files import PathLike, cache_dir

__all__ = ["Listed", "checkout_folder", "listed_sources", "lock_file", "run_source", "sha256_of_source"]


class Listed(NamedTuple):
    """A known version of one of upstream's modules."""

    file: str  # with its repository, e.g. edm/training/networks.py
    sha256: str
    commit: str


def lock_file() -> Path:
    """third_party/upstream.json, within an installed package or beside the package in a checkout of it."""
    package = Path(__file__).resolve().parents[1]
    found = [folder / "third_party" / "upstream.json" for folder in (package, package.parent)]
    return next((path for path in found if path.is_file()), found[-1])


def checkout_folder() -> Path:
    """Where upstream's checkouts are looked for: beside the list of a checkout, else third_party/ in this folder."""
    folder = lock_file().parent
    return Path("third_party") if folder.parent == Path(__file__).resolve().parents[1] else folder


def listed_sources(lock: Optional[PathLike] = None) -> Dict[str, Listed]:
    """The known sources by SHA-256, from `lock` or `lock_file()`; raises a ValueError if it cannot be read."""
    path = lock_file() if lock is None else Path(lock)
    try:
        repositories = json.loads(path.read_bytes())
        return {
            sha256.lower(): Listed(f"{name}/{file}", sha256.lower(), commit)
            for name, repository in repositories.items()
            for file, versions in repository.get("sources", {}).items() for sha256, commit in versions.items()
        }
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise ValueError(f"{path}: found no list of known sources ({reason}); restore it from art_edm") from None


def sha256_of_source(text: str) -> str:
    """SHA-256 of a source as its file has it, in UTF-8."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


_RUN: Dict[str, ModuleType] = {}  # by SHA-256: the same class for every layer and every network


def run_source(listed: Listed, text: str) -> ModuleType:
    """The module that `text` makes; refuses, by assertion, a text that is not the listed version."""
    assert sha256_of_source(text) == listed.sha256, "only a listed source may be run"
    if listed.sha256 not in _RUN:
        module = ModuleType(f"{Path(listed.file).stem}_{listed.sha256[:8]}")
        module.__dict__["__builtins__"] = {**vars(builtins), "__import__": _import}
        exec(compile(text, f"<{listed.file} {listed.sha256[:8]}>", "exec"), module.__dict__)
        _RUN[listed.sha256] = module
    return _RUN[listed.sha256]


# ---- what upstream's modules import from its own packages ----

_CONSTANTS: Dict[Any, torch.Tensor] = {}  # filters and the like, a handful per network


def _persistent_class(cls: type) -> type:
    """Upstream's decorator makes instances carry their source when pickled; here they are only loaded."""
    return cls


def _const_like(like: torch.Tensor, value: Any) -> torch.Tensor:
    """`value` (numpy) as a tensor of the type and on the device of `like`; kept, as a copy to a GPU waits for it."""
    value = np.asarray(value)
    key = (value.tobytes(), value.shape, value.dtype.str, like.dtype, like.device)
    if key not in _CONSTANTS:
        _CONSTANTS[key] = torch.as_tensor(value.copy(), dtype=like.dtype, device=like.device)
    return _CONSTANTS[key]


def _make_cache_dir_path(*parts: str) -> str:
    return str(cache_dir().joinpath(*parts))


def _module(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


_persistence = _module("torch_utils.persistence", persistent_class=_persistent_class)
_misc = _module("torch_utils.misc", const_like=_const_like)
_STAND_INS = {
    "torch_utils": _module("torch_utils", persistence=_persistence, misc=_misc),
    "torch_utils.persistence": _persistence,
    "torch_utils.misc": _misc,
    "dnnlib": _module("dnnlib", make_cache_dir_path=_make_cache_dir_path),
}


def _import(name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """`__import__` of the sources that are run."""
    root = name.partition(".")[0]
    if level == 0 and root in _STAND_INS:
        if name not in _STAND_INS:
            raise ImportError(f"art_edm has no {name}")
        return _STAND_INS[name if fromlist else root]
    return builtins.__import__(name, globals, locals, fromlist, level)
