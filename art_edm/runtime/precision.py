"""A network's numbers do not depend on what the program around it has switched on."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Iterator, List, Tuple

import torch

__all__ = ["full_precision", "without_autocast"]

AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu")  # kinds of devices on which a host program may have it on


@contextmanager
def full_precision() -> Iterator[None]:
    """Turn TF32 and autocast off: TF32's error of 1e-3 would be 10 % of a difference over 0.01 sigma.

    Whatever the host program has set, by torch's older or newer switches, is as it was afterwards.
    """
    with ExitStack() as stack:
        for owner, name, off, before in _switches():
            stack.callback(setattr, owner, name, before)
            setattr(owner, name, off)
        stack.enter_context(without_autocast())
        yield


@contextmanager
def without_autocast() -> Iterator[None]:
    """Turn autocast off, for every kind of device: a network computes in the types that it was made for."""
    with ExitStack() as stack:
        for kind in AUTOCAST:
            with suppress(RuntimeError, AttributeError):  # a kind that this torch does not know
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _switches() -> List[Tuple[Any, str, Any, Any]]:
    """(owner, name, value that turns TF32 off, value now) of the older switches, and the newer where torch has them."""
    backends, found = torch.backends, []
    for owner in (backends.cuda.matmul, backends.cudnn):
        with suppress(RuntimeError):  # once a newer one was used, torch refuses to read the older
            found.append((owner, "allow_tf32", False, owner.allow_tf32))
    if hasattr(backends, "fp32_precision"):
        for owner in (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn):
            now = owner.fp32_precision
            found.append((owner, "fp32_precision", "ieee", "none" if now == backends.fp32_precision else now))
    return found
