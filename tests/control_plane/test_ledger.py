"""What the ledger enters, when, and what is found in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.control_plane import ledger as ledger_module
from parallax.control_plane import survey as survey_module
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.engine import ABSENT, MAX_PAGE, Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import KEPT, Ledger, Wanted
from parallax.control_plane.survey import Surveyor
from parallax.security.authority import CertificateAuthority
from parallax.security.errors import Conflict, InvalidRequest, StorageFailed, Unavailable
from parallax.security.identity import Identity
from parallax.security.keys import PrivateKey, generate_key, key_id
from parallax.security.profiles import LeafProfile
from parallax.security.verification import Peer, authenticate
from tests.control_plane.audit_log import verified
from tests.control_plane.clock import NOW, Clock

DAY = timedelta(days=1)
ADMIN = "spiffe://parallax.local/client/admin"


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW - 30 * DAY)


@pytest.fixture
def ledger(engine: SqliteEngine, clock: Clock) -> Ledger:
    return Ledger(engine, AuditLog(engine, clock), clock)


@pytest.fixture
async def running(ledger: Ledger) -> AsyncIterator[Ledger]:
    """The same, with `run` beside it."""
    task = asyncio.create_task(ledger.run())
    yield ledger
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def issue(
    authority: CertificateAuthority, short: str, lifetime: timedelta = DAY, now: datetime = NOW
) -> x509.Certificate:
    identity = Identity.parse_short(short)
    return authority.issue(identity, generate_key().public_key(), LeafProfile(lifetime), now).chain[0]


def peer_of(authority: CertificateAuthority, leaf: x509.Certificate, now: datetime = NOW) -> Peer:
    return authenticate([leaf], authority.bundle, "parallax.local", now)


async def enter(
    ledger: Ledger,
    authority: CertificateAuthority,
    short: str,
    lifetime: timedelta = DAY,
    now: datetime = NOW,
) -> IssuedCertificate:
    leaf = issue(authority, short, lifetime, now)
    return await ledger.record(leaf, Identity.parse_short(short), authority.certificate, ADMIN)


async def entered(ledger: Ledger) -> list[IssuedCertificate]:
    """All entries, once nothing waits any more."""
    async with asyncio.timeout(100):
        while len(ledger):
            await asyncio.sleep(0.005)
    found, _ = await ledger.page(Wanted())
    return found


# What we issue.


async def test_what_is_issued_is_found_with_all_that_there_is_to_know(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    leaf = issue(authority, "agent/agent-1")
    entry = await ledger.record(leaf, Identity.parse_short("agent/agent-1"), authority.certificate, ADMIN)
    assert await entered(ledger) == [entry]
    assert entry.identity == Identity.parse_short("agent/agent-1")
    assert int(entry.serial, 16) == leaf.serial_number
    assert entry.fingerprint == leaf.fingerprint(hashes.SHA256()).hex()
    assert entry.key_fingerprint == key_id(leaf.public_key()).hex()
    assert entry.issuer == key_id(authority.key.public_key()).hex()
    assert (entry.not_before, entry.not_after) == (leaf.not_valid_before_utc, leaf.not_valid_after_utc)
    assert (entry.recorded_at, entry.requested_by, entry.seen_at) == (NOW, ADMIN, None)


async def test_what_is_issued_is_there_after_a_restart(
    authority: CertificateAuthority, clock: Clock, tmp_path: Path
) -> None:
    async with SqliteEngine(tmp_path / "data") as engine:
        entry = await enter(Ledger(engine, AuditLog(engine, clock), clock), authority, "agent/agent-1")
    async with SqliteEngine(tmp_path / "data") as engine:
        assert await entered(Ledger(engine, AuditLog(engine, clock), clock)) == [entry]


async def test_an_entry_is_found_by_its_serial_and_by_its_fingerprint_until_it_is_dropped(
    ledger: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    entry, other = [await enter(ledger, authority, f"agent/agent-{number}") for number in (1, 2)]
    for number in (entry.serial, entry.fingerprint):
        assert await ledger.find(number) == [entry]
        assert await ledger.find(number[:-1]) == []
    clock.now += DAY + KEPT + timedelta(seconds=1)
    assert await ledger.sweep() == 2
    for number in (entry.serial, entry.fingerprint, other.serial):
        assert await ledger.find(number) == []


async def test_an_entry_of_an_older_version_counts_as_issued_when_it_begins(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    entry = await enter(ledger, authority, "agent/agent-1")
    stored = json.loads(entry.encode())
    del stored["issued_at"]
    decoded = IssuedCertificate.decode(entry.key, json.dumps(stored).encode())
    assert decoded.issued_at == decoded.not_before < entry.issued_at


async def test_what_a_newer_version_adds_to_an_entry_is_passed_over(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    entry = await enter(ledger, authority, "agent/agent-1")
    stored = json.loads(entry.encode()) | {"revoked_at": None, "reason": "none"}
    assert IssuedCertificate.decode(entry.key, json.dumps(stored).encode()) == entry


async def test_recording_again_changes_nothing(
    ledger: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    leaf = issue(authority, "agent/agent-1")
    holder = Identity.parse_short("agent/agent-1")
    first = await ledger.record(leaf, holder, authority.certificate, ADMIN)
    clock.now += DAY / 2
    asked = [ledger.record(leaf, holder, authority.certificate, "somebody else") for _ in range(5)]
    assert await asyncio.gather(*asked) == [first] * 5
    assert await entered(ledger) == [first]


async def test_what_cannot_be_recorded_is_said_to_who_would_hand_it_out(
    engine: SqliteEngine, ledger: Ledger, authority: CertificateAuthority
) -> None:
    await stop_recording(engine)
    with pytest.raises(StorageFailed):
        await enter(ledger, authority, "agent/agent-1")
    await record_again(engine)
    assert await entered(ledger) == []


async def test_what_went_into_a_file_that_was_removed_is_not_recorded_at_the_second_attempt_either(
    ledger: Ledger, authority: CertificateAuthority, tmp_path: Path
) -> None:
    """The first one did write it, to a file without a name; there it is, and there it will not stay."""
    leaf = issue(authority, "agent/agent-1")
    (tmp_path / "data" / "parallax.db").unlink()
    for _ in range(3):
        with pytest.raises(StorageFailed):
            await ledger.record(leaf, Identity.parse_short("agent/agent-1"), authority.certificate, ADMIN)


# Keys.


def issue_for(
    authority: CertificateAuthority, short: str, key: PrivateKey, lifetime: timedelta = DAY
) -> x509.Certificate:
    profile = LeafProfile(lifetime)
    return authority.issue(Identity.parse_short(short), key.public_key(), profile, NOW).chain[0]


async def record_for(
    ledger: Ledger,
    authority: CertificateAuthority,
    short: str,
    key: PrivateKey,
    lifetime: timedelta = DAY,
) -> IssuedCertificate:
    leaf = issue_for(authority, short, key, lifetime)
    return await ledger.record(leaf, Identity.parse_short(short), authority.certificate, ADMIN)


async def test_a_key_that_another_identity_has_a_certificate_for_is_refused(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    key = generate_key()
    entry = await record_for(ledger, authority, "agent/agent-1", key)
    assert await ledger.user_of(key.public_key()) == entry.identity
    for other in ("agent/agent-2", "client/agent-1"):
        with pytest.raises(InvalidRequest, match="another identity has a certificate for; make a new key"):
            await record_for(ledger, authority, other, key)
    assert await entered(ledger) == [entry]
    assert await ledger.user_of(generate_key().public_key()) is None


async def test_the_same_identity_may_have_several_certificates_for_a_key(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    """Renewal asks for a new key by itself; a certificate made by hand need not have one."""
    key = generate_key()
    for _ in range(3):
        await record_for(ledger, authority, "agent/agent-1", key)
    assert len(await entered(ledger)) == 3


async def test_of_many_who_ask_for_one_key_at_once_one_gets_it(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    key = generate_key()
    asked = [record_for(ledger, authority, f"agent/agent-{number}", key) for number in range(20)]
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    [entry] = [outcome for outcome in outcomes if isinstance(outcome, IssuedCertificate)]
    assert sum(isinstance(outcome, InvalidRequest) for outcome in outcomes) == 19
    assert await entered(ledger) == [entry]


async def test_a_key_that_was_seen_in_use_is_refused_too(
    running: Ledger, authority: CertificateAuthority
) -> None:
    key = generate_key()
    leaf = issue_for(authority, "agent/agent-1", key)
    running.note(peer_of(authority, leaf), leaf)
    await entered(running)
    with pytest.raises(InvalidRequest, match="make a new key"):
        await record_for(running, authority, "agent/agent-2", key)


async def test_one_seen_with_the_key_of_another_enters_and_is_reported(
    running: Ledger, authority: CertificateAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody made it by hand; it was let in, and keeping it out of the ledger would help nobody."""
    key = generate_key()
    await record_for(running, authority, "agent/agent-1", key)
    leaf = issue_for(authority, "agent/agent-2", key)
    running.note(peer_of(authority, leaf), leaf)
    assert len(await entered(running)) == 2
    assert await running.user_of(key.public_key()) == Identity.parse_short("agent/agent-1")
    [record] = [each for each in caplog.records if "key of another identity" in each.message]
    assert record.__dict__["identity"] == "spiffe://parallax.local/agent/agent-2"


