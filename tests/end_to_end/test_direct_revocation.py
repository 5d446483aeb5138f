"""Agents that listen let in nobody who is revoked, nor anybody once they cannot know."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio

from parallax.protos import agent_pb2, agent_pb2_grpc, link_pb2
from parallax.runtime.connection import Connection
from parallax.runtime.fresh_revocations import FreshRevocations
from parallax.sdk import SecureAgent
from parallax.security.errors import Revoked, Unavailable
from parallax.security.identity import Identity, control_plane
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.verification import CertificateId
from tests.end_to_end.test_revocation import end_of, is_revoked, reinstate, revoke, revoke_leaf

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Listen, Pki, Serve, Until

WITHIN_S = 15.0
MAX_AGE_S = 6.0  # a machine may stand still for some seconds of it
CLI = Identity.parse_short("client/cli")


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


def listening(fleet: Fleet) -> Echo:
    """An agent without a session, which the control plane knows and tells."""
    return fleet.agent(Echo, listen="127.0.0.1:0", session=False)


@asynccontextmanager
async def dialled(agent: SecureAgent, leaf: Leaf) -> AsyncIterator[aio.Channel]:
    options = [("grpc.ssl_target_name_override", "agent-1.agents.parallax.local")]
    credentials = leaf.channel_credentials()
    async with aio.secure_channel(str(agent.endpoint), credentials, options=options) as channel:
        yield channel


async def capabilities(channel: aio.Channel) -> list[str]:
    """A call that everybody may make whom the agent lets in."""
    stub = agent_pb2_grpc.AgentServiceStub(channel)
    answer = await stub.GetCapabilities(agent_pb2.GetCapabilitiesRequest(), timeout=WITHIN_S)
    return list(answer.description.capabilities)


async def is_let_in(channel: aio.Channel) -> bool:
    try:
        await capabilities(channel)
    except aio.AioRpcError as exc:
        if exc.code() is not StatusCode.UNAVAILABLE:
            raise
        return False
    return True


async def linked(channel: aio.Channel) -> Any:
    """An open link."""
    link = agent_pb2_grpc.AgentServiceStub(channel).Link()
    await link.write(link_pb2.LinkFrame(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1)))
    welcome: Any = await link.read()
    assert welcome.HasField("welcome")
    return link


@pytest.mark.parametrize("by", ["serial", "name"])
async def test_whoever_is_revoked_is_refused_at_an_agents_own_port_and_what_he_has_open_ends(
    fleet: Fleet, pki: Pki, by: str
) -> None:
    stolen, other = pki.issue("client/cli"), pki.issue("client/cli" if by == "serial" else "client/ci")
    async with (
        listening(fleet) as agent,
        dialled(agent, stolen) as channel,
        dialled(agent, other) as kept,
    ):
        link = await linked(channel)
        assert await capabilities(channel) == ["echo"]
        if by == "serial":
            await revoke_leaf(fleet, stolen)
        else:
            await revoke(fleet, identity="client/cli")
        assert is_revoked(await end_of(link))
        with pytest.raises(aio.AioRpcError) as refused:
            await capabilities(channel)
        assert is_revoked(refused.value)
        assert await capabilities(kept) == ["echo"]


async def test_an_agent_that_starts_later_knows_what_was_revoked_before(fleet: Fleet, pki: Pki) -> None:
    stolen = pki.issue("client/cli")
    await revoke_leaf(fleet, stolen)
    await revoke(fleet, identity="client/ci")
    await reinstate(fleet, "client/ci")
    async with listening(fleet) as agent:
        for leaf in (stolen, pki.issue("client/ci")):
            async with dialled(agent, leaf) as channel:
                with pytest.raises(aio.AioRpcError) as refused:
                    await capabilities(channel)
                assert is_revoked(refused.value)
        async with dialled(agent, pki.issue("client/ci", now=datetime.now(UTC))) as channel:
            assert await capabilities(channel) == ["echo"]


@pytest.mark.timeout(60)
async def test_an_agent_that_has_not_heard_lately_lets_nobody_in_until_it_does(
    serve: Serve, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_REVOCATION_MAX_AGE", str(MAX_AGE_S))
    data = tmp_path / "data"
    async with serve(data_dir=data) as fleet:
        agent = listening(fleet)
        await agent.__aenter__()
        address = f"127.0.0.1:{fleet.port}"
    async with dialled(agent, pki.issue("client/cli")) as channel:
        link = await linked(channel)
        assert await capabilities(channel) == ["echo"]  # it is allowed to be that old
        ended = await end_of(link)
        assert (ended.code(), "has not heard" in str(ended.details())) == (StatusCode.UNAVAILABLE, True)
        with pytest.raises(aio.AioRpcError, match="has not heard since") as refused:
            await capabilities(channel)
        assert refused.value.code() is StatusCode.UNAVAILABLE
        async with serve(data_dir=data, listen=address), asyncio.timeout(40):
            while not await is_let_in(channel):
                await asyncio.sleep(0.2)
            await agent.__aexit__(None, None, None)


async def test_an_agent_that_hears_goes_on_letting_in(
    serve: Serve, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PARALLAX_REVOCATION_MAX_AGE", str(MAX_AGE_S))
    async with (
        serve() as fleet,
        listening(fleet) as agent,
        dialled(agent, pki.issue("client/cli")) as channel,
    ):
        link = await linked(channel)
        await asyncio.sleep(MAX_AGE_S + 1)
        assert await capabilities(channel) == ["echo"]
        assert not link.done()
        link.cancel()


async def test_an_agent_without_a_control_plane_says_once_that_nobody_tells_it(
    listen: Listen, pki: Pki, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with listen(Echo) as agent, dialled(agent, pki.issue("client/cli")) as channel:
        assert await capabilities(channel) == ["echo"]
    said = [record for record in caplog.records if "whoever is revoked is let in" in record.getMessage()]
    assert len(said) == 1


@asynccontextmanager
async def follower(
    fleet: Fleet, max_age: timedelta = timedelta(minutes=5)
) -> AsyncIterator[FreshRevocations]:
    """What follows on its own, of client/cli."""
    provider = MTLSCredentialsProvider(fleet.pki.tls(), identity=CLI)
    assert provider.store is not None
    made = FreshRevocations(timedelta(minutes=5))
    connection = Connection(
        lambda: provider.channel(fleet.address, control_plane()), provider.store, "the control plane"
    )
    async with connection.following(), made.following(connection):
        yield made


async def test_who_knows_nothing_yet_lets_nobody_in() -> None:
    with pytest.raises(Unavailable, match="has not heard from its control plane"):
        FreshRevocations(timedelta(minutes=5)).freshness.check()


async def test_tens_of_thousands_arrive_and_what_changes_follows(fleet: Fleet, until: Until) -> None:
    many = [CertificateId(bytes(32), serial) for serial in range(1, 30_001)]
    for each in many:
        fleet.plane.revocations.current.revoke(each)
    agent = Identity.parse_short("agent/agent-7")
    async with follower(fleet) as told:
        await told.freshness.known()
        told.freshness.check()
        told.check_identity(agent)
        assert len(told) == len(many)
        await revoke(fleet, identity=agent.short)

        def knows() -> bool:
            try:
                told.check_identity(agent)
            except Revoked:
                return True
            return False

        await until(knows)
        assert len(told) == len(many) + 1
