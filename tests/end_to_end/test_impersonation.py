"""Agent A can never act as agent B: whatever it says in ids, headers and metadata, its certificate counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parallax.protos import (
    dispatch_pb2,
    dispatch_pb2_grpc,
    link_pb2,
    registry_pb2,
    registry_pb2_grpc,
    session_pb2_grpc,
    task_pb2,
)
from parallax.sdk import SecureAgent

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet

URI = "spiffe://parallax.local/agent/"

# What other systems take an identity from.
CLAIMS = (
    ("x-agent-id", "agent-2"),
    ("agent-id", "agent-2"),
    ("parallax-identity", f"{URI}agent-2"),
    ("parallax-agent-id", "agent-2"),
    ("x-spiffe-id", f"{URI}agent-2"),
    ("x-ssl-client-s-dn", "CN=agent-2"),
    ("x-forwarded-client-cert", f"By={URI}agent-2;URI={URI}agent-2"),
    ("authorization", "Bearer agent-2"),
)

Registry = registry_pb2_grpc.RegistryServiceStub
REQUESTS: dict[str, Callable[[str], object]] = {
    "Register": lambda name: registry_pb2.RegisterRequest(
        description=registry_pb2.AgentDescription(agent_id=name)
    ),
    "Heartbeat": lambda name: registry_pb2.HeartbeatRequest(agent_id=name),
    "Deregister": lambda name: registry_pb2.DeregisterRequest(agent_id=name),
}


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return [self.agent_id, data], 1.0


async def ask(channel: aio.Channel, method: str, agent_id: str, metadata: Any = ()) -> Any:
    """Call a method of the registry about *agent_id*."""
    return await getattr(Registry(channel), method)(REQUESTS[method](agent_id), metadata=metadata, timeout=10)


async def status(call: Any) -> StatusCode:
    """What *call* fails with."""
    with pytest.raises(aio.AioRpcError) as refused:
        await call
    return refused.value.code()


@pytest.mark.parametrize("method", REQUESTS)
@pytest.mark.parametrize("metadata", [(), CLAIMS], ids=["plain", "with metadata"])
async def test_an_agent_cannot_speak_to_the_registry_as_another(
    fleet: Fleet, method: str, metadata: Any
) -> None:
    async with (
        fleet.agent(Echo, "agent-2"),
        fleet.channel("agent/agent-1") as channel,
        fleet.client() as client,
    ):
        before = await client.agents()
        assert await status(ask(channel, method, "agent-2", metadata)) is StatusCode.PERMISSION_DENIED
        assert await client.agents() == before
        assert (await client.analyze("agent-2", "echo", 1)).value == ["agent-2", 1]
    assert (await fleet.metrics())["parallax_agents"] == 0


async def test_metadata_does_not_change_who_registers(fleet: Fleet) -> None:
    async with fleet.channel("agent/agent-1") as channel, fleet.client() as client:
        await ask(channel, "Register", "", CLAIMS)
        assert [(a.agent_id, a.identity) for a in await client.agents()] == [("agent-1", f"{URI}agent-1")]
        await ask(channel, "Deregister", "", CLAIMS)
        assert await client.agents() == []


@pytest.mark.parametrize("metadata", [(), CLAIMS], ids=["plain", "with metadata"])
async def test_an_agent_cannot_open_a_session_as_another(fleet: Fleet, metadata: Any) -> None:
    async with fleet.agent(Echo, "agent-2"), fleet.client() as client:
        before = await client.agents()
        async with fleet.raw_agent("agent/agent-1", metadata) as thief:
            with pytest.raises(aio.AioRpcError, match="may not speak for 'agent-2'") as refused:
                await thief.hello("agent-2")
            assert refused.value.code() is StatusCode.PERMISSION_DENIED
        assert await client.agents() == before
        assert (await client.analyze("agent-2", "echo", 1)).value == ["agent-2", 1]


async def test_metadata_does_not_change_whose_session_it_is(fleet: Fleet) -> None:
    async with fleet.raw_agent("agent/agent-1", CLAIMS) as agent:
        assert (await agent.hello()).agent_id == "agent-1"


async def test_an_agent_cannot_answer_the_task_of_another(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as thief,
        fleet.raw_agent("agent/agent-2", agent_id="agent-2") as owner,
        fleet.client() as client,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(client.analyze("agent-2", "secret"))
        task = await owner.task()
        await thief.answer(task.id, b"forged", 1.0)
        error = await thief.refusal()
        assert error.code() is StatusCode.PERMISSION_DENIED
        assert error.details() == "agent-1 answered a task of another agent"
        assert "call refused" in [record.message for record in caplog.records]
        assert not asked.done()
        await owner.answer(task.id, b"true", 0.5)
        result = await asked
    assert (result.value, result.confidence, result.agent_id) == (b"true", 0.5, "agent-2")


async def test_an_agent_cannot_fail_the_task_of_another(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as thief,
        fleet.raw_agent("agent/agent-2", agent_id="agent-2") as owner,
        fleet.client() as client,
        asyncio.TaskGroup() as group,
    ):
        asked = group.create_task(client.analyze("agent-2", "secret"))
        task = await owner.task()
        failure = task_pb2.Failure(code=task_pb2.OUTCOME_CODE_HANDLER_FAILED, message="forged")
        await thief.say(outcomes=[link_pb2.TaskOutcome(task_id=task.id, failure=failure)])
        assert (await thief.refusal()).code() is StatusCode.PERMISSION_DENIED
        await owner.answer(task.id, b"true")
        assert (await asked).value == b"true"


@pytest.mark.parametrize("short", ["client/cli", "client/agent-2", "client/admin", "service/agent-2"])
async def test_a_certificate_of_another_kind_is_no_agents(fleet: Fleet, short: str) -> None:
    async with fleet.agent(Echo, "agent-2"), fleet.channel(short) as channel:
        for method in ("Register", "Heartbeat"):
            assert await status(ask(channel, method, "agent-2")) is StatusCode.PERMISSION_DENIED
        call = session_pb2_grpc.SessionServiceStub(channel).Connect()
        with pytest.raises(aio.AioRpcError) as refused:  # says nothing: gRPC could lose why
            await call.read()
        assert refused.value.code() is StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize(
    "short", ["agent/agent-1", "agent/admin", "service/agent-proxy", "service/control-plane"]
)
async def test_only_a_clients_certificate_dispatches_and_reads(fleet: Fleet, short: str) -> None:
    async with fleet.agent(Echo, "agent-2"), fleet.channel(short) as channel:
        execute = dispatch_pb2_grpc.DispatchServiceStub(channel).Execute
        request = dispatch_pb2.ExecuteRequest(target="agent-2", task="echo")
        assert await status(execute(request, timeout=10)) is StatusCode.PERMISSION_DENIED
        listing = Registry(channel).ListAgents(registry_pb2.ListAgentsRequest(), timeout=10)
        assert await status(listing) is StatusCode.PERMISSION_DENIED
        reading = Registry(channel).GetAgent(registry_pb2.GetAgentRequest(agent_id="agent-2"), timeout=10)
        assert await status(reading) is StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("short", ["client/cli", "agent/admin", "service/admin", "service/control-plane"])
async def test_only_the_client_admin_takes_others_out(fleet: Fleet, short: str) -> None:
    async with fleet.agent(Echo, "agent-2"), fleet.channel(short) as channel, fleet.client() as client:
        assert await status(ask(channel, "Deregister", "agent-2")) is StatusCode.PERMISSION_DENIED
        assert [agent.agent_id for agent in await client.agents()] == ["agent-2"]


async def test_everybody_with_a_certificate_may_ask_for_health_and_nothing_unlisted(fleet: Fleet) -> None:
    async with fleet.channel("service/anything") as channel:
        check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
        answer = await check(health_pb2.HealthCheckRequest(), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        unlisted: Any = channel.unary_unary("/parallax.v1.RegistryService/Nothing")
        assert await status(unlisted(b"", timeout=10)) is StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("short", ["agent/agent-1", "service/agent-proxy"])
async def test_only_a_client_reads_the_schema_by_reflection(fleet: Fleet, short: str) -> None:
    async with fleet.channel(short) as channel:
        call: Any = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        assert await status(call(iter(()), timeout=10).read()) is StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("short", ["client/cli", "agent/agent-1"])
async def test_an_attempt_is_logged_with_the_certificates_identity_and_counted(
    fleet: Fleet, caplog: pytest.LogCaptureFixture, short: str
) -> None:
    async with fleet.channel(short) as channel:
        await status(ask(channel, "Register", "agent-2", CLAIMS))
    (refused,) = [vars(record) for record in caplog.records if record.message == "call refused"]
    assert refused["peer"] == f"spiffe://parallax.local/{short}"
    assert refused["reason"] == "not_authorized"
    series = 'parallax_authentication_failures_total{reason="not_authorized"}'
    assert (await fleet.metrics())[series] == 1


async def test_an_attempt_to_open_a_session_is_logged_with_the_certificates_identity(
    fleet: Fleet, caplog: pytest.LogCaptureFixture
) -> None:
    async with fleet.raw_agent("agent/agent-1") as thief:
        with pytest.raises(aio.AioRpcError):
            await thief.hello("agent-2")
    (refused,) = [vars(record) for record in caplog.records if record.message == "call refused"]
    assert (refused["peer"], refused["reason"]) == (f"{URI}agent-1", "not_authorized")
