"""What a program that asks others tells its operator, where `PARALLAX_METRICS_LISTEN` says so."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

import pytest
from cryptography import x509

from parallax.sdk import SecureGrpcAgentProxy
from parallax.sdk import keeper as keeper_module
from parallax.security.renewal import plan_renewal
from tests.end_to_end.conftest import Fleet
from tests.end_to_end.rotations import Echo

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Listen, Pki, Serve, Until

WITHIN_S: Final = 20.0
CLI: Final = "client/cli"
VARIABLE: Final = "PARALLAX_METRICS_LISTEN"
EXPIRES: Final = 'parallax_certificate_not_after_timestamp_seconds{name="cli"}'
ROTATED: Final = 'parallax_certificate_rotations_total{name="cli",result="success"}'
DAMAGED: Final = 'parallax_certificate_rotations_total{name="cli",result="damaged"}'
RENEWED: Final = 'parallax_certificate_renewals_total{name="cli",result="success"}'
DUE: Final = 'parallax_certificate_renewal_timestamp_seconds{name="cli"}'
MOVED: Final = 'parallax_connections_moved_total{result="tried"}'
TIMED: Final = 'parallax_tls_handshake_duration_seconds_count{side="peer"}'

Listening = Callable[[], Awaitable[Fleet]]


@pytest.fixture(autouse=True)
def _follow_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "WATCH_AFTER_S", 0.0)
    monkeypatch.setenv(VARIABLE, "127.0.0.1:0")


@pytest.fixture
def shown(own_pki: Pki, caplog: pytest.LogCaptureFixture, until: Until) -> Listening:
    """Where the program that started last shows its metrics, as soon as it does."""
    caplog.set_level(logging.INFO)

    def ports() -> list[int]:
        records = [each for each in caplog.records if each.name == keeper_module.__name__]
        return [each.__dict__["metrics_port"] for each in records if each.getMessage() == "metrics ready"]

    async def wait() -> Fleet:
        await until(lambda: ports() or None)
        return Fleet(own_pki, own_pki.tls(), 0, ports()[-1])

    return wait


async def ready(shown: Fleet) -> tuple[int, str]:
    """Status, and what is said of the certificate."""
    status, body = await shown.http("/readyz")
    return status, json.loads(body)["detail"]["certificate cli"]


async def reach(shown: Fleet, **least: float) -> dict[str, float]:
    """The series, once those named are no less than so."""
    named = {"rotated": ROTATED, "damaged": DAMAGED, "renewed": RENEWED, "moved": MOVED, "timed": TIMED}
    async with asyncio.timeout(WITHIN_S):
        while True:
            series = await shown.metrics()
            if all(series[named[name]] >= value for name, value in least.items()):
                return series
            await asyncio.sleep(0.05)


def leaf(pki: Pki) -> x509.Certificate:
    return x509.load_pem_x509_certificate((pki.directory / "cli" / "cert.pem").read_bytes())


async def test_a_client_shows_its_certificate_its_files_its_renewals_and_its_connections(
    serve: Serve, own_pki: Pki, shown: Listening
) -> None:
    own_pki.save(CLI)
    cert = own_pki.directory / "cli" / "cert.pem"
    async with serve(tls=own_pki.tls()) as fleet, fleet.client():
        here = await shown()
        series = await reach(here, timed=1)  # the first one, which was there before there were metrics
        assert series[EXPIRES] == leaf(own_pki).not_valid_after_utc.timestamp()
        assert series[DUE] == plan_renewal(leaf(own_pki)).due.timestamp()
        assert (series[ROTATED], series[DAMAGED], series[RENEWED], series[MOVED]) == (0, 0, 0, 0)
        assert series["parallax_insecure_mode"] == 0
        assert not [name for name in series if name.startswith("parallax_tls_handshakes_total")]  # no port
        assert (await here.http("/healthz"))[0] == 200
        due = plan_renewal(leaf(own_pki)).due
        assert await ready(here) == (200, f"in force, to be renewed at {due:%Y-%m-%dT%H:%M:%SZ}")

        whole = cert.read_bytes()
        cert.write_bytes(whole[:100])
        await reach(here, damaged=1)
        status, detail = await ready(here)
        assert (status, detail.partition(" since ")[0]) == (
            200,
            "the last good one is in force, files damaged",
        )
        cert.write_bytes(whole)

        own_pki.age(CLI, seconds=50)
        series = await reach(here, renewed=1, rotated=2, moved=1, timed=2)
        assert series[EXPIRES] == leaf(own_pki).not_valid_after_utc.timestamp()


async def test_it_is_not_ready_once_its_certificate_has_expired_and_is_again_with_another(
    serve: Serve, own_pki: Pki, shown: Listening, until: Until
) -> None:
    ends = datetime.now(UTC) + timedelta(seconds=5)
    own_pki.save(CLI, now=ends - timedelta(days=1))
    (own_pki.directory / "ca" / "key.pem").unlink()  # else it would be renewed
    async with serve(tls=own_pki.tls()) as fleet, fleet.client():
        here = await shown()
        await until(lambda: datetime.now(UTC) > ends + timedelta(seconds=1))
        assert await ready(here) == (503, "in force, but expired")
        own_pki.save(CLI, now=datetime.now(UTC))
        await reach(here, rotated=1)
        assert (await ready(here))[0] == 200


@pytest.mark.parametrize("link", [True, False], ids=["link", "unary"])
async def test_a_proxy_on_its_own_shows_what_there_is(
    listen: Listen, own_pki: Pki, shown: Listening, *, link: bool
) -> None:
    own_pki.save(CLI, "agent/agent-1")
    async with listen(Echo, tls=own_pki.tls()) as agent:
        assert agent.endpoint is not None
        metadata = {"id": agent.agent_id, "endpoint": agent.endpoint}
        async with await SecureGrpcAgentProxy.from_metadata(
            metadata, own_pki.tls(), identity=CLI, control_plane="none", link=link
        ):
            here = await shown()
            series = await reach(here, timed=1)
            assert EXPIRES in series
            assert DUE not in series  # nobody would renew it
            assert await ready(here) == (200, "in force")
            own_pki.save(CLI)
            await reach(here, rotated=1, moved=1, timed=2)


async def test_a_place_that_is_taken_costs_the_metrics_and_no_call(
    serve: Serve,
    own_pki: Pki,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    until: Until,
) -> None:
    own_pki.save(CLI, "agent/agent-1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with serve(tls=own_pki.tls()) as fleet, fleet.agent(Echo):
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            monkeypatch.setenv(VARIABLE, address)
            async with fleet.client() as client:
                await until(lambda: "metrics are not served" in caplog.text)
                (record,) = [each for each in caplog.records if each.getMessage() == "metrics are not served"]
                assert address in record.__dict__["cause"]
                own_pki.age(CLI, seconds=50)
                aged = leaf(own_pki)
                await until(lambda: leaf(own_pki) != aged)  # it is renewed all the same
                assert (await client.analyze("agent-1", "echo", 7)).value == 7


async def test_where_nothing_is_said_nothing_is_shown(
    serve: Serve, own_pki: Pki, monkeypatch: pytest.MonkeyPatch, until: Until
) -> None:
    own_pki.save(CLI)
    monkeypatch.delenv(VARIABLE)

    shown: list[object] = []

    async def show(*where: object) -> None:
        shown.append(where)

    monkeypatch.setattr(keeper_module.Keeper, "_show", show)
    async with serve(tls=own_pki.tls()) as fleet, fleet.client() as client:
        await client.agents()
        assert client._route is not None
        keeper = client._route._keeper
        await until(lambda: keeper._rotator is not None)  # by when it would be
        await asyncio.sleep(0)
        assert not shown
