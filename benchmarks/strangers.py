"""
Strangers on the machine: they take as much processor time as they are told, and do nothing else.

What calls lose to them, they lose to the machine. They come in pairs and in pieces of a third of a
millisecond, as work comes that goes to and fro between two processes and their threads.
"""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

AT_ONCE: Final = 2
PIECE_S: Final = 0.0003
PAUSE_S: Final = 0.0001


def burn(seconds: float) -> None:
    """Take so much processor time."""
    end = time.thread_time() + seconds
    while (now := time.thread_time()) < end:
        while time.thread_time() < min(now + PIECE_S, end):
            pass
        time.sleep(PAUSE_S)


class Strangers:
    """So many pairs of processes, for as long as the block."""

    def __init__(self, pairs: int) -> None:
        self._pairs = pairs
        self._next = 0

    def __enter__(self) -> Self:
        """Start them."""
        with ExitStack() as stack:
            command = (sys.executable, str(Path(__file__)))
            self._all = [
                stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, text=True))
                for _ in range(self._pairs * AT_ONCE)
            ]
            self._ends = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """They end when they are told nothing more."""
        self._ends.close()

    def take(self, seconds: float) -> None:
        """Have the next pair take so much processor time, beginning now."""
        for _ in range(AT_ONCE):
            stranger = self._all[self._next % len(self._all)]
            self._next += 1
            assert stranger.stdin is not None, "it was started with a pipe"  # noqa: S101 - our own bug
            print(seconds / AT_ONCE, file=stranger.stdin, flush=True)


if __name__ == "__main__":
    for line in sys.stdin:
        burn(float(line))
