"""A CUDA device that is none: tensors that say they are there, never mix with the CPU's, and count what Python reads.

    with FakeDevice() as device:
        images = sample(device.take(denoiser), device.take(latents), grid)
        assert device.reads == 2

A read is a value that Python takes from the device (`.item()`, `bool()`, `.cpu()`, a mask as an index, ...); a copy is
one towards it. On a real device the host waits for either, for a copy unless it is `non_blocking`. The numbers are
computed on the CPU, so that results equal the CPU's to the last bit.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
READS = {"item", "tolist", "__float__", "__int__", "__bool__", "__index__", "equal", "allclose", "is_nonzero",
         "nonzero", "masked_select", "unique"}
MADE = {"tensor", "as_tensor", "asarray", "new_tensor"}  # from Python's numbers or from tensors
KINDS = {torch.Tensor.device.__get__: lambda x: DEVICE, torch.Tensor.is_cuda.__get__: lambda x: True,
         torch.Tensor.is_cpu.__get__: lambda x: False, torch.Tensor.get_device: lambda x: 0}
NOTHING, ZERO, ONE = (lambda *_: None), (lambda *_: 0), (lambda *_: 1)
DRIVER = {  # torch.cuda's, of a device of 1 GB
    "is_available": lambda: True, "device_count": ONE, "get_device_name": lambda *_: "pretended", "set_device": NOTHING,
    "synchronize": NOTHING, "empty_cache": NOTHING, "reset_peak_memory_stats": NOTHING, "memory_reserved": ZERO,
    "memory_allocated": ZERO, "max_memory_allocated": ZERO, "mem_get_info": lambda *_: (1 << 30, 1 << 30)}


class Mixed(AssertionError):
    """An operation took tensors of both devices, or numpy took one of the device."""


class Held(torch.Tensor):
    """A tensor that pretends to be on the device."""


def plain(value):
    return value.as_subclass(torch.Tensor) if isinstance(value, Held) else value


def held(value):
    return value.as_subclass(Held) if isinstance(value, torch.Tensor) else value


def _there(*args):
    """Whether a device among the arguments is the pretended one."""
    return any(torch.device(arg).type == DEVICE.type for arg in args if isinstance(arg, (str, torch.device)))


class FakeDevice(TorchFunctionMode):
    """While it is entered: `device=` and `.to` of the pretended device give its tensors; `reads` and `copies` count."""

    def __init__(self):
        super().__init__()
        self.reads = self.copies = 0

    def __enter__(self):
        move = torch.nn.Module.to
        to = lambda module, *args, **options: self.take(module) if _there(*args) else move(module, *args, **options)
        with ExitStack() as stack:
            stack.enter_context(mock.patch.multiple(torch.cuda, **DRIVER))
            stack.enter_context(mock.patch.object(torch.nn.Module, "to", to))
            self.undo = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error):
        self.undo.close()
        return super().__exit__(*error)

    def take(self, value):
        """A tensor, or a module with its parameters and buffers, on the device."""
        if isinstance(value, torch.Tensor):
            return held(value)
        for part in value.modules():
            for tensors in (part._parameters, part._buffers):
                tensors.update((name, held(tensor.detach())) for name, tensor in tensors.items() if tensor is not None)
        return value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        here = [isinstance(tensor, Held) for tensor in tensors]
        if any(here) and func in KINDS:
            return KINDS[func](args[0])
        if name in ("to", "cpu", "cuda", "copy_") or (name == "__setitem__" and len(tensors) == 2):
            return self.moved(func, name, args, kwargs)
        target = kwargs.get("device")
        if target is not None and torch.device(target).type == DEVICE.type:
            kwargs["device"], here = "cpu", here or [True]
        self.copies += name in MADE and any(here) and not isinstance(args[-1], Held)
        if any(here):
            self.judge(name, tensors, here, args)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*tree_map(plain, args), **tree_map(plain, kwargs))
        return tree_map(held, result) if any(here) and not isinstance(result, torch.Size) else result

    def judge(self, name, tensors, here, args):
        """Count a read; refuse what a device refuses. Numbers of the CPU ([]) may go with tensors of the device."""
        if name in ("numpy", "__array__") or any(not there and tensor.ndim for tensor, there in zip(tensors, here)):
            places = [f"{'cuda' if there else 'cpu'}{list(t.shape)}" for t, there in zip(tensors, here)]
            raise Mixed(f"{name or 'numpy'} of {', '.join(places)}")
        masks = name == "__getitem__" and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        self.reads += name in READS or masks

    def moved(self, func, name, args, kwargs):
        """A copy from one place to another; towards the CPU it is a read."""
        source, rest = (args[-1], args[:-1]) if name in ("copy_", "__setitem__") else (args[0], args[1:])
        wanted = [v for v in (*rest, *kwargs.values()) if isinstance(v, (torch.Tensor, torch.device, str))]
        there = isinstance(source, Held)
        for value in wanted:
            tensor = isinstance(value, torch.Tensor)
            there = isinstance(value, Held) if tensor else torch.device(value).type == DEVICE.type
        there = {"cpu": False, "cuda": True}.get(name, there)
        self.reads += isinstance(source, Held) and not there
        self.copies += there and not isinstance(source, Held) and not kwargs.get("non_blocking")
        swap = lambda v: "cpu" if isinstance(v, (torch.device, str)) else plain(v)
        with torch._C.DisableTorchFunctionSubclass():
            result = source if name == "cuda" else func(*tree_map(swap, args), **tree_map(swap, kwargs))
        return held(plain(result)) if there else plain(result)
