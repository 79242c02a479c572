"""Noticing that another process has ended, however it did: an idle connection, which the system then closes.

Symbols
-------
line  a connection of process 0 to another; nothing is ever sent over it but the other's rank, once
gone  the processes whose line was closed: process 0 knows all of them, the others only process 0
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from typing import Any, Dict, Set

__all__ = ["Lines"]

PATIENCE = 2.0  # s for a line to be made


class Lines:
    """Process 0's lines to the others, or another's line to process 0; none where they cannot be had.

    Args:
        store: tells the others where to find process 0, which is at $MASTER_ADDR.
    """

    def __init__(self, rank: int, size: int, store: Any) -> None:
        self._size, self._server = size, None
        self._open: Dict[int, socket.socket] = {}
        self._gone: Set[int] = set()
        port = "0"
        try:
            if rank == 0:
                both = socket.has_dualstack_ipv6()
                family = socket.AF_INET6 if both else socket.AF_INET
                self._server = socket.create_server(("", 0), family=family, backlog=size, dualstack_ipv6=both)
                self._server.setblocking(False)
                port = str(self._server.getsockname()[1])
            else:
                place = (os.environ["MASTER_ADDR"], int(store.get("line")))
                line = socket.create_connection(place, timeout=PATIENCE)
                line.sendall(rank.to_bytes(4, "big"))
                self._watch(0, line)
        except OSError:  # then torchrun alone notices
            pass
        if rank == 0:
            store.set("line", port)

    def gone(self) -> Set[int]:
        """The processes that are known to have ended."""
        self._accept()
        for rank, line in list(self._open.items()):
            try:
                line.recv(1)
            except BlockingIOError:  # still there: nothing is ever sent
                continue
            except OSError:  # reset, or out of reach
                pass
            self._open.pop(rank).close()
            self._gone.add(rank)
        return self._gone

    def _watch(self, rank: int, line: socket.socket) -> None:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that loses power closes nothing
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 3)):  # s, s
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        line.setblocking(False)
        self._open[rank] = line

    def _accept(self) -> None:
        while self._server is not None:
            try:
                line, _ = self._server.accept()
            except OSError:  # nobody calls
                return
            line.settimeout(PATIENCE)
            rank = 0
            with suppress(OSError):
                rank = int.from_bytes(line.recv(4), "big")
            if 0 < rank < self._size and rank not in self._open:
                self._watch(rank, line)
            else:  # a stranger
                line.close()

    def close(self) -> None:
        """Hang up."""
        for line in (*self._open.values(), *([self._server] if self._server else [])):
            line.close()
        self._open, self._server = {}, None
