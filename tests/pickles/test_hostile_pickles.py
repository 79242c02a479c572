"""Pickles that would run something or exhaust the memory: each is refused in one line, and nothing has run.

Every payload that can run something makes a file; the twin shows that it does so under Python's own pickle.
"""

from __future__ import annotations

import copyreg
import io
import itertools
import os
import pickle
import struct
import time
import tracemalloc

import numpy as np
import pytest
import torch

from art_edm.pickles.machine import PickleError, read_pickle
from art_edm.pickles.network import NetworkPickleError, UnknownSource, load_network_pickle
from art_edm.pickles.values import HANDLERS, _Converter, load_data
from tests.support.pickle_stand_ins import SOURCE, dumps, plain_loads, write_lock

NAME = "hostile-ran"  # of the file that a payload makes, in the working directory
COMMAND = f"touch {NAME}"
CODE = f"open({NAME!r}, 'w').close()"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


class Asks:
    """Reduces to whatever it is given."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def storage(raw):
    return Asks(torch.storage._load_from_bytes, (raw,))


def as_zip(item):
    file = io.BytesIO()
    torch.save(item, file)
    return file.getvalue()


def altered():
    """The stand-in's source with one byte changed, so that it runs something when it is executed."""
    source = SOURCE.replace("import numpy as np\n", f"import numpy as np\n#{CODE}\n", 1)
    return source, source.replace(f"#{CODE}", f" {CODE}"[1:] + " ")  # '#' goes, a blank at the end comes


def altered_network():
    """Pickled with the harmless source, which is then altered in the pickle: making it must not run it either."""
    harmless, hostile = (source.encode() for source in altered())
    raw = dumps(lambda c: {"ema": c["Net"]()}, harmless.decode())
    assert raw.count(harmless) == 1 and len(harmless) == len(hostile)
    return raw.replace(harmless, hostile)


SYSTEM = Asks(os.system, (COMMAND,))
OBJECTS = Asks(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, (1,), np.dtype("O"), False, [SYSTEM]))

# name: (pickle, what the message says, whether Python's own pickle runs it)
FORMS = {
    "os.system": (pickle.dumps(SYSTEM, 2), "posix.system|nt.system", True),
    "os.system, protocol 0": (b"cos\nsystem\n(S'" + COMMAND.encode() + b"'\ntR.", "os.system", True),
    "eval": (pickle.dumps(Asks(eval, (CODE,)), 4), "builtins.eval", True),
    "exec": (pickle.dumps(Asks(exec, (CODE,)), 0), "exec", True),
    "builtins by attributes": (
        b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'" + COMMAND.encode() + b"'\ntR.",
        "builtins.getattr", True),
    "STACK_GLOBAL": (
        b"\x80\x04" + text("os") + text("system") + b"\x93" + text(COMMAND) + b"\x85R.", "os.system", True),
    "names out of the memo": (
        b"\x80\x04" + text("system") + b"\x940" + text("os") + b"q\x070h\x07h\x00\x93q\x01" + b"0h\x01" + text(COMMAND)
        + b"\x85R.", "os.system", True),
    "memo overwritten": (
        b"\x80\x04ccollections\nOrderedDict\nq\x000cos\nsystem\nq\x000h\x00" + text(COMMAND) + b"\x85R.", "os.system",
        True),
    "hidden below the result": (
        b"\x80\x04cos\nsystem\n" + text(COMMAND) + b"\x85R0}.", "os.system", True),
    "INST": (b"(S'" + COMMAND.encode() + b"'\nios\nsystem\n.", "os.system", True),
    "OBJ": (b"(cos\nsystem\nS'" + COMMAND.encode() + b"'\no.", "os.system", True),
    "NEWOBJ": (b"\x80\x02cbuiltins\nmap\ncos\nsystem\n](" + text(COMMAND) + b"e\x86\x81"
               + b"q\x000cbuiltins\nlist\nh\x00\x85R.", "builtins.map", True),
    "NEWOBJ_EX": (b"\x80\x04cfunctools\npartial\ncos\nsystem\n\x85}\x92" + text(COMMAND) + b"\x85R.",
                  "functools.partial", True),
    "setstate": (
        b"\x80\x02cfunctools\npartial\n(cos\nsystem\ntR(cos\nsystem\n(" + text(COMMAND) + b"t}}tb)R.",
        "functools.partial", True),
    "state on a class": (b"\x80\x02ccollections\nOrderedDict\n}" + text("x") + b"K\x01sb.", "state set on", False),
    "nested reduce": (pickle.dumps({"a": [({"b": SYSTEM},)]}), "system", True),
    "call of a result": (
        b"coperator\nmethodcaller\n(S'system'\nS'" + COMMAND.encode() + b"'\ntR(cimportlib\nimport_module\n(S'os'\n"
        b"tRtR.", "operator.methodcaller", True),
    "numpy array of objects": (pickle.dumps(OBJECTS, 2), "system", True),
    "hostile pickle as a storage": (pickle.dumps(storage(pickle.dumps(SYSTEM))), "system", True),
    "hostile pickle behind a storage's head": (
        pickle.dumps(storage(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
                             + pickle.dumps({"little_endian": True}, 2) + pickle.dumps(SYSTEM, 2))), "system", True),
    "zip as a storage": (pickle.dumps(storage(as_zip(SYSTEM))), "zip", True),
    "in an allowed container": (
        pickle.dumps(Asks(torch.nn.ModuleDict, (), {"_modules": {"a": SYSTEM}})), "system", True),
    "source altered by one byte": (altered_network(), "not a known version", True),
    "another unpickler": (pickle.dumps(Asks(pickle.loads, (pickle.dumps(SYSTEM),))), "pickle.loads", True),
}


