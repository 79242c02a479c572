"""Detectors: TorchScript of NVIDIA's interface from a path and a server, pickles on request, LeNet."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys

import pytest
import torch

from art_edm.metrics import detectors
from art_edm.metrics.detectors import DetectorError, load_detector
from art_edm.models.lenet import LeNet
from art_edm.models.loading import load_classifier, save_classifier
from art_edm.models.resnet import ResNet
from art_edm.pickles import trusted
from art_edm.runtime.download import DownloadRefused
from tests.support.loopback import Loopback, whole
from tests.support.upstream import checkouts

CPU, SHAPE = torch.device("cpu"), (3, 6, 5)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Script(torch.nn.Module):
    """The interface of NVIDIA's TorchScript: sums of channels and their products as features."""

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False,
                no_output_bias: bool = False):
        x = img.to(torch.float32).flatten(2).sum(2)
        features = torch.cat([x, x * x[:, :1]], dim=1)
        if return_features:
            return features
        return torch.softmax(x / 1000 + (0.0 if no_output_bias else 1.0) * torch.arange(3), dim=1)


class Plain(Script):
    """The same, to be pickled."""


class Logits(Script):
    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        x = img.to(torch.float32).flatten(1)[:, :4] - 1
        return x


class Flat(Script):
    def forward(self, img: torch.Tensor, return_features: bool = False):
        return img.to(torch.float32).flatten(1).sum(1)


class Fixed(torch.nn.Module):
    """Takes images of 8 x 8 only, and no other call."""

    def forward(self, img: torch.Tensor):
        return img.to(torch.float32).reshape(-1, 192)


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    for net in (Script(), Logits(), Flat(), Fixed()):
        torch.jit.script(net).save(str(folder / f"{type(net).__name__}.pt"))
    return folder


