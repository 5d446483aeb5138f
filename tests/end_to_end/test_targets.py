"""Which agent is given a task, and what the caller hears when there is none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio

from parallax.protos import dispatch_pb2, dispatch_pb2_grpc, registry_pb2, registry_pb2_grpc
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import IdentityError, InvalidRequest, NoSuchAgent, ParallaxError, TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Fleet, Serve

AT_ONCE_S = 15.0  # less than any timeout of a task

HOSTILE = {
    "slash": "agent/1",
    "parent directory": "../agent-1",
    "two dots": "agent..1",
    "NUL": "agent\0",
    "upper case": "Agent-1",
    "too long": "a" * 300,
    "unicode": "agênt-1",
    "line break": "agent\n1",
    "blank": " ",
    "option": "--help",
}


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


@asynccontextmanager
async def asked(client: ParallaxClient, target: str, **options: Any) -> AsyncIterator[Any]:
    """A task under way: the caller who waits for it."""
    waiting = asyncio.create_task(client.analyze(target, "x", **options))
    try:
        yield waiting
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})


async def failure(call: Any) -> TaskFailed:
    """How a task fails, at once."""
    with pytest.raises(TaskFailed) as failed:
        async with asyncio.timeout(AT_ONCE_S):
            await call
    return failed.value


# Nobody there.


@pytest.mark.parametrize(
    ("target", "who"),
    [
        ("agent-9", "no agent 'agent-9' is connected"),
        ("anonymous/agent-1", "no agent 'anonymous/agent-1' is connected"),
        ("capability:juggling", "no agent with capability 'juggling' is connected"),
    ],
)
async def test_a_target_that_nobody_serves_fails_at_once(fleet: Fleet, target: str, who: str) -> None:
    async with fleet.agent(Echo), fleet.client() as client:
        failed = await failure(client.analyze(target, "echo"))
        assert (failed.code, who in str(failed)) == ("NO_AGENT", True), str(failed)
        assert "parallax agents list" in str(failed)
        with pytest.raises(NoSuchAgent):
            await client.agent("agent-9")


@pytest.mark.parametrize("target", ["agent-2", "capability:echo"])
async def test_a_caller_who_waits_gets_the_agent_that_comes_in_time(fleet: Fleet, target: str) -> None:
    async with fleet.client() as client, asked(client, target, wait_for_agent=20) as waiting:
        overtaken = await failure(client.analyze(target, "x"))  # answered after the first has begun to wait
        assert overtaken.code == "NO_AGENT"
        async with fleet.agent(Echo, "agent-2"):
            assert (await waiting).agent_id == "agent-2"


async def test_a_caller_who_waits_for_an_agent_waits_no_longer_than_it_says(fleet: Fleet) -> None:
    async with fleet.client() as client:
        by_wait = await failure(client.analyze("agent-1", "echo", wait_for_agent=0.2, timeout=20))
        by_timeout = await failure(client.analyze("agent-1", "echo", wait_for_agent=20, timeout=0.2))
    assert by_wait.code == "NO_AGENT"
    assert by_timeout.code == "NO_AGENT"


# Several there.


async def test_a_capability_is_served_by_whoever_has_the_most_free_slots(fleet: Fleet) -> None:
    hello: dict[str, Any] = {"capabilities": ["raw"], "max_concurrency": 2}
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1", **hello) as one,
        fleet.raw_agent("agent/agent-2", agent_id="agent-2", **hello) as two,
        fleet.client() as client,
        asked(client, "agent-1"),
    ):
        await one.task()  # one free slot against two
        async with asked(client, "capability:raw"):
            second = await two.task()
            async with asked(client, "capability:raw"), asked(client, "capability:raw"):
                await one.task()
                await two.task()
                await two.answer(second.id)  # now it has one free slot against none
                async with asked(client, "capability:raw"):
                    await two.task()


async def test_an_agent_with_as_much_waiting_as_it_may_is_overloaded_and_says_when_to_try_again(
    serve: Serve,
) -> None:
    async with (
        serve(queue_limit=1) as fleet,
        fleet.raw_agent(agent_id="agent-1", max_concurrency=1) as agent,
        fleet.client() as client,
        asked(client, "agent-1") as first,
    ):
        task = await agent.task()
        async with asked(client, "agent-1") as second:
            for target in ("agent-1", "capability:raw"):
                refused = asyncio.create_task(client.analyze(target, "x", wait_for_agent=20))
                failed = await failure(refused)  # it comes after the second, which waits its turn
                assert (failed.code, failed.retry_after > timedelta(0)) == ("OVERLOADED", True)
            assert not second.done()
            await agent.answer(task.id)
            await first
            await agent.task()
            async with asked(client, "agent-1") as third:
                assert (await client.agent("agent-1")).in_flight == 1  # as many as it works on at once
                assert not third.done()


@pytest.mark.parametrize("idempotent", [True, False])
async def test_only_an_idempotent_task_is_tried_elsewhere_when_its_agent_is_lost(
    fleet: Fleet, *, idempotent: bool
) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1", max_concurrency=9) as one,
        fleet.raw_agent("agent/agent-2", agent_id="agent-2", max_concurrency=1) as two,
        fleet.channel("client/cli") as channel,
    ):
        request = dispatch_pb2.ExecuteRequest(target="capability:raw", task="x", idempotent=idempotent)
        call = dispatch_pb2_grpc.DispatchServiceStub(channel).Execute(request, timeout=10)
        await one.task()
        one.hang_up()
        if idempotent:
            await two.answer((await two.task()).id, b"second attempt")
        response = await call
    if idempotent:
        assert response.outcome.value.payload.data == b"second attempt"
        assert (response.agent_id, response.attempts) == ("agent-2", 2)
    else:
        assert "lost while it held the task" in response.outcome.failure.message
        assert (response.agent_id, response.attempts) == ("agent-1", 1)


async def test_an_idempotent_task_for_one_agent_is_not_given_to_another(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as one,
        fleet.raw_agent("agent/agent-2", agent_id="agent-2"),
        fleet.client() as client,
        asked(client, "agent-1", idempotent=True) as lost,
    ):
        await one.task()
        one.hang_up()
        assert (await failure(lost)).code == "AGENT_LOST"


# No names at all.


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE.keys())
async def test_a_hostile_agent_id_is_refused_and_never_reaches_the_log_as_it_is(
    shared_plane: tuple[Child, Fleet], name: str
) -> None:
    plane, fleet = shared_plane
    with pytest.raises(IdentityError):
        Echo(name, "Echo", [])
    async with (
        fleet.channel("agent/agent-1") as as_agent,
        fleet.channel("client/admin") as as_admin,
        fleet.client() as client,
    ):
        agent, admin = (registry_pb2_grpc.RegistryServiceStub(c) for c in (as_agent, as_admin))
        description = registry_pb2.AgentDescription(agent_id=name)
        calls: dict[str, Any] = {
            "register": agent.Register(registry_pb2.RegisterRequest(description=description), timeout=10),
            "heartbeat": agent.Heartbeat(registry_pb2.HeartbeatRequest(agent_id=name), timeout=10),
            "deregister": admin.Deregister(registry_pb2.DeregisterRequest(agent_id=name), timeout=10),
        }
        for method, call in calls.items():
            with pytest.raises(aio.AioRpcError) as refused:
                await call
            expected = StatusCode.INVALID_ARGUMENT if method == "deregister" else StatusCode.PERMISSION_DENIED
            assert refused.value.code() is expected
        for call in (client.agent(name), client.analyze(name, "x")):
            with pytest.raises(IdentityError):
                await call
        async with fleet.raw_agent("agent/agent-1") as raw:
            with pytest.raises(aio.AioRpcError):
                await raw.hello(name)
        assert await client.agents() == []
    if not (name.isprintable() and name.isascii() and len(name) < 80):  # else it stands there in quotes
        assert not [line for line in plane.lines if name in line]
    assert not [line for line in plane.lines if not line.isprintable()]


@pytest.mark.parametrize(
    ("target", "task", "error"),
    [
        ("", "x", IdentityError),
        ("capability:", "x", InvalidRequest),
        ("capability:UPPER", "x", InvalidRequest),
        ("capability:../x", "x", InvalidRequest),
        ("service/control-plane", "x", IdentityError),
        ("agent-1", "x" * 1025, InvalidRequest),
    ],
)
async def test_a_target_or_task_that_is_none_is_refused(
    fleet: Fleet, target: str, task: str, error: type[ParallaxError]
) -> None:
    async with fleet.agent(Echo), fleet.client() as client:
        with pytest.raises(error):
            await client.analyze(target, task)
        assert (await client.analyze("agent-1", "x", 1)).value == 1
