"""One attempt to complete a file from an address: ask for the bytes that are missing, write what comes.

    PART             the bytes so far
    PART.json        what they belong to: source (a hash of the address), validator, length

A part is continued by `Range` with `If-Range`, so a server whose file has changed since sends the new one
from its start. What is raised says how to go on: `Passing` (try again) or `Refusal` (do not).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, Optional, Tuple

import requests

__all__ = [
    "ELSEWHERE", "LONGEST_WAIT", "PAGE", "TIMEOUT", "Passing", "Refusal",
    "discard", "disk_errors", "open_plain", "read_note", "size_of", "transfer", "write_note",
]

TIMEOUT = (10.0, 30.0)  # s: to connect, and of silence between bytes
LONGEST_WAIT = 60.0  # s: a server that asks for more (Retry-After) is left alone
BLOCK = 1 << 16  # bytes read at a time
LARGEST = 1 << 35  # bytes of a file; a server may never end
PAGE = "the address answered with a web page, not a file"
ELSEWHERE = "download it elsewhere and give the path of the file"


class Passing(Exception):
    """The attempt failed in a way that may pass; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Refusal(Exception):
    """The address does not lead to the file; `remedy` is what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


def transfer(url: str, part: Path, verified: bool, shown: Callable[[int, Optional[int]], Any]) -> bool:
    """Complete `part`, by one request, or two where what was there does not fit.

    Args:
        url: http or https address.
        part: file to continue or to begin.
        verified: the caller knows the file's hash; then a web page may be what is wanted, and a part may
            be continued though the server gives nothing to recognise its version by.
        shown: called with the bytes so far and the length of the whole, None if the server does not tell.
    Returns:
        whether bytes of an earlier attempt were continued.
    Raises:
        Passing, Refusal: why the part is not complete.
        OSError: the disk does not take it.
    """
    offset, headers, noted = _continuation(url, part, verified)
    unfit = False
    try:
        with _ask(url, headers) as reply:
            if offset and reply.status_code in (206, 416):
                begin, length = _content_range(reply)
                unfit = reply.status_code == 416 or begin != offset or noted not in (None, length)
            elif reply.status_code == 200:
                offset, length = 0, _content_length(reply)
            else:
                raise _failure(reply)
            if not unfit:
                if "html" in reply.headers.get("Content-Type", "").lower() and not verified:
                    raise Refusal(PAGE, f"correct the address, or {ELSEWHERE}")
                _receive(reply, url, part, offset, length, shown)
    except requests.RequestException as error:
        raise Passing(_cause(error)) from None
    if unfit:  # the part belongs to something else: without it the whole file is asked for
        discard(part)
        return transfer(url, part, verified, shown)
    if length is not None and size_of(part) != length:
        raise Passing(f"{size_of(part)} of {length} bytes came")
    return offset > 0


def _continuation(url: str, part: Path, verified: bool) -> Tuple[int, Dict[str, str], Optional[int]]:
    """Bytes to keep of the part, the request's headers, and the length noted for the whole."""
    headers = {"Accept-Encoding": "identity"}  # so that lengths are the file's
    note, offset = read_note(part), size_of(part)
    validator = note.get("validator")
    if note.get("source") != _source(url) or not offset or not (validator or verified):
        return 0, headers, None
    headers["Range"] = f"bytes={offset}-"
    if validator:
        headers["If-Range"] = str(validator)
    return offset, headers, note.get("length")


def _ask(url: str, headers: Dict[str, str]) -> requests.Response:
    try:
        reply = requests.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except (ValueError, requests.TooManyRedirects) as error:  # InvalidURL, InvalidSchema and their kind
        reason = f"not a usable address ({' '.join(str(error).split())})"
        raise Refusal(reason, f"correct it, or {ELSEWHERE}") from None
    reply.raw.headers.pop("Content-Encoding", None)  # or requests would decode, and lengths would not hold
    return reply


