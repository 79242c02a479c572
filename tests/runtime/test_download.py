"""Downloads: whatever a server answers, the final path holds the true bytes or nothing. See test_download_resume.py."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import sys
import time
from email.utils import formatdate
from pathlib import Path

import pytest
import requests

from art_edm.runtime import download as module
from art_edm.runtime.download import DownloadError, DownloadRefused, download, is_url
from art_edm.runtime.files import cache_dir
from tests.support.loopback import Loopback, chunked, isolate, page, redirect, status, whole

CONTENT = bytes(range(256)) * 1200 + b"the end"  # 5 blocks
SHA = hashlib.sha256(CONTENT).hexdigest()
OTHER = hashlib.sha256(b"other").hexdigest()


@pytest.fixture
def server(monkeypatch, tmp_path):
    isolate(monkeypatch, tmp_path / "cache")
    with Loopback() as server:
        yield server


@pytest.fixture
def slept(monkeypatch):
    """Seconds that would have been waited."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


def files():
    """Names in the cache, without the lock."""
    return sorted(p.name for p in (cache_dir() / "downloads").glob("*") if p.suffix != ".lock")


def assert_nothing_kept(url, *parts):
    """No file at the final path; beside it at most these endings."""
    assert files() == sorted(module._file_name(url) + part for part in parts)


def fails(kind, url, match, **options):
    """The error, one line that names the address and the remedy."""
    with pytest.raises(kind, match=match) as caught:
        download(url, **options)
    text = str(caught.value)
    assert text.startswith(f"could not download {url}: ") and "\n" not in text and "give the path" in text
    assert caught.value.reason in text and isinstance(caught.value, ConnectionError) is (kind is DownloadError)
    return text


# --- whole files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [whole(CONTENT), chunked(CONTENT), whole(CONTENT, length=False),
                                    whole(CONTENT, etag=None)], ids=["length", "chunked", "until closed", "bare"])
@pytest.mark.parametrize("sha", [None, SHA, SHA.upper()])
def test_a_whole_file(server, answer, sha):
    url = server.on("/net.pkl", answer)
    path = download(url, sha)
    assert path.read_bytes() == CONTENT and path.parent == cache_dir() / "downloads"
    assert files() == [path.name, f"{path.name}.json"]  # no part is left
    assert len(server.asked) == 1 and server.asked[0].headers["Accept-Encoding"] == "identity"
    assert download(url, sha) == path and len(server.asked) == 1  # the second time from the cache


def test_a_redirect_is_followed(server):
    server.on("/there", whole(CONTENT))
    url = server.on("/here", redirect("/there"))
    assert download(url).read_bytes() == CONTENT
    assert [a.path for a in server.asked] == ["/here", "/there"]
    fails(DownloadRefused, server.on("/round", redirect("/round")), "not a usable address .*redirects")


def test_the_bytes_are_as_sent(server):
    blob = gzip.compress(CONTENT)
    url = server.on("/a.gz", whole(blob, Content_Encoding="gzip"))
    assert download(url).read_bytes() == blob
    assert requests.get(url).content == CONTENT  # what a plain reading would have kept


def test_progress_in_megabytes(server, tmp_path, monkeypatch):
    content = bytes(3_000_000)
    url = server.on("/net.pkl", whole(content))
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    download(url, quiet=True)
    assert terminal.getvalue() == ""
    download(url, folder=tmp_path)
    assert "net.pkl MB 3/3" in terminal.getvalue() and terminal.getvalue().endswith(" \r")  # and cleared


# --- answers that are not the file -------------------------------------------------------------------


@pytest.mark.parametrize("answer, reason", [
    (status(404), "404 Not Found; check the address"), (status(410), "410 Gone; check"),
    (status(403), "403 Forbidden; the file may need a login"), (status(204), "204 No Content"),
    (page(), "web page"), (page("<html>", None), "web page"), (page("\n\ufeff<HTML>", "text/plain"), "web page"),
    (page("{}", "application/xhtml+xml"), "web page"), (status(200), "the file is empty"),
])
def test_refused_at_once(server, slept, answer, reason):
    url = server.on("/net.pkl", answer)
    fails(DownloadRefused, url, reason)
    assert len(server.asked) == 1 and slept == []
    assert_nothing_kept(url)


def test_a_page_with_the_right_hash_is_the_file(server):
    text = "<!doctype html> a page that was wanted"
    url = server.on("/index.html", page(text))
    assert download(url, hashlib.sha256(text.encode()).hexdigest()).read_bytes() == text.encode()
    fails(DownloadRefused, server.on("/b", page(text)), "web page", sha256=OTHER)  # rather than of a wrong hash


def test_a_wrong_hash(server, slept):
    url = server.on("/net.pkl", whole(CONTENT))
    text = fails(DownloadRefused, url, "damaged or another version", sha256=OTHER)
    assert SHA in text and OTHER in text and len(server.asked) == 1 and slept == []
    assert_nothing_kept(url)
    assert download(url).read_bytes() == CONTENT  # the same answer, when nothing else is known: what the hash is for


