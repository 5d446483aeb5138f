"""The way to one peer: a connection that follows the files of our certificate, and a link on it."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

from parallax.runtime.calls import Calls
from parallax.runtime.connection import Connection, Line
from parallax.sdk.keeper import Keeper
from parallax.sdk.standing import Standing
from parallax.security.certificate import check_validity
from parallax.security.errors import Expired, ParallaxError, Unavailable
from parallax.security.identity import control_plane

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta

    from parallax.runtime.link_stream import Call
    from parallax.security.errors import Revoked
    from parallax.security.identity import Identity
    from parallax.security.provider import MTLSCredentialsProvider
    from parallax.security.tls import Option


class Route:
    """
    The way to one peer, until closed.

    When our certificate changes, new calls and a new link use it, and the old link ends after its last
    call. When the peer is revoked, what it was asked ends, and nobody dials it until it is reinstated. What
    does this are tasks that begin with the route and end in `close`.

    Args:
        peer: Who is at the other end, for messages.
        provider: As whom we dial; it has read its files just now.
        address, expected, options: See `MTLSCredentialsProvider.channel`.
        dial_link: Begins the call of a link.
        lost: What a call ends with whose link broke under it.
        max_payload_bytes: That this end accepts; 0 says nothing of it.
        poll: How often to look at the files without being told of a change.
        metrics_listen: Where to show how it stands with them; None: nowhere.
        follows: Where a control plane is that renews our certificate, and tells whom to trust and who is
            revoked; None: nowhere.
            The peer does so itself where it is one.

    Attributes:
        connection: For calls of their own.
        standing: Whether the peer may be asked.
        calls: The link, once there was one; it may have broken.
    """

    def __init__(
        self,
        peer: str,
        provider: MTLSCredentialsProvider,
        address: str,
        expected: Identity,
        options: Sequence[Option],
        dial_link: Callable[[Line], Call],
        lost: Callable[[ParallaxError], ParallaxError],
        *,
        max_payload_bytes: int = 0,
        poll: timedelta,
        metrics_listen: str | None = None,
        follows: str | None = None,
    ) -> None:
        self._keeper = keeper = Keeper.of(provider, poll, metrics_listen)
        ours = keeper.provider
        dial = partial(ours.channel, address, expected, options)
        self._connect = partial(Connection, dial, ours.store, peer, dialling=keeper.dialling)
        self.connection = self._connect()
        self.calls: Calls | None = None
        self._peer = peer
        self._dial_link = dial_link
        self._lost = lost
        self._max_payload_bytes = max_payload_bytes
        self._linking = asyncio.Lock()
        self._links: set[Calls] = set()  # those that are retired, too
        self._is_closed = False
        self.standing = Standing(expected, self._part)
        # By identity, not by address: nobody else tells whom to trust.
        if expected == control_plane(expected.trust_domain):
            self._leave = keeper.join(address, self.connection)
        else:
            self._leave = keeper.join(follows, heed=self.standing.heed)
        self._upkeep = {asyncio.create_task(self._follow())}  # ended in `close`

    async def linked(self) -> Calls:
        """
        The link, open.

        Raises:
            ParallaxError: The peer does not let us have one.
        """
        async with self._linking:
            while self.calls is None or self.calls.is_broken:
                self.standing.check()
                if self.calls is not None:
                    await self.calls.close()
                    self.calls = None
                line = self.connection.use()
                calls = await self._open(line)
                if not line.is_retired:  # meanwhile
                    self.calls = calls
            return self.calls

    def explained(self, error: ParallaxError) -> ParallaxError:
        """*error*, or the cause of it that only we know: our certificate has expired."""
        credentials = self.connection.use().credentials
        if credentials is None or not isinstance(error, Unavailable | Expired):
            return error
        try:
            check_validity(credentials.leaf, datetime.now(UTC))
        except Expired as exc:
            remedy = self._keeper.problem or "put new files in its place, which are used without a restart"
            return Expired(f"our certificate, of {self._keeper.provider.identity}, {exc}: {remedy}")
        return error

    def timing(self, line: Line) -> AbstractAsyncContextManager[None]:
        """Around what may be the first call on *line*: notes how long the peer takes to let it in."""
        return self._keeper.dialling.timing(line.channel)

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        if self._is_closed:
            return
        self._is_closed = True
        upkeep, self._upkeep = self._upkeep, set()  # their tracebacks hold calls, and these a channel
        try:
            await asyncio.gather(*(calls.close() for calls in self._links))
        finally:
            self.calls = None
            await self._leave()  # first: whoever is told something on the connection must have ended
            for task in upkeep:
                task.cancel()
            await asyncio.wait(upkeep)
            await self.connection.close()

    async def _open(self, line: Line) -> Calls:
        if self._is_closed:
            raise Unavailable("the connection was closed")
        calls = Calls(self._peer, self._lost)
        line.take()
        stay = line.on_retire(lambda: self._retire(calls))
        self._links.add(calls)

        def over() -> None:
            stay()
            line.release()
            self._links.discard(calls)

        async with self.timing(line):
            await calls.open(self._dial_link(line), self._max_payload_bytes, over)
        return calls

    def _retire(self, calls: Calls) -> None:
        """Make no new call on a link whose line is no longer for new ones."""
        if self.calls is calls:
            self.calls = None
        calls.retire()

    async def _move(self, line: Line) -> None:
        """Have a link on *line* instead of the one there is; what broke is opened again when it is needed."""
        async with self._linking:
            if self.calls is not None and not self.calls.is_broken:
                self.calls = await self._open(line)

    def _part(self, cause: Revoked) -> None:
        """Ask the peer nothing more, and have what it was asked end."""
        self.connection = self._connect()  # which dials nobody before it is used
        for calls in tuple(self._links):
            calls.abandon(cause)

    async def _follow(self) -> None:
        """Keep a connection like our certificate, until its peer is revoked; then the next."""
        while True:
            await self.standing.good()
            end = self.standing.end
            async with self.connection.following(self._move):
                await asyncio.wait({end})
