"""Who is refused in the handshake or right after it, and which side says why."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import ParallaxError, UntrustedChain, WrongIdentity

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Fleet, Leaf, Pki, Until

Shared = tuple["Child", "Fleet"]

CONTROL_PLANE = "control-plane.parallax.local"
WEAK_KEY = rsa.generate_private_key(65537, 1024)  # noqa: S505
CLI = "spiffe://parallax.local/client/cli"


async def refusal(fleet: Fleet, credentials: grpc.ChannelCredentials | None) -> aio.AioRpcError:
    """How a call fails whose connection has these credentials; without any, it is in plaintext."""
    options = [("grpc.ssl_target_name_override", CONTROL_PLANE)]
    opened = (
        aio.secure_channel(fleet.address, credentials, options=options)
        if credentials
        else aio.insecure_channel(fleet.address)
    )
    async with opened as channel:
        with pytest.raises(aio.AioRpcError) as refused:
            await health_pb2_grpc.HealthStub(channel).Check(  # type: ignore[attr-defined]
                health_pb2.HealthCheckRequest(), timeout=10
            )
    return refused.value


async def assert_serves(fleet: Fleet) -> None:
    """A good client of the same control plane works."""
    async with fleet.client() as client:
        assert await client.agents() == []


async def count(fleet: Fleet, reason: str) -> float:
    return (await fleet.metrics()).get(f'parallax_authentication_failures_total{{reason="{reason}"}}', 0)


async def ended(fleet: Fleet, result: str) -> float:
    """How many handshakes, in the words of gRFC A118."""
    return (await fleet.metrics())[f'parallax_tls_handshakes_total{{result="{result}"}}']


def certified_by_another_ca(pki: Pki, directory: Path) -> Leaf:
    return type(pki)(directory / "elsewhere").issue("client/cli")


def expired(pki: Pki, _: Path) -> Leaf:
    past = pki.now - timedelta(minutes=2)
    return pki.issue("client/cli", now=past, lifetime=timedelta(minutes=1))


def not_yet_valid(pki: Pki, _: Path) -> Leaf:
    return pki.issue("client/cli", now=pki.now + timedelta(hours=1))


def for_servers_only(pki: Pki, _: Path) -> Leaf:
    return pki.forge("cli", uris=[CLI], usages=[ExtendedKeyUsageOID.SERVER_AUTH])


@pytest.mark.parametrize(
    ("make", "reason", "detail", "result"),
    [
        (
            certified_by_another_ca,
            "untrusted_issuer",
            "unable to get local issuer certificate",
            "CERTIFICATE_AUTHORITY_INVALID",
        ),
        (expired, "expired", "certificate has expired", "CERTIFICATE_EXPIRED"),
        (not_yet_valid, "not_yet_valid", "certificate is not yet valid", "CERTIFICATE_NOT_YET_VALID"),
        (
            for_servers_only,
            "wrong_purpose",
            "unsupported certificate purpose",
            "CERTIFICATE_VERIFICATION_FAILED",
        ),
    ],
)
async def test_a_client_with_a_wrong_certificate_is_refused_and_the_log_names_the_cause(
    shared_plane: Shared,
    tmp_path: Path,
    make: Callable[[Pki, Path], Leaf],
    reason: str,
    detail: str,
    result: str,
) -> None:
    plane, fleet = shared_plane
    await assert_serves(fleet)
    before = await ended(fleet, result)
    leaf = make(fleet.pki, tmp_path)
    error = await refusal(fleet, leaf.channel_credentials(fleet.pki.authority.bundle.pem))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    said = await plane.said("TLS handshake failed", reason=reason)
    assert detail in said["detail"]
    assert await count(fleet, reason) >= 1
    assert await ended(fleet, result) > before
    await assert_serves(fleet)


async def test_each_connection_that_makes_a_call_is_a_handshake_that_succeeded(shared_plane: Shared) -> None:
    _, fleet = shared_plane
    before = await ended(fleet, "SUCCESS")
    for _ in range(3):
        async with fleet.client() as client:
            for _ in range(3):
                await client.agents()
    assert await ended(fleet, "SUCCESS") == before + 3


async def test_the_own_port_is_probed_with_the_own_certificate(shared_plane: Shared) -> None:
    _, fleet = shared_plane
    async with asyncio.timeout(25):  # it begins once the port is there, and comes again after 15 s
        while json.loads((await fleet.http("/readyz"))[1])["detail"]["own port"] != "answers":
            await asyncio.sleep(0.05)
    assert (await fleet.http("/readyz"))[0] == 200
    metrics = await fleet.metrics()
    assert metrics['parallax_tls_handshake_duration_seconds_count{side="own_port"}'] >= 1


async def test_a_client_without_a_certificate_is_refused_and_the_log_names_the_cause(
    shared_plane: Shared,
) -> None:
    plane, fleet = shared_plane
    error = await refusal(fleet, grpc.ssl_channel_credentials(fleet.pki.authority.bundle.pem))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    said = await plane.said("TLS handshake failed", reason="no_certificate")
    assert said["remedy"].startswith("the peer sent no certificate")
    assert await count(fleet, "no_certificate") >= 1
    await assert_serves(fleet)


async def test_a_plaintext_client_is_refused_and_the_log_names_the_cause(shared_plane: Shared) -> None:
    plane, fleet = shared_plane
    error = await refusal(fleet, None)
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    said = await plane.said("TLS handshake failed", reason="plaintext_peer")
    assert "PARALLAX_TLS_ENABLED" in said["remedy"]
    assert await count(fleet, "plaintext_peer") >= 1
    await assert_serves(fleet)


async def test_tls_1_1_is_refused_and_the_log_names_the_cause(
    shared_plane: Shared, require_tool: Callable[[str], str]
) -> None:
    plane, fleet = shared_plane
    argv = [require_tool("openssl"), "s_client", "-connect", fleet.address]
    argv += ["-tls1_1", "-cipher", "DEFAULT@SECLEVEL=0"]
    done = await asyncio.to_thread(
        subprocess.run, argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=10, check=False
    )
    assert done.returncode != 0
    await plane.said("TLS handshake failed", reason="protocol_version")
    assert await count(fleet, "protocol_version") >= 1
    await assert_serves(fleet)


@pytest.mark.parametrize(
    ("wrong", "reason", "detail"),
    [
        ({"key": WEAK_KEY}, "verification_error", "RSA key of 1024 bits"),
        (
            {"uris": ["spiffe://elsewhere.example/client/cli"]},
            "wrong_identity",
            "not of the trust domain parallax.local",
        ),
        ({"uris": [CLI, CLI.replace("cli", "admin")]}, "verification_error", "2 URI SANs"),
        ({"dns": ["agent-1.agents.parallax.local"]}, "verification_error", "and also"),
        ({"uris": [CLI.replace("cli", "../admin")]}, "verification_error", "not spiffe://"),
        ({"common_name": "Common Name", "uris": []}, "verification_error", "names no identity"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
async def test_a_certificate_that_tls_accepts_and_we_do_not_is_refused_at_the_first_call(
    shared_plane: Shared, wrong: dict[str, Any], reason: str, detail: str
) -> None:
    plane, fleet = shared_plane
    leaf = fleet.pki.forge(**({"common_name": "cli", "uris": [CLI]} | wrong))
    before = await count(fleet, reason)
    error = await refusal(fleet, leaf.channel_credentials())
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert detail in (error.details() or "")
    await plane.said("call refused", reason=reason, detail=error.details())
    assert await count(fleet, reason) == before + 1
    await assert_serves(fleet)


@asynccontextmanager
async def impostor(leaf: Leaf) -> AsyncIterator[str]:
    """A server that anybody can reach and that answers, with the certificate of *leaf*; its address."""
    server = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    pair = [(leaf.key_pem, leaf.chain_pem)]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize(
    ("who", "error", "cause"),
    [
        ("agent/agent-1", WrongIdentity, "Hostname Verification Check failed"),
        ("service/agent-proxy", WrongIdentity, "Hostname Verification Check failed"),
        ("service/control-plane of another CA", UntrustedChain, "CERTIFICATE_VERIFY_FAILED"),
    ],
)
async def test_client_and_agent_refuse_a_server_that_is_not_the_control_plane_and_say_why(
    pki: Pki,
    new_pki: type[Pki],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    until: Until,
    who: str,
    error: type[ParallaxError],
    cause: str,
) -> None:
    short, _, elsewhere = who.partition(" of ")
    issuer = new_pki(tmp_path) if elsewhere else pki
    async with impostor(issuer.issue(short)) as address:
        with pytest.raises(error, match=cause):
            async with ParallaxClient(address, pki.tls()):
                pass
        agent = SecureAgent("agent-1", "Agent", [], tls=pki.tls(), control_plane=address)
        entering = asyncio.create_task(agent.__aenter__())
        try:
            said = await until(lambda: [r for r in caplog.records if r.message == "not connected"] or None)
        finally:
            entering.cancel()
            await asyncio.wait({entering})
    assert vars(said[0])["cause"].startswith(f"{error.__name__}: ")
    assert cause in vars(said[0])["cause"]
