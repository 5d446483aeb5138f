"""Whether a peer may be asked still, or is revoked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from parallax.security.errors import Revoked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from parallax.runtime.revocations import RevocationFollower
    from parallax.security.identity import Identity

T = TypeVar("T")


class Standing:
    """
    Whether *peer* may be asked: not while its identity is revoked, which ends what it was asked.

    Nobody who dials sees the certificate that answers, so a serial that is revoked says nothing here.

    Args:
        on_revoked: Called once *peer* is revoked, with what whoever asks is told.

    Attributes:
        end: Done once *peer* is revoked, with the cause; then there is another, for the next time.
    """

    def __init__(self, peer: Identity, on_revoked: Callable[[Revoked], None]) -> None:
        self.end: asyncio.Future[Revoked] = asyncio.get_running_loop().create_future()
        self._peer = peer
        self._on_revoked = on_revoked
        self._cause: Revoked | None = None
        self._good = asyncio.Event()
        self._good.set()
        self._under_way: set[asyncio.Timeout] = set()

    def heed(self, known: RevocationFollower) -> None:
        """Go by what is *known* to be revoked."""
        try:
            known.check_identity(self._peer)
        except Revoked as exc:
            if self._cause is None:
                self._withdraw(exc.with_traceback(None))
        else:
            self._cause = None
            self._good.set()

    def check(self) -> None:
        """Pass if *peer* may be asked; raises Revoked."""
        if self._cause is not None:
            raise Revoked(str(self._cause))

    async def good(self) -> None:
        """Wait until *peer* may be asked."""
        await self._good.wait()

    async def ask(
        self, question: Callable[[], Awaitable[T]], since: asyncio.Future[Revoked] | None = None
    ) -> T:
        """
        What *peer* answers to *question*, unless it is revoked before.

        Args:
            since: `end`, as it was when a call began that this is a part of.

        Raises:
            Revoked: It is, and what is awaited has been cancelled.
        """
        if since is None:
            self.check()
        end = since or self.end
        try:
            if not end.done():
                async with asyncio.timeout(None) as scope:
                    self._under_way.add(scope)
                    try:
                        return await question()
                    finally:
                        self._under_way.discard(scope)
        except TimeoutError:
            if not end.done():
                raise
        finally:
            del question  # whoever keeps what is raised keeps this frame, with a call and so the connection
        raise Revoked(str(end.result()))

    def _withdraw(self, cause: Revoked) -> None:
        self._cause = cause
        self._good.clear()
        loop = asyncio.get_running_loop()
        self.end.set_result(cause)
        self.end = loop.create_future()
        now = loop.time()
        for scope in self._under_way:
            scope.reschedule(now)
        self._under_way.clear()
        self._on_revoked(cause)
