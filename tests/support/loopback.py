"""A web server on this computer whose answers a test writes down beforehand.

    with Loopback() as server:
        url = server.on("/net.pkl", status(503), whole(content))   # the last answer repeats
        ...
        assert [asked.status for asked in server.asked] == [503, 200]
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Dict, List, Optional

PIECE = 1 << 14


@dataclass
class Asked:
    """One request and what was answered: `sent` counts the body's bytes."""

    path: str
    headers: Dict[str, str]
    status: int = 0
    sent: int = 0


def isolate(monkeypatch, folder):
    """An empty cache in `folder`, and no proxy between the tests and this computer; inherited by processes."""
    monkeypatch.setenv("ART_EDM_CACHE", str(folder))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.asked = Asked(self.path, dict(self.headers))
        self.close_connection = True
        with self.server.lock:
            self.server.asked.append(self.asked)
            steps = self.server.steps.get(self.path, [status(404)])
            step = steps.pop(0) if len(steps) > 1 else steps[0]
        try:
            step(self)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has seen enough

    def head(self, code: int, headers: Dict[str, str]):
        self.asked.status = code
        self.send_response(code)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.send_header("Connection", "close")
        self.end_headers()

    def body(self, content: bytes, frame=lambda piece: piece):
        for start in range(0, len(content), PIECE):
            piece = content[start : start + PIECE]
            self.wfile.write(frame(piece))
            self.wfile.flush()
            self.asked.sent += len(piece)

    def log_message(self, *args):
        pass


class Loopback(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: List[Asked] = []
        self.steps: Dict[str, list] = {}
        self.lock, self.over = threading.Lock(), threading.Event()

    def on(self, path: str, *steps) -> str:
        """Answer requests for `path` with these steps in turn; returns its address."""
        self.steps[path] = list(steps)
        return self.url(path)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.over.set()  # ends every silence
        self.shutdown()
        self.thread.join()
        self.server_close()


def whole(content: bytes, etag: Optional[str] = '"1"', ranges: bool = True, if_range: bool = True,
          cut: Optional[int] = None, silence: float = 0, delay: float = 0, length: bool = True, **headers):
    """A file server's answer, ranges included.

    Args:
        etag: the file's version; None sends none.
        ranges: whether `Range` is honoured.
        if_range: whether `If-Range` is; a server that does not may mix two versions.
        cut: close the connection after so many bytes of the body.
        silence: seconds without a byte before that.
        delay: seconds before the first byte.
        length: send Content-Length; without it the end of the connection is the end of the file.
        headers: further ones, `_` for `-`; None removes one.
    """
    def step(handler: Handler):
        start, fields = 0, {"Content-Type": "application/octet-stream", "ETag": etag}
        wanted = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
        known = handler.headers.get("If-Range")
        if wanted and ranges and (known in (None, etag, headers.get("Last_Modified")) or not if_range):
            start = int(wanted.group(1))
            if start >= len(content):
                return status(416, Content_Range=f"bytes */{len(content)}")(handler)
            fields["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if length:
            fields["Content-Length"] = len(content) - start
        fields.update({name.replace("_", "-"): value for name, value in headers.items()})
        handler.server.over.wait(delay)
        handler.head(206 if start else 200, fields)
        handler.body(content[start:] if cut is None else content[start : start + cut])
        handler.server.over.wait(silence)
    return step


def chunked(content: bytes, cut: bool = False, **headers):
    """A file of unannounced length; `cut` leaves out the mark of its end."""
    def step(handler: Handler):
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.head(200, {"Transfer-Encoding": "chunked", **fields})
        handler.body(content, lambda piece: b"%x\r\n%s\r\n" % (len(piece), piece))
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
    return step


def status(code: int, body: bytes = b"", **headers):
    """A bare status."""
    def step(handler: Handler):
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        handler.head(code, {"Content-Length": len(body), **fields})
        handler.body(body)
    return step


def page(text: str = "<!DOCTYPE html><title>Sign in</title>", kind: Optional[str] = "text/html; charset=utf-8"):
    """A web page where a file was wanted."""
    return status(200, text.encode(), Content_Type=kind)


def redirect(target: str):
    return status(302, Location=target)
