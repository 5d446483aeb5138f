"""Streams whose certificate expires: nothing new, time for what is open, and an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio

from parallax.protos import (
    agent_pb2_grpc,
    dispatch_pb2,
    dispatch_pb2_grpc,
    link_pb2,
    registry_pb2,
    registry_pb2_grpc,
    task_pb2,
)
from parallax.sdk import ParallaxClient, SecureAgent
from parallax.security.errors import TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf, Listen, Pki, Serve

WITHIN_S = 15.0
LATE_S = 1.5  # a stream may end a second late, and the machine may be busy
Frame = link_pb2.LinkFrame


class Patient(SecureAgent):
    """Answers `wait` when it may, and everything else at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.begun = asyncio.Event()
        self.release = asyncio.Event()

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        if task == "wait":
            self.begun.set()
            await self.release.wait()
        return data, 1.0


class RawLink:
    """A caller's end of a link, by hand."""

    def __init__(self, call: Any, leaf: Leaf) -> None:
        self._call = call
        self.expires = leaf.certificate.not_valid_after_utc

    async def open(self) -> None:
        await self.say(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1))
        assert (await self.read()).HasField("welcome")

    async def say(self, **frame: Any) -> None:
        await self._call.write(Frame(**frame))

    async def ask(self, number: int, name: str) -> None:
        work = link_pb2.Work(name=name, payload=task_pb2.Payload(data=b"x")).SerializeToString()
        await self.say(tasks=[link_pb2.Task(id=number, work=work, timeout_ms=60_000, target="agent-1")])

    async def read(self) -> Frame:
        async with asyncio.timeout(WITHIN_S):
            frame = await self._call.read()
        assert isinstance(frame, Frame), "the stream ended in order"
        return frame

    async def outcome(self) -> link_pb2.TaskOutcome:
        while not (frame := await self.read()).outcomes:
            pass
        [outcome] = frame.outcomes
        return outcome

    async def draining(self) -> None:
        while not (await self.read()).draining:
            pass

    async def end(self) -> tuple[aio.AioRpcError, float]:
        """What the stream ends with, and how long after its certificate."""
        with pytest.raises(aio.AioRpcError) as ended:
            while True:
                await self.read()
        return ended.value, seconds_since(self.expires)


