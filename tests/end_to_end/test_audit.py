"""The audit log of a running control plane: what enters, who may read it, and that it is whole."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode, aio

from parallax.control_plane.audit import AuditLog, Deed, Entry
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.engines.sqlite_file import NAME
from parallax.control_plane.ledger import Wanted
from parallax.control_plane.readings import READ
from parallax.protos import (
    audit_pb2,
    audit_pb2_grpc,
    certificate_pb2,
    certificate_pb2_grpc,
    enrollment_pb2,
    enrollment_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    revocation_pb2,
    revocation_pb2_grpc,
    root_pb2,
    root_pb2_grpc,
)
from parallax.runtime.handshake_log import HandshakeFailure
from parallax.runtime.methods import ADMINISTRATION
from parallax.sdk import exits
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.request import new_request
from tests.end_to_end.rotations import serving

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve

LIST = audit_pb2.ListAuditEntriesRequest
ADMIN = "spiffe://parallax.local/client/admin"
LOOPBACK = {"127.0.0.1", "::1"}
WITHIN_S = 40.0  # for a command, on a machine that is busy


async def asked(
    fleet: Fleet, request: LIST | None = None, who: str = "client/admin"
) -> audit_pb2.ListAuditEntriesResponse:
    """What the control plane answers to *who*."""
    async with fleet.channel(who) as channel:
        stub = audit_pb2_grpc.AuditServiceStub(channel)
        answer: audit_pb2.ListAuditEntriesResponse = await stub.ListAuditEntries(
            request or LIST(), timeout=10
        )
        return answer


async def told(fleet: Fleet, action: str = "") -> list[Entry]:
    """The entries whose action begins so; without one, all but that they are read."""
    answer = await asked(fleet, LIST(action=action))
    found = [Entry.decode(entry.sequence, entry.content) for entry in answer.entries]
    return [entry for entry in found if action or entry.deed.action != READ]


async def refused(fleet: Fleet, who: str = "client/cli", times: int = 1) -> None:
    """*who* asks for what it may not."""
    async with fleet.channel(who) as channel:
        stub = ledger_pb2_grpc.LedgerServiceStub(channel)
        for _ in range(times):
            with pytest.raises(aio.AioRpcError):
                await stub.ListCertificates(ledger_pb2.ListCertificatesRequest(), timeout=10)


async def renew(fleet: Fleet, short: str) -> None:
    identity = Identity.parse_short(short)
    request = new_request(identity, generate_key())
    async with fleet.channel(short) as channel:
        stub = certificate_pb2_grpc.CertificateServiceStub(channel)
        await stub.Renew(certificate_pb2.RenewRequest(csr=request), timeout=10)


# Who may read it.


@pytest.mark.parametrize(
    "who", ["client/cli", "agent/agent-1", "service/agent-proxy", "service/control-plane"]
)
async def test_nobody_but_the_administrator_may_read_it(fleet: Fleet, who: str) -> None:
    with pytest.raises(aio.AioRpcError, match=f"{who} may not call") as raised:
        await asked(fleet, who=who)
    assert raised.value.code() is StatusCode.PERMISSION_DENIED


async def test_whom_no_certificate_vouches_for_may_not_either(serve: Serve, pki: Pki) -> None:
    async with serve(tls=pki.tls(verify_client=False)) as fleet:
        with pytest.raises(aio.AioRpcError, match="anonymous caller may not call") as raised:
            await asked(fleet)
        assert raised.value.code() is StatusCode.PERMISSION_DENIED


# What enters.


async def test_a_renewal_is_there_once_it_is_answered(fleet: Fleet) -> None:
    await renew(fleet, "agent/agent-1")
    [entry] = await told(fleet)
    assert entry.deed.action == "certificate/renewed"
    assert entry.deed.by == entry.deed.subject == "spiffe://parallax.local/agent/agent-1"
    assert abs(entry.at - datetime.now(UTC)) < timedelta(minutes=1)
    found, _ = await fleet.plane.ledger.page(Wanted())
    [issued] = [each for each in found if each.requested_by]
    assert entry.deed.detail["serial"] == issued.serial
    assert entry.deed.detail["fingerprint"] == issued.fingerprint


async def test_a_root_rotation_is_told_with_who_asked_for_it(
    serve: Serve, own_pki: Pki, tmp_path: Path
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet:
        async with fleet.channel("client/admin") as channel:
            stub = root_pb2_grpc.RootServiceStub(channel)
            await stub.RotateRoot(root_pb2.RotateRootRequest(), timeout=10)
            await stub.AbortRootRotation(root_pb2.AbortRootRotationRequest(), timeout=10)
        async with asyncio.timeout(10):
            while len(entries := await told(fleet, "root/")) < 3:
                await asyncio.sleep(0.05)
    us = "spiffe://parallax.local/service/control-plane"
    assert [(entry.deed.action, entry.deed.by) for entry in entries] == [
        ("root/prepared", ADMIN),
        ("root/aborting", ADMIN),
        ("root/idle", us),
    ]
    first, second, own = (entry.deed.source for entry in entries)
    assert (first in LOOPBACK, second in LOOPBACK, own) == (True, True, "")
    assert len({entry.deed.detail["new_issuer"] for entry in entries}) == 1


async def test_an_agent_that_the_administrator_removes_is_told_and_one_that_leaves_is_not(
    fleet: Fleet,
) -> None:
    async with fleet.raw_agent("agent/agent-1", agent_id="agent-1"), fleet.client("client/admin") as admin:
        assert await admin.remove_agent("agent-1")
        assert not await admin.remove_agent("agent-1")
    async with fleet.raw_agent("agent/agent-2", agent_id="agent-2"):
        pass
    async with asyncio.timeout(10):
        while (await fleet.metrics())["parallax_sessions"]:  # until it has left
            await asyncio.sleep(0.05)
    [entry] = await told(fleet)
    agent = "spiffe://parallax.local/agent/agent-1"
    assert entry.deed == Deed("agent/removed", ADMIN, agent, entry.deed.source)
    assert entry.deed.source in LOOPBACK


async def test_whatever_somebody_has_done_is_told_with_where_it_came_from(fleet: Fleet) -> None:
    await renew(fleet, "agent/agent-1")
    async with fleet.channel("client/admin") as channel:
        enrollment = enrollment_pb2_grpc.EnrollmentServiceStub(channel)
        request = enrollment_pb2.CreateTokenRequest(
            grant=enrollment_pb2.TokenGrant(kind="agent", names="agent-7"), ttl=Duration(seconds=60)
        )
        made = await enrollment.CreateToken(request, timeout=10)
        await enrollment.RevokeToken(enrollment_pb2.RevokeTokenRequest(id=made.token.id), timeout=10)
        revocation = revocation_pb2_grpc.RevocationServiceStub(channel)
        await revocation.Revoke(revocation_pb2.RevokeRequest(identity="agent/agent-9"), timeout=10)
        await revocation.Reinstate(revocation_pb2.ReinstateRequest(identity="agent/agent-9"), timeout=10)
    told_of = {entry.deed.action: entry.deed.source for entry in await told(fleet)}
    assert list(told_of) == [
        "certificate/renewed",
        "token/created",
        "token/revoked",
        "identity/revoked",
        "identity/reinstated",
    ]
    assert set(told_of.values()) <= LOOPBACK


async def test_what_nobody_has_asked_for_came_from_nowhere(fleet: Fleet) -> None:
    [renewer] = [each for each in fleet.plane.renewers if each.identity.name == "control-plane"]
    await renewer.renew()
    [entry] = await told(fleet, "certificate/renewed")
    assert (entry.deed.by[24:], entry.deed.source) == ("service/control-plane", "")


async def test_a_thousand_refusals_are_a_handful_of_entries(fleet: Fleet) -> None:
    await asyncio.gather(*(refused(fleet, "client/cli", times=100) for _ in range(9)))
    await refused(fleet, "agent/agent-1", times=100)
    await fleet.plane.refusals.enter()
    entries = await told(fleet)
    assert {(each.deed.action, each.deed.by[24:], each.deed.source) for each in entries} == {
        ("call/refused", "client/cli", entries[0].deed.source),
        ("call/refused", "agent/agent-1", entries[0].deed.source),
    }
    assert entries[0].deed.source in LOOPBACK
    assert [entry.deed.detail["count"] for entry in entries] == ["900", "100"]
    assert {entry.deed.detail["reason"] for entry in entries} == {"not_authorized"}
    assert {entry.deed.subject for entry in entries} == {"/parallax.v1.LedgerService/ListCertificates"}


async def test_whoever_tries_every_method_is_one_entry(fleet: Fleet) -> None:
    methods = sorted(ADMINISTRATION)
    async with fleet.channel("client/cli") as channel:
        for method in methods:
            with pytest.raises(aio.AioRpcError):
                await channel.unary_unary(method, request_serializer=bytes)(b"", timeout=10)
    await fleet.plane.refusals.enter()
    [entry] = await told(fleet)
    assert (entry.deed.by[24:], entry.deed.subject) == ("client/cli", "")
    assert (entry.deed.source in LOOPBACK, entry.deed.detail["count"]) == (True, str(len(methods)))
    assert set(entry.deed.detail["methods"].split()) < {*methods, "..."}


async def test_a_caller_that_names_nobody_is_refused_and_told(fleet: Fleet, pki: Pki) -> None:
    leaf = pki.forge("nobody.example.com", uris=["spiffe://elsewhere.local/agent/agent-1"])
    async with fleet.channel(leaf) as channel:
        with pytest.raises(aio.AioRpcError):
            await ledger_pb2_grpc.LedgerServiceStub(channel).ListCertificates(
                ledger_pb2.ListCertificatesRequest(), timeout=10
            )
    await fleet.plane.refusals.enter()
    [entry] = await told(fleet)
    assert (entry.deed.action, entry.deed.by) == ("call/refused", "unknown")
    assert entry.deed.source


async def test_what_was_refused_enters_when_it_stops(serve: Serve, pki: Pki, tmp_path: Path) -> None:
    async with serve(data_dir=tmp_path / "data") as fleet:
        await refused(fleet)
        fleet.plane.handshake_failed(HandshakeFailure.EXPIRED, 3)
    async with SqliteEngine(tmp_path / "data") as engine:
        page = await AuditReader(engine).page(0)
    deeds = [Entry.decode(*each).deed for each in page.kept]
    assert [(deed.action, deed.detail["count"]) for deed in deeds] == [
        ("call/refused", "1"),
        ("handshake/refused", "3"),
    ]


async def test_no_secret_is_in_any_entry(fleet: Fleet, pki: Pki) -> None:
    await renew(fleet, "agent/agent-1")
    await refused(fleet)
    await fleet.plane.refusals.enter()
    for entry in await told(fleet):
        text = entry.content.decode()
        assert "PRIVATE" not in text
        assert "BEGIN" not in text
        assert len(text) < 1_000


# That it is read.


async def test_who_reads_it_is_in_it_before_he_is_answered_and_not_for_each_page(fleet: Fleet) -> None:
    answer = await asked(fleet)
    [entry] = [Entry.decode(entry.sequence, entry.content) for entry in answer.entries]
    assert (entry.deed.action, entry.deed.by, entry.deed.source in LOOPBACK) == (READ, ADMIN, True)
    for _ in range(20):
        await asked(fleet, LIST(page_size=1))
    with pytest.raises(aio.AioRpcError):
        await asked(fleet, who="client/cli")
    assert [each.deed.by for each in await told(fleet, READ)] == [ADMIN]


# What is asked for.


async def test_what_is_sought_comes_page_by_page(fleet: Fleet) -> None:
    for number in range(25):
        await fleet.plane.audit.commit(Deed(f"test/{number % 2}", ADMIN, "spiffe://parallax.local/agent/a"))
    request, found = LIST(action="test/1", identity="agent/a", page_size=5), list[int]()
    while True:
        answer = await asked(fleet, request)
        assert len(answer.entries) <= 5
        found += [entry.sequence for entry in answer.entries]
        request.after = answer.until
        if answer.until >= answer.head_sequence:
            break
    assert found == list(range(2, 26, 2))
    assert answer.head_sequence == 26, "and that it is read, which is one entry, too"
    assert len((await asked(fleet, LIST(identity=ADMIN))).entries) == 26
    assert not (await asked(fleet, LIST(identity="client/cli"))).entries
    assert not (await asked(fleet, LIST(after=2**63))).entries


async def test_since_finds_what_is_not_older(fleet: Fleet) -> None:
    await fleet.plane.audit.commit(Deed("test/done", ADMIN))
    request = LIST(action="test/")
    request.since.FromDatetime(datetime.now(UTC) - timedelta(hours=1))
    assert len((await asked(fleet, request)).entries) == 1
    request.since.FromDatetime(datetime.now(UTC) + timedelta(hours=1))
    assert not (await asked(fleet, request)).entries


@pytest.mark.parametrize("who", ["agent/", "agent/A", "robot/x", "agent/../x"])
async def test_who_cannot_be_is_refused(fleet: Fleet, who: str) -> None:
    with pytest.raises(aio.AioRpcError) as raised:
        await asked(fleet, LIST(identity=who))
    assert raised.value.code() is StatusCode.INVALID_ARGUMENT


async def test_a_time_out_of_bounds_is_refused(fleet: Fleet) -> None:
    for seconds in (-(10**12), 10**12, 2**63 - 1):
        request = LIST()
        request.since.seconds = seconds
        with pytest.raises(aio.AioRpcError) as raised:
            await asked(fleet, request)
        assert raised.value.code() is StatusCode.INVALID_ARGUMENT


# The command.


async def run(environment: dict[str, str], *arguments: str) -> tuple[int, str, str]:
    """`parallax audit …`: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallax.sdk.cli", "audit", *arguments),
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(WITHIN_S):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def by_the_administrator(fleet: Fleet) -> dict[str, str]:
    return fleet.pki.environment | {
        "PARALLAX_CONTROL_PLANE": fleet.address,
        "PARALLAX_IDENTITY": "client/admin",
    }


