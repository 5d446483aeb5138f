"""Listing, watching and removing over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from grpc import StatusCode, aio

from parallax.control_plane import registry_service
from parallax.control_plane.registry import AgentRef
from parallax.protos import registry_pb2, registry_pb2_grpc
from parallax.runtime import wire
from parallax.sdk import AgentEvent, ParallaxClient, SyncParallaxClient
from parallax.security.errors import InvalidRequest, NoSuchAgent, NotAuthorized, Unavailable
from tests.end_to_end.relay import relay

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve, Until

PROMPTLY_S = 15.0  # on a machine that is busy; what does not read is left after 30 seconds at the earliest


def stub(channel: aio.Channel) -> Any:
    return registry_pb2_grpc.RegistryServiceStub(channel)


async def register(fleet: Fleet, name: str, endpoint: str = "", **description: Any) -> int:
    """A direct registration of *name*, which no process keeps alive; its generation."""
    async with fleet.channel(f"agent/{name}") as channel:
        said = registry_pb2.AgentDescription(**description)
        answer = await stub(channel).Register(
            registry_pb2.RegisterRequest(description=said, endpoint=endpoint), timeout=10
        )
        return int(answer.generation)


class Watch:
    """What a client's watch says."""

    def __init__(self, events: Any) -> None:
        self._events = events

    async def next(self) -> AgentEvent:
        """The next event."""
        async with asyncio.timeout(PROMPTLY_S):
            event = await anext(self._events)
        assert isinstance(event, AgentEvent)
        return event

    async def line(self) -> tuple[str, str]:
        """Its kind and agent."""
        event = await self.next()
        return event.kind, event.agent.agent_id if event.agent else ""

    async def until_synced(self) -> list[tuple[str, str]]:
        """All that comes before the state is complete."""
        lines = []
        while (line := await self.line()) != ("synced", ""):
            lines.append(line)
        return lines


@asynccontextmanager
async def watching(client: ParallaxClient, **wanted: Any) -> AsyncIterator[Watch]:
    async with aclosing(client.watch_agents(**wanted)) as events:
        yield Watch(events)


async def watchers(fleet: Fleet) -> int:
    return len(fleet.plane.changes)


# Listing.


async def test_a_filter_is_applied_by_the_control_plane(fleet: Fleet) -> None:
    await register(fleet, "agent-1", "h:1", capabilities=["echo", "sum"], labels={"zone": "a", "gpu": ""})
    await register(fleet, "agent-2", capabilities=["echo"], labels={"zone": "b"})
    async with fleet.raw_agent("agent/agent-3", capabilities=["echo"]), fleet.client() as client:

        async def ids(**wanted: Any) -> list[str]:
            return [agent.agent_id for agent in await client.agents(**wanted)]

        assert await ids() == ["agent-1", "agent-2", "agent-3"]
        assert await ids(capability="echo") == ["agent-1", "agent-2", "agent-3"]
        assert await ids(capability=["echo", "sum"]) == ["agent-1"]
        assert await ids(labels={"zone": None}) == ["agent-1", "agent-2"]
        assert await ids(labels={"zone": "b"}) == ["agent-2"]
        assert await ids(labels={"gpu": ""}) == ["agent-1"]
        assert await ids(state="ready") == ["agent-3"]
        assert await ids(state=["ready", "registered"], labels={"zone": "a"}) == ["agent-1"]
        assert await ids(verified=False) == []
        assert await ids(capability="other") == []
        for wrong in (
            {"state": "gone"},
            {"capability": "No such"},
            {"labels": dict.fromkeys(map(str, range(65)))},
        ):
            with pytest.raises(InvalidRequest):
                await client.agents(**wrong)


async def test_a_filter_that_the_control_plane_does_not_understand_is_refused(fleet: Fleet) -> None:
    """Left out, it would list more than was asked for."""
    label = registry_pb2.LabelFilter(key="a", value="1")
    wrong = (
        registry_pb2.AgentFilter(states=[99]),  # type: ignore[list-item]
        registry_pb2.AgentFilter(states=[registry_pb2.AGENT_STATE_UNSPECIFIED]),
        registry_pb2.AgentFilter(labels=[label, label]),
        registry_pb2.AgentFilter(capabilities=["\x1b"]),
    )
    async with fleet.channel("client/cli") as channel:
        for each in wrong:
            with pytest.raises(aio.AioRpcError) as refused:
                await stub(channel).ListAgents(registry_pb2.ListAgentsRequest(filter=each), timeout=10)
            assert refused.value.code() is StatusCode.INVALID_ARGUMENT
            with pytest.raises(aio.AioRpcError) as refused:
                await stub(channel).WatchAgents(registry_pb2.WatchAgentsRequest(filter=each)).read()
            assert refused.value.code() is StatusCode.INVALID_ARGUMENT


