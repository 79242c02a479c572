"""Many jobs in one process leave nothing behind; 200 of them, and 20 kills, are in tests/benchmarks/soak.py."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import threading
from pathlib import Path

import pytest

from tests.benchmarks.soak import growth, make_job, soak

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")]
RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "soak.json"


def kept(found):
    """What grew that must not; memory is given 16 MB for the allocator."""
    grown = growth(found)
    return {key for key, value in grown.items() if value > (16 if key == "resident" else 0)}


def test_fifteen_jobs_leave_nothing():
    found = soak(make_job(("oned", "gaussian:0.5")), 15, (5, 15))
    assert kept(found) == set()
    assert found[15]["temporary"] == 0


LEAKED = []


def leak_file(i):
    LEAKED.append(tempfile.NamedTemporaryFile(delete=False))


def leak_memory(i):
    LEAKED.append(mmap.mmap(-1, 1 << 24))  # more than earlier tests can have left to be freed meanwhile
    LEAKED[-1].write(bytes(1 << 24))


def leak_thread(i):
    LEAKED.append(threading.Event())
    threading.Thread(target=LEAKED[-1].wait, daemon=True).start()


@pytest.mark.parametrize("job, noticed", [
    (leak_file, {"descriptors", "temporary"}), (leak_memory, {"resident"}), (leak_thread, {"threads"}),
])
def test_a_leak_is_noticed(job, noticed):
    try:
        assert noticed <= kept(soak(job, 15, (5, 15)))
    finally:
        for each in LEAKED:
            each.set() if isinstance(each, threading.Event) else each.close()
        LEAKED.clear()


def test_the_long_result_that_is_kept_meets_the_bar():
    result = json.loads(RESULT.read_text())
    assert result["jobs"] >= 200 and result["growth"]["resident"] < 8
    assert all(result["growth"][key] <= 0 for key in ("descriptors", "threads", "temporary"))
    kills = result["kills"]
    assert kills["of"] >= 20 and kills["same_bytes"] == kills["intact"] == kills["clean"] == kills["of"]
    assert min(kills["met"].values()) >= 1  # every stage
