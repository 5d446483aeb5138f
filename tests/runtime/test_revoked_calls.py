"""A gate that knows what is revoked: open calls, and connections that resume a TLS session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from grpc import StatusCode, aio
from grpc.experimental.session_cache import ssl_session_cache_lru

from parallax.runtime import server as server_module
from parallax.runtime.caller import name_of
from parallax.runtime.gate import drain_after_expiry
from parallax.runtime.refusal import Refusal
from parallax.runtime.server import GatedServer, new_server, serving
from parallax.sdk.testing import ThrowawayPKI
from parallax.security.bundle import certificates_to_pem
from parallax.security.identity import Identity
from parallax.security.keys import generate_key, key_to_pem
from parallax.security.profiles import LEAF_LIFETIME, LeafProfile
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.revocation import WITHDRAWN, Revocations

SERVICE = "test.Service"
SERVER = Identity.parse_short("service/control-plane")
AGENT_1, AGENT_2 = (Identity.parse_short(f"agent/agent-{number}") for number in (1, 2))
WITHIN_S = 15.0


class Clock:
    """The real time, and how far a gate's has been set."""

    ahead = timedelta(0)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.ahead


class Site:
    """A server behind a gate, and what it saw."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.pki = ThrowawayPKI()
        self.provider = MTLSCredentialsProvider(self.pki.issue(SERVER.short), identity=SERVER)
        self.revocations = Revocations()
        self.resumed: list[bool] = []
        self.refusals: list[Refusal] = []
        self.listening, self.expired = asyncio.Event(), asyncio.Event()
        self.port = 0
        self.server: GatedServer = new_server(
            self.provider,
            lambda _caller, _method: None,
            self.refusals.append,
            1 << 20,
            check_revoked=self.revocations.check,
        )
        handlers: dict[str, Any] = {
            "Tell": grpc.unary_unary_rpc_method_handler(self._tell),
            "Stay": grpc.unary_stream_rpc_method_handler(self._stay),
            "Listen": grpc.stream_stream_rpc_method_handler(self._listen),
            "Drain": grpc.unary_stream_rpc_method_handler(self._drain),
        }
        self.server.add_registered_method_handlers(SERVICE, handlers)

    def withdraw(self, identity: Identity) -> None:
        self.revocations.cut(identity, WITHDRAWN)
        self.server.end_revoked()

    def credentials(self, identity: Identity) -> grpc.ChannelCredentials:
        """Those of a new leaf."""
        key = generate_key()
        issued = self.pki.authority.issue(identity, key.public_key(), LeafProfile(), datetime.now(UTC))
        return grpc.ssl_channel_credentials(
            issued.bundle.pem, key_to_pem(key), certificates_to_pem(issued.chain)
        )

    @asynccontextmanager
    async def dial(
        self, credentials: grpc.ChannelCredentials, cache: Any = None
    ) -> AsyncIterator[aio.Channel]:
        """A connection of its own."""
        options: list[tuple[str, Any]] = [
            ("grpc.ssl_target_name_override", SERVER.dns_name),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        if cache is not None:
            options.append(("grpc.ssl_session_cache", cache))
        async with aio.secure_channel(f"127.0.0.1:{self.port}", credentials, options) as channel:
            yield channel

    async def _tell(self, _: bytes, context: Any) -> bytes:
        self.resumed.append(context.auth_context().get("ssl_session_reused") == [b"true"])
        return b"told"

    async def _stay(self, _: bytes, context: Any) -> None:
        await context.write(b"here")
        await asyncio.Event().wait()

    async def _listen(self, _: Any, context: Any) -> None:
        self.listening.set()
        await context.read()

    async def _drain(self, _: bytes, context: Any) -> None:
        drain_after_expiry(timedelta(minutes=1), lambda _: self.expired.set())
        await self._stay(b"", context)


@pytest.fixture
async def site(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    clock = Clock()
    monkeypatch.setattr(server_module, "utc_now", clock)
    made = Site(clock)
    async with serving(made.server, made.provider, "127.0.0.1:0", 1.0) as port:
        made.port = port
        yield made


def tell(channel: Any) -> Any:
    return channel.unary_unary(f"/{SERVICE}/Tell")(b"", timeout=WITHIN_S)


async def staying(channel: Any, method: str = "Stay") -> Any:
    """A stream that has begun."""
    call = channel.unary_stream(f"/{SERVICE}/{method}")(b"")
    assert await call.read() == b"here"
    return call


async def test_a_connection_that_resumes_a_tls_session_is_refused_like_a_new_one(site: Site) -> None:
    credentials, cache = site.credentials(AGENT_1), ssl_session_cache_lru(4)  # type: ignore[no-untyped-call]
    for _ in range(2):
        async with site.dial(credentials, cache) as channel:
            await tell(channel)
            await asyncio.sleep(0.1)  # tickets come after the handshake (RFC 8446 §4.6.1)
    assert site.resumed == [False, True]
    site.withdraw(AGENT_1)
    async with site.dial(credentials, cache) as channel:
        with pytest.raises(aio.AioRpcError, match="is revoked") as refused:
            await tell(channel)
    assert refused.value.code() is StatusCode.UNAUTHENTICATED
    assert [(name_of(each.caller), each.reason) for each in site.refusals] == [
        ("spiffe://parallax.local/agent/agent-1", "revoked")
    ]


async def test_of_many_streams_those_of_the_revoked_end_and_are_told_once_each(site: Site) -> None:
    async with site.dial(site.credentials(AGENT_1)) as first, site.dial(site.credentials(AGENT_2)) as second:
        ended = [await staying(first) for _ in range(20)]
        kept = [await staying(second) for _ in range(20)]
        for _ in range(3):
            site.withdraw(AGENT_1)
        async with asyncio.timeout(WITHIN_S):
            for call in ended:
                with pytest.raises(aio.AioRpcError, match="is revoked"):
                    await call.read()
        assert len(site.refusals) == len(ended)
        assert {refusal.method for refusal in site.refusals} == {f"/{SERVICE}/Stay"}
        await tell(second)
        assert not any(call.done() for call in kept)
        for call in kept:
            call.cancel()


async def test_a_stream_that_has_said_nothing_yet_ends_when_its_caller_is_revoked(site: Site) -> None:
    async with site.dial(site.credentials(AGENT_1)) as channel:
        call: Any = channel.stream_stream(f"/{SERVICE}/Listen")()
        await asyncio.wait_for(site.listening.wait(), WITHIN_S)
        site.withdraw(AGENT_1)
        with pytest.raises(aio.AioRpcError, match="is revoked"):
            await asyncio.wait_for(call.read(), WITHIN_S)


async def test_a_stream_that_outlives_its_certificate_ends_when_its_caller_is_revoked(site: Site) -> None:
    """The time to finish is for whoever did no harm."""
    async with site.dial(site.credentials(AGENT_1)) as channel:
        call = await staying(channel, "Drain")
        site.clock.ahead = LEAF_LIFETIME + timedelta(seconds=1)
        await asyncio.wait_for(site.expired.wait(), WITHIN_S)
        assert not call.done()
        site.withdraw(AGENT_1)
        with pytest.raises(aio.AioRpcError, match="is revoked"):
            await asyncio.wait_for(call.read(), WITHIN_S)
