"""Torch tensors within a pickle.

Symbols
-------
storage   the flat memory that tensors are views of; a pickle holds it as bytes in torch's format of before
          the zip files: five small pickles, the number of elements, the elements
location  the device it was on, e.g. cuda:0; here everything comes to the CPU

The format is read here, with the inert reader: `torch.load` could be made to run code before torch 2.6 even
with weights_only=True (CVE-2025-32434).
"""

from __future__ import annotations

import io
import struct
import sys
from typing import Any, Dict, Tuple

import numpy as np
import torch

from art_edm.pickles.machine import read_pickle
from art_edm.pickles.records import Global, Handler, Parts, Persistent, PickleError, expect

__all__ = ["TENSOR_HANDLERS", "Storage", "elements", "is_storage_class", "read_storage", "storage_fields"]

HEAD = 1000  # most instructions of the small pickles before a storage's elements; there are some 30

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}


class Storage:
    """Flat memory, `data` [numel], that tensors are views of."""

    __slots__ = ("data",)

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data


def read_storage(raw: bytes) -> Storage:
    """The storage that torch saved as `raw`, on the CPU whatever it was on; raises a PickleError."""
    file = io.BytesIO(raw)
    if raw.startswith(b"PK"):
        raise PickleError("found a tensor stored as a zip, expected torch's older format as in any pickle; not read")
    magic, protocol, system = (read_pickle(file, _no_name, HEAD) for _ in range(3))
    little = system.get("little_endian") if isinstance(system, dict) else None
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or little is not True or sys.byteorder != "little":
        raise PickleError("found a tensor in an unknown format, expected torch's of little-endian machines; not read")
    record, keys = read_pickle(file, is_storage_class, HEAD), read_pickle(file, _no_name, HEAD)
    key, dtype, numel = storage_fields(record.id if isinstance(record, Persistent) else None)
    # The types first: a comparison of tuples that share their parts takes 2^depth steps.
    if not (isinstance(keys, list) and len(keys) == 1 and isinstance(keys[0], str) and keys[0] == key):
        raise PickleError("found a tensor's storage that holds something else; not read")
    data = elements(raw, file.tell() + 8, dtype, numel)
    if struct.unpack_from("<q", raw, file.tell())[0] != numel:
        raise PickleError("found a tensor's storage with impossible content; the file is damaged: get it again")
    return Storage(data)


def storage_fields(fields: Any) -> Tuple[str, torch.dtype, int]:
    """Key, type and number of elements in torch's ("storage", class, key, location, elements[, None])."""
    if not isinstance(fields, tuple) or len(fields) not in (5, 6) or fields[0] != "storage":
        raise PickleError("found a tensor's storage that holds something else; not read")
    _, cls, key, location, numel = fields[:5]
    ok = isinstance(cls, Global) and is_storage_class(cls.module, cls.name) and fields[5:] in ((), (None,))
    if not (ok and isinstance(key, str) and isinstance(location, str) and type(numel) is int):
        raise PickleError("found a tensor's storage of an unknown form; not read")
    return key, _DTYPES[cls.name], numel


def elements(raw: bytes, start: int, dtype: torch.dtype, numel: int) -> torch.Tensor:
    """A copy [numel] of the elements that `raw` holds from `start` to its end; a PickleError if they are others."""
    if len(raw) - start != numel * torch.empty(0, dtype=dtype).element_size():
        raise PickleError("found a tensor's storage of another length than it says; the file is damaged: get it again")
    flat = np.frombuffer(raw, np.uint8, offset=start)
    if dtype == torch.bool and (flat > 1).any():
        raise PickleError("found a tensor's storage with impossible content; the file is damaged: get it again")
    data = torch.empty(numel, dtype=dtype)  # as bytes cannot be written to
    data.view(torch.uint8).numpy()[:] = flat
    return data


def _no_name(module: str, name: str) -> bool:
    return False


def is_storage_class(module: str, name: str) -> bool:
    """Whether a pickle of tensors may name this as the type of a storage."""
    return module in ("torch", "torch.cuda") and name in _DTYPES


def _load_from_bytes(parts: Parts) -> Storage:
    expect(len(parts.args) == 1 and isinstance(parts.args[0], bytes), parts.name, "arguments")
    return read_storage(parts.args[0])


def _is_shape(values: Any) -> bool:
    ok = isinstance(values, tuple) and len(values) <= 64
    return ok and all(type(value) is int and 0 <= value < 1 << 40 for value in values)


def _is_empty(hooks: Any) -> bool:
    return hooks is None or (isinstance(hooks, dict) and not hooks)


def _tensor(parts: Parts) -> torch.Tensor:
    """torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks[, metadata])."""
    expect(len(parts.args) in (6, 7), parts.name, "arguments")
    storage, offset, size, stride, _, hooks = parts.args[:6]
    expect(isinstance(storage, Storage) and all(map(_is_empty, (hooks, *parts.args[6:]))), parts.name, "parts")
    expect(_is_shape((offset,)) and _is_shape(size) and _is_shape(stride) and len(size) == len(stride), parts.name,
           "a shape")
    count, last = 1, offset
    for length, step in zip(size, stride):
        count, last = count * length, last + (length - 1) * step
    room = storage.data.numel()
    if offset > room or (count and (last >= room or count > room)):
        raise PickleError(f"found a tensor of shape {size} in a storage of {room} elements; the file is damaged")
    return torch.as_strided(storage.data, size, stride, offset)


def _parameter(parts: Parts) -> torch.nn.Parameter:
    """torch._utils._rebuild_parameter(tensor, requires_grad, hooks); needs no gradient here."""
    expect(len(parts.args) == 3 and isinstance(parts.args[0], torch.Tensor) and _is_empty(parts.args[2]), parts.name,
           "arguments")
    return torch.nn.Parameter(parts.args[0], requires_grad=False)


TENSOR_HANDLERS: Dict[str, Handler] = {
    "torch.storage._load_from_bytes": Handler(_load_from_bytes),
    "torch._utils._rebuild_tensor_v2": Handler(_tensor),
    "torch._utils._rebuild_parameter": Handler(_parameter),
}
