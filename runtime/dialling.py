"""How connections that a process opens fare: how long a peer takes, how they change credentials."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import asynccontextmanager
from enum import StrEnum
from time import monotonic
from typing import TYPE_CHECKING, Final

from grpc import ChannelConnectivity

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from grpc import aio

LIMIT_S: Final = 20.0  # gRPC gives up then


class Moved(StrEnum):
    """How an attempt to use other credentials ended; a closed set, so that it can label a metric."""

    TRIED = "tried"
    """The peer let them in before any call used them."""
    UNTRIED = "untried"
    """The old ones are no better: the peer is away, they have expired, or trust a root that was taken out."""
    REFUSED = "refused"
    """The peer lets in the old ones only, which stay in use."""


class Dialling:
    """
    What is noted of the connections that a process opens, by those who open them.

    Attributes:
        moves: How often connections and sessions changed credentials, or did not.
        on_let_in: Told how long a peer took to let one in, in seconds: its name looked up, TCP, TLS, and
            HTTP/2's greeting. None, where nobody wants to know or there is no TLS.
    """

    __slots__ = ("_early", "moves", "on_let_in")

    def __init__(self) -> None:
        self.moves: Counter[Moved] = Counter()
        self.on_let_in: Callable[[float], None] | None = None
        self._early: list[float] = []

    def expect(self) -> None:
        """Keep what `on_let_in` would be told, for who wants to know soon; see `tell`."""
        self.on_let_in = self._early.append

    def tell(self, on_let_in: Callable[[float], None]) -> None:
        """Tell *on_let_in* from now on, and what was kept."""
        self.on_let_in = on_let_in
        while self._early:
            on_let_in(self._early.pop(0))

    async def lets_in(self, channel: aio.Channel, limit_s: float = LIMIT_S) -> bool:
        """`lets_in`, for a channel that nobody has used yet."""
        began = monotonic()
        is_in = await lets_in(channel, limit_s)
        if is_in and self.on_let_in is not None:
            self.on_let_in(monotonic() - began)
        return is_in

    @asynccontextmanager
    async def timing(self, channel: aio.Channel) -> AsyncIterator[None]:
        """Note meanwhile how long it takes until *channel* is let in; what is called on it does not wait."""
        # One that connects already, or has, would seem to be faster than it is.
        if self.on_let_in is None or channel.get_state() is not ChannelConnectivity.IDLE:
            yield
            return
        watching = asyncio.create_task(self.lets_in(channel))  # awaited below, whatever happens
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.wait({watching})


async def lets_in(channel: aio.Channel, limit_s: float) -> bool:
    """
    Whether the peer has let in *channel*, or does so now, within *limit_s*.

    Its states are watched because `channel_ready` waits for ever where the peer refuses.
    """
    try:
        async with asyncio.timeout(limit_s):
            while True:
                match state := channel.get_state(try_to_connect=True):
                    case ChannelConnectivity.READY:
                        return True
                    case ChannelConnectivity.TRANSIENT_FAILURE | ChannelConnectivity.SHUTDOWN:
                        return False
                await channel.wait_for_state_change(state)
    except TimeoutError:
        return False