def images(channels, seed=0):
    return torch.randint(0, 256, (7, channels, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_script_by_path(scripts):
    path = scripts / "Script.pt"
    detector = load_detector(str(path), SHAPE, CPU, scores=True, sha256=sha256(path).upper())
    x = images(3)
    sums = x.double().sum(dim=(2, 3))
    expected = torch.cat([sums, sums * sums[:, :1]], dim=1)
    torch.testing.assert_close(detector.features(x).double(), expected, rtol=1e-6, atol=0)
    assert (detector.dim, detector.classes, detector.sha256) == (6, 3, sha256(path))
    unbiased = torch.softmax(sums / 1000, dim=1)
    torch.testing.assert_close(detector.probabilities(x).double(), unbiased, rtol=1e-4, atol=1e-12)
    assert (Script()(x).double() - unbiased).abs().max() > 1e-3  # called without no_output_bias
    assert load_detector(str(path), SHAPE, CPU, trust=True).classes == 0


def test_grey_is_repeated(scripts):
    detector, x = load_detector(str(scripts / "Script.pt"), (1, 6, 5), CPU, trust=True), images(1)
    assert torch.equal(detector.features(x), detector.features(x.repeat(1, 3, 1, 1)))
    assert not torch.equal(detector.features(x), detector.features(torch.cat([x, x * 0, x * 0], dim=1)))


def test_inception_comes_from_its_address_once_with_its_hash(scripts, tmp_path, monkeypatch):
    """The published file is not at hand: a stand-in takes its place on a server and in the pinned hash."""
    monkeypatch.setenv("ART_EDM_CACHE", str(tmp_path))
    blob = (scripts / "Script.pt").read_bytes()
    assert detectors.INCEPTION_URL.startswith("https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/")
    assert detectors.INCEPTION_SHA256.startswith("f58cb9b6") and len(detectors.INCEPTION_SHA256) == 64
    with Loopback() as server:
        monkeypatch.setattr(detectors, "INCEPTION_URL", server.on("/metrics/inception-2015-12-05.pt", whole(blob)))
        found = hashlib.sha256(blob).hexdigest()
        with pytest.raises(DownloadRefused, match=f"its SHA-256 is {found}, expected f58cb9b6"):
            load_detector("inception", SHAPE, CPU, quiet=True)
        monkeypatch.setattr(detectors, "INCEPTION_SHA256", found)
        before = len(server.asked)
        for _ in range(2):
            detector = load_detector("inception", SHAPE, CPU, quiet=True)
            assert (detector.name, detector.dim) == ("inception", 6)
        assert len(server.asked) == before + 1
        kept = next((tmp_path / "downloads").glob("*.pt"))
        kept.write_bytes(blob[:-1] + b"!")  # damaged in the cache: fetched again
        assert load_detector("inception", SHAPE, CPU, quiet=True).dim == 6 and len(server.asked) == before + 2


@pytest.mark.parametrize("name, scores, message", [
    ("Logits", True, r"no_output_bias=True\) gave values that add up to -4 for a black image \[1, 3, 6, 5\], "
     "expected probabilities"),
    ("Flat", False, r"gave Tensor of shape \[1\] .*expected floats \[B, d\]; is it a detector such as NVIDIA's"),
    ("Flat", True, "return_features=True"),
    ("Fixed", False, "return_features=True.* gave RuntimeError"),
])
def test_other_networks_are_refused(scripts, name, scores, message):
    with pytest.raises(DetectorError, match=message) as error:
        load_detector(str(scripts / f"{name}.pt"), SHAPE, CPU, scores, trust=True)
    assert "\n" not in str(error.value) and f"{name}.pt" in str(error.value)


def test_files_that_are_no_detectors(scripts, tmp_path):
    for content in (b"", b"text", (scripts / "Script.pt").read_bytes()[:500]):
        (tmp_path / "x.pt").write_bytes(content)
        with pytest.raises(DetectorError, match="x.pt: found .*, no readable TorchScript .*; get it again") as error:
            load_detector(str(tmp_path / "x.pt"), SHAPE, CPU, trust=True)
        assert "\n" not in str(error.value)
    with pytest.raises(DetectorError, match="nothing.pt: found no such file, expected inception, lenet, cifar10"):
        load_detector("nothing.pt", SHAPE, CPU)


def test_a_wrong_hash(scripts):
    with pytest.raises(DetectorError, match=f"Script.pt: found SHA-256 {sha256(scripts / 'Script.pt')}, expected 00"):
        load_detector(str(scripts / "Script.pt"), SHAPE, CPU, sha256="0" * 64)
    with pytest.raises(DetectorError, match="expected 00"):
        load_detector("lenet", (1, 28, 28), CPU, sha256="0" * 64)


class Writes(torch.nn.Module):
    """A detector that writes a file while it runs."""

    def __init__(self, target: str):
        super().__init__()
        self.target = target

    def forward(self, img: torch.Tensor, return_features: bool = False):
        written = torch.from_file(self.target, shared=True, size=4, dtype=torch.float32).fill_(1.0)
        return img.to(torch.float32).flatten(1)[:, :4] + written


def test_a_script_is_a_program_and_needs_consent(tmp_path):
    target, path = tmp_path / "written", tmp_path / "evil.pt"
    torch.jit.script(Writes(str(target))).save(str(path))
    with pytest.raises(DetectorError, match="evil.pt: found a TorchScript, which is a program.*--trust-detector, or "
                                            f"--detector-sha256={sha256(path)}"):
        load_detector(str(path), SHAPE, CPU)
    assert not target.exists()
    for consent in (dict(trust=True), dict(sha256=sha256(path))):  # the twin: with consent it writes
        assert load_detector(str(path), SHAPE, CPU, **consent).dim == 4 and target.exists()
        target.unlink()


class Counted(torch.nn.Module):
    """Features by one matrix and probabilities by another, as NVIDIA's network has them; counts its runs."""

    def __init__(self, shift=0.0):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.inner, self.shift, self.runs = torch.nn.Linear(90, 7), shift, 0
        self.output = torch.nn.Linear(7, 5)
        with torch.no_grad():
            self.inner.weight.normal_(generator=rng), self.output.weight.normal_(generator=rng)

    def forward(self, img, return_features=False, no_output_bias=False):
        self.runs += 1
        features = torch.tanh(self.inner(img.float().flatten(1) / 255))
        return features if return_features else torch.softmax(features @ self.output.weight.T + self.shift * features[
            :, :5], dim=1)


def test_features_and_probabilities_of_one_run():
    images_ = images(3)
    for shift, runs in ((0.0, 1), (0.5, 2)):  # the twin: probabilities that are no such softmax need their own run
        net = Counted(shift)
        detector = detectors.CallDetector(net, "d", "0", SHAPE, CPU, scores=True)
        net.runs = 0
        found = detector.outputs(images_, ["features", "probabilities"])
        assert net.runs == runs
        torch.testing.assert_close(found["features"], detector.features(images_))
        torch.testing.assert_close(found["probabilities"], detector.probabilities(images_))
        assert list(detector.outputs(images_, ["features"])) == ["features"]
    lenet = load_detector("lenet", (1, 28, 28), CPU)
    digits = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    torch.testing.assert_close(lenet.outputs(digits, ["probabilities"])["probabilities"], lenet.probabilities(digits))


# --- pickles -----------------------------------------------------------------------------------------


class Runs:
    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_runs_only_on_request(tmp_path, capsys):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(DetectorError, match="x.pkl: found a pickle, which runs code when read.*--trust-pickle"):
        load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU)
    assert capsys.readouterr().out == ""
    with pytest.raises(DetectorError, match="found a pickled NoneType"):
        load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU, trust=True)
    assert capsys.readouterr().out == "ran\n"


def test_a_trusted_pickle_is_the_network(tmp_path, scripts):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Plain()))
    detector = load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU, scores=True, trust=True)
    script = load_detector(str(scripts / "Script.pt"), SHAPE, CPU, scores=True, trust=True)
    x = images(3)
    assert torch.equal(detector.features(x), script.features(x)) and detector.sha256 == sha256(tmp_path / "x.pkl")
    assert torch.equal(detector.probabilities(x), script.probabilities(x))
    assert not torch.equal(detector.features(x), script.features(images(3, seed=1)))


def test_a_hash_is_looked_at_before_a_pickle_runs(tmp_path, capsys):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(DetectorError, match="found SHA-256"):
        load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU, sha256="0" * 64, trust=True)
    assert capsys.readouterr().out == ""


