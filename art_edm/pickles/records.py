"""What an inert pickle holds, and the limits of it.

Symbols
-------
Global      a name in a module, as text; the module is not imported
Call        a call that the pickle asks for: function, arguments, and what would be done to its result
Persistent  a reference to something stored outside the pickle
Parts       a call whose parts have become values
Handler     makes the value of a call from its parts

A tree is made of these and of None, bool, int, float, str, bytes, bytearray, tuple, list, dict, set and
frozenset. A node may occur in several places; no node contains itself.
"""

from __future__ import annotations

import re
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

__all__ = [
    "MAX_DEPTH", "MAX_NUMBER_KEYS", "Call", "Global", "Handler", "NotData", "Parts", "Persistent", "PickleError",
    "check_depth", "check_key", "children", "expect", "kind", "plain_name", "walk",
]

MAX_NUMBER_KEYS = 1000  # in one dict or set
MAX_DEPTH = 100  # of a tree; a network has some 30, and what reads the tree may call itself for each level


class PickleError(ValueError):
    """Not a pickle, or one that is refused; the message is one line."""


class NotData(PickleError):
    """A pickle that asks for more than data; its maker may be trusted all the same."""


class Global:
    """The name of something in a module, e.g. numpy.ndarray."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Global) and (self.module, self.name) == (other.module, other.name)

    def __hash__(self) -> int:
        return hash((self.module, self.name))

    def __repr__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """function(*args, **kwargs), then its state set, items (key, value) put and elements appended."""

    __slots__ = ("function", "args", "kwargs", "state", "items", "elements")

    def __init__(self, function: Global, args: tuple, kwargs: Optional[dict] = None) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs or {}
        self.state: Any = None
        self.items: List[Tuple[Any, Any]] = []
        self.elements: List[Any] = []

    def __repr__(self) -> str:
        return f"{self.function}(...)"


class Persistent:
    """A reference by `id` to something stored elsewhere."""

    __slots__ = ("id",)

    def __init__(self, id: Any) -> None:
        self.id = id


class Parts(NamedTuple):
    """A call whose parts are values; a Global among the arguments stays one."""

    name: str
    args: Tuple[Any, ...]
    state: Any = None
    items: Tuple[Tuple[Any, Any], ...] = ()


class Handler(NamedTuple):
    """How to make the value of a call, and which parts besides arguments it takes: "state", "items" or both."""

    make: Callable[[Parts], Any]
    takes: str = ""


def plain_name(name: Global) -> str:
    """module.name, of Python 2, numpy 2 or their successors alike."""
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(name.module, name.module)
    return f"{re.sub('^numpy[.]_core[.]', 'numpy.core.', module)}.{name.name}"


def expect(condition: bool, name: str, what: str) -> None:
    """Raise a PickleError unless `condition`: `what` of the call of `name` cannot be used."""
    if not condition:
        raise PickleError(f"found a call of {name} with {what} that it does not take, expected plain data; "
                          "nothing was run")


def kind(value: Any) -> str:
    """What to call `value` in a message."""
    return f"{value}" if isinstance(value, Global) else f"a {type(value).__name__}"


def check_key(key: Any, others: int = 0, nested: bool = False) -> Any:
    """`key`, or a PickleError if hashing it beside `others` is a risk.

    A deep tuple recurses in C. The hashes of numbers, unlike those of text, can be chosen so that all collide: then n
    keys take n^2 / 2 comparisons.
    """
    if others >= MAX_NUMBER_KEYS and not isinstance(key, (str, bytes)):
        raise PickleError(f"found more than {MAX_NUMBER_KEYS} keys that are numbers, expected text; nothing was run")
    if isinstance(key, tuple) and not nested and len(key) <= 8:
        for part in key:
            check_key(part, nested=True)
    elif isinstance(key, int):
        if not -(1 << 63) <= key < 1 << 64:
            raise PickleError("found a key of more than 64 bits, expected a short one; nothing was run")
    elif not (key is None or isinstance(key, (str, bytes, float))):
        raise PickleError(f"found {kind(key)} as a key, expected text or a number; nothing was run")
    return key


def children(node: Any) -> Iterator[Any]:
    """What a node of a tree holds, but for the keys of dicts and the members of sets."""
    if isinstance(node, (tuple, list)):
        yield from node
    elif isinstance(node, dict):
        yield from node.values()  # keys are flat
    elif isinstance(node, Call):
        yield from (node.args, node.kwargs, node.state)
        yield from node.elements
        for pair in node.items:
            yield from pair
    elif isinstance(node, Persistent):
        yield node.id


def walk(tree: Any) -> Iterator[Any]:
    """Every tuple, list, dict and record of a tree, once; a parent before its children."""
    seen, waiting = set(), [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (tuple, list, dict, Call, Persistent)) and id(node) not in seen:
            seen.add(id(node))
            waiting += children(node)
            yield node


def check_depth(tree: Any) -> None:
    """Raise a PickleError for what is nested too deep or contains itself.

    Each node is visited once, however often it is shared.
    """
    height: Dict[int, int] = {}  # of the nodes that are done
    open_nodes = {id(tree)}
    path = [(tree, children(tree), 1)]
    while path:
        node, rest, tallest = path.pop()
        for child in rest:
            if not isinstance(child, (tuple, list, dict, Call, Persistent)):
                continue
            if id(child) in open_nodes:
                raise PickleError("found an object that contains itself, expected plain data; nothing was run")
            if id(child) in height:
                tallest = max(tallest, height[id(child)] + 1)
                continue
            path += [(node, rest, tallest), (child, children(child), 1)]
            open_nodes.add(id(child))
            break
        else:
            height[id(node)] = tallest
            open_nodes.discard(id(node))
            if path:
                path[-1] = (*path[-1][:2], max(path[-1][2], tallest + 1))
        if len(path) > MAX_DEPTH or tallest > MAX_DEPTH:
            raise PickleError(f"found objects nested more than {MAX_DEPTH} deep, expected less; nothing was run")
