"""Network pickles of EDM and EDM2, read without running code that is not known.

Such a pickle is a dict whose entry `ema` is the network. Every layer of it carries the Python source of its
class, and upstream's loader runs that source. Here a source is compared, by SHA-256, with the versions of
upstream's modules that third_party/upstream.json lists; only a listed one is run, and no checkout is needed.
Other entries (the loss, the augmentation) are not run at all; the encoder is, when it is asked for.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, NamedTuple, Optional, Tuple

import torch

from art_edm.pickles.known_sources import Listed, listed_sources, run_source, sha256_of_source
from art_edm.pickles.machine import read_pickle_file
from art_edm.pickles.records import Call, Global, Handler, NotData, Parts, PickleError, expect, plain_name, walk
from art_edm.pickles.trusted import load_trusted
from art_edm.pickles.values import is_data, to_data
from art_edm.runtime.files import PathLike

__all__ = ["Encoder", "NetworkPickle", "NetworkPickleError", "UnknownSource", "load_network_pickle"]

_PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
_CONTAINERS = {f"torch.nn.modules.container.{cls.__name__}": cls for cls in (
    torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.Sequential,
)}
_ENCODERS = ("StandardRGBEncoder", "StabilityVAEEncoder")
_VAE = "stabilityai/sd-vae-ft-mse"  # the one of EDM2's networks; another name would be fetched and unpickled
_SIZES = ("img_resolution", "img_channels", "label_dim")
_NUMBERS = {  # least and most
    "img_resolution": (1, 8192), "img_channels": (1, 1024), "label_dim": (0, 1_000_000),
    "sigma_data": (1e-6, 1e6), "sigma_min": (0, 1e6), "sigma_max": (1e-6, float("inf")),
}
_MAX_IMAGE = 1 << 27  # numbers in one image: 8192 x 8192 x 2
_WRAPPERS = ("module", "_orig_mod")  # where DataParallel, AveragedModel and torch.compile keep the network itself
# Objects that forks leave beside the network. Their names may occur; they are neither made nor read.
_BESIDE = {
    "argparse.Namespace", "types.SimpleNamespace", "torch.device", "torch.Size", "datetime.datetime",
    "datetime.timedelta",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"torch.{name}" for name in ("float16", "float32", "float64", "bfloat16", "int32", "int64", "uint8", "bool")),
}

Sources = Dict[str, Dict[str, Optional[str]]]


class NetworkPickleError(PickleError):
    """Not a network pickle, or one that is refused; one line that begins with the path."""


class UnknownSource(NetworkPickleError):
    """A class carries source code that is not listed; it was not run."""


class Encoder(NamedTuple):
    """The encoder of EDM2 pickles, between pixels and what the network sees; `state` is plain data, or None.

    Either `record`, still inert, or `ready`, made by unpickling a trusted file.
    """

    class_name: str
    state: Optional[Mapping[str, Any]]
    record: Optional[Call] = None
    ready: Any = None
    known: Mapping[str, Listed] = {}

    def realise(self) -> Any:
        """Upstream's object, with encode_latents and decode; raises a NetworkPickleError if it is not known."""
        if self.record is None:
            return self.ready
        if self.class_name not in _ENCODERS:
            raise NetworkPickleError(f"found the encoder {self.class_name}, expected {' or '.join(_ENCODERS)}; if you "
                                     "trust the file, add --trust-pickle")
        if self.class_name == _ENCODERS[1] and (self.state or {}).get("vae_name") != _VAE:
            raise NetworkPickleError(f"found an encoder with another VAE than {_VAE}; if you trust the file, add "
                                     "--trust-pickle")
        return _realise(self.record, self.known)


class NetworkPickle(NamedTuple):
    """A network on the CPU, in evaluation mode and without gradients; weights in the type they were saved in."""

    net: torch.nn.Module
    class_name: str
    sources: Sources  # file in upstream's repository (or, if not listed, class): {SHA-256: commit}
    encoder: Optional[Encoder] = None


