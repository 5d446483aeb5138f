"""What a user's type checker sees: checked by mypy, never run."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, assert_type

from grpc import aio

from parallax.sdk import (
    AgentEvent,
    AgentInfo,
    ParallaxClient,
    Result,
    SecureAgent,
    SecureGrpcAgentProxy,
    SyncParallaxClient,
)
from parallax.sdk.testing import Fleet, ThrowawayPKI, fleet
from parallax.security import (
    CertificateAuthority,
    Credentials,
    CredentialStore,
    Identity,
    Issued,
    KeyType,
    Kind,
    LeafProfile,
    Mode,
    MTLSConfig,
    MTLSCredentialsProvider,
    ParallaxError,
    Peer,
    TaskFailed,
    TrustBundle,
    Unavailable,
    Usage,
    VerificationError,
    authenticate,
    get_mtls_config,
)
from parallax.security.port import ServerPort


class Sentiment(SecureAgent):
    """An agent with a coroutine."""

    async def analyze(self, task: str, data: Any) -> tuple[dict[str, str], float]:
        return {"mood": f"{task}: {data}"}, 0.9


class Blocking(SecureAgent):
    """An agent with a plain function."""

    def analyze(self, task: str, data: Any) -> tuple[bytes, float]:
        return ssl.PEM_cert_to_DER_cert(str(data)) + task.encode(), 1.0


def agents(tls: MTLSConfig) -> None:
    assert_type(Sentiment("agent-1", "My agent", ["sentiment"]).run(), None)
    Blocking(
        "agent-2",
        "Another",
        ("certificates",),
        {"owner": "me"},
        tls,
        control_plane="localhost:50051",
        max_concurrency=4,
        labels={"zone": "a"},
    )
    Sentiment("agent-1", "My agent", [1])  # type: ignore[list-item]
    Sentiment("agent-1")  # type: ignore[call-arg]


async def embedded(agent: Sentiment) -> None:
    async with agent as running:
        assert_type(running, Sentiment)
        await running.rotate_certificates()


async def asynchronous(tls: MTLSConfig) -> None:
    async with ParallaxClient("localhost:50051", tls) as client:
        assert_type(client, ParallaxClient)
        result = await client.analyze("capability:sentiment", "rate", {"text": "fine"}, timeout=5)
        assert_type(result, Result)
        assert_type(result.confidence, float)
        assert_type(await client.agents(), list[AgentInfo])
        await client.agents(capability="a", labels={"zone": None}, state=["ready"], verified=True)
        async for event in client.watch_agents(capability=["a", "b"], labels={"zone": "a"}):
            assert_type(event, AgentEvent)
            assert_type(event.agent, AgentInfo | None)
        assert_type(await client.remove_agent("agent-1"), bool)
        await client.analyze("agent-1", "rate", wait_for_agent=timedelta(seconds=2), idempotent=True)
        await client.analyze("agent-1", "rate", None, 5)  # type: ignore[call-arg]  # options go by name


def synchronous() -> str:
    with SyncParallaxClient() as client:
        try:
            assert_type(client.analyze("agent-1", "rate", b"raw"), Result)
        except TaskFailed as exc:
            assert_type(exc.code, str)
            return exc.code
        except Unavailable as exc:
            assert_type(exc.retry_after, timedelta)
        except ParallaxError:
            raise
        return ", ".join(agent.agent_id for agent in client.agents())


def certificates(key: Any, authority: CertificateAuthority) -> Peer:
    now = datetime.now(UTC)
    identity = Identity("parallax.local", Kind.AGENT, "agent-1")
    assert_type(Identity.parse("spiffe://parallax.local/agent/agent-1"), Identity)
    assert_type(Identity.from_dns("agent-1.agents.parallax.local", "parallax.local"), Identity | None)
    issued = authority.issue(identity, key.public_key(), LeafProfile(key_type=KeyType.RSA2048), now)
    assert_type(issued, Issued)
    assert_type(issued.bundle, TrustBundle)
    try:
        return authenticate(issued.chain, issued.bundle, identity.trust_domain, now, Usage.SERVER)
    except VerificationError as exc:
        raise SystemExit(str(exc)) from None


def configuration(server: aio.Server, identity: Identity) -> aio.Channel:
    config = get_mtls_config(config_file=Path("parallax.toml"), enabled=True, certs_dir=Path("certs"))
    assert_type(config, MTLSConfig)
    provider = MTLSCredentialsProvider(config, identity=identity)
    assert_type(provider.mode, Mode)
    assert_type(provider.store, CredentialStore | None)
    if provider.store is not None:
        assert_type(provider.store.current, Credentials)
    assert_type(provider.add_port(server, "127.0.0.1:0"), ServerPort)
    return provider.channel("localhost:50051", identity)


async def direct(tls: MTLSConfig) -> None:
    metadata = {"id": "agent-1", "name": "My agent", "endpoint": "localhost:50052"}
    async with await SecureGrpcAgentProxy.from_metadata(metadata, tls, identity="client/me") as proxy:
        assert_type(proxy, SecureGrpcAgentProxy)
        assert_type(await proxy.analyze("rate", {}, timeout=5, returns=str), tuple[str, float])
        async for part in proxy.stream("rate", returns=int):
            assert_type(part, tuple[int, float])
        assert_type(await proxy.capabilities(), tuple[str, ...])
        assert_type(await proxy.check_health(), bool)
    alone = await SecureGrpcAgentProxy.from_metadata(metadata, control_plane="none")
    await alone.close()


async def tested(agent: Sentiment) -> None:
    pki = ThrowawayPKI("acme.example")
    async with fleet(pki, lease_seconds=2, tls=pki.issue("service/control-plane")) as local:
        assert_type(local, Fleet)
        async with local.agent(agent, tls=pki.expired("agent-1"), timeout=timedelta(seconds=1)) as running:
            assert_type(running, Sentiment)
        await local.start(agent, Blocking("agent-2", "Another", ()))
        assert_type(local.client("client/me"), ParallaxClient)
        assert_type(local.environment(Path("certs"), "agent-1"), dict[str, str])
    fleet(lease="2")  # type: ignore[call-arg]