def seconds_since(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds()


def short_lived(pki: Pki, short: str) -> Leaf:
    """For three seconds at most, and two at least: certificates know whole ones."""
    return pki.issue(short, now=datetime.now(UTC), lifetime=timedelta(seconds=3))


def is_expired(error: aio.AioRpcError) -> bool:
    assert error.code() is StatusCode.UNAUTHENTICATED
    assert dict(error.trailing_metadata() or ()) == {"parallax-error": "Expired"}
    return "expired during the call; renew it" in (error.details() or "")


@asynccontextmanager
async def asked(client: ParallaxClient) -> AsyncIterator[asyncio.Task[Any]]:
    waiting = asyncio.create_task(client.analyze("agent-1", "x"))
    try:
        yield waiting
    finally:
        waiting.cancel()
        await asyncio.wait({waiting})


async def state_is(client: ParallaxClient, state: str) -> None:
    async with asyncio.timeout(WITHIN_S):
        while (await client.agent("agent-1")).state != state:
            await asyncio.sleep(0.02)


# An agent's session.


async def test_what_an_agent_holds_when_its_certificate_expires_it_may_still_answer(serve: Serve) -> None:
    async with (
        serve(drain_seconds=20) as fleet,
        fleet.raw_agent(short_lived(fleet.pki, "agent/agent-1"), agent_id="agent-1") as agent,
        fleet.client() as client,
        asked(client) as kept,
    ):
        task = await agent.task()
        await state_is(client, "draining")
        await agent.answer(task.id, b"late")
        assert (await kept).value == b"late"
        assert is_expired(await agent.refusal())


async def test_an_agent_whose_certificate_has_expired_is_given_nothing_new(serve: Serve) -> None:
    async with (
        serve(drain_seconds=20) as fleet,
        fleet.raw_agent(short_lived(fleet.pki, "agent/agent-1"), agent_id="agent-1") as agent,
        fleet.client() as client,
        asked(client) as kept,
    ):
        first = await agent.task()
        await state_is(client, "draining")
        with pytest.raises(TaskFailed) as failed:
            await client.analyze("agent-1", "x")
        assert failed.value.code == "NO_AGENT"
        await agent.answer(first.id)
        await kept
        with pytest.raises(aio.AioRpcError):  # there is no other
            await agent.task()


async def test_a_session_ends_the_drain_time_after_its_certificate_whatever_it_holds(serve: Serve) -> None:
    async with serve(drain_seconds=2) as fleet:
        leaf = short_lived(fleet.pki, "agent/agent-1")
        expires = leaf.certificate.not_valid_after_utc
        async with (
            fleet.raw_agent(leaf, agent_id="agent-1") as agent,
            fleet.client() as client,
            asked(client) as lost,
        ):
            await agent.task()
            assert is_expired(await agent.refusal())
            assert 2 <= seconds_since(expires) <= 2 + LATE_S
            with pytest.raises(TaskFailed) as failed:
                await lost
            assert failed.value.code == "AGENT_LOST"


async def test_a_session_that_holds_nothing_ends_with_its_certificate(fleet: Fleet) -> None:
    leaf = short_lived(fleet.pki, "agent/agent-1")
    async with fleet.raw_agent(leaf, agent_id="agent-1") as agent:
        assert is_expired(await agent.refusal())
        assert 0 <= seconds_since(leaf.certificate.not_valid_after_utc) <= LATE_S


async def test_a_session_that_has_not_begun_ends_with_its_certificate(fleet: Fleet) -> None:
    leaf = short_lived(fleet.pki, "agent/agent-1")
    async with fleet.raw_agent(leaf) as agent:
        assert is_expired(await agent.refusal())
        assert seconds_since(leaf.certificate.not_valid_after_utc) <= LATE_S


# A caller's link: to the control plane, and to an agent that listens.


@pytest.fixture(params=["to the control plane", "to an agent"])
async def link(
    request: pytest.FixtureRequest, serve: Serve, listen: Listen, pki: Pki
) -> AsyncIterator[tuple[RawLink, Patient, float]]:
    """One that is open, with a certificate that is not valid for long; the agent, and the drain time."""
    drain_s = 2.0
    if request.param == "to the control plane":
        async with serve(drain_seconds=drain_s) as fleet, fleet.agent(Patient) as agent:
            leaf = short_lived(pki, "client/cli")
            async with fleet.channel(leaf) as channel:
                made = RawLink(dispatch_pb2_grpc.DispatchServiceStub(channel).Link(), leaf)
                await made.open()
                yield made, agent, drain_s
    else:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("PARALLAX_DRAIN_SECONDS", str(drain_s))
            async with listen(Patient) as agent:
                assert isinstance(agent, Patient)
                leaf = short_lived(pki, "client/cli")
                options = [("grpc.ssl_target_name_override", "agent-1.agents.parallax.local")]
                async with aio.secure_channel(
                    str(agent.endpoint), leaf.channel_credentials(), options=options
                ) as channel:
                    made = RawLink(agent_pb2_grpc.AgentServiceStub(channel).Link(), leaf)
                    await made.open()
                    yield made, agent, drain_s


async def test_what_is_open_on_a_link_when_its_certificate_expires_is_answered_and_nothing_new_begins(
    link: tuple[RawLink, Patient, float],
) -> None:
    line, agent, _ = link
    await line.ask(1, "wait")
    await agent.begun.wait()
    agent.begun.clear()
    await line.draining()
    assert 0 <= seconds_since(line.expires) <= LATE_S
    await line.ask(2, "wait")
    refused = await line.outcome()
    assert (refused.task_id, refused.failure.error_type) == (2, "Expired")
    assert refused.failure.code == task_pb2.OUTCOME_CODE_INVALID_ARGUMENT
    assert "renew it" in refused.failure.message
    assert not agent.begun.is_set()
    agent.release.set()
    kept = await line.outcome()
    assert (kept.task_id, kept.WhichOneof("result")) == (1, "value")
    error, _ = await line.end()
    assert is_expired(error)


async def test_a_link_ends_the_drain_time_after_its_certificate_whatever_is_open(
    link: tuple[RawLink, Patient, float],
) -> None:
    line, agent, drain_s = link
    await line.ask(1, "wait")
    await agent.begun.wait()
    error, after = await line.end()
    assert is_expired(error)
    assert drain_s <= after <= drain_s + LATE_S


async def test_a_link_on_which_nothing_is_open_ends_with_its_certificate(
    link: tuple[RawLink, Patient, float],
) -> None:
    line, _, _ = link
    await line.ask(1, "echo")
    await line.outcome()
    error, after = await line.end()
    assert is_expired(error)
    assert 0 <= after <= LATE_S


# Every other call.


@pytest.mark.parametrize("kind", ["a task of its own", "a watch"])
async def test_a_call_that_is_no_link_ends_with_its_certificate(serve: Serve, pki: Pki, kind: str) -> None:
    async with serve(drain_seconds=20) as fleet, fleet.agent(Patient):
        leaf = short_lived(pki, "client/cli")
        async with fleet.channel(leaf) as channel:
            with pytest.raises(aio.AioRpcError) as ended:
                if kind == "a watch":
                    stub = registry_pb2_grpc.RegistryServiceStub(channel)
                    async for _ in stub.WatchAgents(registry_pb2.WatchAgentsRequest(), timeout=WITHIN_S):
                        pass
                else:
                    request = dispatch_pb2.ExecuteRequest(target="agent-1", task="wait")
                    await dispatch_pb2_grpc.DispatchServiceStub(channel).Execute(request, timeout=WITHIN_S)
            assert is_expired(ended.value)
            assert 0 <= seconds_since(leaf.certificate.not_valid_after_utc) <= LATE_S