async def test_a_key_is_free_once_the_last_certificate_for_it_is_dropped(
    engine: SqliteEngine, ledger: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    key = generate_key()
    for lifetime in (DAY, 3 * DAY, 2 * DAY):
        await record_for(ledger, authority, "agent/agent-1", key, lifetime)
    clock.now = NOW + KEPT + 2.5 * DAY
    assert await ledger.sweep() == 2
    assert await ledger.user_of(key.public_key()) == Identity.parse_short("agent/agent-1")
    clock.now += DAY
    assert await ledger.sweep() == 1
    assert await ledger.user_of(key.public_key()) is None
    assert all(record.key.startswith("audit") for record in await engine.scan(""))
    await record_for(ledger, authority, "agent/agent-2", key)


# What is looked up.


async def test_a_certificate_is_found_by_its_serial_and_by_its_fingerprint(
    running: Ledger, authority: CertificateAuthority
) -> None:
    entry = await enter(running, authority, "agent/agent-1")
    seen = issue(authority, "agent/agent-2")
    running.note(peer_of(authority, seen), seen)
    other = (await entered(running))[-1]
    for each in {entry, other}:
        assert await running.find(each.serial) == await running.find(each.fingerprint) == [each]
    assert await running.find("0" * 64) == await running.find(entry.serial[:-1]) == []


# What is seen.


async def test_a_leaf_that_we_did_not_issue_enters_when_it_is_first_seen(
    running: Ledger, authority: CertificateAuthority
) -> None:
    leaf = issue(authority, "agent/agent-1")
    assert running.note(peer_of(authority, leaf), leaf)
    [entry] = await entered(running)
    assert (entry.identity.short, entry.requested_by) == ("agent/agent-1", None)
    assert (entry.recorded_at, entry.seen_at) == (NOW, NOW)
    assert entry.issuer == key_id(authority.key.public_key()).hex()


async def test_a_leaf_that_we_issued_is_marked_when_it_is_first_seen(
    running: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    leaf = issue(authority, "agent/agent-1")
    await running.record(leaf, Identity.parse_short("agent/agent-1"), authority.certificate, ADMIN)
    clock.now = first = NOW + timedelta(hours=1)
    running.note(peer_of(authority, leaf), leaf)
    [entry] = await entered(running)
    assert (entry.recorded_at, entry.requested_by, entry.seen_at) == (NOW, ADMIN, first)


async def test_a_leaf_seen_again_is_not_written_again(
    engine: SqliteEngine, running: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    leaf = issue(authority, "agent/agent-1")
    running.note(peer_of(authority, leaf), leaf)
    [before] = await entered(running)
    revision = await engine.revision()
    clock.now += timedelta(hours=1)
    for _ in range(10):
        running.note(peer_of(authority, leaf), leaf)
    assert len(running) == 0
    # Nor by a process that has only just begun and knows of nothing.
    other = Ledger(engine, AuditLog(engine, clock), clock)
    other.note(peer_of(authority, leaf), leaf)
    task = asyncio.create_task(other.run())
    assert await entered(other) == [before]
    task.cancel()
    assert await engine.revision() == revision


async def test_a_signature_written_in_another_way_is_no_other_certificate(
    running: Ledger, authority: CertificateAuthority
) -> None:
    """Of an ECDSA signature (r, s) anybody can make (r, n - s), which is as good; so the holder has two."""
    leaf = issue(authority, "agent/agent-1")
    r, s = decode_dss_signature(leaf.signature)
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    der = leaf.public_bytes(Encoding.DER)
    twin_signature = encode_dss_signature(r, order - s)
    content = leaf.tbs_certificate_bytes + _algorithm(der, leaf) + _bit_string(twin_signature)
    twin = x509.load_der_x509_certificate(b"\x30\x82" + len(content).to_bytes(2) + content)
    assert twin.fingerprint(hashes.SHA256()) != leaf.fingerprint(hashes.SHA256())
    for each in (leaf, twin):
        running.note(peer_of(authority, each), each)
    assert len(await entered(running)) == 1


def _algorithm(der: bytes, leaf: x509.Certificate) -> bytes:
    """The signature's algorithm, which lies between what is signed and the signature."""
    start = der.index(leaf.tbs_certificate_bytes) + len(leaf.tbs_certificate_bytes)
    return der[start : start + 2 + der[start + 1]]


def _bit_string(content: bytes) -> bytes:
    return bytes([0x03, len(content) + 1, 0]) + content


@pytest.mark.timeout(120)
async def test_many_seen_at_once_all_enter(running: Ledger, authority: CertificateAuthority) -> None:
    leaves = [issue(authority, f"agent/agent-{number}") for number in range(250)]
    for leaf in leaves:
        running.note(peer_of(authority, leaf), leaf)
    assert len(await entered(running)) == 250


async def test_while_nothing_is_recorded_nobody_waits_and_nothing_is_lost(
    engine: SqliteEngine, running: Ledger, authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.02)
    await stop_recording(engine)
    leaves = [issue(authority, f"agent/agent-{number}") for number in range(5)]
    for leaf in leaves:
        assert running.note(peer_of(authority, leaf), leaf)
    await failed(engine, times=3)
    assert len(running) == 5
    await record_again(engine)
    assert len(await entered(running)) == 5


async def test_what_is_seen_while_the_file_is_gone_goes_on_waiting(
    engine: SqliteEngine,
    running: Ledger,
    authority: CertificateAuthority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "RETRY_S", 0.01)
    leaf = issue(authority, "agent/agent-1")
    (tmp_path / "data" / "parallax.db").unlink()
    running.note(peer_of(authority, leaf), leaf)
    await failed(engine, times=3)
    assert len(running) == 1


async def test_with_too_many_waiting_it_asks_to_be_told_again(
    engine: SqliteEngine, authority: CertificateAuthority, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "MAX_NOTED", 3)
    deferred: list[None] = []
    ledger = Ledger(engine, AuditLog(engine, clock), clock, lambda: deferred.append(None))
    leaves = [issue(authority, f"agent/agent-{number}") for number in range(5)]
    taken = [ledger.note(peer_of(authority, leaf), leaf) for leaf in leaves]
    assert taken == [True, True, True, False, False]
    assert (len(ledger), len(deferred)) == (3, 2)
    task = asyncio.create_task(ledger.run())
    await entered(ledger)
    assert all(ledger.note(peer_of(authority, leaf), leaf) for leaf in leaves)
    assert len(await entered(ledger)) == 5
    task.cancel()


# What is found.


async def holders(ledger: Ledger, wanted: Wanted, limit: int) -> list[str]:
    """Whose certificates are found, page by page."""
    found: list[str] = []
    after = ""
    while True:
        page, after = await ledger.page(wanted, after, limit)
        assert len(page) <= limit
        found += [entry.identity.name for entry in page]
        if not after:
            return found


@pytest.mark.parametrize("limit", [1, 2, 3, 1_000])
async def test_pages_hold_everything_once_in_order(
    ledger: Ledger, authority: CertificateAuthority, limit: int
) -> None:
    for short, days in [("agent/b", 3), ("agent/a", 2), ("client/c", 1), ("agent/b", 4), ("agent/a.b", 5)]:
        await enter(ledger, authority, short, days * DAY)
    assert await holders(ledger, Wanted(), limit) == ["c", "a", "b", "b", "a.b"]
    assert await holders(ledger, Wanted(holders="parallax.local/agent"), limit) == ["a.b", "a", "b", "b"]
    assert await holders(ledger, Wanted(holders="parallax.local/agent/b"), limit) == ["b", "b"]
    assert await holders(ledger, Wanted(holders="parallax.local/agent/a"), limit) == ["a"]
    assert await holders(ledger, Wanted(holders="parallax.local/service"), limit) == []
    ancient = Wanted("parallax.local/agent", ends_before=datetime(999, 1, 1, tzinfo=UTC))
    assert await holders(ledger, ancient, limit) == []
    soon = Wanted(ends_before=NOW + 2.5 * DAY)
    assert await holders(ledger, soon, limit) == ["c", "a"]
    late = Wanted("parallax.local/agent", ends_before=NOW + 3.5 * DAY, ends_after=NOW + 2.5 * DAY)
    assert await holders(ledger, late, limit) == ["b"]


@pytest.mark.parametrize("limit", [1, 1_000])
async def test_one_that_ends_now_has_not_ended_and_one_a_second_ago_has(
    ledger: Ledger, authority: CertificateAuthority, limit: int
) -> None:
    """RFC 5280 §4.1.2.5: the validity includes both its ends."""
    await enter(ledger, authority, "agent/ending", DAY, NOW - DAY)
    await enter(ledger, authority, "agent/ended", DAY, NOW - DAY - timedelta(seconds=1))
    for holder in ("", "parallax.local/agent"):
        assert await holders(ledger, Wanted(holder, ends_after=NOW), limit) == ["ending"]
        assert await holders(ledger, Wanted(holder, ends_before=NOW), limit) == ["ended"]
        assert len(await holders(ledger, Wanted(holder), limit)) == 2


async def test_of_one_holder_with_very_many_all_are_found(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    """More than are looked at for one page, and only the last of them is meant."""
    lives = [timedelta(minutes=number + 1) for number in range(1_100)]
    leaves = [issue(authority, "agent/a", life) for life in lives]
    holder = Identity.parse_short("agent/a")
    await asyncio.gather(*(ledger.record(leaf, holder, authority.certificate, ADMIN) for leaf in leaves))
    assert len(await holders(ledger, Wanted(), 5_000)) == 1_100
    wanted = Wanted("parallax.local/agent/a", ends_after=NOW + lives[-1])
    assert await holders(ledger, wanted, 10) == ["a"]
    assert len(await holders(ledger, Wanted("parallax.local/agent"), 300)) == 1_100


@pytest.mark.timeout(120)
async def test_a_page_is_full_though_most_of_what_each_holder_had_has_ended(
    ledger: Ledger, authority: CertificateAuthority
) -> None:
    """Or ends too late: of both there is more than may be looked at for a page."""
    lives = [*(timedelta(minutes=number + 1) for number in range(100)), 2 * DAY, 3 * DAY]
    names = [f"agent/{letter}" for letter in "abcdefghijkl"]
    for name in names:
        leaves = [issue(authority, name, life) for life in lives]
        holder = Identity.parse_short(name)
        await asyncio.gather(*(ledger.record(leaf, holder, authority.certificate, ADMIN) for leaf in leaves))
    late, _ = await ledger.page(Wanted("parallax.local/agent", ends_after=NOW + DAY), "", 24)
    assert [entry.identity.short for entry in late] == sorted(2 * names)
    soon = Wanted("parallax.local/agent", ends_before=NOW + timedelta(minutes=1, seconds=30))
    early, _ = await ledger.page(soon, "", 12)
    assert [entry.identity.short for entry in early] == names


# What is dropped.


async def test_what_ended_long_ago_is_dropped_and_nothing_else(
    engine: SqliteEngine, ledger: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    for number in range(120):
        await enter(ledger, authority, f"agent/old-{number}", timedelta(minutes=number + 1))
    kept = await enter(ledger, authority, "agent/young", 2 * DAY)
    clock.now = NOW + KEPT + DAY
    assert await ledger.sweep() == 120
    assert await entered(ledger) == [kept]
    assert [record.key for record in await engine.scan("holders/")] == [kept.holder_key]
    deeds = [entry.deed for entry in await verified(engine)]
    told = [int(deed.detail["count"]) for deed in deeds if deed.action == "certificate/dropped"]
    assert sum(told) == 120
    assert await ledger.sweep() == 0


# An engine that does not record: SQLite's own refusal to write.


async def test_a_survey_knows_what_was_entered_before_it_looked_and_since(
    running: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    await enter(running, authority, "agent/agent-1")
    surveyor = Surveyor(running, clock)
    await surveyor.count()
    assert names((await surveyor.current()).cannot_renew()) == []
    leaf = issue(authority, "agent/agent-2")
    running.note(peer_of(authority, leaf), leaf)
    await entered(running)
    found = await surveyor.current()
    assert names(found.holdings) == ["agent-1", "agent-2"]
    assert names(found.holders) == names(found.cannot_renew()) == ["agent-2"]
    await enter(running, authority, "agent/agent-3")
    assert names(found.holdings) == ["agent-1", "agent-2"]
    assert names((await surveyor.current()).holdings) == ["agent-1", "agent-2", "agent-3"]


async def test_nobody_goes_by_a_ledger_that_was_counted_by_half(
    engine: SqliteEngine,
    ledger: Ledger,
    authority: CertificateAuthority,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [f"agent/agent-{number}" for number in range(survey_module.PIECE + 1)]
    await asyncio.gather(*(enter(ledger, authority, name) for name in names))
    started = Ledger(engine, AuditLog(engine, clock), clock)
    surveyor = Surveyor(started, clock)
    asked = asyncio.create_task(surveyor.current())
    await enter(started, authority, "agent/young")  # told, and not all that there is
    with pytest.raises(Unavailable, match="still being counted") as refused:
        await asked
    assert refused.value.retry_after > timedelta(0)
    assert surveyor.last is None
    monkeypatch.setattr(survey_module, "PATIENCE_S", 20.0)  # however long a disk takes
    waiting = asyncio.create_task(surveyor.current())
    await asyncio.sleep(0)
    await surveyor.count()
    assert len((await waiting).holdings) == survey_module.PIECE + 2


class Interrupted(Ledger):
    """Lets something else happen after each page that was read."""

    meanwhile: Iterator[Awaitable[object]] = iter(())

    async def page(
        self, wanted: Wanted, after: str = "", limit: int = MAX_PAGE
    ) -> tuple[list[IssuedCertificate], str]:
        found = await super().page(wanted, after, limit)
        for happening in islice(self.meanwhile, 1):
            await happening
        return found


async def test_what_is_entered_while_a_ledger_is_counted_counts_once(
    engine: SqliteEngine, ledger: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    lives = {f"agent/agent-{n}": DAY + timedelta(seconds=n) for n in range(3 * survey_module.PIECE)}
    await asyncio.gather(*(enter(ledger, authority, name, life) for name, life in lives.items()))
    started = Interrupted(engine, AuditLog(engine, clock), clock)
    surveyor = Surveyor(started, clock)
    started.meanwhile = (
        enter(started, authority, f"agent/at-{lifetime.total_seconds():.0f}", lifetime)
        for lifetime in (DAY / 2, DAY, 2 * DAY)  # before, among and behind what is read
    )
    await surveyor.count()
    assert next(started.meanwhile, None) is None
    assert len((await surveyor.current()).holdings) == 3 * survey_module.PIECE + 3


async def test_a_ledger_that_cannot_be_read_is_counted_later(
    engine: SqliteEngine,
    running: Ledger,
    authority: CertificateAuthority,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(survey_module, "RETRY_S", 0.01)
    await enter(running, authority, "agent/agent-1")
    surveyor = Surveyor(running, clock)
    await engine._on_thread(lambda: engine._file._db.execute("ALTER TABLE records RENAME TO gone"))
    task = asyncio.create_task(surveyor.run())
    with pytest.raises(Unavailable):
        await surveyor.current()
    await engine._on_thread(lambda: engine._file._db.execute("ALTER TABLE gone RENAME TO records"))
    monkeypatch.setattr(survey_module, "PATIENCE_S", 20.0)
    assert names((await surveyor.current()).holdings) == ["agent-1"]
    task.cancel()


def names(identities: Iterable[Identity]) -> list[str]:
    return sorted(identity.name for identity in identities)


async def stop_recording(engine: SqliteEngine) -> None:
    await engine._on_thread(lambda: engine._file._db.execute("PRAGMA query_only = ON"))


async def failed(engine: SqliteEngine, times: int) -> None:
    """Return once it was asked so often, and has failed."""
    async with asyncio.timeout(10):
        for _ in range(times):
            engine.fault = None
            while engine.fault is None:
                await asyncio.sleep(0.005)


async def record_again(engine: SqliteEngine) -> None:
    await engine._on_thread(lambda: engine._file._db.execute("PRAGMA query_only = OFF"))


# By key.


async def test_the_certificates_for_a_key_are_found(ledger: Ledger, authority: CertificateAuthority) -> None:
    key, who = generate_key(), Identity.parse_short("agent/agent-1")
    for lifetime in (DAY, 3 * DAY):
        await record_for(ledger, authority, who.short, key, lifetime)
    await record_for(ledger, authority, who.short, generate_key())
    found = await ledger.uses(key_id(key.public_key()).hex())
    assert [entry.not_after for entry in found] == [NOW + DAY, NOW + 3 * DAY]
    assert await ledger.uses(key_id(generate_key().public_key()).hex()) == []


async def test_what_is_held_has_not_ended(
    ledger: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    who = Identity.parse_short("agent/agent-1")
    for lifetime in (DAY, 3 * DAY):
        await ledger.record(issue(authority, who.short, lifetime), who, authority.certificate, ADMIN)
    assert len(await ledger.held(who)) == 2
    clock.now = NOW + 2 * DAY
    assert [entry.not_after for entry in await ledger.held(who)] == [NOW + 3 * DAY]


@pytest.mark.timeout(120)
async def test_behind_very_many_that_have_ended_those_in_use_are_found(
    ledger: Ledger, authority: CertificateAuthority, clock: Clock
) -> None:
    """As of one whose certificates last a few minutes: more than a page, all of them kept for a week."""
    who, key = Identity.parse_short("agent/agent-1"), generate_key()
    ended = [issue(authority, who.short, timedelta(minutes=1)) for _ in range(1_001)]
    await asyncio.gather(*(ledger.record(leaf, who, authority.certificate, ADMIN) for leaf in ended))
    await record_for(ledger, authority, who.short, key, DAY)
    clock.now = NOW + timedelta(hours=1)
    assert [entry.not_after for entry in await ledger.held(who)] == [NOW + DAY]
    assert [entry.not_after for entry in await ledger.uses(key_id(key.public_key()).hex())] == [NOW + DAY]


async def test_a_certificate_enters_with_what_belongs_to_it_or_not_at_all(
    ledger: Ledger, engine: SqliteEngine, authority: CertificateAuthority
) -> None:
    who = Identity.parse_short("agent/agent-1")
    leaf = issue(authority, who.short)

    async def commit(expected: int, writes: Sequence[Write]) -> None:
        await engine.commit(Event("test/entered"), [*writes, Write("beside", b"1", expected)])

    with pytest.raises(Conflict):
        await ledger.record_with(leaf, who, authority.certificate, ADMIN, partial(commit, 7))
    assert await ledger.held(who) == []
    entry = await ledger.record_with(leaf, who, authority.certificate, ADMIN, partial(commit, ABSENT))
    assert await ledger.held(who) == [entry]


async def test_what_is_dropped_leaves_nothing_behind(
    ledger: Ledger, engine: SqliteEngine, authority: CertificateAuthority, clock: Clock
) -> None:
    who = Identity.parse_short("agent/agent-1")
    for _ in range(40):  # more than one batch
        await ledger.record(issue(authority, who.short), who, authority.certificate, ADMIN)
    clock.now = NOW + KEPT + 2 * DAY
    assert await ledger.sweep() == 40
    assert all(record.key.startswith("audit") for record in await engine.scan(""))
