"""Killed in any stage, and on a disk that is full at any write: the same bytes in the end, never half a file."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal

import pytest

from art_edm.runtime.files import atomic_write
from tests.support.survival import STAGES, finished, grids, kill_in, stages, whole_or_absent

pytestmark = pytest.mark.slow

JOB = ["--network=oned", "--steps=2,5,18", "--out=g{steps}.npy", "--iterations=4", "--trajectories=4", "--quiet"]
RANDOM = random.Random(6)
FILES = sorted(f"g{k}.{kind}" for k in (2, 5, 18) for kind in ("json", "npy"))


@pytest.fixture
def run(tool):
    """The command in an empty folder, in this process."""
    command = tool("train_schedule")
    return lambda *more: command(*JOB, *more)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The grids of an uninterrupted process; another seed gives others."""
    folder, other = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("other")
    for place, more in ((folder, []), (other, ["--seed=1"])):
        assert finished(place, [*JOB, *more]) == (0, "")
        assert list(stages(place)) == [*STAGES, "end"]
    assert all(grids(folder)[name] != grids(other)[name] for name in grids(folder))
    return grids(folder)


# --- kill -9 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage, delay", [(stage, RANDOM.random() * 0.05) for stage in STAGES])
def test_killed_in_a_stage_and_resumed(run, tmp_path, whole, stage, delay):
    """All 20 moments, spread over the stages' measured times, are in tests/benchmarks/soak.py."""
    killed = kill_in(tmp_path, JOB, stage, delay)
    assert killed.died and STAGES.index(killed.stage) >= STAGES.index(stage)
    assert ("g2.unfinished" in killed.left) or stage in ("load", "profile") or killed.left == FILES
    assert whole_or_absent(tmp_path, whole)
    result = run()
    assert result.exit_code == 0, result.stderr
    assert grids(tmp_path) == whole and names(tmp_path) == FILES  # and no temporary file of the killed one


def test_half_a_grid_would_be_noticed(tmp_path, whole):
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert whole_or_absent(tmp_path, whole)
    (tmp_path / "g5.npy").write_bytes(whole["g5.npy"][:-1])
    assert not whole_or_absent(tmp_path, whole)


def left_by_kills(folder, write, times=3):
    """Names in `folder` after processes that were killed while they wrote a file there."""
    for _ in range(times):
        if os.fork() == 0:
            try:
                write(folder / "a.bin", lambda file: file.write(b"x" * 5000) and os.kill(os.getpid(), signal.SIGKILL))
            finally:
                os._exit(1)
        os.wait()
    return names(folder)


def with_own_names(path, write):
    """The twin: a new temporary name for every attempt."""
    with open(path.with_name(f".{path.name}.{os.getpid()}.part"), "wb") as file:
        write(file)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_writers_leave_one_temporary_file_which_the_next_uses(tmp_path):
    assert left_by_kills(tmp_path, atomic_write) == [".a.bin.part"]
    assert (tmp_path / ".a.bin.part").stat().st_size in (0, 5000)
    atomic_write(tmp_path / "a.bin", lambda file: file.write(b"short"))
    assert names(tmp_path) == ["a.bin"] and (tmp_path / "a.bin").read_bytes() == b"short"
    other = tmp_path / "other"
    other.mkdir()
    assert len(left_by_kills(other, with_own_names)) == 3


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """The second begins while the first is at it, and ends first; then the first, whole."""
    path, seen = tmp_path / "a.bin", []

    def first(file):
        file.write(b"first, half")
        file.flush()
        atomic_write(path, lambda inner: inner.write(b"second"))
        seen.append(path.read_bytes())
        file.write(b" and half")

    atomic_write(path, first)
    assert seen == [b"second"] and path.read_bytes() == b"first, half and half" and names(tmp_path) == ["a.bin"]


def test_a_temporary_name_that_leads_elsewhere_is_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "a.bin"
    victim.write_bytes(b"precious")
    for link in (os.symlink, os.link):
        link(victim, tmp_path / ".a.bin.part")
        atomic_write(path, lambda file: file.write(b"new"))
        assert victim.read_bytes() == b"precious" and path.read_bytes() == b"new"
        os.unlink(tmp_path / ".a.bin.part")
    assert names(tmp_path) == ["a.bin", "victim"]


# --- a disk that fills ---------------------------------------------------------------------------------


def fill_at(monkeypatch, write):
    """No space from this write on; counts the writes."""
    real, count = os.fsync, [0]

    def fsync(handle):
        count[0] += 1
        if count[0] >= write:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return count


def test_full_at_any_write_and_continued_after_room_was_made(run, tmp_path, whole, monkeypatch):
    monkeypatch.setattr("art_edm.learning.training.SAVE_SECONDS", -1.0)  # a checkpoint after every iteration
    with monkeypatch.context() as patch:
        writes = fill_at(patch, 10**9)
        assert run().exit_code == 0
    assert writes[0] == 1 + 4 + 1 + 6 and grids(tmp_path) == whole
    for write in range(1, writes[0] + 1):
        for path in tmp_path.iterdir():
            path.unlink()
        with monkeypatch.context() as patch:
            fill_at(patch, write)
            result = run()
        line = result.stderr.strip()
        assert result.exit_code == 2 and line.startswith("Error: cannot write ") and line.count("\n") == 0, write
        assert "No space left on device" in line and "again" in line
        assert whole_or_absent(tmp_path, whole) and not list(tmp_path.glob(".*"))
        kept = list((tmp_path / "g2.unfinished").glob("*.npz"))  # not all is done again
        assert len(kept) == min(write - 1, 2), write
        assert run("--resume").exit_code == 0
        assert grids(tmp_path) == whole and names(tmp_path) == FILES


def test_a_limit_of_the_system_is_told_as_a_full_disk_is(run, tmp_path, whole):
    """A write that the kernel itself refuses, with another error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        result = run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert result.exit_code == 2 and "cannot write to g2.unfinished: File too large" in result.stderr
    assert not list(tmp_path.glob("*/*")) and names(tmp_path) == ["g2.unfinished"]
    assert run("--resume", "--quiet").exit_code == 0 and grids(tmp_path) == whole
