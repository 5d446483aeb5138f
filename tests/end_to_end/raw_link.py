"""A caller's end of a link, by hand, and an agent that answers when it may."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
from grpc import aio

from parallax.protos import agent_pb2_grpc, dispatch_pb2_grpc, link_pb2, task_pb2
from parallax.sdk import SecureAgent

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Fleet, Leaf

WITHIN_S: Final = 15.0


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

    def __init__(self, call: Any) -> None:
        self._call = call

    async def open(self) -> None:
        await self.say(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1))
        assert (await self.read()).HasField("welcome")

    async def say(self, **frame: Any) -> None:
        await self._call.write(link_pb2.LinkFrame(**frame))

    async def ask(self, number: int, name: str) -> None:
        work = link_pb2.Work(name=name, payload=task_pb2.Payload(data=b"7")).SerializeToString()
        await self.say(tasks=[link_pb2.Task(id=number, work=work, timeout_ms=60_000, target="agent-1")])

    async def read(self) -> link_pb2.LinkFrame:
        async with asyncio.timeout(WITHIN_S):
            frame = await self._call.read()
        assert isinstance(frame, link_pb2.LinkFrame), "the stream ended in order"
        return frame

    async def outcome(self) -> link_pb2.TaskOutcome:
        while not (frame := await self.read()).outcomes:
            pass
        [outcome] = frame.outcomes
        return outcome

    async def draining(self) -> None:
        while not (await self.read()).draining:
            pass

    async def end(self) -> aio.AioRpcError:
        """What the stream ends with."""
        with pytest.raises(aio.AioRpcError) as ended:
            while True:
                await self.read()
        return ended.value


@asynccontextmanager
async def link_to_control_plane(fleet: Fleet, leaf: Leaf) -> AsyncIterator[RawLink]:
    """One that is open, of whoever *leaf* names."""
    async with fleet.channel(leaf) as channel:
        link = RawLink(dispatch_pb2_grpc.DispatchServiceStub(channel).Link())
        await link.open()
        yield link


@asynccontextmanager
async def link_to_agent(agent: SecureAgent, leaf: Leaf) -> AsyncIterator[RawLink]:
    """The same to agent-1, which listens."""
    options = [("grpc.ssl_target_name_override", "agent-1.agents.parallax.local")]
    credentials = leaf.channel_credentials()
    async with aio.secure_channel(str(agent.endpoint), credentials, options=options) as channel:
        link = RawLink(agent_pb2_grpc.AgentServiceStub(channel).Link())
        await link.open()
        yield link
