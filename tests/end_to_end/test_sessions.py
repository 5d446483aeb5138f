"""Agents that leave, come back, fall silent or are there twice, and control planes that stop."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from grpc import StatusCode, aio

from parallax.protos import dispatch_pb2, dispatch_pb2_grpc, registry_pb2, registry_pb2_grpc
from parallax.runtime.link_stream import Pump
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import TaskFailed, Unavailable

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve, Until

PROMPTLY_S = 10.0  # less than the lease of 15 s

ONE, TWO = b"1" * 16, b"2" * 16  # instance ids


class Slow(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        await asyncio.sleep(60)
        return data, 1.0


class Echo(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return data, 1.0


@asynccontextmanager
async def asked(client: ParallaxClient, target: str = "agent-1", **options: Any) -> AsyncIterator[Any]:
    """A task that a raw agent holds as long as it likes: the caller who waits for it."""
    waiting = asyncio.create_task(client.analyze(target, "x", **options))
    try:
        yield waiting
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})


@asynccontextmanager
async def holding(
    client: ParallaxClient, file: Path, until: Until, target: str = "agent-1"
) -> AsyncIterator[Any]:
    """A task that a worker holds until *file* is gone: the caller who waits for it."""
    waiting = asyncio.create_task(client.analyze(target, "hold", str(file)))
    try:
        await until(file.exists)
        yield waiting
    finally:
        file.unlink(missing_ok=True)  # noqa: ASYNC240
        waiting.cancel()
        await asyncio.wait({waiting})


async def code_of(waiting: Any) -> str:
    """The failure code that a caller gets, promptly."""
    with pytest.raises(TaskFailed) as failed:
        async with asyncio.timeout(PROMPTLY_S):
            await waiting
    return failed.value.code


async def echoed(client: ParallaxClient) -> Any:
    """What agent-1 says to 1; None while *client* cannot reach the control plane, or has yet to try again."""
    try:
        return (await client.analyze("agent-1", "echo", 1)).value
    except Unavailable:
        return None


# Leaving.


async def test_when_an_agents_connection_breaks_off_only_its_own_tasks_fail(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as one,
        fleet.raw_agent("agent/agent-2", agent_id="agent-2") as two,
        fleet.client() as client,
        asked(client, "agent-1") as lost,
        asked(client, "agent-2") as kept,
    ):
        await one.task()
        task = await two.task()
        one.hang_up()
        assert await code_of(lost) == "AGENT_LOST"
        assert not kept.done()
        await two.answer(task.id, b"kept")
        assert (await kept).value == b"kept"
        assert [agent.agent_id for agent in await client.agents()] == ["agent-2"]


async def test_when_an_agent_is_killed_only_its_own_tasks_fail(
    fleet: Fleet, children: Children, tmp_path: Path, until: Until
) -> None:
    child = await children.agent(fleet)
    async with (
        fleet.raw_agent("agent/agent-2", agent_id="agent-2") as two,
        fleet.client() as client,
        asked(client, "agent-2") as kept,
        holding(client, tmp_path / "held", until) as lost,
    ):
        task = await two.task()
        child.process.kill()
        assert await code_of(lost) == "AGENT_LOST"
        await two.answer(task.id, b"kept")
        assert (await kept).value == b"kept"


async def test_an_agent_that_is_told_to_stop_finishes_what_it_holds(
    fleet: Fleet, children: Children, tmp_path: Path, until: Until
) -> None:
    child = await children.agent(fleet)
    async with fleet.client() as client, holding(client, tmp_path / "held", until) as kept:
        child.process.send_signal(signal.SIGTERM)
        while (await client.agent("agent-1")).state != "draining":
            await asyncio.sleep(0.01)
        assert await code_of(client.analyze("agent-1", "echo")) == "NO_AGENT"
        (tmp_path / "held").unlink()
        assert (await kept).value == str(tmp_path / "held")
        assert await child.ended() == 0
        assert await client.agents() == []


@pytest.mark.parametrize("short", ["agent/agent-1", "client/admin"])
async def test_deregistering_an_agent_fails_its_tasks_and_ends_its_session(fleet: Fleet, short: str) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as agent,
        fleet.client() as client,
        asked(client) as lost,
        fleet.channel(short) as channel,
    ):
        await agent.task()
        request = registry_pb2.DeregisterRequest(agent_id="agent-1")
        await registry_pb2_grpc.RegistryServiceStub(channel).Deregister(request, timeout=10)
        assert await code_of(lost) == "AGENT_LOST"
        assert await agent.goodbye() == "DEREGISTERED"
        assert await client.agents() == []


async def test_a_deregistered_agent_process_stops_and_does_not_come_back(
    fleet: Fleet, children: Children
) -> None:
    child = await children.agent(fleet)
    async with fleet.channel("client/admin") as channel:
        request = registry_pb2.DeregisterRequest(agent_id="agent-1")
        await registry_pb2_grpc.RegistryServiceStub(channel).Deregister(request, timeout=10)
    assert await child.ended() == 0
    (said,) = child.records("stopping")
    assert "taken out of the registry" in said["cause"]


# Coming back.


async def test_the_late_end_of_an_old_stream_does_not_remove_the_new_session(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent(agent_id="agent-1", instance_id=ONE) as old,
        fleet.raw_agent(agent_id="agent-1", instance_id=ONE) as new,
        fleet.client() as client,
    ):
        (before,) = await client.agents()
        old.hang_up()
        async with asked(client) as first:
            await new.answer((await new.task()).id, b"first")
            assert (await first).value == b"first"
        assert await client.agents() == [before]
        async with asked(client) as second:
            await new.answer((await new.task()).id, b"second")
            assert (await second).value == b"second"


async def test_a_task_outlives_the_stream_it_came_by_if_its_instance_reconnects(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        fleet.raw_agent(agent_id="agent-1", instance_id=ONE) as old,
        asked(client) as kept,
    ):
        task = await old.task()
        async with fleet.raw_agent(agent_id="agent-1", instance_id=ONE) as new:
            old.hang_up()
            await new.answer(task.id, b"by the new stream")
            assert (await kept).value == b"by the new stream"


async def test_an_old_session_drains_and_then_ends(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        fleet.raw_agent(agent_id="agent-1", instance_id=ONE) as old,
        asked(client) as held,
    ):
        task = await old.task()
        async with fleet.raw_agent(agent_id="agent-1", instance_id=ONE) as new:
            async with asked(client) as next_one:
                await new.answer((await new.task()).id, b"on the new stream")
                assert (await next_one).value == b"on the new stream"
            await old.answer(task.id, b"on the old stream")
            assert (await held).value == b"on the old stream"
            assert await old.goodbye() == "REPLACED"


# There twice.


async def test_the_newest_of_two_hosts_with_one_identity_wins(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        fleet.raw_agent(agent_id="agent-1", instance_id=ONE) as old,
        asked(client) as lost,
    ):
        await old.task()
        async with fleet.raw_agent(agent_id="agent-1", instance_id=TWO) as new:
            assert await old.goodbye() == "SUPERSEDED"
            assert await code_of(lost) == "AGENT_LOST"
            async with asked(client) as kept:
                await new.answer((await new.task()).id, b"new")
                assert (await kept).value == b"new"
    assert (await fleet.metrics())["parallax_session_take_overs_total"] == 1


async def test_a_superseded_agent_process_ends_with_code_78_and_does_not_come_back(
    fleet: Fleet, children: Children, caplog: pytest.LogCaptureFixture
) -> None:
    child = await children.agent(fleet)
    async with fleet.raw_agent(agent_id="agent-1", instance_id=TWO):
        assert await child.ended() == 78
        *_, last = child.lines
        assert re.fullmatch("parallax: agent-1: another instance with the same identity took over.*", last)
    assert "another instance took over" in [record.message for record in caplog.records]


async def test_more_than_three_take_overs_within_a_minute_refuse_the_newcomer(fleet: Fleet) -> None:
    async with fleet.client() as client, AsyncExitStack() as stack:
        enter = stack.enter_async_context
        fighters = [
            await enter(fleet.raw_agent(agent_id="agent-1", instance_id=bytes([n]) * 16)) for n in range(4)
        ]
        *losers, owner = fighters
        assert [await loser.goodbye() for loser in losers] == ["SUPERSEDED"] * 3
        newcomer = await enter(fleet.raw_agent())
        with pytest.raises(aio.AioRpcError, match="another host uses the same certificate") as refused:
            await newcomer.hello(instance_id=TWO)
        assert refused.value.code() is StatusCode.FAILED_PRECONDITION
        async with asked(client) as kept:
            await owner.answer((await owner.task()).id, b"still here")
            assert (await kept).value == b"still here"


# Falling silent.


async def test_the_lease_of_a_silent_agent_runs_out_and_that_of_a_live_one_does_not(serve: Serve) -> None:
    async with (
        serve(lease_seconds=5) as fleet,  # a busy machine may stand still for a while
        fleet.agent(Echo, "agent-2"),
        fleet.raw_agent(agent_id="agent-1") as silent,
        fleet.client() as client,
        asked(client, "agent-1") as lost,
    ):
        await silent.task()
        alive = await client.agent("agent-2")
        assert await code_of(lost) == "AGENT_LOST"
        error = await silent.refusal()
        assert (error.code(), "within the lease" in (error.details() or "")) == (
            StatusCode.FAILED_PRECONDITION,
            True,
        )
        assert await client.agents() == [alive]


async def test_an_agent_that_blocks_its_loop_misses_the_deadline_then_its_lease_and_comes_back(
    serve: Serve, children: Children, tmp_path: Path, until: Until
) -> None:
    async with serve(lease_seconds=5) as fleet, fleet.client() as client:
        child = await children.agent(fleet)
        async with holding(client, tmp_path / "held", until) as other:
            assert await code_of(client.analyze("agent-1", "block", 9, timeout=2)) == "DEADLINE_EXCEEDED"
            assert not other.done()
            assert await code_of(other) == "AGENT_LOST"
        await until(lambda: len(child.records("connected")) == 2)
        assert (await client.analyze("agent-1", "echo", 1)).value == 1


async def test_a_certificate_that_expires_ends_the_session_and_the_call_it_serves(fleet: Fleet) -> None:
    now, lifetime = datetime.now(UTC), timedelta(seconds=8)  # a busy machine has to connect before
    agents, clients = (
        fleet.pki.issue(s, now=now, lifetime=lifetime) for s in ("agent/agent-1", "client/cli")
    )
    async with (
        fleet.raw_agent(agents, agent_id="agent-1") as agent,
        fleet.channel(clients) as channel,
    ):
        request = dispatch_pb2.ExecuteRequest(target="agent-1", task="x")
        calling = dispatch_pb2_grpc.DispatchServiceStub(channel).Execute(request, timeout=25)
        await agent.task()
        with pytest.raises(aio.AioRpcError) as refused:
            await calling
        for error in (refused.value, await agent.refusal()):
            assert error.code() is StatusCode.UNAUTHENTICATED
            assert "expired during the call" in (error.details() or "")
            assert dict(error.trailing_metadata() or ()) == {"parallax-error": "Expired"}


# Callers and control planes that stop.


async def test_cancelling_the_caller_cancels_the_handler(fleet: Fleet) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    class Patient(SecureAgent):
        async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
            begun.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise
            return None, 1.0

    async with fleet.agent(Patient), fleet.client() as client, asyncio.timeout(PROMPTLY_S):
        async with asked(client):
            await begun.wait()
            assert not cancelled.is_set()
        await cancelled.wait()
        assert (await client.agent("agent-1")).in_flight == 0


async def idle(client: ParallaxClient) -> None:
    """Nothing but a call that is answered."""
    await client.analyze("agent-1", "x")


async def close_under_a_call(client: ParallaxClient) -> None:
    async with asked(client, "agent-1", timeout=9) as calling:
        while not (await client.agent("agent-1")).in_flight:
            await asyncio.sleep(0.01)
        await client.close()
        assert await code_of(calling) == "CONTROL_PLANE_LOST"


async def leave_a_stream(client: ParallaxClient) -> None:
    async for _ in client.stream("agent-1", "x"):
        break


@pytest.mark.parametrize("use", [idle, close_under_a_call, leave_a_stream])
async def test_a_client_that_was_closed_leaves_nothing_open(
    fleet: Fleet, until: Until, use: Callable[[ParallaxClient], Awaitable[None]]
) -> None:
    """On neither side, and without waiting for the garbage collector."""

    def connections() -> int:
        all_ = psutil.Process().net_connections("tcp")
        return sum(1 for one in all_ if getattr(one.raddr, "port", None) == fleet.port)

    def pumps() -> int:
        return sum(1 for one in gc.get_objects() if type(one) is Pump)

    async with fleet.agent(Slow if use is close_under_a_call else Echo):
        gc.collect()
        await until(lambda: connections() == 1)  # the agent's: the port's own probe has ended
        before = connections(), pumps()
        gc.disable()
        try:
            for _ in range(3):
                async with fleet.client() as client:
                    await use(client)
            await until(lambda: (connections(), pumps()) == before)
        finally:
            gc.enable()


@pytest.mark.timeout(60)  # three processes start, each within seconds, and an agent may pause for ten
async def test_a_control_plane_that_is_told_to_stop_drains_and_its_agents_find_the_next_one(
    pki: Pki, children: Children, tmp_path: Path, until: Until
) -> None:
    """The next one on the same port is killed in the middle of a call."""
    plane, fleet = await children.fleet(pki)
    agent = await children.agent(fleet)
    async with fleet.client() as client:
        assert (await fleet.http("/readyz"))[0] == 200
        async with holding(client, tmp_path / "held", until) as kept:
            plane.process.send_signal(signal.SIGTERM)
            await plane.said("draining", in_flight=1)
            status, body = await fleet.http("/readyz")
            assert (status, json.loads(body)["detail"]["state"]) == (503, "draining")
            with pytest.raises(Unavailable, match="the control plane is shutting down"):
                await client.analyze("agent-1", "echo")
            (tmp_path / "held").unlink()
            assert (await kept).value == str(tmp_path / "held")
            assert await plane.ended() == 0

        plane, fleet = await children.fleet(pki, PARALLAX_LISTEN=f"127.0.0.1:{fleet.port}")
        await until(lambda: len(agent.records("connected")) == 2)
        async with asyncio.timeout(PROMPTLY_S):
            while (answer := await echoed(client)) is None:
                await asyncio.sleep(0.01)
        assert answer == 1
        async with holding(client, tmp_path / "again", until) as lost:
            plane.process.kill()
            assert await code_of(lost) == "CONTROL_PLANE_LOST"
        with pytest.raises(Unavailable, match="cannot reach the control plane"):
            while await code_of(client.analyze("agent-1", "echo")) == "CONTROL_PLANE_LOST":
                await asyncio.sleep(0.01)  # the client has yet to notice
    assert await agent.stop() == 0
