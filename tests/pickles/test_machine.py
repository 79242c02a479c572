"""The inert reader against Python's own pickle: the same values, and records where Python would act."""

from __future__ import annotations

import io
import math
import pickle
import struct
import time
import tracemalloc
from collections import OrderedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from art_edm.pickles.machine import (
    MAX_OPCODES,
    Call,
    Global,
    Persistent,
    PickleError,
    read_pickle,
    read_pickle_file,
)
from art_edm.pickles.records import MAX_DEPTH, check_depth, walk
from art_edm.pickles.values import to_data

PROTOCOLS = range(6)


def one_line(raw, match, read=read_pickle):
    """`read(raw)` is refused in one line; returns it."""
    with pytest.raises(PickleError, match=match) as caught:
        read(raw)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-(2**4000), 2**4000), st.floats(allow_nan=False), st.text(),
    st.binary(), st.complex_numbers(allow_nan=False),
)
KEYS = st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text())
DATA = st.recursive(
    st.one_of(SCALARS, st.binary().map(bytearray), st.frozensets(KEYS), st.sets(KEYS)),
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(KEYS, inner),
        st.dictionaries(st.tuples(KEYS, KEYS), inner), st.dictionaries(KEYS, inner).map(OrderedDict),
    ),
    max_leaves=20,
)


@settings(deadline=None, max_examples=60)
@given(DATA, st.sampled_from(PROTOCOLS))
def test_plain_data_come_back_as_from_pickle(data, protocol):
    raw = pickle.dumps(data, protocol)
    try:
        read = to_data(read_pickle(raw))
    except PickleError as error:  # numbers as text are limited, and only those
        assert protocol < 2 and "INT" in str(error) or "LONG" in str(error), error
        assert max((abs(x) for x in leaves(data) if isinstance(x, int)), default=0) > 10**900
        return
    assert read == data == pickle.loads(raw)
    assert spelled(read) == spelled(data)  # 1, 1.0 and True are equal; their texts are not


def spelled(data):
    """A text of the data; sets have no order."""
    if isinstance(data, (set, frozenset)):
        return type(data).__name__ + str(sorted(map(repr, data)))
    if isinstance(data, (list, tuple)):
        return type(data).__name__ + str([spelled(part) for part in data])
    if isinstance(data, dict):
        return type(data).__name__ + str([(repr(key), spelled(value)) for key, value in data.items()])
    return repr(data)


def leaves(data):
    """All values in nested data, keys aside."""
    if isinstance(data, (list, tuple)):
        return [leaf for part in data for leaf in leaves(part)]
    return [leaf for part in data.values() for leaf in leaves(part)] if isinstance(data, dict) else [data]


@settings(deadline=None, max_examples=30)
@given(DATA, st.data())
def test_a_byte_altered_or_cut_is_a_value_or_one_line(data, draw):
    raw = bytearray(pickle.dumps(data, draw.draw(st.sampled_from(PROTOCOLS))))
    at = draw.draw(st.integers(0, len(raw) - 1))
    raw[at] = draw.draw(st.integers(0, 255))
    for cut in (bytes(raw), bytes(raw[:at])):
        try:
            to_data(read_pickle(cut))
        except PickleError as error:
            assert "\n" not in str(error) and len(str(error)) < 400


