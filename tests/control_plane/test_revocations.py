"""What is kept of revocations: with its audit entry or not at all, and no longer than it is needed."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from parallax.control_plane import revocations as revocations_module
from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.ledger import KEPT
from parallax.control_plane.revocations import RevocationLog
from parallax.control_plane.revoked import Revoked, RevokedCertificate, RevokedIdentity, decode
from parallax.security.errors import InvalidTransition, StorageFailed
from parallax.security.identity import Identity
from parallax.security.revocation import WITHDRAWN, Reason, Revocations
from parallax.security.verification import CertificateId
from tests.control_plane.audit_log import verified
from tests.control_plane.clock import Clock

NOW = datetime(2026, 6, 1, 12, 0, 0, 250_000, tzinfo=UTC)
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)
ADMIN = "spiffe://parallax.local/client/admin"
AGENT_1 = Identity.parse_short("agent/agent-1")
CERTIFICATE = RevokedCertificate(
    CertificateId(bytes(range(32)), 0xABC), AGENT_1, NOW + DAY, Reason.KEY_COMPROMISE, ADMIN, NOW
)
UNKNOWN = RevokedCertificate(CertificateId(bytes(32), 1), None, None, Reason.UNSPECIFIED, ADMIN, NOW)
IDENTITY = RevokedIdentity(AGENT_1, Reason.PRIVILEGE_WITHDRAWN, ADMIN, NOW)


@pytest.fixture
def clock() -> Clock:
    return Clock(NOW)


@pytest.fixture
def log(engine: SqliteEngine, clock: Clock) -> RevocationLog:
    return RevocationLog(engine, AuditLog(engine, clock, lambda: "127.0.0.1"), clock)


async def deeds(engine: SqliteEngine) -> list[Deed]:
    """What is in the audit log, whose chain is whole."""
    return [entry.deed for entry in await verified(engine)]


def serials(revocations: Revocations) -> dict[bytes, set[int]]:
    return {issuer: set(serials) for issuer, serials in revocations.certificates()}


async def loaded(engine: SqliteEngine, clock: Clock) -> RevocationLog:
    """As after a restart."""
    log = RevocationLog(engine, AuditLog(engine, clock), clock)
    await log.load()
    return log


@pytest.mark.parametrize(
    "entry", [CERTIFICATE, UNKNOWN, IDENTITY], ids=["certificate", "unknown", "identity"]
)
def test_what_is_stored_is_read_again(entry: Revoked) -> None:
    assert decode(entry.encode()) == entry


def test_what_a_newer_version_has_added_is_passed_over() -> None:
    assert decode(json.dumps(json.loads(IDENTITY.encode()) | {"new": 1}).encode()) == IDENTITY


def test_a_reason_of_a_newer_version_revokes_as_well() -> None:
    stored = json.dumps(json.loads(IDENTITY.encode()) | {"reason": "bored"}).encode()
    assert decode(stored) == replace(IDENTITY, reason=Reason.UNSPECIFIED)


async def test_it_is_in_force_and_told_when_it_is_acknowledged(log: RevocationLog) -> None:
    told: list[tuple[Revoked, int]] = []
    log.follow(lambda entry: told.append((entry, len(log.current))))
    assert await log.revoke(CERTIFICATE) == CERTIFICATE
    assert CERTIFICATE.certificate in log.current
    await log.revoke(IDENTITY)
    assert log.current.cut_off(AGENT_1) == WITHDRAWN
    assert told == [(CERTIFICATE, 1), (IDENTITY, 2)]


async def test_it_is_there_after_a_restart(log: RevocationLog, engine: SqliteEngine, clock: Clock) -> None:
    for entry in (CERTIFICATE, UNKNOWN, IDENTITY):
        await log.revoke(entry)
    again = await loaded(engine, clock)
    assert serials(again.current) == serials(log.current)
    assert dict(again.current.identities()) == {AGENT_1: WITHDRAWN}


async def test_it_is_audited_in_the_same_commit_with_reason_and_source(
    log: RevocationLog, engine: SqliteEngine
) -> None:
    await log.revoke(CERTIFICATE)
    await log.revoke(IDENTITY)
    await log.reinstate(AGENT_1, ADMIN)
    found = await deeds(engine)
    assert [deed.action for deed in found] == [
        "certificate/revoked",
        "identity/revoked",
        "identity/reinstated",
    ]
    first = found[0]
    assert (first.by, first.subject, first.source) == (ADMIN, str(AGENT_1), "127.0.0.1")
    assert first.detail == {
        "reason": "key-compromise",
        "serial": "abc",
        "issuer": bytes(range(32)).hex(),
    }


async def test_again_it_is_neither_recorded_nor_told(log: RevocationLog, engine: SqliteEngine) -> None:
    for entry in (CERTIFICATE, IDENTITY):
        await log.revoke(entry)
    told: list[Revoked] = []
    log.follow(told.append)
    assert [await log.revoke(entry) for entry in (CERTIFICATE, IDENTITY)] == [None, None]
    assert told == []
    assert len(await deeds(engine)) == 2


async def test_at_once_and_twice_it_is_recorded_once(log: RevocationLog, engine: SqliteEngine) -> None:
    answers = await asyncio.gather(*(log.revoke(IDENTITY) for _ in range(5)))
    assert [answer for answer in answers if answer is not None] == [IDENTITY]
    assert len(await deeds(engine)) == 1


async def test_it_is_in_force_though_whoever_asked_hangs_up(log: RevocationLog) -> None:
    """What is on the disk is in force, and the other way round, whenever the caller goes."""
    asking = asyncio.create_task(log.revoke(IDENTITY))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asking.cancel()
    async with asyncio.timeout(10):
        while not log.current.is_withdrawn(AGENT_1):
            await asyncio.sleep(0.001)


@pytest.mark.parametrize(("later", "at"), [(DAY, NOW + DAY), (timedelta(0), NOW + SECOND)])
async def test_reinstated_is_a_later_second_than_revoked(
    log: RevocationLog, engine: SqliteEngine, clock: Clock, later: timedelta, at: datetime
) -> None:
    """Certificates know whole seconds: what was issued just before must not pass for what comes after."""
    await log.revoke(IDENTITY)
    clock.now += later
    entry = await log.reinstate(AGENT_1, ADMIN)
    assert entry.reinstated_at == at.replace(microsecond=0)
    assert log.current.cut_off(AGENT_1) == entry.reinstated_at
    assert (await loaded(engine, clock)).current.cut_off(AGENT_1) == entry.reinstated_at


async def test_nobody_is_revoked_later_because_somebody_is_reinstated(
    log: RevocationLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    await log.revoke(IDENTITY)
    monkeypatch.setattr(revocations_module, "SECOND", timedelta(minutes=1))  # however long a disk takes
    reinstating = asyncio.create_task(log.reinstate(AGENT_1, ADMIN))
    await asyncio.sleep(0.01)  # it waits for the next one
    await log.revoke(CERTIFICATE)
    assert not reinstating.done()
    reinstating.cancel()


async def test_what_was_reinstated_can_be_revoked_again(log: RevocationLog, clock: Clock) -> None:
    await log.revoke(IDENTITY)
    await log.reinstate(AGENT_1, ADMIN)
    with pytest.raises(InvalidTransition):
        await log.reinstate(AGENT_1, ADMIN)
    assert await log.revoke(IDENTITY) == IDENTITY
    assert log.current.is_withdrawn(AGENT_1)


async def test_what_cannot_be_recorded_is_not_in_force_and_what_was_stays_so(
    log: RevocationLog, engine: SqliteEngine
) -> None:
    await log.revoke(CERTIFICATE)
    await engine.__aexit__(None, None, None)
    with pytest.raises(StorageFailed):
        await log.revoke(IDENTITY)
    with pytest.raises(StorageFailed):
        await log.reinstate(AGENT_1, ADMIN)
    assert not log.current.is_withdrawn(AGENT_1)
    assert CERTIFICATE.certificate in log.current
    await engine.__aenter__()
    assert await log.revoke(IDENTITY) == IDENTITY


async def test_what_ended_long_ago_is_dropped_and_nothing_else(
    log: RevocationLog, engine: SqliteEngine, clock: Clock
) -> None:
    for number in range(150):
        certificate = CertificateId(bytes(32), 1000 + number)
        await log.revoke(RevokedCertificate(certificate, AGENT_1, NOW, Reason.SUPERSEDED, ADMIN, NOW))
    for entry in (CERTIFICATE, UNKNOWN, IDENTITY):
        await log.revoke(entry)
    assert await log.sweep() == 0
    clock.now += KEPT + SECOND
    assert await log.sweep() == 150
    assert len(log.current) == len((await loaded(engine, clock)).current) == 3
    found = [deed.detail for deed in await deeds(engine) if deed.action == "revocation/dropped"]
    assert found == [{"count": "98"}, {"count": "52"}]


async def test_pages_hold_everything_once(log: RevocationLog) -> None:
    for entry in (CERTIFICATE, UNKNOWN, IDENTITY):
        await log.revoke(entry)
    found: list[Revoked] = []
    more = ""
    while True:
        page, more = await log.page(more, limit=2)
        found += page
        if not more:
            break
    assert found == [CERTIFICATE, UNKNOWN, IDENTITY]
