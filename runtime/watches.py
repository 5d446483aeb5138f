"""Who watches something, and that nobody does so too often."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from parallax.runtime.caller import current_caller
from parallax.security.errors import Unavailable
from parallax.security.identity import Identity
from parallax.security.verification import Peer

MAX_WATCHES: Final = 64  # of one thing by one identity, at some 30 KB each: a process has one


class Watches:
    """
    Those who watch *what*, by identity; who has none cannot be told from others, and is not counted.

    Args:
        what: As a caller is told it: "the roots".
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._open = Counter[Identity]()

    @property
    def watchers(self) -> frozenset[Identity]:
        """Who watches now."""
        return frozenset(self._open)

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """
        Let the call that is being handled watch for as long as the block.

        Raises:
            Unavailable: Its caller does so `MAX_WATCHES` times already.
        """
        caller = current_caller()
        if not isinstance(caller, Peer):
            yield
            return
        identity = caller.identity
        if self._open[identity] >= MAX_WATCHES:
            raise Unavailable(
                f"{identity.short} watches {self._what} {MAX_WATCHES} times, which is as often as may be; "
                "try again, or give some of its processes an identity of their own"
            )
        self._open[identity] += 1
        try:
            yield
        finally:
            self._open[identity] -= 1
            if not self._open[identity]:
                del self._open[identity]
