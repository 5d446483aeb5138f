"""The handshake itself: gRPC over mutual TLS on loopback, with one thing wrong each."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.identity import Identity
from parallax.security.keys import KeyType, generate_key
from parallax.security.profiles import LeafProfile
from parallax.security.swap import ServerSwap
from parallax.security.tls import (
    Option,
    channel_credentials,
    identity_options,
    is_loopback,
    replace_options,
)
from tests.ports import free_port

SERVICE = Identity.parse_short("service/control-plane")
AGENT = Identity.parse_short("agent/agent-1")
NOBODY = "nobody"

Make = Callable[..., Credentials]


@dataclass
class Server:
    """A running server that answers with the CN of whoever calls, as its own handshake saw it."""

    port: int
    store: CredentialStore

    async def call(
        self, credentials: Credentials | None, expected: Identity = SERVICE, host: str = "127.0.0.1"
    ) -> str:
        """Who the server says we are; without credentials the channel presents no certificate."""
        secured = (
            channel_credentials(credentials)
            if credentials
            else grpc.ssl_channel_credentials(self.store.current.bundle_pem)
        )
        address = f"{host}:{self.port}"
        async with grpc.aio.secure_channel(address, secured, options=identity_options(expected)) as channel:
            return await ask(channel)


async def ask(channel: grpc.aio.Channel) -> str:
    am: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Who/Am")
    return (await am(b"I?", timeout=10)).decode()


async def who(_: bytes, context: Any) -> bytes:
    names = context.auth_context().get("x509_common_name", [NOBODY.encode()])
    return bytes(names[0])


@asynccontextmanager
async def serving(
    store: CredentialStore, *, verify_client: bool = True, host: str = "127.0.0.1"
) -> AsyncIterator[Server]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Who", {"Am": grpc.unary_unary_rpc_method_handler(who)}),)
    )
    swap = ServerSwap(store.served, verify_client=verify_client)
    # For several addresses gRPC takes a port that is free on the first, whoever has it on the next.
    port = server.add_secure_port(f"{host}:{free_port()}", swap.grpc_credentials)
    await server.start()
    try:
        yield Server(port, store)
    finally:
        await server.stop(1)


@pytest.fixture(scope="module")
def make(authority: CertificateAuthority, now: datetime) -> Make:
    def make(identity: Identity = AGENT, by: CertificateAuthority = authority, **profile: Any) -> Credentials:
        chosen = LeafProfile(**profile)
        key = generate_key(chosen.key_type)
        issued = by.issue(identity, key.public_key(), chosen, now)
        return Credentials(issued.chain, key, issued.bundle)

    return make


@pytest.fixture
def store(make: Make, now: datetime) -> CredentialStore:
    return CredentialStore(SERVICE, make(SERVICE), now)


async def refused(call: Any) -> str:
    """Why the channel could not connect, as far as it knows."""
    with pytest.raises(grpc.aio.AioRpcError) as exc:
        await call
    assert exc.value.code() is grpc.StatusCode.UNAVAILABLE
    return exc.value.details() or ""


async def test_each_end_knows_the_other(store: CredentialStore, make: Make) -> None:
    async with serving(store) as server:
        assert await server.call(make(AGENT)) == "agent-1"


@pytest.mark.parametrize("key_type", [KeyType.RSA2048, KeyType.RSA4096])
async def test_rsa_keys_work_at_both_ends(
    key_type: KeyType, forge: Any, bundle: TrustBundle, now: datetime
) -> None:
    key = generate_key(key_type)  # one for both: RSA-4096 takes seconds
    client = forge(key=key)
    service = forge(key=key, common_names=(), uris=[str(SERVICE)], dns=[SERVICE.dns_name])
    store = CredentialStore(SERVICE, Credentials((service.certificate,), key, bundle), now)
    async with serving(store) as server:
        assert await server.call(Credentials((client.certificate,), key, bundle)) == "agent-1"


async def test_intermediates_are_presented_at_both_ends(
    forge: Any, bundle: TrustBundle, now: datetime
) -> None:
    """The other end has the root alone."""
    middle = forge.authority("Middle", issuer=forge.root)
    client = forge(issuer=middle)
    service = forge(issuer=middle, common_names=(), uris=[str(SERVICE)], dns=[SERVICE.dns_name])
    chain = (service.certificate, middle.certificate)
    async with serving(CredentialStore(SERVICE, Credentials(chain, service.key, bundle), now)) as server:
        own = Credentials((client.certificate, middle.certificate), client.key, bundle)
        assert await server.call(own) == "agent-1"
        await refused(server.call(Credentials((client.certificate,), client.key, bundle)))


class TestClientRefused:
    """The same client with one thing wrong; a good one is let in before and after."""

    @pytest.fixture(autouse=True)
    async def server(self, store: CredentialStore, make: Make) -> AsyncIterator[Server]:
        async with serving(store) as server:
            assert await server.call(make(AGENT)) == "agent-1"
            yield server
            assert await server.call(make(AGENT)) == "agent-1"

    async def test_without_a_certificate(self, server: Server) -> None:
        await refused(server.call(None))

    async def test_of_another_ca(
        self, server: Server, make: Make, bundle: TrustBundle, now: datetime
    ) -> None:
        other = make(AGENT, by=CertificateAuthority.create(now=now))
        await refused(server.call(Credentials(other.chain, other.key, bundle)))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"not_before": timedelta(days=-9), "not_after": timedelta(days=-1)},
            {"not_before": timedelta(days=1), "not_after": timedelta(days=9)},
            {"usages": [ExtendedKeyUsageOID.SERVER_AUTH]},
        ],
        ids=["expired", "not yet valid", "not for clients"],
    )
    async def test_with_a_certificate_that_is(
        self, wrong: dict[str, Any], server: Server, forge: Any, bundle: TrustBundle
    ) -> None:
        made = forge(**wrong)
        await refused(server.call(Credentials((made.certificate,), made.key, bundle)))

    async def test_in_plaintext(self, server: Server) -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await refused(ask(channel))

    @pytest.mark.parametrize(("version", "accepted"), [("tls1_1", False), ("tls1_2", True), ("tls1_3", True)])
    async def test_with_an_old_protocol(
        self,
        *,
        version: str,
        accepted: bool,
        server: Server,
        make: Make,
        tmp_path: Path,
        require_tool: Callable[[str], str],
    ) -> None:
        """RFC 8996: TLS 1.0 and 1.1 must not be used. openssl itself is told to be willing."""
        client = make(AGENT)
        for name, pem in (("cert", client.chain_pem), ("key", client.key_pem), ("ca", client.bundle_pem)):
            (tmp_path / name).write_bytes(pem)
        process = await asyncio.create_subprocess_exec(
            require_tool("openssl"),
            *f"s_client -connect 127.0.0.1:{server.port} -{version} -cipher ALL:@SECLEVEL=0 -alpn h2".split(),
            *("-cert", tmp_path / "cert", "-key", tmp_path / "key", "-CAfile", tmp_path / "ca"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        async with asyncio.timeout(20):
            output, _ = await process.communicate()
        assert (b"BEGIN CERTIFICATE" in output) is accepted, output
        assert (b"no peer certificate available" in output) is not accepted, output


class TestServerRefused:
    """The client does not go on with a server that is not the one it wants, whatever the address."""

    @pytest.mark.parametrize("presented", ["agent/agent-2", "service/agent-proxy", "client/control-plane"])
    async def test_with_a_valid_certificate_of_somebody_else(
        self, presented: str, make: Make, now: datetime
    ) -> None:
        somebody = Identity.parse_short(presented)
        async with serving(CredentialStore(somebody, make(somebody), now)) as server:
            assert "Hostname Verification" in await refused(server.call(make(AGENT), SERVICE))
            assert await server.call(make(AGENT), somebody) == "agent-1"

    async def test_by_address_though_its_certificate_covers_the_address(
        self, store: CredentialStore, make: Make
    ) -> None:
        """An agent's leaf carries localhost too: that must not make it a control plane."""
        wrong = Identity.parse_short("agent/localhost")
        async with serving(store) as server:
            for host in ("localhost", "127.0.0.1"):
                await refused(server.call(make(AGENT), wrong, host))

    async def test_of_another_ca(self, make: Make, now: datetime) -> None:
        other = CertificateAuthority.create(now=now)
        async with serving(CredentialStore(SERVICE, make(SERVICE, by=other), now)) as server:
            await refused(server.call(make(AGENT)))


