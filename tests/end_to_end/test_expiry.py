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
    dispatch_pb2,
    dispatch_pb2_grpc,
    registry_pb2,
    registry_pb2_grpc,
    task_pb2,
)
from parallax.sdk import ParallaxClient
from parallax.security.errors import TaskFailed
from tests.end_to_end.raw_link import Patient, RawLink, link_to_agent, link_to_control_plane

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Leaf, Listen, Pki, Serve

WITHIN_S = 15.0
# How late by the clock is asked in `tests/runtime/test_expiry.py`. Here the machine may be busy: what is open
# has the drain time, and what is not ends long before.
DRAIN_S = 4.0
LONG_DRAIN_S = 20.0
AT_ONCE_S = LONG_DRAIN_S / 2


def seconds_since(moment: datetime) -> float:
    return (datetime.now(UTC) - moment).total_seconds()


def short_lived(pki: Pki, short: str) -> Leaf:
    """For six seconds at most, and five at least: certificates know whole ones. It is used within them."""
    return pki.issue(short, now=datetime.now(UTC), lifetime=timedelta(seconds=6))


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
        serve(drain_seconds=LONG_DRAIN_S) as fleet,
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
        serve(drain_seconds=LONG_DRAIN_S) as fleet,
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
    async with serve(drain_seconds=DRAIN_S) as fleet:
        leaf = short_lived(fleet.pki, "agent/agent-1")
        expires = leaf.certificate.not_valid_after_utc
        async with (
            fleet.raw_agent(leaf, agent_id="agent-1") as agent,
            fleet.client() as client,
            asked(client) as lost,
        ):
            await agent.task()
            assert is_expired(await agent.refusal())
            assert DRAIN_S <= seconds_since(expires) < 2 * DRAIN_S
            with pytest.raises(TaskFailed) as failed:
                await lost
            assert failed.value.code == "AGENT_LOST"


async def test_a_session_that_holds_nothing_ends_with_its_certificate(serve: Serve, pki: Pki) -> None:
    async with serve(drain_seconds=LONG_DRAIN_S) as fleet:
        leaf = short_lived(pki, "agent/agent-1")
        async with fleet.raw_agent(leaf, agent_id="agent-1") as agent:
            assert is_expired(await agent.refusal())
            assert 0 <= seconds_since(leaf.certificate.not_valid_after_utc) < AT_ONCE_S


async def test_a_session_that_has_not_begun_ends_with_its_certificate(serve: Serve, pki: Pki) -> None:
    async with serve(drain_seconds=LONG_DRAIN_S) as fleet:
        leaf = short_lived(pki, "agent/agent-1")
        async with fleet.raw_agent(leaf) as agent:
            assert is_expired(await agent.refusal())
            assert seconds_since(leaf.certificate.not_valid_after_utc) < AT_ONCE_S


# A caller's link: to the control plane, and to an agent that listens.


@pytest.fixture
def drain_s() -> float:
    """How long a link may outlast its certificate."""
    return LONG_DRAIN_S


@pytest.fixture(params=["to the control plane", "to an agent"])
async def link(
    request: pytest.FixtureRequest,
    serve: Serve,
    listen: Listen,
    pki: Pki,
    drain_s: float,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[RawLink, Patient, datetime]]:
    """One that is open, with a certificate that is not valid for long; the agent, and until when."""
    if request.param == "to the control plane":
        async with serve(drain_seconds=drain_s) as fleet, fleet.agent(Patient) as agent:
            leaf = short_lived(pki, "client/cli")
            async with link_to_control_plane(fleet, leaf) as made:
                yield made, agent, leaf.certificate.not_valid_after_utc
    else:
        monkeypatch.setenv("PARALLAX_DRAIN_SECONDS", str(drain_s))
        async with listen(Patient) as agent:
            leaf = short_lived(pki, "client/cli")
            async with link_to_agent(agent, leaf) as made:
                yield made, agent, leaf.certificate.not_valid_after_utc


async def test_what_is_open_on_a_link_when_its_certificate_expires_is_answered_and_nothing_new_begins(
    link: tuple[RawLink, Patient, datetime],
) -> None:
    line, agent, expires = link
    await line.ask(1, "wait")
    await agent.begun.wait()
    agent.begun.clear()
    await line.draining()
    assert 0 <= seconds_since(expires) < AT_ONCE_S
    await line.ask(2, "wait")
    refused = await line.outcome()
    assert (refused.task_id, refused.failure.error_type) == (2, "Expired")
    assert refused.failure.code == task_pb2.OUTCOME_CODE_INVALID_ARGUMENT
    assert "renew it" in refused.failure.message
    assert not agent.begun.is_set()
    agent.release.set()
    kept = await line.outcome()
    assert (kept.task_id, kept.WhichOneof("result")) == (1, "value")
    assert is_expired(await line.end())


@pytest.mark.parametrize("drain_s", [DRAIN_S])
async def test_a_link_ends_the_drain_time_after_its_certificate_whatever_is_open(
    link: tuple[RawLink, Patient, datetime],
) -> None:
    line, agent, expires = link
    await line.ask(1, "wait")
    await agent.begun.wait()
    assert is_expired(await line.end())
    assert DRAIN_S <= seconds_since(expires) < 2 * DRAIN_S


async def test_a_link_on_which_nothing_is_open_ends_with_its_certificate(
    link: tuple[RawLink, Patient, datetime],
) -> None:
    line, _, expires = link
    await line.ask(1, "echo")
    await line.outcome()
    assert is_expired(await line.end())
    assert 0 <= seconds_since(expires) < AT_ONCE_S


# Every other call.


@pytest.mark.parametrize("kind", ["a task of its own", "a watch"])
async def test_a_call_that_is_no_link_ends_with_its_certificate(serve: Serve, pki: Pki, kind: str) -> None:
    async with serve(drain_seconds=LONG_DRAIN_S) as fleet, fleet.agent(Patient):
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
            assert 0 <= seconds_since(leaf.certificate.not_valid_after_utc) < AT_ONCE_S
