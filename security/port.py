"""A port that listens, and the change of its certificate while others are shaking hands with it."""

from __future__ import annotations

import asyncio
import logging
from enum import StrEnum
from time import monotonic
from typing import TYPE_CHECKING, Final

from parallax.security.pin import HandshakePin, address_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from parallax.security.credentials import CredentialStore, Served
    from parallax.security.pin import Where
    from parallax.security.swap import ServerSwap

logger = logging.getLogger(__name__)

# Reasons for these: docs/decisions/0005-pin-before-swap.md.
HOLD_S: Final = 2.0  # from the swap on: by then who took the old context's address has a reference to it
ARMED_S: Final = 5.0  # from the begin of a pin, which the port may end some time after (`HANDSHAKE_MS`)
PACE_S: Final = 0.05  # between two swaps, so that few pins are held at once
FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 1.0
PATIENCE_S: Final = 10.0


class Swapped(StrEnum):
    """How a certificate was changed; a closed set, so that it can label a metric."""

    PINNED = "pinned"
    UNPINNED = "unpinned"


class ServerPort:
    """
    One port of a server.

    Args:
        where: How this host itself reaches it.

    Attributes:
        number: Where it is dialled.
        address: Where this host dials it, as gRPC writes it.
    """

    def __init__(self, number: int, where: Where) -> None:
        self.number = number
        self.address = address_of(where)

    async def follow(self) -> None:
        """Nothing, at once: in plaintext there is no certificate to change."""


class SecurePort(ServerPort):
    """
    One port that speaks TLS, with the credentials and the pins that *store* holds.

    Args:
        where: See `ServerPort`.
        on_swap: Told of each change, in the loop of `follow`.
        patience_s: For so long it is tried to pin the old certificate before it is changed without.
    """

    def __init__(
        self,
        number: int,
        where: Where,
        store: CredentialStore,
        swap: ServerSwap,
        on_swap: Callable[[Swapped], None],
        *,
        patience_s: float = PATIENCE_S,
    ) -> None:
        super().__init__(number, where)
        self._where = where
        self._store = store
        self._swap = swap
        self._on_swap = on_swap
        self._patience_s = patience_s
        self._pins: set[HandshakePin] = set()

    async def follow(self) -> None:
        """
        Put in force what the store publishes, until cancelled; without it, nothing changes.

        To be cancelled after the server has stopped, for the pins end with it. What is published while a
        change is under way waits, and the newest wins.
        """
        seen = self._swap.in_force
        try:
            while True:
                await self._store.served_other(seen)
                seen = await self._change()
                await asyncio.sleep(PACE_S)
        finally:
            while self._pins:
                self._pins.pop().close()

    async def _change(self) -> Served:
        """Put the newest in force, or leave it to the next handshake if nothing else helps; which it was."""
        give_up = monotonic() + self._patience_s
        pause = FIRST_PAUSE_S
        while True:
            try:
                return await self._change_pinned()
            except OSError as exc:
                if monotonic() + pause > give_up:
                    return self._change_unpinned(exc)
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _change_pinned(self) -> Served:
        """Put the newest in force while the old one is pinned; OSError if it is not, and nothing changed."""
        pin = await HandshakePin.open(self._where)
        try:
            new = self._store.served
            self._swap.arm(new, until=pin.since + ARMED_S)
            failure = OSError("no handshake came in time to change it")
            try:
                (await HandshakePin.open(self._where)).close()  # gRPC fetches before it answers
            except OSError as exc:
                failure = exc
            if self._swap.disarm() is not new:
                raise failure
        finally:
            self._hold(pin)
        logger.info("new certificate in force", extra=self._about(new))
        self._on_swap(Swapped.PINNED)
        return new

    def _change_unpinned(self, cause: OSError) -> Served:
        new = self._store.served
        self._swap.arm(new, until=float("inf"))
        logger.warning(
            "certificate changes unprotected: the own port does not answer",
            extra={**self._about(new), "cause": str(cause) or type(cause).__name__},
        )
        self._on_swap(Swapped.UNPINNED)
        return new

    def _hold(self, pin: HandshakePin) -> None:
        self._pins.add(pin)
        asyncio.get_running_loop().call_later(HOLD_S, self._release, pin)

    def _release(self, pin: HandshakePin) -> None:
        self._pins.discard(pin)
        pin.close()

    def _about(self, new: Served) -> dict[str, object]:
        leaf = new.credentials.leaf
        return {
            "port": self.number,
            "serial": f"{leaf.serial_number:x}",
            "not_after": leaf.not_valid_after_utc.isoformat(),
            "pins": len(new.pins.pinned),
        }
