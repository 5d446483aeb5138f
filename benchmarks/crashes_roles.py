"""The process that `crashes.py` kills."""

from __future__ import annotations

import asyncio
import logging
import resource
import traceback
from contextlib import suppress
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from crashes_desk import HOUR, LONG_AGO, MEMBERS, Desk
from crashes_messages import Attempt, Begun, Ended, Failed, NoMore, Refused, There, Turn
from parallax.control_plane.approvals import Pending
from parallax.control_plane.audit import Deed, read_head
from parallax.control_plane.crl import RECORDS
from parallax.control_plane.engines.engine import Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.enrollment import Application
from parallax.control_plane.ledger import KEPT
from parallax.control_plane.pins import Change
from parallax.control_plane.revoked import RevokedCertificate, RevokedIdentity
from parallax.control_plane.root_rotation import Stage
from parallax.control_plane.roots import ADOPTED
from parallax.runtime.clock import utc_now
from parallax.runtime.refusal import Refusal
from parallax.security import Identity, LeafProfile, authenticate
from parallax.security.crl import RevokedSerial
from parallax.security.errors import ConfigError, EnrollmentError, StorageFailed
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Kind
from parallax.security.keys import generate_key, key_id, key_to_pem, parse_key
from parallax.security.profiles import self_signed_template
from parallax.security.request import new_request
from parallax.security.revocation import Reason
from parallax.security.tokens import ALLOTTED, Grant
from parallax.security.verification import CertificateId, Usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime
    from multiprocessing.connection import Connection
    from pathlib import Path

    from cryptography import x509

    from parallax.security.authority import Issued

DEEDS: Final = "deeds/"
ADMIN: Final = "spiffe://parallax.local/client/admin"
SOURCE: Final = "192.0.2.7"
AT_ONCE: Final = 4  # kinds of writes in one process: each gets on, and meets others
_DAY: Final = timedelta(days=1)
_AGO: Final = timedelta(seconds=2)  # so that nobody has to wait until what is reinstated counts


def work(directory: Path, number: int, told: Connection, unfinished: tuple[Attempt, ...]) -> None:
    """
    Write as fast as it can, and tell what is acknowledged, until killed.

    That is the head of the audit log, as it is after something was done, or one of `crashes_messages`.

    Args:
        unfinished: What those before have begun.
    """
    logging.disable()
    try:
        asyncio.run(Worker(number, told).run(directory, unfinished))
    except Exception:  # noqa: BLE001 - whatever it is, it is told
        told.send(Failed(traceback.format_exc()))


def is_filled(number: int) -> bool:
    """Whether the disk of the process with that number is full every now and then."""
    return number % 4 == 3


def kinds_of(number: int) -> tuple[str, ...]:
    """What the process with that number does: others than the ones before and after it."""
    return tuple(KINDS[(5 * number + each) % len(KINDS)] for each in range(AT_ONCE))


