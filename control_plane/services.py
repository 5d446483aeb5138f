"""The gRPC services of tasks and sessions: who calls, which domain call, and the translation between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from grpc import aio

from parallax.control_plane.authorization import speaker
from parallax.control_plane.dispatch import Dispatcher, Order, parse_target
from parallax.control_plane.registry import Registry
from parallax.control_plane.sessions import Assignment, Cancellation, Goodbye, Item, Reason, Session, Sessions
from parallax.protos import (
    dispatch_pb2,
    dispatch_pb2_grpc,
    session_pb2,
    session_pb2_grpc,
    task_pb2,
)
from parallax.runtime import wire
from parallax.runtime.executor import MAX_MESSAGE_CHARS, MAX_TYPE_CHARS
from parallax.runtime.interceptors import current_caller
from parallax.runtime.outbox import MAX_FRAME_ITEMS
from parallax.runtime.outcome import MAX_TASK_NAME_BYTES, Failure, Outcome, OutcomeCode, Value, check_payload
from parallax.runtime.protocol import Speaks, negotiate
from parallax.security.errors import InvalidRequest, ParallaxError

DEFAULT_TIMEOUT: Final = timedelta(seconds=60)
HELLO_S: Final = 10.0  # an authenticated peer that says nothing is not kept
FLUSH_S: Final = 2.0  # for the last frame to a peer that may have stopped reading
INSTANCE_ID_BYTES: Final = 16

Context = aio.ServicerContext[Any, Any]


class DispatchService(dispatch_pb2_grpc.DispatchServiceServicer):
    """Tasks over gRPC, one call each."""

    def __init__(self, dispatcher: Dispatcher, max_payload_bytes: int) -> None:
        self._dispatcher = dispatcher
        self._max_payload_bytes = max_payload_bytes

    async def Execute(
        self, request: dispatch_pb2.ExecuteRequest, context: Context
    ) -> dispatch_pb2.ExecuteResponse:
        result = await self._dispatcher.execute(self._order(request, context.time_remaining()))
        return dispatch_pb2.ExecuteResponse(
            outcome=wire.outcome_to_proto(result.outcome),
            agent_id=str(result.agent or ""),
            attempts=result.attempts,
        )

    def _order(self, request: dispatch_pb2.ExecuteRequest, remaining_s: float | None) -> Order:
        if len(request.task.encode()) > MAX_TASK_NAME_BYTES:
            raise InvalidRequest(
                f"the task's name has more than {MAX_TASK_NAME_BYTES} bytes; put data in the payload"
            )
        return Order(
            parse_target(request.target),
            request.task,
            check_payload(wire.payload_from_proto(request.payload), self._max_payload_bytes),
            _timeout(request.timeout_ms, remaining_s),
            wait=wire.duration(request.wait_for_agent_ms),
            idempotent=request.idempotent,
            allow_unverified=request.allow_unverified,
        )


class SessionService(session_pb2_grpc.SessionServiceServicer):
    """Agents' outbound sessions over gRPC: one reader and one writer per stream."""

    def __init__(
        self,
        sessions: Sessions,
        dispatcher: Dispatcher,
        registry: Registry,
        clock: Callable[[], datetime],
        max_payload_bytes: int,
    ) -> None:
        self._sessions = sessions
        self._dispatcher = dispatcher
        self._registry = registry
        self._clock = clock
        self._max_payload_bytes = max_payload_bytes

    async def Connect(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request_iterator: AsyncIterator[session_pb2.AgentFrame], context: Context
    ) -> None:
        """Greet the agent, then carry tasks and outcomes until either side ends the stream."""
        session, welcome = self._greet(await _first(request_iterator))
        try:
            await self._carry(session, welcome, request_iterator, context)
        finally:
            self._sessions.close(session)
        if session.failure is not None:
            raise session.failure

    def _greet(self, frame: session_pb2.AgentFrame) -> tuple[Session, session_pb2.ControlFrame]:
        hello = frame.hello
        ref, identity = speaker(current_caller(), hello.description.agent_id)
        agreed = negotiate(Speaks(hello.min_protocol_version, hello.protocol_version, hello.capability_bits))
        if len(hello.instance_id) != INSTANCE_ID_BYTES:
            raise InvalidRequest(
                f"instance_id must have {INSTANCE_ID_BYTES} bytes, not {len(hello.instance_id)}"
            )
        description = wire.description_from_proto(hello.description)
        session = self._sessions.open(
            ref, identity, hello.instance_id, description, now=_monotonic(), at=self._clock()
        )
        welcome = session_pb2.Welcome(
            protocol_version=agreed.version,
            capability_bits=agreed.capability_bits,
            generation=session.generation,
            agent_id=str(ref),
            lease_ms=wire.milliseconds(self._registry.lease),
            heartbeat_ms=wire.milliseconds(self._registry.lease / 3),
            max_payload_bytes=self._max_payload_bytes,
        )
        return session, session_pb2.ControlFrame(welcome=welcome)

    async def _carry(
        self,
        session: Session,
        welcome: session_pb2.ControlFrame,
        frames: AsyncIterator[session_pb2.AgentFrame],
        context: Context,
    ) -> None:
        async with asyncio.TaskGroup() as group:
            reader = group.create_task(self._read(session, frames))
            writer = group.create_task(_write(session, welcome, context))
            over = group.create_task(session.over.wait())
            await asyncio.wait({reader, writer, over}, return_when=asyncio.FIRST_COMPLETED)
            self._sessions.drain(session)
            session.outbox.close()
            await asyncio.wait({writer}, timeout=FLUSH_S)
            for task in (reader, writer, over):
                task.cancel()

    async def _read(self, session: Session, frames: AsyncIterator[session_pb2.AgentFrame]) -> None:
        instance = session.instance
        try:
            async for frame in frames:
                if session.over.is_set():
                    return
                if frame.HasField("hello"):
                    raise InvalidRequest("a session has one hello")
                if len(frame.outcomes) > MAX_FRAME_ITEMS:
                    raise InvalidRequest(f"a frame has more than {MAX_FRAME_ITEMS} outcomes")
                self._registry.renew(instance.ref, _monotonic())
                for outcome in frame.outcomes:
                    self._dispatcher.settle(instance, outcome.task_id, self._outcome(outcome))
                if frame.draining and session.takes_tasks:
                    self._sessions.drain(session)
        except ParallaxError as exc:
            self._sessions.end(session, exc)

    def _outcome(self, message: task_pb2.Outcome) -> Outcome:
        """What an agent answered; what cannot be an answer fails its own task only."""
        try:
            outcome = wire.outcome_from_proto(message)
            if isinstance(outcome, Value):
                check_payload(outcome.payload, self._max_payload_bytes)
                return outcome
        except InvalidRequest as exc:
            return Failure(OutcomeCode.INVALID_RESULT, str(exc))
        # Ours says no more than that; more might not fit into the answer to the caller.
        said, kind = outcome.message[:MAX_MESSAGE_CHARS], outcome.error_type[:MAX_TYPE_CHARS]
        return replace(outcome, message=said, error_type=kind)


