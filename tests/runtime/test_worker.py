"""The end of a link that does tasks: each is answered once, and a bad one costs no other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import pytest

from parallax.protos import link_pb2
from parallax.runtime.description import AgentDescription
from parallax.runtime.executor import Executor
from parallax.runtime.link import MAX_BACKLOG_BYTES, End, Link, Said, answer_of
from parallax.runtime.outcome import Complete, Failure, Outcome, OutcomeCode, Payload, Value
from parallax.runtime.session import AgentSession
from parallax.runtime.session_stream import SessionStream
from parallax.runtime.wire import encode_value, encode_work
from parallax.runtime.worker import Bench, Worker
from parallax.security.errors import InvalidRequest, Unavailable

Frame = link_pb2.LinkFrame
MOST = 2**64 - 1


async def settle() -> None:
    for _ in range(15):
        await asyncio.sleep(0)


class Desk:
    """A worker, what it works with, and who is at the other end of its link."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.begun: list[bytes] = []
        self.cancelled: list[bytes] = []
        self.closed = 0
        self.worker: Worker

    async def handle(self, name: str, payload: Payload) -> Outcome:
        self.begun.append(payload.data)
        try:
            match name:
                case "wait":
                    await self.gate.wait()
                case "fail":
                    raise LookupError("no such thing")
                case "spoil":
                    return Value(Payload(b"", "\ud800"), 1.0)
                case "nothing":
                    return Value(Payload(None), 1.0)  # type: ignore[arg-type]
        except asyncio.CancelledError:
            self.cancelled.append(payload.data)
            raise
        return Value(payload, 1.0)

    async def stream(self, name: str, payload: Payload) -> AsyncGenerator[Value | Failure, None]:
        try:
            for number in range(len(payload.data)):
                yield Value(Payload(payload.data[: number + 1]), 1.0)
                if name == "fail":
                    yield Failure(OutcomeCode.HANDLER_FAILED, "no")
            if name == "wait":
                await self.gate.wait()
        finally:
            self.closed += 1

    def say(self, *tasks: link_pb2.Task, cancelled: tuple[int, ...] = (), credit: Any = ()) -> None:
        self.worker.link.hear(Frame(tasks=tasks, cancelled_task_ids=cancelled, credits=credit))

    def read(self) -> tuple[list[link_pb2.Part], dict[int, link_pb2.TaskOutcome]]:
        parts: list[link_pb2.Part] = []
        outcomes: dict[int, link_pb2.TaskOutcome] = {}
        while (frame := self.worker.link.take()) is not None:
            parts.extend(frame.parts)
            for outcome in frame.outcomes:
                assert outcome.task_id not in outcomes
                outcomes[outcome.task_id] = outcome
        return parts, outcomes

    def codes(self) -> dict[int, OutcomeCode | None]:
        answers = {number: answer_of(outcome) for number, outcome in self.read()[1].items()}
        return {n: a.code if isinstance(a, Failure) else None for n, a in answers.items()}


def task(number: int, name: str = "echo", data: bytes = b"", **options: Any) -> link_pb2.Task:
    options.setdefault("timeout_ms", 60_000)
    options.setdefault("work", encode_work(name, Payload(data)))
    return link_pb2.Task(id=number, **options)


@asynccontextmanager
async def at_desk(*, streams: bool = True, max_concurrency: int = 4) -> AsyncIterator[Desk]:
    desk = Desk()
    async with Executor(
        desk.handle, max_concurrency=max_concurrency, queue_limit=2, grace=timedelta(0)
    ) as executor:
        desk.worker = Worker(Bench(executor, desk.stream if streams else None))
        desk.worker.link = Link(End.WORKER, Said.HELLO, desk.worker)
        desk.worker.link.hear(Frame(hello=link_pb2.Hello()))
        yield desk