def load_network_pickle(path: PathLike, trust: bool = False, lock: Optional[PathLike] = None) -> NetworkPickle:
    """Read a network pickle or a training snapshot (network-snapshot-*.pkl) of EDM or EDM2.

    Args:
        path: the file.
        trust: unpickle it as upstream does, which runs whatever the file says; needs upstream's modules.
        lock: another list of known sources than third_party/upstream.json.
    Raises:
        UnknownSource: a class of the network is not of a known version; nothing was run.
        NetworkPickleError: no file, not a network pickle, damaged, or refused for what it refers to.
    """
    try:
        known = listed_sources(lock)
        loaded = _load_trusted(path, known) if trust else _load_known(path, known)
        _check_numbers(loaded.net, loaded.class_name)
    except ValueError as error:
        kind = UnknownSource if isinstance(error, UnknownSource) else NetworkPickleError
        remedy = "; if you trust the file, add --trust-pickle" if isinstance(error, NotData) and not trust else ""
        raise kind(f"{path}: {error}{remedy}") from None
    return loaded._replace(net=loaded.net.cpu().eval().requires_grad_(False))


def _check_numbers(net: torch.nn.Module, name: str) -> None:
    """Refuse a network without the numbers that its use needs, or with ones that would take all memory."""
    for key, (least, most) in _NUMBERS.items():
        value = getattr(net, key, None)
        if value is None and key.startswith("sigma"):
            continue
        if key in _SIZES and not isinstance(value, int):
            raise NetworkPickleError(f"found a {name} without {key} as its network, expected one of EDM's or EDM2's "
                                     "Precond classes; give network-snapshot-*.pkl, or for a network of your own "
                                     "--network=package.module:factory")
        try:
            value = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # not a number; an integer of many digits
            value = float("nan")
        if not least <= value <= most:
            raise NetworkPickleError(f"found {key} {value:g}, expected {least:g} to {most:g}; the file is damaged: get "
                                     "it again")
    if net.img_channels * net.img_resolution**2 > _MAX_IMAGE:
        raise NetworkPickleError(f"found {net.img_channels} channels of {net.img_resolution}^2 pixels, expected at "
                                 f"most {_MAX_IMAGE} numbers in an image; the file is damaged: get it again")


def _load_known(path: PathLike, known: Mapping[str, Listed]) -> NetworkPickle:
    tree = read_pickle_file(path, _is_allowed)
    entries = _entries(tree)
    ema = entries.get("ema")
    if not _is_persistent(ema):
        raise NetworkPickleError("found a pickle without a network in it, expected a dict with the entry ema; give "
                                 "network-snapshot-*.pkl or an official pickle")
    sources = _check_sources(ema, known)
    net = _realise(ema, known)
    if not isinstance(net, torch.nn.Module):
        raise NetworkPickleError(f"found a {type(net).__name__} as its network, expected one of EDM's or EDM2's "
                                 "Precond classes; give network-snapshot-*.pkl")
    return NetworkPickle(net, type(net).__name__, sources, _encoder(entries.get("encoder"), known))


def _is_allowed(module: str, name: str) -> bool:
    text = plain_name(Global(module, name))
    return is_data(module, name) or text == _PERSISTENT or text in _CONTAINERS or text in _BESIDE


def _entries(tree: Any) -> Dict[Any, Any]:
    """The entries of a dict or an EasyDict, still inert; {} for anything else."""
    if isinstance(tree, Call) and plain_name(tree.function) == "dnnlib.util.EasyDict" and not tree.args:
        return {key: value for key, value in tree.items if isinstance(key, str)}
    if isinstance(tree, Call) and plain_name(tree.function) == "copyreg._reconstructor" and len(tree.args) == 3:
        return _entries(tree.args[2])  # an EasyDict in protocols 0 and 1
    return tree if isinstance(tree, dict) else {}


def _is_persistent(node: Any) -> bool:
    return isinstance(node, Call) and plain_name(node.function) == _PERSISTENT


def _check_sources(tree: Any, known: Mapping[str, Listed]) -> Sources:
    """What is listed of each class in `tree`; an UnknownSource for the first that is not, before any is run."""
    hashes: Dict[int, str] = {}  # by id: all layers share one text
    sources: Sources = {}
    for node in walk(tree):
        if not _is_persistent(node):
            continue
        text, class_name = _source(node.args)
        if id(text) not in hashes:
            hashes[id(text)] = sha256_of_source(text)
        listed = _listed(hashes[id(text)], class_name, known)
        sources.setdefault(listed.file, {})[listed.sha256] = listed.commit
    return sources


