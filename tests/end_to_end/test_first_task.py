"""The main job: an agent, a client and a task over mutual TLS."""

from __future__ import annotations

from typing import Any

from parallax.sdk import SecureAgent


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return (data if isinstance(data, bytes) else {"task": task, "data": data}), 0.5


async def test_a_client_gets_an_agents_answer(fleet: Any) -> None:
    async with fleet.agent(Echo), fleet.client() as client:
        by_id = await client.analyze("agent-1", "hello", {"n": 2**60, "list": [1, None, "ü"]})
        by_capability = await client.analyze("capability:echo", "bytes", b"\x00\xff")
        agents = await client.agents()
    assert by_id.value == {"task": "hello", "data": {"n": 2**60, "list": [1, None, "ü"]}}
    assert (by_id.confidence, by_id.agent_id) == (0.5, "agent-1")
    assert (by_capability.value, by_capability.agent_id) == (b"\x00\xff", "agent-1")
    assert [(a.agent_id, a.identity, a.state) for a in agents] == [
        ("agent-1", "spiffe://parallax.local/agent/agent-1", "ready")
    ]
