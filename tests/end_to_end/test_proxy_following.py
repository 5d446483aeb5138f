"""Programs that have only a proxy: their certificate is renewed, they are told the roots, or do without."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import grpc
import psutil
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from grpc import aio
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import aio as health_aio

from parallax.protos import certificate_pb2, root_pb2
from parallax.sdk import SecureAgent, SecureGrpcAgentProxy
from parallax.sdk import keeper as keeper_module
from parallax.sdk.testing import ThrowawayPKI
from parallax.security.errors import ConfigError
from parallax.security.layouts import load_authority
from tests.end_to_end.rotations import (
    Echo,
    Member,
    only_missing,
    reached,
    roots_in,
    rotate,
    serving,
    status,
    trusted_alone,
)
from tests.ports import free_port

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Listen, Pki, Serve, Until

CLI: Final = "client/cli"
PROMPTLY_S: Final = 1.0


@pytest.fixture(autouse=True)
def _follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "WATCH_AFTER_S", 0.0)


@asynccontextmanager
async def proxy_of(
    agent: SecureAgent, pki: Pki, control_plane: str, **options: Any
) -> AsyncIterator[SecureGrpcAgentProxy]:
    assert agent.endpoint is not None
    metadata = {"id": agent.agent_id, "endpoint": agent.endpoint}
    options = {"identity": CLI, "control_plane": control_plane} | options
    async with await SecureGrpcAgentProxy.from_metadata(metadata, pki.tls(), **options) as proxy:
        yield proxy


@asynccontextmanager
async def calling(proxy: SecureGrpcAgentProxy) -> AsyncIterator[Callable[[], int]]:
    """Calls without a pause, none of which fails; how many there were."""
    done, stop = 0, asyncio.Event()

    async def call() -> None:
        nonlocal done
        while not stop.is_set():
            assert await proxy.analyze("echo", done) == (done, 1.0)
            done += 1
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        group.create_task(call())
        yield lambda: done
        stop.set()


async def fastest(agent: SecureAgent, pki: Pki, control_plane: str) -> float:
    """Seconds to come or to go, whichever is longer, of the fastest of three: on a busy machine one is."""
    took = []
    for _ in range(3):
        began = time.monotonic()
        async with proxy_of(agent, pki, control_plane) as proxy:
            came = time.monotonic() - began
            async with calling(proxy) as done:
                while done() < 50:
                    await asyncio.sleep(0.05)
            began = time.monotonic()
        took.append(max(came, time.monotonic() - began))
    return min(took)


def leaf_of(pki: Pki, name: str = "cli") -> x509.Certificate:
    return x509.load_pem_x509_certificate((pki.directory / name / "cert.pem").read_bytes())


def sockets(port: int) -> int:
    """How many connections this process has to *port*."""
    opened = [each for each in psutil.Process().net_connections("tcp") if each.status == "ESTABLISHED"]
    return len([each for each in opened if each.raddr.port == port])


def is_followed(fleet: Fleet, short: str = CLI) -> bool:
    return short in {each.short for each in fleet.plane._certificates.watchers}


@pytest.mark.parametrize("link", [True, False], ids=["link", "unary"])
async def test_a_certificate_of_a_minute_is_renewed_while_it_calls(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, *, link: bool
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, listen(Echo, tls=own_pki.tls()) as agent:
        own_pki.age(CLI, seconds=50)
        before = leaf_of(own_pki)
        async with proxy_of(agent, own_pki, fleet.address, link=link) as proxy, calling(proxy) as done:
            while datetime.now(UTC) <= before.not_valid_after_utc:
                await asyncio.sleep(0.1)
            expired = done()
            while done() < expired + 50:
                await asyncio.sleep(0.05)
        after = leaf_of(own_pki)
        assert after.not_valid_after_utc > before.not_valid_after_utc
        assert after.public_key() != before.public_key()


@pytest.mark.timeout(60)
async def test_a_rotation_of_the_root_waits_for_it_and_ends_with_it_and_no_call_fails(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path
) -> None:
    async with (
        serving(serve, own_pki, tmp_path) as fleet,
        fleet.agent(Echo, listen="127.0.0.1:0") as agent,
        proxy_of(agent, own_pki, fleet.address) as proxy,
        calling(proxy) as done,
    ):
        async with asyncio.timeout(15):
            while not is_followed(fleet):
                await asyncio.sleep(0.05)
        await rotate(fleet)
        await only_missing(fleet, root_pb2.ROOT_STAGE_PREPARED, "client/admin")
        async with Member(fleet, "client/admin").following():
            await reached(fleet, root_pb2.ROOT_STAGE_IDLE)
        root = load_authority(own_pki.directory).certificate
        await trusted_alone(root, own_pki.directory / "cli" / "ca.pem")
        ended = done()
        while done() < ended + 50:
            await asyncio.sleep(0.05)
    leaf_of(own_pki).verify_directly_issued_by(root)


async def test_one_that_has_gone_is_waited_for_by_its_certificate(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, listen(Echo, tls=own_pki.tls()) as agent:
        async with proxy_of(agent, own_pki, fleet.address):
            await until(lambda: is_followed(fleet))
        await until(lambda: not is_followed(fleet))
        await rotate(fleet)
        async with asyncio.timeout(15):
            while CLI not in (await status(fleet)).missing:
                await asyncio.sleep(0.1)


async def test_all_of_one_identity_share_one_connection_with_its_clients(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with (
        serving(serve, own_pki, tmp_path) as fleet,
        listen(Echo, tls=own_pki.tls()) as agent,
        AsyncExitStack() as stack,
    ):
        proxies = [
            await stack.enter_async_context(proxy_of(agent, own_pki, fleet.address)) for _ in range(10)
        ]

        async def followed_on_one() -> None:
            await until(lambda: is_followed(fleet) and sockets(fleet.port) == 1)

        await followed_on_one()
        for _ in range(2):
            await asyncio.to_thread(own_pki.save, CLI)  # each takes the new certificate, and closes the old
            await until(lambda: all(leaf_in_use(proxy) == leaf_of(own_pki) for proxy in proxies))
            await followed_on_one()
        async with fleet.client() as client:
            assert not await client.agents()
            await followed_on_one()
            async with fleet.client() as another:  # its own connection, for its tasks
                assert not await another.agents()
                await until(lambda: sockets(fleet.port) == 2)
                await client.close()
                await followed_on_one()
            await followed_on_one()
        for proxy in proxies[1:]:
            await proxy.close()
        await followed_on_one()
        assert await proxies[0].analyze("echo", 7) == (7, 1.0)
        await proxies[0].close()
        await until(lambda: not is_followed(fleet) and not sockets(fleet.port))


def leaf_in_use(proxy: SecureGrpcAgentProxy) -> x509.Certificate:
    credentials = proxy._route.connection.use().credentials
    assert credentials is not None
    return credentials.leaf


@pytest.mark.timeout(60)
async def test_who_comes_and_goes_while_certificates_change_leaves_nothing_behind(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    before = asyncio.all_tasks()
    async with serving(serve, own_pki, tmp_path) as fleet, listen(Echo, tls=own_pki.tls()) as agent:
        running = asyncio.all_tasks()
        dice = random.Random(7)  # noqa: S311 - the same each time
        stop = asyncio.Event()

        async def come_and_go() -> None:
            while not stop.is_set():
                if dice.random() < 0.5:
                    async with proxy_of(agent, own_pki, fleet.address) as proxy:
                        await asyncio.sleep(dice.random() / 5)
                        assert await proxy.analyze("echo", 7) == (7, 1.0)
                else:
                    async with fleet.client() as client:
                        await asyncio.sleep(dice.random() / 5)
                        assert not await client.agents()
                await asyncio.sleep(dice.random() / 5)

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(come_and_go())
            for _ in range(20):
                await asyncio.to_thread(own_pki.save, CLI)
                await asyncio.sleep(0.2)
            stop.set()
        await until(lambda: not is_followed(fleet) and not sockets(fleet.port))
        await until(lambda: not followers(running))
        async with proxy_of(agent, own_pki, fleet.address):
            await until(lambda: is_followed(fleet) and sockets(fleet.port) == 1)
    assert not followers(before)


def followers(but: set[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """The tasks of ours that are there, *but* these."""
    ours = ("Route.", "Keeper.", "_Followed.", "BundleFollower.")
    found = asyncio.all_tasks() - but
    return [each for each in found if any(name in repr(each.get_coro()) for name in ours)]


async def test_each_identity_is_followed_by_itself(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    async with (
        serving(serve, own_pki, tmp_path) as fleet,
        listen(Echo, tls=own_pki.tls()) as agent,
        proxy_of(agent, own_pki, fleet.address),
        proxy_of(agent, own_pki, fleet.address, identity="client/admin"),
    ):
        await until(lambda: is_followed(fleet) and is_followed(fleet, "client/admin"))
        await until(lambda: sockets(fleet.port) == 2)  # and for a moment that of the port's own probe


async def test_the_environment_names_the_control_plane_and_the_argument_wins(
    serve: Serve,
    listen: Listen,
    own_pki: Pki,
    tmp_path: Path,
    until: Until,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(serve, own_pki, tmp_path) as fleet, listen(Echo, tls=own_pki.tls()) as agent:
        monkeypatch.setenv("PARALLAX_CONTROL_PLANE", fleet.address)
        metadata = {"id": "agent-1", "endpoint": agent.endpoint}
        async with await SecureGrpcAgentProxy.from_metadata(metadata, own_pki.tls(), identity=CLI):
            await until(lambda: is_followed(fleet))
        await until(lambda: not is_followed(fleet))
        async with proxy_of(agent, own_pki, "none") as proxy:
            own_pki.age(CLI, seconds=50)
            await until(lambda: leaf_in_use(proxy) == leaf_of(own_pki))
            await asyncio.sleep(0.5)  # it is due
            assert leaf_in_use(proxy) == leaf_of(own_pki)
            assert not is_followed(fleet)
            await until(lambda: not sockets(fleet.port))
        with pytest.raises(ConfigError, match="control_plane"):
            await SecureGrpcAgentProxy.from_metadata(metadata, own_pki.tls(), control_plane="nowhere")


@asynccontextmanager
async def silence() -> AsyncIterator[str]:
    """Where the system takes connections, and nobody ever says anything."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@asynccontextmanager
