"""Arrays and tensors out of pickles, bit for bit what numpy's and torch's own loading give."""

from __future__ import annotations

import io
import pickle
import struct
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch

from art_edm.pickles.machine import PickleError, read_pickle
from art_edm.pickles.records import Global
from art_edm.pickles.tensors import read_storage
from art_edm.pickles.values import load_data, to_data
from tests.support.pickle_stand_ins import EasyDict, dumps

PROTOCOLS = range(6)
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]


def read(raw):
    return to_data(read_pickle(raw))


def refused(raw, match):
    with pytest.raises(PickleError, match=match) as caught:
        read(raw)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


ARRAYS = [
    np.arange(6, dtype="<f8").reshape(2, 3), np.arange(6, dtype=">f4").reshape(3, 2), np.float16([[1.5], [2]]),
    np.asfortranarray(np.arange(12, dtype=np.int32).reshape(3, 4)), np.zeros((0, 3)), np.array(2.5), np.bool_([1, 0]),
    np.complex64([1j, 2]), np.uint8(range(256)), np.arange(10, dtype=np.int64)[::2], np.array([[-0.0, np.nan, np.inf]]),
]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
def test_arrays(array, protocol):
    raw = pickle.dumps({"x": array}, protocol)
    made, expected = read(raw)["x"], pickle.loads(raw)["x"]
    assert made.dtype == expected.dtype and made.shape == expected.shape
    assert made.size == 0 or made.strides == expected.strides
    assert made.tobytes() == expected.tobytes() and made.flags.writeable


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("scalar", [np.float64(0.1), np.float32(0.1), np.int64(-3), np.bool_(True), np.complex128(1j)])
def test_scalars(scalar, protocol):
    made = read(pickle.dumps(scalar, protocol))
    assert type(made) is type(scalar) and made == scalar


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_both_spellings_of_numpy(module):
    other = {b"numpy._core.multiarray": b"numpy.core.multiarray", b"numpy.core.multiarray": b"numpy._core.multiarray"}
    raw = pickle.dumps(np.arange(3.0), 2)
    for name, twin in other.items():
        if name in raw and name.decode() != module:
            raw = raw.replace(name, twin)
    assert module.encode() in raw and read(raw).tolist() == [0, 1, 2]


@pytest.mark.parametrize("old, new, match", [
    (b"f8", b"O8", "'O8'"), (b"f8", b"V8", "'V8'"), (b"f8", b"U8", "'U8'"), (b"f8", b"M8", "'M8'"),
    (b"<", b"x", "state"), (b"K\x03\x85", b"K\x04\x85", "shape"),  # 3 elements are there, not 4
])
def test_an_altered_array_is_refused(old, new, match):
    raw = pickle.dumps(np.arange(3.0), 2)
    at = raw.rindex(old)
    refused(raw[:at] + new + raw[at + len(old):], match)
    assert read(raw).tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", [np.array([1, "a", None], object), np.array(["a"]), np.array([b"a"]),
                                   np.array([(1, 2.0)], "i4,f8"), np.array(["2020-01-01"], "M8[D]")])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_arrays_of_anything_but_numbers_are_refused(value, protocol):
    refused(pickle.dumps(value, protocol), "expected numbers")


def tensors(dtype):
    base = (torch.arange(24) % 7).to(dtype)
    return [base.reshape(2, 3, 4), base[5:17].reshape(3, 4).t(), base[::5], base[3], base[:0].reshape(0, 4),
            base.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)]


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors(dtype, protocol):
    raw = pickle.dumps(tensors(dtype), protocol)
    for made, expected in zip(read(raw), tensors(dtype)):
        assert made.dtype == dtype and made.shape == expected.shape and made.stride() == expected.stride()
        assert torch.equal(made, expected) and not made.requires_grad


def test_a_parameter_and_what_is_shared():
    weight = torch.nn.Parameter(torch.randn(3))
    made = read(pickle.dumps([weight, weight, weight.detach()], 4))
    assert isinstance(made[0], torch.nn.Parameter) and not made[0].requires_grad and made[0] is made[1]
    assert torch.equal(made[0], weight) and not isinstance(made[2], torch.nn.Parameter)