def test_a_check_of_the_caller(server):
    seen = []

    def check(path):
        seen.append(path.read_bytes())
        if b"pickle" not in seen[-1]:
            raise ValueError("no pickle\nin it")

    url = server.on("/net.pkl", whole(CONTENT), whole(b"a pickle"))
    fails(DownloadRefused, url, ": no pickle in it; ", check=check)
    assert seen == [CONTENT]
    assert_nothing_kept(url)
    path = download(url, check=check)
    assert path.read_bytes() == b"a pickle" == seen[-1]
    path.write_bytes(b"a puzzle")  # of the same length: found by the check alone
    assert download(url, check=check).read_bytes() == b"a pickle" and len(server.asked) == 3


@pytest.mark.parametrize("url", ["ftp://host/a", "net.pkl", "", "http://", "http://[::1"])
def test_a_wrong_address(server, slept, url):
    fails(DownloadRefused, url, "not an http or https address|not a usable address")
    assert slept == [] and files() in ([], [module._file_name(url)])


def test_a_password_is_not_shown(server):
    server.on("/x", status(404))
    with pytest.raises(DownloadRefused) as caught:
        download(server.url("/x").replace("//", "//me:secret@"))
    assert "secret" not in str(caught.value) and server.url("/x") in str(caught.value)


# --- failures that may pass --------------------------------------------------------------------------


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_a_busy_server_is_asked_again(server, slept, code):
    url = server.on("/net.pkl", status(code), status(code), whole(CONTENT))
    assert download(url).read_bytes() == CONTENT
    assert [a.status for a in server.asked] == [code, code, 200] and slept == [1, 2]


def test_a_server_that_stays_busy(server, slept):
    url = server.on("/net.pkl", status(503))
    fails(DownloadError, url, "answered 503 Service Unavailable; try again later")
    assert len(server.asked) == 4 and slept == [1, 2, 4]
    fails(DownloadError, url, "503", delays=())
    assert len(server.asked) == 5
    assert_nothing_kept(url)


@pytest.mark.parametrize("header, expected", [
    ("7", 7), ("0", 1), (lambda: formatdate(time.time() + 30, usegmt=True), 30), ("soon", 1),
])
def test_retry_after(server, slept, header, expected):
    url = server.on("/net.pkl", status(429, Retry_After=header() if callable(header) else header), whole(CONTENT))
    assert download(url).read_bytes() == CONTENT
    assert slept == [pytest.approx(expected, abs=2 if callable(header) else 0)]


def test_a_server_that_asks_for_an_hour(server, slept):
    url = server.on("/net.pkl", status(503, Retry_After="3600"), whole(CONTENT))
    fails(DownloadError, url, "asks to wait 3600 s; try again later")
    assert len(server.asked) == 1 and slept == []


def test_no_connection(server, slept):
    fails(DownloadError, "http://127.0.0.1:9/net.pkl", ": no connection; try again later")  # nothing listens there
    assert slept == [1, 2, 4] and files() == []


# --- the cache ---------------------------------------------------------------------------------------


def test_offline_with_a_cached_file(server):
    url = server.on("/net.pkl", whole(CONTENT))
    path = download(url)
    server.on("/net.pkl", status(404))
    assert download(url, SHA) == path and len(server.asked) == 1
    fails(DownloadRefused, url, "404", sha256=OTHER)  # another version is not in the cache: the server is asked
    assert path.read_bytes() == CONTENT and len(server.asked) == 2


def test_a_cached_file_of_another_hash_is_replaced(server):
    newer = b"newer" * 1000
    url = server.on("/net.pkl", whole(CONTENT), whole(newer, etag='"2"'))
    path = download(url)
    assert download(url, hashlib.sha256(newer).hexdigest()) == path and path.read_bytes() == newer
    assert files() == [path.name, f"{path.name}.json"]
    assert download(url).read_bytes() == newer and len(server.asked) == 2


@pytest.mark.parametrize("keep", [0, 1000, len(CONTENT) - 1])
def test_a_truncated_cache_is_noticed(server, keep):
    url = server.on("/net.pkl", whole(CONTENT), status(404), whole(CONTENT))
    path = download(url)
    path.write_bytes(CONTENT[:keep])
    fails(DownloadRefused, url, "404")
    assert not path.exists()  # nobody takes the stump for the file
    assert download(url).read_bytes() == CONTENT and len(server.asked) == 3
    path.write_bytes(CONTENT[:keep])
    path.with_name(path.name + ".json").unlink()
    assert download(url).read_bytes() == CONTENT[:keep]  # without the record nothing would be noticed
    assert download(url, SHA).read_bytes() == CONTENT  # but the hash tells


def test_a_record_cut_short(server):
    url = server.on("/net.pkl", whole(CONTENT))
    record = download(url).with_name(module._file_name(url) + ".json")
    text = record.read_text()
    record.write_text(text[:20])
    assert download(url).read_bytes() == CONTENT and len(server.asked) == 2 and record.read_text() == text


