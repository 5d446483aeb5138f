"""The ledger of certificates: what was issued, on whose request, and what has been seen in use."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import islice
from typing import Final

from cryptography import x509

from parallax.control_plane.audit import MAX_OWN_WRITES, AuditLog, Deed
from parallax.control_plane.engines.engine import ABSENT, MAX_PAGE, Engine, Event, Record, Write
from parallax.control_plane.issued import (
    CERTIFICATES,
    HOLDERS,
    KEYS,
    LOOKUPS,
    IssuedCertificate,
    KeyUse,
    below,
    key_of,
    spell,
)
from parallax.security.certificate import MALFORMED
from parallax.security.errors import Conflict, InvalidRequest, StorageFailed
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import PublicKey, key_id
from parallax.security.verification import Peer

logger = logging.getLogger(__name__)

# Of ended certificates. Ten thousand agents whose leaves last an hour leave two and a half million of them.
KEPT: Final = timedelta(days=7)
SWEEP_S: Final = 600.0
RETRY_S: Final = 1.0  # while nothing is recorded
MAX_NOTED: Final = 10_000  # leaves that wait to be entered; as many as the gate knows
MAX_SEEN: Final = 50_000  # leaves known to be entered: their fingerprints, some 100 bytes each

_BATCH: Final = 100  # leaves entered at once: they share transactions; or read, for the calls beside go on
_BEHIND_ENDS: Final = "~"  # however they are spelled
_RECORDS: Final = 5  # of a certificate: itself, its holder, two by which it is looked up, its key


@dataclass(frozen=True, slots=True)
class Wanted:
    """
    Which certificates are meant.

    Args:
        holders: `<trust domain>/<kind>` or `<trust domain>/<kind>/<name>`; "" for all.
        ends_before: Only those that end earlier.
        ends_after: Only those that do not end earlier; None: however long ago.
    """

    holders: str = ""
    ends_before: datetime | None = None
    ends_after: datetime | None = None

    def admits(self, end: str) -> bool:
        """Whether a certificate is meant whose end is spelled *end*."""
        return not (
            (self.ends_before and end >= spell(self.ends_before))
            or (self.ends_after and end < spell(self.ends_after))
        )

    def onward(self, key: str) -> str:
        """Behind what to go on from the holder's record *key*: those of each holder come by their end."""
        holder, end = key.rsplit("/", 2)[0], _end_of(key)
        if self.ends_after and end < spell(self.ends_after):
            return f"{holder}/{spell(self.ends_after)}"
        if self.ends_before and end >= spell(self.ends_before):
            return f"{holder}/{_BEHIND_ENDS}"
        return key


