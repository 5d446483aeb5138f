"""What is revoked, at an agent that lets others in itself: only while it knows that."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from parallax.runtime.revocations import RevocationFollower
from parallax.security.errors import ParallaxError, Unavailable

if TYPE_CHECKING:
    from parallax.security.verification import Peer

logger = logging.getLogger(__name__)


class FreshRevocations(RevocationFollower):
    """
    Knows what is revoked, as a control plane tells it, and whether it knows that still.

    Args:
        max_age: How long ago it may have been told that it knows everything.
        clock: Aware UTC.

    Attributes:
        on_stale: Called once what is known has become too old, with what to tell whoever asks.
    """

    def __init__(self, max_age: timedelta, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__(max_age)
        self.on_stale: Callable[[ParallaxError], None] = lambda _: None
        self._max_age = max_age
        self._clock = clock
        self._complete_at: datetime | None = None
        self._known = asyncio.Event()
        self._said = ""
        self._timer: asyncio.TimerHandle | None = None  # runs out when what is known becomes too old

    def check(self, peer: Peer) -> None:
        """Pass if nothing that proves *peer* is known to be revoked; raises Revoked."""
        self._current.check(peer)

    def check_fresh(self) -> None:
        """
        Pass if what is known is complete, and was so lately.

        By the wall clock, which goes on while a machine sleeps.

        Raises:
            Unavailable: It is not.
        """
        if self._complete_at is None or abs(self._clock() - self._complete_at) > self._max_age:
            raise self._too_old()

    async def known(self) -> None:
        """Wait until it has been told everything once."""
        await self._known.wait()

    def _note_complete(self) -> None:
        self._complete_at = self._clock()
        self._known.set()
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._max_age.total_seconds(), self._become_stale)

    def _note_failure(self, cause: Exception) -> None:
        text = f"{type(cause).__name__}: {cause}"
        if self._complete_at is None and text != self._said:  # later, there is time to try again
            self._said = text
            logger.warning("nobody is let in yet: what is revoked is not told", extra={"cause": text})

    def _become_stale(self) -> None:
        cause = self._too_old()
        logger.warning("nobody is let in", extra={"cause": str(cause)})
        self.on_stale(cause)

    def _too_old(self) -> Unavailable:
        since = f"since {self._complete_at:%Y-%m-%dT%H:%M:%SZ} " if self._complete_at else ""
        return Unavailable(
            f"this agent has not heard {since}from its control plane what is revoked, and lets nobody in "
            "until it does: see its log, or ask it through the control plane"
        )
