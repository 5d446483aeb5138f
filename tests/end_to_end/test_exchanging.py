"""Agents with pinned certificates for which the port has no room: they exchange them by themselves."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.x509 import Certificate

from parallax.control_plane import pin_index
from parallax.runtime.http import HttpPort
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.sdk.enrolling import ANSWER_S
from parallax.sdk.testing import ThrowawayPKI
from parallax.security.bundle import parse_certificates
from parallax.security.config import MTLSConfig
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import Unavailable
from parallax.security.https import server_context
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, leaf_paths, save_leaf
from parallax.security.pinned import is_self_signed
from parallax.security.profiles import LeafProfile
from tests.end_to_end.test_enrollment import refusals
from tests.end_to_end.test_exchange import Device, gone, pin
from tests.end_to_end.test_pins import WITHIN_S, let_in
from tests.ports import free_port

if TYPE_CHECKING:
    from parallax.runtime.http import Receive, Scope, Send
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve, Until

WHO = Identity.parse_short("agent/07048933")

Hanging = Callable[[asyncio.Event], AbstractAsyncContextManager[int]]


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


@pytest.fixture
def device() -> Device:
    return Device.make(WHO)


@pytest.fixture
def tls(pki: Pki, device: Device, tmp_path: Path) -> MTLSConfig:
    """The settings of the device, whose files lie in a directory of its own."""
    return place(device, pki, tmp_path / "own")


def place(device: Device, pki: Pki, directory: Path) -> MTLSConfig:
    """The settings of *device*, whose files are put into *directory*."""
    bundle = pki.authority.bundle
    save_leaf(directory, Layout.PARALLAX, device.who, (device.certificate,), device.key, bundle)
    return MTLSConfig(enabled=True, certs_dir=directory, verify_client=True)


@pytest.fixture
def no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pin_index, "MAX_ON_PORT", 0)


@pytest.fixture
async def fleet(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    async with serve(http_listen="127.0.0.1:0", drain_seconds=0.0) as running:
        monkeypatch.setenv("PARALLAX_ENROLL_URL", f"https://localhost:{running.http_port}")
        yield running


def kept(tls: MTLSConfig, who: Identity = WHO) -> Certificate:
    """What lies there as the device's own."""
    paths = leaf_paths(tls.certs_dir, Layout.PARALLAX, who.name)
    return parse_certificates(paths.cert.read_bytes())[0]


def new_agent(tls: MTLSConfig, address: str, **options: Any) -> Echo:
    return Echo(WHO.name, "A device", ["echo"], tls=tls, control_plane=address, **options)


@asynccontextmanager
async def trying(agent: SecureAgent) -> AsyncIterator[None]:
    """The agent tries to go online meanwhile, and must not succeed."""

    async def go_online() -> None:
        async with agent:
            pytest.fail("it is let in")

    task = asyncio.create_task(go_online())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.usefixtures("no_room")
@pytest.mark.parametrize(
    "reached", [{}, {"listen": "127.0.0.1:0", "session": False}], ids=["dials", "listens"]
)
async def test_an_agent_exchanges_it_by_itself_and_works(
    fleet: Fleet, device: Device, tls: MTLSConfig, reached: dict[str, Any]
) -> None:
    await pin(fleet, device)
    async with new_agent(tls, fleet.address, **reached), fleet.client() as client:
        assert kept(tls).issuer == fleet.pki.authority.certificate.subject
        assert (await client.analyze(WHO.name, "echo", 1)).value == 1
    await gone(fleet, WHO)  # the new one was seen in use


