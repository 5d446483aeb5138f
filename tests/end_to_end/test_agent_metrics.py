"""What an agent tells its operator, over plain HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from parallax.runtime.probe import EVERY_S
from parallax.sdk import SecureGrpcAgentProxy
from parallax.security.config import MTLSConfig
from parallax.security.errors import TaskFailed
from parallax.security.renewal import plan_renewal

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children, Fleet, Pki, Serve, Until

WITHIN_S = 15.0
METRICS = {"PARALLAX_METRICS_LISTEN": "127.0.0.1:0"}
DURATION = "parallax_tls_handshake_duration_seconds"
PEER, OWN_PORT = '{side="peer"}', '{side="own_port"}'
SUCCESS = 'parallax_tls_handshakes_total{result="SUCCESS"}'
TRIED, REFUSED = (f'parallax_connections_moved_total{{result="{result}"}}' for result in ("tried", "refused"))


def listens(fleet: Fleet) -> dict[str, str]:
    """For an agent that is dialled."""
    return {"PARALLAX_CONTROL_PLANE": fleet.address, "PARALLAX_LISTEN": "127.0.0.1:0", "SESSION": "no"}


def in_force(pki: Pki) -> dict[str, str]:
    leaf = x509.load_pem_x509_certificate((pki.directory / "agent-1" / "cert.pem").read_bytes())
    due = plan_renewal(leaf).due
    return {"certificate agent-1": f"in force, to be renewed at {due:%Y-%m-%dT%H:%M:%SZ}"}


async def listener(agent: Child, fleet: Fleet) -> Fleet:
    """The same fleet, its metrics port the agent's."""
    ready = await agent.said("metrics ready")
    return type(fleet)(fleet.pki, fleet.tls, 0, ready["metrics_port"])


async def timed(shown: Fleet, side: str, count: int) -> dict[str, float]:
    """What is shown once *count* handshakes were timed, for which nobody waits."""
    async with asyncio.timeout(WITHIN_S):
        while (series := await shown.metrics())[f"{DURATION}_count{side}"] < count:
            await asyncio.sleep(0.05)
    return series


async def test_an_agent_shows_its_connection_its_certificate_and_what_it_works_on(
    children: Children, fleet: Fleet, pki: Pki, tmp_path: Path, until: Until
) -> None:
    shown = await listener(await children.agent(fleet, **METRICS), fleet)
    assert await shown.http("/healthz") == (200, "ok")
    series = await shown.metrics()
    assert series["parallax_agent_connected"] == 1
    assert series["parallax_insecure_mode"] == 0
    expiry = series['parallax_certificate_not_after_timestamp_seconds{name="agent-1"}']
    assert expiry - pki.now.timestamp() == pytest.approx(86_400, abs=2)

    held = tmp_path / "held"
    held.touch()
    async with fleet.client() as client:
        with pytest.raises(TaskFailed, match="DEADLINE_EXCEEDED"):
            await client.analyze("agent-1", "cling", str(held), timeout=3)  # by then it has begun
        async with asyncio.timeout(WITHIN_S):  # the agent has a deadline of its own, a moment later
            while (series := await shown.metrics())["parallax_agent_slots_overdue"] != 1:
                await asyncio.sleep(0.05)
        assert series["parallax_agent_tasks_in_flight"] == 0
        held.unlink()
        while (await shown.metrics())["parallax_agent_slots_overdue"]:
            await client.analyze("agent-1", "echo")


async def test_an_agent_is_ready_while_it_is_connected_and_says_it_is_healthy(
    children: Children, fleet: Fleet, tmp_path: Path
) -> None:
    health = tmp_path / "health"
    agent = await children.agent(fleet, **METRICS, HEALTH_FILE=str(health))
    shown = await listener(agent, fleet)
    ready, detail = await shown.http("/readyz")
    assert (ready, json.loads(detail)["detail"]) == (
        200,
        {"connected": "true", "healthy": "true", **in_force(fleet.pki)},
    )
    for state in ("ill", "neither"):  # the second one makes `check_health` raise
        health.write_text(state)
        ready, detail = await shown.http("/readyz")
        assert (ready, json.loads(detail)["detail"]) == (
            503,
            {"connected": "true", "healthy": "false", **in_force(fleet.pki)},
        )
    await agent.said("check_health failed")  # the log is written by a thread of its own


