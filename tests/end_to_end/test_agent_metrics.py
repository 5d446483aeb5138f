"""What an agent tells its operator, over plain HTTP on loopback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography import x509

from parallax.security.errors import TaskFailed
from parallax.security.renewal import plan_renewal

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children, Fleet, Pki, Until

METRICS = {"PARALLAX_METRICS_LISTEN": "127.0.0.1:0"}


def in_force(pki: Pki) -> dict[str, str]:
    leaf = x509.load_pem_x509_certificate((pki.directory / "agent-1" / "cert.pem").read_bytes())
    due = plan_renewal(leaf).due
    return {"certificate agent-1": f"in force, to be renewed at {due:%Y-%m-%dT%H:%M:%SZ}"}


async def listener(agent: Child, fleet: Fleet) -> Fleet:
    """The same fleet, its metrics port the agent's."""
    ready = await agent.said("metrics ready")
    return type(fleet)(fleet.pki, fleet.tls, 0, ready["metrics_port"])


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
            await client.analyze("agent-1", "cling", str(held), timeout=0.2)
        series = await shown.metrics()
        assert series["parallax_agent_slots_overdue"] == 1
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


async def test_an_agent_that_finds_no_control_plane_is_alive_and_not_ready(
    children: Children, fleet: Fleet, pki: Pki
) -> None:
    dials = {"PARALLAX_CONTROL_PLANE": "localhost:1"}
    shown = await listener(children.start_agent(pki.environment | dials | METRICS), fleet)
    assert (await shown.http("/healthz"))[0] == 200
    ready, detail = await shown.http("/readyz")
    assert (ready, json.loads(detail)["detail"]["connected"]) == (503, "false")
    assert (await shown.metrics())["parallax_agent_connected"] == 0
