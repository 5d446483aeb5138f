"""What is refused is counted, and enters the audit log as few entries, whoever tries what."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.refusals import Refusals
from parallax.runtime.caller import Anonymous
from parallax.runtime.handshake_log import HandshakeFailure
from parallax.runtime.refusal import Refusal
from parallax.runtime.refusal_counts import MAX_KINDS, MAX_NAMED, MAX_TEXT
from parallax.security.errors import Expired, NotAuthorized, ParallaxError, StorageFailed, VerificationError
from parallax.security.identity import Identity
from parallax.security.verification import Peer
from tests.control_plane.audit_log import Recorder, verified
from tests.control_plane.clock import NOW, Clock

CLI = Peer(Identity.parse_short("client/cli"), 1, b"f" * 32, NOW + timedelta(days=1), b"k" * 32, NOW, ())
OTHER = replace(CLI, identity=Identity.parse_short("client/other"))
METHOD = "/parallax.v1.LedgerService/ListCertificates"


@pytest.fixture
def engine(engine: SqliteEngine) -> Recorder:
    return Recorder(engine)


@pytest.fixture
def refusals(engine: Recorder, clock: Clock) -> Refusals:
    return Refusals(AuditLog(engine, clock), clock)


def refusal(
    source: str = "ipv4:10.0.0.1:5000",
    caller: Peer | Anonymous | None = CLI,
    cause: ParallaxError | None = None,
    method: str = METHOD,
) -> Refusal:
    return Refusal(method, caller, source, cause or NotAuthorized("may not"))


async def entered(engine: Recorder) -> list[Deed]:
    return [entry.deed for entry in await verified(engine)]


async def test_a_thousand_of_the_same_are_one_entry(
    refusals: Refusals, engine: Recorder, clock: Clock
) -> None:
    for port in range(1_000):
        refusals.note(refusal(f"ipv4:10.0.0.1:{port}"))
        clock.now += timedelta(milliseconds=10)
    await refusals.enter()
    [deed] = await entered(engine)
    assert deed == Deed(
        "call/refused",
        "spiffe://parallax.local/client/cli",
        METHOD,
        "10.0.0.1",
        {
            "reason": "not_authorized",
            "count": "1000",
            "first": NOW.isoformat(),
            "last": (NOW + timedelta(seconds=9.99)).isoformat(),
        },
    )


async def test_who_why_and_an_address_that_nobody_vouches_for_are_told_apart(
    refusals: Refusals, engine: Recorder
) -> None:
    refusals.note(refusal())
    refusals.note(refusal(caller=OTHER))
    refusals.note(refusal(caller=None, cause=VerificationError("no certificate")))
    refusals.note(refusal("ipv4:10.0.0.2:5000", caller=None, cause=VerificationError("no certificate")))
    refusals.note(refusal(caller=Anonymous()))
    refusals.note(refusal(cause=Expired("over")))
    refusals.note_handshakes(HandshakeFailure.EXPIRED, 3)
    refusals.note_handshakes(HandshakeFailure.NO_CERTIFICATE, 2)
    refusals.note_handshakes(HandshakeFailure.EXPIRED, 4)
    await refusals.enter()
    found = await entered(engine)
    assert [(d.by, d.detail["reason"], d.source) for d in found if d.action == "call/refused"] == [
        ("spiffe://parallax.local/client/cli", "not_authorized", "10.0.0.1"),
        ("spiffe://parallax.local/client/other", "not_authorized", "10.0.0.1"),
        ("unknown", "verification_error", "10.0.0.1"),
        ("unknown", "verification_error", "10.0.0.2"),
        ("anonymous", "not_authorized", "10.0.0.1"),
        ("spiffe://parallax.local/client/cli", "expired", "10.0.0.1"),
    ]
    assert {
        (deed.detail["reason"], deed.detail["count"]) for deed in found if deed.action == "handshake/refused"
    } == {("expired", "7"), ("no_certificate", "2")}


async def test_one_identity_is_one_entry_whatever_it_calls_and_from_wherever(
    refusals: Refusals, engine: Recorder
) -> None:
    for number in range(1_000):
        refusals.note(refusal(f"ipv4:10.0.{number % 4}.1:1", method=f"/parallax.v1.Service/Method{number}"))
    await refusals.enter()
    [deed] = await entered(engine)
    assert (deed.by, deed.subject, deed.source) == ("spiffe://parallax.local/client/cli", "", "")
    assert deed.detail["count"] == "1000"
    assert deed.detail["sources"] == "10.0.0.1 10.0.1.1 10.0.2.1 10.0.3.1"
    *named, more = deed.detail["methods"].split()
    assert (named[0], len(named), more) == ("/parallax.v1.Service/Method0", MAX_NAMED, "...")


async def test_one_subscriber_of_ipv6_is_one_address(refusals: Refusals, engine: Recorder) -> None:
    for number in range(1_000):
        refusals.note(refusal(f"ipv6:%5B2001:db8::{number:x}%5D:1", caller=None))
    refusals.note(refusal("ipv6:%5B2001:db8:0:1::1%5D:1", caller=None))
    await refusals.enter()
    assert [deed.detail["count"] for deed in await entered(engine)] == ["1000", "1"]


async def test_the_next_minute_has_entries_of_its_own(refusals: Refusals, engine: Recorder) -> None:
    for _ in range(3):
        refusals.note(refusal())
        await refusals.enter()
    await refusals.enter()
    assert len(await entered(engine)) == 3


async def test_whoever_comes_from_everywhere_fills_neither_memory_nor_disk(
    refusals: Refusals, engine: Recorder
) -> None:
    for number in range(20_000):
        address = f"ipv6:%5B2001:db8:{number % 65_536:x}::1%5D:1"
        cause = Expired("over") if number % 2 else NotAuthorized("may not")
        refusals.note(refusal(address, None, cause, method=f"/m/{number}"))
    await refusals.enter()
    found = await entered(engine)
    assert len(found) == MAX_KINDS + 1
    assert sum(int(deed.detail["count"]) for deed in found) == 20_000
    [others] = [deed for deed in found if deed.by == "others"]
    assert (others.detail["reason"], others.source, others.subject) == ("others", "", "")
    assert len(others.detail["sources"].split()) == MAX_NAMED + 1
    assert len(engine.commits) <= 2


async def test_what_a_peer_chooses_is_cut(refusals: Refusals, engine: Recorder) -> None:
    refusals.note(refusal("x" * 100_000, method="/" + "y" * 100_000))
    await refusals.enter()
    [deed] = await entered(engine)
    assert (len(deed.source), len(deed.subject)) == (MAX_TEXT, MAX_TEXT)


async def test_the_largest_entry_that_there_can_be_is_taken(refusals: Refusals, engine: Recorder) -> None:
    for number in range(2 * MAX_NAMED):
        refusals.note(refusal(f"{number:02}" * MAX_TEXT, method=f"{number:02}" * MAX_TEXT))
    await refusals.enter()
    [deed] = await entered(engine)
    assert deed.detail["count"] == str(2 * MAX_NAMED)


async def test_while_nothing_is_recorded_it_is_counted_on_within_bounds(
    refusals: Refusals, engine: Recorder
) -> None:
    engine.fails = StorageFailed("the disk is full")
    for minute in range(20):
        for number in range(50):
            refusals.note(refusal(f"ipv4:10.{minute}.0.{number}:1", caller=None))
        await refusals.enter()
    assert await entered(engine) == []
    engine.fails = None
    await refusals.enter()
    found = await entered(engine)
    assert sum(int(deed.detail["count"]) for deed in found) == 1_000
    assert len(found) == MAX_KINDS + 1


async def test_two_that_enter_at_once_enter_nothing_twice(refusals: Refusals, engine: Recorder) -> None:
    for number in range(10):
        refusals.note(refusal(f"ipv4:10.0.0.{number}:1", caller=None))
    await asyncio.gather(refusals.enter(), refusals.enter())
    assert len(await entered(engine)) == 10
