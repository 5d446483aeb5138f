"""Revoking and reinstating: in the engine first, then in force, then told."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

from parallax.control_plane.audit import MAX_OWN_WRITES, AuditLog, Deed
from parallax.control_plane.engines.engine import MAX_PAGE, Engine, Write
from parallax.control_plane.issued import spell
from parallax.control_plane.ledger import KEPT, SWEEP_S
from parallax.control_plane.revoked import (
    CERTIFICATES,
    REVOCATIONS,
    Revoked,
    RevokedCertificate,
    RevokedIdentity,
    certificate_of,
    decode,
)
from parallax.control_plane.uninterrupted import Uninterrupted
from parallax.security.errors import InvalidTransition, StorageFailed
from parallax.security.identity import Identity, control_plane
from parallax.security.revocation import Revocations

logger = logging.getLogger(__name__)

SECOND: Final = timedelta(seconds=1)  # certificates know no finer time


class RevocationLog:
    """
    What was revoked, by whom and why; for good before it is acknowledged, and in force with that.

    Args:
        clock: Aware UTC.
        also: What is written with the revocation of an identity.

    Attributes:
        current: What is in force; this process alone writes it.
    """

    def __init__(
        self,
        engine: Engine,
        audit: AuditLog,
        clock: Callable[[], datetime],
        also: Callable[[Identity], Write] | None = None,
    ) -> None:
        self.current = Revocations()
        self._engine = engine
        self._audit = audit
        self._clock = clock
        self._also = also
        self._lock = asyncio.Lock()
        self._followers: list[Callable[[Revoked], None]] = []
        self._uninterrupted = Uninterrupted()

    def follow(self, told: Callable[[Revoked], None]) -> None:
        """Have *told* called with each change from now on, as soon as it is in force."""
        self._followers.append(told)

    async def load(self) -> None:
        """
        Put in force what was revoked before, which must be before anybody is let in.

        Raises:
            StorageFailed: It cannot be read.
        """
        after = ""
        while page := await self._engine.scan(REVOCATIONS, after):
            for record in page:
                if record.key.startswith(CERTIFICATES):
                    self.current.revoke(certificate_of(record.key))
                else:
                    self._apply(decode(record.value or b""))
            after = page[-1].key

    async def revoke(self, entry: Revoked) -> Revoked | None:
        """
        Revoke what *entry* says; None if that is revoked already, and then nothing changes.

        Raises:
            StorageFailed: It is not known to be recorded. It may be in force after the next start.
        """
        return await self._uninterrupted.make(self._revoke(entry))

    async def reinstate(self, identity: Identity, by: str) -> RevokedIdentity:
        """
        Let *identity* be issued certificates again. What it had before stays revoked.

        Raises:
            InvalidTransition: It is not revoked.
            StorageFailed: It is not known to be recorded.
        """
        return await self._uninterrupted.make(self._reinstate(identity, by))

    async def page(self, after: str = "", limit: int = MAX_PAGE) -> tuple[list[Revoked], str]:
        """
        Certificates by their end, then identities by name; and behind what to go on, empty at the end.

        Args:
            after: What the page before gave.
        """
        records = await self._engine.scan(REVOCATIONS, after, limit)
        return [decode(record.value or b"") for record in records], records[-1].key if len(
            records
        ) == limit else ""

    async def run(self) -> None:
        """Drop what ended long ago, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)  # first: by then a clock that was wrong at boot is right
            try:
                dropped = await self.sweep()
            except StorageFailed:
                continue  # the engine has said what is wrong
            if dropped:
                logger.info("revocations of ended certificates dropped", extra={"count": dropped})

    async def sweep(self) -> int:
        """Drop those of certificates that ended longer than `KEPT` ago; how many they were."""
        limit, dropped, after = f"{CERTIFICATES}{spell(self._clock() - KEPT)}", 0, ""
        while True:
            page = await self._engine.scan(CERTIFICATES, after, MAX_OWN_WRITES)
            ended = [decode(record.value or b"") for record in page if record.key < limit]
            if not ended:
                return dropped
            await self._uninterrupted.make(
                self._drop([each for each in ended if isinstance(each, RevokedCertificate)])
            )
            dropped, after = dropped + len(ended), ended[-1].key

    async def _revoke(self, entry: Revoked) -> Revoked | None:
        async with self._lock:
            if self._is_in_force(entry):
                return None
            detail, writes = {"reason": entry.reason.value}, [Write(entry.key, entry.encode())]
            if isinstance(entry, RevokedCertificate):
                issuer, serial = entry.certificate
                action, detail = (
                    "certificate/revoked",
                    detail | {"serial": f"{serial:x}", "issuer": issuer.hex()},
                )
            else:
                action = "identity/revoked"
                if self._also is not None:
                    writes.append(self._also(entry.identity))
            subject = str(entry.identity or "")
            deed = Deed(action, entry.by, subject, detail=detail)
            await self._audit.commit(deed, writes)
            self._put_in_force(entry)
        logger.warning("revoked", extra={"subject": subject, "by": entry.by, **detail})
        return entry

    async def _reinstate(self, identity: Identity, by: str) -> RevokedIdentity:
        now = self._clock()
        soon = _end_of((await self._withdrawn(identity)).at, now) - now
        # So that what is issued next is good at once; not under the lock, for others are revoked meanwhile.
        await asyncio.sleep(min(max(soon, timedelta(0)), SECOND).total_seconds())
        async with self._lock:
            before = await self._withdrawn(identity)
            entry = replace(before, reinstated_at=_end_of(before.at, self._clock()))
            await self._audit.commit(
                Deed("identity/reinstated", by, str(identity)), [Write(entry.key, entry.encode())]
            )
            self._put_in_force(entry)
        logger.warning("reinstated", extra={"subject": str(identity), "by": by})
        return entry

    async def _withdrawn(self, identity: Identity) -> RevokedIdentity:
        """What is kept of *identity*, which is revoked; raises InvalidTransition."""
        record = await self._engine.get(RevokedIdentity.key_of(identity))
        found = decode(record.value) if record and record.value else None
        if not isinstance(found, RevokedIdentity) or found.reinstated_at is not None:
            raise InvalidTransition(f"{identity} is not revoked, so there is nothing to reinstate")
        return found

    async def _drop(self, ended: Sequence[RevokedCertificate]) -> None:
        async with self._lock:
            by = str(control_plane())
            deed = Deed("revocation/dropped", by, detail={"count": str(len(ended))})
            await self._audit.commit(deed, [Write(each.key, None) for each in ended])
            for each in ended:
                self.current.forget(each.certificate)

    def _is_in_force(self, entry: Revoked) -> bool:
        if isinstance(entry, RevokedCertificate):
            return entry.certificate in self.current
        return self.current.is_withdrawn(entry.identity)

    def _put_in_force(self, entry: Revoked) -> None:
        self._apply(entry)
        for told in self._followers:
            told(entry)

    def _apply(self, entry: Revoked) -> None:
        if isinstance(entry, RevokedCertificate):
            self.current.revoke(entry.certificate)
        else:
            self.current.cut(entry.identity, entry.cut_off)


def _end_of(revoked_at: datetime, now: datetime) -> datetime:
    """
    When what was *revoked_at* is reinstated *now*.

    In a later second, or what was issued just before would pass.
    """
    return max(now.replace(microsecond=0), revoked_at.replace(microsecond=0) + SECOND)