class Ledger:
    """
    Enters certificates in an engine, and finds them there.

    One that we issue is recorded before it is handed out, and for a key that no other identity's
    certificate is for: that is decided where it is recorded, so that of two who ask at once for one key
    one is refused. Whatever else is authenticated enters when it
    is first seen, and it is noted of ours that they are in use: later and beside the call, which neither
    waits for it nor fails with it.

    Args:
        audit: On the same engine: what is issued is audited in the commit that records it.
        clock: Aware UTC.
        on_deferred: Told of each leaf for which there was no room among those that wait.
    """

    def __init__(
        self,
        engine: Engine,
        audit: AuditLog,
        clock: Callable[[], datetime],
        on_deferred: Callable[[], None] = lambda: None,
    ) -> None:
        self._engine = engine
        self._audit = audit
        self._clock = clock
        self._on_deferred = on_deferred
        self._noted: dict[bytes, tuple[Peer, x509.Certificate]] = {}
        self._seen: set[bytes] = set()
        self._followers: list[Callable[[IssuedCertificate], None]] = []
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        """How many leaves wait to be entered."""
        return len(self._noted)

    def follow(self, told: Callable[[IssuedCertificate], None]) -> None:
        """Have *told* called with each certificate from now on, as soon as what it says is there for good."""
        self._followers.append(told)

    async def record(
        self, leaf: x509.Certificate, identity: Identity, issuer: x509.Certificate, requested_by: str
    ) -> IssuedCertificate:
        """
        Enter *leaf*, which *issuer* signed for *identity*; when this returns, it is there for good.

        Again for the same leaf, it changes nothing; what was entered first is returned.

        Raises:
            StorageFailed: It is not known to be entered: it must not be handed out.
            InvalidRequest: A certificate of another identity is for the same key; nor must it be then.
        """
        entry = self._draft(leaf, identity, issuer, requested_by)
        known: Record | None = None  # of the key: as a rule it is new, and nobody has to look
        while True:
            try:
                await self._audit.commit(_renewal_of(entry), _writes_of(entry, _use(entry, known)))
            except Conflict:
                found = await self._find(entry.key)
                if found is not None:
                    return found[0]
                known = await self._engine.get(entry.use_key)
                _check_use(entry, known)
            else:
                self._tell(entry)
                return entry

    async def user_of(self, key: PublicKey) -> Identity | None:
        """Whose certificates are for *key*; None if there are none, or none are kept any more."""
        record = await self._engine.get(f"{KEYS}{key_id(key).hex()}")
        return KeyUse.decode(record.value or b"").identity if record else None

    async def pinning(self, key: PublicKey, identity: Identity, *, is_pinned: bool) -> Write:
        """
        What takes note that a certificate of *identity*'s for *key* is pinned, or none any more.

        To be written with the pin, unless somebody else was faster to use that key. That none is pinned any
        more can be noted whoever uses it.

        Raises:
            InvalidRequest: It is to be pinned, and is that of another identity's certificate.
        """
        name = f"{KEYS}{key_id(key).hex()}"
        found = await self._engine.get(name)
        use = KeyUse.decode(found.value or b"") if found else KeyUse(identity, "")
        if use.identity == identity:
            use = replace(use, is_pinned=is_pinned)
        elif is_pinned:
            raise InvalidRequest(f"{use.identity} has the same key: make one for {identity} alone")
        return Write(name, use.encode() or None, found.revision if found else ABSENT)

    async def find(self, number: str) -> list[IssuedCertificate]:
        """
        The certificates whose serial or fingerprint is *number*, lower-case hex as these are spelled.

        Several, where issuers have given the same serial.
        """
        records = await self._engine.scan(f"{LOOKUPS}{number}/")
        keys = [_certificate_of(record.key) for record in records]
        return list(map(_decode, await self._engine.get_many(keys)))

    async def record_with(
        self,
        leaf: x509.Certificate,
        identity: Identity,
        issuer: x509.Certificate,
        requested_by: str,
        commit: Callable[[Sequence[Write]], Awaitable[object]],
    ) -> IssuedCertificate:
        """
        As `record`, once and in one transaction with what *commit* adds to the writes that it is given.

        Raises:
            Conflict: A record is not as expected; nothing was written.
            StorageFailed: It is not known to be entered: it must not be handed out.
            InvalidRequest: A certificate of another identity is for the same key.
        """
        entry = self._draft(leaf, identity, issuer, requested_by)
        known = await self._engine.get(entry.use_key)
        _check_use(entry, known)
        await commit(_writes_of(entry, _use(entry, known)))
        self._tell(entry)
        return entry

    async def uses(self, key_fingerprint: str) -> list[IssuedCertificate]:
        """The certificates for the key with that fingerprint, of whoever uses it, ended ones included."""
        record = await self._engine.get(f"{KEYS}{key_fingerprint}")
        if record is None:
            return []
        holder = KeyUse.decode(record.value or b"").identity
        return [each async for each in self.all_of(holder) if each.key_fingerprint == key_fingerprint]

    async def all_of(self, identity: Identity, since: str = "") -> AsyncIterator[IssuedCertificate]:
        """The certificates of *identity* whose end is spelled *since* or later, page by page."""
        after = f"{below(identity)}{since}"
        while records := await self._engine.scan(below(identity), after, _BATCH):
            keys = [_certificate_of(record.key) for record in records]
            for record in await self._engine.get_many(keys):
                yield _decode(record)
            after = records[-1].key

    async def held(self, identity: Identity) -> list[IssuedCertificate]:
        """The certificates of *identity* that have not ended."""
        return [entry async for entry in self.all_of(identity, spell(self._clock()))]

    def note(self, peer: Peer, leaf: x509.Certificate) -> bool:
        """
        Take note that *leaf* was authenticated as *peer*, for `run` to enter it.

        It returns at once. False: there is no room, tell it again.
        """
        if peer.fingerprint in self._seen or peer.fingerprint in self._noted:
            return True
        if len(self._noted) >= MAX_NOTED:
            self._on_deferred()
            return False
        self._noted[peer.fingerprint] = peer, leaf
        self._wake.set()
        return True

    async def page(
        self, wanted: Wanted, after: str = "", limit: int = MAX_PAGE
    ) -> tuple[list[IssuedCertificate], str]:
        """
        Certificates that are *wanted*, and behind what to go on, which is empty at the end.

        Those of some holders come by holder, then by end; all of them come by end. A page may hold fewer
        than *limit*, even none, before the last.

        Args:
            after: What the page before gave.
        """
        limit = min(limit, MAX_PAGE)
        if wanted.holders:
            return await self._page_of_holders(wanted, after, limit)
        if wanted.ends_after is not None:
            after = max(after, f"{CERTIFICATES}{spell(wanted.ends_after)}")
        records = await self._engine.scan(CERTIFICATES, after, limit)
        found = [_decode(record) for record in records if wanted.admits(_end_of(record.key))]
        return found, records[-1].key if len(found) == limit else ""

    async def run(self) -> None:
        """Enter what is noted, and drop what ended long ago, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._enter_noted())
            group.create_task(self._sweep_often())

    async def sweep(self) -> int:
        """Drop the certificates that ended longer than `KEPT` ago; how many they were."""
        ended = Wanted(ends_before=self._clock() - KEPT)
        dropped, after = 0, ""  # not from the start again, where what was dropped left its place
        while entries := (await self.page(ended, after, MAX_OWN_WRITES // _RECORDS))[0]:
            keys = [key for entry in entries for key in (entry.key, *entry.keys)]
            writes = [Write(key, None) for key in keys] + await self._last_uses(entries)
            detail = {"count": str(len(entries)), "until": entries[-1].not_after.isoformat()}
            try:
                await self._audit.commit(
                    Deed("certificate/dropped", str(control_plane()), detail=detail), writes
                )
            except Conflict:
                continue  # one of the keys is used again
            dropped, after = dropped + len(entries), entries[-1].key
        return dropped

    async def _last_uses(self, entries: Sequence[IssuedCertificate]) -> list[Write]:
        """What takes out the keys that are not used any more once *entries* are gone."""
        gone = {entry.key for entry in entries}
        uses = await self._engine.get_many(sorted({entry.use_key for entry in entries}))
        return [
            Write(record.key, replace(use, certificate="").encode() or None, record.revision)
            for record in uses
            for use in [KeyUse.decode(record.value or b"")]
            if use.certificate in gone
        ]

    async def _page_of_holders(
        self, wanted: Wanted, after: str, limit: int
    ) -> tuple[list[IssuedCertificate], str]:
        # Where all are admitted, one look is enough; where few are, no page looks at more than a thousand.
        piece = min(max(limit + 1, _BATCH), MAX_PAGE)
        admitted, looked, at_end = list[str](), 0, False
        while len(admitted) <= limit and looked < MAX_PAGE and not at_end:
            records = await self._engine.scan(f"{HOLDERS}{wanted.holders}/", after, piece, wanted.onward)
            admitted += [record.key for record in records if wanted.admits(_end_of(record.key))]
            looked, at_end = looked + len(records), len(records) < piece
            after = records[-1].key if records else after
        found = await self._engine.get_many(list(map(_certificate_of, admitted[:limit])))
        if len(admitted) > limit:
            after = admitted[limit - 1]
        elif at_end:
            after = ""
        return list(map(_decode, found)), after

    async def _enter_noted(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._noted:
                batch = list(islice(self._noted.items(), _BATCH))
                outcomes = await asyncio.gather(
                    *(self._see(*noted) for _, noted in batch), return_exceptions=True
                )
                for (fingerprint, (peer, _)), outcome in zip(batch, outcomes, strict=True):
                    self._settle(fingerprint, peer, outcome)
                if any(isinstance(outcome, StorageFailed) for outcome in outcomes):
                    await asyncio.sleep(RETRY_S)  # the engine has said what is wrong

    def _settle(self, fingerprint: bytes, peer: Peer, outcome: BaseException | None) -> None:
        """Forget a leaf that was noted, unless it has to be tried again."""
        match outcome:
            case StorageFailed():
                return
            case None:
                pass
            case Exception() if isinstance(outcome, MALFORMED):
                # Whoever holds it was let in; it is no reason for us to stop.
                logger.warning(
                    "a certificate cannot be entered",
                    extra={"peer": str(peer.identity), "cause": ascii(str(outcome))},
                )
            case _:
                raise outcome
        del self._noted[fingerprint]
        if len(self._seen) >= MAX_SEEN:
            self._seen.clear()
        self._seen.add(fingerprint)

    async def _see(self, peer: Peer, leaf: x509.Certificate) -> None:
        """Enter that *leaf* is in use."""
        key = key_of(leaf)
        while True:
            now = self._clock()
            found = await self._find(key)
            try:
                if found is None:
                    entry = IssuedCertificate.of(
                        leaf, peer.identity, peer.issuer_key, recorded_at=now, seen_at=now
                    )
                    known = await self._engine.get(entry.use_key)
                    may_use = _may_use(entry, known)
                    use = (_use(entry, known),) if may_use else ()
                    event = Event("certificates/seen", entry.encode())
                    await self._engine.commit(event, _writes_of(entry, *use))
                    if not may_use:
                        _warn_of_shared_key(entry)
                    self._tell(entry)
                elif found[0].seen_at is None:
                    entry = replace(found[0], seen_at=now)
                    write = Write(key, entry.encode(), found[1])
                    await self._engine.commit(Event("certificates/seen", entry.encode()), [write])
                    self._tell(entry)
            except Conflict:
                continue  # another replica was first
            return

    def _draft(
        self, leaf: x509.Certificate, identity: Identity, issuer: x509.Certificate, requested_by: str
    ) -> IssuedCertificate:
        return IssuedCertificate.of(
            leaf,
            identity,
            key_id(issuer.public_key()),
            recorded_at=self._clock(),
            requested_by=requested_by,
        )

    def _tell(self, entry: IssuedCertificate) -> None:
        for told in self._followers:
            told(entry)

    async def _find(self, key: str) -> tuple[IssuedCertificate, int] | None:
        """The certificate whose record is *key*, and its revision."""
        record = await self._engine.get(key)
        return (_decode(record), record.revision) if record else None

    async def _sweep_often(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)  # first: by then a clock that was wrong at boot is right
            try:
                dropped = await self.sweep()
            except StorageFailed:
                continue
            if dropped:
                logger.info("ended certificates dropped", extra={"count": dropped})


def _writes_of(entry: IssuedCertificate, *use: Write) -> list[Write]:
    """What enters *entry*, unless it is there, and what leads to it."""
    return [Write(entry.key, entry.encode(), ABSENT), *(Write(key, b"") for key in entry.keys), *use]


def _renewal_of(entry: IssuedCertificate) -> Deed:
    detail = {
        "serial": entry.serial,
        "fingerprint": entry.fingerprint,
        "not_after": entry.not_after.isoformat(),
    }
    return Deed("certificate/renewed", entry.requested_by or "", str(entry.identity), detail=detail)


def _may_use(entry: IssuedCertificate, known: Record | None) -> bool:
    """Whether the key of *entry* is nobody else's, by the record that is *known* of it."""
    return known is None or KeyUse.decode(known.value or b"").identity == entry.identity