async def nobody() -> AsyncIterator[str]:
    yield "localhost:1"


@pytest.mark.parametrize("away", [nobody, silence])
async def test_a_control_plane_that_is_away_delays_and_fails_nothing_and_is_not_talked_about(
    listen: Listen, own_pki: Pki, until: Until, caplog: pytest.LogCaptureFixture, away: Any
) -> None:
    caplog.set_level(logging.INFO)
    async with listen(Echo, tls=own_pki.tls()) as agent, away() as address:
        async with proxy_of(agent, own_pki, address) as proxy, calling(proxy) as done:
            for _ in range(3):
                await asyncio.to_thread(own_pki.save, CLI)
                await until(lambda: leaf_in_use(proxy) == leaf_of(own_pki))
            while done() < 100:
                await asyncio.sleep(0.05)
        assert await fastest(agent, own_pki, address) < PROMPTLY_S
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    said = [each for each in warnings if each.name != "parallax.agent"]  # which is on its own, and says so
    assert not said, [each.getMessage() for each in said]


@pytest.mark.parametrize("away", [nobody, silence])
async def test_one_that_is_away_when_a_renewal_is_due_keeps_nobody_from_calling_or_closing(
    listen: Listen, own_pki: Pki, until: Until, caplog: pytest.LogCaptureFixture, away: Any
) -> None:
    caplog.set_level(logging.INFO)
    own_pki.age(CLI, seconds=45)
    async with listen(Echo, tls=own_pki.tls()) as agent, away() as address:
        async with proxy_of(agent, own_pki, address) as proxy:
            if away is nobody:
                await until(lambda: "certificate not renewed, what was in force stays so" in caplog.messages)
            async with calling(proxy) as done:
                while done() < 50:
                    await asyncio.sleep(0.05)
        assert await fastest(agent, own_pki, address) < PROMPTLY_S


