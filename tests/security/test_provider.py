"""Every combination of settings, over real sockets: TLS, plaintext on loopback, or a refusal."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from pydantic import SecretStr

from parallax.security.authority import CertificateAuthority
from parallax.security.config import VARIABLES, MTLSConfig
from parallax.security.credentials import Credentials
from parallax.security.errors import ConfigError
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, leaf_paths, save_leaf
from parallax.security.profiles import LeafProfile
from parallax.security.provider import Mode, MTLSCredentialsProvider
from parallax.security.tls import channel_credentials, identity_options
from tests.ports import free_port

SERVICE = Identity.parse_short("service/control-plane")
AGENT = Identity.parse_short("agent/agent-1")
ELSEWHERE = ("0.0.0.0:0", "[::]:0", "192.0.2.1:1", "example.org:1", ":0", "*:0")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(scope="module")
def material(authority: CertificateAuthority, now: datetime) -> dict[Identity, Credentials]:
    made = {}
    for identity in (SERVICE, AGENT):
        key = generate_key()
        issued = authority.issue(identity, key.public_key(), LeafProfile(), now)
        made[identity] = Credentials(issued.chain, key, issued.bundle)
    return made


@pytest.fixture
def certs(tmp_path: Path, material: dict[Identity, Credentials]) -> Path:
    """A certificate directory with the service and the agent in it."""
    for identity, each in material.items():
        save_leaf(tmp_path / "certs", Layout.PARALLAX, identity, each.chain, each.key, each.bundle)
    return tmp_path / "certs"


@pytest.fixture
def agent(certs: Path) -> MTLSCredentialsProvider:
    """The other end, with TLS."""
    return MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=certs), identity=AGENT)


async def say(_: bytes, context: Any) -> bytes:
    names = context.auth_context().get("x509_common_name", [b"nobody"])
    return bytes(names[0])


@asynccontextmanager
async def serving(provider: MTLSCredentialsProvider, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("test.Who", {"Am": grpc.unary_unary_rpc_method_handler(say)}),)
    )
    port = provider.add_port(server, address)
    await server.start()
    try:
        yield f"127.0.0.1:{port.number}"
    finally:
        await server.stop(1)


async def ask(channel: grpc.aio.Channel) -> str:
    async with channel:
        am: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/test.Who/Am")
        return (await am(b"I?", timeout=10)).decode()


async def is_plaintext(address: str) -> bool:
    try:
        await ask(grpc.aio.insecure_channel(address))
    except grpc.aio.AioRpcError:
        return False
    return True


def refused(act: Callable[[], object]) -> str:
    with pytest.raises(ConfigError) as exc:
        act()
    assert "\n" not in str(exc.value)
    return str(exc.value)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestDisabled:
    """Plaintext, on loopback only; nothing else that is set has an effect."""

    @pytest.mark.parametrize("verify_client", [True, False])
    @pytest.mark.parametrize("allow_insecure", [True, False])
    @pytest.mark.parametrize("has_material", [True, False])
    async def test_speaks_plaintext_on_loopback(
        self,
        *,
        verify_client: bool,
        allow_insecure: bool,
        has_material: bool,
        certs: Path,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        config = MTLSConfig(
            certs_dir=certs if has_material else certs / "none",
            verify_client=verify_client,
            allow_insecure=allow_insecure,
        )
        provider = MTLSCredentialsProvider(config, identity=SERVICE)
        assert provider.mode is Mode.PLAINTEXT
        assert not provider.insecure_fallback
        assert provider.store is None
        async with serving(provider) as address:
            assert await is_plaintext(address)
            assert await ask(provider.channel(address, AGENT)) == "nobody"
        assert not warnings(caplog)

    @pytest.mark.parametrize("address", ELSEWHERE)
    async def test_neither_listens_nor_dials_elsewhere(self, address: str) -> None:
        provider = MTLSCredentialsProvider(MTLSConfig(allow_insecure=True), identity=SERVICE)
        text = refused(lambda: provider.add_port(grpc.aio.server(), address))
        assert address in text
        assert "PARALLAX_TLS_ENABLED=true" in text
        assert address in refused(lambda: provider.channel(address, AGENT))

    async def test_no_proxy_carries_plaintext_away(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """gRPC follows `http_proxy` even to localhost; here the proxy is a port where nobody answers."""
        with socket.create_server(("127.0.0.1", 0)) as closed:
            proxy = f"http://127.0.0.1:{closed.getsockname()[1]}"
        for variable in ("http_proxy", "https_proxy", "grpc_proxy"):
            monkeypatch.setenv(variable, proxy)
        provider = MTLSCredentialsProvider(MTLSConfig(), identity=SERVICE)
        async with serving(provider) as address:
            assert not await is_plaintext(address), "the proxy has no effect: this test shows nothing"
            assert await ask(provider.channel(address, AGENT, [("grpc.enable_http_proxy", 1)])) == "nobody"


class TestEnabled:
    @pytest.mark.parametrize("allow_insecure", [True, False])
    async def test_with_client_verification_each_end_knows_the_other(
        self,
        *,
        allow_insecure: bool,
        certs: Path,
        agent: MTLSCredentialsProvider,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=True, allow_insecure=allow_insecure)
        provider = MTLSCredentialsProvider(config, identity=SERVICE)
        assert provider.mode is Mode.MUTUAL
        assert not provider.insecure_fallback
        async with serving(provider) as address:
            assert await ask(agent.channel(address, SERVICE)) == "agent-1"
            assert not await is_plaintext(address)
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(agent.channel(address, AGENT))
            assert provider.store
            anonymous = grpc.ssl_channel_credentials(provider.store.current.bundle_pem)
            options = identity_options(SERVICE)
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(grpc.aio.secure_channel(address, anonymous, options=options))
        assert not warnings(caplog)

    @pytest.mark.parametrize("allow_insecure", [True, False])
    async def test_without_client_verification_the_server_alone_is_known(
        self,
        *,
        allow_insecure: bool,
        certs: Path,
        agent: MTLSCredentialsProvider,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=False, allow_insecure=allow_insecure)
        provider = MTLSCredentialsProvider(config, identity=SERVICE)
        assert provider.mode is Mode.SERVER_ONLY
        assert not provider.insecure_fallback
        async with serving(provider) as address:
            assert await ask(agent.channel(address, SERVICE)) == "nobody"
            assert not await is_plaintext(address)
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(agent.channel(address, AGENT))

    async def test_without_client_verification_a_server_warns_once_and_a_client_does_not(
        self, certs: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        logger = logging.getLogger("given")
        config = MTLSConfig(enabled=True, certs_dir=certs)
        provider = MTLSCredentialsProvider(config, logger, identity=SERVICE)
        await provider.channel("127.0.0.1:1", AGENT).close()
        assert not warnings(caplog)
        server = grpc.aio.server()
        provider.add_port(server, "127.0.0.1:0")
        provider.add_port(server, "127.0.0.1:0")
        assert warnings(caplog) == ["clients are not authenticated: set PARALLAX_TLS_VERIFY_CLIENT=true"]
        assert caplog.records[0].name == "given"
        await server.stop(1)

    async def test_may_listen_and_dial_anywhere(self, certs: Path, agent: MTLSCredentialsProvider) -> None:
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=True)
        everywhere = f"0.0.0.0:{free_port()}"
        async with serving(MTLSCredentialsProvider(config, identity=SERVICE), everywhere) as address:
            assert await ask(agent.channel(address, SERVICE)) == "agent-1"
        await agent.channel("example.org:1", SERVICE).close()

    async def test_the_expected_identity_cannot_be_overridden_by_an_option(
        self, certs: Path, agent: MTLSCredentialsProvider
    ) -> None:
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=True)
        evil = [("grpc.ssl_target_name_override", SERVICE.dns_name)]
        async with serving(MTLSCredentialsProvider(config, identity=SERVICE)) as address:
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(agent.channel(address, AGENT, evil))

    async def test_an_own_option_reaches_the_channel(
        self, certs: Path, agent: MTLSCredentialsProvider
    ) -> None:
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=True)
        async with serving(MTLSCredentialsProvider(config, identity=SERVICE)) as address:
            with pytest.raises(grpc.aio.AioRpcError) as exc:
                await ask(agent.channel(address, SERVICE, [("grpc.max_receive_message_length", 1)]))
            assert exc.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    async def test_a_new_channel_presents_what_was_published(
        self, certs: Path, agent: MTLSCredentialsProvider, forge: Any, material: Any, now: datetime
    ) -> None:
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=True)
        made = forge(common_names=("agent-1",))
        new = Credentials((made.certificate,), made.key, material[AGENT].bundle)
        assert agent.store
        async with serving(MTLSCredentialsProvider(config, identity=SERVICE)) as address:
            agent.store.publish(new, now)
            assert await ask(agent.channel(address, SERVICE)) == "agent-1"
            assert agent.store.current is new

    def test_files_named_one_by_one_are_used(self, certs: Path) -> None:
        paths = leaf_paths(certs, Layout.PARALLAX, AGENT.name)
        config = MTLSConfig(enabled=True, cert_file=paths.cert, key_file=paths.key, ca_file=paths.ca)
        assert MTLSCredentialsProvider(config, identity=AGENT).store

    def test_content_is_used_and_may_be_mixed_with_files(self, certs: Path, material: Any) -> None:
        paths, own = leaf_paths(certs, Layout.PARALLAX, AGENT.name), material[AGENT]
        config = MTLSConfig(
            enabled=True,
            cert_pem=own.chain_pem.decode(),
            key_pem=SecretStr(own.key_pem.decode()),
            ca_file=paths.ca,
        )
        store = MTLSCredentialsProvider(config, identity=AGENT).store
        assert store
        assert store.current.chain == own.chain

    def test_a_flat_directory_is_used(self, tmp_path: Path, material: Any) -> None:
        own = material[AGENT]
        save_leaf(tmp_path, Layout.FLAT, AGENT, own.chain, own.key, own.bundle)
        config = MTLSConfig(enabled=True, certs_dir=tmp_path)
        assert MTLSCredentialsProvider(config, identity=AGENT).store

    def test_wrong_content_names_its_variable_and_shows_nothing_of_it(self, material: Any) -> None:
        own = material[AGENT]
        config = MTLSConfig(
            enabled=True,
            cert_pem=own.chain_pem.decode(),
            key_pem=SecretStr("not-a-key-but-secret"),
            ca_pem=own.bundle_pem.decode(),
        )
        text = refused(lambda: MTLSCredentialsProvider(config, identity=AGENT))
        assert text.startswith("PARALLAX_TLS_KEY_PEM: not a private key")
        assert "but-secret" not in text


def nothing(certs: Path) -> str:
    """There are no files."""
    for path in (certs / "control-plane").iterdir():
        path.unlink() if path.is_symlink() or path.is_file() else None
    return "is missing"


def no_directory(certs: Path) -> str:
    certs.rename(certs.with_name("moved"))
    return "holds no certificate of control-plane"


def torn_certificate(certs: Path) -> str:
    path = certs / "control-plane" / "cert.pem"
    path.resolve().write_bytes(path.read_bytes()[:100])
    return f"{path}: not a certificate"


def wide_key(certs: Path) -> str:
    path = certs / "control-plane" / "key.pem"
    path.chmod(0o644)
    return f"{path} is open to others"


def key_of_somebody_else(certs: Path) -> str:
    path = certs / "control-plane" / "key.pem"
    path.resolve().write_bytes((certs / "agent-1" / "key.pem").read_bytes())
    return f"{path} does not fit"


def somebody_else(certs: Path) -> str:
    (certs / "control-plane").rename(certs / "old")
    (certs / "agent-1").rename(certs / "control-plane")
    return f"{certs / 'control-plane' / 'cert.pem'} is not for {SERVICE}"


unusable = pytest.mark.parametrize(
    "spoil", [nothing, no_directory, torn_certificate, wide_key, key_of_somebody_else, somebody_else]
)


@unusable
@pytest.mark.parametrize("verify_client", [True, False])
class TestUnusable:
    """TLS was asked for and its material cannot be used."""

    def test_it_does_not_start(
        self, *, verify_client: bool, spoil: Any, certs: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cause = spoil(certs)
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=verify_client)
        assert cause in refused(lambda: MTLSCredentialsProvider(config, identity=SERVICE))
        assert not caplog.records

    async def test_it_falls_back_only_if_that_was_asked_for_and_then_warns_at_every_start(
        self, *, verify_client: bool, spoil: Any, certs: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cause = spoil(certs)
        config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=verify_client, allow_insecure=True)
        for start in (1, 2):
            provider = MTLSCredentialsProvider(config, identity=SERVICE)
            assert len(warnings(caplog)) == start
            assert cause in caplog.records[-1].__dict__["reason"]
        assert provider.insecure_fallback
        assert provider.mode is Mode.PLAINTEXT
        assert provider.store is None
        async with serving(provider) as address:
            assert await is_plaintext(address)
            assert await ask(provider.channel(address, AGENT)) == "nobody"
        for address in ELSEWHERE:
            assert "TLS material" in refused(lambda: provider.add_port(grpc.aio.server(), address))  # noqa: B023
            assert "TLS material" in refused(lambda: provider.channel(address, AGENT))  # noqa: B023


def test_expired_material_does_not_start(certs: Path, now: datetime) -> None:
    config = MTLSConfig(enabled=True, certs_dir=certs)
    later = now + timedelta(days=400)
    text = refused(lambda: MTLSCredentialsProvider(config, identity=SERVICE, clock=lambda: later))
    assert "expired at" in text


@pytest.mark.parametrize("enabled", [True, False])
async def test_a_port_that_cannot_be_bound_is_one_line_that_names_it(*, enabled: bool, certs: Path) -> None:
    config = MTLSConfig(enabled=enabled, certs_dir=certs, verify_client=True)
    provider = MTLSCredentialsProvider(config, identity=SERVICE)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in refused(lambda: provider.add_port(grpc.aio.server(), address))


@pytest.mark.parametrize(("family", "host"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
@pytest.mark.parametrize("name", ["localhost", "LocalHost"])
async def test_localhost_is_not_half_somebody_elses(
    name: str, family: socket.AddressFamily, host: str, certs: Path
) -> None:
    """gRPC would listen on the other half; who dials the name may reach either."""
    provider = MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=certs), identity=SERVICE)
    with socket.create_server((host, 0), family=family) as taken:
        address = f"{name}:{taken.getsockname()[1]}"
        assert "use a free port" in refused(lambda: provider.add_port(grpc.aio.server(), address))


@pytest.mark.parametrize("address", ["", "a b", "127.0.0.1", "127.0.0.1:", "[::1]", "::1", "localhost:http"])
@pytest.mark.parametrize("more", ["", ":99999", ":65536", ":-1", ":0x10"])
async def test_a_port_that_is_none_is_one_line_that_says_how(address: str, more: str, certs: Path) -> None:
    """gRPC would listen on 443 or on the number modulo 65536."""
    provider = MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=certs), identity=SERVICE)
    text = refused(lambda: provider.add_port(grpc.aio.server(), address + more))
    assert text.endswith("write it as host:port, port 0 to 65535")


async def test_an_address_of_another_host_cannot_be_bound(certs: Path) -> None:
    provider = MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=certs), identity=SERVICE)
    assert "192.0.2.1:0" in refused(lambda: provider.add_port(grpc.aio.server(), "192.0.2.1:0"))


async def test_a_unix_socket_is_loopback(tmp_path: Path) -> None:
    provider = MTLSCredentialsProvider(MTLSConfig(), identity=SERVICE)
    address = f"unix:{tmp_path / 's'}"
    async with serving(provider, address):
        assert await ask(provider.channel(address, AGENT)) == "nobody"


async def test_a_server_that_presents_somebody_else_is_refused(
    certs: Path, agent: MTLSCredentialsProvider, material: Any
) -> None:
    """Promise: a stolen endpoint with another agent's valid certificate gets no call."""
    config = MTLSConfig(enabled=True, certs_dir=certs, verify_client=True)
    async with serving(MTLSCredentialsProvider(config, identity=AGENT)) as address:
        with pytest.raises(grpc.aio.AioRpcError) as exc:
            await ask(agent.channel(address, SERVICE))
        assert "Hostname Verification" in (exc.value.details() or "")
        own = channel_credentials(material[AGENT])
        assert await ask(grpc.aio.secure_channel(address, own, options=identity_options(AGENT))) == "agent-1"