class Worker:
    """Does several kinds of writes at once; *number* keeps its names apart from those of others."""

    def __init__(self, number: int, told: Connection) -> None:
        self._number = number
        self._numbers = count(number * 1_000_000)
        self._told = told

    async def run(self, directory: Path, unfinished: tuple[Attempt, ...]) -> None:
        """Until killed."""
        async with SqliteEngine(directory / "data") as engine, asyncio.TaskGroup() as group:
            self._desk = Desk(engine, directory)
            await self._desk.load()
            group.create_task(self._desk.ledger.run())
            for attempt in unfinished:
                await self._finish(attempt)
            for kind in kinds_of(self._number):
                group.create_task(self._repeat(kind, getattr(self, f"_{kind}")))
            if is_filled(self._number):
                group.create_task(self._fill())

    async def _repeat(self, kind: str, turn: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await turn()
            except (StorageFailed, ConfigError):
                if not is_filled(self._number):
                    raise
                await read_head(self._desk.engine)
                self._told.send(Refused(kind))
                await asyncio.sleep(0.001)
            else:
                self._told.send(Turn(kind))

    async def _fill(self) -> None:
        while True:
            for limit in (1, resource.RLIM_INFINITY):
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                await asyncio.sleep(0.01)

    async def _acknowledge(self) -> None:
        """Tell that whatever has returned by now is acknowledged."""
        head, _ = await read_head(self._desk.engine)
        self._told.send(head)

    # What is done, one turn of each kind.

    async def _deeds(self) -> None:
        """Deeds, each with two records."""
        number = next(self._numbers)
        writes = [Write(f"{DEEDS}{number}/{half}", b"") for half in "ab"]
        await self._desk.audit.commit(Deed("benchmarks/done", "nobody", str(number)), writes)
        await self._acknowledge()

    async def _renewals(self) -> None:
        """Certificates that last, two for each key; the first is seen in use."""
        desk, identity, key = self._desk, self._identity(), generate_key().public_key()
        for turn in range(2):
            issued = desk.authority.issue(identity, key, LeafProfile(), utc_now())
            leaf = issued.chain[0]
            entry = await desk.ledger.record(leaf, identity, desk.authority.certificate, str(identity))
            self._told.send(There(entry.key))
            await self._acknowledge()
            if not turn:
                self._note(leaf)

    async def _sightings(self) -> None:
        """Certificates that nobody here has issued."""
        self._note(self._issue(self._identity()).chain[0])
        await self._noted()

    async def _endings(self) -> None:
        """Certificates, and revocations of some, that ended long ago, and are dropped."""
        desk = self._desk
        for _ in range(3):
            identity, ended = self._identity(), utc_now() - LONG_AGO
            leaf = self._issue(identity, ended, timedelta(minutes=1)).chain[0]
            await desk.ledger.record(leaf, identity, desk.authority.certificate, "nobody")
            certificate = CertificateId(bytes(32), next(self._numbers))
            await desk.revocations.revoke(
                RevokedCertificate(certificate, identity, ended, Reason.SUPERSEDED, ADMIN, ended)
            )
        for sweep in (desk.ledger.sweep, desk.revocations.sweep):
            await sweep()
            await self._acknowledge()

    async def _enrollments(self) -> None:
        """First certificates for tokens; some are taken out, others end."""
        tokens, (ended, _) = self._desk.tokens, self._desk.ended
        token, _ = await tokens.create(self._grant(name := self._name()), HOUR, ADMIN)
        await self._acknowledge()
        attempt = Attempt(token.text, name, key_to_pem(generate_key()))
        self._told.send(Begun(attempt))
        await self._finish(attempt)
        for granted, taken in (({"zone": "a"}, ()), ({"zone": "b"}, ()), ({}, ("zone",))):
            who = Identity(DEFAULT_TRUST_DOMAIN, Kind.AGENT, name)
            await self._desk.labelling.change(who, granted, taken, ADMIN)
            await self._acknowledge()
        await self._device()
        token, _ = await tokens.create(self._grant(self._name()), HOUR, ADMIN)
        await tokens.revoke(token.id, ADMIN)
        await self._acknowledge()
        await ended.create(self._grant(self._name()), HOUR, ADMIN)
        await tokens.sweep()
        await self._acknowledge()

    async def _approvals(self) -> None:
        """First certificates for who was approved; others are rejected, before or after that, or too late."""
        desk, (_, ended) = self._desk, self._desk.ended
        attempt = Attempt("", self._name(), key_to_pem(generate_key()))
        self._told.send(Begun(attempt))
        await self._finish(attempt)
        for is_approved in (False, True):
            pending = desk.approvals.ask(self._identity(), self._fingerprint(), SOURCE)
            if is_approved:
                await desk.approvals.approve(pending.fingerprint, {}, ADMIN)
            await desk.approvals.reject(pending.fingerprint, ADMIN)
            await self._acknowledge()
        late = ended.ask(self._identity(), self._fingerprint(), SOURCE)
        await ended.approve(late.fingerprint, {}, ADMIN)
        await desk.approvals.sweep()
        await self._acknowledge()

    async def _revocations(self) -> None:
        """Certificates and identities; of these one is reinstated."""
        log, identity, now = self._desk.revocations, self._identity(), utc_now()
        certificate = CertificateId(bytes(32), next(self._numbers))
        await log.revoke(RevokedCertificate(certificate, identity, now + _DAY, Reason.SUPERSEDED, ADMIN, now))
        await self._acknowledge()
        for each in (identity, self._identity()):
            await log.revoke(RevokedIdentity(each, Reason.KEY_COMPROMISE, ADMIN, now - _AGO))
            await self._acknowledge()
        await log.reinstate(identity, ADMIN)
        await self._acknowledge()

    async def _pins(self) -> None:
        """Pins: one is taken out, one is exchanged and then goes, one ends."""
        desk, identity, change = self._desk, self._identity(), Change(ADMIN)
        first, second = self._self_signed(identity), self._self_signed(identity)
        for each in (first, second):
            await desk.pinning.pin(identity, each.public_bytes(Encoding.DER), change)
            await self._acknowledge()
        issued = self._issue(identity).chain[0]
        await desk.ledger.record(issued, identity, desk.authority.certificate, str(identity))
        await desk.pinning.renewed(first, issued)
        await self._acknowledge()
        self._note(issued)
        await self._noted()
        await desk.pinning.sweep()
        await self._acknowledge()
        await desk.pinning.unpin(identity, "", change)
        await self._acknowledge()
        await desk.pinning.pin(identity, first.public_bytes(Encoding.DER), change)
        desk.ahead = _DAY + KEPT + _DAY
        try:
            await desk.pinning.sweep()
        finally:
            desk.ahead = timedelta(0)
        await self._acknowledge()

    async def _lists(self) -> None:
        """Lists of what is revoked, each with a number of its own."""
        desk = self._desk
        serial = next(self._numbers)
        desk.withdrawn[serial] = RevokedSerial(serial, utc_now())
        desk.crls.note()
        await desk.crls.publish()
        if desk.crls.obstacles:
            raise ConfigError(", ".join(desk.crls.obstacles.values()))
        for each in desk.crls.published:
            self._told.send(There(f"{RECORDS}{each.issuer}"))

    async def _rotations(self) -> None:
        """The CA gives way to another, or is about to."""
        running = asyncio.ensure_future(self._desk.roots.run())
        try:
            for goes_through in (True, False):
                await self._rotate(goes_through=goes_through)
        finally:
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running

    async def _prunings(self) -> None:
        """The audit log itself; and what goes into it beside all this."""
        cause = EnrollmentError("nobody is admitted")
        self._desk.refusals.note(Refusal("/v1/enrollments", None, SOURCE, cause))
        await self._desk.refusals.enter()
        await self._desk.pruner.prune()
        await self._acknowledge()

    # What several of them need.

    async def _finish(self, attempt: Attempt) -> None:
        """Enroll, and once more as whoever has lost the answer; one whom a crash has cut off, too."""
        identity, key = Identity.parse_short(f"agent/{attempt.name}"), parse_key(attempt.key_pem)
        for _ in range(2):
            application = Application(identity, new_request(identity, key), SOURCE)
            if attempt.token:
                issued = await self._desk.enrollment.redeem(attempt.token, application)
            else:
                issued = await self._approved(application)
            if issued.chain[0].public_key() != key.public_key():
                raise AssertionError("a certificate for another key")
            await self._acknowledge()
        self._told.send(Ended(attempt))

    async def _device(self) -> None:
        """A name for one that has none, and a certificate of that name."""
        token, _ = await self._desk.tokens.create(self._grant(ALLOTTED), HOUR, ADMIN)
        key = generate_key()
        fingerprint = key_id(key.public_key()).hex()
        named = [
            await self._desk.enrollment.allot(token.text, fingerprint, DEFAULT_TRUST_DOMAIN, SOURCE)
            for _ in range(2)
        ]
        await self._acknowledge()
        if named[0] != named[1]:
            raise AssertionError("another name for the same key")
        attempt = Attempt(token.text, named[0].name, key_to_pem(key))
        self._told.send(Begun(attempt))
        await self._finish(attempt)

    async def _approved(self, application: Application) -> Issued:
        """What is issued to somebody who was approved before the crash, or is now."""
        desk = self._desk
        given = await desk.enrollment.request(application)
        if isinstance(given, Pending):
            await desk.approvals.approve(given.fingerprint, {"zone": "a"}, ADMIN)
            await self._acknowledge()
            given = await desk.enrollment.request(application)
        if isinstance(given, Pending):
            raise AssertionError("what was approved is waited for")  # noqa: TRY004 - no wrong type
        return given

    async def _rotate(self, *, goes_through: bool) -> None:
        """One rotation, be it one that a crash has cut off, to its end."""
        roots = self._desk.roots
        status = await roots.status()
        if status.rotation is None:
            status = await roots.rotate(ADMIN)
            await self._acknowledge()
        rotation = status.rotation
        if rotation is not None and rotation.stage is Stage.PREPARED:
            if goes_through:
                await self._adopt(rotation.bundle.hash)
            else:
                await roots.abort(ADMIN)
                await self._acknowledge()
        while (status := await roots.status()).rotation is not None:
            if status.problem:
                raise ConfigError(status.problem)
            await asyncio.sleep(0.005)

    async def _adopt(self, bundle_hash: bytes) -> None:
        """All members have the roots of the next CA; the last one lets it go on."""
        roots = self._desk.roots
        *others, last = MEMBERS
        for each in others:
            key = f"{ADOPTED}{each.trust_domain}/{each.short}"
            await roots.acknowledge(each, bundle_hash)
            self._told.send(There(key))
            await asyncio.sleep(0.005)
            self._told.send(NoMore(key))
        await roots.acknowledge(last, bundle_hash)

    def _note(self, leaf: x509.Certificate) -> None:
        ledger, bundle = self._desk.ledger, self._desk.authority.bundle
        ledger.note(authenticate([leaf], bundle, DEFAULT_TRUST_DOMAIN, utc_now(), Usage.CLIENT), leaf)

    async def _noted(self) -> None:
        """Until whatever was noted is entered."""
        while len(self._desk.ledger):  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.001)

    def _issue(self, identity: Identity, now: datetime | None = None, lifetime: timedelta = _DAY) -> Issued:
        key = generate_key().public_key()
        return self._desk.authority.issue(identity, key, LeafProfile(lifetime), now or utc_now())

    def _self_signed(self, identity: Identity) -> x509.Certificate:
        key, profile = generate_key(), LeafProfile(_DAY, sans=())
        template = self_signed_template(identity, key.public_key(), profile, utc_now(), next(self._numbers))
        return template.sign(key, hashes.SHA256())

    def _grant(self, name: str) -> Grant:
        return Grant(DEFAULT_TRUST_DOMAIN, Kind.AGENT, name, {"zone": "a"})

    def _fingerprint(self) -> str:
        return f"{next(self._numbers):064x}"

    def _identity(self) -> Identity:
        return Identity.parse_short(f"agent/{self._name()}")

    def _name(self) -> str:
        return f"agent-{next(self._numbers)}"


KINDS: Final = (
    "deeds",
    "renewals",
    "sightings",
    "endings",
    "enrollments",
    "approvals",
    "revocations",
    "pins",
    "lists",
    "rotations",
    "prunings",
)