def _check_use(entry: IssuedCertificate, known: Record | None) -> None:
    if not _may_use(entry, known):
        raise InvalidRequest(
            "the request is for a key that another identity has a certificate for; make a new key"
        ) from None


def _use(entry: IssuedCertificate, known: Record | None) -> Write:
    """What says that the key of *entry* is its holder's, if the record is still what is *known* of it."""
    if known is None:
        return Write(entry.use_key, KeyUse(entry.identity, entry.key).encode(), ABSENT)
    use = KeyUse.decode(known.value or b"")
    used = replace(use, certificate=max(entry.key, use.certificate))
    return Write(entry.use_key, used.encode(), known.revision)


def _warn_of_shared_key(entry: IssuedCertificate) -> None:
    logger.warning(
        "a certificate in use is for the key of another identity's: issue one of them another, for a new key",
        extra={"identity": str(entry.identity), "serial": entry.serial},
    )


def _decode(record: Record) -> IssuedCertificate:
    return IssuedCertificate.decode(record.key, record.value or b"")


def _certificate_of(key: str) -> str:
    """The key of the certificate to which the record *key* of a holder or a lookup leads."""
    return f"{CERTIFICATES}{'/'.join(key.rsplit('/', 2)[1:])}"


def _end_of(key: str) -> str:
    """The end of validity in the key of a certificate's or a holder's record."""
    return key.rsplit("/", 2)[1]
