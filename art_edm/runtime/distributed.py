"""Processes that share one computation, started by torchrun; a single process needs none of it.

Symbols
-------
rank, size  number of this process, 0 to size - 1, and how many there are
phase       a piece of work that all processes enter and leave together, with or without an error

An error of one process becomes an error of all at the end of the phase, or at the next `check` before it,
so that none waits for one that has gone; one that was killed is noticed by its line (`heartbeat`). For the
same reason no `sum` belongs into a phase where one may fail alone. Only process 0 prints; if lost, process 1.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, Iterator, List, Optional, Set, Tuple

import torch
from torch import distributed

from art_edm.runtime.errors import NonFiniteOutput, Stopped
from art_edm.runtime.heartbeat import Lines

__all__ = ["ALONE", "World", "resolve_device", "world"]

_NO_FLOAT64 = ("mps",)
_POLL = 0.02  # s
_FAREWELL = 10.0  # s that the others leave process 0 to print before they end
_PATIENCE = 2.0  # s for a line to be seen closed after a sum has failed


class OtherFailed(Exception):
    """Another process has failed; the phase ends with its error."""


class World:
    """All processes of a computation; with size 1 every method does nothing."""

    def __init__(
        self, rank: int = 0, size: int = 1, store: Any = None, device: Optional[torch.device] = None,
        lines: Optional[Lines] = None,
    ) -> None:
        self.rank, self.size, self._store, self._lines = rank, size, store, lines
        self.device = device or torch.device("cpu")  # of this process's denoiser
        self._phases = 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes of their tensors, on every one; in place where there are several.

        It is taken on the host: a tensor of the host costs no copy.
        """
        if self.size > 1:
            with self._together():
                host = tensor.cpu()
                distributed.all_reduce(host)
            tensor.copy_(host)
        return tensor

    def share(self, value: Any) -> Any:
        """Process 0's value, on every one; anything that pickles."""
        box = [value]
        if self.size > 1:
            with self._together():
                distributed.broadcast_object_list(box)
        return box[0]

    def gather(self, value: Any) -> List[Any]:
        """The values of all processes in the order of their ranks, on every one; anything that pickles."""
        box = [value] * self.size
        if self.size > 1:
            with self._together():
                distributed.all_gather_object(box, value)
        return box

    def lost(self) -> Set[int]:
        """The processes that have ended without notice, as far as this one can know."""
        return self._lines.gone() if self._lines else set()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """What all processes do at once, and what fails when one of them is lost."""
        try:
            yield
        except RuntimeError as error:
            end = time.monotonic() + _PATIENCE
            while not self.lost() and time.monotonic() < end:
                time.sleep(_POLL)
            if not self.lost() and "onnection" not in str(error):
                raise
            raise _ended(min(self.lost(), default=None)) from None

    def leave(self) -> None:
        """Process 0, which may hold the store, stays until all have said that they need it no more (or died)."""
        with suppress(RuntimeError):  # it died with process 0
            self._store.set(f"left/{self.rank}", "1")
        end, others = time.monotonic() + _FAREWELL, set(range(self.size)) if self.rank == 0 else set()
        while others and time.monotonic() < end:
            others = {rank for rank in others - self.lost() if not _has(self._store, f"left/{rank}")}
            time.sleep(_POLL if others else 0)

    def check(self) -> None:
        """End this phase early if another process has failed; call it between pieces of work."""
        if self.size == 1:
            return
        if self.lost():
            raise _ended(min(self.lost()))
        try:
            failed = _has(self._store, f"failed/{self._phases}")
        except RuntimeError:
            raise _ended(0) from None
        if failed:
            raise OtherFailed

    @contextmanager
    def phase(self) -> Iterator[None]:
        """Work that ends on all processes alike: with the error of the lowest rank that has one, or without."""
        if self.size == 1:
            yield
            return
        error: Optional[BaseException] = None
        try:
            yield
        except OtherFailed:
            pass
        except Exception as caught:
            error = caught
        try:
            rank, kind, text = self._settle(error)
        except RuntimeError:  # the store died with process 0
            raise _ended(0) from None
        if rank == self.rank and error is not None:
            raise error
        if kind:
            raise _KINDS.get(kind, RuntimeError)(text) from error

    def _settle(self, error: Optional[BaseException]) -> Tuple[int, str, str]:
        """Tell the others how this phase went; the lowest rank with an error, its kind and its text."""
        prefix, failed, self._phases = f"phase/{self._phases}", f"failed/{self._phases}", self._phases + 1
        if error is not None:
            self._store.set(failed, "1")
        self._store.set(f"{prefix}/{self.rank}", _packed(error))
        for rank in range(self.size):
            key = f"{prefix}/{rank}"
            while not _has(self._store, key):  # a plain get gives up after minutes
                if rank in self.lost() and not _has(self._store, key):
                    self._store.set(key, _packed(_ended(rank)))  # in its place, so that all see it
                time.sleep(_POLL)
            kind, text = json.loads(self._store.get(key))
            if kind:
                return rank, kind, text
        return self.size, "", ""