class TestTasks:
    async def test_are_answered_each_for_itself(self) -> None:
        async with at_desk() as desk:
            desk.say(
                task(1, data=b"one"),
                task(2, "fail"),
                task(3, work=b"\xff no work"),
                task(4, "x" * 2000),
                task(5, timeout_ms=0),
                task(6, "spoil"),
                task(7, "nothing"),
                task(MOST, data=b"last", timeout_ms=MOST),
            )
            for _ in range(3):
                await settle()
            _, outcomes = desk.read()
            assert answer_of(outcomes[1]) == encode_value(Value(Payload(b"one"), 1.0))
            assert answer_of(outcomes[MOST]) == encode_value(Value(Payload(b"last"), 1.0))
            failures = {n: answer_of(o) for n, o in outcomes.items() if n not in (1, MOST)}
            assert {n: f.code for n, f in failures.items() if isinstance(f, Failure)} == {
                2: OutcomeCode.HANDLER_FAILED,
                3: OutcomeCode.INVALID_ARGUMENT,
                4: OutcomeCode.INVALID_ARGUMENT,
                5: OutcomeCode.DEADLINE_EXCEEDED,
                6: OutcomeCode.INVALID_RESULT,
                7: OutcomeCode.INVALID_RESULT,
            }
            assert desk.worker.held == []
            assert desk.worker.link.backlog_bytes == 0

    async def test_beyond_what_the_executor_takes_are_refused(self) -> None:
        async with at_desk(max_concurrency=1) as desk:
            desk.say(*(task(number, "wait") for number in range(5)))
            assert desk.codes() == {3: OutcomeCode.OVERLOADED, 4: OutcomeCode.OVERLOADED}
            assert sorted(desk.worker.held) == [0, 1, 2]

    async def test_with_a_number_that_is_open_breaks_the_protocol(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, "wait"))
            with pytest.raises(InvalidRequest, match="task 1 is still open"):
                desk.say(task(1))

    async def test_with_a_number_that_has_ended_are_tasks_of_their_own(self) -> None:
        async with at_desk() as desk:
            for data in (b"first", b"second"):
                desk.say(task(1, data=data))
                await settle()
                assert desk.codes() == {1: None}
            desk.say(task(1, "wait", b"third"), cancelled=(1,))
            desk.say(task(1, data=b"fourth"))
            await settle()
            assert desk.begun[-1] == b"fourth"

    async def test_answer_that_is_larger_than_the_other_end_takes_is_invalid(self) -> None:
        async with at_desk() as desk:
            desk.worker.max_payload_bytes = 3
            desk.say(task(1, data=b"123"), task(2, data=b"1234"))
            await settle()
            assert desk.codes() == {1: None, 2: OutcomeCode.INVALID_RESULT}

    async def test_of_who_never_reads_end_the_link_in_the_end(self) -> None:
        """Each refusal takes room, too."""
        async with at_desk() as desk:
            desk.worker.link.backlog_bytes = 2 * MAX_BACKLOG_BYTES + 1
            with pytest.raises(Unavailable, match="wait to be read"):
                desk.say(task(1))
            assert desk.begun == []


class TestCancellation:
    async def test_ends_the_handler_and_is_answered_once(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, "wait", b"one"), task(2, "wait", b"two"))
            await settle()
            desk.say(cancelled=(1, 1, 99, MOST))
            desk.say(cancelled=(1,))
            await settle()
            assert desk.codes() == {1: OutcomeCode.CANCELLED}
            assert desk.cancelled == [b"one"]
            assert desk.worker.held == [2]

    async def test_in_the_frame_of_its_task_begins_nothing(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, "wait"), cancelled=(1,))
            await settle()
            assert desk.codes() == {1: OutcomeCode.CANCELLED}
            assert desk.begun == []

    async def test_of_all(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, "wait"), task(2, "wait"), task(3, "wait", b"x", part_credit=9))
            await settle()
            desk.worker.withdraw_all()
            assert set(desk.codes().values()) == {OutcomeCode.CANCELLED}
            assert desk.worker.held == []
            await settle()
            assert desk.closed == 1


class TestParts:
    async def test_go_as_far_as_the_credit_and_on_with_more(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, data=b"abc", part_credit=1))
            await settle()
            parts, outcomes = desk.read()
            assert (len(parts), outcomes) == (1, {})
            desk.say(credit=[link_pb2.Credit(task_id=1, bytes=MOST), link_pb2.Credit(task_id=9, bytes=1)])
            await settle()
            parts, outcomes = desk.read()
            assert [p.value for p in parts] == [
                encode_value(Value(Payload(data), 1.0)) for data in (b"ab", b"abc")
            ]
            assert answer_of(outcomes[1]) == Complete(3)
            desk.say(credit=[link_pb2.Credit(task_id=1, bytes=MOST)])
            assert desk.worker._senders == {}

    async def test_of_who_has_none_are_the_whole_answer(self) -> None:
        async with at_desk(streams=False) as desk:
            desk.say(task(1, data=b"abc", part_credit=1))
            await settle()
            parts, outcomes = desk.read()
            assert parts == []
            assert answer_of(outcomes[1]) == encode_value(Value(Payload(b"abc"), 1.0))

    async def test_that_end_with_a_failure(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, "fail", b"abc", part_credit=MOST))
            await settle()
            parts, outcomes = desk.read()
            assert len(parts) == 1
            assert answer_of(outcomes[1]) == Failure(OutcomeCode.HANDLER_FAILED, "no")
            assert desk.closed == 1

    async def test_that_were_cancelled_close_the_generator(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, data=b"abc", part_credit=1))
            await settle()
            desk.say(cancelled=(1,))
            await settle()
            assert desk.codes() == {1: OutcomeCode.CANCELLED}
            assert desk.closed == 1
            assert desk.worker._senders == {}


