"""An agent's side of its session: dial, say hello, take tasks, answer, come back when the line drops."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from grpc import StatusCode, aio

from parallax.protos import session_pb2, session_pb2_grpc, task_pb2
from parallax.runtime import wire
from parallax.runtime.description import AgentDescription
from parallax.runtime.executor import Executor
from parallax.runtime.outbox import Outbox
from parallax.runtime.outcome import Failure, Outcome, OutcomeCode, Value, check_payload
from parallax.runtime.protocol import THIS_PROGRAM
from parallax.runtime.status import error_of
from parallax.security.errors import (
    ConfigError,
    IdentityError,
    InvalidRequest,
    InvalidTransition,
    NotAuthorized,
    ParallaxError,
    Superseded,
    Unavailable,
)

logger = logging.getLogger(__name__)

WELCOME_S: Final = 10.0  # from dialling to the first frame
FIRST_BACKOFF_S: Final = 0.2
LONGEST_BACKOFF_S: Final = 30.0
SHORTEST_HEARTBEAT_S: Final = 0.1  # a third of the shortest lease is three times as long
STEADY_S: Final = 5.0  # a session that held this long resets the back-off

CAUSE_S: Final = 2.0
LAST_WORDS_S: Final = 5.0  # after draining, for the last outcomes to leave

Call = aio.StreamStreamCall[session_pb2.AgentFrame, session_pb2.ControlFrame]

# How grpc.aio says that a stream is no longer one.
_BROKEN: Final = (aio.AioRpcError, aio.UsageError, asyncio.InvalidStateError)

_DRAINING: Final = task_pb2.Outcome()  # in the outbox: from here on, no new tasks

# Trying again cannot mend these.
_FINAL: Final = (ConfigError, IdentityError, InvalidRequest, InvalidTransition, NotAuthorized, Superseded)


def backoff_s(attempt: int, spread: float) -> float:
    """Seconds before reconnect *attempt*, from 0: doubling, of which *spread* in [0, 1] decides one half."""
    longest: float = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(attempt, 16))
    return longest * (1 + spread) / 2


class AgentSession:
    """
    Keeps one agent connected.

    Outcomes wait here while there is no stream and go out on the next one: the control
    plane takes them as long as it still waits for that task.

    Args:
        dial: Opens a channel to the control plane, with the credentials then current.
        agent_id: Stated in the hello; what counts is the certificate.
        drain_timeout: For the tasks held when it is stopped.
    """

    def __init__(
        self,
        dial: Callable[[], aio.Channel],
        agent_id: str,
        description: AgentDescription,
        executor: Executor,
        drain_timeout: timedelta,
    ) -> None:
        self._drain_timeout = drain_timeout
        self._dial = dial
        self._agent_id = agent_id
        self._description = description
        self.executor = executor
        self._instance_id = secrets.token_bytes(16)
        self._outbox: Outbox[task_pb2.Outcome] = Outbox()
        self._max_payload_bytes = 0  # of the control plane; unknown
        self._stopping = asyncio.Event()
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """
        Stay connected until stopped or taken out of the registry.

        Raises:
            Superseded: Another instance with the same identity took over.
            ParallaxError: The control plane refuses this agent for a reason that stays.
        """
        attempt = 0
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            try:
                if await self._connect():
                    return
                problem = "the control plane ended the session"
            except _FINAL:
                raise
            except ParallaxError as exc:
                problem = f"{type(exc).__name__}: {exc}"
            finally:
                self.connected.clear()
            if loop.time() - began > STEADY_S:
                attempt = 0
            pause = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            logger.warning(
                "not connected",
                extra={"agent": self._agent_id, "cause": problem, "retry_in_s": round(pause, 2)},
            )
            try:
                async with asyncio.timeout(pause):
                    await self._stopping.wait()
            except TimeoutError:
                continue

    def stop(self) -> None:
        """Let `run` take no new task, finish those held, and return."""
        self._stopping.set()

    def answer(self, task_id: int, outcome: Outcome) -> None:
        """Send *outcome* on whichever stream is open next; one the control plane cannot take is a failure."""
        if isinstance(outcome, Value) and self._max_payload_bytes:
            try:
                check_payload(outcome.payload, self._max_payload_bytes)
            except InvalidRequest as exc:
                outcome = Failure(OutcomeCode.INVALID_RESULT, str(exc))
        message = wire.outcome_to_proto(outcome, task_id)
        self._outbox.put(message, message.ByteSize())

    async def _connect(self) -> bool:
        """Hold one session from dialling to its end; True if there is to be no other."""
        channel = self._dial()
        try:
            call = session_pb2_grpc.SessionServiceStub(channel).Connect()
            try:
                heartbeat_s = await self._greet(call)
                self.connected.set()
                return await self._converse(call, heartbeat_s)
            except _BROKEN:
                raise await _cause(call) from None
            finally:
                call.cancel()
        finally:
            await channel.close()

    async def _greet(self, call: Call) -> float:
        """Say hello; how often to be heard from, in seconds."""
        try:
            async with asyncio.timeout(WELCOME_S):
                await call.write(session_pb2.AgentFrame(hello=self._hello()))
                frame = await _next(call)
        except TimeoutError:
            raise Unavailable(f"the control plane did not answer within {WELCOME_S:g} s") from None
        if frame is None or not frame.HasField("welcome"):
            raise Unavailable("the control plane ended the stream before its welcome")
        welcome = frame.welcome
        logger.info("connected", extra={"agent": welcome.agent_id, "generation": welcome.generation})
        self._max_payload_bytes = welcome.max_payload_bytes
        return max(SHORTEST_HEARTBEAT_S, welcome.heartbeat_ms / 1000)

    async def _converse(self, call: Call, heartbeat_s: float) -> bool:
        failure: Exception | None = None
        final = False
        async with asyncio.TaskGroup() as group:
            companions = (
                group.create_task(self._write(call, heartbeat_s)),
                group.create_task(self._drain(call)),
            )
            try:
                final = await self._read(call)
            except (ParallaxError, *_BROKEN) as exc:
                failure = exc  # outside the group, which would wrap it
            finally:
                for companion in companions:
                    companion.cancel()
        if failure is not None:
            raise failure
        return final

    async def _read(self, call: Call) -> bool:
        while (frame := await _next(call)) is not None:
            for task in frame.tasks:
                self.executor.submit(
                    task.id,
                    task.name,
                    wire.payload_from_proto(task.payload),
                    wire.duration(task.timeout_ms),
                    self.answer,
                )
            for task_id in frame.cancelled_task_ids:
                self.executor.cancel(task_id)
            if frame.HasField("goodbye"):
                return self._is_final(frame.goodbye)
        return self._stopping.is_set()

    def _is_final(self, goodbye: session_pb2.Goodbye) -> bool:
        match goodbye.reason:
            case session_pb2.GOODBYE_REASON_SUPERSEDED:
                raise Superseded(f"{self._agent_id}: {goodbye.message}; this one stops")
            case session_pb2.GOODBYE_REASON_DEREGISTERED:
                logger.warning("stopping", extra={"agent": self._agent_id, "cause": goodbye.message})
                return True
            case _:
                raise Unavailable(goodbye.message)

    async def _drain(self, call: Call) -> None:
        """Once stopped: say so, finish what is held, and end the stream in order, or in the end without."""
        await self._stopping.wait()
        self._outbox.put(_DRAINING, 0)
        await self.executor.drain(self._drain_timeout)
        self._outbox.close()
        await asyncio.sleep(LAST_WORDS_S)
        call.cancel()

    async def _write(self, call: Call, heartbeat_s: float) -> None:
        """Send outcomes as they come, and an empty frame when none came for a while."""
        try:
            while True:
                frame = session_pb2.AgentFrame()
                try:
                    async with asyncio.timeout(heartbeat_s):
                        items = await self._outbox.take()
                except TimeoutError:
                    pass
                else:
                    if not items:
                        await call.done_writing()
                        return
                    frame.outcomes.extend(item for item in items if item is not _DRAINING)
                    frame.draining = any(item is _DRAINING for item in items)
                await call.write(frame)
        except _BROKEN:
            return  # the reader learns the cause

    def _hello(self) -> session_pb2.Hello:
        return session_pb2.Hello(
            protocol_version=THIS_PROGRAM.newest,
            min_protocol_version=THIS_PROGRAM.oldest,
            capability_bits=THIS_PROGRAM.capability_bits,
            instance_id=self._instance_id,
            description=wire.description_to_proto(self._description, self._agent_id),
        )


async def _next(call: Call) -> session_pb2.ControlFrame | None:
    """The next frame, or None once the control plane ended the stream in order, or `_drain` ended it."""
    try:
        frame = await call.read()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return None  # it was the call that was cancelled, not we
    return frame if isinstance(frame, session_pb2.ControlFrame) else None


async def _cause(call: Call) -> ParallaxError:
    """Why *call* broke."""
    try:
        async with asyncio.timeout(CAUSE_S):
            code, details = await call.code(), await call.details()
            if code is StatusCode.RESOURCE_EXHAUSTED:  # gRPC itself: one message, and the next may fit
                return Unavailable(f"{details}; set PARALLAX_MAX_PAYLOAD_BYTES alike on both sides")
            return error_of(code, details, await call.trailing_metadata() or ())
    except TimeoutError:
        return Unavailable("the stream broke without a status")
