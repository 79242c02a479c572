"""Reading a pickle as data: what it says is written down, and nothing that it asks for is done.

A pickle is a program for a stack machine. This is such a machine without the instructions that reach
outside it: it has no way to import, to call or to set an attribute. Its result is a tree of plain values
and of records of what was asked for, see `pickle_tree`. The standard library's `pickletools` says what
the opcodes are and decodes their arguments.
"""

from __future__ import annotations

import io
import pickletools
from typing import Any, BinaryIO, Callable, Dict, List, Optional, Union

from art_edm.pickles.records import Call, Global, NotData, Persistent, PickleError, check_depth, check_key, kind
from art_edm.runtime.files import HEAD_BYTES, PathLike, file_kind

__all__ = ["MAX_OPCODES", "Call", "Global", "Persistent", "PickleError", "read_pickle", "read_pickle_file"]

MAX_OPCODES = 5_000_000  # a network has some 100,000; each may take some 200 bytes of memory
MAX_NUMBER = 1000  # characters of a number written as text: Python takes quadratic time over a long one
MAX_NAME = 100  # characters of a module's or a function's name
_NOTHING = object()

Allowed = Callable[[str, str], bool]


def read_pickle(
    source: Union[bytes, BinaryIO], allowed: Optional[Allowed] = None, limit: Optional[int] = None
) -> Any:
    """The tree of one pickle of any protocol; a file is left just behind it, so that another can follow.

    Args:
        source: the bytes, or a binary file that can seek.
        allowed: allowed(module, name) says which names may occur; None allows all, as none is looked up.
        limit: most instructions; default MAX_OPCODES.
    Raises:
        PickleError: damaged, truncated, too large or too deep, or a name that is not allowed.
    """
    file = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else source
    start = file.tell()
    end = file.seek(0, io.SEEK_END)
    file.seek(start)
    tree = _Machine(_Source(file, end - start), allowed).run(limit or MAX_OPCODES)
    check_depth(tree)
    return tree


def read_pickle_file(path: PathLike, allowed: Optional[Allowed] = None) -> Any:
    """As `read_pickle`, of a file; the PickleError names what other kind of file it is, where that shows."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES)
            found = file_kind(head if head.strip() else b"")
            if "torch.save" in found:
                raise PickleError("found a zip as torch.save writes it, a training state and not a network snapshot; "
                                  "give network-snapshot-*.pkl")
            if found not in ("a pickle", "a file of unknown kind"):  # protocols 0 and 1 have no mark of their own
                raise PickleError(f"found {found}, expected a pickle; get it again")
            file.seek(0)
            return read_pickle(file, allowed)
    except OSError as error:
        raise PickleError(f"found no readable file ({error.strerror}), expected a pickle; check the name") from None


class _Source:
    """The file as `pickletools` reads it; a length beyond the file's end is refused before memory is taken."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.size = file, size, size
        self.longest_line = -1

    def read(self, size: int) -> bytes:
        if size > self.left:
            raise PickleError(f"found the end of the file after {self.size} bytes, expected more; it is truncated or "
                              "no pickle: get it again")
        data = self.file.read(size)
        self.left -= len(data)
        return data

    def readline(self) -> bytes:
        line = self.file.readline(self.longest_line)
        self.left -= len(line)
        return line


