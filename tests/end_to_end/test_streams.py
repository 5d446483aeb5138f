"""Answers in parts: from an async generator on the agent to `async for` in the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

import pytest

from parallax.sdk import SecureAgent, SyncParallaxClient
from parallax.security.errors import InvalidRequest, TaskFailed

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Until

KIB = 1024


class Counter(SecureAgent):
    """Counts, and keeps count of what it made and how it ended."""

    made = 0
    ended: list[str]

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        try:
            for number in range(data["to"]):
                self.made = number + 1
                yield {"number": number, "ballast": "x" * data.get("ballast", 0)}, 0.5
                if number == data.get("fail_at"):
                    raise LookupError("no more numbers")
                if number == data.get("hang_at"):
                    await asyncio.sleep(60)
        except GeneratorExit:
            self.ended.append("closed")
            raise
        except asyncio.CancelledError:
            self.ended.append("cancelled")
            raise
        else:
            self.ended.append("finished")


class Whole(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return {"whole": data}, 0.75


class Both(SecureAgent):
    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        return "whole", 1.0

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        yield "a", 0.25
        yield "b", 0.5


def counter(fleet: Fleet, name: str = "agent-1") -> Counter:
    agent = fleet.agent(Counter, name)
    assert isinstance(agent, Counter)
    agent.ended = []
    return agent


async def test_parts_arrive_in_order_and_then_the_end(fleet: Fleet) -> None:
    agent = counter(fleet)
    async with agent, fleet.client() as client:
        parts = [part async for part in client.stream("agent-1", "count", {"to": 50})]
    assert [part.value["number"] for part in parts] == list(range(50))
    assert {(part.confidence, part.agent_id) for part in parts} == {(0.5, "agent-1")}
    assert agent.ended == ["finished"]


async def test_no_parts_are_an_answer_too(fleet: Fleet) -> None:
    async with counter(fleet), fleet.client() as client:
        assert [part async for part in client.stream("agent-1", "count", {"to": 0})] == []


async def test_an_agent_that_answers_all_at_once_gives_one_part(fleet: Fleet) -> None:
    async with fleet.agent(Whole), fleet.client() as client:
        parts = [part async for part in client.stream("capability:whole", "echo", 1)]
    assert [(part.value, part.confidence) for part in parts] == [({"whole": 1}, 0.75)]


async def test_an_agent_can_answer_both_ways(fleet: Fleet) -> None:
    async with fleet.agent(Both), fleet.client() as client:
        assert (await client.analyze("agent-1", "x")).value == "whole"
        assert [part.value async for part in client.stream("agent-1", "x")] == ["a", "b"]


async def test_an_agent_that_answers_in_parts_only_says_so(fleet: Fleet) -> None:
    async with counter(fleet), fleet.client() as client:
        with pytest.raises(TaskFailed, match=r"client\.stream") as failed:
            await client.analyze("agent-1", "count", {"to": 1})
    assert failed.value.code == "INVALID_ARGUMENT"


async def test_a_failure_comes_after_the_parts_before_it(fleet: Fleet) -> None:
    numbers = []
    async with counter(fleet), fleet.client() as client:
        with pytest.raises(TaskFailed, match="no more numbers") as failed:
            async for part in client.stream("agent-1", "count", {"to": 9, "fail_at": 2}):
                numbers.append(part.value["number"])  # noqa: PERF401 - one by one, until it fails
    assert numbers == [0, 1, 2]
    assert (failed.value.code, failed.value.error_type) == ("HANDLER_FAILED", "LookupError")


async def test_nobody_who_takes_parts_holds_the_generator_back(fleet: Fleet, until: Until) -> None:
    """1 MiB of parts may lie unread, and no more; the rest of the fleet works on meanwhile."""
    agent = counter(fleet)
    async with agent, fleet.agent(Whole, "agent-2"), fleet.client() as client:
        async with aclosing(client.stream("agent-1", "count", {"to": 10_000, "ballast": 64 * KIB})) as parts:
            assert (await anext(parts)).value["number"] == 0
            await until(lambda: agent.made >= 16)
            for _ in range(50):
                assert (await client.analyze("agent-2", "echo", 1)).value == {"whole": 1}
            assert agent.made <= 16 + 4
            for number in range(1, 100):
                assert (await anext(parts)).value["number"] == number
            assert agent.made <= 100 + 16 + 4
        await until(lambda: bool(agent.ended))


@pytest.mark.parametrize("data", [{"to": 1_000_000}, {"to": 5, "hang_at": 0}], ids=["making", "waiting"])
async def test_leaving_the_loop_ends_the_generator(fleet: Fleet, until: Until, data: dict[str, int]) -> None:
    agent = counter(fleet)
    async with agent, fleet.client() as client:
        async with aclosing(client.stream("agent-1", "count", data)) as parts:
            async for _ in parts:
                break
        await until(lambda: agent.ended in (["closed"], ["cancelled"]))


async def test_the_deadline_holds_for_the_whole(fleet: Fleet, until: Until) -> None:
    agent = counter(fleet)
    async with agent, fleet.client() as client:
        while not agent.made:  # a busy machine may let the time pass before
            with pytest.raises(TaskFailed) as failed:
                async for _ in client.stream("agent-1", "count", {"to": 5, "hang_at": 1}, timeout=0.5):
                    pass
            assert failed.value.code == "DEADLINE_EXCEEDED"
        await until(lambda: bool(agent.ended))


async def test_a_lost_connection_comes_after_the_parts_that_arrived(
    pki: Pki, children: Children, until: Until
) -> None:
    plane, fleet = await children.fleet(pki)
    agent = counter(fleet)
    numbers = []
    async with fleet.client() as client, agent:
        parts = client.stream("agent-1", "count", {"to": 9, "hang_at": 2})
        numbers.append((await anext(parts)).value["number"])
        await until(lambda: agent.made == 3)
        with pytest.raises(TaskFailed, match="in parts only"):  # whose refusal comes behind them
            await client.analyze("agent-1", "x")
        plane.process.kill()
        with pytest.raises(TaskFailed) as failed:
            async for part in parts:
                numbers.append(part.value["number"])  # noqa: PERF401 - those before the failure count
    assert (failed.value.code, numbers) == ("CONTROL_PLANE_LOST", [0, 1, 2])


async def test_a_broken_client_ends_its_streams(fleet: Fleet, until: Until) -> None:
    agent = counter(fleet)
    async with agent:
        async with fleet.client() as client:
            parts = client.stream("agent-1", "count", {"to": 9, "hang_at": 0})
            assert (await anext(parts)).value["number"] == 0
        with pytest.raises(TaskFailed, match="connection") as failed:
            await anext(parts)
        assert failed.value.code == "CONTROL_PLANE_LOST"
        await until(lambda: agent.ended == ["cancelled"])


async def test_many_streams_share_one_link(fleet: Fleet) -> None:
    async def numbers(client: Any, to: int) -> list[int]:
        return [part.value["number"] async for part in client.stream("agent-1", "count", {"to": to})]

    async with counter(fleet), fleet.client() as client:
        counted = await asyncio.gather(*(numbers(client, to) for to in range(40)))
    assert counted == [list(range(to)) for to in range(40)]


async def test_what_cannot_be_sent_is_refused_before(fleet: Fleet) -> None:
    async with fleet.client() as client:
        with pytest.raises(InvalidRequest):
            await anext(client.stream("agent-1", "count", object()))
        with pytest.raises(TaskFailed) as failed:
            await anext(client.stream("agent-1", "count"))
    assert failed.value.code == "NO_AGENT"


async def test_the_synchronous_client_takes_parts_too(fleet: Fleet) -> None:
    def ask() -> list[int]:
        with SyncParallaxClient(fleet.address, fleet.tls) as client:
            return [part.value["number"] for part in client.stream("agent-1", "count", {"to": 5})]

    async with counter(fleet):
        assert await asyncio.to_thread(ask) == [0, 1, 2, 3, 4]
