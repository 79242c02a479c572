"""A process that is lost is noticed by the line that the system closes, and all others end with one error."""

from __future__ import annotations

import errno
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from art_edm.runtime.distributed import World
from art_edm.runtime.heartbeat import Lines


@pytest.fixture
def lines(monkeypatch):
    """Those of three processes, here all in one, and their store."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = HashStore()
    found = [Lines(rank, 3, store) for rank in range(3)]
    yield found, store
    for each in found:
        each.close()


def soon(look, expected):
    """Whether `look()` gives what is expected within a second."""
    end = time.monotonic() + 1
    while look() != expected and time.monotonic() < end:
        time.sleep(0.005)
    return look() == expected


def test_process_0_sees_who_has_gone_and_the_others_see_process_0(lines):
    (zero, one, two), _ = lines
    time.sleep(0.05)
    assert [each.gone() for each in (zero, one, two)] == [set()] * 3
    two.close()
    assert soon(zero.gone, {2}) and one.gone() == set()
    zero.close()
    assert soon(one.gone, {0})
    assert zero.gone() == {2}  # also when there are no lines any more


@pytest.mark.parametrize("error, gone", [
    (BlockingIOError(errno.EAGAIN, "nothing yet"), False), (ConnectionResetError(errno.ECONNRESET, "reset"), True),
    (TimeoutError(errno.ETIMEDOUT, "no answer"), True), (OSError(errno.EHOSTUNREACH, "no route to host"), True),
])
def test_every_way_in_which_a_line_ends(lines, error, gone):
    class Line:
        def recv(self, count):
            raise error

        def close(self):
            pass

    (zero, *_), _ = lines
    assert zero.gone() == set()
    zero._open[2] = Line()
    assert zero.gone() == ({2} if gone else set())


@pytest.mark.parametrize("hello", [b"", b"GET / HTTP/1.0\r\n\r\n", (0).to_bytes(4, "big"), (3).to_bytes(4, "big"),
                                   (1).to_bytes(4, "big")])
def test_a_stranger_is_no_process(lines, hello):
    (zero, one, two), store = lines
    assert zero.gone() == set()
    with socket.create_connection(("127.0.0.1", int(store.get("line")))) as line:
        line.sendall(hello)
    time.sleep(0.05)
    assert zero.gone() == set() and one.gone() == set()
    one.close()
    assert soon(zero.gone, {1})  # the real one


def test_without_a_line_nothing_is_claimed(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no sockets here")

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(socket, "create_server", refuse)
    store = HashStore()
    zero, one = Lines(0, 2, store), Lines(1, 2, store)
    assert store.get("line") == b"0" and zero.gone() == one.gone() == set()


def worlds(lines, work, alive):
    """What work(world) of the processes that live returns or raises, by rank."""
    found, store = lines

    def one(rank):
        try:
            return work(World(rank, 3, store, lines=found[rank]))
        except Exception as error:
            return error

    with ThreadPoolExecutor(3) as pool:
        return dict(zip(alive, pool.map(one, alive)))


@pytest.mark.parametrize("lost", [1, 2])
def test_the_end_of_a_phase_does_not_wait_for_the_lost(lines, lost):
    def work(here):
        with here.phase():
            pass
        return "done"

    lines[0][lost].close()
    alive = [rank for rank in range(3) if rank != lost]
    began = time.monotonic()
    found = worlds(lines, work, alive)
    assert time.monotonic() - began < 5
    for error in found.values():
        assert isinstance(error, ConnectionError)
        assert str(error).startswith(f"process {lost} has ended before its work was done (killed, or out of memory); ")
        assert "--resume" in str(error)


def test_without_lines_it_waits(lines):
    """The twin: as it was before, until torchrun kills."""
    store = lines[1]

    def work(rank):
        with World(rank, 2, store).phase():
            pass
        return "done"

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(work, 0)
        time.sleep(0.3)
        assert not waiting.done()
        assert work(1) == "done" and waiting.result(5) == "done"


def test_where_all_live_a_phase_ends_without_an_error(lines):
    def work(here):
        with here.phase():
            time.sleep(0.02 * here.rank)
            here.check()
        return here.lost()

    assert worlds(lines, work, [0, 1, 2]) == {0: set(), 1: set(), 2: set()}


def test_the_others_notice_process_0_while_they_work(lines):
    turns = [0]

    def work(here):
        with here.phase():
            for _ in range(1000):
                time.sleep(0.005)
                turns[0] += 1
                here.check()

    lines[0][0].close()
    found = worlds(lines, work, [1, 2])
    assert all(isinstance(error, ConnectionError) and str(error).startswith("process 0 ") for error in found.values())
    assert turns[0] < 1000


def test_an_error_of_ones_own_comes_before_that_of_a_lost_process_of_a_higher_rank(lines):
    def work(here):
        with here.phase():
            raise ValueError("mine")

    lines[0][1].close()
    found = worlds(lines, work, [0, 2])
    assert [(type(error), str(error)) for error in found.values()] == [(ValueError, "mine")] * 2


class DeadStore:
    """A store whose host has gone, as torch reports it."""

    def fail(self, *args):
        raise RuntimeError("Broken pipe")

    set = check = get = fail


def test_a_store_that_died_with_process_0_is_told_as_its_loss():
    here = World(1, 2, DeadStore())
    with pytest.raises(ConnectionError, match="^process 0 has ended"):
        here.check()
    with pytest.raises(ConnectionError, match="^process 0 has ended"), here.phase():
        pass
    here.leave()  # no error of its own beside that


@pytest.mark.parametrize("text, kind", [("Connection closed by peer", ConnectionError), ("bad shape", RuntimeError)])
def test_a_sum_that_fails_is_a_lost_process_only_if_a_connection_failed(monkeypatch, text, kind):
    def fail(tensor):
        raise RuntimeError(text)

    monkeypatch.setattr("art_edm.runtime.distributed.distributed.all_reduce", fail)
    monkeypatch.setattr("art_edm.runtime.distributed._PATIENCE", 0.05)
    with pytest.raises(kind) as caught:
        World(1, 2, HashStore()).sum(torch.zeros(1))
    assert str(caught.value).startswith("another process has ended" if kind is ConnectionError else "bad shape")
