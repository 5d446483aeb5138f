"""Whether what a control plane tells is known: all of it, and as it was lately."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from parallax.security.errors import ParallaxError, Unavailable

logger = logging.getLogger(__name__)


class Freshness:
    """
    Knows how old it is what an agent was told, which lets nobody in by what is too old.

    By the wall clock, which goes on while a machine sleeps.

    Args:
        what: The agent was told, for the texts: `what is revoked`.
        max_age: How long ago it may have been told that it knows everything.
        clock: Aware UTC.

    Attributes:
        on_stale: Called once what is known has become too old, with what to tell whoever asks.
    """

    def __init__(
        self, what: str, max_age: timedelta, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self.max_age = max_age
        self.on_stale: Callable[[ParallaxError], None] = lambda _: None
        self._what = what
        self._clock = clock
        self._complete_at: datetime | None = None
        self._known = asyncio.Event()
        self._said = ""
        self._timer: asyncio.TimerHandle | None = None  # runs out when what is known becomes too old

    def check(self) -> None:
        """Pass if what is known is complete, and was so lately; raises Unavailable."""
        if self._complete_at is None or abs(self._clock() - self._complete_at) > self.max_age:
            raise self._too_old()

    async def known(self) -> None:
        """Wait until everything has been told once."""
        await self._known.wait()

    def note(self) -> None:
        """Everything has been told by now."""
        self._complete_at = self._clock()
        self._known.set()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self.max_age.total_seconds(), self._become_stale)

    def say(self, cause: Exception) -> None:
        """Log why it is not told, once, while nobody is let in for that."""
        text = f"{type(cause).__name__}: {cause}"
        if self._complete_at is None and text != self._said:  # later, there is time to try again
            self._said = text
            logger.warning("nobody is let in yet", extra={"not told": self._what, "cause": text})

    def _become_stale(self) -> None:
        cause = self._too_old()
        logger.warning("nobody is let in", extra={"cause": str(cause)})
        self.on_stale(cause)

    def _too_old(self) -> Unavailable:
        since = f"since {self._complete_at:%Y-%m-%dT%H:%M:%SZ} " if self._complete_at else ""
        return Unavailable(
            f"this agent has not heard {since}from its control plane {self._what}, and lets nobody in "
            "until it does: see its log, or ask it through the control plane"
        )
