"""
One end of a link: many tasks on one stream, told apart by id.

Knows no stream. What the other end says comes in through `Link.hear`; what this end has to say
goes out through `Link.take`, as much as has gathered since the last time: natural batching.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum, IntEnum, auto
from typing import Any, Final

from parallax.protos import link_pb2
from parallax.runtime.outcome import Complete, Failure, OutcomeCode
from parallax.runtime.wire import failure_from_proto, failure_to_proto
from parallax.security.errors import InvalidRequest, ParallaxError

MAX_FRAME_BYTES: Final = 1024 * 1024  # a frame holds this much, or one item
MAX_FRAME_ITEMS: Final = 4_096  # more would hold up the receiver's loop, however small each is
# What may wait for an end that reads slowly. Beyond it the end that writes must say no to new work.
MAX_BACKLOG_BYTES: Final = 64 * 1024 * 1024
MOST_VARINT_BYTES: Final = 10
ITEM_OVERHEAD_BYTES: Final = 64  # of an item, apart from what it carries; an upper bound


class End(Enum):
    """Which end of a link this is: the one that gives tasks, or the one that does them."""

    CALLER = auto()
    WORKER = auto()


class State(IntEnum):  # whose members hash fast
    """How far the other end is."""

    SILENT = auto()  # no greeting yet
    OPEN = auto()
    DRAINING = auto()  # it takes no new task
    GONE = auto()  # it said goodbye


class Said(IntEnum):
    """What a frame can carry: the numbers of its fields."""

    HELLO = link_pb2.LinkFrame.HELLO_FIELD_NUMBER
    WELCOME = link_pb2.LinkFrame.WELCOME_FIELD_NUMBER
    TASKS = link_pb2.LinkFrame.TASKS_FIELD_NUMBER
    CANCELLATIONS = link_pb2.LinkFrame.CANCELLED_TASK_IDS_FIELD_NUMBER
    CREDITS = link_pb2.LinkFrame.CREDITS_FIELD_NUMBER
    PARTS = link_pb2.LinkFrame.PARTS_FIELD_NUMBER
    OUTCOMES = link_pb2.LinkFrame.OUTCOMES_FIELD_NUMBER
    DRAINING = link_pb2.LinkFrame.DRAINING_FIELD_NUMBER
    GOODBYE = link_pb2.LinkFrame.GOODBYE_FIELD_NUMBER
    BROKEN = link_pb2.LinkFrame.BROKEN_FIELD_NUMBER


_LISTS: Final = frozenset(map(int, (Said.TASKS, Said.CANCELLATIONS, Said.CREDITS, Said.PARTS, Said.OUTCOMES)))
_BY_CALLERS: Final = (Said.TASKS, Said.CANCELLATIONS, Said.CREDITS, Said.GOODBYE)
_BY_WORKERS: Final = (Said.PARTS, Said.OUTCOMES, Said.DRAINING, Said.GOODBYE, Said.BROKEN)
_MOVES: Final = {Said.DRAINING: State.DRAINING, Said.GOODBYE: State.GONE}


def _transitions(greeting: Said, said: tuple[Said, ...]) -> dict[tuple[State, int], State]:
    table: dict[tuple[State, int], State] = {(State.SILENT, greeting): State.OPEN}
    for state in (State.OPEN, State.DRAINING):
        table |= {(state, word): _MOVES.get(word, state) for word in said}
    return table


# Who dialled says hello, so each kind of end may open with either. What is not here breaks the protocol.
TRANSITIONS: Final[Mapping[tuple[End, Said], Mapping[tuple[State, int], State]]] = {
    (end, greeting): _transitions(greeting, _BY_WORKERS if end is End.CALLER else _BY_CALLERS)
    for end in End
    for greeting in (Said.HELLO, Said.WELCOME)
}
"""What the other end may say to this one, which awaits that greeting, and where it leads."""


class Receiver:
    """
    Who is told what the other end says: the kinds of a frame one after the other, as here.

    What raises `ParallaxError` ends the stream; nothing may block.
    """

    @property
    def is_busy(self) -> bool:
        """Whether more than one task is open, so that what there is to say may soon be more."""
        return True

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """The other end's first frame."""

    def on_frame(self) -> None:
        """The other end is alive: before all else in any later frame."""

    def on_tasks(self, tasks: Iterable[link_pb2.Task]) -> None:
        """Work to begin."""

    def on_cancellations(self, task_ids: Iterable[int]) -> None:
        """Nobody waits for these any more; some may have ended, or never have been."""

    def on_credits(self, allowances: Iterable[link_pb2.Credit]) -> None:
        """Room for parts."""

    def on_parts(self, parts: Iterable[link_pb2.Part]) -> None:
        """Pieces of answers."""

    def on_outcomes(self, outcomes: Iterable[link_pb2.TaskOutcome]) -> None:
        """Answers."""

    def on_draining(self, draining: bool) -> None:  # noqa: FBT001 - as the field is
        """No new task for this link, please."""

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:
        """The other end leaves."""

    def on_broken(self, broken: link_pb2.Broken) -> None:
        """Another link of the other end broke off."""


