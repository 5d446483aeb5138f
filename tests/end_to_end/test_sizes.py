"""Messages too large or no messages at all: that call or stream ends with a named error, all else goes on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio

from parallax.control_plane.agent_link import VALUE_OVERHEAD_BYTES
from parallax.protos import dispatch_pb2, dispatch_pb2_grpc, link_pb2, registry_pb2, task_pb2
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import InvalidRequest, TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, RawAgent

LIMIT = 4 * 1024 * 1024
HUGE = bytes(100 * 1024 * 1024)
GARBAGE = b"\xff\xfe\x00garbage\x80"


class Worker(SecureAgent):
    """Waits for `go_on`, or answers with 100 MiB."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        if task == "huge":
            return HUGE, 1.0
        self.begun.set()
        await self.go_on.wait()
        return data, 1.0


@asynccontextmanager
async def others_go_on(fleet: Fleet, client: ParallaxClient) -> AsyncIterator[None]:
    """While open, another agent works on a task of *client*; that ends well, and so does one after it."""
    agent: Any = fleet.agent(Worker, "agent-2")
    async with agent, asyncio.TaskGroup() as group:
        other = group.create_task(client.analyze("agent-2", "wait", "other"))
        try:
            await agent.begun.wait()
            yield
            assert not other.done()
        finally:
            agent.go_on.set()
        assert (await other).value == "other"
        assert (await client.analyze("agent-2", "wait", "next")).value == "next"


async def status(call: Any) -> tuple[StatusCode, str]:
    """What *call* fails with."""
    with pytest.raises(aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


async def test_the_sender_refuses_a_payload_over_the_limit(fleet: Fleet) -> None:
    async with fleet.client() as client, others_go_on(fleet, client):
        with pytest.raises(InvalidRequest, match="has 104,857,600 bytes, more than the 4,194,304 allowed"):
            await client.analyze("agent-2", "wait", HUGE)
        assert (await fleet.metrics())["parallax_tasks_in_flight"] == 1


async def test_a_payload_at_the_limit_arrives_and_comes_back(fleet: Fleet) -> None:
    payload = bytes(LIMIT)
    async with fleet.client() as client, fleet.agent(Worker) as agent:
        agent.go_on.set()
        assert (await client.analyze("agent-1", "echo", payload)).value == payload


@pytest.mark.parametrize(
    ("payload", "code", "message"),
    [
        (HUGE, StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
        (bytes(LIMIT + 1), StatusCode.INVALID_ARGUMENT, "4,194,305 bytes, more than the 4,194,304 allowed"),
    ],
    ids=["100 MiB", "one byte"],
)
async def test_the_control_plane_refuses_a_payload_over_the_limit(
    fleet: Fleet, payload: bytes, code: StatusCode, message: str
) -> None:
    """From a client that has no limits of its own; its connection lives on."""
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        fleet.channel("client/cli") as channel,
    ):
        execute = dispatch_pb2_grpc.DispatchServiceStub(channel).Execute
        request = dispatch_pb2.ExecuteRequest(target="agent-2", task="wait", timeout_ms=500)
        request.payload.data = payload
        refused, details = await status(execute(request, timeout=20))
        assert (refused, message in details) == (code, True)
        request.payload.data = b""
        late = (await execute(request, timeout=20)).outcome.failure.code
        assert late == task_pb2.OUTCOME_CODE_DEADLINE_EXCEEDED


async def test_an_answer_over_the_limit_fails_its_own_task_only(fleet: Fleet) -> None:
    async with fleet.client() as client, others_go_on(fleet, client):
        with pytest.raises(TaskFailed, match="104,857,600 bytes, more than the 4,194,304") as failed:
            await client.analyze("agent-2", "huge")
        assert failed.value.code == "INVALID_RESULT"


@asynccontextmanager
async def busy_agent(fleet: Fleet, client: ParallaxClient) -> AsyncIterator[tuple[RawAgent, int, Any]]:
    """A raw agent with one task, the task's id, and the caller who waits for it."""
    async with fleet.raw_agent("agent/agent-1", agent_id="agent-1") as agent:
        waiting = asyncio.create_task(client.analyze("agent-1", "x"))
        try:
            yield agent, (await agent.task()).id, waiting
        finally:
            waiting.cancel()
            await asyncio.wait({waiting})


async def test_a_rogue_answer_slightly_over_the_limit_fails_its_own_task_only(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        busy_agent(fleet, client) as (agent, task_id, victim),
    ):
        await agent.answer(task_id, bytes(LIMIT + VALUE_OVERHEAD_BYTES))
        with pytest.raises(TaskFailed, match="more than the 4,194,304 allowed") as failed:
            await victim
        assert failed.value.code == "INVALID_RESULT"
        again = asyncio.create_task(client.analyze("agent-1", "x"))
        await agent.answer((await agent.task()).id, b"fine")
        assert (await again).value == b"fine"


async def test_a_rogue_answer_of_100_mib_ends_its_own_stream_only(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        busy_agent(fleet, client) as (agent, task_id, victim),
    ):
        await agent.answer(task_id, HUGE)
        with pytest.raises(TaskFailed) as failed:
            await victim
        assert failed.value.code == "AGENT_LOST"
        assert (await agent.refusal()).code() is StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    ("short", "method"),
    [
        ("client/cli", "DispatchService/Execute"),
        ("client/cli", "RegistryService/GetAgent"),
        ("agent/agent-1", "RegistryService/Register"),
        ("agent/agent-1", "RegistryService/Heartbeat"),
        ("client/admin", "RegistryService/Deregister"),
    ],
)
async def test_garbage_as_a_request_ends_that_call_only(fleet: Fleet, short: str, method: str) -> None:
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        fleet.channel(short) as channel,
    ):
        call: Any = channel.unary_unary(f"/parallax.v1.{method}")
        code, details = await status(call(GARBAGE, timeout=10))
        assert code is StatusCode.INVALID_ARGUMENT
        assert details == "the message is not what this method takes; check schema and versions"


