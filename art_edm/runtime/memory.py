"""Memory: what is free, what a call takes, and halving a batch where it does not fit.

Symbols
-------
batch   images per evaluation, a power of two, so that small changes of the free memory change no rounding
peak    most bytes in use during an evaluation, beyond those in use before it: base + batch * image

A result depends on the batch by rounding only (a network adds up in another order). Where even that is not wanted,
as between one process and several, `agree` makes all take the batch of the one with the least room.
"""

from __future__ import annotations

import os
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, Protocol, TypeVar, Union

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from art_edm.runtime.errors import Stopped

__all__ = ["NoMemory", "agree", "few_threads", "free_memory", "out_of_memory", "peak_memory", "with_back_off"]

T = TypeVar("T")
Device = Union[torch.device, str]
UNKNOWN = 4 << 30  # bytes taken as free where the system does not tell
_PHRASES = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # CPU, CUDA, its libraries


class NoMemory(Stopped):
    """Not even one image fits; the message says how much room was found, and what to do."""


class _Summing(Protocol):
    """What `agree` needs of a `distributed.World`."""

    def sum(self, tensor: torch.Tensor) -> torch.Tensor: ...


# ---- memory ----


def free_memory(device: Device) -> int:
    """Bytes that can still be taken on a device; of the CPU those that Linux calls available."""
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What the allocator keeps for reuse is free to us, though no longer to the driver.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (AttributeError, ValueError, OSError):
            return UNKNOWN


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make and that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self._holders: Dict[int, int] = {}  # storage -> tensors that share it

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_address(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for value in tree_flatten(result)[0]:
            if isinstance(value, torch.Tensor):
                self._note(value, given)
        return result

    def _note(self, value: torch.Tensor, given: "set[int]") -> None:
        address, size = _address(value), value.untyped_storage().nbytes()
        if address not in self._holders:
            if address in given or not size:  # a view of, or written into, what was there before
                return
            self._holders[address] = 0
            self.live += size
            self.peak = max(self.peak, self.live)
        self._holders[address] += 1
        weakref.finalize(value, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if not self._holders[address]:
            del self._holders[address]
            self.live -= size


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def peak_memory(function: Callable[[], Any], device: Device) -> int:
    """Most bytes in use while `function` runs, beyond those in use before.

    On a GPU the allocator tells, workspaces of cuDNN included; elsewhere the tensors are counted as they come and go.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return max(torch.cuda.max_memory_allocated(device) - before, 0)
    with _LiveBytes() as counter:
        function()
    return counter.peak


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the CPU."""
    known = isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError))
    return known or (isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES))


# ---- batches ----


def with_back_off(function: Callable[[int], T], batch: int, device: Device = "cpu") -> T:
    """`function(batch)`; each time that memory runs out, again from its beginning with half the batch, down to 1.

    Raises a NoMemory if one image does not fit; other errors pass.
    """
    while True:
        try:
            return function(batch)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:120]
        # Here, where the error and with it the frames that hold the tensors are gone.
        if torch.device(device).type == "cuda":
            torch.cuda.empty_cache()
        if batch <= 1:
            found = f"found {free_memory(device) / 1e9:.2f} GB free on {device}"
            raise NoMemory(f"{found}, expected room for one image ({reason}); stop what else runs there, or choose "
                           "another --device")
        batch //= 2


def _power_below(number: int) -> int:
    """The largest power of two that is not above `number`; at least 1."""
    return 1 << max(int(number).bit_length() - 1, 0)


def agree(batch: int, world: _Summing) -> int:
    """The least batch of all processes, on each of them; batches are powers of two."""
    found = torch.zeros(63)
    found[_power_below(batch).bit_length() - 1] = 1
    return 1 << int(world.sum(found).nonzero()[0])


@contextmanager
def few_threads(single: bool) -> Iterator[None]:
    """One thread where all tensors are small: more cost time, and would make the bytes depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if single else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
