"""Processes that enter and leave a phase together, played by threads over one store; sums are tested with torchrun."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.distributed import HashStore

from art_edm.runtime.distributed import World, _has, resolve_device, world
from art_edm.runtime.errors import NonFiniteOutput, Stopped


def together(size, work):
    """What work(world) of each process returns or raises."""
    store = HashStore()

    def one(rank):
        try:
            return work(World(rank, size, store))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


def failing(errors):
    def work(here):
        with here.phase():
            if here.rank in errors:
                raise errors[here.rank]
        return "done"

    return work


@pytest.mark.parametrize("kind", [ValueError, OSError, ConnectionError, FloatingPointError, Stopped, NonFiniteOutput])
def test_an_error_of_one_is_the_error_of_all(kind):
    found = together(3, failing({1: kind("x.png is bad")}))
    assert [type(error) for error in found] == [kind] * 3 and {str(error) for error in found} == {"x.png is bad"}
    assert together(3, failing({})) == ["done"] * 3


def test_of_several_errors_that_of_the_lowest_rank_counts():
    found = together(3, failing({1: ValueError("b"), 2: OSError("c")}))
    assert [(type(error), str(error)) for error in found] == [(ValueError, "b")] * 3


def test_a_subclass_is_told_as_what_the_command_line_knows():
    class Own(ValueError):
        pass

    found = together(2, failing({1: Own("own")}))
    assert type(found[0]) is ValueError and type(found[1]) is Own and str(found[0]) == "own"


def test_a_fault_comes_with_its_traceback():
    found = together(2, failing({1: KeyError("fault")}))
    assert type(found[0]) is RuntimeError and "Traceback" in str(found[0]) and "KeyError: 'fault'" in str(found[0])


@pytest.mark.parametrize("checks", [True, False])
def test_others_stop_at_their_next_check(checks):
    turns = [0, 0]

    def work(here):
        with here.phase():
            if here.rank == 1:
                raise ValueError("early")
            for _ in range(40):
                time.sleep(0.005)
                turns[0] += 1
                if checks:
                    here.check()

    assert [str(error) for error in together(2, work)] == ["early", "early"]
    assert (turns[0] < 40) == checks


def test_phases_follow_one_another():
    seen = []

    def work(here):
        for phase in range(5):
            with here.phase():
                time.sleep(0.003 * here.rank)
            seen.append(phase)
            with here.phase():
                here.check()
        return "done"

    assert together(3, work) == ["done"] * 3
    assert seen == sorted(seen)


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with world("cpu") as here:
        assert (here.rank, here.size, here.device) == (0, 1, torch.device("cpu"))
        assert here.sum(torch.tensor([2.0])).tolist() == [2]
        with pytest.raises(KeyError):
            with here.phase():
                here.check()
                raise KeyError("as it is")
    assert not torch.distributed.is_initialized()


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="cannot use --device=abacus .*expected auto, cpu, or cuda"):
        resolve_device("abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cannot use --device=cuda"):
            resolve_device("cuda")
    assert "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1"


def test_devices_of_one_process_among_several(monkeypatch):
    """Judged by what torch says of GPUs; that of this process is made up."""
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: None)
    for count, rank, expected in ((1, 0, 0), (1, 3, 0), (4, 3, 3), (4, 0, 0)):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert resolve_device("cuda") == torch.device("cuda", expected) == taken[-1]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="found 4 GPUs for process 4 of this machine, expected one for each"):
        resolve_device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="found --device=cuda:1 for several processes, expected --device=cuda"):
        resolve_device("cuda:1")
    with pytest.raises(ValueError, match="cannot use --device=mps: paths are followed in float64"):
        resolve_device("mps")


class Waiting:
    """A store of torch 2.0, which has no `check`."""

    def __init__(self, store):
        self.wait = store.wait


def test_a_store_that_can_only_wait():
    store = HashStore()
    assert not hasattr(Waiting(store), "check") and not _has(Waiting(store), "key")
    store.set("key", "1")
    assert _has(Waiting(store), "key") and not _has(Waiting(store), "other")

    def lost(*args):
        raise RuntimeError("Connection reset by peer")

    died = Waiting(store)
    died.wait = lost
    with pytest.raises(RuntimeError, match="reset"):  # it died: no answer is not "no"
        _has(died, "key")
