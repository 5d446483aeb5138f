"""An agent's side of its session: dial, say hello, take tasks, answer, come back, follow the certificate."""

from __future__ import annotations

import asyncio
import logging
import random
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from grpc import aio

from parallax.protos import link_pb2, session_pb2_grpc
from parallax.runtime import wire
from parallax.runtime.backoff import STEADY_S, backoff_s, move_after_s
from parallax.runtime.connection import Line
from parallax.runtime.description import AgentDescription
from parallax.runtime.dialling import Dialling, Moved
from parallax.runtime.link import Link, State
from parallax.runtime.link_stream import Call, converse
from parallax.runtime.outcome import Failure, OutcomeCode
from parallax.runtime.protocol import hello
from parallax.runtime.session_stream import SessionStream
from parallax.runtime.worker import Bench, Worker
from parallax.security.credentials import gives_way, has_another_leaf, may_stay
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

if TYPE_CHECKING:
    from parallax.runtime.following import Follows
    from parallax.security.credentials import Credentials, CredentialStore

logger = logging.getLogger(__name__)

SHORTEST_BEAT_S: Final = 0.1  # a third of the shortest lease is three times as long
LAST_WORDS_S: Final = 5.0  # after draining, for the last outcomes to leave

_TORN: Final = Failure(
    OutcomeCode.INVALID_RESULT,
    "the agent's connection broke while the answer came in parts, and some may be lost; ask again",
)
# Trying again cannot mend these.
_FINAL: Final = (ConfigError, IdentityError, InvalidRequest, InvalidTransition, NotAuthorized, Superseded)