def body(raw):
    """A pickle without its protocol and its end, to stand within another."""
    return (raw[2:] if raw[:1] == b"\x80" else raw)[:-1]


def network_with(raw):
    """A network pickle that is right but for one buffer, in whose place another pickle stands."""
    def make(classes):
        net = classes["Net"]()
        net._buffers["table"] = "@" * 20
        return {"ema": net}

    outer = dumps(make, protocol=2, memo=False)  # the inner one's memo stays its own
    assert outer.count(text("@" * 20)) == 1
    return outer.replace(text("@" * 20), body(raw))


PLACES = {
    "itself": lambda raw: raw,
    "as the network": lambda raw: b"\x80\x04}" + text("ema") + body(raw) + b"s.",
    "in the network": network_with,
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FORMS)
def test_nothing_runs(name, place, folder):
    raw, match, _ = FORMS[name]
    (folder / "net.pkl").write_bytes(PLACES[place](raw))
    lock = write_lock(folder / "lock.json", SOURCE)
    for load in (lambda path: load_network_pickle(path, lock=lock), load_data):
        # elsewhere it may be refused for something that comes before
        exact = match if place == "in the network" and load is not load_data else None
        with pytest.raises(PickleError, match=exact) as caught:
            load(folder / "net.pkl")
        message = str(caught.value)
        assert message.startswith(str(folder / "net.pkl")) and "\n" not in message
        assert len(message) < 400 + len(str(folder)) and not (folder / NAME).exists()


@pytest.mark.parametrize("name", ["hostile pickle as a storage", "zip as a storage", "source altered by one byte"])
def test_what_is_not_the_network_is_not_looked_at(name, folder):
    """Beside a network that is right, a loss may hold anything of an allowed form; it stays bytes."""
    raw = dumps(lambda c: {"ema": c["Net"]()}, protocol=2, memo=False)
    (folder / "net.pkl").write_bytes(raw[:-1] + text("loss_fn") + body(FORMS[name][0]) + b"s.")
    assert load_network_pickle(folder / "net.pkl", lock=write_lock(folder / "lock.json", SOURCE)).class_name == "Net"
    assert not (folder / NAME).exists()


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form[2]])
def test_python_itself_would_run_it(name, folder):
    try:
        plain_loads(FORMS[name][0])
    except Exception as error:  # some fail once the harm is done
        print(name, error)
    assert (folder / NAME).exists()


def test_the_altered_source_differs_by_a_byte_from_a_harmless_one(folder):
    harmless, hostile = altered()
    assert len(harmless) == len(hostile)
    raw = dumps(lambda c: {"ema": c["Net"]()}, harmless)
    (folder / "net.pkl").write_bytes(raw)
    lock = write_lock(folder / "lock.json", harmless)
    assert load_network_pickle(folder / "net.pkl", lock=lock).class_name == "Net"
    (folder / "net.pkl").write_bytes(raw.replace(f"#{CODE}\n".encode(), f"{CODE} \n".encode()))
    with pytest.raises(UnknownSource, match="SHA-256 [0-9a-f]{64}"):
        load_network_pickle(folder / "net.pkl", lock=lock)
    assert not (folder / NAME).exists()


