"""Progress of long work, and stopping it between two steps."""

from __future__ import annotations

import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Optional, Type

__all__ = ["GracefulStop", "Progress"]


class Progress:
    """One line on a terminal with rate and time left; silent with `quiet` or when not a terminal.

    Args:
        total: number of steps.
        label: what is being counted, shown first.
        quiet: never print.
        start: steps already done, by an earlier run that is being resumed.
    """

    def __init__(self, total: int, label: str, quiet: bool = False, start: int = 0) -> None:
        self.total, self.label, self.start = total, label, start
        self.shown = not quiet and sys.stderr.isatty()
        self.began = time.monotonic()
        self.last = 0.0

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` steps are finished; at most ten times a second."""
        now = time.monotonic()
        if now < max(self.last, self.began):  # the clock jumped back: count anew from here
            self.began, self.last, self.start = now, now, done
        if not self.shown or (now - self.last < 0.1 and done < self.total):
            return
        self.last = now
        rate = max(done - self.start, 1) / max(now - self.began, 1e-9)
        left = (self.total - done) / rate
        line = f"{self.label} {done}/{self.total}  {rate:.3g}/s  {_clock(left)} left  {note}"
        sys.stderr.write("\r" + line[:100].ljust(100))
        sys.stderr.flush()

    def close(self) -> None:
        """Clear the line."""
        if self.shown:
            sys.stderr.write("\r" + " " * 100 + "\r")
            sys.stderr.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class GracefulStop:
    """Context in which Ctrl-C and SIGTERM set `requested` instead of ending the process.

    A loop tests `stop.requested` between steps, saves and leaves. A second Ctrl-C interrupts at once. One within
    another takes over what the outer was asked, and leaves it what it was asked itself: nothing is lost between two.
    Outside the main thread, where Python allows no handlers, it changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._old: dict = {}
        self._outer: object = None  # whose method the handler before was

    def __enter__(self) -> "GracefulStop":
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                old = self._old[number] = signal.signal(number, self._handle)
                self._outer = getattr(old, "__self__", None)
                self.requested |= getattr(self._outer, "requested", False)
            except ValueError:  # not the main thread
                break
        return self

    def _handle(self, number: int, frame: Optional[FrameType]) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(
        self, kind: Optional[Type[BaseException]], value: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        if isinstance(self._outer, GracefulStop):
            self._outer.requested |= self.requested
