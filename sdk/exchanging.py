"""Exchanging a self-signed certificate for an issued one where the control plane does not let it in."""

from __future__ import annotations

import asyncio
import logging
import random
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from parallax.runtime.backoff import backoff_s
from parallax.runtime.dialling import lets_in
from parallax.runtime.renewal import attempt_renewal
from parallax.sdk.enrolling import Edge, Enrolling
from parallax.security.pinned import is_self_signed
from parallax.security.renewal import retry_in, spread_of
from parallax.security.root_pin import RootPin

if TYPE_CHECKING:
    from collections.abc import Callable

    from parallax.runtime.certificates import Dial
    from parallax.runtime.renewal import Ask
    from parallax.security.authority import Issued
    from parallax.security.credentials import CredentialStore
    from parallax.security.provider import Keep

logger = logging.getLogger(__name__)

TRIAL_S: Final = 5.0  # a peer that is there answers within milliseconds


def exchanger(store: CredentialStore, edge: Edge) -> Ask:
    """Who has what is in force in *store* exchanged at *edge*, which has to show a root in force."""

    async def ask(csr: bytes) -> Issued:
        held, who = store.current, store.identity
        enrolling = Enrolling(edge, frozenset(map(RootPin.of, held.bundle.roots)), who.trust_domain)
        try:
            return await asyncio.to_thread(enrolling.exchange, who, held, csr)
        finally:
            enrolling.cut()  # a thread cannot be cancelled, and this process would wait for it

    return ask


class Exchanger:
    """
    Has a pinned certificate exchanged for which there is no room on the control plane's port, while it runs.

    Once it is let in there, all else is as for everybody: it is renewed when that is due.

    Args:
        store: What is in force.
        keep: See `MTLSCredentialsProvider.keeper`.
        dial: Opens a channel to the control plane with what is in force.
        port: Where that leads, host and port.
        edge: Where it is exchanged.
        clock: Aware UTC.
    """

    def __init__(
        self,
        store: CredentialStore,
        keep: Keep,
        dial: Dial,
        port: tuple[str, int],
        edge: Edge,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self._store = store
        self._keep = keep
        self._dial = dial
        self._port = port
        self._edge = edge
        self._clock = clock
        self._tries = 0
        self._said = ""

    async def run(self) -> None:
        """Until the control plane lets in what is in force, or that is of an issuer's."""
        attempt = 0
        while is_self_signed((held := self._store.current).leaf) and not await self._is_let_in():
            pause_s = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            # A control plane that is merely away refuses nobody, and each try costs a key.
            if self._clock() <= held.leaf.not_valid_after_utc and await _is_there(*self._port):
                pause_s = max(pause_s, (await self._try()).total_seconds())
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._store.changed(held)

    async def _is_let_in(self) -> bool:
        async with self._dial() as channel:
            return await lets_in(channel, TRIAL_S)

    async def _try(self) -> timedelta:
        """Try it; when to do so again."""
        held = self._store.current
        if not await _is_there(self._edge.host, self._edge.port):
            self._tell("nobody answers there: PARALLAX_ENROLL_URL says where one enrolls")
            return timedelta(0)
        done = await attempt_renewal(self._store, exchanger(self._store, self._edge), self._keep, self._clock)
        if done.problem is None:
            serial = f"{self._store.current.leaf.serial_number:x}"
            logger.info("certificate exchanged", extra={**self._about(), "serial": serial})
            return timedelta(0)
        bug = done.problem.__cause__ if done.is_bug else None
        self._tell(f"{type(done.problem).__name__}: {done.problem}", bug)
        self._tries += 1
        end = held.leaf.not_valid_after_utc
        return retry_in(self._tries - 1, self._clock(), end, spread_of(held.leaf), done.retry_after)

    def _tell(self, cause: str, bug: BaseException | None = None) -> None:
        """Say why it is not exchanged, once."""
        if cause != self._said:
            self._said = cause
            event = "a self-signed certificate is not let in, nor exchanged"
            logger.warning(event, exc_info=bug, extra={**self._about(), "cause": cause})

    def _about(self) -> dict[str, str]:
        return {"identity": str(self._store.identity), "url": str(self._edge)}


async def _is_there(host: str, port: int) -> bool:
    """Whether somebody takes connections at *port*, whoever that is."""
    try:
        async with asyncio.timeout(TRIAL_S):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, UnicodeError):  # of a name that cannot be looked up
        return False
    writer.close()
    return True