async def pages(channel: aio.Channel, **request: Any) -> list[registry_pb2.ListAgentsResponse]:
    found, token = [], ""
    while True:
        asked = registry_pb2.ListAgentsRequest(page_token=token, **request)
        found.append(await stub(channel).ListAgents(asked, timeout=10))
        token = found[-1].next_page_token
        if not token:
            return found


async def test_pages_hold_as_many_as_asked_for_and_go_on_where_they_stopped(fleet: Fleet) -> None:
    names = [f"a{number:03}" for number in range(120)]
    await enter(fleet, *names)
    async with fleet.channel("client/cli") as channel:
        for size, expected in ((50, [50, 50, 20]), (60, [60, 60]), (0, [100, 20]), (5_000, [120])):
            found = await pages(channel, page_size=size)
            assert [len(page.agents) for page in found] == expected
            assert [agent.agent_id for page in found for agent in page.agents] == names


async def test_pages_are_stable_while_agents_come_and_go(fleet: Fleet) -> None:
    await enter(fleet, "b", "c", "d", "f")
    async with fleet.channel("client/cli") as channel:
        first = await stub(channel).ListAgents(registry_pb2.ListAgentsRequest(page_size=2), timeout=10)
        assert [agent.agent_id for agent in first.agents] == ["b", "c"]
        await remove(fleet, "b", "c", "d")
        await enter(fleet, "a", "e")
        request = registry_pb2.ListAgentsRequest(page_token=first.next_page_token)
        rest = await stub(channel).ListAgents(request, timeout=10)
        assert [agent.agent_id for agent in rest.agents] == ["e", "f"]


async def test_a_page_of_the_largest_records_stays_far_below_the_limit(fleet: Fleet) -> None:
    pairs = {f"{number:02}{'k' * 254}": "v" * 256 for number in range(64)}
    largest = {
        "display_name": "n" * 256,
        "capabilities": [f"{number:02}{'c' * 61}" for number in range(64)],
        "labels": pairs,
        "metadata": pairs,
    }
    names = [f"a{number:02}" for number in range(20)]
    await enter(fleet, *names, **largest)
    async with fleet.channel("client/cli") as channel, fleet.client() as client:
        found = await pages(channel, page_size=1000)
        assert max(page.ByteSize() for page in found) < 300_000
        assert min(len(page.agents) for page in found[:-1]) > 1
        assert [agent.agent_id for page in found for agent in page.agents] == names
        assert [agent.agent_id for agent in await client.agents()] == names
        async with watching(client) as watch:
            assert await watch.until_synced() == [("added", name) for name in names]


async def test_a_page_looks_at_a_bounded_number_of_records(fleet: Fleet) -> None:
    await enter(fleet, *(f"a{number:04}" for number in range(4_500)))
    await enter(fleet, "z", capabilities=["rare"])
    async with fleet.channel("client/cli") as channel, fleet.client() as client:
        found = await pages(channel, filter=registry_pb2.AgentFilter(capabilities=["rare"]))
        assert [len(page.agents) for page in found] == [0, 0, 1]
        assert [agent.agent_id for agent in await client.agents(capability="rare")] == ["z"]
        assert len(await client.agents()) == 4_501
        async with watching(client, capability="rare") as watch:
            assert await watch.until_synced() == [("added", "z")]


@pytest.mark.parametrize("token", ["x", "agent-1", "!", "Li4vYQ==", "YQ", "AA==", "gICA", "A" * 100_000])
async def test_a_page_token_that_is_none_is_refused(fleet: Fleet, token: str) -> None:
    async with fleet.channel("client/cli") as channel:
        with pytest.raises(aio.AioRpcError) as refused:
            await stub(channel).ListAgents(registry_pb2.ListAgentsRequest(page_token=token), timeout=10)
        assert refused.value.code() is StatusCode.INVALID_ARGUMENT
        assert len(refused.value.details() or "") < 200


