"""From an inert pickle to plain Python values, numpy arrays and torch tensors.

`HANDLERS` is the whole list of what a pickle may ask for. A handler gets the call's parts with their own
calls already carried out, checks them and makes the value itself: no function that the pickle names is
called.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from art_edm.pickles.machine import read_pickle_file
from art_edm.pickles.records import (
    Call,
    Global,
    Handler,
    NotData,
    Parts,
    Persistent,
    PickleError,
    check_key,
    children,
    expect,
    kind,
    plain_name,
    walk,
)
from art_edm.pickles.tensors import TENSOR_HANDLERS
from art_edm.runtime.files import PathLike

__all__ = ["HANDLERS", "is_data", "load_data", "to_data"]


def to_data(
    tree: Any, extra: Optional[Mapping[str, Handler]] = None, stored: Optional[Callable[[Any], Any]] = None
) -> Any:
    """The value of a tree of `read_pickle`; a node that occurs twice becomes one value.

    Args:
        extra: handlers besides `HANDLERS`, by `plain_name`.
        stored: the value of a reference, by its id, to what is stored outside the pickle; None refuses all.
    Raises:
        PickleError: a call that has no handler, or whose parts are not what it needs.
    """
    return _Converter({**HANDLERS, **(extra or {})}, stored, 4 * _extent(tree) + 1_000_000).value(tree)


def is_data(module: str, name: str) -> bool:
    """Whether a pickle of plain data may refer to this name."""
    text = plain_name(Global(module, name))
    return text in HANDLERS or text in _ARGUMENTS


def load_data(path: PathLike) -> Any:
    """The plain values, arrays and tensors in a pickle file; nothing in it is run.

    Raises a PickleError that begins with the path.
    """
    try:
        return to_data(read_pickle_file(path, is_data))
    except PickleError as error:
        raise PickleError(f"{path}: {error}") from None


class _Converter:
    """Carries out the calls of a tree, the innermost first, each once."""

    def __init__(self, handlers: Mapping[str, Handler], stored: Optional[Callable[[Any], Any]], budget: int) -> None:
        self.handlers, self.stored = handlers, stored
        self.budget = budget  # of what all handlers read, so that one large part is not copied by each of many calls
        self.done: Dict[int, Any] = {}  # by the id of a node, which the tree keeps alive

    def value(self, node: Any) -> Any:
        if not isinstance(node, (tuple, list, dict, Call, Global, Persistent)):
            return node
        if id(node) not in self.done:
            self.done[id(node)] = self.convert(node)
        return self.done[id(node)]

    def convert(self, node: Any) -> Any:
        if isinstance(node, Call):
            return self.call(node)
        if isinstance(node, dict):
            return {key: self.value(value) for key, value in node.items()}
        if isinstance(node, (tuple, list)):
            return type(node)([self.value(part) for part in node])
        if isinstance(node, Persistent) and self.stored is not None:
            return self.stored(node.id)
        raise PickleError(f"found {kind(node)} by itself, expected plain data; nothing was run")

    def argument(self, node: Any) -> Any:
        return node if isinstance(node, Global) else self.value(node)

    def call(self, node: Call) -> Any:
        name, args, items = plain_name(node.function), node.args, node.items
        if name in ("copyreg._reconstructor", "copyreg.__newobj__"):  # protocols 0 and 1 write a new object so
            name, args, items = _reconstructed(name, node)
        handler = self.handlers.get(name)
        if handler is None:
            raise NotData(f"found a call of {name}, which is not plain data; nothing was run")
        expect(not node.kwargs and not node.elements, name, "keywords or elements")
        expect("state" in handler.takes or node.state is None, name, "a state")
        expect("items" in handler.takes or not items, name, "items")
        values = tuple([self.argument(part) for part in args])
        pairs = tuple([(self.value(key), self.value(value)) for key, value in items])
        state = self.value(node.state)
        self.budget -= len(pairs) + sum(map(_length, (*values, *(state if isinstance(state, tuple) else ()))))
        if self.budget < 0:
            raise PickleError("found large parts that are used again and again, expected each about once; not read")
        try:
            return handler.make(Parts(name, values, state, pairs))
        except PickleError:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            expect(False, name, f"parts ({type(error).__name__})")


def _length(part: Any) -> int:
    return len(part) if isinstance(part, (str, bytes, bytearray, tuple, list, dict, set, frozenset)) else 1


def _extent(tree: Any) -> int:
    """Characters, bytes and elements in a tree, each object counted once."""
    sizes = {id(tree): _length(tree)}
    for node in walk(tree):
        sizes.update((id(child), _length(child)) for child in children(node))
    return sum(sizes.values())


def _reconstructed(name: str, node: Call) -> Tuple[str, tuple, List[Tuple[Any, Any]]]:
    """Name, arguments and items of copyreg._reconstructor(class, base, value) and copyreg.__newobj__(class, ...)."""
    cls, *rest = node.args or (None,)
    expect(isinstance(cls, Global), name, "a class")
    if name == "copyreg.__newobj__":
        return plain_name(cls), tuple(rest), node.items
    expect(len(rest) == 2 and isinstance(rest[0], Global), name, "arguments")
    if plain_name(rest[0]) == "builtins.dict" and isinstance(rest[1], dict):
        return plain_name(cls), (), [*rest[1].items(), *node.items]
    expect(plain_name(rest[0]) == "builtins.object" and rest[1] is None, name, "a base")
    return plain_name(cls), (), node.items


# ---- plain Python ----

def _encoded(parts: Parts) -> bytes:
    """Bytes as protocols 0 to 2 write them: _codecs.encode(text, 'latin1')."""
    expect(len(parts.args) == 2 and isinstance(parts.args[0], str) and parts.args[1] in ("latin1", "latin-1"),
           parts.name, "arguments")
    try:
        return parts.args[0].encode("latin-1")
    except UnicodeEncodeError:
        raise PickleError("found text that is not Latin-1 in place of bytes; get the file again") from None


def _bytes(parts: Parts) -> bytes:
    if len(parts.args) == 2:
        return _encoded(parts)
    expect(parts.args == () or (len(parts.args) == 1 and isinstance(parts.args[0], bytes)), parts.name, "arguments")
    return parts.args[0] if parts.args else b""


def _set(parts: Parts) -> set:
    ok = parts.args == () or (len(parts.args) == 1 and isinstance(parts.args[0], (list, tuple, set, frozenset)))
    expect(ok, parts.name, "arguments")
    return {check_key(member, n) for members in parts.args for n, member in enumerate(members)}


def _complex(parts: Parts) -> complex:
    expect(len(parts.args) == 2 and all(isinstance(part, float) for part in parts.args), parts.name, "arguments")
    return complex(*parts.args)


def _mapping(make: Callable[[Any], dict]) -> Callable[[Parts], dict]:
    def made(parts: Parts) -> dict:
        pairs = list(parts.items)
        if parts.args:
            first = parts.args[0]
            pairs[:0] = first.items() if isinstance(first, dict) else first if isinstance(first, (list, tuple)) else [0]
        ok = len(parts.args) <= 1 and all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs)
        expect(ok, parts.name, "arguments")
        return make((check_key(key, n), value) for n, (key, value) in enumerate(pairs))

    return made


def _ordered(parts: Parts) -> "OrderedDict[Any, Any]":
    """An OrderedDict; that of Module.state_dict() has one attribute, the versions of the layers' formats."""
    made, state = _mapping(OrderedDict)(parts), parts.state
    expect(state is None or (isinstance(state, dict) and list(state) == ["_metadata"]), parts.name, "a state")
    if state is not None:
        made._metadata = state["_metadata"]
    return made


