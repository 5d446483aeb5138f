"""The way to one peer: a connection that follows the files of our certificate, and a link on it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from parallax.runtime.calls import Calls
from parallax.runtime.connection import Connection, Line
from parallax.security.certificate import check_validity
from parallax.security.errors import Expired, ParallaxError, Unavailable

if TYPE_CHECKING:
    from grpc import aio

    from parallax.runtime.link_stream import Call
    from parallax.security.provider import MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator

logger = logging.getLogger(__name__)

# To watch files costs 10 ms and four threads: a command that is over in a moment does without.
FOLLOW_AFTER_S: Final = 1.0


class Route:
    """
    The way to one peer, until closed.

    When our certificate changes, new calls and a new link use it, and the old link ends after its last
    call. All that runs beside the calls has one owner: a task that begins with the route and ends in
    `close`.

    Args:
        peer: Who is at the other end, for messages.
        provider: As whom we dial.
        dial: Opens a channel with the credentials that *provider* then holds.
        dial_link: Begins the call of a link.
        lost: What a call ends with whose link broke under it.
        max_payload_bytes: That this end accepts; 0 says nothing of it.
        poll: How often to look at the files without being told of a change.

    Attributes:
        connection: For calls of their own.
        calls: The link, once there was one; it may have broken.
    """

    def __init__(
        self,
        peer: str,
        provider: MTLSCredentialsProvider,
        dial: Callable[[], aio.Channel],
        dial_link: Callable[[Line], Call],
        lost: Callable[[ParallaxError], ParallaxError],
        *,
        max_payload_bytes: int = 0,
        poll: timedelta,
    ) -> None:
        self.connection = Connection(dial, provider.store, peer)
        self.calls: Calls | None = None
        self._peer = peer
        self._provider = provider
        self._dial_link = dial_link
        self._lost = lost
        self._max_payload_bytes = max_payload_bytes
        self._poll = poll
        self._rotator: CertificateRotator | None = None
        self._linking = asyncio.Lock()
        self._links: set[Calls] = set()  # those that are retired, too
        self._is_closed = False
        self._following = asyncio.create_task(self._follow())  # ended in `close`

    async def linked(self) -> Calls:
        """
        The link, open.

        Raises:
            ParallaxError: The peer does not let us have one.
        """
        async with self._linking:
            if self._is_closed:
                raise Unavailable("the connection was closed")
            if self.calls is None or self.calls.is_broken:
                if self.calls is not None:
                    await self.calls.close()
                    self.calls = None
                self.calls = await self._open(self.connection.use())
            return self.calls

    def explained(self, error: ParallaxError) -> ParallaxError:
        """*error*, or the cause of it that only we know: our certificate has expired."""
        credentials = self.connection.use().credentials
        if credentials is None or not isinstance(error, Unavailable | Expired):
            return error
        try:
            check_validity(credentials.leaf, datetime.now(UTC))
        except Expired as exc:
            reason = self._rotator.status.reason if self._rotator is not None else ""
            remedy = reason or "put new files in its place, which are used without a restart"
            return Expired(f"our certificate, of {self._provider.identity}, {exc}: {remedy}")
        return error

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        self._is_closed = True
        self._following.cancel()
        await asyncio.wait({self._following})
        await asyncio.gather(*(calls.close() for calls in self._links))
        self.calls = None
        await self.connection.close()

    async def _open(self, line: Line) -> Calls:
        calls = Calls(self._peer, self._lost)
        call = self._dial_link(line)
        line.take()
        self._links.add(calls)

        def over() -> None:
            line.release()
            self._links.discard(calls)

        await calls.open(call, self._max_payload_bytes, over)
        return calls

    async def _move(self, line: Line) -> None:
        """Have a link on *line* instead of the one there is; what broke is opened again when it is needed."""
        async with self._linking:
            old = self.calls
            if old is not None and not old.is_broken:
                self.calls = await self._open(line)
                old.retire()

    async def _follow(self) -> None:
        if self._provider.store is None:
            return
        await asyncio.sleep(FOLLOW_AFTER_S)
        self._rotator = self._provider.rotator(self._poll)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.connection.follow(self._move))
                if self._rotator is not None:
                    group.create_task(self._rotator.run())
        except Exception:  # a bug of ours must not end what still works
            logger.exception("new certificate files are not followed any more", extra={"peer": self._peer})