def _source(args: Tuple[Any, ...]) -> Tuple[str, str]:
    """Source and class name of a persistent object's arguments, ({type, version, module_src, class_name, state},)."""
    meta = args[0] if len(args) == 1 and isinstance(args[0], dict) else {}
    text, class_name = meta.get("module_src"), meta.get("class_name")
    ok = isinstance(text, str) and isinstance(class_name, str) and class_name.isidentifier() and len(class_name) < 100
    expect(ok and meta.get("type") == "class", _PERSISTENT, "arguments")
    return text, class_name


def _listed(sha256: str, class_name: str, known: Mapping[str, Listed]) -> Listed:
    if sha256 not in known:
        raise UnknownSource(f"class {class_name} comes with its own source code (SHA-256 {sha256}), which is not a "
                            "known version of NVlabs' modules and was not run; if you trust the file, add "
                            "--trust-pickle, or add the hash to third_party/upstream.json")
    return known[sha256]


def _realise(record: Call, known: Mapping[str, Listed]) -> Any:
    """The object of an inert record, made with classes of listed sources only."""
    _check_sources(record, known)

    def persistent(parts: Parts) -> Any:
        text, class_name = _source(parts.args)
        listed = _listed(sha256_of_source(text), class_name, known)  # again, where it is run
        module = run_source(listed, text)
        cls = vars(module).get(class_name)
        if not isinstance(cls, type) or cls.__module__ != module.__name__:
            raise NetworkPickleError(f"found class {class_name}, which {listed.file} does not define")
        return _instance(cls, parts.args[0].get("state"))

    extra = {_PERSISTENT: Handler(persistent)}
    for name, cls in _CONTAINERS.items():
        extra[name] = Handler(lambda parts, cls=cls: _instance(cls, parts.state), "state")
    return to_data(record, extra)


def _instance(cls: type, state: Any) -> Any:
    """An object of `cls` with attributes `state`, all of which are plain data, tensors, or objects made here."""
    expect(isinstance(state, dict), cls.__name__, "a state")
    obj = cls.__new__(cls)
    for key in state:
        bad = not isinstance(key, str) or key.startswith("__") or callable(getattr(cls, key, None))
        expect(not bad, cls.__name__, "an attribute")
    if isinstance(obj, torch.nn.Module):
        _check_module(cls.__name__, state)
        obj.__setstate__(state)  # adds what newer versions of torch expect
    else:
        obj.__dict__.update(state)
    return obj


def _check_module(name: str, state: Dict[str, Any]) -> None:
    kinds = {"_modules": torch.nn.Module, "_parameters": torch.nn.Parameter, "_buffers": torch.Tensor}
    for key, kind in kinds.items():
        ok = isinstance(state.get(key), dict)
        ok = ok and all(isinstance(k, str) and isinstance(v, (kind, type(None))) for k, v in state[key].items())
        expect(ok, name, f"an entry in {key}")
    for key, value in state.items():
        expect("hook" not in key or value is None or isinstance(value, bool) or value == {}, name, "a hook")


def _encoder(node: Any, known: Mapping[str, Listed]) -> Optional[Encoder]:
    if not _is_persistent(node):
        return None
    _, class_name = _source(node.args)
    try:
        state = to_data(node.args[0].get("state"))
    except PickleError:
        state = None  # holds more than plain data: not one of upstream's
    return Encoder(class_name, state, node, None, known)


def _load_trusted(path: PathLike, known: Mapping[str, Listed]) -> NetworkPickle:
    content, hashes = load_trusted(path)
    net = content.get("ema") if isinstance(content, dict) else content
    while isinstance(net, torch.nn.Module) and (inner := [n for n in _WRAPPERS if n in net._modules]):
        net = net._modules[inner[0]]
    if not isinstance(net, torch.nn.Module):
        raise NetworkPickleError("found a pickle without a network in it, expected a dict with the entry ema; give "
                                 "network-snapshot-*.pkl or an official pickle")
    sources: Sources = {}
    for sha256, class_name in hashes.items():
        listed = known.get(sha256)
        sources.setdefault(listed.file if listed else class_name, {})[sha256] = listed.commit if listed else None
    ready = content.get("encoder") if isinstance(content, dict) else None
    encoder = None if ready is None else Encoder(type(ready).__name__, dict(vars(ready)), None, ready)
    return NetworkPickle(net, type(net).__name__, sources, encoder)
