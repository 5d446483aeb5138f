"""A server that looks at itself, over real TLS: a port that refuses it, one that hangs, none at all."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID
from pydantic import SecretStr

from parallax.runtime.authorization import Authorization
from parallax.runtime.policy_text import built_in_policy
from parallax.runtime.probe import PortProbe
from parallax.runtime.server import new_server, serving
from parallax.sdk.testing import ThrowawayPKI
from parallax.security.bundle import certificates_to_pem
from parallax.security.config import MTLSConfig
from parallax.security.identity import DEFAULT_TRUST_DOMAIN
from parallax.security.keys import generate_key, key_to_pem
from parallax.security.profiles import LeafProfile
from parallax.security.provider import MTLSCredentialsProvider
from tests.ports import free_port

AUTHORIZATION = Authorization(built_in_policy(), DEFAULT_TRUST_DOMAIN)
CONTROL_PLANE = "service/control-plane"
QUICK_S = 0.02


@pytest.fixture(scope="module")
def pki() -> ThrowawayPKI:
    return ThrowawayPKI()


def provider_of(pki: ThrowawayPKI, tls: MTLSConfig | None = None) -> MTLSCredentialsProvider:
    return MTLSCredentialsProvider(tls or pki.issue(CONTROL_PLANE), identity=pki.identity(CONTROL_PLANE))


def in_plaintext(_: ThrowawayPKI) -> MTLSConfig:
    return MTLSConfig(enabled=False)


def for_servers_alone(pki: ThrowawayPKI) -> MTLSConfig:
    """Without clientAuth, as cert-manager makes it unless told otherwise."""
    key, authority = generate_key(), pki.authority
    names = pki.authority.issue(
        pki.identity(CONTROL_PLANE),
        key.public_key(),
        LeafProfile(lifetime=timedelta(days=1)),
        datetime.now(UTC),
    ).chain[0]
    builder = (
        x509.CertificateBuilder()
        .subject_name(names.subject)
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(names.not_valid_before_utc)
        .not_valid_after(names.not_valid_after_utc)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(
            names.extensions.get_extension_for_class(x509.SubjectAlternativeName).value, critical=False
        )
    )
    leaf = builder.sign(authority.key, hashes.SHA256())
    return MTLSConfig(
        enabled=True,
        verify_client=True,
        ca_pem=authority.bundle.pem.decode(),
        cert_pem=certificates_to_pem((leaf,)).decode(),
        key_pem=SecretStr(key_to_pem(key).decode()),
    )


class Probed:
    """A probe that is in a hurry, and what it was told."""

    def __init__(self, provider: MTLSCredentialsProvider, limit_s: float = 5.0) -> None:
        self.took: list[float] = []
        self.probe = PortProbe(provider, self.took.append, every_s=QUICK_S, limit_s=limit_s)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(QUICK_S)


@asynccontextmanager
async def running(awaitable: Awaitable[None]) -> AsyncIterator[asyncio.Future[None]]:
    task = asyncio.ensure_future(awaitable)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


async def test_a_port_that_works_is_good_and_timed(pki: ThrowawayPKI) -> None:
    provider = provider_of(pki)
    probed = Probed(provider)
    server = new_server(provider, AUTHORIZATION.authorize, lambda _: None, 1024)
    async with serving(server, provider, "127.0.0.1:0", 0, probed.probe):
        await probed.until(lambda: len(probed.took) >= 3)
    assert all(0 < seconds < 5 for seconds in probed.took)
    assert probed.probe.is_good
    assert probed.probe.detail == "answers"


async def test_a_port_that_refuses_our_own_certificate_is_not_good_and_said_so_once(
    pki: ThrowawayPKI, caplog: pytest.LogCaptureFixture
) -> None:
    stale, current = provider_of(pki), provider_of(ThrowawayPKI())
    probed = Probed(current)
    server = new_server(stale, AUTHORIZATION.authorize, lambda _: None, 1024)
    async with (
        serving(server, stale, "127.0.0.1:0", 0) as port,
        running(probed.probe.run(f"127.0.0.1:{port}")),
    ):
        await probed.until(lambda: not probed.probe.is_good)
        await asyncio.sleep(5 * QUICK_S)
    assert "refuses our own certificate" in probed.probe.detail
    assert not probed.took
    told = [record for record in caplog.records if record.message == "the own port does not answer"]
    assert len(told) == 1


async def test_a_port_that_accepts_and_says_nothing_is_not_good_and_is_again_once_it_answers(
    pki: ThrowawayPKI,
) -> None:
    provider = provider_of(pki)
    probed = Probed(provider, limit_s=0.2)
    port = free_port()
    with socket.create_server(("127.0.0.1", port)) as listener:
        async with running(probed.probe.run(f"127.0.0.1:{port}")) as task:
            await probed.until(lambda: not probed.probe.is_good)
            assert probed.probe.detail == "no handshake within 0.2 s"
            listener.close()
            server = new_server(provider, AUTHORIZATION.authorize, lambda _: None, 1024)
            async with serving(server, provider, f"127.0.0.1:{port}", 0):
                await probed.until(lambda: probed.probe.is_good)
                await probed.until(lambda: probed.took)
            assert not task.done()


async def test_one_failure_is_not_taken_for_more_than_chance(pki: ThrowawayPKI) -> None:
    probed = Probed(provider_of(pki))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = listener.getsockname()[1]
    slow = PortProbe(provider_of(pki), probed.took.append, every_s=60)
    async with running(slow.run(f"127.0.0.1:{nobody}")):
        await probed.until(lambda: slow.detail != "not probed")
        assert slow.is_good


@pytest.mark.parametrize("make", [for_servers_alone, in_plaintext])
async def test_there_is_nothing_to_probe_with_a_certificate_for_servers_alone_nor_in_plaintext(
    pki: ThrowawayPKI, make: Callable[[ThrowawayPKI], MTLSConfig]
) -> None:
    provider = provider_of(pki, make(pki))
    probed = Probed(provider)
    server = new_server(provider, AUTHORIZATION.authorize, lambda _: None, 1024)
    async with serving(server, provider, "127.0.0.1:0", 0, probed.probe):
        await asyncio.sleep(5 * QUICK_S)
    assert not probed.took
    assert probed.probe.is_good
    assert probed.probe.detail == "not probed"
