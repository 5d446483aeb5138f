"""What an agent serves where it listens itself: its work, one call each or many on a link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, Final

from grpc import aio

from parallax.protos import agent_pb2, agent_pb2_grpc, link_pb2
from parallax.runtime import wire
from parallax.runtime.caller import Caller, current_caller
from parallax.runtime.description import AgentDescription
from parallax.runtime.executor import Handler
from parallax.runtime.expiry import no_news
from parallax.runtime.gate import drain_after_expiry
from parallax.runtime.link import MAX_BACKLOG_BYTES, End, Link, Said
from parallax.runtime.link_stream import serve
from parallax.runtime.outcome import (
    Complete,
    Failure,
    Outcome,
    OutcomeCode,
    Value,
    check_task_name,
    too_large,
)
from parallax.runtime.parts import answer_in_parts
from parallax.runtime.protocol import Speaks, negotiate
from parallax.runtime.session import SHORTEST_BEAT_S
from parallax.runtime.worker import Bench, Worker
from parallax.security.errors import InvalidRequest, ParallaxError
from parallax.security.identity import Identity, agent_proxy
from parallax.security.verification import Peer

SERVICE: Final = agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name
VALUE_OVERHEAD_BYTES: Final = 1024  # a content type of at most 256, and framing
RETRY: Final = timedelta(milliseconds=200)

Context = aio.ServicerContext[Any, Any]


@dataclass(frozen=True, slots=True)
class Introduction:
    """
    How an agent introduces itself, whichever way it is met.

    Args:
        instance_id: 16 random bytes, drawn once per process.
        identity: In the certificate it serves with; None in plaintext.
    """

    agent_id: str
    description: AgentDescription
    instance_id: bytes
    identity: Identity | None = None


class DirectWorker(Worker):
    """
    The agent's end of a link that somebody else dialled.

    Args:
        on_removed: Told why, if the control plane says that the agent was taken out of the registry.

    Attributes:
        caller: Who dialled.
        is_proxy: Whether that is the control plane.
    """

    def __init__(
        self,
        bench: Bench,
        introduction: Introduction,
        caller: Caller,
        max_payload_bytes: int,
        on_removed: Callable[[str], None],
    ) -> None:
        super().__init__(bench)
        self.link = Link(End.WORKER, Said.HELLO, self)
        self.caller = caller
        self.is_proxy = isinstance(caller, Peer) and caller.identity == agent_proxy(
            caller.identity.trust_domain
        )
        self._introduction = introduction
        self._accepts_bytes = max_payload_bytes
        self._on_removed = on_removed
        self._lapsed: ParallaxError | None = None

    def lapse(self, why: ParallaxError) -> None:
        """The caller's certificate is no longer good: nothing new is taken, and what is open is the last."""
        self._lapsed = why
        self.refusal = Failure(OutcomeCode.INVALID_ARGUMENT, str(why), type(why).__name__)
        if self._held:
            self.link.drain()
        else:
            self.link.fail(why)

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """Agree on a protocol."""
        hello = frame.hello
        agreed = negotiate(Speaks(hello.min_protocol_version, hello.protocol_version, hello.capability_bits))
        self.max_payload_bytes = hello.max_payload_bytes
        if hello.heartbeat_ms:
            self.link.beat_s = max(SHORTEST_BEAT_S, hello.heartbeat_ms / 1000)
        welcome = link_pb2.Welcome(
            protocol_version=agreed.version,
            capability_bits=agreed.capability_bits,
            agent_id=self._introduction.agent_id,
            instance_id=self._introduction.instance_id,
            max_payload_bytes=self._accepts_bytes,
        )
        self.link.greet(link_pb2.LinkFrame(welcome=welcome))

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:
        """Nobody waits for anything any more."""
        if goodbye.reason == link_pb2.GOODBYE_REASON_DEREGISTERED and self.is_proxy:
            self._on_removed(goodbye.message)
        self.withdraw_all()
        self.link.close()

    def _done(self, key: tuple[Worker, int], outcome: Outcome) -> None:
        super()._done(key, outcome)
        if self._lapsed is not None and not self._held:
            self.link.fail(self._lapsed)

    def _send_part(self, number: int, value: bytes) -> None:
        limit = self.max_payload_bytes
        if limit and len(value) > limit + VALUE_OVERHEAD_BYTES:
            raise InvalidRequest(too_large("the part", len(value), limit))  # the handler's task ends with it
        if self.link.backlog_bytes > MAX_BACKLOG_BYTES:  # more credit than anybody could use
            self._bench.executor.cancel((self, number))
        else:
            super()._send_part(number, value)

    def _answer(self, outcome: Outcome) -> bytes | Failure | Complete:
        if isinstance(outcome, Value) and self.link.backlog_bytes > MAX_BACKLOG_BYTES:
            text = f"the answer was dropped: {self.link.backlog_bytes:,} bytes of others wait to be read"
            return Failure(OutcomeCode.OVERLOADED, text, retry_after=RETRY)
        return super()._answer(outcome)


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """
    An agent's work over gRPC.

    Args:
        max_payload_bytes: That it accepts.
        on_removed: See `DirectWorker`.
        drain: How long a link goes on after its caller's certificate has expired, for what is open on it.
    """

    def __init__(
        self,
        bench: Bench,
        introduction: Introduction,
        max_payload_bytes: int,
        on_removed: Callable[[str], None],
        drain: timedelta,
    ) -> None:
        self._drain = drain
        self._bench = bench
        self._introduction = introduction
        self._max_payload_bytes = max_payload_bytes
        self._on_removed = on_removed
        self._numbers = count(1)
        self._links: set[DirectWorker] = set()

    @property
    def is_proxied(self) -> bool:
        """Whether the control plane has a link to this agent."""
        return any(worker.is_proxy for worker in self._links)

    def drain(self) -> None:
        """Ask everybody for no new task."""
        for worker in self._links:
            worker.link.drain()

    def say_goodbye(self) -> None:
        """End all links: the agent stops."""
        for worker in self._links:
            worker.link.say_goodbye(link_pb2.GOODBYE_REASON_SHUTTING_DOWN, "the agent stops")

    async def Analyze(self, request: agent_pb2.AnalyzeRequest, context: Context) -> agent_pb2.AnalyzeResponse:
        """Run one task; it is withdrawn when the caller goes."""
        ended: asyncio.Future[Outcome] = self._bench.executor.loop.create_future()
        key = self._submit(request, context, ended)
        try:
            outcome = await ended
        except asyncio.CancelledError:
            self._bench.executor.cancel(key)
            raise
        response = agent_pb2.AnalyzeResponse()
        wire.write_outcome(response.outcome, _fitting(outcome, request.max_payload_bytes))
        return response

    async def AnalyzeStream(
        self, request: agent_pb2.AnalyzeRequest, context: Context
    ) -> AsyncIterator[agent_pb2.AnalyzePart]:
        """Run one task, and give the parts of its answer as fast as they are read."""
        parts = _Handover()
        ended: asyncio.Future[Outcome] = self._bench.executor.loop.create_future()
        stream_handler = self._bench.stream_handler
        handler = stream_handler and partial(answer_in_parts, stream_handler, parts)
        drain_after_expiry(timedelta(0), no_news)  # what is open is all there is
        key = self._submit(request, context, ended, handler)
        try:
            async for part in parts.until(ended):
                fitting = _fitting(part, request.max_payload_bytes)
                if isinstance(fitting, Failure):
                    yield agent_pb2.AnalyzePart(outcome=wire.outcome_to_proto(fitting))
                    return
                yield agent_pb2.AnalyzePart(part=wire.value_to_proto(part))
            outcome = _fitting(await ended, request.max_payload_bytes)
            yield agent_pb2.AnalyzePart(outcome=wire.outcome_to_proto(outcome))
        finally:
            self._bench.executor.cancel(key)

    async def Link(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request_iterator: AsyncIterator[link_pb2.LinkFrame], context: Context
    ) -> None:
        """Carry tasks and their outcomes until either side ends the stream."""
        worker = DirectWorker(
            self._bench, self._introduction, current_caller(), self._max_payload_bytes, self._on_removed
        )
        self._links.add(worker)
        drain_after_expiry(self._drain, worker.lapse)
        try:
            await serve(worker.link, context, worker.withdraw_all)
        finally:
            self._links.remove(worker)
            worker.withdraw_all()

    async def GetCapabilities(
        self, request: agent_pb2.GetCapabilitiesRequest, context: Context
    ) -> agent_pb2.GetCapabilitiesResponse:
        introduction = self._introduction
        return agent_pb2.GetCapabilitiesResponse(
            description=wire.description_to_proto(introduction.description, introduction.agent_id),
            identity=str(introduction.identity or ""),
        )

    def _submit(
        self,
        request: agent_pb2.AnalyzeRequest,
        context: Context,
        ended: asyncio.Future[Outcome],
        handler: Handler | None = None,
    ) -> Hashable:
        """Hand the task to the executor, which settles *ended*; what withdraws it."""
        key = (self, next(self._numbers))

        def done(_: Hashable, outcome: Outcome) -> None:
            if not ended.done():
                ended.set_result(outcome)

        self._bench.executor.submit(
            key,
            check_task_name(request.task),
            wire.payload_from_proto(request.payload),
            wire.time_limit(request.timeout_ms, context.time_remaining()),
            done,
            handler,
        )
        return key


def _fitting(outcome: Outcome, limit: int) -> Outcome:
    """*outcome*, or why the caller cannot be sent it; no *limit* is 0."""
    if limit and isinstance(outcome, Value) and len(outcome.payload.data) > limit:
        text = too_large("the payload", len(outcome.payload.data), limit)
        return Failure(OutcomeCode.INVALID_RESULT, text)
    return outcome


class _Handover:
    """Parts of an answer on their way from the handler to the call, one at a time."""

    def __init__(self) -> None:
        self._part: Value | None = None
        self._taken = asyncio.Event()
        self._changed = asyncio.Event()

    async def send(self, value: Value) -> None:
        """Hand over a part; waits until the one before it is taken."""
        while self._part is not None:
            self._taken.clear()
            await self._taken.wait()
        self._part = value
        self._changed.set()

    async def until(self, ended: asyncio.Future[Outcome]) -> AsyncIterator[Value]:
        """The parts, until there are no more and the task has *ended*."""
        ended.add_done_callback(lambda _: self._changed.set())
        while True:
            if self._part is not None:
                part, self._part = self._part, None
                self._taken.set()
                yield part
            elif ended.done():
                return
            else:
                self._changed.clear()
                await self._changed.wait()