class AgentSession(Worker):
    """
    Keeps one agent connected, with the certificate that is in force.

    Once there is a new certificate, or a root was taken out, a second stream is dialled. From its welcome on
    it is the one that counts. The older one is finished: what came by it is answered on it while it is
    open, else on the newer one. There are never more than these two, so that of several changes the latest
    is followed once the older stream has ended. It ends when nothing is open on it, or the drain time
    later; answers in parts, which must stay where they began, keep it until the next certificate.

    Outcomes wait here while there is no stream and go out on the next one: the control
    plane takes them as long as it still waits for that task.

    Args:
        dial: Opens a channel to the control plane, with the credentials then current.
        agent_id: Stated in the hello; what counts is the certificate.
        drain_timeout: For the tasks held when it is stopped, and on a stream that a newer one replaces.
        instance_id: Of this process, on whatever links it has.
        is_sole: Whether the control plane has no other link to this agent.
        store: Of the credentials that *dial* uses; None in plaintext.
        follower: Keeps the roots in *store* like those told beside the session; None: nobody does here.
        dialling: Told how it goes.

    Attributes:
        connected: Set while the control plane has a stream to give tasks on.
    """

    def __init__(
        self,
        dial: Callable[[], aio.Channel],
        agent_id: str,
        description: AgentDescription,
        bench: Bench,
        drain_timeout: timedelta,
        instance_id: bytes | None = None,
        is_sole: Callable[[], bool] = lambda: True,
        store: CredentialStore | None = None,
        follower: Follows | None = None,
        dialling: Dialling | None = None,
    ) -> None:
        super().__init__(bench)
        self.executor = bench.executor
        self._drain_timeout = drain_timeout
        self._dial = dial
        self._agent_id = agent_id
        self._description = description
        self._instance_id = instance_id or secrets.token_bytes(16)
        self._is_sole = is_sole
        self._store = store
        self._follower = follower
        self._dialling = dialling or Dialling()
        self._stopping = asyncio.Event()
        self._noted = asyncio.Event()
        self._streams: list[SessionStream] = []  # dialled, and not over
        self._lead(SessionStream(self))
        self._problem: ParallaxError = Unavailable("it has not been dialled")  # why there is none
        self._broken: list[int] = []  # generations that broke off, of which the control plane is yet to hear
        self._refused: Credentials | None = None  # what the control plane did not take, while it kept others
        self.connected = asyncio.Event()

    async def run(self) -> None:
        """
        Stay connected until stopped or taken out of the registry.

        Raises:
            Superseded: Another instance with the same identity took over.
            ParallaxError: The control plane refuses this agent for a reason that stays.
        """
        failure: ParallaxError | None = None
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._follow())
            try:
                await self._stay_connected(group)
            except ParallaxError as exc:
                failure = exc  # raised outside the group, which would wrap it
            for stream in self._streams:
                stream.break_off()
            following.cancel()
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """Let `run` take no new task, finish those held, and return."""
        self._stopping.set()
        self._noted.set()

    # Which streams there are.

    async def _stay_connected(self, group: asyncio.TaskGroup) -> None:
        attempt = 0
        loop = asyncio.get_running_loop()
        while not self._stopping.is_set():
            began = loop.time()
            stream = await self._open(group)
            if self._current is stream and await self._until_outdated(stream):
                attempt = 0
                continue
            if self._stopping.is_set():
                break
            if loop.time() - began > STEADY_S:
                attempt = 0
            pause = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            self._warn(stream, pause)
            await self._pause(pause)
        for stream in self._streams:
            stream.leave(at_once=True)
        while self._streams:
            await self._news()

    async def _open(self, group: asyncio.TaskGroup) -> SessionStream:
        """Dial a stream, beside the one that counts if there is one; it counts now, or else it is over."""
        stream = self._head if self._current is None else SessionStream(self)
        stream.line = line = Line(self._dial(), self._in_force)
        stream.link.greet(link_pb2.LinkFrame(hello=self._hello(stream.link)))
        self._streams.append(stream)
        group.create_task(self._carry(stream, line))
        await self._until(lambda: stream.is_over or self._current is stream)
        if self._follower is not None and self._current is stream:
            group.create_task(self._follower.follow(line))
        return stream

    async def _until_outdated(self, stream: SessionStream) -> bool:
        """Wait for credentials newer than those of *stream*, and room; whether it still counts then."""
        await self._until(
            lambda: self._current is not stream or gives_way(stream.credentials, self._in_force)
        )
        if self._current is stream:
            spread = random.random()  # noqa: S311 - spreads load, hides nothing
            await self._pause(move_after_s(stream.credentials, self._in_force, datetime.now(UTC), spread))

        def has_room() -> bool:
            return self._current is not stream or len(self._streams) == 1

        # Roots that were taken out can wait: a rotation takes its own out soon after it renews all leaves.
        await self._until(lambda: has_room() or has_another_leaf(stream.credentials, self._in_force))
        if not has_room():
            for older in self._streams[:-1]:
                older.leave(at_once=True)
            await self._until(has_room)
        return self._current is stream

    async def _follow(self) -> None:
        seen = self._in_force
        while self._store is not None and seen is not None:
            seen = await self._store.changed(seen)
            self._noted.set()

    @property
    def _in_force(self) -> Credentials | None:
        return self._store.current if self._store is not None else None

    @property
    def _current(self) -> SessionStream | None:
        """The stream that tasks come by, if there is one."""
        return self._head if self._head.is_open else None

    def _lead(self, stream: SessionStream) -> None:
        """Let *stream* be the one that counts: tasks come by it, or will."""
        self._head = stream
        self.link = stream.link

    async def _until(self, is_so: Callable[[], bool]) -> None:
        """Wait until it is, or this is stopped; raises what keeps the agent out for good."""
        while not self._stopping.is_set():
            if self._current is None and isinstance(self._problem, _FINAL):
                raise self._problem
            if is_so():
                return
            await self._news()

    async def _pause(self, seconds: float) -> None:
        """Wait so long; no longer if streams or credentials change."""
        current, credentials = self._current, self._in_force
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._until(lambda: self._current is not current or self._in_force is not credentials)

    async def _news(self) -> None:
        self._noted.clear()
        await self._noted.wait()

    def _warn(self, stream: SessionStream, pause: float) -> None:
        cause = self._problem if self._current is None else stream.failure
        extra = {
            "agent": self._agent_id,
            "cause": f"{type(cause).__name__}: {cause}",
            "retry_in_s": round(pause, 2),
        }
        if self._current is None:
            logger.warning("not connected", extra=extra)
            return
        stays = may_stay(self._current.credentials, stream.credentials)
        if not stays:
            self._current.leave()
        self._dialling.moves[Moved.REFUSED if stays else Moved.UNTRIED] += 1
        if self._refused is not stream.credentials:
            self._refused = stream.credentials
            event = "no session with the new certificate, the old one goes on"
            logger.warning(
                event if stays else "no session with the new roots, the old one is left", extra=extra
            )

    # What becomes of one stream.

    async def _carry(self, stream: SessionStream, line: Line) -> None:
        """Hold it to its end."""
        async with line.channel, self._dialling.timing(line.channel):
            stream.call = call = session_pb2_grpc.SessionServiceStub(line.channel).Connect()
            try:
                await converse(stream.link, call, partial(self._wind_up, stream, call))
            except ParallaxError as exc:
                stream.failure = stream.failure or exc.with_traceback(None)  # which would hold the call
            finally:
                call.cancel()
                self._end(stream)
                line.retire()

    def on_welcome(self, stream: SessionStream, welcome: link_pb2.Welcome) -> None:
        """The control plane takes the agent on *stream*."""
        event = "connected"
        if self._current is not None:
            event = "session moved"
            self._dialling.moves[Moved.TRIED] += 1
        logger.info(event, extra={"agent": welcome.agent_id, "generation": welcome.generation})
        stream.generation = welcome.generation
        self.max_payload_bytes = welcome.max_payload_bytes
        stream.link.beat_s = max(SHORTEST_BEAT_S, welcome.heartbeat_ms / 1000)
        self._move_to(stream)

    def on_farewell(self, stream: SessionStream, goodbye: link_pb2.Goodbye) -> None:
        """The control plane ends *stream*."""
        cause = goodbye.message
        match goodbye.reason:
            case link_pb2.GOODBYE_REASON_SUPERSEDED:
                stream.failure = Superseded(f"{self._agent_id}: {cause}; this one stops")
            case link_pb2.GOODBYE_REASON_DEREGISTERED:
                logger.warning("stopping", extra={"agent": self._agent_id, "cause": cause})
                self.stop()
            case link_pb2.GOODBYE_REASON_REPLACED if stream is self._head and stream is not self._streams[-1]:
                self._move_to(self._streams[-1])  # whose welcome is on its way
            case _:
                stream.failure = Unavailable(cause)

    def _move_to(self, stream: SessionStream) -> None:
        """Let *stream* count from here on, and the one before it end."""
        if stream is not self._head:
            if not self._head.is_open:  # nor will it be: it was for when there is no other
                stream.link.repeat(self._head.link.unsent())
            self._head.leave()
            self._lead(stream)
        stream.is_open = True
        self._tell_what_broke()
        self.connected.set()
        self._noted.set()

    async def _wind_up(self, stream: SessionStream, call: Call) -> None:
        """Once nothing new is to come by *stream*: say so, let what did be finished, and end it."""
        await stream.leaving.wait()
        stream.link.drain()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._drain_timeout.total_seconds()):
                await self._stopping.wait()
        if self._stopping.is_set():
            await self.executor.drain(self._drain_timeout)
        elif self.in_parts(stream.link):
            await stream.hurried.wait()
        stream.link.close()
        self._let_go(stream.link)
        await asyncio.sleep(LAST_WORDS_S)
        call.cancel()

    def _end(self, stream: SessionStream) -> None:
        """Take note that *stream* is over: what could not be sent on it goes out on the one that counts."""
        self._streams.remove(stream)
        stream.is_over, stream.call = True, None  # it and its link hold each other, and would hold that
        if stream is self._head:
            self._problem = stream.failure or Unavailable("the control plane ended the session")
            self.connected.clear()
            self._lead(SessionStream(self))
        unsent = stream.link.unsent()
        stream.link.close()
        torn = self._let_go(stream.link, [o.task_id for o in unsent if o.WhichOneof("result") == "parts"])
        self.link.repeat(outcome for outcome in unsent if outcome.task_id not in torn)
        if self._streams and stream.generation and stream.link.state is not State.GONE:
            self._broken.append(stream.generation)  # whose end no hello tells, while another is alive
            self._tell_what_broke()
        self._noted.set()

    def _tell_what_broke(self) -> None:
        """After all that is said of the tasks themselves."""
        while self._broken and self._current is not None:
            self.link.report_broken(self._broken.pop(), self.held)

    def _let_go(self, link: Link, unsent: Iterable[int] = ()) -> set[int]:
        """
        Give up the answers in parts on *link*, which is closed; the tasks.

        Nobody knows which of their parts arrived. Parts of those in *unsent* did not.
        """
        torn = {*self.withdraw_streams(link), *unsent}
        for task_id in torn:
            self.link.answer(task_id, _TORN)
        return torn

    def _hello(self, link: Link) -> link_pb2.Hello:
        message = hello()
        message.instance_id = self._instance_id
        message.description.CopyFrom(wire.description_to_proto(self._description, self._agent_id))
        message.sole = not self._streams and self._is_sole()
        message.held_task_ids.extend((*self.held, *(outcome.task_id for outcome in link.unsent())))
        return message
