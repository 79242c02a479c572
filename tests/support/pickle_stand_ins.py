"""Network pickles in upstream's form without upstream: a small network whose source travels in the pickle."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
from contextlib import contextmanager
from types import ModuleType

SOURCE = '''
import numpy as np
import torch
from torch_utils import misc, persistence


@persistence.persistent_class
class Scale(torch.nn.Module):
    def __init__(self, gain):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full([2], gain))
        self.bias = None
        self.register_parameter("shift", None)

    def forward(self, x):
        return x * self.weight.sum()


@persistence.persistent_class
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.img_resolution, self.img_channels, self.label_dim = 4, 1, 0
        self.root = np.sqrt(0.5)
        self.sizes = [1, 2]
        self.layers = torch.nn.ModuleDict({"a": Scale(0.75), "b": Scale(1.25)})
        self.more = torch.nn.ModuleList([Scale(0.5), torch.nn.Sequential(Scale(2.0))])
        self.register_buffer("table", torch.arange(6, dtype=torch.float64).reshape(2, 3))

    def forward(self, x, sigma, class_labels=None):
        for layer in [*self.layers.values(), *self.more]:
            x = layer(x)
        filters = misc.const_like(x, np.float32([1, 2]))
        x = x * self.root + filters.sum() * self.table.to(x.dtype).t().contiguous()[2, 1]
        return torch.nn.functional.dropout(x, training=self.training)


@persistence.persistent_class
class StandardRGBEncoder:
    def __init__(self):
        self.scale = np.float32([2, 3])

    def decode(self, x):
        return x * misc.const_like(x, self.scale)


@persistence.persistent_class
class StabilityVAEEncoder:
    def __init__(self, vae_name="stabilityai/sd-vae-ft-mse"):
        self.vae_name = vae_name


@persistence.persistent_class
class OtherEncoder:
    pass


def helper(state):
    raise AssertionError("a function was called in place of a class")
'''


def sha256(source):
    """As the lock file names a source."""
    return hashlib.sha256(source.encode()).hexdigest()


def write_lock(path, *sources):
    """A lock file that lists `sources`; returns its path."""
    listed = {sha256(source): f"commit{i}" for i, source in enumerate(sources)}
    path.write_text(json.dumps({"ours": {"url": "", "commit": "", "scripts": {}, "sources": {"net.py": listed}}}))
    return path


def _reconstruct_persistent_obj(meta):
    """What upstream's function of this name does: run the source, make the object."""
    cls = classes(meta["module_src"])[meta["class_name"]]
    obj = cls.__new__(cls)
    getattr(obj, "__setstate__", obj.__dict__.update)(meta["state"])
    return obj


class EasyDict(dict):
    """Pickled as dnnlib.util.EasyDict."""


@contextmanager
def importable():
    """torch_utils and dnnlib as far as a pickle and the source above need them, for the time of a `with`."""
    def module(name, **content):
        made = ModuleType(name)
        made.__dict__.update(content)
        return made

    import torch

    persistence = module("torch_utils.persistence", _reconstruct_persistent_obj=_reconstruct_persistent_obj,
                         persistent_class=lambda cls: cls)
    misc = module("torch_utils.misc", const_like=lambda ref, value: torch.as_tensor(value, dtype=ref.dtype))
    added = {
        "torch_utils": module("torch_utils", persistence=persistence, misc=misc),
        "torch_utils.persistence": persistence, "torch_utils.misc": misc,
        "dnnlib": module("dnnlib"), "dnnlib.util": module("dnnlib.util", EasyDict=EasyDict),
    }
    homes = {EasyDict: "dnnlib.util", _reconstruct_persistent_obj: "torch_utils.persistence"}
    before = {item: item.__module__ for item in homes}
    assert not set(added) & set(sys.modules)
    sys.modules.update(added)
    try:
        for item, home in homes.items():
            item.__module__ = home
        yield
    finally:
        for item, home in before.items():
            item.__module__ = home
        for name in added:
            del sys.modules[name]


def classes(source):
    """The classes that `source` defines, pickled with that source; call it within `importable`."""
    names = {"__name__": "stand_in"}
    exec(source, names)

    def reduce(self):
        meta = dict(type="class", version=6, module_src=source, class_name=type(self).__name__, state=dict(vars(self)))
        return _reconstruct_persistent_obj, (meta,)

    found = {name: item for name, item in names.items() if getattr(item, "__module__", None) == "stand_in"}
    for item in found.values():
        if isinstance(item, type):
            item.__reduce__ = reduce
            item.__reduce_ex__ = lambda self, protocol: reduce(self)
    return found


def dumps(make, source=SOURCE, protocol=4, memo=True):
    """The pickle of make(classes of `source`)."""
    with importable():
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol)
        pickler.fast = not memo
        pickler.dump(make(classes(source)))
        return file.getvalue()


def plain_loads(raw):
    """What Python's own pickle makes of it, with everything it needs importable: it runs what the pickle says."""
    with importable():
        return pickle.loads(raw)