def test_extension_codes(folder):
    (folder / "net.pkl").write_bytes(b"\x80\x02\x82\xf0" + text(COMMAND) + b"\x85R.")
    copyreg.add_extension("os", "system", 240)
    try:
        with pytest.raises(NetworkPickleError, match="EXT1"):
            load_network_pickle(folder / "net.pkl")
        assert not (folder / NAME).exists()
        plain_loads((folder / "net.pkl").read_bytes())
        assert (folder / NAME).exists()
    finally:
        copyreg.remove_extension("os", "system", 240)


@pytest.mark.parametrize("name", [
    "builtins getattr", "builtins __import__", "builtins compile", "builtins open", "builtins globals",
    "builtins type", "importlib import_module", "operator attrgetter", "functools partial", "types FunctionType",
    "types CodeType", "ctypes CDLL", "runpy run_path", "pydoc locate", "code interact", "shutil rmtree",
    "torch load", "torch.hub load", "torch.serialization load", "torch.jit load", "torch.nn.modules.module Module",
    "torch._utils _rebuild_tensor_v3", "torch.storage UntypedStorage", "torch.nn.modules.container Sequential.__init__",
    "numpy load", "numpy fromfile", "numpy.lib.npyio load", "numpy ndarray.tofile", "numpy.core.multiarray fromfile",
    "torch_utils.persistence persistent_class", "torch_utils.persistence _src_to_module",
    "dnnlib.util call_func_by_name", "dnnlib.util EasyDict.__init__",
    "collections OrderedDict.__reduce__.__globals__", "art_edm.runtime.files save_tensors",
    "numpy.core.multiarray _reconstruct.__globals__", "__main__ x", "os system", "posix system", "nt system",
])
def test_a_name_is_refused_by_name(name, folder):
    (folder / "net.pkl").write_bytes(b"\x80\x04" + text(name.split()[0]) + text(name.split()[1]) + b"\x93.")
    for load in (load_network_pickle, load_data):
        with pytest.raises(PickleError) as caught:
            load(folder / "net.pkl")
        assert f"found a reference to {name.replace(' ', '.')}, which" in str(caught.value)