def test_a_folder_and_a_name(server, tmp_path):
    url = server.on("/net.pkl", whole(CONTENT))
    assert download(url, folder=tmp_path / "a" / "b", name="x.bin") == tmp_path / "a" / "b" / "x.bin"
    assert (tmp_path / "a" / "b" / "x.bin").read_bytes() == CONTENT and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("url, ending", [
    ("https://h/a/net.pkl", "net.pkl"), ("https://h/a/net.pkl?key=/../x#part", "net.pkl"), ("https://h/..", ".."),
    ("https://h/..%2f..%2fetc%2fpasswd", ".._2f.._2fetc_2fpasswd"), ("https://h/", "file"), ("https://h/a\\b", "a_b"),
    ("https://h/" + "x" * 5000 + ".pkl", "x" * 96 + ".pkl"), ("https://h/é\0\n", "___"),
])
def test_names_are_harmless(url, ending):
    name = module._file_name(url)
    assert name == f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{ending}"
    assert re.fullmatch(r"[0-9a-f]{16}_[\w.-]{1,100}", name, re.ASCII) and os.path.basename(name) == name


def test_addresses_that_end_alike_have_files_of_their_own(server):
    one, two = server.on("/1/net.pkl?a", whole(b"1")), server.on("/2/net.pkl?b", whole(b"2"))
    assert [download(u).read_bytes() for u in (one, two, one)] == [b"1", b"2", b"1"] and len(server.asked) == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(server, monkeypatch):
    url = server.on("/net.pkl", whole(CONTENT))
    real = module._open_plain
    monkeypatch.setattr(module, "_open_plain",
                        lambda path, mode: real(Path("/dev/full") if path.suffix == ".part" else path, mode))
    with pytest.raises(OSError, match=r"cannot write .*\.part: No space left on device; make room or set") as caught:
        download(url)
    assert not isinstance(caught.value, ConnectionError) and "\n" not in str(caught.value)
    assert len(server.asked) == 1
    assert_nothing_kept(url, ".part.json")
    monkeypatch.setattr(module, "_open_plain", real)
    assert download(url).read_bytes() == CONTENT


@pytest.mark.parametrize("ending", [".part", ".part.json", ".lock"])
def test_a_link_that_waits_at_a_name_is_not_followed(server, tmp_path, monkeypatch, ending):
    url = server.on("/net.pkl", whole(CONTENT))
    folder, victim = cache_dir() / "downloads", tmp_path / "victim"
    folder.mkdir()
    victim.write_bytes(b"mine")
    (folder / (module._file_name(url) + ending)).symlink_to(victim)
    with pytest.raises(OSError, match="cannot write .*: Too many levels of symbolic links"):
        download(url)
    assert victim.read_bytes() == b"mine" and module._file_name(url) not in files()
    if ending == ".part":  # the twin: a plain open follows it
        monkeypatch.setattr(module, "_open_plain", open)
        download(url)
        assert victim.read_bytes() == CONTENT


@pytest.mark.parametrize("answer, reason", [
    (chunked(CONTENT), "does not end within 100000 bytes"), (whole(CONTENT, length=False), "does not end within"),
    (whole(CONTENT), f"found {len(CONTENT)} bytes, expected at most 100000"),
], ids=["chunked", "until closed", "length"])
def test_an_endless_body(server, slept, monkeypatch, answer, reason):
    url = server.on("/net.pkl", answer)
    monkeypatch.setattr(module, "LARGEST", 100_000)
    fails(DownloadRefused, url, reason)
    assert len(server.asked) == 1
    assert module._size_of(cache_dir() / "downloads" / (module._file_name(url) + ".part")) <= 100_000
    monkeypatch.setattr(module, "LARGEST", len(CONTENT))
    assert download(url).read_bytes() == CONTENT


def test_digits_of_other_scripts_in_headers(server, slept):
    assert "\u00b2".isdigit() and "\u0663".isdigit()  # as Python sees them, though float("\u00b2") fails
    busy = server.on("/net.pkl", status(503, Retry_After="\u00b2"), whole(CONTENT, Content_Length="\u00b2"))
    assert download(busy).read_bytes() == CONTENT and slept == [1]


def test_a_cache_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="cannot write .*file.*: Not a directory; make room or set ART_EDM_CACHE"):
        download(server.on("/net.pkl", whole(CONTENT)), folder=tmp_path / "file" / "sub")
    assert server.asked == [] and module.TIMEOUT == (10, 30)


@pytest.mark.parametrize("text, expected", [
    ("https://host/a.pkl", True), ("HTTP://host", True), ("mnist", False), ("dir/http://x", False),
    ("ftp://h/a", False), ("https:/one", False), ("C:\\a.pkl", False), ("gaussian:1", False),
])
def test_is_url(text, expected):
    assert is_url(text) is expected