# ---- numpy ----

_NUMBERS = set("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8 c8 c16".split())


def _dtype(parts: Parts) -> np.dtype:
    """numpy.dtype(code, align, copy), with the state (3, byte order, None, None, None, -1, -1, 0)."""
    code, state = (parts.args or (None,))[0], parts.state
    if not isinstance(code, str) or code.lstrip("<>|=") not in _NUMBERS:
        shown = repr(code)[:20] if isinstance(code, str) else kind(code)
        raise PickleError(f"found numpy data of type {shown}, expected numbers; nothing was run")
    order = "=" if state is None else state[1] if isinstance(state, tuple) and len(state) >= 5 else None
    plain = state is None or (state[2:5] == (None, None, None) and not any(state[8:])) if order else False
    expect(plain and order in ("<", ">", "|", "="), parts.name, "a state")
    return np.dtype(code).newbyteorder(order)


def _array(dtype: Any, shape: Any, fortran: Any, raw: Any, name: str) -> np.ndarray:
    ok = isinstance(dtype, np.dtype) and isinstance(raw, (bytes, bytearray)) and _are_counts(shape)
    expect(ok and len(shape) <= 32 and isinstance(fortran, bool), name, "parts")
    expect(math.prod(shape) * dtype.itemsize == len(raw), name, "a shape")
    return np.ndarray(shape, dtype, raw, order="F" if fortran else "C").copy("K")  # the copy can be written


