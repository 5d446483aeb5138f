"""What is revoked, at an agent that lets others in itself: only while it knows that."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from parallax.runtime.freshness import Freshness
from parallax.runtime.revocations import RevocationFollower

if TYPE_CHECKING:
    from parallax.security.verification import Peer


class FreshRevocations(RevocationFollower):
    """
    Knows what is revoked, as a control plane tells it, and whether it knows that still.

    Args:
        max_age: How long ago it may have been told that it knows everything.
        clock: Aware UTC.

    Attributes:
        freshness: Says whether it knows that still.
    """

    def __init__(self, max_age: timedelta, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        super().__init__(max_age)
        self.freshness = Freshness("what is revoked", max_age, clock)

    def check(self, peer: Peer) -> None:
        """Pass if nothing that proves *peer* is known to be revoked; raises Revoked."""
        self._current.check(peer)

    def _note_complete(self) -> None:
        self.freshness.note()

    def _note_failure(self, cause: Exception) -> None:
        self.freshness.say(cause)