@pytest.mark.parametrize(
    "name",
    [
        "agente_py",
        "agent-",
        "agent_",
        "a_b.c_d",
        "a-.b",
        "07048933",
        "a.b.c",
        "a._b",
        "a" * 63,
        "a--b",
        "localhost",
    ],
)
async def test_any_name_can_be_dialled(name: str, make: Make, now: datetime) -> None:
    """Names may hold what host names may not: `agente_py` is one of the documents'."""
    identity = Identity.parse_short(f"agent/{name}")
    async with serving(CredentialStore(identity, make(identity), now)) as server:
        assert await server.call(make(AGENT), identity) == "agent-1"
        other = Identity.parse_short(f"client/{name}")
        await refused(server.call(make(AGENT), other))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
async def test_the_address_does_not_matter(host: str, make: Make, now: datetime) -> None:
    """The leaf holds no address and no host name, only its identity."""
    if host == "[::1]" and not has_ipv6():
        pytest.skip("no IPv6 loopback here")
    store = CredentialStore(SERVICE, make(SERVICE, sans=()), now)
    async with serving(store, host=host) as server:
        assert await server.call(make(AGENT, sans=()), SERVICE, host) == "agent-1"


async def test_without_client_verification_nobody_is_seen(store: CredentialStore, make: Make) -> None:
    """gRPC Python does not even ask, so a client's certificate goes unnoticed."""
    async with serving(store, verify_client=False) as server:
        assert await server.call(make(AGENT)) == NOBODY
        assert await server.call(None) == NOBODY
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            await refused(ask(channel))