NUMEL = pickle.dumps(torch.tensor([1.5]), 2)
BOMBS = {
    "declared length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "declared length within": pickle.dumps(storage(b"\x80\x02\x8e" + struct.pack("<Q", 1 << 40) + b"x.")),
    "a long bytearray": b"c__builtin__\nbytearray\n(\x8a\x05\x00\x10\xa5\xd4\xe8tR.",
    "number of elements": NUMEL.replace(b"K\x01Ntq", b"\x8a\x05\x00\x10\xa5\xd4\xe8Ntq"),
    "a large stride-0 tensor": NUMEL.replace(b"K\x00K\x01\x85", b"K\x00J\x00\xca\x9a\x3b\x85"),
    "depth": b"]" * 60_000 + b"a" * 59_999 + b".",
    "depth of tuples": b")" + b"\x85" * 100_000 + b".",
    "depth of calls": b"ccollections\nOrderedDict\n" * 20_000 + b")" + b"R\x85" * 19_999 + b"R.",
    "depth of states": b"ctorch.nn.modules.container\nModuleList\n)R" * 20_000 + b"b" * 19_999 + b".",
    "itself": b"}q\x00" + text("ema") + b"h\x00s.",
    "a hashed tuple": b"}" + b")" + b"\x85" * 60_000 + b"Ns.",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("load", [load_network_pickle, load_data])
def test_bombs(name, load, folder):
    (folder / "net.pkl").write_bytes(BOMBS[name] if load is load_data else network_with(BOMBS[name]))
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(PickleError) as caught:
        load(folder / "net.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400 + len(str(folder))
    assert peak < 300 * len(BOMBS[name]) + (2 << 20) and time.perf_counter() - start < 30


def test_billion_laughs(folder):
    value = b"](" + b"K\x01" * 10 + b"e"
    for level in range(60):
        value += b"q%c0](" % level + b"h%c" % level * 10 + b"e"
    (folder / "data.pkl").write_bytes(b"\x80\x02" + value + b".")
    start, data = time.perf_counter(), load_data(folder / "data.pkl")
    assert data[0] is data[9] and time.perf_counter() - start < 5


def shared_tuples(depth):
    """Instructions that push a tuple of two that are one and the same, `depth` deep."""
    return b"K\x01" + b"2\x86" * depth


def test_shared_tuples_are_not_compared(folder):
    """A storage's key and the list of keys are equal tuples; comparing them would take 2^60 steps."""
    head = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    record = (b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + shared_tuples(60) + text("cpu") + b"K\x01N"
              + b"tQ.")
    raw = head + record + b"\x80\x02]" + shared_tuples(60) + b"a." + struct.pack("<q", 1) + bytes(4)
    (folder / "net.pkl").write_bytes(pickle.dumps(storage(raw), 2))
    start = time.perf_counter()
    with pytest.raises(PickleError, match="a tensor's storage of an unknown form"):
        load_data(folder / "net.pkl")
    assert time.perf_counter() - start < 5


def test_comparing_shared_tuples_takes_all_paths():
    """The twin: two equal trees, 10 deep, take 2^10 comparisons."""
    class Leaf:
        compared = 0

        def __eq__(self, other):
            Leaf.compared += 1
            return True

    one, two = Leaf(), Leaf()
    for _ in range(10):
        one, two = (one, one), (two, two)
    assert one == two and Leaf.compared == 1 << 10


COLLIDING = list(itertools.product((-1, *(-2 - k * ((1 << 61) - 1) for k in range(4))), repeat=5))


@pytest.mark.parametrize("wrap", [dict.fromkeys, set, frozenset], ids=["dict", "set", "frozenset"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_colliding_keys(folder, wrap, protocol):
    assert len(COLLIDING) > 3000 and len(set(map(hash, COLLIDING))) == 1  # the twin: each is compared with all others
    (folder / "data.pkl").write_bytes(pickle.dumps(wrap(COLLIDING), protocol))
    with pytest.raises(PickleError, match="more than 1000 keys that are numbers"):
        load_data(folder / "data.pkl")
    (folder / "data.pkl").write_bytes(pickle.dumps(wrap(COLLIDING[:1000]), protocol))
    assert set(load_data(folder / "data.pkl")) == set(COLLIDING[:1000])
    (folder / "data.pkl").write_bytes(pickle.dumps(wrap(map(str, range(5000))), protocol))
    assert len(load_data(folder / "data.pkl")) == 5000  # of text there may be any number: its hashes cannot be chosen


def test_memo_indices_that_could_collide(folder):
    (folder / "data.pkl").write_bytes(b"\x80\x02K\x01r" + struct.pack("<I", 1 << 31) + b".")
    with pytest.raises(PickleError, match="LONG_BINPUT .*an index far beyond"):
        load_data(folder / "data.pkl")


def used_a_hundred_times(function, argument):
    """One argument that a hundred calls share, in a list."""
    return b"\x80\x02" + argument + b"q\x01](" + (function + b"h\x01\x85R") * 100 + b"e\x86."


LEGACY = torch.zeros(100_000).storage().__reduce__()[1][0]  # as a pickle holds a storage: 400 KB
REPEATED = {
    "list": (b"c__builtin__\nset\n", b"(" + text("a") * 40_000 + b"l"),
    "bytes": (b"c__builtin__\nbytearray\n", b"B" + struct.pack("<I", 400_000) + bytes(400_000)),
    "storage": (b"ctorch.storage\n_load_from_bytes\n", b"B" + struct.pack("<I", len(LEGACY)) + LEGACY),
}


@pytest.mark.parametrize("name", REPEATED)
def test_one_part_of_many_calls(folder, name):
    function, argument = REPEATED[name]
    raw = used_a_hundred_times(function, argument)
    (folder / "data.pkl").write_bytes(raw)
    with pytest.raises(PickleError, match="used again and again"):
        load_data(folder / "data.pkl")
    made = _Converter(HANDLERS, None, 1 << 60).value(read_pickle(raw))[1]  # the twin, without the budget
    assert len({id(item) for item in made}) == 100  # storages: 40 MB of a file of 400 KB


def test_there_are_enough_forms():
    assert len(FORMS) >= 20 and sum(form[2] for form in FORMS.values()) >= 20
