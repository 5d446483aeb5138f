"""The ledger in a running control plane: what enters, who may read it, and what survives."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio

from parallax.control_plane.ledger import Wanted
from parallax.protos import ledger_pb2, ledger_pb2_grpc
from parallax.sdk import SecureAgent, exits
from parallax.security.config import MTLSConfig

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Leaf, Pki, Serve, Until

LIST = ledger_pb2.ListCertificatesRequest


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


async def listed(
    fleet: Fleet, request: LIST, who: Leaf | str = "client/admin"
) -> ledger_pb2.ListCertificatesResponse:
    """What the ledger shows to *who*."""
    async with fleet.channel(who) as channel:
        stub = ledger_pb2_grpc.LedgerServiceStub(channel)
        answer: ledger_pb2.ListCertificatesResponse = await stub.ListCertificates(request, timeout=10)
        return answer


async def identities(fleet: Fleet, until: Until, *expected: str) -> list[ledger_pb2.LedgerEntry]:
    """The entries, as soon as those of *expected* are there."""
    admin = fleet.pki.issue("client/admin")  # once: each that asks enters, and soon a page holds no other
    async with asyncio.timeout(10):
        while True:
            entries = list((await listed(fleet, LIST(), admin)).certificates)
            if {f"spiffe://parallax.local/{short}" for short in expected} <= {e.identity for e in entries}:
                return entries


# Who may read it.


@pytest.mark.parametrize(
    "who", ["client/cli", "agent/agent-1", "service/agent-proxy", "service/control-plane"]
)
async def test_nobody_but_the_administrator_may_read_it(fleet: Fleet, who: str) -> None:
    with pytest.raises(
        aio.AioRpcError, match=f"{who} may not call .* act as --identity client/admin"
    ) as refused:
        await listed(fleet, LIST(), who)
    assert refused.value.code() is StatusCode.PERMISSION_DENIED


async def test_whom_no_certificate_vouches_for_may_not_either(serve: Serve, pki: Pki) -> None:
    async with serve(tls=pki.tls(verify_client=False)) as fleet:
        with pytest.raises(aio.AioRpcError, match="anonymous caller may not call") as refused:
            await listed(fleet, LIST())
        assert refused.value.code() is StatusCode.PERMISSION_DENIED


# What enters.


async def test_whoever_is_authenticated_enters_once(fleet: Fleet, until: Until) -> None:
    async with fleet.agent(Echo), fleet.client() as client:
        for _ in range(20):
            await client.analyze("agent-1", "echo", 1)
        entries = await identities(fleet, until, "agent/agent-1", "client/cli")
    mine = [entry for entry in entries if entry.identity.endswith(("/agent-1", "/cli"))]
    assert len(mine) == 2
    for entry in mine:
        assert entry.requested_by == ""
        assert entry.seen_at == entry.recorded_at
        assert abs(entry.seen_at.ToDatetime(UTC) - datetime.now(UTC)) < timedelta(minutes=1)


async def test_what_is_refused_does_not_enter(fleet: Fleet, pki: Pki, until: Until) -> None:
    """Its issuer is trusted, but it names nobody."""
    leaf = pki.forge("nobody.example.com", uris=["spiffe://elsewhere.local/agent/agent-1"])
    with pytest.raises(aio.AioRpcError) as refused:
        async with fleet.channel(leaf) as channel:
            await ledger_pb2_grpc.LedgerServiceStub(channel).ListCertificates(LIST(), timeout=10)
    assert refused.value.code() is StatusCode.UNAUTHENTICATED
    assert [e.identity for e in await identities(fleet, until, "client/admin")] == [
        "spiffe://parallax.local/client/admin"
    ]


async def test_with_anonymous_callers_nothing_enters(serve: Serve, pki: Pki) -> None:
    for tls in (pki.tls(verify_client=False), MTLSConfig(enabled=False)):
        async with serve(tls=tls) as fleet:
            from parallax.sdk import ParallaxClient

            async with ParallaxClient(fleet.address, tls) as client:
                assert await client.agents() == []
            assert await fleet.plane.ledger.page(Wanted()) == ([], "")


async def test_a_new_certificate_of_the_same_holder_is_a_second_entry(fleet: Fleet, until: Until) -> None:
    for _ in range(2):
        await listed(fleet, LIST())  # each time with a new leaf
    async with asyncio.timeout(10):
        while len((await listed(fleet, LIST(holder="client/admin"))).certificates) < 3:
            await asyncio.sleep(0.01)


# What is asked for.


async def test_pages_and_conditions(fleet: Fleet, pki: Pki, until: Until) -> None:
    short = pki.issue("client/short", lifetime=timedelta(hours=1))
    for leaf in (short, pki.issue("agent/agent-1"), pki.issue("agent/agent-2")):
        async with fleet.channel(leaf) as channel:
            with pytest.raises(aio.AioRpcError, match="may not call"):
                await ledger_pb2_grpc.LedgerServiceStub(channel).ListCertificates(LIST(), timeout=10)
    await identities(fleet, until, "client/short", "agent/agent-1", "agent/agent-2", "client/admin")
    first = await listed(fleet, LIST(page_size=1))
    assert [entry.identity for entry in first.certificates] == ["spiffe://parallax.local/client/short"]
    rest = await listed(fleet, LIST(page_token=first.next_page_token, holder=""))
    assert "spiffe://parallax.local/client/short" not in {entry.identity for entry in rest.certificates}
    soon = LIST()
    soon.ends_before.FromDatetime(datetime.now(UTC) + timedelta(hours=2))
    assert [e.identity for e in (await listed(fleet, soon)).certificates] == [
        "spiffe://parallax.local/client/short"
    ]
    agents = await listed(fleet, LIST(holder="agent"))
    assert [e.identity[-7:] for e in agents.certificates] == ["agent-1", "agent-2"]
    one = await listed(fleet, LIST(holder="agent/agent-2"))
    assert [e.serial for e in one.certificates] == [agents.certificates[1].serial]


@pytest.mark.parametrize(
    "request_",
    [
        LIST(holder="robot"),
        LIST(holder="agent/"),
        LIST(holder="agent/A"),
        LIST(holder="agent/../x"),
        LIST(page_token="%"),
        LIST(page_token="AAAA"),
        LIST(page_token="8J+YgA=="),
    ],
    ids=str,
)
async def test_what_makes_no_sense_is_refused(fleet: Fleet, request_: LIST) -> None:
    with pytest.raises(aio.AioRpcError) as refused:
        await listed(fleet, request_)
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT


async def test_a_time_out_of_bounds_is_refused(fleet: Fleet) -> None:
    for seconds in (-(10**12), 10**12, 2**63 - 1):
        request = LIST()
        request.ends_before.seconds = seconds
        with pytest.raises(aio.AioRpcError) as refused:
            await listed(fleet, request)
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT


# What survives, in a process of its own.


@pytest.mark.timeout(60)
async def test_what_was_seen_is_there_after_kill_9(children: Children, pki: Pki, until: Until) -> None:
    plane, fleet = await children.fleet(pki)
    await children.agent(fleet)
    before = await identities(fleet, until, "agent/agent-1")
    [agent] = [entry for entry in before if entry.identity.endswith("/agent-1")]
    await plane.stop(signal.SIGKILL)
    _, fleet = await children.fleet(pki, PARALLAX_LISTEN=f"127.0.0.1:{fleet.port}")
    assert agent in (await listed(fleet, LIST())).certificates


async def test_a_second_control_plane_on_the_same_data_is_refused(children: Children, pki: Pki) -> None:
    await children.fleet(pki)
    second = children.start_control_plane(pki.environment)
    assert await second.ended() == exits.CONFIG
    assert "the data directory data is in use by another control plane: end that one" in second.lines[-1]


async def test_a_data_directory_that_cannot_be_used_ends_the_start_with_one_line(
    children: Children, pki: Pki, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    plane = children.start_control_plane(pki.environment | {"PARALLAX_DATA_DIR": str(tmp_path / "file")})
    assert await plane.ended() == exits.CONFIG
    assert plane.lines[-1].startswith(f"parallax: the data directory {tmp_path}/file cannot be used:")
    assert "PARALLAX_DATA_DIR" in plane.lines[-1]


@pytest.mark.timeout(60)
async def test_while_nothing_is_recorded_calls_are_let_in_and_it_shows(
    children: Children, pki: Pki, until: Until, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    plane, fleet = await children.fleet(pki, PARALLAX_DATA_DIR=str(data))
    (data / "parallax.db").rename(data / "aside")
    await children.agent(fleet)
    async with fleet.client() as client:
        result = await client.analyze("agent-1", "echo", 1, timeout=10)
        assert result.agent_id == "agent-1"
    await plane.said("nothing is recorded", fault="missing")
    status, text = await fleet.http("/readyz")
    assert (status, json.loads(text)["detail"]["storage"]) == (200, "missing")
    assert (await fleet.metrics())["parallax_ledger_waiting"] >= 2
    assert len(plane.records("nothing is recorded")) == 1
    # Put back and started again, as the message says, it enters who comes back by himself.
    await plane.stop()
    (data / "aside").rename(data / "parallax.db")
    listen = f"127.0.0.1:{fleet.port}"
    _, fleet = await children.fleet(pki, PARALLAX_DATA_DIR=str(data), PARALLAX_LISTEN=listen)
    await identities(fleet, until, "agent/agent-1")


# The command.


async def run(fleet: Fleet, *arguments: str) -> tuple[int, str, str]:
    """`parallax certs list --ledger …` against *fleet*: exit code, stdout, stderr."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallax.sdk.cli", "certs", "list", *arguments),
        env=os.environ | fleet.pki.environment | {"PARALLAX_CONTROL_PLANE": fleet.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(20):
        out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_the_command_shows_it_to_the_administrator(fleet: Fleet, until: Until) -> None:
    async with fleet.agent(Echo):
        await identities(fleet, until, "agent/agent-1")
        code, out, err = await run(fleet, "--ledger", "--identity", "client/admin", "--holder", "agent")
        assert (code, err) == (exits.OK, "")
        header, row = out.splitlines()
        assert header.split() == ["IDENTITY", "ENDS", "SEEN", "SERIAL", "FOR"]
        assert row.split()[0] == "agent/agent-1"
        assert "less than a minute ago" in row
        assert "not issued here" in row
        code, out, err = await run(fleet, "--ledger", "--json", "--identity", "client/admin")
        assert (code, err) == (exits.OK, "")
        [agent] = [entry for entry in json.loads(out) if entry["identity"].endswith("/agent/agent-1")]
        assert agent["serial"] == row.split()[-4]
        assert agent["requested_by"] is None
        assert agent.keys() == {
            "identity",
            "serial",
            "issuer",
            "fingerprint",
            "key_fingerprint",
            "not_before",
            "not_after",
            "recorded_at",
            "requested_by",
            "seen_at",
            "revoked",
        }


async def test_the_command_shows_nothing_to_anybody_else(fleet: Fleet) -> None:
    code, out, err = await run(fleet, "--ledger")
    assert (code, out) == (exits.NO_PERMISSION, "")
    assert "act as --identity client/admin" in err


async def test_the_command_says_where_nothing_is_found(fleet: Fleet) -> None:
    code, out, err = await run(
        fleet,
        "--ledger",
        "--identity",
        "client/admin",
        "--holder",
        "service",
        "--ends-within",
        "1",
        "--ended",
    )
    assert (code, out) == (exits.OK, "")
    assert err == "the ledger holds no such certificate: it enters what is issued, or seen in use\n"


@pytest.mark.parametrize("option", [["--holder", "agent"], ["--ends-within", "3"], ["--ended"]])
async def test_conditions_need_the_ledger(fleet: Fleet, option: list[str]) -> None:
    code, out, err = await run(fleet, *option)
    assert (code, out) == (exits.CONFIG, "")
    assert err == "parallax: --holder, --ends-within and --ended are for --ledger: give that too\n"