class TestLoopback:
    @pytest.mark.parametrize(
        "address",
        [
            "localhost",
            "localhost:50051",
            "LOCALHOST:0",
            "127.0.0.1:0",
            "127.9.8.7:1",
            "127.0.0.1",
            "[::1]:50051",
            "[::1]",
            "[0:0:0:0:0:0:0:1]:1",
            "dns:///localhost:1",
            "dns:localhost:1",
            "ipv4:127.0.0.1:1",
            "ipv6:[::1]:1",
            "unix:socket",
            "unix:///run/socket",
            "unix-abstract:name",
        ],
    )
    def test_stays_here(self, address: str) -> None:
        assert is_loopback(address)

    @pytest.mark.parametrize(
        "address",
        [
            "",
            ":50051",
            "*:50051",
            "0.0.0.0:0",
            "0:0",
            "[::]:0",
            "[::]",
            "10.0.0.1:1",
            "[fe80::1%lo]:1",
            "[::ffff:10.0.0.1]:1",
            "example.org:1",
            "localhost.example.org:1",
            "127.0.0.1.example.org:1",
            "localhost@example.org:1",
            "ipv4:127.0.0.1:1,10.0.0.1:1",
            "ipv6:[::1]:1,[fe80::1]:1",
            "dns://8.8.8.8/localhost:1",
            "dns://localhost/example.org",
            "dns:ipv4:127.0.0.1",
            "xds:///localhost",
            "vsock:1:2",
            "localhost:1,example.org:1",
            "localhost:1\nexample.org",
            " localhost:1",
            "::1",
            "127.1:1",
            "2130706433:1",
            "0x7f.0.0.1:1",
            "localho\u017ft:1",
            "http://localhost:1",
        ],
    )
    def test_may_leave(self, address: str) -> None:
        assert not is_loopback(address)

    @given(st.text())
    def test_any_text_has_an_answer(self, address: str) -> None:
        assert is_loopback(address) in {True, False}


def test_our_options_cannot_be_turned_off() -> None:
    given_options: list[Option] = [
        ("grpc.max_send_message_length", 1),
        ("grpc.ssl_target_name_override", "evil"),
    ]
    ours = identity_options(SERVICE)
    assert replace_options(given_options, ours) == [("grpc.max_send_message_length", 1), *ours]


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
