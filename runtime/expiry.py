"""Work that ends when a certificate does, by the wall clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from parallax.runtime.deadlines import Deadlines

# Timers stand still while a machine sleeps, and clocks are set; certificates expire anyway. So the wall clock
# is looked at again and again, by one timer for all: one for each was a tenth of what a unary call cost.
LOOK_S: Final = 0.25
MANY_SLOTS: Final = 256  # each certificate ends at another second, and is renewed long before


@dataclass(slots=True, eq=False)
class Lapsing:
    """
    A task that lasts no longer than a certificate, or so much longer as it asks for; made by `Expiry.enter`.

    Args:
        until: When the certificate ends, as a timestamp.
        on_lapse: Called at that end, if the task then has *drain_s* left; it must not block.
    """

    task: asyncio.Task[Any]
    until: float
    slot: int = 0
    is_over: bool = False
    on_lapse: Callable[[], None] | None = None
    drain_s: float = 0.0

    def drain(self, drain_s: float, on_lapse: Callable[[], None]) -> None:
        """Let the task outlive its certificate by *drain_s*, to finish; *on_lapse* tells it when to."""
        self.drain_s, self.on_lapse = drain_s, on_lapse

    def has_ended_it(self) -> bool:
        """Whether the cancellation that the task has caught is ours and no other's; it is taken back then."""
        return self.is_over and self.task.uncancel() == 0


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

    def enter(self, until: datetime) -> Lapsing:
        """From here on the current task is cancelled once *until* is over; give back what this returns."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        task = asyncio.current_task(self._loop)
        assert task is not None, "called in a coroutine"  # noqa: S101 - our own bug
        lapsing = Lapsing(task, until.timestamp())
        lapsing.slot = self._deadlines.add(lapsing, lapsing.until)
        self._count += 1
        if self._timer is None:
            self._timer = self._loop.call_later(self._look_s, self._look)
        return lapsing

    def leave(self, lapsing: Lapsing) -> None:
        """It has ended, whether in time or not."""
        self._deadlines.discard(lapsing, lapsing.slot)
        self._count -= 1

    def _look(self) -> None:
        self._timer = None
        loop = self._loop
        if loop is None:
            return
        for lapsing in self._deadlines.expire(self._now().timestamp()):
            if lapsing.on_lapse is not None:
                loop.call_soon(lapsing.on_lapse)  # whatever goes wrong there must not keep the others going
                lapsing.on_lapse = None
                # By the same clock: a machine that slept through it has had its time.
                lapsing.slot = self._deadlines.add(lapsing, lapsing.until + lapsing.drain_s)
            else:
                lapsing.is_over = True
                lapsing.task.cancel()
        if self._count:
            self._timer = loop.call_later(self._look_s, self._look)
