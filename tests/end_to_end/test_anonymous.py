"""Where clients are not authenticated, agents are `anonymous/…` and nobody gets one without asking for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from grpc import StatusCode, aio

from parallax.protos import registry_pb2, registry_pb2_grpc
from parallax.sdk import SecureAgent
from parallax.security.config import MTLSConfig
from parallax.security.errors import TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Pki, Serve


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


@pytest.fixture(params=["without client certificates", "in plaintext"])
async def anonymous(request: pytest.FixtureRequest, pki: Pki, serve: Serve) -> AsyncIterator[Fleet]:
    """A control plane that authenticates nobody, by TLS that does not ask or without any TLS."""
    plaintext = request.param == "in plaintext"
    async with serve(MTLSConfig(enabled=False) if plaintext else pki.tls(verify_client=False)) as fleet:
        yield fleet


@asynccontextmanager
async def bare_channel(fleet: Fleet) -> AsyncIterator[aio.Channel]:
    """A channel that shows no certificate."""
    options = [("grpc.ssl_target_name_override", "control-plane.parallax.local")]
    if fleet.tls.enabled:
        credentials = grpc.ssl_channel_credentials(fleet.pki.authority.bundle.pem)
        opened = aio.secure_channel(fleet.address, credentials, options=options)
    else:
        opened = aio.insecure_channel(fleet.address)
    async with opened as channel:
        yield channel


async def failure(call: Any) -> tuple[str, str]:
    """How a task fails, without waiting for anybody: code and text."""
    with pytest.raises(TaskFailed) as failed:
        async with asyncio.timeout(15):
            await call
    return failed.value.code, str(failed.value)


async def status(call: Any) -> StatusCode:
    """What *call* fails with."""
    with pytest.raises(aio.AioRpcError) as refused:
        await call
    return refused.value.code()


async def test_an_agent_is_anonymous_and_unverified_whatever_certificate_it_has(anonymous: Fleet) -> None:
    async with anonymous.agent(Echo), anonymous.client() as client:
        (agent,) = await client.agents()
    assert (agent.agent_id, agent.identity, agent.verified) == ("anonymous/agent-1", "", False)


@pytest.mark.parametrize("target", ["agent-1", "capability:echo"])
async def test_an_unverified_agent_is_not_picked_by_id_or_capability(anonymous: Fleet, target: str) -> None:
    async with anonymous.agent(Echo), anonymous.client() as client:
        code, text = await failure(client.analyze(target, "echo", 1))
        assert code == "NO_AGENT"
        assert "only one that no certificate vouches for" in text
        assert "PARALLAX_TLS_VERIFY_CLIENT=true" in text
        code, _ = await failure(client.analyze(target, "echo", 1, wait_for_agent=0.1))
        assert code == "NO_AGENT"


@pytest.mark.parametrize("target", ["agent-1", "capability:echo", "anonymous/agent-1"])
async def test_an_unverified_agent_is_picked_by_who_allows_it(anonymous: Fleet, target: str) -> None:
    async with anonymous.agent(Echo), anonymous.client() as client:
        result = await client.analyze(target, "echo", 1, allow_unverified=True)
    assert (result.value, result.agent_id) == (1, "anonymous/agent-1")


async def test_an_unverified_agent_is_picked_by_its_full_name(anonymous: Fleet) -> None:
    async with anonymous.agent(Echo), anonymous.client() as client:
        result = await client.analyze("anonymous/agent-1", "echo", 1)
    assert (result.value, result.agent_id) == (1, "anonymous/agent-1")


async def test_anonymous_callers_register_heartbeat_deregister_and_read(anonymous: Fleet) -> None:
    async with bare_channel(anonymous) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        description = registry_pb2.AgentDescription(agent_id="agent-7")
        await stub.Register(registry_pb2.RegisterRequest(description=description), timeout=10)
        await stub.Heartbeat(registry_pb2.HeartbeatRequest(agent_id="agent-7"), timeout=10)
        request = registry_pb2.GetAgentRequest(agent_id="anonymous/agent-7")
        assert (await stub.GetAgent(request, timeout=10)).agent.agent_id == "anonymous/agent-7"
        plain = registry_pb2.GetAgentRequest(agent_id="agent-7")
        assert await status(stub.GetAgent(plain, timeout=10)) is StatusCode.NOT_FOUND
        await stub.Deregister(registry_pb2.DeregisterRequest(agent_id="agent-7"), timeout=10)
        assert await status(stub.GetAgent(request, timeout=10)) is StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", ["", "../agent", "anonymous/agent-1", "Agent", "a\0", "a" * 300])
async def test_an_anonymous_agent_needs_a_proper_name(anonymous: Fleet, name: str) -> None:
    async with bare_channel(anonymous) as channel:
        stub = registry_pb2_grpc.RegistryServiceStub(channel)
        description = registry_pb2.AgentDescription(agent_id=name)
        register = stub.Register(registry_pb2.RegisterRequest(description=description), timeout=10)
        assert await status(register) is StatusCode.INVALID_ARGUMENT
        heartbeat = stub.Heartbeat(registry_pb2.HeartbeatRequest(agent_id=name), timeout=10)
        assert await status(heartbeat) is StatusCode.INVALID_ARGUMENT
        assert not (await stub.ListAgents(registry_pb2.ListAgentsRequest(), timeout=10)).agents


async def test_a_control_plane_that_demands_certificates_never_lists_anonymous_agents(fleet: Fleet) -> None:
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(fleet.agent(Echo))
        client = await stack.enter_async_context(fleet.client())
        (agent,) = await client.agents()
        assert (agent.agent_id, agent.verified) == ("agent-1", True)
        assert agent.identity == "spiffe://parallax.local/agent/agent-1"
        code, _ = await failure(client.analyze("anonymous/agent-1", "echo"))
        assert code == "NO_AGENT"
        result = await client.analyze("agent-1", "echo", 1, allow_unverified=True)
        assert result.agent_id == "agent-1"
        async with fleet.raw_agent("agent/agent-2") as raw:
            with pytest.raises(aio.AioRpcError) as refused:
                await raw.hello("anonymous/agent-2")
            assert refused.value.code() is StatusCode.PERMISSION_DENIED