@pytest.mark.timeout(120)
async def test_the_command_shows_entries(fleet: Fleet) -> None:
    environment = by_the_administrator(fleet)
    nothing = await run(environment, "list", "--action", "test/")
    assert nothing == (exits.OK, "", "the audit log tells of nothing such\n")
    await renew(fleet, "agent/agent-1")
    await fleet.plane.audit.commit(Deed("test/\x1b[31m", ADMIN, "robot", "::1", {"a": "b"}))
    code, out, err = await run(environment, "list")
    assert (code, err) == (exits.OK, "")
    header, read, renewed, test = out.splitlines()
    assert header.split() == ["NUMBER", "WHEN", "ACTION", "BY", "OF", "FROM", "DETAIL"]
    assert " ".join(read.split()[:8]) == "1 less than a minute ago audit/read client/admin"
    assert renewed.split()[0] == "2"
    assert "certificate/renewed  agent/agent-1  agent/agent-1" in renewed
    assert "test/\\x1b[31m" in test
    assert test.split()[-5:] == ["client/admin", "robot", "::1", "a", "b"]
    code, out, _ = await run(
        environment, "list", "--since", "1h", "--action", "cert", "--who", "agent/agent-1", "--json"
    )
    [entry] = json.loads(out)
    assert (code, entry["sequence"], entry["source"] in LOOPBACK) == (exits.OK, 2, True)
    assert entry["hash"] == (await told(fleet))[0].head.hash


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["list", "--since", "soon"], "not a span of time: 'soon'"),
        (["list", "--who", "robot/x"], "robot"),
        (["verify", "--head", "12"], "--head is not <sequence>:<SHA-256 in hex>"),
        (["verify", "--data-dir", "/nonexistent"], "/nonexistent holds no parallax.db"),
    ],
)
async def test_what_cannot_be_meant_is_refused_in_one_line(
    fleet: Fleet, arguments: list[str], said: str
) -> None:
    code, out, err = await run(by_the_administrator(fleet), *arguments)
    assert (code, out, err.count("\n")) == (exits.CONFIG, "", 1)
    assert said in err


