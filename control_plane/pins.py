"""The pins of the fleet: which self-signed certificates are let in, kept for good, and told the port."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.engine import ABSENT, MAX_PAGE, Engine, Record, Write
from parallax.control_plane.issued import IssuedCertificate, key_of
from parallax.control_plane.ledger import KEPT, RETRY_S, SWEEP_S, Ledger
from parallax.control_plane.pin_index import PinIndex
from parallax.control_plane.pinned import PINS, Pinned, decode, encode, kept_at
from parallax.control_plane.uninterrupted import Uninterrupted
from parallax.security.certificate import MALFORMED
from parallax.security.credentials import CredentialStore
from parallax.security.errors import (
    Conflict,
    IdentityError,
    InvalidRequest,
    InvalidTransition,
    Revoked,
    Unavailable,
    VerificationError,
)
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import PublicKey, check_strength, key_id
from parallax.security.pinned import (
    MAX_PER_IDENTITY,
    Pin,
    Pins,
    authenticate_pinned,
    check_fits,
    is_self_signed,
    peer_of,
)

if TYPE_CHECKING:
    from parallax.security.verification import Peer

logger = logging.getLogger(__name__)

MAX_PINS: Final = 10_000  # 21 MB, and a third of a second at the start; 50,000 would be 2.5 s (measured)


@dataclass(frozen=True, slots=True)
class Change:
    """
    Who changes pins, and from where.

    Args:
        by: An identity as a URI, or by what it is granted: `token 7f3a…`, `approval`.
        source: The address, where no call that is being handled tells it.
        given_by: Who gave that token or approval, as a URI.
    """

    by: str
    source: str = ""
    given_by: str = ""


_OURS: Final = Change(str(control_plane()))


class Pinning:
    """
    Keeps pins in an engine, each change with its entry in the audit log, and has *store* let them in.

    The port has room for the oldest; the holders of the others exchange them, see `Exchange`.
    A key that is pinned is its holder's as one that is certified is: the ledger has both, so that no other
    identity gets it, whoever asks first.

    Changes come one after the other: whether a pin fits depends on all the others. Whoever renews with a
    pinned certificate gets an issued one for it. Once that is seen in use, the pin goes, the drain time
    later: until then streams that were opened with it may finish.

    Args:
        ledger: On the same engine.
        store: The control plane's own, whose port lets them in.
        drain: How long a stream may outlive its certificate.
        clock: Aware UTC.
        check_revoked: Passes if nothing that proves a peer is revoked; raises Revoked.
    """

    def __init__(
        self,
        engine: Engine,
        audit: AuditLog,
        ledger: Ledger,
        store: CredentialStore,
        drain: timedelta,
        clock: Callable[[], datetime],
        check_revoked: Callable[[Peer], None] = lambda _: None,
    ) -> None:
        self._engine = engine
        self._audit = audit
        self._ledger = ledger
        self._store = store
        self._drain = drain
        self._clock = clock
        self._check_revoked = check_revoked
        self._index = PinIndex()
        self._revisions: dict[Identity, int] = {}
        self._awaited: frozenset[str] = frozenset()  # what was issued in exchange
        self._in_use: dict[str, datetime] = {}  # when it was seen
        self._lock = asyncio.Lock()
        self._uninterrupted = Uninterrupted()
        self._wake = asyncio.Event()

    async def load(self) -> None:
        """
        Publish what is kept; before anybody is let in.

        Raises:
            StorageFailed: It cannot be read.
        """
        after: str | None = ""
        while after is not None:
            records = await self._engine.scan(PINS, after)
            for record in records:
                self._take(record)
            after = records[-1].key if len(records) == MAX_PAGE else None
        self._publish()
        for key in self._awaited:
            found = await self._engine.get(key)
            if found is not None:
                self.note(IssuedCertificate.decode(found.key, found.value or b""))

    async def pin(self, holder: Identity, der: bytes, change: Change, beside: Sequence[Write] = ()) -> Pinned:
        """
        Let in *holder*, who presents the certificate *der*; again for the same, it changes nothing.

        Args:
            beside: What is written in the same transaction, or nothing is.

        Raises:
            Conflict: A record *beside* is not as expected.
            InvalidRequest: It is no certificate, names somebody else, has the key of another identity's, or
                cannot be pinned.
            InvalidTransition: The holder has `MAX_PER_IDENTITY` pins.
            Revoked: See `check`.
            StorageFailed: It is not known to be kept.
            Unavailable: There are `MAX_PINS`.
        """
        try:
            pin = Pin(holder, x509.load_der_x509_certificate(der))
        except MALFORMED:
            raise InvalidRequest("not a certificate (DER), or a damaged one") from None
        self.check(pin)
        return await self._uninterrupted.make(self._pin(holder, pin, change, beside))

    def check(self, pin: Pin) -> None:
        """
        Pass if *pin* would let its holder in, whatever else is pinned; one that is kept, by its date.

        Raises:
            InvalidRequest: Its certificate names somebody else, or is not good, or not self-signed.
            Revoked: It is, or the holder is withdrawn, or was when it was made, which stays so.
        """
        holder, kept = pin.identity, self.find(pin)
        pin = kept.dated if kept else pin
        try:
            peer = authenticate_pinned(pin.certificate, Pins((pin,)), holder.trust_domain, self._clock())
        except (VerificationError, IdentityError) as exc:
            raise InvalidRequest(f"it cannot be pinned: {exc}") from exc
        self._check_revoked(peer)

    async def unpin(
        self, holder: Identity, fingerprint: str, change: Change, action: str = "pin/removed"
    ) -> tuple[Pinned, ...]:
        """
        Let nobody in any more with what is pinned for *holder*; open calls end. What was taken out.

        Args:
            fingerprint: Of the one that is meant, lower-case hex; "": all.

        Raises:
            InvalidRequest: There is none.
            StorageFailed: It is not known to be taken out.
        """
        return await self._uninterrupted.make(self._unpin(holder, fingerprint, change, action))

    def has(self, holder: Identity) -> bool:
        """Whether anything is pinned for *holder*."""
        return bool(self._index.held_by(holder))

    def find(self, pin: Pin) -> Pinned | None:
        """What is kept of just this *pin*; None: nothing."""
        held = self._index.held_by(pin.identity)
        return next((each for each in held if each.pin.fingerprint == pin.fingerprint), None)

    def page(self, after: str, limit: int) -> tuple[list[Pinned], str]:
        """
        Pins by holder, and behind whom to go on, "" at the end; those of one holder are not parted.

        Args:
            after: What the page before gave.
        """
        found: list[Pinned] = []
        for holder in self._index.holders:
            if str(holder) > after:
                found += self._index.held_by(holder)
            if len(found) >= limit:
                return found, str(holder)
        return found, ""

    def is_on_port(self, pinned: Pinned) -> bool:
        """Whether there is room for it on the port."""
        return self._index.is_on_port(pinned)

    def is_revoked(self, pinned: Pinned) -> bool:
        """Whether it is withdrawn, by itself or with its holder, and lets nobody in."""
        try:
            self._check_revoked(peer_of(pinned.dated))
        except Revoked:
            return True
        return False

    async def renewed(self, presented: x509.Certificate, issued: x509.Certificate, source: str = "") -> None:
        """
        Take note that who presented a certificate was issued another; nothing, if that is not pinned.

        Args:
            source: See `Change`.

        Raises:
            Revoked: It was, until a moment ago.
            StorageFailed: It is not known to be kept.
        """
        if is_self_signed(presented):
            await self._uninterrupted.make(self._exchange(presented, issued, source))

    def note(self, entry: IssuedCertificate) -> None:
        """Take note of what the ledger says of a certificate."""
        if entry.seen_at is not None and entry.key in self._awaited:
            self._in_use.setdefault(entry.key, self._clock())
            self._wake.set()

    async def run(self) -> None:
        """Take out what was exchanged, and what ended long ago, until cancelled."""
        pause = self._drain.total_seconds() + RETRY_S
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause if self._in_use else SWEEP_S):
                    await self._wake.wait()
            self._wake.clear()
            try:
                await self.sweep()
            except Unavailable:  # the engine has said what is wrong
                await asyncio.sleep(RETRY_S)

    async def sweep(self) -> None:
        """Take out whose time has come."""
        now = self._clock()
        for each in [*self._index]:
            seen = self._in_use.get(each.exchanged_for)
            ended = now - each.pin.certificate.not_valid_after_utc > KEPT
            if ended or (seen is not None and now - seen >= self._drain):
                action = "pin/ended" if ended else "pin/replaced"
                with suppress(InvalidRequest):  # somebody was faster
                    await self.unpin(each.pin.identity, each.pin.fingerprint.hex(), _OURS, action)
        self._in_use = {key: at for key, at in self._in_use.items() if key in self._awaited}

    async def _pin(self, holder: Identity, pin: Pin, change: Change, beside: Sequence[Write]) -> Pinned:
        async with self._lock:
            known = self.find(pin)
            if known is not None:
                return known
            if len(self._index) >= MAX_PINS:
                raise Unavailable(
                    f"{MAX_PINS:,} certificates are pinned, which is as many as may be: have one issued, or "
                    "ask the administrator to take out some"
                )
            held = self._index.held_by(holder)
            own = self._store.current
            authorities = *own.bundle.roots, *own.chain[1:]
            try:
                await asyncio.to_thread(check_fits, pin, self._index.beside(pin), authorities)
            except VerificationError as exc:
                raise InvalidRequest(f"it cannot be pinned: {exc}") from exc
            if len(held) >= MAX_PER_IDENTITY:
                both = " and ".join(each.pin.fingerprint.hex() for each in held)
                raise InvalidTransition(
                    f"{holder} has {MAX_PER_IDENTITY} pins, {both}: take one out, "
                    f"`parallax certs unpin {holder.short} --fingerprint …`"
                )
            added = Pinned(pin, self._index.moment(self._clock()), change.by)
            await self._write("pin/added", holder, (*held, added), [added], change, beside)
        return added

    async def _unpin(
        self, holder: Identity, fingerprint: str, change: Change, action: str
    ) -> tuple[Pinned, ...]:
        async with self._lock:
            held = self._index.held_by(holder)
            gone = tuple(each for each in held if fingerprint in {"", each.pin.fingerprint.hex()})
            if not gone:
                raise InvalidRequest(f"{holder} has no such pin: see `parallax certs pins`")
            await self._write(action, holder, tuple(each for each in held if each not in gone), gone, change)
        return gone

    async def _exchange(self, presented: x509.Certificate, issued: x509.Certificate, source: str) -> None:
        fingerprint = presented.fingerprint(hashes.SHA256())
        async with self._lock:
            holder = self._index.holder_of(fingerprint)
            if holder is None:
                raise Revoked(f"{fingerprint.hex()} is not pinned any more, and is exchanged for nothing")
            held = self._index.held_by(holder)
            now = tuple(
                replace(each, exchanged_for=key_of(issued)) if each.pin.fingerprint == fingerprint else each
                for each in held
            )
            changed = [each for each in now if each not in held]
            if changed:
                await self._write("pin/exchanged", holder, now, changed, Change(str(holder), source))

    async def _write(
        self,
        action: str,
        holder: Identity,
        pinned: tuple[Pinned, ...],
        about: Iterable[Pinned],
        change: Change,
        beside: Sequence[Write] = (),
    ) -> None:
        """Keep *pinned* as what *holder* has, and publish it; called with the lock."""
        fingerprints = " ".join(each.pin.fingerprint.hex() for each in about)
        detail = {"fingerprint": fingerprints} | ({"given_by": change.given_by} if change.given_by else {})
        deed = Deed(action, change.by, str(holder), change.source, detail)
        write = Write(kept_at(holder), encode(pinned) or None, self._revisions.get(holder, ABSENT))
        while True:
            uses = await self._uses(holder, pinned)
            try:
                revision, *_ = await self._audit.commit(deed, [write, *uses, *beside])
            except Conflict:
                if beside:
                    raise
                continue  # somebody has begun, or ceased, to use one of the keys
            break
        self._index.put(holder, pinned)
        self._revisions[holder] = revision
        if not pinned:
            del self._revisions[holder]
        self._publish()
        logger.info(
            "pins changed", extra={"action": action, "identity": str(holder), "fingerprint": fingerprints}
        )

    async def _uses(self, holder: Identity, pinned: tuple[Pinned, ...]) -> list[Write]:
        """What takes note of the keys that *holder* begins or ceases to have pinned."""
        before, after = _keys_of(self._index.held_by(holder)), _keys_of(pinned)
        changed = [(key, True) for key in after.keys() - before.keys()]
        changed += [(key, False) for key in before.keys() - after.keys()]
        keys = before | after
        return [await self._ledger.pinning(keys[each], holder, is_pinned=is_so) for each, is_so in changed]

    def _publish(self) -> None:
        self._awaited = frozenset(each.exchanged_for for each in self._index if each.exchanged_for)
        on_port = self._index.on_port
        if on_port != self._store.pins.pinned:  # else a port would be changed for nothing
            self._store.pin(Pins(on_port))

    def _take(self, record: Record) -> None:
        pinned = decode(record.value or b"")
        holder = pinned[0].pin.identity
        self._index.put(holder, pinned)
        self._revisions[holder] = record.revision


def _keys_of(pinned: Iterable[Pinned]) -> dict[bytes, PublicKey]:
    """The keys in *pinned* certificates, by their ids."""
    keys = (check_strength(each.pin.certificate.public_key()) for each in pinned)
    return {key_id(key): key for key in keys}
