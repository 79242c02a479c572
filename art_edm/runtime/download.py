"""One file from an address into the per-user cache: whole and checked, or absent.

    NAME             the finished file; it appears by a rename, after every check
    NAME.json        its record: address, length, SHA-256
    NAME.part        what has come so far, with a note NAME.part.json; the next attempt continues it
    NAME.lock        held while a process works on NAME; the system frees it when the process ends, however

A passing failure (no connection, silence, a body cut short, 429, 5xx) is tried again, after the next of
DELAYS seconds; an attempt that brought new bytes starts the count anew.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterator, Optional, Sequence

from art_edm.runtime.files import PathLike, cache_dir, sha256_of
from art_edm.runtime.progress import Progress
from art_edm.runtime.transfer import (
    ELSEWHERE,
    LONGEST_WAIT,
    PAGE,
    Passing,
    Refusal,
    discard,
    disk_errors,
    open_plain,
    read_note,
    size_of,
    transfer,
    write_note,
)

__all__ = ["DELAYS", "DownloadError", "DownloadRefused", "download", "is_url"]

DELAYS = (1.0, 2.0, 4.0)  # s: before each further attempt


class DownloadError(ConnectionError):
    """The file could not be had now; it may work later. `reason` is the cause alone, in a few words."""

    reason: str = ""


class DownloadRefused(ValueError):
    """The address does not lead to the file that is wanted. `reason` is the cause alone."""

    reason: str = ""


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


def is_url(text: str) -> bool:
    """Whether `text` is an http or https address rather than a path or a name."""
    return text.lower().startswith(("http://", "https://"))


def download(
    url: str,
    sha256: Optional[str] = None,
    quiet: bool = False,
    folder: Optional[PathLike] = None,
    check: Optional[Callable[[Path], Any]] = None,
    name: Optional[str] = None,
    delays: Optional[Sequence[float]] = None,
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
    given = DELAYS if delays is None else delays
    job = _Job(url, home / (name or _file_name(url)), sha256 and sha256.lower(), quiet, check, given)
    try:
        if not is_url(url):
            raise Refusal("not an http or https address", "correct it or give the path of a file")
        if not _is_kept(job):
            with disk_errors(home):
                home.mkdir(parents=True, exist_ok=True)
            with _locked(job):
                if not _is_kept(job):  # or another process has finished it meanwhile
                    _obtain(job)
    except (Refusal, Passing) as problem:
        refused = isinstance(problem, Refusal)
        remedy = problem.remedy if refused else f"try again later, or {ELSEWHERE}"
        kind = DownloadRefused if refused else DownloadError
        error = kind(f"could not download {job.shown}: {problem}; {remedy}")
        error.reason = str(problem)
        raise error from None
    return job.path


def _file_name(url: str) -> str:
    """16 hex digits of the address's SHA-256, and the end of its path, harmless as a name."""
    last = re.sub(r"[^A-Za-z0-9._-]", "_", re.split(r"[?#]", url)[0].rpartition("/")[2])[-100:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{last or 'file'}"


def _is_kept(job: _Job) -> bool:
    """Whether the finished file is there, whole and as wanted."""
    if not job.path.is_file() or _is_cut(job):
        return False
    if job.sha256 is not None and sha256_of(job.path) != job.sha256:
        return False
    return job.check is None or _complaint(job.check, job.path) is None


def _is_cut(job: _Job) -> bool:
    """Whether the finished file has lost its recorded length; without a record it is taken as it is."""
    recorded = job.path.with_name(job.path.name + ".json").exists()
    return recorded and read_note(job.path).get("length") != size_of(job.path)


def _complaint(check: Callable[[Path], Any], path: Path) -> Optional[str]:
    try:
        check(path)
    except ValueError as error:
        return " ".join(str(error).split())
    return None


def _obtain(job: _Job) -> None:
    """Attempts until the file is complete, checked and in place."""
    if job.path.exists() and _is_cut(job):
        job.path.unlink()  # worth nothing, and nobody should take it for the file
    tries, anew, reached = 0, False, size_of(job.part)
    while True:
        try:
            continued = _attempt(job)
        except Passing as problem:
            size = size_of(job.part)
            if size > reached:
                tries, reached = 0, size
            if tries >= len(job.delays) or problem.wait > LONGEST_WAIT:
                raise
            wait = max(job.delays[tries], problem.wait)
            job.say(f"{problem}; trying again in {wait:.0f} s")
            time.sleep(wait)
            tries += 1
            continue
        try:
            _examine(job)
            return
        except Refusal:
            discard(job.part)
            if anew or not continued:
                raise
            tries, anew, reached = 0, True, 0  # it may have been put together wrongly: once more, from its start


def _attempt(job: _Job) -> bool:
    """One transfer, with a progress line where the length is known."""
    line: Optional[Progress] = None

    def shown(done: int, length: Optional[int]) -> None:
        nonlocal line
        if line is None and length is not None:
            label = f"{job.path.name.partition('_')[2][-40:] or job.path.name} MB"
            line = Progress(math.ceil(length / 1e6), label, job.quiet, done // 10**6)
        if line is not None:
            line.update(done // 10**6)

    try:
        return transfer(job.url, job.part, job.sha256 is not None, shown)
    finally:
        if line is not None:
            line.close()


def _examine(job: _Job) -> None:
    """Check the complete part and put it in place; Refusal says what is wrong with it."""
    correct = f"correct the address, or {ELSEWHERE}"
    digest, size = sha256_of(job.part), size_of(job.part)
    with open(job.part, "rb") as file:
        head = file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if job.sha256 != digest and head.startswith((b"<!doctype html", b"<html")):
        raise Refusal(PAGE, correct)
    if job.sha256 not in (None, digest):
        raise Refusal(f"its SHA-256 is {digest}, expected {job.sha256}", f"damaged or another version: {correct}")
    if size == 0:
        raise Refusal("the file is empty", correct)
    complaint = _complaint(job.check, job.part) if job.check else None
    if complaint is not None:
        raise Refusal(complaint, correct)
    with disk_errors(job.path):  # the record first: a file beside a record that is not its own is fetched again
        write_note(job.path, {"url": job.shown, "length": size, "sha256": digest})
        os.replace(job.part, job.path)
        discard(job.part)


@contextmanager
def _locked(job: _Job) -> Iterator[None]:
    """Alone among processes and threads at work on this file; waits for the one before."""
    lock = job.path.with_name(job.path.name + ".lock")
    with disk_errors(lock):
        file = open_plain(lock, "ab")
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
