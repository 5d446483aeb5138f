"""How long a peer takes to let in what we dial, over real handshakes, and that nobody waits for that."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import pytest
from grpc import ChannelConnectivity, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parallax.runtime.authorization import Authorization
from parallax.runtime.channel import channel_options
from parallax.runtime.dialling import LIMIT_S, Dialling
from parallax.runtime.health import HealthService
from parallax.runtime.policy_text import built_in_policy
from parallax.runtime.server import new_server, serving
from parallax.sdk.testing import ThrowawayPKI
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, control_plane
from parallax.security.provider import MTLSCredentialsProvider

AUTHORIZATION = Authorization(built_in_policy(), DEFAULT_TRUST_DOMAIN)


@pytest.fixture(scope="module")
def pki() -> ThrowawayPKI:
    return ThrowawayPKI()


def provider_of(pki: ThrowawayPKI, short: str) -> MTLSCredentialsProvider:
    return MTLSCredentialsProvider(pki.issue(short), identity=pki.identity(short))


def dial(pki: ThrowawayPKI, port: int) -> aio.Channel:
    client = provider_of(pki, "client/cli")
    expected = control_plane(client.identity.trust_domain)
    return client.channel(f"127.0.0.1:{port}", expected, channel_options(1024))


@asynccontextmanager
async def peer(pki: ThrowawayPKI) -> AsyncIterator[int]:
    """A port that answers whether it is well."""
    provider = provider_of(pki, "service/control-plane")
    server = new_server(provider, AUTHORIZATION.authorize, lambda _: None, 1024)
    health = HealthService(())
    health.set(serving=True)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    async with serving(server, provider, "127.0.0.1:0", 0) as port:
        yield port


async def ask(channel: aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(channel)  # its methods are made at run time
    await stub.Check(health_pb2.HealthCheckRequest(), timeout=10)


class Timed:
    """Who notes the connections that are opened, and what was told."""

    def __init__(self) -> None:
        self.took: list[float] = []
        self.dialling = Dialling()
        self.dialling.on_let_in = self.took.append

    async def told(self, count: int) -> None:
        """Wait until so many were: a call may be answered before who watches its channel is told."""
        async with asyncio.timeout(10):
            while len(self.took) < count:
                await asyncio.sleep(0.005)


async def test_a_connection_is_timed_once_beside_the_calls_on_it(pki: ThrowawayPKI) -> None:
    timed = Timed()
    async with peer(pki) as port:
        began = monotonic()
        async with dial(pki, port) as channel, timed.dialling.timing(channel):
            await ask(channel)
            await timed.told(1)
            whole = monotonic() - began
            await ask(channel)
    [took] = timed.took
    assert 0 < took <= whole


async def test_each_connection_is_timed_by_itself(pki: ThrowawayPKI) -> None:
    timed = Timed()
    async with peer(pki) as port:
        for count in (1, 2, 3):
            async with dial(pki, port) as channel, timed.dialling.timing(channel):
                await ask(channel)
                await timed.told(count)
    assert len(timed.took) == 3


async def test_one_that_is_open_already_is_not_taken_for_a_fast_one(pki: ThrowawayPKI) -> None:
    timed = Timed()
    async with peer(pki) as port, dial(pki, port) as channel:
        await ask(channel)
        async with timed.dialling.timing(channel):
            await ask(channel)
    assert not timed.took


async def test_nobody_connects_nor_watches_where_nobody_wants_to_know(pki: ThrowawayPKI) -> None:
    dialling = Dialling()
    async with peer(pki) as port, dial(pki, port) as channel:
        before = asyncio.all_tasks()
        async with dialling.timing(channel):
            await asyncio.sleep(0.05)
            assert asyncio.all_tasks() == before
            assert channel.get_state() is ChannelConnectivity.IDLE


async def test_who_is_refused_is_not_timed(pki: ThrowawayPKI) -> None:
    """In TLS 1.3 a server judges the client after its own part: HTTP/2's greeting says that it let us in."""
    timed = Timed()
    async with peer(ThrowawayPKI()) as port, dial(pki, port) as channel, timed.dialling.timing(channel):
        with pytest.raises(aio.AioRpcError):
            await ask(channel)
    assert not timed.took


async def test_one_that_is_closed_meanwhile_is_over(pki: ThrowawayPKI) -> None:
    timed = Timed()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        channel = dial(pki, silent.getsockname()[1])
        watching = asyncio.ensure_future(timed.dialling.lets_in(channel))
        await asyncio.sleep(0.05)
        await channel.close()
        assert not await asyncio.wait_for(watching, 10)
    assert not await timed.dialling.lets_in(channel)
    assert not timed.took


async def test_who_hears_nothing_leaves_when_they_like(pki: ThrowawayPKI) -> None:
    timed = Timed()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        async with dial(pki, silent.getsockname()[1]) as channel:
            began = monotonic()
            async with timed.dialling.timing(channel):
                await asyncio.sleep(0.05)
            assert monotonic() - began < LIMIT_S / 2
    assert not timed.took
