"""Log lines on their way to stderr, without anybody waiting for who reads them."""

from __future__ import annotations

import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from parallax.runtime.logs import LogFormat, LogLevel, configure_logging

MAX_LINES: Final = 10_000  # some megabytes: seconds of a busy log, or hours of a calm one
LAST_LINES_S: Final = 1.0  # for what is left when the process ends


class BackgroundWriter:
    """
    A stream that a thread of its own writes to *descriptor*, so that `write` never blocks.

    A log reader that stops reading would otherwise stop the event loop with the first full
    pipe. What does not fit is dropped, and a line says how many were, once there is room.

    Args:
        descriptor: Taken over: closed only with the process. Its own duplicate, so that it stays what
            it is when descriptor 2 is replaced.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lines: deque[str] = deque()
        self._dropped = 0
        self._changed = threading.Condition()
        self._is_writing = False
        # A daemon: a thread that is stuck in a write must not keep the process from ending.
        threading.Thread(target=self._write, name="log-writer", daemon=True).start()

    def write(self, text: str) -> int:
        """Queue *text*, whole lines."""
        with self._changed:
            if len(self._lines) < MAX_LINES:
                self._lines.append(self._notice() + text)
                self._changed.notify_all()
            else:
                self._dropped += 1
        return len(text)

    def flush(self) -> None:
        """Nothing: each line is on its way already; see `drain`."""

    def isatty(self) -> bool:
        """Whether people see it at once."""
        return os.isatty(self._descriptor)

    def drain(self, timeout_s: float = LAST_LINES_S) -> bool:
        """Wait until all is written, at most *timeout_s*; whether it is."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._lines and not self._is_writing, timeout_s)

    def _write(self) -> None:
        while True:
            with self._changed:
                self._is_writing = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._lines))
                self._is_writing = True
                text = self._lines.popleft()
                if not self._lines:
                    text += self._notice()
            self._put(text.encode("utf-8", "backslashreplace"))

    def _notice(self) -> str:
        """What to say of the lines dropped since the last notice."""
        dropped, self._dropped = self._dropped, 0
        return f"({dropped} log lines were dropped: nobody read them in time)\n" if dropped else ""

    def _put(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._descriptor, data) :]
        except OSError:
            return  # the reader is gone for good; there is nobody to tell


@contextmanager
def process_log(level: LogLevel, format: LogFormat) -> Iterator[None]:  # noqa: A002 - as in `logs`
    """
    Log to stderr without waiting for it, for a process that owns it.

    After the block, what was logged in it is there: the line that says why a process ends comes last.
    """
    writer = background_stderr()
    configure_logging(level, format, writer)
    try:
        yield
    finally:
        if writer is not None:
            writer.drain()


def background_stderr() -> BackgroundWriter | None:
    """A writer to where stderr leads now, drained when the process ends; None if there is no such place."""
    try:
        descriptor = os.dup(sys.stderr.fileno())
    except (AttributeError, OSError, ValueError):  # None, closed, or something that only looks like a file
        return None
    writer = BackgroundWriter(descriptor)
    atexit.register(writer.drain)
    return writer
