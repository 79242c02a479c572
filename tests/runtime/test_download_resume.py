"""Downloads that are cut short, stall, are killed, or run at the same time: continued, and never wrong."""

from __future__ import annotations

import contextlib
import hashlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests

from art_edm.runtime import download as module
from art_edm.runtime.download import DownloadError, DownloadRefused, download
from art_edm.runtime.files import cache_dir
from tests.support.loopback import Loopback, chunked, isolate, page, status, whole

CONTENT = bytes(range(256)) * 1200 + b"the end"  # 5 blocks
CHANGED = bytes(range(255, -1, -1)) * 1200 + b"THE END"  # another version, of the same length
SHA, SHA_CHANGED = (hashlib.sha256(c).hexdigest() for c in (CONTENT, CHANGED))
HALF = 2 * module.BLOCK
SHORT = "(the connection broke|[0-9]+ of [0-9]+ bytes came)"  # the reader of the connection notices, or the length does
DATE = "Wed, 21 Oct 2015 07:28:00 GMT"


@pytest.fixture
def server(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr(module, "TIMEOUT", (1.0, 0.25))
    with Loopback() as server:
        yield server


@pytest.fixture
def slept(monkeypatch):
    """Seconds that would have been waited."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def files():
    return sorted(p.name for p in (cache_dir() / "downloads").glob("*") if p.suffix != ".lock")


def part_of(url):
    return cache_dir() / "downloads" / (module._file_name(url) + ".part")


def leave_a_part(server, url_path="/net.pkl", **version):
    """A part of CONTENT as a cut connection leaves it, and the address."""
    url = server.on(url_path, whole(CONTENT, cut=HALF, **version))
    with pytest.raises(DownloadError):
        download(url, delays=())
    assert part_of(url).name in files() and module._file_name(url) not in files()
    assert part_of(url).read_bytes() == CONTENT[:HALF]
    server.asked.clear()
    return url


# --- continuing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("version, tag", [({}, '"1"'), ({"etag": None, "Last_Modified": DATE}, DATE)],
                         ids=["ETag", "Last-Modified"])
def test_only_the_missing_bytes_are_sent(server, version, tag):
    url = leave_a_part(server, **version)
    server.on("/net.pkl", whole(CONTENT, **version))
    assert download(url).read_bytes() == CONTENT
    (asked,) = server.asked
    assert asked.headers["Range"] == f"bytes={HALF}-" and asked.headers["If-Range"] == tag
    assert asked.status == 206 and asked.sent == len(CONTENT) - HALF
    assert files() == [module._file_name(url), module._file_name(url) + ".json"]


def test_a_body_cut_short_is_continued_within_one_call(server, slept):
    url = server.on("/net.pkl", whole(CONTENT, cut=HALF), whole(CONTENT))
    assert download(url).read_bytes() == CONTENT and slept == [1]
    assert [(a.status, a.sent) for a in server.asked] == [(200, HALF), (206, len(CONTENT) - HALF)]


def test_new_bytes_start_the_count_of_attempts_anew(server, slept):
    url = server.on("/net.pkl", whole(CONTENT, cut=module.BLOCK))  # one block each time: five attempts
    assert download(url).read_bytes() == CONTENT
    assert len(server.asked) == 5 and slept == [1] * 4
    slept.clear()
    with pytest.raises(DownloadError, match=SHORT):
        download(server.on("/b.pkl", whole(CONTENT, cut=module.BLOCK, ranges=False)))  # never gets any further
    assert slept == [1, 2, 4] and not part_of(server.url("/b.pkl")).with_suffix("").exists()


def test_a_server_without_ranges_sends_all_again(server):
    url = leave_a_part(server)
    server.on("/net.pkl", whole(CONTENT, ranges=False))
    assert download(url).read_bytes() == CONTENT
    assert [(a.status, a.sent) for a in server.asked] == [(200, len(CONTENT))]


def test_a_changed_file_is_not_mixed(server):
    url = leave_a_part(server)
    server.on("/net.pkl", whole(CHANGED, etag='"2"'))
    assert download(url).read_bytes() == CHANGED and [a.status for a in server.asked] == [200]


def test_a_server_that_mixes_versions_is_found_out_by_the_hash(server):
    mixing = whole(CHANGED, etag='"2"', if_range=False)
    url = leave_a_part(server)
    server.on("/net.pkl", mixing)
    assert download(url, SHA_CHANGED).read_bytes() == CHANGED
    assert [a.status for a in server.asked] == [206, 200]  # put together wrongly, so once more from its start
    url = leave_a_part(server, "/b.pkl")
    server.on("/b.pkl", mixing)
    assert download(url).read_bytes() == CONTENT[:HALF] + CHANGED[HALF:]  # what the hash is for


def test_a_wrong_hash_of_a_continued_file_is_not_tried_for_ever(server, slept):
    url = server.on("/net.pkl", *[whole(CONTENT, cut=module.BLOCK)] * 12, status(404))  # five make a file
    with pytest.raises(DownloadRefused, match=f"its SHA-256 is {SHA}, expected {SHA_CHANGED}"):
        download(url, SHA_CHANGED)
    assert len(server.asked) == 10 and files() == []  # once more from its start, then no more


@pytest.mark.parametrize("answer", [
    whole(CONTENT[:-1], if_range=False), whole(CONTENT, Content_Range=f"bytes 9-{len(CONTENT) - 1}/{len(CONTENT)}"),
    whole(CONTENT, Content_Range=None), whole(CONTENT, Content_Range=f"bytes {HALF}-{len(CONTENT) - 1}/*"),
    whole(CONTENT, Content_Range=f"bytes {HALF}-{len(CONTENT) - 9}/{len(CONTENT)}"), status(416),
], ids=["other length", "other begin", "no range", "unknown length", "not to the end", "416"])
def test_a_range_that_does_not_fit_the_part(server, answer):
    url = leave_a_part(server)
    server.on("/net.pkl", answer, whole(CONTENT))
    assert download(url).read_bytes() == CONTENT
    assert [("Range" in a.headers, a.status) for a in server.asked][1] == (False, 200)


def test_a_file_that_became_shorter_than_the_part(server):
    url = leave_a_part(server)
    server.on("/net.pkl", whole(CONTENT[:1000], if_range=False))
    assert download(url).read_bytes() == CONTENT[:1000] and [a.status for a in server.asked] == [416, 200]


@pytest.mark.parametrize("version", [{"etag": None}, {"etag": 'W/"1"'}], ids=["none", "weak"])
def test_without_a_version_only_a_hash_allows_to_continue(server, version):
    url = leave_a_part(server, **version)
    server.on("/net.pkl", whole(CONTENT, **version))
    assert download(url).read_bytes() == CONTENT and "Range" not in server.asked[0].headers
    url = leave_a_part(server, "/b.pkl", **version)
    server.on("/b.pkl", whole(CONTENT, **version))
    assert download(url, SHA).read_bytes() == CONTENT and server.asked[0].status == 206


@pytest.mark.parametrize("spoil", [
    lambda part, note: note.unlink(), lambda part, note: note.write_text("{"),
    lambda part, note: note.write_text("[1]"), lambda part, note: part.write_bytes(b""),
], ids=["no note", "half a note", "another note", "nothing yet"])
def test_a_part_of_unknown_origin_is_not_used(server, spoil):
    url = leave_a_part(server)
    spoil(part_of(url), part_of(url).with_name(part_of(url).name + ".json"))
    server.on("/net.pkl", whole(CONTENT))
    assert download(url).read_bytes() == CONTENT and "Range" not in server.asked[0].headers


def test_a_part_from_another_mirror_is_not_continued(server):
    one, two = server.on("/1", whole(CONTENT, cut=HALF)), server.on("/2", whole(CHANGED))
    with pytest.raises(DownloadError):
        download(one, name="net.pkl", delays=())
    assert download(two, name="net.pkl").read_bytes() == CHANGED and "Range" not in server.asked[-1].headers


def test_a_login_page_does_not_cost_the_part(server):
    url = leave_a_part(server)
    server.on("/net.pkl", page(), whole(CONTENT))
    with pytest.raises(DownloadRefused, match="web page"):
        download(url)
    assert download(url).read_bytes() == CONTENT and server.asked[-1].sent == len(CONTENT) - HALF


# --- cut short and silent ----------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [whole(CONTENT, cut=HALF, ranges=False), chunked(CONTENT[:HALF], cut=True)],
                         ids=["length", "chunked"])
def test_truncated_every_time(server, slept, answer):
    url = server.on("/net.pkl", answer)
    with pytest.raises(DownloadError, match=f"{SHORT}; try again later, or download it elsewhere"):
        download(url)
    assert module._file_name(url) not in files()


def test_the_length_is_checked_even_if_the_reader_does_not(server, slept, monkeypatch):
    def lenient(reply, size):  # as older readers are
        with contextlib.suppress(Exception):
            yield from strict(reply, size)

    strict = requests.Response.iter_content
    monkeypatch.setattr(requests.Response, "iter_content", lenient)
    url = server.on("/net.pkl", whole(CONTENT, cut=HALF, ranges=False))
    with pytest.raises(DownloadError, match=f": {HALF} of {len(CONTENT)} bytes came; try again later"):
        download(url)
    assert module._file_name(url) not in files()
    monkeypatch.setattr(module, "_content_length", lambda reply: None)
    assert download(url).read_bytes() == CONTENT[:HALF]  # what the check of the length is for


def test_without_a_length_only_the_hash_finds_it_truncated(server):
    url = server.on("/net.pkl", whole(CONTENT, cut=HALF, length=False))
    with pytest.raises(DownloadRefused, match="SHA-256"):
        download(url, SHA)
    assert files() == []
    assert download(url).read_bytes() == CONTENT[:HALF]  # the end of the connection is all there is to go by


def test_silence_ends_and_is_tried_again(server, monkeypatch):
    monkeypatch.setattr(module, "DELAYS", (0.01,))
    url = server.on("/net.pkl", whole(CONTENT, cut=HALF, silence=60), whole(CONTENT))
    began = time.monotonic()
    assert download(url).read_bytes() == CONTENT and time.monotonic() - began < 10
    assert [a.status for a in server.asked] == [200, 206]


@pytest.mark.parametrize("answer", [whole(CONTENT, cut=HALF, silence=60), whole(CONTENT, delay=60)],
                         ids=["in the body", "before it"])
def test_silence_every_time(server, answer):
    url = server.on("/net.pkl", answer)
    with pytest.raises(DownloadError, match=r": the server was silent for 0.25 s; try again later"):
        download(url, delays=())
    assert module._file_name(url) not in files()


# --- processes and threads ---------------------------------------------------------------------------


def start(url):
    code = "import sys; from art_edm.runtime.download import download; print(download(sys.argv[1]))"
    command = [sys.executable, "-c", code, url]
    # A test run in the background ignores Ctrl-C, and its children would inherit that.
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_killed_download_is_continued(server, number):
    url = server.on("/net.pkl", whole(CONTENT, cut=HALF, silence=60), whole(CONTENT))
    process, deadline = start(url), time.monotonic() + 20
    while module._size_of(part_of(url)) < HALF and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    assert process.wait(10) != 0
    process.stdout.close()
    assert part_of(url).read_bytes() == CONTENT[:HALF] and module._file_name(url) not in files()
    assert download(url).read_bytes() == CONTENT  # its lock is free again
    assert server.asked[1].headers["Range"] == f"bytes={HALF}-" and server.asked[1].sent == len(CONTENT) - HALF


@pytest.mark.slow
def test_two_processes_ask_once(server):
    url = server.on("/net.pkl", whole(CONTENT, delay=1.5))
    processes = [start(url) for _ in range(2)]
    paths = [process.communicate(timeout=20)[0].strip() for process in processes]
    assert [p.returncode for p in processes] == [0, 0] and len(set(paths)) == 1
    with open(paths[0], "rb") as file:
        assert file.read() == CONTENT
    assert len(server.asked) == 1


def run_threads(url, count=4):
    """What each of them read at once."""
    found, gate = [], threading.Barrier(count)

    def work():
        gate.wait()
        found.append(download(url).read_bytes())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_four_threads_ask_once(server, monkeypatch):
    url = server.on("/net.pkl", whole(CONTENT, delay=0.1))
    assert run_threads(url) == [CONTENT] * 4 and len(server.asked) == 1
    monkeypatch.setattr(module, "_locked", lambda job: contextlib.nullcontext())
    monkeypatch.setattr(module, "DELAYS", ())
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    run_threads(server.on("/b.pkl", whole(CONTENT, delay=0.1)))
    assert len(server.asked) > 2  # without the lock they all do
