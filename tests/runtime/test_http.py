"""HTTP that is bounded, and shows the certificate in force."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from parallax.runtime import http
from parallax.runtime.http import HttpPort, Receive, Scope, Send, answer
from parallax.security.authority import CertificateAuthority
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import ConfigError
from parallax.security.https import client_context, server_context, unverified_context
from parallax.security.identity import control_plane
from parallax.security.keys import KeyType, generate_key
from parallax.security.profiles import LeafProfile

NOW = datetime.now(UTC)
WHO = control_plane()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await answer(send, 200, scope["scheme"])


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW)


def credentials(authority: CertificateAuthority, key_type: KeyType = KeyType.P256) -> Credentials:
    key = generate_key(key_type)
    issued = authority.issue(WHO, key.public_key(), LeafProfile(), NOW)
    return Credentials(issued.chain, key, issued.bundle)


@pytest.fixture
def store(authority: CertificateAuthority) -> CredentialStore:
    return CredentialStore(WHO, credentials(authority), NOW)


@pytest.fixture
async def port(store: CredentialStore) -> AsyncIterator[HttpPort]:
    async with HttpPort(app, "127.0.0.1:0", "PARALLAX_HTTP_LISTEN", context=server_context(store)) as opened:
        yield opened


Peer = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def connected(
    port: int, context: ssl.SSLContext, name: str | None = WHO.dns_name
) -> AsyncIterator[Peer]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    try:
        yield reader, writer
    finally:
        writer.close()


async def asked(peer: Peer) -> bytes:
    reader, writer = peer
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    return await reader.readexactly(5)


def shown(peer: Peer) -> x509.Certificate:
    return x509.load_der_x509_certificate(peer[1].get_extra_info("ssl_object").getpeercert(binary_form=True))


async def test_each_connection_is_shown_the_certificate_in_force_and_none_is_cut_off(
    port: HttpPort, store: CredentialStore, authority: CertificateAuthority
) -> None:
    context = client_context(authority.bundle.roots)
    async with connected(port.port, context) as before:
        assert shown(before) == store.current.leaf
        old = store.current
        store.publish(credentials(authority), NOW)
        async with connected(port.port, context) as after:
            assert shown(after) == store.current.leaf != old.leaf
            assert await asked(after) == b"https"
        assert await asked(before) == b"https"


async def test_no_request_fails_while_the_certificate_changes_all_the_time(
    port: HttpPort, store: CredentialStore, authority: CertificateAuthority
) -> None:
    context = client_context(authority.bundle.roots)
    seen = set()
    for _ in range(50):
        store.publish(credentials(authority), NOW)
        async with connected(port.port, context) as first, connected(port.port, context) as second:
            assert {*await asyncio.gather(asked(first), asked(second))} == {b"https"}
            seen.add(shown(first))
    assert len(seen) == 50


async def test_a_key_of_another_kind_leaves_nothing_of_the_one_before(
    port: HttpPort, store: CredentialStore, authority: CertificateAuthority
) -> None:
    """OpenSSL keeps one certificate for each kind of key, and the client would choose."""
    context = client_context(authority.bundle.roots)
    for key_type, kind in (
        (KeyType.RSA2048, rsa.RSAPublicKey),
        (KeyType.P256, ec.EllipticCurvePublicKey),
    ):
        store.publish(credentials(authority, key_type), NOW)
        async with connected(port.port, context) as peer:
            assert isinstance(shown(peer).public_key(), kind)


async def test_without_a_server_name_it_is_the_certificate_in_force_as_well(
    port: HttpPort, store: CredentialStore, authority: CertificateAuthority
) -> None:
    store.publish(credentials(authority), NOW)
    async with connected(port.port, unverified_context(), "127.0.0.1") as peer:
        assert shown(peer) == store.current.leaf


async def test_a_client_refuses_a_server_of_another_ca(port: HttpPort) -> None:
    context = client_context(CertificateAuthority.create(now=NOW).bundle.roots)
    with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
        async with connected(port.port, context):
            pass


async def test_a_client_refuses_a_server_of_another_name(
    port: HttpPort, authority: CertificateAuthority
) -> None:
    context = client_context(authority.bundle.roots)
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        async with connected(port.port, context, "agent-1.agents.parallax.local"):
            pass


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1_1 is deprecated")
@pytest.mark.parametrize(
    ("version", "is_served"), [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)]
)
async def test_old_protocols_are_refused(
    port: HttpPort,
    version: ssl.TLSVersion,
    is_served: bool,  # noqa: FBT001
) -> None:
    context = unverified_context()
    context.minimum_version = context.maximum_version = version
    context.set_ciphers("ALL:@SECLEVEL=0")
    expected = nullcontext() if is_served else pytest.raises((ssl.SSLError, ConnectionError))
    with expected:
        async with connected(port.port, context, "127.0.0.1") as peer:
            assert await asked(peer) == b"https"


async def test_no_session_is_resumed(port: HttpPort, authority: CertificateAuthority) -> None:
    """Whoever resumed one would not see the next certificate."""
    context = client_context(authority.bundle.roots)
    async with connected(port.port, context) as peer:
        await asked(peer)
        session = peer[1].get_extra_info("ssl_object").session
    assert session is None or not session.has_ticket


@pytest.mark.parametrize("said", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_who_does_not_say_what_it_wants_is_cut_off(
    said: bytes, port: HttpPort, authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HEAD_S", 0.1)
    async with connected(port.port, client_context(authority.bundle.roots)) as (reader, writer):
        writer.write(said)
        with suppress(ConnectionResetError):
            assert await reader.read() == b""


UPGRADE = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"


@pytest.mark.parametrize(("said", "status"), [(b"nonsense\r\n\r\n", b"400"), (UPGRADE, b"200")])
async def test_a_stranger_has_nothing_written_into_the_log(
    said: bytes,
    status: bytes,
    port: HttpPort,
    authority: CertificateAuthority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with connected(port.port, client_context(authority.bundle.roots)) as (reader, writer):
        writer.write(said)
        assert (await reader.readline()).split()[1] == status
    assert caplog.messages == []


async def test_what_goes_wrong_here_is_in_the_log(
    store: CredentialStore, authority: CertificateAuthority, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError("our own bug")

    async with (
        HttpPort(broken, "127.0.0.1:0", "X", context=server_context(store)) as opened,
        connected(opened.port, client_context(authority.bundle.roots)) as (reader, writer),
    ):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readline()).split()[1] == b"500"
    (said,) = [each for each in caplog.records if each.levelname == "ERROR"]
    assert said.exc_info is not None
    assert str(said.exc_info[1]) == "our own bug"


async def test_who_does_not_shake_hands_is_cut_off(
    store: CredentialStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "HANDSHAKE_S", 0.1)
    async with HttpPort(app, "127.0.0.1:0", "X", context=server_context(store)) as opened:
        with socket.create_connection(("127.0.0.1", opened.port)) as silent:
            silent.settimeout(10)
            with suppress(ConnectionResetError):
                assert await asyncio.to_thread(silent.recv, 1) == b""


async def test_of_very_many_that_do_not_shake_hands_the_oldest_are_cut_off_and_others_are_served(
    port: HttpPort, authority: CertificateAuthority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or they would use up the process's descriptors, and so keep out whoever has a certificate."""
    monkeypatch.setattr(http, "HANDSHAKE_S", 3600.0)  # it is not time that cuts them off
    before, silent = open_files(), list[asyncio.StreamWriter]()
    for _ in range(3 * http.MAX_CONNECTIONS):
        silent.append((await asyncio.open_connection("127.0.0.1", port.port))[1])
    async with connected(port.port, client_context(authority.bundle.roots)) as peer:
        assert await asked(peer) == b"https"
        ours = len(silent) + 1
        async with asyncio.timeout(15):
            while open_files() - before - ours > http.MAX_CONNECTIONS:
                await asyncio.sleep(0.01)
    for writer in silent:
        writer.transport.abort()


def open_files() -> int:
    return len(list(Path("/dev/fd").iterdir()))


async def test_what_was_opened_and_closed_at_once_listens_no_more(store: CredentialStore) -> None:
    async with HttpPort(app, "127.0.0.1:0", "X", context=server_context(store)) as opened:
        pass
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", opened.port)


async def test_an_address_that_is_taken_is_named(port: HttpPort, store: CredentialStore) -> None:
    taken = HttpPort(app, f"127.0.0.1:{port.port}", "PARALLAX_HTTP_LISTEN", context=server_context(store))
    with pytest.raises(ConfigError, match=r"^PARALLAX_HTTP_LISTEN=127.0.0.1"):
        await taken.__aenter__()
