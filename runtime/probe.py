"""Whether our own port lets in who has our own certificate: a connection to it from time to time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, Final

from parallax.runtime.dialling import lets_in
from parallax.security.credentials import serves_only
from parallax.security.errors import Unavailable
from parallax.security.provider import Mode

if TYPE_CHECKING:
    from parallax.security.provider import MTLSCredentialsProvider

logger = logging.getLogger(__name__)

EVERY_S: Final = 15.0  # as often as a scrape
LIMIT_S: Final = 5.0
TOLERATED: Final = 1  # failures in a row that may be chance: a machine that stands still for some seconds

_OPTIONS: Final = (("grpc.use_local_subchannel_pool", 1),)  # else it may be given the last one's connection


class PortProbe:
    """
    Connects to the own port as its own identity would from elsewhere, and tells whether that works.

    Each connection is a whole handshake with the certificate in force at both ends. There is nothing to
    probe in plaintext, nor with a certificate that is for servers alone.

    Args:
        on_success: Told how long it took, in seconds: TCP, TLS, and HTTP/2's greeting.
    """

    def __init__(
        self,
        provider: MTLSCredentialsProvider,
        on_success: Callable[[float], None],
        *,
        every_s: float = EVERY_S,
        limit_s: float = LIMIT_S,
    ) -> None:
        self._provider = provider
        self._on_success = on_success
        self._every_s = every_s
        self._limit_s = limit_s
        self._failures = 0  # in a row
        self._problem = ""
        self._has_answered = False

    @property
    def is_good(self) -> bool:
        """Whether the port can be believed to work."""
        return self._failures <= TOLERATED

    @property
    def detail(self) -> str:
        """The same for people."""
        return self._problem or ("answers" if self._has_answered else "not probed")

    async def run(self, address: str) -> None:
        """Probe *address*, as this host dials it, until cancelled."""
        if self._provider.mode is Mode.PLAINTEXT:
            return
        while True:
            if self._is_possible():
                await self._look(address)
            await asyncio.sleep(self._every_s)

    def _is_possible(self) -> bool:
        store = self._provider.store
        if store is None:
            return False
        return self._provider.mode is not Mode.MUTUAL or not serves_only(store.current.leaf)

    async def _look(self, address: str) -> None:
        try:
            took = await self._connect(address)
        except Unavailable as exc:
            self._failures += 1
            if str(exc) != self._problem:
                self._problem = str(exc)
                logger.warning("the own port does not answer", extra={"address": address, "cause": str(exc)})
        else:
            if self._problem:
                logger.info("the own port answers again", extra={"address": address})
            self._failures, self._problem, self._has_answered = 0, "", True
            self._on_success(took)

    async def _connect(self, address: str) -> float:
        began = monotonic()
        channel = self._provider.channel(address, self._provider.identity, _OPTIONS)
        try:
            is_in = await lets_in(channel, self._limit_s)
        finally:
            await channel.close()
        took = monotonic() - began
        if is_in:
            return took
        if took >= self._limit_s:
            raise Unavailable(f"no handshake within {self._limit_s:g} s")
        raise Unavailable("it refuses our own certificate, or does not listen; the log has its reason")