async def enter(fleet: Fleet, *names: str, **description: Any) -> None:
    """Registrations as if the agents had made them."""
    said = wire.description_from_proto(registry_pb2.AgentDescription(**description))
    now = asyncio.get_running_loop().time()
    for name in names:
        fleet.plane.registry.register(AgentRef(name), None, said, now=now, at=datetime.now(UTC))


async def remove(fleet: Fleet, *names: str) -> None:
    for name in names:
        fleet.plane.sessions.remove(AgentRef(name))


# Watching.


async def test_a_watch_tells_the_state_then_what_changes(fleet: Fleet) -> None:
    await register(fleet, "agent-2", "h:1")
    async with fleet.client() as client, watching(client) as watch:
        assert await watch.until_synced() == [("added", "agent-2")]
        async with fleet.raw_agent("agent/agent-1", agent_id="agent-1") as agent:
            event = await watch.next()
            assert (event.kind, event.agent and event.agent.state) == ("added", "ready")
            await agent.say(draining=True)
            event = await watch.next()
            assert (event.kind, event.agent and event.agent.state) == ("changed", "draining")
        event = await watch.next()
        assert event.kind == "removed"
        assert event.agent is not None
        assert (event.agent.agent_id, event.agent.state) == ("agent-1", "draining"), "as it last was"
        await register(fleet, "agent-2", "h:2")
        event = await watch.next()
        assert (event.kind, event.agent and event.agent.endpoint) == ("changed", "h:2")


async def test_a_watch_through_a_filter_tells_who_comes_to_match(fleet: Fleet) -> None:
    async with fleet.client() as client, watching(client, capability="echo", state="ready") as watch:
        assert await watch.until_synced() == []
        async with (
            fleet.raw_agent("agent/agent-2", capabilities=["other"]),
            fleet.raw_agent("agent/agent-1", capabilities=["echo"]) as agent,
        ):
            assert await watch.line() == ("added", "agent-1")
            await agent.say(draining=True)
            assert await watch.line() == ("removed", "agent-1")


@pytest.mark.parametrize(
    "short", ["agent/agent-1", "agent/admin", "service/agent-proxy", "service/control-plane"]
)
async def test_only_a_clients_certificate_watches(fleet: Fleet, short: str) -> None:
    async with fleet.channel(short) as channel:
        with pytest.raises(aio.AioRpcError) as refused:
            await stub(channel).WatchAgents(registry_pb2.WatchAgentsRequest()).read()
        assert refused.value.code() is StatusCode.PERMISSION_DENIED
    assert await watchers(fleet) == 0


async def test_a_watch_that_may_not_be_is_not_tried_again(fleet: Fleet) -> None:
    async with fleet.client() as client:
        client._identity = "client/cli"
        with pytest.raises(InvalidRequest, match="not a state"):
            await anext(client.watch_agents(state="gone"))
        client._identity = "agent/agent-1"
        await client.close()
        with pytest.raises(NotAuthorized, match="may not call"):
            await anext(client.watch_agents())


async def test_who_stops_watching_leaves_nothing_behind(fleet: Fleet, until: Until) -> None:
    async with fleet.client() as client:
        for _ in range(3):
            async with watching(client) as watch:
                await watch.until_synced()
                await until(lambda: len(fleet.plane.changes) == 1)  # the last one may have yet to go
        await until(lambda: len(fleet.plane.changes) == 0)
        async with watching(client) as watch:
            await watch.until_synced()
            waiting = asyncio.ensure_future(watch.next())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
    await until(lambda: len(fleet.plane.changes) == 0)


async def test_a_watch_ends_with_its_client(fleet: Fleet) -> None:
    async with fleet.client() as client, watching(client) as watch:
        await watch.until_synced()
        waiting = asyncio.ensure_future(watch.next())
        await asyncio.sleep(0.05)
        await client.close()
        with pytest.raises(StopAsyncIteration):
            await waiting


async def test_a_watcher_that_does_not_read_holds_nothing_up(serve: Serve, until: Until) -> None:
    """Neither the others nor the end; what waits for it stays bounded by the number of agents."""
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(serve())
        channel = await stack.enter_async_context(fleet.channel("client/cli"))
        client = await stack.enter_async_context(fleet.client())
        await enter(fleet, "a", "b")
        deaf = stub(channel).WatchAgents(registry_pb2.WatchAgentsRequest())
        await deaf.read()
        [watcher] = fleet.plane.changes._watchers
        watch = await stack.enter_async_context(watching(client))
        await watch.until_synced()
        text = {f"{number:02}{'k' * 200}": "v" * 250 for number in range(60)}
        for number in range(300):
            await enter(fleet, "a", metadata=text | {"n": str(number)})
            event = await watch.next()
            assert event.agent is not None
            assert event.agent.metadata["n"] == str(number)
        assert len(watcher) == 1, "it is stuck, and what waits is one agent"
        began = asyncio.get_running_loop().time()
        await stack.aclose()
        assert asyncio.get_running_loop().time() - began < PROMPTLY_S
        del deaf