async def test_garbage_in_place_of_a_hello_ends_that_stream_only(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        fleet.channel("agent/agent-1") as channel,
    ):
        stream: Any = channel.stream_stream("/parallax.v1.SessionService/Connect")()
        await stream.write(GARBAGE)
        code, details = await status(stream.read())
        assert (code, "not what this method takes" in details) == (StatusCode.INVALID_ARGUMENT, True)
        assert [agent.agent_id for agent in await client.agents()] == ["agent-2"]


async def test_garbage_as_a_later_frame_ends_that_stream_and_fails_its_tasks_only(fleet: Fleet) -> None:
    hello = link_pb2.Hello(protocol_version=1, min_protocol_version=1, instance_id=bytes(16))
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        fleet.channel("agent/agent-1") as channel,
    ):
        stream: Any = channel.stream_stream("/parallax.v1.SessionService/Connect")()
        await stream.write(link_pb2.LinkFrame(hello=hello).SerializeToString())
        await stream.read()
        victim = asyncio.create_task(client.analyze("agent-1", "x"))
        await stream.read()
        await stream.write(GARBAGE)
        with pytest.raises(TaskFailed) as failed:
            await victim
        assert failed.value.code == "AGENT_LOST"
        code, details = await status(stream.read())
        assert (code, "not what this method takes" in details) == (StatusCode.INVALID_ARGUMENT, True)


async def test_a_second_hello_ends_that_stream_only(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        busy_agent(fleet, client) as (agent, _, victim),
    ):
        await agent.say(hello=link_pb2.Hello(instance_id=bytes(16)))
        with pytest.raises(TaskFailed) as failed:
            await victim
        assert failed.value.code == "AGENT_LOST"
        error = await agent.refusal()
        assert (error.code(), error.details()) == (
            StatusCode.INVALID_ARGUMENT,
            "the peer may not say hello on its end of a link, or twice",
        )


GOOD: dict[str, Any] = {"protocol_version": 1, "min_protocol_version": 1, "instance_id": bytes(16)}


def describing(**description: Any) -> dict[str, Any]:
    return {"hello": GOOD | {"description": registry_pb2.AgentDescription(**description)}}


@pytest.mark.parametrize(
    ("frame", "code", "message"),
    [
        ({}, "INVALID_ARGUMENT", "the first frame must carry a greeting and nothing else"),
        ({"hello": GOOD, "draining": True}, "INVALID_ARGUMENT", "a greeting and nothing else"),
        (
            {"hello": GOOD, "outcomes": [link_pb2.TaskOutcome()]},
            "INVALID_ARGUMENT",
            "a greeting and nothing else",
        ),
        ({"hello": GOOD | {"instance_id": b"x"}}, "INVALID_ARGUMENT", "must have 16 bytes, not 1"),
        ({"hello": {"instance_id": bytes(16)}}, "FAILED_PRECONDITION", "no common protocol version"),
        (
            {"hello": GOOD | {"protocol_version": 9, "min_protocol_version": 9}},
            "FAILED_PRECONDITION",
            "the peer speaks 9 to 9",
        ),
        (describing(capabilities=["../etc"]), "INVALID_ARGUMENT", "not a capability: '../etc'"),
        (
            describing(capabilities=[f"c{n}" for n in range(65)]),
            "INVALID_ARGUMENT",
            "capabilities has 65 entries",
        ),
        (describing(display_name="x" * 257), "INVALID_ARGUMENT", "display_name has 257 bytes"),
        (describing(display_name="\x1b[2J"), "INVALID_ARGUMENT", "cannot be shown"),
        (describing(labels={"k": "\n"}), "INVALID_ARGUMENT", "cannot be shown"),
        (describing(max_concurrency=4097), "INVALID_ARGUMENT", "from 1 to 4096, not 4097"),
    ],
)
async def test_a_wrong_hello_ends_that_stream_before_it_counts(
    fleet: Fleet, frame: dict[str, Any], code: str, message: str
) -> None:
    async with fleet.raw_agent("agent/agent-1") as agent, fleet.client() as client:
        if "hello" in frame:
            frame = frame | {"hello": link_pb2.Hello(**frame["hello"])}
        await agent.say(**frame)
        error = await agent.refusal()
        assert (error.code().name, message in (error.details() or "")) == (code, True), error.details()
        assert await client.agents() == []


async def test_an_agent_that_never_says_hello_is_not_kept(fleet: Fleet) -> None:
    async with (
        fleet.client() as client,
        others_go_on(fleet, client),
        fleet.raw_agent("agent/agent-1") as agent,
    ):
        error = await agent.refusal()  # after the ten seconds that the control plane waits
        assert (error.code(), error.details()) == (StatusCode.INVALID_ARGUMENT, "no greeting within 10 s")