async def test_who_may_not_read_it_is_told_who_may(fleet: Fleet) -> None:
    code, _, err = await run(by_the_administrator(fleet) | {"PARALLAX_IDENTITY": "client/cli"}, "verify")
    assert code == exits.NO_PERMISSION
    assert "--identity client/admin" in err


@pytest.mark.timeout(120)
async def test_what_is_added_is_shown_while_one_watches(fleet: Fleet) -> None:
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "parallax.sdk.cli",
            "audit",
            "list",
            "--watch",
            "--action",
            "test/",
            "--json",
        ),
        env=os.environ | by_the_administrator(fleet),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(WITHIN_S):
        for number in range(3):
            await fleet.plane.audit.commit(Deed("test/done", ADMIN, str(number)))
            assert json.loads(await process.stdout.readline())["subject"] == str(number)
        process.send_signal(signal.SIGINT)
        await process.wait()


@pytest.mark.timeout(120)
async def test_verify_prints_a_head_that_it_takes_again(fleet: Fleet) -> None:
    environment = by_the_administrator(fleet)
    for number in range(3):
        await fleet.plane.audit.commit(Deed("test/done", ADMIN, str(number)))
    code, out, err = await run(environment, "verify")
    assert (code, err) == (exits.OK, "")
    first, second = out.splitlines()
    assert first == "4 entries, all as they were written"
    head = second.removeprefix("head ")
    await fleet.plane.audit.commit(Deed("test/done", ADMIN))
    code, out, _ = await run(environment, "verify", "--head", head, "--json")
    assert (code, json.loads(out)["entries"]) == (exits.OK, 5)
    code, out, err = await run(environment, "verify", "--head", f"3:{'0' * 64}")
    assert (code, out) == (exits.FAILED, "")
    assert err == "parallax: entry 3 is not the one that was noted: the log was rewritten\n"