async def test_a_watcher_that_does_not_read_for_long_is_cut_off(
    fleet: Fleet, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry_service, "STALLED_S", 0.3)
    text = {f"{number:02}{'k' * 200}": "v" * 250 for number in range(60)}
    await enter(fleet, *(f"a{number:03}" for number in range(300)), metadata=text)
    async with fleet.channel("client/cli") as channel:
        deaf = stub(channel).WatchAgents(registry_pb2.WatchAgentsRequest())
        await until(lambda: len(fleet.plane.changes) == 1)
        await until(lambda: len(fleet.plane.changes) == 0)
        with pytest.raises(aio.AioRpcError) as refused:
            while await deaf.read() is not aio.EOF:
                pass
        assert refused.value.code() is StatusCode.UNAVAILABLE
        assert "was not read" in (refused.value.details() or "")


async def test_a_watch_resumes_when_the_connection_was_lost(
    pki: Pki, children: Children, fleet: Fleet
) -> None:
    """By way of a relay that breaks it."""
    async with relay(fleet.port) as (port, cut):
        client = ParallaxClient(f"localhost:{port}", fleet.tls)
        async with client, watching(client) as watch:
            await enter(fleet, "a", "b")
            while (await watch.line())[0] != "synced":
                pass
            cut()
            await enter(fleet, "c")
            await remove(fleet, "a")
            got = sorted(await watch.until_synced())
            assert got == [("added", "c"), ("removed", "a")]
            await enter(fleet, "d")
            assert await watch.line() == ("added", "d")


async def test_a_watch_begins_anew_where_too_much_was_missed(fleet: Fleet) -> None:
    fleet.plane.changes._log_limit = 2
    async with relay(fleet.port) as (port, cut):
        await enter(fleet, "a", "b")
        client = ParallaxClient(f"localhost:{port}", fleet.tls)
        async with client, watching(client) as watch:
            assert await watch.until_synced() == [("added", "a"), ("added", "b")]
            cut()
            await remove(fleet, "a")
            await enter(fleet, "c", "d", "e")
            assert await watch.until_synced() == [
                ("added", "c"),
                ("added", "d"),
                ("added", "e"),
                ("removed", "a"),
            ], "b is not told again"


@pytest.mark.timeout(90)
async def test_a_watch_outlives_its_control_plane(pki: Pki, children: Children) -> None:
    plane, fleet = await children.fleet(pki)
    agent = await children.agent(fleet)
    async with fleet.client() as client, watching(client) as watch:
        assert await watch.until_synced() == [("added", "agent-1")]
        plane.process.kill()
        await plane.ended()
        _, fleet = await children.fleet(pki, PARALLAX_LISTEN=f"127.0.0.1:{fleet.port}")
        lines = await watch.until_synced()
        assert lines in ([], [("removed", "agent-1")], [("changed", "agent-1")])
        await agent.said("not connected")
        while lines in ([], [("removed", "agent-1")]):
            lines.append(await watch.line())
        assert lines[-1][1] == "agent-1"
        assert lines[-1][0] in {"added", "changed"}


async def test_watches_end_when_the_control_plane_drains(serve: Serve) -> None:
    async with serve() as fleet, fleet.channel("client/cli") as channel:
        call = stub(channel).WatchAgents(registry_pb2.WatchAgentsRequest())
        first = await call.read()
        assert (first.fresh, first.synced) == (True, True)
        fleet.plane.changes.close()
        with pytest.raises(aio.AioRpcError, match="shutting down") as refused:
            await call.read()
        assert refused.value.code() is StatusCode.UNAVAILABLE


# Removing and registering.


async def test_removing_says_whether_there_was_one(fleet: Fleet) -> None:
    await register(fleet, "agent-1", "h:1")
    async with fleet.client("client/admin") as admin:
        assert await admin.remove_agent("agent-1") is True
        assert await admin.remove_agent("agent-1") is False
        with pytest.raises(NoSuchAgent):
            await admin.agent("agent-1")
    async with fleet.client() as client:
        with pytest.raises(NotAuthorized, match="act as --identity client/admin"):
            await client.remove_agent("agent-1")