ALONE = World()  # one process, on the CPU


# What the command line shows as one line, the special cases first.
_KINDS = {
    "connection": ConnectionError, "os": OSError, "value": ValueError, "floating": FloatingPointError,
    "stopped": Stopped, "output": NonFiniteOutput,
}


def _has(store: Any, key: str) -> bool:
    """Whether a key is there; a RuntimeError where the store itself is not. torch 2.0 to 2.2 can only wait for it."""
    if hasattr(store, "check"):
        return store.check([key])
    try:
        store.wait([key], timedelta(milliseconds=1))
    except RuntimeError as error:
        if "imeout" not in str(error):
            raise
        return False
    return True


def _ended(rank: Optional[int]) -> ConnectionError:
    """The error of all when a process is lost."""
    who = "another process" if rank is None else f"process {rank}"
    hint = "run again, with --resume where the command has it; what was finished is kept"
    return ConnectionError(f"{who} has ended before its work was done (killed, or out of memory); {hint}")


def _packed(error: Optional[BaseException]) -> str:
    """Kind and text of an error; one that is not the user's comes with its traceback."""
    if error is None:
        return json.dumps(["", ""])
    kind = next((name for name, cls in _KINDS.items() if isinstance(error, cls)), "fault")
    trace = traceback.format_exception(type(error), error, error.__traceback__)
    return json.dumps([kind, str(error) if kind != "fault" else "".join(trace)])


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """The processes that torchrun started (its environment tells), or this one alone.

    Sums go through Gloo, on the host. From here on, all but process 0 print nothing.

    Args:
        device: see `resolve_device`.
    Raises:
        ValueError: the device cannot be used.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=resolve_device(device))
        return
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    lines = Lines(rank, size, distributed.PrefixStore("lines", store))
    _outlive(lines)
    here = World(rank, size, distributed.PrefixStore("world", store), lines=lines)
    printed, streams = distributed.PrefixStore("end", store), (sys.stdout, sys.stderr)
    if rank == 0:
        atexit.register(printed.set, "printed", "1")
    else:  # never closed: the error is printed after this context has ended
        sys.stdout = sys.stderr = open(os.devnull, "w")
    try:
        with here.phase():
            here.device = resolve_device(device)
        distributed.init_process_group(  # not NCCL: there a lost process is a stall, not an error
            "gloo", store=distributed.PrefixStore("sums", store), rank=rank, world_size=size,
        )
        yield here
        here.leave()
    except BaseException:
        here.leave()
        if 0 in here.lost():
            if rank == 1:
                sys.stdout, sys.stderr = streams
        elif rank > 0:
            _wait(printed)
        raise
    finally:
        lines.close()
        if distributed.is_initialized():
            distributed.destroy_process_group()


def _outlive(lines: Lines) -> None:
    """Let SIGTERM, which torchrun sends to all when it misses one, end no process that has that to report."""
    def handle(number: int, frame: Optional[FrameType]) -> None:
        if not lines.gone():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, handle)


def _wait(printed: Any) -> None:
    """Let process 0 print the error; torchrun stops all processes as soon as one has ended with an error."""
    end = time.monotonic() + _FAREWELL
    try:
        while time.monotonic() < end and not _has(printed, "printed"):
            time.sleep(_POLL)
    except RuntimeError:  # process 0 held the store and has ended
        pass


def resolve_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> device; of several processes on one machine each takes its own GPU.

    A process that sees a single GPU takes that one: it is its own where the launcher shows each process another.

    Raises:
        ValueError: this device cannot be used here.
    """
    rank, alone = int(os.environ.get("LOCAL_RANK", "0")), os.environ.get("WORLD_SIZE", "1") == "1"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        count = torch.cuda.device_count()
        if rank >= count > 1:
            raise ValueError(f"found {count} GPUs for process {rank} of this machine, expected one for each; start at "
                             f"most {count} processes, or choose --device=cpu")
        name = f"cuda:{rank if count > 1 else 0}"
    elif name.startswith("cuda:") and not alone:
        raise ValueError(f"found --device={name} for several processes, expected --device=cuda: each takes its own GPU")
    if name.partition(":")[0] in _NO_FLOAT64:
        raise ValueError(f"cannot use --device={name}: paths are followed in float64, which it does not have; expected "
                         "cpu or cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError) as error:
        reason = f"--device={name} ({str(error).splitlines()[0][:100]})"
        raise ValueError(f"cannot use {reason}; expected auto, cpu, or cuda where torch finds one") from None
    return device
