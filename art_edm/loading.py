"""From a name or a path to a denoiser.

    mnist         the bundled score network        gaussian:S    Gaussian data of standard deviation S
    oned          the paper's 1-D example          PATH          a weight file written by `save_network`
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple, Optional, Union

import torch

from .analytic import GaussianDenoiser, one_dimensional
from .denoiser import Denoiser
from .features import LeNet
from .files import save_tensors, sha256_of
from .unet import ScoreUNet

__all__ = ["NetworkError", "Network", "bundled", "load_lenet", "load_network", "save_lenet", "save_network"]

FORMATS = {ScoreUNet: "art_edm.score/1", LeNet: "art_edm.lenet/1"}


class NetworkError(ValueError):
    """A network name or weight file that cannot be used; the message says what to do."""


class Network(NamedTuple):
    """A denoiser and where it came from."""

    denoiser: Denoiser
    name: str  # short, used in file names
    sha256: Optional[str]  # of the weight file; None for a closed form


def bundled(name: str) -> Path:
    """Path of a file shipped with the package, in art_edm/weights."""
    return Path(__file__).parent / "weights" / name


def load_network(spec: str, device: Union[str, torch.device] = "cpu") -> Network:
    """Resolve `spec` (see the module's docstring) to a denoiser on `device`, ready for evaluation.

    Raises:
        NetworkError: unknown name; missing, empty, truncated or foreign file.
    """
    if spec == "oned":
        return Network(one_dimensional().to(device), "oned", None)
    if spec.startswith("gaussian:"):
        return Network(_gaussian(spec).to(device), spec.replace(":", ""), None)
    path = bundled("mnist.pt") if spec == "mnist" else Path(spec)
    if not path.is_file():
        looks_like_path = path.suffix or len(path.parts) > 1
        found = f"no file {path}" if looks_like_path else f"unknown network {spec!r}"
        raise NetworkError(f"{found}; expected mnist, oned, gaussian:S or the path of a weight file")
    build = _read(path, ScoreUNet)
    net = _fill(ScoreUNet, build, path).to(device, memory_format=torch.channels_last)
    return Network(net, "mnist" if spec == "mnist" else path.stem, sha256_of(path))


def load_lenet(path: Optional[Path] = None) -> LeNet:
    """The bundled LeNet, or one from a weight file."""
    path = path or bundled("lenet.pt")
    return _fill(LeNet, _read(path, LeNet), path)


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
        blob = path.read_bytes()
    except OSError as error:
        raise NetworkError(f"cannot read {path}: {error.strerror}; check its permissions") from None
    try:
        content = torch.load(io.BytesIO(blob), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for damaged files
        reason = "is truncated or not a weight file of art_edm" if blob else "is empty"
        expected = "expected a weight file written by train_mnist.py"
        raise NetworkError(f"{path} {reason} ({type(error).__name__}); {expected}") from None
    found = content.get("format") if isinstance(content, dict) else type(content).__name__
    if found != FORMATS[kind]:
        raise NetworkError(f"{path} holds {found!r}, expected {FORMATS[kind]!r}; is it a file of train_mnist.py?")
    return content


def _fill(kind: type, content: dict, path: Path) -> torch.nn.Module:
    try:
        net = kind(**content["config"])
        net.load_state_dict({key: value.float() for key, value in content["state"].items()})
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        message = f"{path} does not fit {kind.__name__}: {first}; train it again with train_mnist.py"
        raise NetworkError(message) from None
    return net.eval().requires_grad_(False)


def _save(path: Path, net: torch.nn.Module, config: dict) -> None:
    state = {key: value.half() for key, value in net.state_dict().items()}
    content = {"format": FORMATS[type(net)], "config": config, "state": state}
    save_tensors(path, content)


def save_network(path: Path, net: ScoreUNet) -> None:
    """Write the score network in half precision, readable with `weights_only`."""
    _save(path, net, net.config)


def save_lenet(path: Path, net: LeNet) -> None:
    """Write LeNet in half precision."""
    _save(path, net, {})