async def test_an_agent_times_its_sessions_and_counts_how_they_move(
    children: Children, new_pki: type[Pki], tmp_path: Path, until: Until
) -> None:
    site = new_pki(tmp_path / "certs")
    site.save("service/control-plane", "agent/agent-1")
    _, fleet = await children.fleet(site)
    agent = await children.agent(fleet, **METRICS)
    shown = await listener(agent, fleet)
    series = await timed(shown, PEER, 1)
    assert (series[f"{DURATION}_count{PEER}"], series[TRIED], series[REFUSED]) == (1, 0, 0)
    site.save_foreign("agent/agent-1")
    await agent.said("no session with the new certificate, the old one goes on")
    series = await shown.metrics()
    assert (series[f"{DURATION}_count{PEER}"], series[TRIED]) == (1, 0)
    assert series[REFUSED] >= 1
    site.save("agent/agent-1")
    await agent.said("session moved")
    series = await timed(shown, PEER, 2)
    assert (series[f"{DURATION}_count{PEER}"], series[TRIED]) == (2, 1)
    assert 0 < series[f"{DURATION}_sum{PEER}"] < 5
    # It has no port.
    assert not [name for name in series if name.startswith("parallax_tls_handshakes_total")]
    assert f"{DURATION}_count{OWN_PORT}" not in series
    assert "own port" not in json.loads((await shown.http("/readyz"))[1])["detail"]


async def test_an_agent_that_listens_probes_its_port_and_counts_who_is_let_in(
    children: Children, fleet: Fleet, until: Until
) -> None:
    agent = children.start_agent(fleet.pki.environment | METRICS | listens(fleet))
    endpoint = (await agent.said("registered"))["endpoint"]
    shown = await listener(agent, fleet)
    async with fleet.client() as client:
        await client.analyze("agent-1", "echo", wait_for_agent=10)
    series = await timed(shown, OWN_PORT, 1)
    # The control plane's link; the probe makes no call. Of those that fail, gRPC tells nobody but stderr.
    results = {name: value for name, value in series.items() if "parallax_tls_handshakes_total" in name}
    assert results == {SUCCESS: 1}
    metadata = {"id": "agent-1", "endpoint": endpoint}
    for _ in range(2):
        async with await SecureGrpcAgentProxy.from_metadata(metadata, fleet.tls) as proxy:
            await proxy.analyze("echo", 1)
    assert (await shown.metrics())[SUCCESS] == 3
    status, body = await shown.http("/readyz")
    assert (status, json.loads(body)["detail"]["own port"]) == (200, "answers")


@pytest.mark.timeout(60)
async def test_an_agent_that_nobody_could_dial_is_not_ready(
    children: Children, fleet: Fleet, pki: Pki
) -> None:
    """Its certificate carries no DNS name that is verified, as one made by hand may not."""
    leaf = pki.forge("agent-1", uris=["spiffe://parallax.local/agent/agent-1"])
    material = {
        "PARALLAX_TLS_ENABLED": "true",
        "PARALLAX_TLS_VERIFY_CLIENT": "true",
        "PARALLAX_TLS_CA_PEM": leaf.bundle_pem.decode(),
        "PARALLAX_TLS_CERT_PEM": leaf.chain_pem.decode(),
        "PARALLAX_TLS_KEY_PEM": leaf.key_pem.decode(),
    }
    agent = children.start_agent(material | METRICS | listens(fleet))
    shown = await listener(agent, fleet)
    await agent.said("registered")
    async with asyncio.timeout(2 * EVERY_S):  # one failure may be chance
        while (await shown.http("/readyz"))[0] == 200:
            await asyncio.sleep(0.1)
    detail = json.loads((await shown.http("/readyz"))[1])["detail"]
    assert (detail["serving"], detail["registered"], detail["healthy"]) == ("true", "true", "true")
    assert "refuses our own certificate" in detail["own port"]


async def test_plaintext_is_no_handshake(children: Children, serve: Serve) -> None:
    async with serve(tls=MTLSConfig(enabled=False)) as fleet:
        dials = {"PARALLAX_CONTROL_PLANE": fleet.address, "PARALLAX_LISTEN": "127.0.0.1:0"}
        agent = children.start_agent(dials | METRICS)
        shown = await listener(agent, fleet)
        await agent.said("connected")
        await agent.said("registered")
        series = await shown.metrics()
        assert series["parallax_insecure_mode"] == 1
        timed = [name for name, value in series.items() if name.startswith(DURATION) and value]
        assert all(name.startswith(f"{DURATION}_created") for name in timed)
        assert series[SUCCESS] == 0


async def test_an_agent_that_finds_no_control_plane_is_alive_and_not_ready(
    children: Children, fleet: Fleet, pki: Pki
) -> None:
    dials = {"PARALLAX_CONTROL_PLANE": "localhost:1"}
    shown = await listener(children.start_agent(pki.environment | dials | METRICS), fleet)
    assert (await shown.http("/healthz"))[0] == 200
    ready, detail = await shown.http("/readyz")
    assert (ready, json.loads(detail)["detail"]["connected"]) == (503, "false")
    series = await shown.metrics()
    assert series["parallax_agent_connected"] == 0
    assert series[f"{DURATION}_count{PEER}"] == 0