@pytest.mark.usefixtures("no_room")
async def test_an_agent_that_was_there_first_waits_for_its_control_plane_and_pin(
    serve: Serve, device: Device, tls: MTLSConfig, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    port, http_port = free_port(), free_port()
    monkeypatch.setenv("PARALLAX_ENROLL_URL", f"https://localhost:{http_port}")
    online = asyncio.Event()

    async def work() -> None:
        async with new_agent(tls, f"localhost:{port}"):
            online.set()

    working = asyncio.create_task(work())
    async with serve(listen=f"127.0.0.1:{port}", http_listen=f"127.0.0.1:{http_port}") as fleet:
        await until(lambda: fleet.plane.refusals._counts._counts)  # nobody has pinned it yet
        await pin(fleet, device)
        async with asyncio.timeout(15):
            await working
    assert online.is_set()
    assert not is_self_signed(kept(tls))


async def test_one_that_the_port_lets_in_stays_as_it_is(
    fleet: Fleet, device: Device, tls: MTLSConfig
) -> None:
    await pin(fleet, device)
    await let_in(fleet, device.leaf(fleet.pki))
    async with new_agent(tls, fleet.address), fleet.client() as client:
        assert (await client.analyze(WHO.name, "echo", 1)).value == 1
    assert kept(tls) == device.certificate


async def test_a_port_that_is_away_is_no_reason_to_exchange_it(
    fleet: Fleet, device: Device, tls: MTLSConfig, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    """Where one enrolls somebody answers, and would."""
    await pin(fleet, device)
    async with trying(new_agent(tls, f"localhost:{free_port()}")):
        await until(lambda: "not connected" in caplog.messages)
        await asyncio.sleep(1)  # for what is not to happen
    assert kept(tls) == device.certificate
    assert not await fleet.plane.ledger.held(WHO)


# What it does not change.


async def test_one_that_nobody_has_pinned_is_kept_out_as_before(
    fleet: Fleet, device: Device, tls: MTLSConfig, until: Until, caplog: pytest.LogCaptureFixture
) -> None:
    async with trying(new_agent(tls, fleet.address)):
        record = await until(lambda: said(caplog))
    assert "ask an administrator whether it is pinned" in record.cause
    assert kept(tls) == device.certificate
    assert not await fleet.plane.ledger.held(WHO)
    assert {deed.detail["reason"] for deed in await refusals(fleet)} == {"enrollment_error"}


@pytest.mark.usefixtures("no_room")
async def test_who_has_other_roots_is_sent_no_proof(
    fleet: Fleet,
    device: Device,
    tls: MTLSConfig,
    serve: Serve,
    new_pki: type[Pki],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Another fleet's control plane answers where one enrolls, and would exchange what it has pinned, too."""
    await pin(fleet, device)
    stranger = new_pki(tmp_path / "elsewhere")
    stranger.save("service/control-plane", "service/agent-proxy")
    async with serve(tls=stranger.tls(), http_listen="127.0.0.1:0") as other:
        await pin(other, device)
        monkeypatch.setenv("PARALLAX_ENROLL_URL", f"https://localhost:{other.http_port}")
        async with trying(new_agent(tls, fleet.address)):
            record = await until(lambda: said(caplog))
    assert record.cause.startswith("UntrustedChain: ")
    assert kept(tls) == device.certificate


@pytest.mark.usefixtures("no_room")
async def test_where_nobody_enrolls_the_log_names_the_setting(
    fleet: Fleet,
    device: Device,
    tls: MTLSConfig,
    monkeypatch: pytest.MonkeyPatch,
    until: Until,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await pin(fleet, device)
    monkeypatch.setenv("PARALLAX_ENROLL_URL", "https://localhost:1")
    async with trying(new_agent(tls, fleet.address)):
        record = await until(lambda: said(caplog))
    assert "PARALLAX_ENROLL_URL" in record.cause
    assert kept(tls) == device.certificate


@pytest.mark.usefixtures("no_room")
async def test_files_that_are_somebody_elses_stay_as_they_are(
    fleet: Fleet,
    device: Device,
    pki: Pki,
    tmp_path: Path,
    until: Until,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing is asked for: another one would be in force until the next start only."""
    place = tmp_path / "mounted"
    save_leaf(place, Layout.PARALLAX, WHO, (device.certificate,), device.key, pki.authority.bundle)
    paths = leaf_paths(place, Layout.PARALLAX, WHO.name)
    tls = MTLSConfig(enabled=True, cert_file=paths.cert, key_file=paths.key, ca_file=paths.ca)
    await pin(fleet, device)
    async with trying(new_agent(tls, fleet.address)):
        await until(lambda: "not connected" in caplog.messages)
        await asyncio.sleep(1)  # for what is not to happen
    assert parse_certificates(paths.cert.read_bytes()) == (device.certificate,)
    assert not await fleet.plane.ledger.held(WHO)


@pytest.mark.usefixtures("no_room")
async def test_a_client_exchanges_nothing_and_is_let_in_after_the_command(
    fleet: Fleet, pki: Pki, tmp_path: Path, children: Children
) -> None:
    device = Device.make(Identity.parse_short("client/gauge"))
    tls = place(device, pki, tmp_path / "own")
    await pin(fleet, device)
    client = ParallaxClient(fleet.address, tls, identity=device.who.short)
    with pytest.raises(Unavailable, match="cannot reach the control plane"):
        await client.__aenter__()
    assert kept(tls, device.who) == device.certificate
    settings = {
        "PARALLAX_CERTS_DIR": str(tls.certs_dir),
        "PARALLAX_CONTROL_PLANE": fleet.address,
        "PARALLAX_ENROLL_URL": f"https://localhost:{fleet.http_port}",
    }
    renewing = (sys.executable, "-m", "parallax.sdk.cli", "certs", "renew", device.who.name)
    assert await children.start(*renewing, **settings).ended() == 0
    async with client:
        assert not is_self_signed(kept(tls, device.who))


# What it does not hold up.


class Silent(asyncio.Protocol):
    """Hears what is sent, and says nothing."""

    def __init__(self, asked: asyncio.Event) -> None:
        self._asked = asked

    def data_received(self, _data: bytes) -> None:
        self._asked.set()


@asynccontextmanager
async def hanging_in_handshake(asked: asyncio.Event) -> AsyncIterator[int]:
    """A port that takes connections, and no more."""
    server = await asyncio.get_running_loop().create_server(lambda: Silent(asked), "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@asynccontextmanager
async def hanging_in_answer(asked: asyncio.Event) -> AsyncIterator[int]:
    """An HTTPS listener that answers nothing."""

    async def hang(_scope: Scope, receive: Receive, _send: Send) -> None:
        asked.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    who, key = control_plane(), generate_key()
    issued = ThrowawayPKI().authority.issue(who, key.public_key(), LeafProfile(), datetime.now(UTC))
    store = CredentialStore(who, Credentials(issued.chain, key, issued.bundle), datetime.now(UTC))
    async with HttpPort(hang, "127.0.0.1:0", "X", context=server_context(store)) as port:
        yield port.port


@pytest.mark.timeout(60)
@pytest.mark.parametrize("hanging", [hanging_in_handshake, hanging_in_answer])
async def test_where_one_enrolls_and_nobody_answers_an_agent_stops_at_once_all_the_same(
    fleet: Fleet, tls: MTLSConfig, children: Children, hanging: Hanging
) -> None:
    asked = asyncio.Event()
    async with hanging(asked) as port:
        settings = {
            "PARALLAX_CERTS_DIR": str(tls.certs_dir),
            "PARALLAX_CONTROL_PLANE": fleet.address,
            "PARALLAX_ENROLL_URL": f"https://127.0.0.1:{port}",
        }
        child = children.start_agent(fleet.pki.environment | settings, name=WHO.name)
        async with asyncio.timeout(2 * WITHIN_S):  # it has to start, and to be refused
            await asked.wait()
        began = time.monotonic()
        assert await child.stop() == 0
    assert time.monotonic() - began < ANSWER_S / 2, "for which it would wait otherwise"


def said(caplog: pytest.LogCaptureFixture) -> Any:
    """The record that it is neither let in nor exchanged, once there is one."""
    event = "a self-signed certificate is not let in, nor exchanged"
    return next((each for each in caplog.records if each.getMessage() == event), None)