def stream_breaks(session: AgentSession) -> None:
    """Of a session that did not dial it."""
    session._streams.append(session._head)
    session._end(session._head)


class TestRefusal:
    """What a worker does while nothing new may begin."""

    async def test_answers_what_is_new_and_lets_the_rest_go_on(self) -> None:
        async with at_desk() as desk:
            desk.say(task(1, "wait"))
            await settle()
            desk.worker.refusal = Failure(OutcomeCode.INVALID_ARGUMENT, "no more")
            desk.say(task(2), task(3))
            assert desk.codes() == dict.fromkeys((2, 3), OutcomeCode.INVALID_ARGUMENT)
            desk.gate.set()
            await settle()
            assert desk.codes() == {1: None}
            assert len(desk.begun) == 1


class TestSession:
    """What an agent takes along when its stream breaks."""

    @asynccontextmanager
    async def session(self) -> AsyncIterator[tuple[Desk, AgentSession]]:
        async with at_desk() as desk:
            session = AgentSession(
                lambda: pytest.fail("it need not dial"),
                "agent-1",
                AgentDescription(),
                desk.worker._bench,
                timedelta(seconds=1),
            )
            session.link.hear(Frame(welcome=link_pb2.Welcome(heartbeat_ms=1000)))
            desk.worker = session
            yield desk, session

    async def test_is_what_it_works_on_and_what_nobody_took(self) -> None:
        async with self.session() as (desk, session):
            desk.say(task(1, "wait"), task(2, data=b"two"), task(3, data=b"three"))
            await settle()
            assert session.link.unsent()
            stream_breaks(session)
            hello = session._hello(session.link)
            assert sorted(hello.held_task_ids) == [1, 2, 3]
            assert hello.sole
            desk.gate.set()
            await settle()
            assert desk.codes() == {1: None, 2: None, 3: None}

    async def test_is_not_what_was_taken_and_may_have_got_lost(self) -> None:
        async with self.session() as (desk, session):
            desk.say(task(1, data=b"one"))
            await settle()
            assert session.link.take() is not None
            stream_breaks(session)
            assert list(session._hello(session.link).held_task_ids) == []

    @pytest.mark.parametrize("name", ["echo", "wait"])
    async def test_is_no_answer_in_parts_of_which_some_may_be_lost(self, name: str) -> None:
        """Whoever waits for it hears that, instead of waiting for parts or credit that got lost."""
        async with self.session() as (desk, session):
            desk.say(task(1, name, b"abc", part_credit=MOST))
            await settle()
            assert session.link.take() is not None
            if name == "echo":
                desk.say(task(2, name, b"abc", part_credit=MOST))
                await settle()
                number = 2
            else:
                number = 1
            stream_breaks(session)
            assert list(session._hello(session.link).held_task_ids) == [number]
            parts, outcomes = desk.read()
            assert parts == []
            answer = answer_of(outcomes[number])
            assert isinstance(answer, Failure)
            assert answer.code is OutcomeCode.INVALID_RESULT
            assert "some may be lost" in answer.message
            await settle()
            assert desk.closed == number
            assert session.held == []