async def test_the_synchronous_client_lists_and_removes_too(fleet: Fleet) -> None:
    await register(fleet, "agent-1", labels={"zone": "a"})

    def ask() -> tuple[list[str], list[str], bool, bool]:
        with SyncParallaxClient(fleet.address, fleet.tls, identity="client/admin") as client:
            found = [agent.agent_id for agent in client.agents(labels={"zone": "a"})]
            others = [agent.agent_id for agent in client.agents(state="ready")]
            return found, others, client.remove_agent("agent-1"), client.remove_agent("agent-1")

    assert await asyncio.to_thread(ask) == (["agent-1"], [], True, False)


async def test_a_watch_ends_with_the_certificate_it_was_begun_with(fleet: Fleet, until: Until) -> None:
    leaf = fleet.pki.issue("client/cli", now=datetime.now(UTC), lifetime=timedelta(seconds=6))
    async with fleet.channel(leaf) as channel:
        call = stub(channel).WatchAgents(registry_pb2.WatchAgentsRequest())
        assert (await call.read()).synced
        with pytest.raises(aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() is StatusCode.UNAUTHENTICATED
    await until(lambda: len(fleet.plane.changes) == 0)


async def test_a_registration_beside_a_session_is_one_record(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1") as agent,
        fleet.client() as client,
        fleet.channel("agent/agent-1") as channel,
    ):
        (before,) = await client.agents()
        generation = await register(fleet, "agent-1", "127.0.0.1:7000", capabilities=["direct"])
        (both,) = await client.agents()
        assert (both.generation, both.state) == (before.generation, "ready")
        assert (both.endpoint, both.capabilities) == ("127.0.0.1:7000", ("direct",))
        await stub(channel).Heartbeat(registry_pb2.HeartbeatRequest(generation=generation), timeout=10)
        agent.hang_up()
        async with asyncio.timeout(PROMPTLY_S):
            while (await client.agent("agent-1")).state != "registered":
                await asyncio.sleep(0.01)
        left = await client.agent("agent-1")
        assert (left.generation, left.endpoint) == (generation, "127.0.0.1:7000")
        await stub(channel).Deregister(registry_pb2.DeregisterRequest(generation=generation), timeout=10)
        assert await client.agents() == []


async def test_taking_back_a_registration_leaves_the_session(fleet: Fleet) -> None:
    async with (
        fleet.raw_agent("agent/agent-1", agent_id="agent-1"),
        fleet.client() as client,
        fleet.channel("agent/agent-1") as channel,
    ):
        (before,) = await client.agents()
        generation = await register(fleet, "agent-1", "127.0.0.1:7000")
        await stub(channel).Deregister(registry_pb2.DeregisterRequest(generation=generation), timeout=10)
        (after,) = await client.agents()
        assert (after.endpoint, after.state, after.generation) == ("", "ready", before.generation)
        with pytest.raises(aio.AioRpcError, match="register again") as refused:
            await stub(channel).Heartbeat(registry_pb2.HeartbeatRequest(generation=generation), timeout=10)
        assert refused.value.code() is StatusCode.FAILED_PRECONDITION


@pytest.mark.parametrize("endpoint", ["nonsense", "host", "host:0", ":1", "a b:1", "host:99999"])
async def test_an_endpoint_that_cannot_be_dialled_is_refused(fleet: Fleet, endpoint: str) -> None:
    with pytest.raises(aio.AioRpcError) as refused:
        await register(fleet, "agent-1", endpoint)
    assert refused.value.code() is StatusCode.INVALID_ARGUMENT


async def test_a_client_whose_control_plane_is_gone_keeps_trying(serve: Serve) -> None:
    async with AsyncExitStack() as stack:
        fleet = await stack.enter_async_context(serve())
        client = await stack.enter_async_context(fleet.client())
        watch = await stack.enter_async_context(watching(client))
        await watch.until_synced()
        waiting = asyncio.ensure_future(watch.next())
        fleet.plane.changes.close()
        await asyncio.wait({waiting}, timeout=0.5)
        assert not waiting.done()
        waiting.cancel()
        with pytest.raises((asyncio.CancelledError, Unavailable)):
            await waiting
