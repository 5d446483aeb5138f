"""The caller's end of a link that it dials: many calls at once on one stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from itertools import count
from typing import Final

from parallax.protos import link_pb2
from parallax.runtime.deadlines import Deadlines
from parallax.runtime.link import End, Link, Receiver, Said, State
from parallax.runtime.link_stream import FLUSH_S, Call, converse
from parallax.runtime.outcome import OutcomeCode
from parallax.runtime.parts import cost_of
from parallax.runtime.protocol import hello
from parallax.security.errors import ParallaxError, TaskFailed, Unavailable

GRACE_S: Final = 2.0  # the other end answers at the deadline; this is for the answer to arrive
TICK_S: Final = 0.25  # how often deadlines are looked at
PART_CREDIT: Final = 1024 * 1024  # how many bytes of parts may lie here unread

Reply = link_pb2.TaskOutcome


class Calls(Receiver):
    """
    Calls over one link; once it has broken, it stays so: open another.

    Args:
        peer: Who is at the other end, for messages.
        lost: What a call ends with whose link broke under it.

    Attributes:
        max_payload_bytes: That the other end accepts.
    """

    def __init__(self, peer: str, lost: Callable[[ParallaxError], ParallaxError]) -> None:
        self.link = Link(End.CALLER, Said.WELCOME, self)
        self.max_payload_bytes = 0
        self._peer = peer
        self._lost = lost
        self._numbers = count(1)
        self._open: dict[int, asyncio.Future[Reply]] = {}
        self._parts: dict[int, _Parts] = {}
        self._deadlines: Deadlines[asyncio.Future[Reply]] = Deadlines(TICK_S)
        # Kept: until Python 3.12, asking for it is a system call.
        self._loop = asyncio.get_running_loop()
        self._greeted: asyncio.Future[None] = self._loop.create_future()
        self._call: Call | None = None  # that carries it, while it does
        self._carrying: asyncio.Task[None] | None = None
        self._failure: ParallaxError | None = None
        self._is_retired = False

    @property
    def is_busy(self) -> bool:
        """See `Receiver.is_busy`."""
        return len(self._open) > 1

    @property
    def is_broken(self) -> bool:
        """Whether it has ended; one that drains has not."""
        return self._failure is not None

    async def open(
        self, call: Call, max_payload_bytes: int = 0, on_over: Callable[[], None] = lambda: None
    ) -> None:
        """
        Begin on *call*.

        Args:
            max_payload_bytes: That this end accepts; 0 says nothing of it.
            on_over: Told once *call* is over, refused or cancelled included.

        Raises:
            ParallaxError: Why the other end does not want to.
        """
        greeting = hello()
        greeting.max_payload_bytes = max_payload_bytes
        self.link.greet(link_pb2.LinkFrame(hello=greeting))
        self._call = call
        self._carrying = asyncio.create_task(self._carry(call))
        self._carrying.add_done_callback(lambda _: on_over())
        del call  # what is raised below is kept, with this frame, and so would the connection be
        try:
            await self._greeted
        except asyncio.CancelledError:
            self._carrying.cancel()
            raise

    def retire(self) -> None:
        """Let the link end, in order, soon after its last call; for whoever makes new ones on another."""
        self._is_retired = True

    def abandon(self, failure: ParallaxError) -> None:
        """End the link at once; calls under way, and whatever else is asked of it, fail with *failure*."""
        self._fail(failure)
        if self._call is not None:
            self._call.cancel()  # not what carries it: its traceback would hold the call and the connection

    async def close(self) -> None:
        """End the link in order; calls under way fail."""
        self.link.close()
        if self._carrying is not None:
            self._fail(Unavailable("the client was closed"))
            await asyncio.wait({self._carrying}, timeout=FLUSH_S)
            self._carrying.cancel()
            await asyncio.wait({self._carrying})

    async def call(
        self,
        work: bytes,
        timeout_s: float,
        target: str = "",
        *,
        wait_for_agent_ms: int = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
    ) -> Reply:
        """
        Have one task done.

        Raises:
            TaskFailed: The other end did not answer in time, or the link broke.
            Unavailable: The link is not open, or the other end takes nothing new.
        """
        number, future, slot = self._ask(
            work,
            timeout_s,
            target,
            wait_for_agent_ms=wait_for_agent_ms,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
        )
        try:
            return await future
        finally:
            self._forget(number, future, slot)

    async def stream(
        self,
        work: bytes,
        timeout_s: float,
        target: str = "",
        *,
        wait_for_agent_ms: int = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
    ) -> AsyncGenerator[link_pb2.Part | Reply]:
        """
        Have one task done whose answer may come in parts; the last item is how it ended.

        The agent makes no more of it than fits into `PART_CREDIT` ahead of who reads here.

        Raises:
            TaskFailed, Unavailable: As `call`.
        """
        number, future, slot = self._ask(
            work,
            timeout_s,
            target,
            wait_for_agent_ms=wait_for_agent_ms,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
            part_credit=PART_CREDIT,
        )
        parts = self._parts[number] = _Parts()
        future.add_done_callback(parts.wake)
        try:
            while True:
                if parts.waiting:
                    part = parts.waiting.popleft()
                    cost = cost_of(part.value)
                    parts.credit += cost
                    self.link.allow(number, cost)
                    yield part
                elif future.done():
                    yield future.result()
                    return
                else:
                    parts.filled.clear()
                    await parts.filled.wait()
        finally:
            del self._parts[number]
            self._forget(number, future, slot)
            if not future.cancel() and not future.cancelled():
                future.exception()  # nobody will ask for it any more

    def _ask(
        self,
        work: bytes,
        timeout_s: float,
        target: str,
        *,
        wait_for_agent_ms: int,
        idempotent: bool,
        allow_unverified: bool,
        part_credit: int = 0,
    ) -> tuple[int, asyncio.Future[Reply], int]:
        """Put a task on the link; its number, what will have its outcome, and where its deadline is kept."""
        if self._failure is not None:
            raise self._failure.with_traceback(None)  # it may be raised many times
        if self.link.state is not State.OPEN:
            raise Unavailable(f"{self._peer} is shutting down; try again")
        number = next(self._numbers)
        self.link.ask(
            number,
            work,
            max(1, round(timeout_s * 1000)),
            target,
            wait_for_agent_ms=wait_for_agent_ms,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
            part_credit=part_credit,
        )
        future = self._open[number] = self._loop.create_future()
        return number, future, self._deadlines.add(future, self._loop.time() + timeout_s + GRACE_S)

    def _forget(self, number: int, future: asyncio.Future[Reply], slot: int) -> None:
        """Wait for it no longer; the other end is told if it has not answered."""
        self._deadlines.discard(future, slot)
        if self._open.pop(number, None) is not None:
            self.link.cancel(number)

    # What the other end says.

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """The link is open."""
        self.max_payload_bytes = frame.welcome.max_payload_bytes
        if not self._greeted.done():
            self._greeted.set_result(None)

    def on_parts(self, parts: Iterable[link_pb2.Part]) -> None:
        """Pieces of answers; one that there is no room for ends its task."""
        for part in parts:
            waiting, future = self._parts.get(part.task_id), self._open.get(part.task_id)
            if waiting is None or future is None or future.done():
                continue
            if waiting.credit > 0:
                waiting.put(part)
            else:
                text = f"{self._peer} sent a part that there was no room for"
                future.set_exception(TaskFailed(OutcomeCode.INVALID_RESULT, text))

    def on_outcomes(self, outcomes: Iterable[Reply]) -> None:
        """Answers; those that nobody waits for any more are dropped."""
        for outcome in outcomes:
            future = self._open.pop(outcome.task_id, None)
            if future is not None and not future.done():
                future.set_result(outcome)

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:
        """The other end leaves; what it has not answered is lost."""
        self._fail(Unavailable(goodbye.message))
        self.link.close()

    async def _carry(self, call: Call) -> None:
        failure: ParallaxError = Unavailable(f"{self._peer} ended the link")
        try:
            await converse(self.link, call, lambda: self._look_now_and_then(call))
        except ParallaxError as exc:
            failure = exc
        finally:
            self._call = None
            call.cancel()
            self._fail(failure)

    async def _look_now_and_then(self, call: Call) -> None:
        # Not at each answer: most links are never retired, and their calls should pay nothing for it.
        while self._open or not self._is_retired:
            await asyncio.sleep(TICK_S)
            for future in self._deadlines.expire(self._loop.time()):
                if not future.done():
                    text = f"{self._peer} did not answer in time"
                    future.set_exception(TaskFailed(OutcomeCode.DEADLINE_EXCEEDED, text))
        self._failure = Unavailable(f"this link to {self._peer} has ended for another")
        self.link.close()
        await asyncio.sleep(FLUSH_S)
        call.cancel()  # the other end does not do its part

    def _fail(self, failure: ParallaxError) -> None:
        """Nothing more will come."""
        failure = failure.with_traceback(None)  # which holds the call, and so the connection
        if self._failure is None:
            self._failure = failure
        if not self._greeted.done():
            self._greeted.set_exception(failure)
        while self._open:
            _, future = self._open.popitem()
            if not future.done():
                future.set_exception(self._lost(failure))


class _Parts:
    """What has come of one answer and is not read yet."""

    def __init__(self) -> None:
        self.waiting: deque[link_pb2.Part] = deque()
        self.credit = PART_CREDIT
        self.filled = asyncio.Event()

    def put(self, part: link_pb2.Part) -> None:
        self.waiting.append(part)
        self.credit -= cost_of(part.value)
        self.filled.set()

    def wake(self, _: asyncio.Future[Reply]) -> None:
        self.filled.set()
