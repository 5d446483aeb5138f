"""Those who ask for a first certificate without a token, and whom the administrator has approved."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from parallax.control_plane.audit import MAX_OWN_WRITES, AuditLog, Deed
from parallax.control_plane.edge.allowance import source_of
from parallax.control_plane.engines.engine import Engine, Record, Write
from parallax.security.errors import (
    EnrollmentError,
    InvalidRequest,
    InvalidTransition,
    NoSuchAgent,
    Unavailable,
)
from parallax.security.identity import Identity, clip, control_plane
from parallax.security.tokens import check_labels

APPROVALS: Final = "approvals/"
MAX_PENDING: Final = 500
MAX_OF_SOURCE: Final = 50  # so that one source does not fill the queue
MAX_REJECTED: Final = 10_000
MIN_DIGITS: Final = 16  # of a fingerprint: a key with the same 8 takes minutes to find, 64 bits nobody tries

_DIGITS: Final = re.compile(r"(?:sha256:)?([0-9a-f]+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class Pending:
    """
    Somebody who waits.

    Args:
        fingerprint: SHA-256 of the SubjectPublicKeyInfo, lower-case hex: what is approved, with the name.
    """

    identity: Identity
    fingerprint: str
    source: str
    asked_at: datetime
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Approval:
    """
    A name for a key.

    Args:
        of: Who asked for it; it ends when that does.
        by: Who gave it, as a URI.
        is_given: A certificate was issued by it.
    """

    of: Pending
    labels: Mapping[str, str]
    by: str
    is_given: bool = False


class Approvals:
    """
    Keeps who waits in memory, since anybody can ask and asks again; and what is approved in an engine.

    Args:
        lifetime: How long somebody may wait, and how long an approval is good.
        clock: Aware UTC.
    """

    def __init__(
        self, engine: Engine, audit: AuditLog, lifetime: timedelta, clock: Callable[[], datetime]
    ) -> None:
        self._engine = engine
        self._audit = audit
        self._lifetime = lifetime
        self._clock = clock
        self._waiting: dict[str, Pending] = {}  # by fingerprint, the oldest first
        self._rejected: dict[str, datetime] = {}  # until when
        self._deciding = asyncio.Lock()  # of two who decide at once, the second sees what the first did

    def ask(self, identity: Identity, fingerprint: str, source: str) -> Pending:
        """
        Have *identity* with that key wait, or go on waiting.

        Raises:
            EnrollmentError: It was rejected.
            InvalidRequest: The key waits under another name: what is approved must be what was shown.
            Unavailable: Too many wait.
        """
        now = self._clock()
        self._expire(now)
        if fingerprint in self._rejected:
            raise EnrollmentError("the administrator has rejected this request; ask why, then use a new key")
        known = self._waiting.get(fingerprint)
        if known is not None:
            if known.identity != identity:
                raise InvalidRequest(f"that key waits to be approved as {known.identity}; make another key")
            return known
        of_source = sum(source_of(each.source) == source_of(source) for each in self._waiting.values())
        if len(self._waiting) >= MAX_PENDING or of_source >= MAX_OF_SOURCE:
            raise Unavailable(
                "too many wait to be approved; try again later, or ask for a token",
                retry_after=timedelta(seconds=30),
            )
        pending = Pending(identity, fingerprint, source, now, now + self._lifetime)
        self._waiting[fingerprint] = pending
        return pending

    async def named(self, fingerprint: str) -> Identity | None:
        """As whom the holder of that key waits, or was approved."""
        self._expire(self._clock())
        waiting = self._waiting.get(fingerprint)
        if waiting is not None:
            return waiting.identity
        found = await self._engine.get(_key(fingerprint))
        approved = _decode(found).of if found is not None else None
        return approved.identity if approved and self._clock() < approved.expires_at else None

    def pending(self) -> list[Pending]:
        """Who waits, the longest first."""
        self._expire(self._clock())
        return list(self._waiting.values())

    async def approve(self, fingerprint: str, labels: Mapping[str, str], by: str) -> Pending:
        """
        Let the one who waits with a key have a certificate: that name for that key, no other.

        A name alone approves nobody: anybody can wait under it, and it would be compared with nothing.

        Args:
            fingerprint: Of the key, `MIN_DIGITS` and more from its beginning.
            labels: Granted to it.

        Raises:
            NoSuchAgent: Nobody waits with that key.
            InvalidRequest: It is no fingerprint, or too little of one.
            StorageFailed: It is not known to be approved.
        """
        check_labels(labels)
        async with self._deciding:
            pending = _sole(fingerprint, _with_key(fingerprint, self.pending()))
            approval = Approval(replace(pending, expires_at=self._clock() + self._lifetime), labels, by)
            detail = _detail(pending) | {"labels": " ".join(f"{k}={v}" for k, v in labels.items())}
            await self._audit.commit(
                Deed("enrollment/approved", by, str(pending.identity), detail=detail),
                [Write(_key(pending.fingerprint), _encode(approval))],
            )
            self._waiting.pop(pending.fingerprint, None)
        return pending

    async def reject(self, which: str, by: str) -> Pending:
        """
        Have the one who is called *which* wait no longer, or not get what was approved.

        Args:
            which: `<kind>/<name>`, as long as one alone waits under it; or a fingerprint as for `approve`.

        Raises:
            InvalidTransition: It has got it.
            InvalidRequest: Several wait under that name; or as `approve`.
            NoSuchAgent, StorageFailed: As `approve`.
        """
        async with self._deciding:
            approved = [each async for each in self._approved()]
            undone = {approval.of.fingerprint: write for approval, write in approved if not approval.is_given}
            open_ = [*self.pending(), *(each.of for each, _ in approved if not each.is_given)]
            try:
                pending = _one(which, open_)
            except NoSuchAgent:
                given = _one(which, [each.of for each, _ in approved]).identity
                raise InvalidTransition(
                    f"{given} has got its certificate: 'parallax certs revoke {given.short}' withdraws it"
                ) from None
            deed = Deed("enrollment/rejected", by, str(pending.identity), detail=_detail(pending))
            writes = [write for fingerprint, write in undone.items() if fingerprint == pending.fingerprint]
            await self._audit.commit(deed, writes)
            self._waiting.pop(pending.fingerprint, None)
            if len(self._rejected) >= MAX_REJECTED:
                del self._rejected[next(iter(self._rejected))]
            self._rejected[pending.fingerprint] = self._clock() + self._lifetime
        return pending

    async def find(self, identity: Identity, fingerprint: str) -> tuple[Approval, Write] | None:
        """What is approved of that name and key, and what writes that it is given, unless it has changed."""
        found = await self._engine.get(_key(fingerprint))
        if found is None:
            return None
        approval = _decode(found)
        if approval.of.identity != identity or self._clock() >= approval.of.expires_at:
            return None
        return approval, Write(found.key, _encode(replace(approval, is_given=True)), found.revision)

    async def sweep(self) -> int:
        """Drop the approvals that have ended; how many they were."""
        now, after, dropped = self._clock(), "", 0
        while page := await self._engine.scan(APPROVALS, after, MAX_OWN_WRITES):
            after = page[-1].key
            ended = [record.key for record in page if _decode(record).of.expires_at <= now]
            if ended:
                deed = Deed("enrollment/pruned", str(control_plane()), detail={"approvals": str(len(ended))})
                await self._audit.commit(deed, [Write(key, None) for key in ended])
                dropped += len(ended)
        return dropped

    async def _approved(self) -> AsyncIterator[tuple[Approval, Write]]:
        """What is approved and has not ended, and what takes it back unless it has changed."""
        after = ""
        while page := await self._engine.scan(APPROVALS, after):
            after = page[-1].key
            for record in page:
                approval = _decode(record)
                if self._clock() < approval.of.expires_at:
                    yield approval, Write(record.key, None, record.revision)

    def _expire(self, now: datetime) -> None:
        for fingerprint in [each.fingerprint for each in self._waiting.values() if each.expires_at <= now]:
            del self._waiting[fingerprint]
        for fingerprint in [each for each, end in self._rejected.items() if end <= now]:
            del self._rejected[fingerprint]


def _detail(pending: Pending) -> dict[str, str]:
    """What the audit log tells of who waited, beside the name."""
    return {"key": pending.fingerprint, "asked_from": pending.source}


def _key(fingerprint: str) -> str:
    return f"{APPROVALS}{fingerprint}"


def _encode(approval: Approval) -> bytes:
    """As it is stored."""
    pending = approval.of
    stored = {
        "identity": str(pending.identity),
        "source": pending.source,
        "asked_at": pending.asked_at.isoformat(),
        "expires_at": pending.expires_at.isoformat(),
        "labels": dict(approval.labels),
        "by": approval.by,
        "is_given": approval.is_given,
    }
    return json.dumps(stored).encode()


def _decode(record: Record) -> Approval:
    read = json.loads(record.value or b"{}")
    pending = Pending(
        Identity.parse(read["identity"]),
        record.key.removeprefix(APPROVALS),
        read["source"],
        datetime.fromisoformat(read["asked_at"]),
        datetime.fromisoformat(read["expires_at"]),
    )
    return Approval(pending, read["labels"], read["by"], read["is_given"])


def _one(which: str, among: Iterable[Pending]) -> Pending:
    """The one of them who is called *which*, or has that key."""
    if "/" not in which:
        return _sole(which, _with_key(which, among))
    return _sole(which, [each for each in among if each.identity.short == which])


def _with_key(fingerprint: str, among: Iterable[Pending]) -> list[Pending]:
    """Those whose key's fingerprint begins so."""
    stated = _DIGITS.fullmatch(fingerprint)
    if stated is None:
        raise InvalidRequest(
            f"{clip(fingerprint)} is no fingerprint: compare that of the key with what the host shows, "
            f"and state {MIN_DIGITS} digits of it at least ('parallax agents pending' lists them)"
        )
    if len(stated[1]) < MIN_DIGITS:
        raise InvalidRequest(
            f"{clip(fingerprint)} is too little of a fingerprint: compare and state {MIN_DIGITS} digits "
            "at least, for keys that have the same few are soon made"
        )
    return [each for each in among if each.fingerprint.startswith(stated[1])]


def _sole(which: str, found: Sequence[Pending]) -> Pending:
    """The only one of those who were *found* by *which*."""
    if not found:
        raise NoSuchAgent(f"nobody waits who is called {clip(which)}: see 'parallax agents pending'")
    if len(found) > 1:
        raise InvalidRequest(
            f"{len(found)} with different keys wait as {clip(which)}: compare the fingerprints, "
            "and name the one that the right host shows"
        )
    return found[0]