class _Machine:
    """The stack machine; one method or entry of `_ACTIONS` for every opcode that it knows."""

    def __init__(self, source: _Source, allowed: Optional[Allowed]) -> None:
        self.source, self.allowed = source, allowed
        self.stack: List[Any] = []
        self.marked: List[List[Any]] = []  # the stacks below each mark
        self.memo: List[Any] = []  # a list, as numbers as keys could be chosen to collide
        self.memoized = 0

    def run(self, limit: int) -> Any:
        for _ in range(limit):
            at = self.source.size - self.source.left
            opcode = _OPCODES.get(self.source.read(1))
            action = None if opcode is None else _ACTIONS.get(opcode.name)
            if action is None:
                found = "a byte that begins no instruction" if opcode is None else f"the instruction {opcode.name}"
                raise PickleError(f"found {found} at byte {at}, expected a pickle of plain data and networks; check "
                                  "that it is the right file, and whole")
            try:
                action(self, self.argument(opcode))
                if opcode.name == "STOP":
                    return self.pop()
            except PickleError:
                raise
            except (IndexError, KeyError, ValueError, TypeError, OverflowError) as error:
                reason = " ".join(str(error).split())[:80]
                raise PickleError(f"found a damaged instruction {opcode.name} at byte {at} ({reason}), expected a "
                                  "whole pickle; get it again") from None
        raise PickleError(f"found more than {limit} instructions, expected a network's; it is not read")

    def argument(self, opcode: pickletools.OpcodeInfo) -> Any:
        if opcode.arg is None:
            return None
        self.source.longest_line = MAX_NUMBER if opcode.name in ("INT", "LONG", "FLOAT", "GET", "PUT") else -1
        return opcode.arg.reader(self.source)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("the stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("the stack is empty")
        return self.stack[-1]

    def pop_mark(self) -> List[Any]:
        above, self.stack = self.stack, self.marked.pop()
        return above

    def mark(self, _: None) -> None:
        self.marked.append(self.stack)
        self.stack = []

    def pop_any(self, _: None) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def last(self, count: int) -> tuple:
        if len(self.stack) < count:
            raise ValueError("the stack is too short")
        values = tuple(self.stack[len(self.stack) - count:])
        del self.stack[len(self.stack) - count:]
        return values

    def memoize(self, index: Optional[int]) -> None:
        index = self.memoized if index is None else index
        if not 0 <= index <= 2 * len(self.memo) + 1000:
            raise ValueError("an index far beyond the others")
        self.memo += [_NOTHING] * (index + 1 - len(self.memo))
        self.memoized += self.memo[index] is _NOTHING
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if not 0 <= index < len(self.memo) or self.memo[index] is _NOTHING:
            raise ValueError(f"no value {index}")
        self.push(self.memo[index])

    def name(self, module: Any, name: Any) -> Global:
        for text in (module, name):
            if not (isinstance(text, str) and 0 < len(text) <= MAX_NAME and text.isprintable() and " " not in text):
                raise PickleError("found a reference whose name is no name, which no network pickle needs")
        if self.allowed is not None and not self.allowed(module, name):
            raise NotData(f"found a reference to {module}.{name}, which no plain data and no network of EDM or EDM2 "
                          "needs; nothing was run")
        return Global(module, name)

    def written_name(self, pair: str) -> Global:
        return self.name(*pair.split(" ", 1))

    def stack_global(self, _: None) -> None:
        self.push(self.name(*self.last(2)))

    def call(self, function: Any, args: Any, kwargs: Any = None) -> None:
        if not isinstance(function, Global):
            raise PickleError(f"found a call of {kind(function)}, expected one of a named function; nothing was run")
        if not isinstance(args, tuple) or not (kwargs is None or isinstance(kwargs, dict)):
            raise ValueError("arguments of a call are no tuple")
        self.push(Call(function, args, kwargs))

    def inst(self, pair: str) -> None:
        function = self.written_name(pair)
        self.call(function, tuple(self.pop_mark()))

    def obj(self, _: None) -> None:
        function, *args = self.pop_mark()
        self.call(function, tuple(args))

    def build(self, _: None) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Call) or target.state is not None:
            raise PickleError(f"found a state set on {kind(target)}, expected one new object; nothing was run")
        target.state = state

    def append(self, values: List[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, set):
            target.update(check_key(value, len(target)) for value in values)
        elif isinstance(target, Call):
            target.elements.extend(values)
        else:
            raise ValueError(f"{kind(target)} takes no elements")

    def set_items(self, values: List[Any]) -> None:
        target = self.top()
        if len(values) % 2:
            raise ValueError("a key without a value")
        pairs = zip(values[::2], values[1::2])
        if isinstance(target, dict):
            target.update((check_key(key, len(target)), value) for key, value in pairs)
        elif isinstance(target, Call):
            target.items.extend(pairs)
        else:
            raise ValueError(f"{kind(target)} takes no items")

    def new_dict(self, _: None) -> None:
        values = self.pop_mark()
        self.push({})
        self.set_items(values)


# What each opcode does, called with the machine and the opcode's argument. EXT1, EXT2, EXT4 (names kept outside
# the file) and NEXT_BUFFER, READONLY_BUFFER (data kept outside) have no entry.
_ACTIONS: Dict[str, Callable[[_Machine, Any], None]] = {
    "STOP": lambda m, _: None,
    "FRAME": lambda m, size: None,
    "NONE": lambda m, _: m.push(None), "NEWTRUE": lambda m, _: m.push(True), "NEWFALSE": lambda m, _: m.push(False),
    "POP": _Machine.pop_any, "DUP": lambda m, _: m.push(m.top()),
    "MARK": _Machine.mark, "POP_MARK": lambda m, _: m.pop_mark() and None,
    "EMPTY_TUPLE": lambda m, _: m.push(()), "TUPLE": lambda m, _: m.push(tuple(m.pop_mark())),
    "TUPLE1": lambda m, _: m.push(m.last(1)), "TUPLE2": lambda m, _: m.push(m.last(2)),
    "TUPLE3": lambda m, _: m.push(m.last(3)),
    "EMPTY_LIST": lambda m, _: m.push([]), "LIST": lambda m, _: m.push(m.pop_mark()),
    "EMPTY_DICT": lambda m, _: m.push({}), "DICT": _Machine.new_dict, "EMPTY_SET": lambda m, _: m.push(set()),
    "FROZENSET": lambda m, _: m.push(frozenset([check_key(value, n) for n, value in enumerate(m.pop_mark())])),
    "APPEND": lambda m, _: m.append([m.pop()]), "APPENDS": lambda m, _: m.append(m.pop_mark()),
    "ADDITEMS": lambda m, _: m.append(m.pop_mark()),
    "SETITEM": lambda m, _: m.set_items(list(m.last(2))), "SETITEMS": lambda m, _: m.set_items(m.pop_mark()),
    "GLOBAL": lambda m, pair: m.push(m.written_name(pair)), "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": lambda m, _: m.call(*m.last(2)), "NEWOBJ": lambda m, _: m.call(*m.last(2)),
    "NEWOBJ_EX": lambda m, _: m.call(*m.last(3)), "INST": _Machine.inst, "OBJ": _Machine.obj, "BUILD": _Machine.build,
    "PERSID": lambda m, text: m.push(Persistent(text)), "BINPERSID": lambda m, _: m.push(Persistent(m.pop())),
    **{name: _Machine.recall for name in ("GET", "BINGET", "LONG_BINGET")},
    **{name: _Machine.memoize for name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")},
    **{name: _Machine.push for name in (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
    )},
}


def _protocol(machine: _Machine, version: int) -> None:
    if version > 5:
        raise PickleError(f"found a pickle of protocol {version}, expected 0 to 5; save it with a lower one")


_ACTIONS["PROTO"] = _protocol
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