async def _first(frames: AsyncIterator[session_pb2.AgentFrame]) -> session_pb2.AgentFrame:
    try:
        async with asyncio.timeout(HELLO_S):
            frame = await anext(frames)
    except TimeoutError:
        raise InvalidRequest(f"no hello within {HELLO_S:g} s") from None
    except StopAsyncIteration:
        raise InvalidRequest("the stream ended before its hello") from None
    if not frame.HasField("hello") or frame.outcomes or frame.draining:
        raise InvalidRequest("the first frame must carry hello and nothing else")
    return frame


async def _write(session: Session, welcome: session_pb2.ControlFrame, context: Context) -> None:
    with suppress(aio.InternalError):  # the agent has hung up
        await context.write(welcome)
        while items := await session.outbox.take():
            await context.write(_frame(items))


def _frame(items: list[Item]) -> session_pb2.ControlFrame:
    frame = session_pb2.ControlFrame()
    for item in items:
        match item:
            case Assignment():
                frame.tasks.add(
                    id=item.task_id,
                    name=item.name,
                    payload=wire.payload_to_proto(item.payload),
                    timeout_ms=max(1, wire.milliseconds(item.timeout)),
                )
            case Cancellation():
                frame.cancelled_task_ids.append(item.task_id)
            case Goodbye():
                frame.goodbye.reason = _GOODBYE[item.reason]
                frame.goodbye.message = item.message
    return frame


_GOODBYE: Final = {
    Reason.SHUTTING_DOWN: session_pb2.GOODBYE_REASON_SHUTTING_DOWN,
    Reason.SUPERSEDED: session_pb2.GOODBYE_REASON_SUPERSEDED,
    Reason.DEREGISTERED: session_pb2.GOODBYE_REASON_DEREGISTERED,
    Reason.REPLACED: session_pb2.GOODBYE_REASON_REPLACED,
}


def _timeout(stated_ms: int, remaining_s: float | None) -> timedelta:
    """The smaller of what the request states and what the call has left; 60 s where neither says."""
    limits = [wire.duration(stated_ms)] if stated_ms else []
    if remaining_s is not None:
        limits.append(wire.duration(max(0, round(remaining_s * 1000))))
    return min(limits, default=DEFAULT_TIMEOUT)


def _monotonic() -> float:
    return asyncio.get_running_loop().time()