class Asks:
    """Reduces to whatever it is given."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_call_is_written_down_and_not_made(protocol):
    made = []
    record = read_pickle(pickle.dumps([Asks(print, (1, "a"), {"state": 2}, iter([3, 4]), iter([(5, 6)]))], protocol))[0]
    assert isinstance(record, Call) and record.function.name == "print" and record.args == (1, "a")
    assert record.state == {"state": 2} and record.elements == [3, 4] and record.items == [(5, 6)]
    assert made == [] and record.function.module in ("builtins", "__builtin__")


def test_keyword_arguments_and_old_instances():
    new = read_pickle(b"\x80\x04cm\nC\n(K\x01t}X\x01\x00\x00\x00kK\x02s\x92.")
    assert (new.function, new.args, new.kwargs) == (Global("m", "C"), (1,), {"k": 2})
    inst, obj = read_pickle(b"(K\x01K\x02im\nC\n."), read_pickle(b"(cm\nC\nK\x01K\x02o.")
    assert inst.function == obj.function == Global("m", "C") and inst.args == obj.args == (1, 2)


def test_persistent_references_and_python_2_text():
    assert read_pickle(b"Pabc\n.").id == "abc" and isinstance(read_pickle(b"K\x07Q."), Persistent)
    assert read_pickle(b"K\x07Q.").id == 7 and read_pickle(b"S'a\\x41'\n.") == "aA"
    assert read_pickle(b"U\x01\xe9.") == "\xe9"


def test_several_pickles_in_one_stream():
    stream = io.BytesIO(b"skipped" + pickle.dumps([1], 2) + pickle.dumps("two", 4) + b"rest")
    stream.seek(7)
    assert [read_pickle(stream), read_pickle(stream), stream.read()] == [[1], "two", b"rest"]


def test_a_shared_object_stays_one():
    shared = [1]
    first, second, third = read_pickle(pickle.dumps([shared, shared, [1]]))
    assert first is second and first is not third


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_first_name_that_is_not_allowed_is_refused(protocol):
    raw = pickle.dumps([OrderedDict(), Asks(print, ()), Asks(eval, ("1",))], protocol)
    message = one_line(raw, "print", lambda r: read_pickle(r, lambda module, name: module == "collections"))
    assert "nothing was run" in message and "eval" not in message
    assert len(read_pickle(raw, lambda module, name: True)) == 3


@pytest.mark.parametrize("raw, match", [
    (b"", "end of the file after 0 bytes"),
    (b"\x80\x06N.", "protocol 6"),
    (b"hello there", "damaged"),
    (b"\xff", "begins no instruction at byte 0"),
    (b"N\x82\x01.", "the instruction EXT1 at byte 1"),
    (b"\x83\x01\x01.", "EXT2"), (b"\x84\x01\x01\x01\x01.", "EXT4"),
    (b"\x80\x05\x97.", "NEXT_BUFFER"), (b"\x80\x05N\x98.", "READONLY_BUFFER"),
    (b".", "stack is empty"), (b"h\x05.", "BINGET"), (b"\x85.", "too short"), (b"t.", "TUPLE"),
    (b"]K\x01K\x02s.", "takes no items"), (b"K\x01K\x02a.", "takes no elements"), (b"}(K\x01u.", "key without a value"),
    (b"}]K\x01s.", "a list as a key"), (b"}cos\nsystem\nK\x01s.", "os.system as a key"), (b"\x8f(]\x90.", "as a key"),
    (b"}((K\x01ttK\x01s.", "a tuple as a key"), (b"}\x8a\x09" + b"\x01" * 9 + b"Ns.", "64 bits"),
    (b"K\x01)R.", "a call of a int"), (b"cm\nf\n)R)R.", "a call of a Call"), (b"cm\nf\nK\x01R.", "no tuple"),
    (b"cm\nf\n}b.", "state set on m.f"), (b"]}b.", "state set on a list"), (b"cm\nf\n)R}b}b.", "state set on a Call"),
    (b"K\x01K\x02\x93.", "no name"), (b"c\nf\n.", "no name"), (b"cm\nf g\n.", "no name"),
    (b"cm\n" + b"f" * 101 + b"\n.", "no name"),
    (b"I" + b"9" * 2000 + b"\n.", "damaged"), (b"L" + b"9" * 2000 + b"L\n.", "damaged"), (b"p.", "damaged"),
    (b"X\x02\x00\x00\x00\xff\xff.", "damaged"), (b"Fabc\n.", "damaged"),
])
def test_what_is_refused(raw, match):
    one_line(raw, match)


@pytest.mark.parametrize("head", [
    b"\x8e" + struct.pack("<Q", 1 << 40), b"B" + struct.pack("<I", 1 << 31), b"X" + struct.pack("<I", 1 << 31),
    b"\x8d" + struct.pack("<Q", 1 << 62), b"\x96" + struct.pack("<Q", 1 << 40),
    b"\x8b" + struct.pack("<i", (1 << 31) - 1), b"T" + struct.pack("<i", (1 << 31) - 1),
])
def test_a_length_beyond_the_end_takes_no_memory(head, tmp_path):
    (tmp_path / "bomb").write_bytes(b"\x80\x04" + head + b"abc.")
    tracemalloc.start()
    one_line(tmp_path / "bomb", "end of the file|damaged", read_pickle_file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


DEEP = {
    "lists": b"]" * 200_000 + b"a" * 199_999 + b".",
    "tuples": b")" + b"\x85" * 1_000_000 + b".",
    "dicts": b"(N" * 200_000 + b"}" + b"d" * 200_000 + b".",
    "calls": b"cm\nf\n" * 100_000 + b")" + b"\x85R"[1:] + b"\x85R" * 99_999 + b".",
    "states": b"cm\nf\n)R" * 100_000 + b"b" * 99_999 + b".",
    "marks": b"(" * 1_000_000 + b".",
    "references": b"N" + b"Q" * 300_000 + b".",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_a_million_levels_neither_pass_nor_crash(name):
    start = time.process_time()
    one_line(DEEP[name], "nested more than|damaged")
    assert time.process_time() - start < 20


def test_the_depth_that_is_allowed_is_allowed():
    def nested(depth):
        value = 1
        for _ in range(depth):
            value = [value]
        return value

    assert to_data(read_pickle(pickle.dumps(nested(MAX_DEPTH)))) == nested(MAX_DEPTH)
    one_line(pickle.dumps(nested(MAX_DEPTH + 1)), "nested")


@pytest.mark.parametrize("longer", [0, 1])
def test_depth_is_that_of_the_longest_way_to_a_shared_object(longer):
    low = [1]  # height 1
    for _ in range(MAX_DEPTH // 2 - 1):
        low = [low]
    high = low
    for _ in range(MAX_DEPTH // 2 - 1 + longer):
        high = [high]
    tree = [low, high] if longer else [high, low]
    one_line(tree, "nested", check_depth) if longer else check_depth(tree)
    assert len(list(walk(tree))) == MAX_DEPTH + longer


@pytest.mark.parametrize("raw", [b"]q\x00h\x00a.", b"}q\x00K\x01h\x00s.", b"cm\nf\n)Rq\x00h\x00b.",
                                 b"]q\x00cm\nf\nh\x00\x85Ra."])
def test_what_contains_itself_is_refused(raw):
    one_line(raw, "contains itself")
    if b"cm\n" not in raw:
        assert pickle.loads(raw)  # Python's own makes it


def test_billion_laughs_stay_one_object_each():
    value = b"](" + b"K\x01" * 10 + b"e"
    for level in range(40):  # 10^41 elements, if written out
        value += b"q%c0](" % level + b"h%c" % level * 10 + b"e"
    tree = read_pickle(b"\x80\x02" + value + b".")
    data = to_data(tree)
    assert len(list(walk(tree))) == len({id(node) for node in walk(data)}) == 41
    assert data[0] is data[9] and math.isclose(sum(data[0][0] is each for each in data[1]), 10)


def test_the_number_of_instructions_is_limited(monkeypatch):
    assert MAX_OPCODES == 5_000_000
    monkeypatch.setattr("art_edm.pickles.machine.MAX_OPCODES", 1000)
    assert read_pickle(b"N0" * 499 + b"N.") is None
    one_line(b"N0" * 500 + b"N.", "more than 1000 instructions")


def test_other_files(tmp_path):
    def read(name, content):
        (tmp_path / name).write_bytes(content)
        return one_line(tmp_path / name, "found", read_pickle_file)

    assert "empty file" in read("a", b"") and "empty file" in read("b", b" \n")
    assert "a web page" in read("c", b"\n<!DOCTYPE html><html>") and "training state" in read("d", b"PK\x03\x04rest")
    assert "no readable file (No such file" in one_line(tmp_path / "none", "found", read_pickle_file)
    assert "no readable file (Is a directory)" in one_line(tmp_path, "found", read_pickle_file)
    (tmp_path / "e").write_bytes(pickle.dumps({"a": 1}))
    assert read_pickle_file(tmp_path / "e") == {"a": 1}


def test_cut_anywhere_it_is_refused():
    raw = pickle.dumps({"a": [1, 2.5, "text", b"bytes"], "b": OrderedDict(c=(None, True))})
    for end in range(len(raw)):
        one_line(raw[:end], "end of the file|damaged")
    assert read_pickle(raw)["a"] == [1, 2.5, "text", b"bytes"]
