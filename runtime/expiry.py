"""Work that ends when a certificate does, by the wall clock, or when it is ended for another cause."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from parallax.runtime.deadlines import Deadlines
from parallax.security.errors import ParallaxError

# Timers stand still while a machine sleeps, and clocks are set; certificates expire anyway. So the wall clock
# is looked at again and again, by one timer for all: one for each was a tenth of what a unary call cost.
LOOK_S: Final = 0.25
MANY_SLOTS: Final = 256  # each certificate ends at another second, and is renewed long before


Told = Callable[[ParallaxError | None], None]


@dataclass(slots=True, eq=False)
class Lapsing:
    """
    A task that lasts no longer than a certificate, or so much longer as it asks for; made by `Expiry.enter`.

    Args:
        until: When the certificate ends, as a timestamp.
        work: What the task does, for whoever looks through them.
        on_lapse: Tells the task to begin nothing new, and the cause; None: its certificate has ended. It must
            not block. Without it there is no telling the task.

    Attributes:
        is_over: It has left, or has been ended.
        cause: What it was ended for; None if its certificate ended.
    """

    task: asyncio.Task[Any]
    until: float
    work: Any = None
    on_lapse: Told | None = None
    slot: int = 0
    drain_s: float = 0.0
    is_over: bool = False
    cause: ParallaxError | None = None

    def drain(self, drain_s: float, on_lapse: Told) -> None:
        """Let the task outlive its certificate by *drain_s*, to finish; *on_lapse* tells it when to."""
        self.drain_s, self.on_lapse = drain_s, on_lapse

    def lapse(self, cause: ParallaxError | None = None) -> None:
        """Have the task begin nothing new from here on, and end it if there is no telling it so."""
        if self.on_lapse is None:
            self.end(cause)
        else:
            # Later: whatever goes wrong there must not keep others going.
            self.task.get_loop().call_soon(self.on_lapse, cause)
            self.on_lapse = no_news

    def end(self, cause: ParallaxError | None = None) -> None:
        """Cancel the task now, unless it is over."""
        if not self.is_over:
            self.is_over, self.cause = True, cause
            self.task.cancel()

    def has_ended_it(self) -> bool:
        """Whether the cancellation that the task has caught is ours and no other's; it is taken back then."""
        return self.is_over and self.task.uncancel() == 0


def no_news(_: ParallaxError | None) -> None:
    """Stands in `on_lapse` of what begins nothing new anyway, or has been told already."""


class Expiry:
    """
    Cancels tasks once the certificates that they rest on are no longer valid, at most `LOOK_S` late.

    Args:
        now: Aware UTC.
        look_s: How often it is asked, while there are tasks.
    """

    def __init__(self, now: Callable[[], datetime], look_s: float = LOOK_S) -> None:
        self._now = now
        self._look_s = look_s
        self._deadlines: Deadlines[Lapsing] = Deadlines(many=MANY_SLOTS)
        self._count = 0
        self._timer: asyncio.TimerHandle | None = None  # while there are tasks
        self._loop: asyncio.AbstractEventLoop | None = (
            None  # kept: until Python 3.12, asking is a system call
        )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Lapsing]:
        """All that have entered and not left, in no order; none may meanwhile."""
        return iter(self._deadlines)

    def enter(self, until: datetime, work: object = None, on_lapse: Told | None = None) -> Lapsing:
        """From here on the current task is cancelled once *until* is over; give back what this returns."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(self._loop)
        assert task is not None, "called in a coroutine"  # noqa: S101 - our own bug
        lapsing = Lapsing(task, until.timestamp(), work, on_lapse)
        lapsing.slot = self._deadlines.add(lapsing, lapsing.until)
        self._count += 1
        if self._timer is None:
            self._timer = self._loop.call_later(self._look_s, self._look)
        return lapsing

    def leave(self, lapsing: Lapsing) -> None:
        """It has ended, whether in time or not."""
        lapsing.is_over = True
        self._deadlines.discard(lapsing, lapsing.slot)
        self._count -= 1

    def _look(self) -> None:
        self._timer = None
        loop = self._loop
        if loop is None:
            return
        for lapsing in self._deadlines.expire(self._now().timestamp()):
            if lapsing.drain_s:
                lapsing.lapse()
                # By the same clock: a machine that slept through it has had its time.
                lapsing.slot = self._deadlines.add(lapsing, lapsing.until + lapsing.drain_s)
                lapsing.drain_s = 0.0
            else:
                lapsing.end()
        if self._count:
            self._timer = loop.call_later(self._look_s, self._look)