def storage_bytes(tensor):
    file = io.BytesIO()
    torch.save(tensor._typed_storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.mark.parametrize("location", [b"cuda:0", b"mps", b"whereever"])
def test_a_storage_of_another_device_comes_to_the_cpu(location):
    raw = storage_bytes(torch.tensor([1.5, 2.5]))
    text = b"X\x03\x00\x00\x00cpu"
    assert raw.count(text) == 1
    moved = raw.replace(text, b"X" + struct.pack("<I", len(location)) + location)
    assert read_storage(moved).data.tolist() == [1.5, 2.5] and read_storage(moved).data.device.type == "cpu"
    if location == b"cuda:0" and not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(io.BytesIO(moved), weights_only=False)


def test_a_cuda_class_of_storage():
    raw = storage_bytes(torch.tensor([1.5, 2.5])).replace(b"ctorch\nFloat", b"ctorch.cuda\nFloat")
    assert b"torch.cuda" in raw and read_storage(raw).data.tolist() == [1.5, 2.5]


ONE = struct.pack("<q", 1)


@pytest.mark.parametrize("old, new, match", [
    (b"FloatStorage", b"SparseStorag", "torch.SparseStorag"), (b"ctorch\nFloat", b"cos\nFloat", "os.FloatStorage"),
    (b"FloatStorage", b"LongStorage", "another length"), (b"\x88", b"\x89", "unknown format"),  # little endian: True
    (b"M\xe9\x03.", b"M\xea\x03.", "unknown format"), (b"storage", b"storagf", "something else"),
    (ONE, struct.pack("<q", 2), "impossible content"), (ONE, struct.pack("<q", -1), "impossible content"),
    (b"K\x01N", b"J\xff\xff\xff\xffN", "another length"), (b"K\x01N", b"J\x00\x00\x00\x40N", "another length"),
    (b"K\x01N", b"K\x01K\x00", "unknown form"), (b"\x00\x00\xc0\x3f", b"\x00\x00\xc0\x3f\x00", "another length"),
    (b"\x00\x00\xc0\x3f", b"\x00\x00\xc0", "another length"), (ONE, b"", "another length"),
])
def test_an_altered_storage_is_refused(old, new, match):
    raw = storage_bytes(torch.tensor([1.5]))
    at = raw.rindex(old)
    with pytest.raises(PickleError, match=match):
        read_storage(raw[:at] + new + raw[at + len(old):])
    assert read_storage(raw).data.tolist() == [1.5]


def test_truth_values_are_0_and_1():
    raw = storage_bytes(torch.tensor([True, False]))
    assert read_storage(raw).data.tolist() == [True, False]
    with pytest.raises(PickleError, match="impossible content"):
        read_storage(raw[:-1] + b"\x02")


def test_a_zip_in_place_of_a_storage_is_refused():
    file = io.BytesIO()
    torch.save(torch.ones(2)._typed_storage(), file)
    with pytest.raises(PickleError, match="stored as a zip"):
        read_storage(file.getvalue())


class Built:
    """Asks for torch._utils._rebuild_tensor_v2 with given size, stride and offset."""

    def __init__(self, size, stride, offset=0, hooks=None):
        self.rest = (offset, size, stride, False, OrderedDict() if hooks is None else hooks)

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.arange(6.0)._typed_storage(), *self.rest)


@pytest.mark.parametrize("size, stride, offset, hooks", [
    ((7,), (1,), 0, None), ((6,), (1,), 1, None), ((2, 3), (4, 1), 0, None), ((10**9,), (0,), 0, None),
    ((7,), (0,), 0, None), ((3,), (-1,), 2, None), ((-3,), (1,), 0, None), ((6,), (1,), -1, None),
    ((0,), (1,), 7, None), ((2, 3), (1,), 0, None), ((2**62, 2**62, 0), (1, 1, 1), 0, None), ((True,), (1,), 0, None),
    ([6], [1], 0, None),
    ((1,) * 65, (1,) * 65, 0, None), ((6.0,), (1,), 0, None), ((6,), (1,), 0, {"hook": 1}),
])
def test_a_tensor_beyond_its_storage_is_refused(size, stride, offset, hooks):
    tracemalloc.start()
    refused(pickle.dumps(Built(size, stride, offset, hooks)), "shape|parts")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert read(pickle.dumps(Built((3, 2), (1, 3)))).tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_dictionaries_of_other_kinds(protocol):
    raw = dumps(lambda _: [EasyDict(a=1, b=[2]), OrderedDict(z=1, a=EasyDict())], protocol=protocol)
    made = read(raw)
    assert made == [{"a": 1, "b": [2]}, {"z": 1, "a": {}}] and list(made[1]) == ["z", "a"]
    assert type(made[0]) is dict and type(made[1]) is OrderedDict


@pytest.mark.parametrize("raw, match", [
    (b"c__builtin__\nbytearray\n(\x8a\x05\x00\x10\xa5\xd4\xe8tR.", "arguments"),  # bytearray(10**12)
    (b"c__builtin__\nbytes\n(\x8a\x05\x00\x10\xa5\xd4\xe8tR.", "arguments"),
    (b"c__builtin__\nset\n((]ltR.", "a list as a key"), (b"ccollections\nOrderedDict\n)R}b.", "a state"),
    (b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x05\x00\x00\x00rot13tR.", "arguments"),
    (b"cnumpy\nndarray\n.", "by itself"), (b"cnumpy\nndarray\n)R.", "a call of numpy.ndarray"),
    (b"\x80\x04ccollections\nOrderedDict\n)}X\x01\x00\x00\x00aNs\x92.", "keywords"),
    (b"ccopy_reg\n_reconstructor\n(cdnnlib.util\nEasyDict\nc__builtin__\nlist\n]tR.", "a base"),
    (b"ccopy_reg\n_reconstructor\n(NNNtR.", "a class"), (b"ccollections\nOrderedDict\n(K\x01tR.", "arguments"),
    (b"Pid\n.", "Persistent by itself"), (b"ctorch.storage\n_load_from_bytes\n(NtR.", "arguments"),
])
def test_calls_that_are_refused(raw, match):
    refused(raw, match)


def test_reference_statistics(tmp_path):
    stats = {"fid": {"mu": np.arange(3.0), "sigma": np.eye(3)}, "fd_dinov2": {"mu": np.zeros(2, np.float32)}}
    (tmp_path / "ref.pkl").write_bytes(pickle.dumps(stats))
    made = load_data(tmp_path / "ref.pkl")
    assert made["fid"]["mu"].tolist() == [0, 1, 2] and np.array_equal(made["fid"]["sigma"], np.eye(3))
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps({"fid": Global("os", "system")}))
    with pytest.raises(PickleError, match="^[^\n]*bad.pkl: found a reference to [^\n]*Global[^\n]*$"):
        load_data(tmp_path / "bad.pkl")
