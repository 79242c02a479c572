"""Files of `torch.save`, read as plain data, arrays and tensors; nothing in them is run.

Such a file is a zip of NAME/data.pkl, a pickle in which each storage is a reference, and of NAME/data/KEY, the elements
of each storage. `torch.load(weights_only=True)` is not used: before torch 2.6 it ran the code of a TorchScript archive
(CVE-2025-32434), and before 2.10 a pickle could write outside its tensors (CVE-2026-24747).
"""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import Any, Dict

from art_edm.pickles.machine import read_pickle
from art_edm.pickles.records import PickleError
from art_edm.pickles.tensors import Storage, elements, is_storage_class, storage_fields
from art_edm.pickles.values import is_data, to_data
from art_edm.runtime.files import HEAD_BYTES, PathLike, file_kind

__all__ = ["load_tensors"]


def load_tensors(path: PathLike) -> Any:
    """What `torch.save` wrote to `path`, all tensors on the CPU.

    Raises:
        PickleError: not such a file, damaged, or one that asks for more than data; the message begins with the path.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        blob = file.read()
    try:
        with zipfile.ZipFile(io.BytesIO(blob)) as archive:
            return _Archive(archive, len(blob)).content()
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from None
    except zipfile.BadZipFile as error:
        found = file_kind(blob[:HEAD_BYTES])
        if "torch.save" in found or "unknown" in found:
            found = f"no whole file of torch.save ({error})"
        raise PickleError(f"{path}: found {found}, expected a file of torch.save; get it again") from None
    except (zlib.error, EOFError, LookupError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise PickleError(f"{path}: found no whole file of torch.save ({reason}); get it again") from None


class _Archive:
    """The parts of an open archive, and its storages, each read once."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self.archive, self.storages = archive, {}  # type: ignore[var-annotated]
        parts = archive.infolist()
        names = {part.filename.partition("/")[2]: part.filename for part in parts}
        if "constants.pkl" in names or any(name.startswith("code/") for name in names):
            raise PickleError("found a TorchScript program, expected weights alone; it was not run")
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(p.file_size for p in parts) > size:
            raise PickleError("found compressed or overlapping parts, expected those of torch.save; not read")
        big = "byteorder" in names and archive.read(names["byteorder"]) != b"little"
        if "data.pkl" not in names or big:
            raise PickleError("found no data.pkl of a little-endian machine, expected a file of torch.save; not read")
        self.names: Dict[str, str] = names

    def content(self) -> Any:
        tree = read_pickle(self.archive.read(self.names["data.pkl"]), _is_allowed)
        return to_data(tree, stored=self.storage)

    def storage(self, fields: Any) -> Storage:
        key, dtype, numel = storage_fields(fields)
        if key not in self.storages:
            self.storages[key] = Storage(elements(self.archive.read(self.names[f"data/{key}"]), 0, dtype, numel))
        data = self.storages[key].data
        if data.dtype != dtype or data.numel() != numel:
            raise PickleError("found a storage described in two ways; the file is damaged: get it again")
        return self.storages[key]


def _is_allowed(module: str, name: str) -> bool:
    return is_data(module, name) or is_storage_class(module, name)
