"""From a name, a path or an address to a denoiser.

    mnist, cifar10    the bundled score networks    gaussian:S    Gaussian data of standard deviation S
    oned              the paper's 1-D example       PATH|URL      a network pickle of EDM or EDM2, or a weight
                                                                  file written by `save_network`
    package.module:factory    calls `factory()`, which returns a `Denoiser`; this runs the user's code
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Tuple, Union
from urllib.parse import urlsplit

import torch

from art_edm.models.analytic import GaussianDenoiser, one_dimensional
from art_edm.models.denoiser import Denoiser
from art_edm.models.lenet import LeNet
from art_edm.models.nvlabs import NetworkDenoiser
from art_edm.models.resnet import ResNet
from art_edm.models.unet import ScoreUNet
from art_edm.pickles.archives import load_tensors
from art_edm.pickles.network import Encoder, load_network_pickle
from art_edm.pickles.records import PickleError
from art_edm.runtime.download import download, is_url
from art_edm.runtime.files import file_kind, save_tensors, sha256_of

__all__ = ["NetworkError", "Network", "bundled", "classifier_kind", "load_classifier", "load_network", "local_copy",
           "save_classifier", "save_network"]

BUNDLED = ("mnist", "cifar10")
FORMATS = {ScoreUNet: "art_edm.score/1", LeNet: "art_edm.lenet/1", ResNet: "art_edm.resnet/1"}
LARGEST_SIZE = 1024  # of a width or resolution of our own networks; memory is taken by these before weights are read
EXPECTED = ("mnist, cifar10, oned, gaussian:S, the path or address of a network pickle or weight file, or "
            "package.module:factory")
SNAPSHOT = "of upstream's files give network-snapshot-*.pkl, not a training state; of others package.module:factory"


class NetworkError(ValueError):
    """A network name or weight file that cannot be used; the message says what to do."""


class Network(NamedTuple):
    """A denoiser and where it came from."""

    denoiser: Denoiser
    name: str  # short, used in file names
    sha256: Optional[str]  # of the file; None for a closed form
    details: Dict[str, Any] = {}  # of a pickle: class, its sources, class label, guidance
    encoder: Optional[Encoder] = None  # of a pickle of EDM2: between pixels and latents

    @property
    def identity(self) -> str:
        """All that a resumed run must find again, in one line."""
        parts = [self.name, self.sha256 or "closed form", *(f"{k}={v}" for k, v in self.details.items())]
        return " ".join(str(part) for part in parts)


def bundled(name: str) -> Path:
    """Path of a file shipped with the package, in art_edm/weights."""
    return Path(__file__).resolve().parents[1] / "weights" / name


def load_network(
    spec: str, device: Union[str, torch.device] = "cpu", gnet: Optional[str] = None, guidance: float = 1.0,
    class_idx: Optional[int] = None, trust: bool = False, quiet: bool = True,
) -> Network:
    """Resolve `spec` (see the module's docstring) to a denoiser on `device`, ready for evaluation.

    Args:
        gnet: path or address of a guiding network's pickle; with `guidance`, as EDM2's script takes them.
        guidance: strength; 1 is none.
        class_idx: class of all images; None draws one for each.
        trust: run the code that a pickle carries even if it is no known version of upstream's.
        quiet: show no progress of a download.

    Raises:
        NetworkError: unknown name; missing, empty, truncated or foreign file.
        AdapterError: guidance or class that do not fit the network.
        ValueError: a pickle or an address that is refused; the message says why.
        ConnectionError: an address that cannot be reached now.
    """
    factory = re.fullmatch(r"[^\W\d][\w.]*:[^\W\d]\w*", spec) and not spec.startswith("gaussian:")
    plain = spec in ("oned", *BUNDLED) or spec.startswith("gaussian:") or factory
    path = bundled(f"{spec}.pt") if spec in BUNDLED else None if plain else _file(spec, quiet)
    if path is not None and spec not in BUNDLED and not _is_weight_file(path):
        return _pickled(path, spec, device, (gnet, guidance, class_idx), trust, quiet)
    if (gnet, guidance, class_idx) != (None, 1, None):
        raise NetworkError(f"{spec} takes no --gnet, --guidance or --class; they are for network pickles")
    if factory:
        return _made(spec, device)
    if spec == "oned":
        return Network(one_dimensional().to(device), "oned", None)
    if path is None:
        return Network(_gaussian(spec).to(device), spec.replace(":", ""), None)
    net = _fill(ScoreUNet, _read(path, ScoreUNet), path).to(device, memory_format=torch.channels_last)
    return Network(net, path.stem, sha256_of(path))


def _file(spec: str, quiet: bool, option: str = "", expected: str = EXPECTED) -> Path:
    """The file that `spec` names, downloaded if it is an address."""
    if is_url(spec):
        return _of_upstream(spec) or download(spec, quiet=quiet)
    if "://" in spec:
        expected = "http:// or https://; download it, and give its path"
        raise NetworkError(f"{option}found the address {spec}, expected {expected}")
    path = Path(spec).expanduser()
    if spec and path.is_dir():
        held = sorted(item.name for item in path.iterdir() if item.suffix in (".pkl", ".pt", ".pth"))
        what = ", ".join(held[:3]) + ", ..." * (len(held) > 3)
        raise NetworkError(f"{option}found the folder {path} " + (f"with {what}; give one of these files" if held else
                           f"without network pickles (*.pkl); expected {expected}"))
    if not path.is_file():
        looks_like_path = path.suffix or len(path.parts) > 1
        found = f"no file {path}" if looks_like_path else f"unknown network {spec!r}"
        raise NetworkError(f"{option}{found}; expected {expected}")
    return path


def local_copy(spec: str) -> Optional[Path]:
    """The pickle that was downloaded from an address for this package alone; None of anything else."""
    path = download(spec) if is_url(spec) and not _of_upstream(spec) else None
    return path if path and file_kind(path) == "a pickle" else None


def _of_upstream(url: str) -> Optional[Path]:
    """The pickle that upstream's scripts have downloaded from `url`, in the cache of their dnnlib; read as any other.

    Found by the rule of dnnlib: the one file whose name begins with the address's MD5, put there by a rename.
    """
    home = os.environ.get("DNNLIB_CACHE_DIR") or Path.home() / ".cache" / "dnnlib"
    found = list((Path(home) / "downloads").glob(hashlib.md5(url.encode()).hexdigest() + "_*"))
    return found[0] if len(found) == 1 and found[0].is_file() and file_kind(found[0]) == "a pickle" else None


def _is_weight_file(path: Path) -> bool:
    """Whether a file is read as our own kind: a zip of torch.save, or named as one and no pickle."""
    try:
        kind = file_kind(path)
    except OSError as error:
        raise NetworkError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    return "torch.save" in kind or (path.suffix in (".pt", ".pth") and kind != "a pickle")


def _pickled(
    path: Path, spec: str, device: Union[str, torch.device], options: Tuple[Optional[str], float, Optional[int]],
    trust: bool, quiet: bool,
) -> Network:
    """A network pickle, guided if asked for, after one trial evaluation."""
    gnet, guidance, class_idx = options
    pickled = load_network_pickle(path, trust)
    guide_path = None if gnet is None else _file(gnet, quiet, "--gnet: ", "the path or address of a network pickle")
    guide = None if guide_path is None else load_network_pickle(guide_path, trust)
    nets = [item.net.to(device) for item in (pickled, guide) if item is not None]
    denoiser = NetworkDenoiser(*nets, guidance=guidance, class_idx=class_idx).eval().requires_grad_(False)
    denoiser.trial(spec)
    details: Dict[str, Any] = {"class": pickled.class_name, "sources": pickled.sources, "class_idx": class_idx}
    if guide_path is not None:
        details.update(guidance=guidance, gnet=Path(urlsplit(gnet).path).name, gnet_sha256=sha256_of(guide_path))
    name = Path(urlsplit(spec).path if is_url(spec) else spec).stem
    return Network(denoiser, name, sha256_of(path), details, pickled.encoder)


def classifier_kind(path: Path) -> Optional[type]:
    """The class whose weights a file holds, LeNet or ResNet; None for any other file."""
    try:
        content = load_tensors(path)
    except (PickleError, OSError):
        return None
    found = content.get("format") if isinstance(content, dict) else None
    return next((kind for kind in (LeNet, ResNet) if FORMATS[kind] == found), None)


def load_classifier(kind: type, path: Optional[Path] = None) -> torch.nn.Module:
    """The bundled classifier of `kind` (LeNet or ResNet), or one from a weight file."""
    path = path or bundled(f"{kind.__name__.lower()}.pt")
    return _fill(kind, _read(path, kind), path)


def _made(spec: str, device: Union[str, torch.device]) -> Network:
    """What the user's `package.module:factory` returns; the current folder is searched as with `python -m`."""
    module, _, name = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), name)
        made = factory()
        sources = _own_sources(module)
    except Exception as error:  # whatever the user's code raises
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        hint = "; put its folder on PYTHONPATH" if isinstance(error, ImportError) else ""
        raise NetworkError(f"{spec} could not be called ({reason}), expected a function that returns a Denoiser{hint}"
                           ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not isinstance(made, Denoiser):
        raise NetworkError(f"{spec} returned a {type(made).__name__}, expected an art_edm.models.denoiser.Denoiser; a "
                           "network like EDM's becomes one by art_edm.models.nvlabs.NetworkDenoiser(net)")
    made = made.to(device).eval().requires_grad_(False)
    digest = hashlib.sha256()
    for source in {type(part).__module__ for part in made.modules()} - set(sources):  # classes of installed packages
        path = getattr(sys.modules.get(source), "__file__", None)
        if path and not source.startswith("torch."):
            sources[source] = Path(path).read_bytes()
    for source in sorted(sources):
        digest.update(sources[source])
    for key, value in made.state_dict().items():
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return Network(made, name, digest.hexdigest(), {"factory": spec})


def _own_sources(module: str) -> Dict[str, bytes]:
    """Name -> content of the file of `module` and of all that it imports, in turn, but for installed packages."""
    known = {Path(sysconfig.get_path("stdlib")).resolve(), Path(__file__).resolve().parents[1]}
    found: Dict[str, bytes] = {}
    queue = [module]
    while queue:
        name = queue.pop()
        with suppress(ImportError, AttributeError, ValueError, OSError, SyntaxError):  # of what is no module
            spec = None if name in found else importlib.util.find_spec(name)
            path = Path(spec.origin).resolve() if spec and spec.has_location and spec.origin else None
            installed = path and ({"site-packages", "dist-packages"} & set(path.parts) or known & set(path.parents))
            if path and (not installed or name.split(".")[0] == module.split(".")[0]):
                found[name] = path.read_bytes()
                queue += _imports(found[name], spec.parent)
    return found


def _imports(source: bytes, package: str) -> List[str]:
    """Names that a module's source imports anywhere in it, functions too; some may be no modules."""
    names: List[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def _gaussian(spec: str) -> GaussianDenoiser:
    text = spec.split(":", 1)[1]
    try:
        std = float(text)
    except ValueError:
        std = float("nan")
    if not 0 < std < float("inf"):
        raise NetworkError(f"{spec!r} has standard deviation {text!r}; expected a positive number, e.g. gaussian:0.5")
    return GaussianDenoiser(0.0, std**2, img_shape=(1, 8, 8))


def _read(path: Path, kind: type) -> dict:
    """The content of a weight file of `kind`; no code in the file is ever executed."""
    try:
        content = load_tensors(path)
    except OSError as error:
        raise NetworkError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    except PickleError as error:
        reason = "is truncated or not a weight file of art_edm" if path.stat().st_size else "is empty"
        detail = str(error).replace(f"{path}: ", "", 1)
        expected = f"expected a weight file written by train_mnist.py or train_cifar10.py; {SNAPSHOT}"
        raise NetworkError(f"{path} {reason} ({detail}); {expected}") from None
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMATS[kind]:
        expected = f"{FORMATS[kind]!r} as train_mnist.py or train_cifar10.py writes it; {SNAPSHOT}"
        raise NetworkError(f"{path} holds {found!r}, expected {expected}")
    return content


def _fill(kind: type, content: dict, path: Path) -> torch.nn.Module:
    try:
        state = {key: value.float() for key, value in content["state"].items()}
        for key, size in content["config"].items():
            if not (isinstance(size, float) or (isinstance(size, int) and 0 < size <= LARGEST_SIZE)):
                raise ValueError(f"found {key} = {str(size)[:20]}, expected 1 to {LARGEST_SIZE}")
        net = kind(**content["config"])
        net.load_state_dict(state)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        message = f"{path} does not fit {kind.__name__}: {first}; train it again"
        raise NetworkError(message) from None
    return net.eval().requires_grad_(False)


def _save(path: Path, net: torch.nn.Module, config: dict) -> None:
    state = {key: value.half() if value.is_floating_point() else value for key, value in net.state_dict().items()}
    content = {"format": FORMATS[type(net)], "config": config, "state": state}
    save_tensors(path, content)


def save_network(path: Path, net: ScoreUNet) -> None:
    """Write the score network in half precision."""
    _save(path, net, net.config)


def save_classifier(path: Path, net: torch.nn.Module) -> None:
    """Write a classifier in half precision."""
    _save(path, net, {})