def test_pickles_that_cannot_be_read(tmp_path, monkeypatch):
    missing = "could not be unpickled .ModuleNotFoundError: No module named 'no_such_module'.*on PYTHONPATH"
    upstream = "upstream's modules are needed; get them with: python tools/patch_upstream.py"
    monkeypatch.delenv("ART_EDM_UPSTREAM", raising=False)
    monkeypatch.setattr(trusted, "find_checkout", lambda: None)
    for content, message in ((b"", "an empty file that could not be unpickled .EOFError"),
                             (b"cno_such_module\nx\n.", missing), (b"ctorch_utils.persistence\nx\n.", upstream)):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(DetectorError, match=message):
            load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU, trust=True)
    assert "no_such_module" not in sys.modules


# --- LeNet -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind, file", [("lenet", LeNet, "lenet.pt"), ("cifar10", ResNet, "resnet.pt")])
def test_features_are_those_of_the_bundled_classifier(name, kind, file):
    detector = load_detector(name, kind.img_shape, CPU, scores=True)
    x = torch.randint(0, 256, (5, *kind.img_shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    net, scaled = load_classifier(kind), x.float() / 127.5 - 1
    assert torch.equal(detector.features(x), net.features(scaled)) and detector.features(x).shape == (5, detector.dim)
    torch.testing.assert_close(detector.probabilities(x), net(scaled).exp() / net(scaled).exp().sum(1, keepdim=True))
    assert (detector.features(x) - net.features(x.float() / 255)).abs().max() > 1e-2  # another scale
    assert detector.sha256 == sha256(detectors.bundled(file))


class ToLoad:
    """Pickles as a network with a matrix that was made on a GPU does."""

    def __reduce__(self):
        buffer = io.BytesIO()
        torch.save(torch.eye(90)[:, :3], buffer, _use_new_zipfile_serialization=False)
        blob = buffer.getvalue().replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
        return Stored, (OfBytes(blob),)


class OfBytes:
    def __init__(self, blob):
        self.blob = blob

    def __reduce__(self):
        return torch.storage._load_from_bytes, (self.blob,)


class Stored(torch.nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, img, return_features=False):
        return img.float().flatten(1) @ self.matrix


def test_a_trusted_pickle_brings_tensors_of_a_gpu_here(tmp_path):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(ToLoad()))
    x = images(3)
    found = load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU, trust=True).features(x)
    assert torch.equal(found, x.float().flatten(1)[:, :3])
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            pickle.loads((tmp_path / "x.pkl").read_bytes())  # the twin: Python's own reader


@pytest.mark.upstream
def test_a_trusted_pickle_finds_upstreams_modules(tmp_path, monkeypatch):
    monkeypatch.setenv("ART_EDM_UPSTREAM", str(checkouts()))
    (tmp_path / "x.pkl").write_bytes(b"cdnnlib.util\nEasyDict\n.")
    with monkeypatch.context() as patch:  # the twin: without the checkout it is not found
        patch.setattr(trusted, "find_checkout", lambda: None)
        with pytest.raises(DetectorError, match="upstream's modules are needed"):
            load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU, trust=True)
    with pytest.raises(DetectorError, match=r"return_features=True\) gave"):  # it is found, and is no detector
        load_detector(str(tmp_path / "x.pkl"), SHAPE, CPU, trust=True)


@pytest.mark.parametrize("shape", [(3, 28, 28), (1, 32, 32)])
def test_lenet_takes_digits_only_and_the_resnet_none(shape):
    size = f"{shape[2]}x{shape[1]} with {shape[0]} channel"
    with pytest.raises(DetectorError, match=rf"found images of {size}.*expected 32x32 with 3 .* for ResNet"):
        load_detector("cifar10", shape, CPU)
    with pytest.raises(DetectorError, match=rf"found images of {size}.*expected 28x28 with 1 .* for LeNet"):
        load_detector("lenet", shape, CPU)


def test_a_classifier_of_our_own_is_read_from_its_weight_file(tmp_path):
    """No consent is asked for: such a file is data."""
    torch.manual_seed(0)
    net, path = ResNet().eval(), tmp_path / "resnet.pt"
    save_classifier(path, net)
    detector = load_detector(str(path), (3, 32, 32), CPU, scores=True)
    x = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        features = net.features(x / 127.5 - 1)
        expected = net(x / 127.5 - 1).softmax(dim=1)
    assert (detector.name, detector.dim, detector.classes, detector.sha256) == ("resnet", 256, 10, sha256(path))
    torch.testing.assert_close(detector.features(x), features, rtol=1e-2, atol=1e-3)  # half precision
    torch.testing.assert_close(detector.probabilities(x), expected, rtol=1e-2, atol=1e-3)
    assert (detector.features(x) - net.features(x / 255)).abs().max() > 1e-2  # the twin: another scale
    with pytest.raises(DetectorError, match=r"found images of 28x28 with 1 .*expected 32x32 with 3 .* for ResNet"):
        load_detector(str(path), (1, 28, 28), CPU)