def answer_of(outcome: link_pb2.TaskOutcome) -> bytes | Failure | Complete:
    """What an outcome answers; a malformed one is INVALID_RESULT, and costs nobody but its task."""
    value = outcome.value
    if value:  # by far the most
        return value
    match outcome.WhichOneof("result"):
        case "value":
            return value  # nothing, without confidence: a Value whose fields all have their defaults
        case "failure":
            return failure_from_proto(outcome.failure)
        case "parts":
            return Complete(outcome.parts)
        case _:
            return Failure(OutcomeCode.INVALID_RESULT, "an outcome has neither a value nor a failure")


class Link:
    """
    One end of a link.

    Args:
        end: Which one this is; the other end may only say what is its part.
        greeting: What the other end begins with: HELLO where it dialled, WELCOME where this end did.
        receiver: Who is told what the other end says.

    Attributes:
        awaits: The greeting that the other end begins with.
        state: How far the other end is.
        backlog_bytes: How much waits to be taken.
        beat_s: Say something at least as often; None where silence means nothing.
        failure: What the stream is to end with, if this end served it, and not in order.
        on_filled: Called when there is something to take after there was nothing; set by who takes.
    """

    def __init__(self, end: End, greeting: Said, receiver: Receiver) -> None:
        self.state = State.SILENT
        self.backlog_bytes = 0
        self.beat_s: float | None = None
        self.failure: ParallaxError | None = None
        self.on_filled: Callable[[], None] = lambda: None
        self.awaits = greeting
        self._transitions = TRANSITIONS[end, greeting]
        self.receiver = receiver
        self._deliver: Mapping[int, Callable[[Any], None]] = {
            Said.TASKS: receiver.on_tasks,
            Said.CANCELLATIONS: receiver.on_cancellations,
            Said.CREDITS: receiver.on_credits,
            Said.PARTS: receiver.on_parts,
            Said.OUTCOMES: receiver.on_outcomes,
            Said.DRAINING: receiver.on_draining,
            Said.GOODBYE: receiver.on_goodbye,
            Said.BROKEN: receiver.on_broken,
        }
        self._full: deque[tuple[link_pb2.LinkFrame, int]] = deque()
        self._frame = link_pb2.LinkFrame()  # being filled
        self._size = 0  # bytes in it
        self._items = 0
        self._is_filled = False  # there is something to take
        self.is_closed = False

    # What this end says. After `close`, nothing is.

    def greet(self, frame: link_pb2.LinkFrame) -> None:
        """Say hello or welcome: before all else, also before what was said already."""
        self._full.appendleft((frame, 0))
        self._fill()

    def give(self, task_id: int, work: bytes, timeout_ms: int, part_credit: int = 0) -> None:
        """Give an agent a task."""
        room = self._room(len(work))
        if part_credit:
            room.tasks.add(id=task_id, work=work, timeout_ms=timeout_ms, part_credit=part_credit)
        else:
            room.tasks.add(id=task_id, work=work, timeout_ms=timeout_ms)

    def ask(
        self,
        task_id: int,
        work: bytes,
        timeout_ms: int,
        target: str,
        *,
        wait_for_agent_ms: int = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
        part_credit: int = 0,
    ) -> None:
        """Give a control plane a task, with what it needs to know; an agent needs no *target*."""
        room = self._room(len(work) + len(target))
        if not (wait_for_agent_ms or idempotent or allow_unverified or part_credit):  # nearly always
            room.tasks.add(id=task_id, work=work, timeout_ms=timeout_ms, target=target)
            return
        room.tasks.add(
            id=task_id,
            work=work,
            timeout_ms=timeout_ms,
            target=target,
            wait_for_agent_ms=wait_for_agent_ms,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
            part_credit=part_credit,
        )

    def cancel(self, task_id: int) -> None:
        """Say that nobody waits for a task any more."""
        self._room(0).cancelled_task_ids.append(task_id)

    def allow(self, task_id: int, credit: int) -> None:
        """Make room for further parts, *credit* bytes."""
        self._room(0).credits.add(task_id=task_id, bytes=credit)

    def answer(
        self, task_id: int, answer: bytes | Failure | Complete, agent_id: str = "", attempts: int = 0
    ) -> None:
        """Say how a task ended: with a serialized value, a failure, or after parts."""
        if isinstance(answer, bytes):
            # One call, and nothing in it that is not needed: this is said once per task.
            self._room(len(answer) + len(agent_id)).outcomes.add(
                task_id=task_id, value=answer, agent_id=agent_id, attempts=attempts
            )
            return
        outcome = link_pb2.TaskOutcome(task_id=task_id, agent_id=agent_id, attempts=attempts)
        match answer:
            case Failure():
                outcome.failure.CopyFrom(failure_to_proto(answer))
            case Complete():
                outcome.parts = answer.parts
        self._room(outcome.ByteSize()).outcomes.append(outcome)

    def send_part(self, task_id: int, value: bytes, agent_id: str = "") -> None:
        """Send one piece of an answer."""
        self._room(len(value) + len(agent_id)).parts.add(task_id=task_id, value=value, agent_id=agent_id)

    def drain(self) -> None:
        """Ask for no new task; those on their way must still be taken, or refused one by one."""
        self._room(0).draining = True

    def report_broken(self, generation: int, held: Collection[int]) -> None:
        """Say that a session broke off, and what is *held* of the tasks given on it; never with a goodbye."""
        broken = self._room(MOST_VARINT_BYTES * len(held)).broken
        broken.generation = generation
        broken.held_task_ids[:] = held

    def beat(self) -> None:
        """Say nothing, to be heard."""
        self._room(0)

    def say_goodbye(self, reason: link_pb2.GoodbyeReason, message: str) -> None:
        """Leave: nothing is said after it."""
        goodbye = self._room(len(message)).goodbye
        goodbye.reason = reason
        goodbye.message = message
        self.close()

    def close(self) -> None:
        """Say nothing more; what was said before can still be taken."""
        self.is_closed = True
        self._fill()

    def fail(self, why: ParallaxError) -> None:
        """Close, and let the stream end with *why* once all is sent."""
        self.failure = why
        self.close()

    def take(self) -> link_pb2.LinkFrame | None:
        """What goes out next, or None when there is nothing."""
        if self._full:
            frame, size = self._full.popleft()
            self.backlog_bytes -= size
            return frame
        if self._items:
            frame = self._frame
            self.backlog_bytes -= self._size
            self._frame, self._size, self._items = link_pb2.LinkFrame(), 0, 0
            return frame
        self._is_filled = False
        return None

    def abandon(self) -> None:
        """Let go what nobody will take any more."""
        self.close()
        self.failure = None
        self._full.clear()
        self._frame, self._size, self._items, self.backlog_bytes = link_pb2.LinkFrame(), 0, 0, 0

    def unsent(self) -> list[link_pb2.TaskOutcome]:
        """The answers that nobody has taken: they can still be said on another link."""
        frames = [*(frame for frame, _ in self._full), self._frame]
        return [outcome for frame in frames for outcome in frame.outcomes]

    def repeat(self, outcomes: Iterable[link_pb2.TaskOutcome]) -> None:
        """Say again what was said on a link that broke."""
        for outcome in outcomes:
            self._room(outcome.ByteSize()).outcomes.append(outcome)

    def _room(self, size: int) -> link_pb2.LinkFrame:
        """The frame that an item of *size* bytes goes into."""
        if self.is_closed:
            return link_pb2.LinkFrame()  # which nobody takes
        size += ITEM_OVERHEAD_BYTES
        if self._items and (self._size + size > MAX_FRAME_BYTES or self._items >= MAX_FRAME_ITEMS):
            self._full.append((self._frame, self._size))
            self._frame, self._size, self._items = link_pb2.LinkFrame(), 0, 0
        self._size += size
        self._items += 1
        self.backlog_bytes += size
        if not self._is_filled:
            self._fill()
        return self._frame

    def _fill(self) -> None:
        self._is_filled = True
        self.on_filled()

    # What the other end says.

    def hear(self, frame: link_pb2.LinkFrame) -> None:
        """
        Take in one frame.

        Raises:
            InvalidRequest: It breaks the protocol.
            ParallaxError: The receiver refuses it.
        """
        if self.state is State.SILENT:
            self._hear_greeting(frame)
            return
        self.receiver.on_frame()
        items = 0
        for field, content in frame.ListFields():  # in the order of their numbers
            number = field.number
            state = self._transitions.get((self.state, number))
            if state is None:
                raise self._misplaced(number)
            self.state = state
            if number in _LISTS:
                items += len(content)
                if items > MAX_FRAME_ITEMS:
                    raise InvalidRequest(f"a frame has more than {MAX_FRAME_ITEMS} items")
            self._deliver[number](content)

    def _hear_greeting(self, frame: link_pb2.LinkFrame) -> None:
        numbers = [field.number for field, _ in frame.ListFields()]
        if len(numbers) != 1:
            raise InvalidRequest("the first frame must carry a greeting and nothing else")
        if (State.SILENT, numbers[0]) not in self._transitions:
            raise self._misplaced(numbers[0])
        self.state = State.OPEN
        self.receiver.on_greeting(frame)

    def _misplaced(self, number: int) -> InvalidRequest:
        return InvalidRequest(f"the peer may not say {Said(number).name.lower()} {_WHEN[self.state]}")


_WHEN: Final = {
    State.SILENT: "before its greeting",
    State.OPEN: "on its end of a link, or twice",
    State.DRAINING: "on its end of a link, or twice",
    State.GONE: "after its goodbye",
}