def _failure(reply: requests.Response) -> Exception:
    """What a status other than success means."""
    code = reply.status_code
    reason = f"the server answered {code} {reply.reason or ''}".rstrip()
    if code in (408, 425, 429) or code >= 500:
        wait = _retry_after(reply.headers.get("Retry-After", ""))
        asked = f" and asks to wait {wait:.0f} s" if wait > LONGEST_WAIT else ""
        return Passing(reason + asked, wait)
    access = "the file may need a login" if code in (401, 402, 403, 407, 451) else "check the address"
    return Refusal(reason, f"{access}, or {ELSEWHERE}")


def _retry_after(text: str) -> float:
    """Seconds to wait by a Retry-After header, which holds seconds or a date."""
    if text.isascii() and text.strip().isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (TypeError, ValueError, IndexError):
        return 0.0


def _content_length(reply: requests.Response) -> Optional[int]:
    text = reply.headers.get("Content-Length", "")
    chunked = "chunked" in reply.headers.get("Transfer-Encoding", "").lower()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 and not chunked else None


def _content_range(reply: requests.Response) -> Tuple[int, Optional[int]]:
    """First byte and length of the whole file; -1 if the header is not of one range to the file's end."""
    text = reply.headers.get("Content-Range", "").strip()
    found = re.fullmatch(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", text)
    first, last, length = (int(n) for n in found.groups()) if found else (-1, -1, 0)
    return (first, length) if found and last + 1 == length else (-1, None)


def _receive(
    reply: requests.Response, url: str, part: Path, offset: int, length: Optional[int], shown: Callable[..., Any]
) -> None:
    """Write the body behind the first `offset` bytes of the part."""
    tag = reply.headers.get("ETag", "")
    validator = tag if tag.startswith('"') else reply.headers.get("Last-Modified")  # a weak tag serves no range
    if (length or 0) > LARGEST:
        raise Refusal(f"found {length} bytes, expected at most {LARGEST}", f"correct the address, or {ELSEWHERE}")
    with disk_errors(part), open_plain(part, "ab" if offset else "wb") as file:
        if not offset:  # after the old bytes are gone, before the first new one
            write_note(part, {"source": _source(url), "validator": validator, "length": length})
        for block in reply.iter_content(BLOCK):
            if offset + len(block) > LARGEST:
                raise Refusal(f"the body does not end within {LARGEST} bytes", f"correct the address, or {ELSEWHERE}")
            offset += file.write(block)
            file.flush()  # so that a process that is killed loses less than a block
            shown(offset, length)
        os.fsync(file.fileno())


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


def _source(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()  # an address may hold a password


def size_of(path: Path) -> int:
    """Bytes in a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def read_note(path: Path) -> Dict[str, Any]:
    """The note beside a file; empty when it is absent or was cut short."""
    try:
        found = json.loads(path.with_name(path.name + ".json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_note(path: Path, content: Dict[str, Any]) -> None:
    """Write the note beside a file; in place, as the writer is alone and `read_note` bears half of one."""
    with open_plain(path.with_name(path.name + ".json"), "w") as file:
        file.write(json.dumps(content) + "\n")


def open_plain(path: Path, mode: str) -> IO[Any]:
    """`open` of a file whose name others can guess: a symbolic link that waits there is an error, not followed."""
    return open(path, mode, opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NOFOLLOW", 0), 0o666))


def discard(part: Path) -> None:
    """Remove a part and its note."""
    for path in (part, part.with_name(part.name + ".json")):
        if path.exists():
            path.unlink()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say errors of the disk in one line with what to do; those of the network pass through."""
    try:
        yield
    except requests.RequestException:  # an OSError too
        raise
    except OSError as error:
        remedy = "make room or set ART_EDM_CACHE to a folder that can be written, then run it again"
        raise OSError(f"cannot write {path}: {error.strerror or error}; {remedy}") from None
