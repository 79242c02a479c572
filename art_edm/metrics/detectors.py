"""Feature detectors by name or path: what turns images into the features that distances are taken between.

    inception     NVIDIA's Inception-v3, downloaded once; the network of the published FIDs
    lenet         the bundled LeNet: 84 penultimate features of grey 28 x 28 images (section 6.4)
    cifar10       the bundled ResNet: 256 penultimate features of 32 x 32 images in colour
    F.pt          lenet.pt or resnet.pt as the trainings of this project write them: penultimate features of images of
                  the size they are for
    F.pt, URL     any TorchScript that is called alike: net(x, return_features=True) -> [B, d]; for the Inception
                  score net(x, no_output_bias=True) -> class probabilities [B, k]; x uint8 [B, 3, H, W]
    F.pkl, URL    a pickled network with the same call

A TorchScript is a program and a pickle contains one: both can write any file that the user can. Only `inception`, which
is known by its hash, runs without the user's consent. Grey images are repeated to three channels, except for those.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Tuple

import torch
from torch.nn import functional

from art_edm.models.loading import bundled, classifier_kind, load_classifier
from art_edm.pickles.records import PickleError
from art_edm.pickles.trusted import load_trusted
from art_edm.runtime.download import download, is_url
from art_edm.runtime.files import file_kind, sha256_of

__all__ = ["INCEPTION_SHA256", "INCEPTION_URL", "CallDetector", "Detector", "DetectorError", "ClassifierDetector",
           "load_detector"]

INCEPTION_URL = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/inception-2015-12-05.pt"
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
BUNDLED = {"lenet": "lenet.pt", "cifar10": "resnet.pt"}  # name -> file in art_edm/weights


class DetectorError(ValueError):
    """A detector that cannot be used; the message is one line."""


class Detector:
    """What any detector offers.

    Attributes:
        name: short, for messages and provenance.
        sha256: of the file it came from.
        dim: number of features d.
        classes: number of class probabilities k; 0 if it has none, or none were asked for.
    """

    name: str
    sha256: str
    dim: int
    classes: int

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, C, H, W] -> features [B, d]."""
        raise NotImplementedError

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, C, H, W] -> class probabilities [B, k]."""
        raise NotImplementedError

    def outputs(self, images: torch.Tensor, names: Iterable[str]) -> Dict[str, torch.Tensor]:
        """"features" and "probabilities", those that are named; of one run of the network where it can be."""
        return {name: getattr(self, name)(images) for name in names}


class ClassifierDetector(Detector):
    """A classifier of this project, LeNet or the ResNet, on images of the size it is for."""

    classes = 10

    def __init__(self, net: torch.nn.Module, sha256: str) -> None:
        self.name, self.sha256, self._net = type(net).__name__.lower(), sha256, net
        self.dim = net.num_features

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self._net.features(images.to(torch.float32) / 127.5 - 1)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        return functional.softmax(self._net.classify(self.features(images)), dim=1)

    @torch.no_grad()
    def outputs(self, images: torch.Tensor, names: Iterable[str]) -> Dict[str, torch.Tensor]:
        features = self.features(images)
        found = {"features": features, "probabilities": functional.softmax(self._net.classify(features), dim=1)}
        return {name: found[name] for name in names}


class CallDetector(Detector):
    """A network that is called as NVIDIA's Inception is; `dim` and `classes` are found by one black image.

    Args:
        net: callable, already on the device.
        shape: (C, H, W) of the images to come.
        scores: whether probabilities will be asked for.
    Raises:
        DetectorError: the network cannot be called in this way.
    """

    def __init__(
        self, net: Any, name: str, sha256: str, shape: Tuple[int, int, int], device: torch.device, scores: bool = False
    ) -> None:
        self.name, self.sha256, self._net = name, sha256, net
        black = torch.zeros(1, *shape, dtype=torch.uint8, device=device)
        self.dim = self._width(self.features, black, "return_features=True")
        self.classes = self._width(self.probabilities, black, "no_output_bias=True") if scores else 0
        self._readout = self._find_readout(shape, device) if scores else None  # [d, k]

    def _width(self, call: Any, image: torch.Tensor, how: str) -> int:
        try:
            values, found = call(image), ""
            if not isinstance(values, torch.Tensor) or values.ndim != 2 or not values.is_floating_point():
                shape = f" of shape {list(values.shape)}" if isinstance(values, torch.Tensor) else ""
                found = f"{type(values).__name__}{shape}"
            elif call == self.probabilities and (values.min() < 0 or abs(float(values.sum()) - 1) > 1e-3):
                found = f"values that add up to {float(values.sum()):g}"
        except Exception as error:  # whatever a foreign network raises
            found = f"{type(error).__name__} ({_last_line(error)})"
        if found:
            wanted = "probabilities [B, k]" if call == self.probabilities else "floats [B, d]"
            raise DetectorError(f"{self.name}: net(images, {how}) gave {found} for a black image {list(image.shape)}, "
                                f"expected {wanted}; is it a detector such as NVIDIA's?")
        return values.shape[1]

    @torch.no_grad()
    def _find_readout(self, shape: Tuple[int, int, int], device: torch.device) -> Optional[torch.Tensor]:
        """The matrix among the weights whose softmax(features matrix) is the probabilities, as trial images show."""
        noise = torch.randint(0, 256, (4, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        features, expected = self.features(noise.to(device)), self.probabilities(noise.to(device))
        for weight in self._net.state_dict().values() if isinstance(self._net, torch.nn.Module) else ():
            for matrix in (weight, weight.T) if weight.ndim == 2 else ():
                if matrix.shape == (self.dim, self.classes) and matrix.dtype == features.dtype:
                    found = functional.softmax(features @ matrix, dim=1)
                    if torch.allclose(found, expected.to(found.dtype), rtol=1e-4, atol=1e-7):
                        return matrix
        return None

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self._net(_as_rgb(images), return_features=True)

    @torch.no_grad()
    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        return self._net(_as_rgb(images), no_output_bias=True)

    @torch.no_grad()
    def outputs(self, images: torch.Tensor, names: Iterable[str]) -> Dict[str, torch.Tensor]:
        names = set(names)
        if names != {"features", "probabilities"} or self._readout is None:
            return super().outputs(images, names)
        features = self.features(images)
        return {"features": features, "probabilities": functional.softmax(features @ self._readout, dim=1)}


def load_detector(
    spec: str, shape: Tuple[int, int, int], device: torch.device, scores: bool = False, sha256: Optional[str] = None,
    trust: bool = False, quiet: bool = False,
) -> Detector:
    """The detector that `spec` (see the module's docstring) names, ready for images of `shape` (C, H, W).

    Args:
        scores: make sure that it gives class probabilities.
        sha256: what its file must have; None accepts any, except of `inception`, which is pinned. Consent to run a
            TorchScript of that hash.
        trust: consent to run a TorchScript or the code in a pickle.
    Raises:
        DetectorError: it cannot be used; one line.
        DownloadError, DownloadRefused: of a URL.
    """
    if spec == "inception":
        spec, sha256 = INCEPTION_URL, sha256 or INCEPTION_SHA256
    pickled = spec.split("?")[0].lower().endswith(".pkl")
    if pickled and not trust:
        raise DetectorError(f"{spec}: found a pickle, which runs code when read, expected a TorchScript (.pt); "
                            "add --trust-pickle if you trust its source")
    path = _verified(bundled(BUNDLED[spec]) if spec in BUNDLED else _locate(spec, sha256, quiet), sha256)
    digest, kind = sha256_of(path), classifier_kind(path)
    if kind is not None:
        return _own(kind, path, tuple(shape), device)
    if not (trust or sha256 or digest == INCEPTION_SHA256):
        raise DetectorError(f"{spec}: found a TorchScript, which is a program and can write files, expected consent to "
                            f"run it; add --trust-detector, or --detector-sha256={digest}, if you trust its source")
    net = _read_pickle(path, device) if pickled else _read_script(path, device)
    return CallDetector(net, "inception" if digest == INCEPTION_SHA256 else spec, digest, shape, device, scores)


def _own(kind: type, path: Path, shape: Tuple[int, ...], device: torch.device) -> ClassifierDetector:
    """A classifier of this project, if the images are of the size it is for."""
    if shape != kind.img_shape:
        found, expected = ("{2}x{1} with {0} channel(s)".format(*size) for size in (shape, kind.img_shape))
        raise DetectorError(f"found images of {found}, expected {expected} for {kind.__name__}; choose another "
                            "--detector")
    return ClassifierDetector(load_classifier(kind, path).to(device), sha256_of(path))


def _locate(spec: str, sha256: Optional[str], quiet: bool) -> Path:
    if is_url(spec):
        return download(spec, sha256=sha256, quiet=quiet)
    path = Path(spec)
    if not path.is_file():
        raise DetectorError(f"{spec}: found no such file, expected inception, lenet, cifar10, a path or an "
                            "address; correct --detector")
    return path


def _verified(path: Path, sha256: Optional[str]) -> Path:
    if sha256 is not None and sha256_of(path) != sha256.lower():
        raise DetectorError(f"{path}: found SHA-256 {sha256_of(path)}, expected {sha256}; it is damaged or another "
                            "file: get it again")
    return path


def _read_script(path: Path, device: torch.device) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates TorchScript, of which the published network is
            return torch.jit.load(str(path), map_location=device).eval()
    except Exception as error:  # torch raises several kinds for damaged files
        found = f"{file_kind(path)}, no readable TorchScript ({type(error).__name__}: {_last_line(error)})"
        raise DetectorError(f"{path}: found {found}, expected one; get it again") from None


def _read_pickle(path: Path, device: torch.device) -> Any:
    """The network in a pickle that the user trusts, by the reader of trusted network pickles."""
    try:
        net = load_trusted(path)[0]
    except PickleError as error:
        raise DetectorError(f"{path}: found {file_kind(path)} that {error}") from None
    if not callable(net):
        raise DetectorError(f"{path}: found a pickled {type(net).__name__}, expected a network; is it a detector?")
    return net.to(device).eval() if isinstance(net, torch.nn.Module) else net


def _as_rgb(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1).contiguous() if images.shape[1] == 1 else images


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[-1].strip()[:120]
