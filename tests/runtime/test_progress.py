"""Stopping between two steps, and progress that a log file never sees."""

from __future__ import annotations

import io
import os
import re
import signal
import threading

import pytest

from art_edm.runtime.progress import GracefulStop, Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch):
    def use(stream):
        monkeypatch.setattr("sys.stderr", stream)
        return stream

    return use


def play(progress):
    for done in range(1, 6):
        progress.update(done, "loss 0.5")
    progress.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop(number):
    before = signal.getsignal(number)
    with GracefulStop() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert signal.getsignal(number) is before


def test_without_it_the_signal_interrupts():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pthread_sigmask(signal.SIG_BLOCK, [])  # a system call, at which a pending signal is seen
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_interrupts_at_once_but_a_second_sigterm_does_not():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_stops_nest_and_nothing_is_lost_between_two():
    with GracefulStop() as outer:
        with GracefulStop() as first:
            assert not first.requested
        os.kill(os.getpid(), signal.SIGTERM)  # between two stages
        with GracefulStop() as second:
            assert second.requested and outer.requested
    with GracefulStop() as outer:
        with GracefulStop() as inner:
            os.kill(os.getpid(), signal.SIGTERM)  # too late for the inner to look
            assert inner.requested and not outer.requested
        assert outer.requested
    with GracefulStop() as other:
        assert not other.requested


def test_outside_the_main_thread_it_changes_nothing():
    seen = []

    def work():
        with GracefulStop() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


def test_progress_is_silent_in_a_log(stderr):
    stream = stderr(io.StringIO())
    play(Progress(5, "work"))
    assert stream.getvalue() == ""


def test_progress_is_silent_when_quiet(stderr):
    stream = stderr(Terminal())
    play(Progress(5, "work", quiet=True))
    assert stream.getvalue() == ""


def test_progress_on_a_terminal(stderr):
    stream = stderr(Terminal())
    play(Progress(5, "work"))
    shown = stream.getvalue().split("\r")
    assert re.match(r"work 5/5  \S+/s  0:00 left  loss 0.5 *$", shown[-3])
    assert shown[-1] == "" and shown[-2].strip() == ""  # the line is cleared
    assert "\n" not in stream.getvalue()


@pytest.mark.parametrize("start, left", [(0, "0:10"), (50, "1:00")])
def test_time_left_counts_only_what_this_run_did(stderr, monkeypatch, start, left):
    """60 of 70 done in 60 s leaves 10 s; but if 50 were done before, 10 took 60 s, and 10 are left."""
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = stderr(Terminal())
    progress = Progress(70, "work", start=start)
    clock[0] += 60
    progress.update(60)
    assert f"{left} left" in stream.getvalue()


def test_at_most_ten_lines_a_second(stderr, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = stderr(Terminal())
    progress = Progress(1000, "work")
    for done in range(1, 1000):
        clock[0] += 0.001
        progress.update(done)
    assert stream.getvalue().count("\r") == pytest.approx(10, abs=1)
    progress.update(1000)
    assert "1000/1000" in stream.getvalue()  # the last is always shown