async def test_a_control_plane_that_comes_later_is_found(
    serve: Serve, listen: Listen, own_pki: Pki, tmp_path: Path, until: Until
) -> None:
    port = free_port()
    async with listen(Echo, tls=own_pki.tls()) as agent, proxy_of(agent, own_pki, f"localhost:{port}"):
        await asyncio.sleep(0.5)  # it has been asked for, in vain
        async with serving(serve, own_pki, tmp_path, listen=f"127.0.0.1:{port}") as fleet:
            await until(lambda: is_followed(fleet))


@asynccontextmanager
async def telling(leaf: Leaf, *roots: x509.Certificate) -> AsyncIterator[str]:
    """Where the holder of *leaf* is healthy, and tells everybody to trust *roots*."""

    async def tell(request: bytes, context: Any) -> AsyncIterator[bytes]:
        bundle = certificate_pb2.TrustBundle(roots=[root.public_bytes(Encoding.DER) for root in roots])
        yield certificate_pb2.WatchTrustBundleResponse(bundle=bundle).SerializeToString()
        await asyncio.sleep(60)

    handler: grpc.RpcMethodHandler[Any, Any] = grpc.unary_stream_rpc_method_handler(tell)
    server = aio.server()
    health_pb2_grpc.add_HealthServicer_to_server(health_aio.HealthServicer(), server)
    server.add_registered_method_handlers("parallax.v1.CertificateService", {"WatchTrustBundle": handler})
    credentials = grpc.ssl_server_credentials(
        [(leaf.key_pem, leaf.chain_pem)], leaf.bundle_pem, require_client_auth=True
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield f"localhost:{port}"
    finally:
        await server.stop(None)


@pytest.mark.parametrize(("who", "is_believed"), [("service/control-plane", True), ("agent/agent-1", False)])
async def test_whom_to_trust_the_control_plane_says_and_no_agent_wherever_it_is(
    listen: Listen, own_pki: Pki, until: Until, who: str, *, is_believed: bool
) -> None:
    """The address that is named as the control plane's may be an agent's own."""
    added = ThrowawayPKI().authority.certificate
    leaf = own_pki.issue(who)
    trusted = own_pki.directory / "cli" / "ca.pem"
    async with (
        listen(Echo, tls=own_pki.tls()) as agent,
        telling(leaf, own_pki.authority.certificate, added) as address,
    ):
        metadata = {"id": "agent-1", "endpoint": agent.endpoint if is_believed else address}
        async with await SecureGrpcAgentProxy.from_metadata(
            metadata, own_pki.tls(), identity=CLI, control_plane=address, link=False
        ) as proxy:
            if is_believed:
                await until(lambda: added in roots_in(trusted))
            for _ in range(10):
                assert await proxy.check_health()
                await asyncio.sleep(0.1)
        assert (added in roots_in(trusted)) is is_believed