SPOILT: list[tuple[str, str]] = [
    (
        "UPDATE records SET value = CAST(replace(value, 'x2', 'x9') AS BLOB) WHERE key LIKE 'audit/%2'",
        "entry 2 is not the one that entry 3 follows",
    ),
    (
        "UPDATE records SET value = CAST(value AS TEXT) WHERE key LIKE 'audit/%3'",
        "place of entry 3 is no entry",
    ),
    ("DELETE FROM records WHERE key LIKE 'audit/%2'", "entry 2 is missing"),
    ("DELETE FROM records WHERE key LIKE 'audit/%5'", "the last entry is 4, where the head tells of 5"),
    ("UPDATE records SET value = x'00' WHERE key LIKE 'audit/%4'", "in the place of entry 4 is no entry"),
    ("DELETE FROM records WHERE key LIKE 'audit/%'", "the last entry is 0"),
    (
        "INSERT INTO records SELECT 'audit/x', revision + 1000, value FROM records WHERE key LIKE 'audit/%5'",
        "audit/x lies among the entries of the audit log",
    ),
    (
        "INSERT INTO records SELECT 'audit/²', revision + 1000, value FROM records WHERE key LIKE 'audit/%5'",
        "audit/² lies among the entries of the audit log",
    ),
]


@pytest.mark.timeout(120)
async def test_verify_finds_what_was_changed_in_the_database(
    children: Children, pki: Pki, tmp_path: Path
) -> None:
    """The log of a stopped control plane, spoilt in one way after the other, read in both ways."""
    data = tmp_path / "data"
    async with SqliteEngine(data) as engine:
        log = AuditLog(engine, lambda: datetime.now(UTC))
        for number in range(1, 6):
            await log.commit(Deed("test/done", ADMIN, f"x{number}"))
    good = (data / NAME).read_bytes()
    code, out, _ = await run(pki.environment, "verify", "--data-dir", str(data))
    assert (code, out.splitlines()[0]) == (exits.OK, "5 entries, all as they were written")
    for statement, said in SPOILT:
        (data / NAME).write_bytes(good)
        with closing(sqlite3.connect(data / NAME)) as db:
            db.execute(statement)
            db.commit()
        code, out, err = await run(pki.environment, "verify", "--data-dir", str(data))
        assert (code, out) == (exits.FAILED, ""), statement
        assert said in err
    (data / NAME).write_bytes(good)
    with closing(sqlite3.connect(data / NAME)) as db:
        db.execute(SPOILT[0][0])
        db.commit()
    _, fleet = await children.fleet(pki, PARALLAX_DATA_DIR=str(data))
    code, out, err = await run(by_the_administrator(fleet), "verify")
    assert (code, out) == (exits.FAILED, "")
    assert SPOILT[0][1] in err
    code, _, err = await run(pki.environment, "verify", "--data-dir", str(data))
    assert code == exits.CONFIG
    assert "is in use by another control plane" in err


# What survives, in a process of its own.


@pytest.mark.timeout(60)
async def test_failed_handshakes_and_refusals_are_there_after_a_restart(children: Children, pki: Pki) -> None:
    plane, fleet = await children.fleet(pki)
    past = pki.issue("client/cli", now=pki.now - timedelta(minutes=2), lifetime=timedelta(minutes=1))
    async with fleet.channel(past) as channel:
        with pytest.raises(aio.AioRpcError):
            await ledger_pb2_grpc.LedgerServiceStub(channel).ListCertificates(
                ledger_pb2.ListCertificatesRequest(), timeout=5
            )
    await plane.said("TLS handshake failed", reason="expired")
    await refused(fleet)
    await plane.stop()
    _, fleet = await children.fleet(pki, PARALLAX_LISTEN=f"127.0.0.1:{fleet.port}")
    reasons = {entry.deed.action: entry.deed.detail["reason"] for entry in await told(fleet)}
    assert reasons == {"call/refused": "not_authorized", "handshake/refused": "expired"}