def _are_counts(values: Any) -> bool:
    """Whether `values` are a tuple of whole numbers such as a shape may hold; torch.Size is not among them."""
    return isinstance(values, tuple) and all(type(value) is int and 0 <= value < 1 << 40 for value in values)


def _ndarray(parts: Parts) -> np.ndarray:
    """numpy.core.multiarray._reconstruct(ndarray, (0,), b'b'), state (1, shape, dtype, is Fortran, bytes)."""
    state = parts.state
    expect(parts.args[:1] == (Global("numpy", "ndarray"),), parts.name, "a class")
    expect(isinstance(state, tuple) and len(state) in (4, 5), parts.name, "a state")
    shape, dtype, fortran, raw = state[-4:]
    array = _array(dtype, shape, bool(fortran) if isinstance(fortran, int) else fortran, raw, parts.name)
    return array.astype(array.dtype.newbyteorder("="), order="K", copy=False)  # as numpy does here, not in protocol 5


def _from_buffer(parts: Parts) -> np.ndarray:
    """numpy.core.numeric._frombuffer(bytes, dtype, shape, order), of protocol 5."""
    expect(len(parts.args) == 4 and parts.args[3] in ("C", "F"), parts.name, "arguments")
    raw, dtype, shape, order = parts.args
    return _array(dtype, shape, order == "F", raw, parts.name)


def _scalar(parts: Parts) -> np.generic:
    expect(len(parts.args) == 2, parts.name, "arguments")
    return _array(parts.args[0], (), False, parts.args[1], parts.name)[()]


HANDLERS: Dict[str, Handler] = {
    "_codecs.encode": Handler(_encoded),
    "builtins.bytes": Handler(_bytes),
    "builtins.bytearray": Handler(lambda parts: bytearray(_bytes(parts))),
    "builtins.complex": Handler(_complex),
    "builtins.set": Handler(_set),
    "builtins.frozenset": Handler(lambda parts: frozenset(_set(parts))),
    "collections.OrderedDict": Handler(_ordered, "items and state"),
    "dnnlib.util.EasyDict": Handler(_mapping(dict), "items"),
    "numpy.dtype": Handler(_dtype, "state"),
    "numpy.core.multiarray._reconstruct": Handler(_ndarray, "state"),
    "numpy.core.multiarray.scalar": Handler(_scalar),
    "numpy.core.numeric._frombuffer": Handler(_from_buffer),
    **TENSOR_HANDLERS,
}

# Names that stand among the arguments of a call.
_ARGUMENTS = {
    "numpy.ndarray", "builtins.object", "builtins.dict", "copyreg._reconstructor", "copyreg.__newobj__",
}
