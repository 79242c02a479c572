"""One file from an address into the per-user cache: whole and checked, or absent.

    NAME             the finished file; it appears by a rename, after every check
    NAME.json        its record: address, length, SHA-256
    NAME.part        what has come so far; NAME.part.json: source (a hash of the address), validator, length
    NAME.lock        held while a process works on NAME; the system frees it when the process ends, however

A part is continued by `Range` with `If-Range`, so a server whose file has changed since sends the new one from its
start. A passing failure (no connection, silence, a body cut short, 429, 5xx) is tried again, after the next of DELAYS
seconds; an attempt that brought new bytes starts the count anew. Which statuses pass, and for how long a server asks to
wait, is read by urllib3's `Retry`; the loop is our own, since urllib3 does not repeat a request whose body broke off.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Callable, Dict, Iterator, Optional, Sequence, Tuple

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util.retry import Retry

from art_edm.runtime.files import PathLike, cache_dir, sha256_of
from art_edm.runtime.progress import Progress

__all__ = ["DELAYS", "DownloadError", "DownloadRefused", "download", "is_url"]

DELAYS = (1.0, 2.0, 4.0)  # s: before each further attempt
LONGEST_WAIT = 60.0  # s: a server that asks for more (Retry-After) is left alone
TIMEOUT = (10.0, 30.0)  # s: to connect, and of silence between bytes
BLOCK = 1 << 16  # bytes read at a time
LARGEST = 1 << 35  # bytes of a file; a server may never end
BUSY = Retry(status_forcelist=(408, 425, 429, *range(500, 600)))
PAGE = "the address answered with a web page, not a file"
ELSEWHERE = "download it elsewhere and give the path of the file"


class DownloadError(ConnectionError):
    """The file could not be had now; it may work later. `reason` is the cause alone, in a few words."""

    reason, wait = "", 0.0  # wait: s that the server asks for


class DownloadRefused(ValueError):
    """The address does not lead to the file that is wanted. `reason` is the cause alone."""

    reason = ""


@dataclass(frozen=True)
class _Job:
    url: str
    path: Path
    sha256: Optional[str]
    quiet: bool
    check: Optional[Callable[[Path], Any]]
    delays: Sequence[float]

    @property
    def part(self) -> Path:
        return self.path.with_name(self.path.name + ".part")

    @property
    def shown(self) -> str:
        return re.sub(r"//[^/@]*@", "//", self.url)  # without a password

    def say(self, text: str) -> None:
        if not self.quiet and sys.stderr.isatty():
            print(f"{self.shown}: {text}", file=sys.stderr)

    def refused(self, reason: str, remedy: str = "correct the address") -> DownloadRefused:
        error = DownloadRefused(f"could not download {self.shown}: {reason}; {remedy}, or {ELSEWHERE}")
        error.reason = reason
        return error

    def passing(self, reason: str, wait: float = 0.0) -> DownloadError:
        error = DownloadError(f"could not download {self.shown}: {reason}; try again later, or {ELSEWHERE}")
        error.reason, error.wait = reason, wait
        return error


def is_url(text: str) -> bool:
    """Whether `text` is an http or https address rather than a path or a name."""
    return text.lower().startswith(("http://", "https://"))


def download(
    url: str, sha256: Optional[str] = None, quiet: bool = False, folder: Optional[PathLike] = None,
    check: Optional[Callable[[Path], Any]] = None, name: Optional[str] = None, delays: Optional[Sequence[float]] = None,
) -> Path:
    """The file at an address, from the cache if it is there (then nothing is asked of the network).

    Args:
        url: http or https address.
        sha256: what the file must have, in hexadecimal; a cached file of another hash is fetched again.
        quiet: no progress line.
        folder: where to keep it; default: `downloads` in the per-user cache.
        check: called with the path of the complete file, still under another name or already in the
            cache; raises ValueError if it is not what is wanted, and it is not used.
        name: name in `folder`; default: made from the address. Mirrors of one file share a name.
        delays: seconds before each further attempt; default DELAYS, () for a single attempt.
    Returns:
        path of the whole, checked file. Its bytes are as sent: a Content-Encoding is not undone.
    Raises:
        DownloadRefused: wrong address, a web page, a wrong hash, or what `check` found.
        DownloadError: no connection, server errors, silence; may work later, and continues then.
        OSError: the cache cannot be written.
    """
    home = Path(folder) if folder is not None else cache_dir() / "downloads"
    waits = DELAYS if delays is None else delays
    job = _Job(url, home / (name or _file_name(url)), sha256 and sha256.lower(), quiet, check, waits)
    if not is_url(url):
        raise job.refused("not an http or https address", "correct it")
    if not _is_kept(job):
        with _disk_errors(home):
            home.mkdir(parents=True, exist_ok=True)
        with _locked(job):
            if not _is_kept(job):  # or another process has finished it meanwhile
                _obtain(job)
    return job.path


def _file_name(url: str) -> str:
    """16 hex digits of the address's SHA-256, and the end of its path, harmless as a name."""
    last = re.sub(r"[^A-Za-z0-9._-]", "_", re.split(r"[?#]", url)[0].rpartition("/")[2])[-100:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{last or 'file'}"


def _is_kept(job: _Job) -> bool:
    """Whether the finished file is there, whole and as wanted."""
    return (job.path.is_file() and not _is_cut(job) and (job.sha256 is None or sha256_of(job.path) == job.sha256)
            and _complaint(job, job.path) is None)


def _is_cut(job: _Job) -> bool:
    """Whether the finished file has lost its recorded length; without a record it is taken as it is."""
    return _note_of(job.path).exists() and _read_note(job.path).get("length") != _size_of(job.path)


def _complaint(job: _Job, path: Path) -> Optional[str]:
    try:
        if job.check is not None:
            job.check(path)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _obtain(job: _Job) -> None:
    """Attempts until the file is complete, checked and in place."""
    if job.path.exists() and _is_cut(job):
        job.path.unlink()  # worth nothing, and nobody should take it for the file
    tries, anew, reached = 0, False, _size_of(job.part)
    while True:
        try:
            continued = _attempt(job)
        except DownloadError as problem:
            if _size_of(job.part) > reached:
                tries, reached = 0, _size_of(job.part)
            if tries >= len(job.delays) or problem.wait > LONGEST_WAIT:
                raise
            wait = max(job.delays[tries], problem.wait)
            job.say(f"{problem.reason}; trying again in {wait:.0f} s")
            time.sleep(wait)
            tries += 1
            continue
        try:
            return _finish(job)
        except DownloadRefused:
            _discard(job.part)
            if anew or not continued:
                raise
            tries, anew, reached = 0, True, 0  # it may have been put together wrongly: once more, from its start


def _attempt(job: _Job) -> bool:
    """Ask for the bytes that are missing and write what comes; whether bytes of an earlier attempt were continued."""
    headers, note, offset = {"Accept-Encoding": "identity"}, _read_note(job.part), _size_of(job.part)
    validator = note.get("validator")
    if note.get("source") != _source(job) or not (validator or job.sha256):
        offset = 0  # of something else, or nothing tells whether what follows is of the same version
    if offset:
        headers.update({"Range": f"bytes={offset}-", **({"If-Range": str(validator)} if validator else {})})
    fits = True
    try:
        with _ask(job, headers) as reply:
            if offset and reply.status_code in (206, 416):
                begin, length = _content_range(reply)
                fits = reply.status_code == 206 and begin == offset and note.get("length") in (None, length)
            elif reply.status_code == 200:
                begin, length = 0, _content_length(reply)
            else:
                raise _failure(job, reply)
            if fits:
                _receive(job, reply, begin, length)
    except requests.RequestException as error:
        raise job.passing(_cause(error)) from None
    if not fits:  # the part belongs to something else: without it the whole file is asked for
        _discard(job.part)
        return _attempt(job)
    if length not in (None, _size_of(job.part)):
        raise job.passing(f"{_size_of(job.part)} of {length} bytes came")
    return begin > 0


def _ask(job: _Job, headers: Dict[str, str]) -> requests.Response:
    try:
        reply = requests.get(job.url, headers=headers, stream=True, timeout=TIMEOUT)
    except (ValueError, requests.TooManyRedirects) as error:  # InvalidURL, InvalidSchema and their kind
        raise job.refused(f"not a usable address ({' '.join(str(error).split())})", "correct it") from None
    reply.raw.headers.pop("Content-Encoding", None)  # or requests would decode, and lengths would not hold
    return reply


def _failure(job: _Job, reply: requests.Response) -> Exception:
    """What a status other than success means."""
    code = reply.status_code
    reason = f"the server answered {code} {reply.reason or ''}".rstrip()
    if BUSY.is_retry("GET", code):
        try:
            wait = BUSY.get_retry_after(reply.raw) or 0.0
        except InvalidHeader:
            wait = 0.0
        return job.passing(reason + (f" and asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""), wait)
    login = code in (401, 402, 403, 407, 451)
    return job.refused(reason, "the file may need a login" if login else "check the address")


def _content_length(reply: requests.Response) -> Optional[int]:
    chunked = "chunked" in reply.headers.get("Transfer-Encoding", "").lower()
    found = re.fullmatch("[0-9]{1,19}", reply.headers.get("Content-Length", ""))
    return int(found[0]) if found and not chunked else None


def _content_range(reply: requests.Response) -> Tuple[int, Optional[int]]:
    """First byte and length of the whole file; -1 if the header is not of one range to the file's end."""
    text = reply.headers.get("Content-Range", "").strip()
    found = re.fullmatch(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", text)
    first, last, length = (int(n) for n in found.groups()) if found else (-1, -1, 0)
    return (first, length) if found and last + 1 == length else (-1, None)


def _receive(job: _Job, reply: requests.Response, offset: int, length: Optional[int]) -> None:
    """Write the body behind the first `offset` bytes of the part, with a progress line where its length is known."""
    if "html" in reply.headers.get("Content-Type", "").lower() and job.sha256 is None:
        raise job.refused(PAGE)
    if (length or 0) > LARGEST:
        raise job.refused(f"found {length} bytes, expected at most {LARGEST}")
    tag = reply.headers.get("ETag", "")
    validator = tag if tag.startswith('"') else reply.headers.get("Last-Modified")  # a weak tag serves no range
    label = f"{job.path.name.partition('_')[2][-40:] or job.path.name} MB"
    line = Progress(math.ceil((length or 0) / 1e6), label, job.quiet or length is None, offset // 10**6)
    try:
        with _disk_errors(job.part), _open_plain(job.part, "ab" if offset else "wb") as file:
            if not offset:  # after the old bytes are gone, before the first new one
                _write_note(job.part, {"source": _source(job), "validator": validator, "length": length})
            for block in reply.iter_content(BLOCK):
                if offset + len(block) > LARGEST:
                    raise job.refused(f"the body does not end within {LARGEST} bytes")
                offset += file.write(block)
                file.flush()  # so that a process that is killed loses less than a block
                line.update(offset // 10**6)
            os.fsync(file.fileno())
    finally:
        line.close()


def _finish(job: _Job) -> None:
    """Check the complete part and put it in place; DownloadRefused says what is wrong with it."""
    digest, size = sha256_of(job.part), _size_of(job.part)
    with open(job.part, "rb") as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if job.sha256 != digest and head.startswith((b"<!doctype html", b"<html")):
        raise job.refused(PAGE)
    if job.sha256 not in (None, digest):
        raise job.refused(f"its SHA-256 is {digest}, expected {job.sha256}",
                          "damaged or another version: correct the address")
    complaint = _complaint(job, job.part) if size else "the file is empty"
    if complaint is not None:
        raise job.refused(complaint)
    with _disk_errors(job.path):  # the record first: a file beside a record that is not its own is fetched again
        _write_note(job.path, {"url": job.shown, "length": size, "sha256": digest})
        os.replace(job.part, job.path)
        _discard(job.part)


def _cause(error: Exception) -> str:
    """A failure of requests in plain words."""
    text = str(error).lower()
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {TIMEOUT[0]:g} s"
    if isinstance(error, requests.Timeout) or "timed out" in text:
        return f"the server was silent for {TIMEOUT[1]:g} s"
    if isinstance(error, requests.exceptions.SSLError):
        return "the secure connection failed (certificate or protocol)"
    if isinstance(error, requests.exceptions.ProxyError):
        return "the proxy does not connect"
    broken = isinstance(error, requests.exceptions.ChunkedEncodingError) or "aborted" in text or "broken" in text
    return "the connection broke" if broken else "no connection"


def _source(job: _Job) -> str:
    return hashlib.sha256(job.url.encode()).hexdigest()  # an address may hold a password


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _note_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_note(path: Path) -> Dict[str, Any]:
    """The note beside a file; empty when it is absent or was cut short."""
    try:
        found = json.loads(_note_of(path).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_note(path: Path, content: Dict[str, Any]) -> None:
    """Write the note beside a file; in place, as the writer is alone and `_read_note` bears half of one."""
    with _open_plain(_note_of(path), "w") as file:
        file.write(json.dumps(content) + "\n")


def _open_plain(path: Path, mode: str) -> IO[Any]:
    """`open` of a file whose name others can guess: a symbolic link that waits there is an error, not followed."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666))


def _discard(part: Path) -> None:
    """Remove a part and its note."""
    for path in (part, _note_of(part)):
        if path.exists():
            path.unlink()


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Say errors of the disk in one line with what to do; those of the network pass through."""
    try:
        yield
    except requests.RequestException:  # an OSError too
        raise
    except OSError as error:
        remedy = "make room or set ART_EDM_CACHE to a folder that can be written, then run it again"
        raise OSError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None


@contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """Alone among processes and threads at work on this file; waits for the one before."""
    lock = job.path.with_name(job.path.name + ".lock")
    with _disk_errors(lock):
        file = _open_plain(lock, "ab")
    with file:
        waited = False
        while not _try_lock(file):
            if not waited:
                job.say("another process is downloading it; waiting")
            waited = True
            time.sleep(0.05)
        yield


def _try_lock(file: BinaryIO) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network file systems have no locks
        text = f"cannot lock {file.name}: {error.strerror}; set ART_EDM_CACHE to a folder on a local disk"
        raise OSError(text) from None
    return True