class TestSecondStream:
    """What becomes of tasks while an agent moves from one stream to another."""

    @asynccontextmanager
    async def streams(self) -> AsyncIterator[tuple[Desk, AgentSession, SessionStream, SessionStream]]:
        """A session with an open stream, and a second one that has said hello."""
        async with at_desk() as desk:
            session = AgentSession(
                lambda: pytest.fail("it need not dial"),
                "agent-1",
                AgentDescription(),
                desk.worker._bench,
                timedelta(seconds=1),
            )
            old, new = session._head, SessionStream(session)
            session._streams += [old, new]
            old.link.hear(Frame(welcome=link_pb2.Welcome(heartbeat_ms=1000, generation=7)))
            yield desk, session, old, new

    def welcome(self, stream: SessionStream) -> None:
        stream.link.hear(Frame(welcome=link_pb2.Welcome(heartbeat_ms=1000, generation=8)))

    async def test_answers_go_where_their_task_came_from(self) -> None:
        async with self.streams() as (desk, session, old, new):
            old.link.hear(Frame(tasks=[task(1, "wait")]))
            self.welcome(new)
            assert (old.leaving.is_set(), session.connected.is_set()) == (True, True)
            new.link.hear(Frame(tasks=[task(2, "wait")]))
            await settle()
            desk.gate.set()
            await settle()
            assert said_on(old) == ([1], [])
            assert said_on(new) == ([2], [])

    async def test_answers_go_to_the_new_one_when_the_old_one_is_closed(self) -> None:
        async with self.streams() as (desk, _, old, new):
            old.link.hear(Frame(tasks=[task(1, "wait")]))
            self.welcome(new)
            await settle()
            old.link.close()
            desk.gate.set()
            await settle()
            assert said_on(old) == ([], [])
            assert said_on(new) == ([1], [])

    async def test_a_cancellation_on_the_new_one_reaches_what_came_by_the_old_one(self) -> None:
        async with self.streams() as (desk, session, old, new):
            old.link.hear(Frame(tasks=[task(1, "wait", b"x")]))
            self.welcome(new)
            await settle()
            session._end(old)
            new.link.hear(Frame(cancelled_task_ids=[1]))
            await settle()
            assert desk.cancelled == [b"x"]

    async def test_a_task_that_is_open_already_is_not_begun_by_the_other(self) -> None:
        async with self.streams() as (desk, _, old, new):
            old.link.hear(Frame(tasks=[task(1, "wait")]))
            self.welcome(new)
            with pytest.raises(InvalidRequest, match="still open"):
                new.link.hear(Frame(tasks=[task(1, "wait")]))
            await settle()
            assert len(desk.begun) == 1

    async def test_what_the_old_one_could_not_send_goes_out_on_the_new_one(self) -> None:
        async with self.streams() as (_, session, old, new):
            old.link.hear(Frame(tasks=[task(1), task(2, "wait"), task(3, "wait", part_credit=MOST)]))
            await settle()
            self.welcome(new)
            session._end(old)
            assert said_on(new) == ([1, 3], [(7, [2])])  # the third was in parts, and is torn

    async def test_an_old_one_that_was_dismissed_leaves_nothing_to_tell(self) -> None:
        async with self.streams() as (_, session, old, new):
            self.welcome(new)
            old.link.hear(Frame(goodbye=link_pb2.Goodbye(reason=link_pb2.GOODBYE_REASON_REPLACED)))
            session._end(old)
            assert said_on(new) == ([], [])
            assert session.connected.is_set()

    async def test_an_old_one_that_breaks_before_the_welcome_is_told_of_after_it(self) -> None:
        async with self.streams() as (_, session, old, new):
            old.link.hear(Frame(tasks=[task(1), task(2, "wait")]))
            await settle()
            session._end(old)
            assert not session.connected.is_set()
            self.welcome(new)
            assert session.connected.is_set()
            assert said_on(new) == ([1], [(7, [2])])

    async def test_a_goodbye_to_the_old_one_may_come_before_the_welcome_of_the_new_one(self) -> None:
        async with self.streams() as (_, session, old, new):
            old.link.hear(Frame(goodbye=link_pb2.Goodbye(reason=link_pb2.GOODBYE_REASON_REPLACED)))
            session._end(old)
            assert session.connected.is_set()
            assert session.link is new.link
            self.welcome(new)
            assert said_on(new) == ([], [])

    async def test_a_new_one_that_fails_changes_nothing(self) -> None:
        async with self.streams() as (desk, session, old, new):
            old.link.hear(Frame(tasks=[task(1, "wait")]))
            await settle()
            session._end(new)
            assert session.connected.is_set()
            desk.gate.set()
            await settle()
            assert said_on(old) == ([1], [])


def said_on(stream: SessionStream) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """The tasks that were answered on *stream*, and what was said of sessions that broke off."""
    frames = []
    while (frame := stream.link.take()) is not None:
        frames.append(frame)
    broken = [(f.broken.generation, list(f.broken.held_task_ids)) for f in frames if f.HasField("broken")]
    return sorted(outcome.task_id for frame in frames for outcome in frame.outcomes), broken
