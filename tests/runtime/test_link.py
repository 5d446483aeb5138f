"""What either end of a link may say when, what goes into a frame, and that all of it arrives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.protos import link_pb2
from parallax.runtime.link import (
    ITEM_OVERHEAD_BYTES,
    MAX_FRAME_BYTES,
    MAX_FRAME_ITEMS,
    TRANSITIONS,
    End,
    Link,
    Receiver,
    Said,
    State,
    answer_of,
)
from parallax.runtime.outcome import Complete, Failure, OutcomeCode
from parallax.security.errors import InvalidRequest

Frame = link_pb2.LinkFrame

GREETINGS: Final = {
    Said.HELLO: Frame(hello=link_pb2.Hello()),
    Said.WELCOME: Frame(welcome=link_pb2.Welcome()),
}

# One frame for each kind of thing that can be said.
FRAMES: Final[dict[Said, Frame]] = {
    **GREETINGS,
    Said.TASKS: Frame(tasks=[link_pb2.Task(id=1)]),
    Said.CANCELLATIONS: Frame(cancelled_task_ids=[1]),
    Said.CREDITS: Frame(credits=[link_pb2.Credit(task_id=1)]),
    Said.PARTS: Frame(parts=[link_pb2.Part(task_id=1)]),
    Said.OUTCOMES: Frame(outcomes=[link_pb2.TaskOutcome(task_id=1)]),
    Said.DRAINING: Frame(draining=True),
    Said.GOODBYE: Frame(goodbye=link_pb2.Goodbye()),
    Said.BROKEN: Frame(broken=link_pb2.Broken(generation=1)),
}

# By hand, once more: what is heard in which state, and the state it leads to; all else breaks the protocol.
BY_CALLER: Final = (Said.TASKS, Said.CANCELLATIONS, Said.CREDITS)
BY_WORKER: Final = (Said.PARTS, Said.OUTCOMES, Said.BROKEN)


def expected(end: End, greeting: Said, state: State, word: Said) -> State | None:
    """The state that *word* leads to at that *end*; None where it must not be said."""
    if state is State.GONE:
        return None
    if state is State.SILENT:
        return State.OPEN if word is greeting else None
    if word is Said.GOODBYE:
        return State.GONE
    if word is Said.DRAINING:
        return State.DRAINING if end is End.CALLER else None
    return state if word in (BY_WORKER if end is End.CALLER else BY_CALLER) else None


class Ear(Receiver):
    """Notes what it is told: the kind, and each item of a list."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.heard]

    def all(self, kind: str) -> list[Any]:
        return [what for k, what in self.heard if k == kind]

    def _note(self, kind: str, items: Iterable[Any]) -> None:
        self.heard.extend((kind, item) for item in items)

    def on_greeting(self, frame: Frame) -> None:
        self.heard.append(("greeting", frame))

    def on_frame(self) -> None:
        self.heard.append(("frame", None))

    def on_tasks(self, tasks: Iterable[link_pb2.Task]) -> None:
        self._note("task", tasks)

    def on_cancellations(self, task_ids: Iterable[int]) -> None:
        self._note("cancellation", task_ids)

    def on_credits(self, allowances: Iterable[link_pb2.Credit]) -> None:
        self._note("credit", allowances)

    def on_parts(self, parts: Iterable[link_pb2.Part]) -> None:
        self._note("part", parts)

    def on_outcomes(self, outcomes: Iterable[link_pb2.TaskOutcome]) -> None:
        self._note("outcome", outcomes)

    def on_draining(self, draining: bool) -> None:  # noqa: FBT001 - as the field is
        self.heard.append(("draining", draining))

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:
        self.heard.append(("goodbye", goodbye))

    def on_broken(self, broken: link_pb2.Broken) -> None:
        self.heard.append(("broken", broken))


HEARD_AS: Final = {
    Said.TASKS: "task",
    Said.CANCELLATIONS: "cancellation",
    Said.CREDITS: "credit",
    Said.PARTS: "part",
    Said.OUTCOMES: "outcome",
    Said.DRAINING: "draining",
    Said.GOODBYE: "goodbye",
    Said.BROKEN: "broken",
}


def link_in(state: State, end: End = End.CALLER, greeting: Said = Said.HELLO) -> tuple[Link, Ear]:
    """An end that has heard what leads to *state*."""
    ear = Ear()
    link = Link(end, greeting, ear)
    if state is not State.SILENT:
        link.hear(GREETINGS[greeting])
    if state is State.DRAINING:
        if end is End.CALLER:
            link.hear(FRAMES[Said.DRAINING])
        else:
            link.state = State.DRAINING  # callers cannot lead there
    if state is State.GONE:
        link.hear(FRAMES[Said.GOODBYE])
    ear.heard.clear()
    return link, ear


def frames_of(link: Link) -> list[Frame]:
    """All that waits."""
    frames = []
    while (frame := link.take()) is not None:
        frames.append(frame)
    return frames


def pair() -> tuple[Link, Ear, Link, Ear]:
    """A caller's end and a worker's end, both greeted."""
    caller, caller_ear = link_in(State.OPEN, End.CALLER, Said.HELLO)
    worker, worker_ear = link_in(State.OPEN, End.WORKER, Said.WELCOME)
    return caller, caller_ear, worker, worker_ear


class TestTransitions:
    @pytest.mark.parametrize("end", End)
    @pytest.mark.parametrize("greeting", GREETINGS)
    @pytest.mark.parametrize("state", State)
    @pytest.mark.parametrize("word", Said)
    def test_are_this_table(self, end: End, greeting: Said, state: State, word: Said) -> None:
        link, ear = link_in(state, end, greeting)
        leads_to = expected(end, greeting, state, word)
        assert TRANSITIONS[end, greeting].get((state, word)) == leads_to
        if leads_to is None:
            with pytest.raises(InvalidRequest):
                link.hear(FRAMES[word])
            assert link.state is state
            assert not [kind for kind in ear.kinds() if kind != "frame"]
        else:
            link.hear(FRAMES[word])
            assert link.state is leads_to
            kinds = ["greeting"] if state is State.SILENT else ["frame", HEARD_AS[word]]
            assert ear.kinds() == kinds

    def test_errors_name_what_was_said_and_when(self) -> None:
        for state, when in (
            (State.SILENT, "before its greeting"),
            (State.OPEN, "on its end of a link, or twice"),
            (State.GONE, "after its goodbye"),
        ):
            link, _ = link_in(state)
            with pytest.raises(InvalidRequest, match=f"may not say tasks {when}"):
                link.hear(FRAMES[Said.TASKS])

    @pytest.mark.parametrize("word", [None, *Said])
    def test_greeting_comes_alone(self, word: Said | None) -> None:
        link, _ = link_in(State.SILENT)
        frame = Frame() if word is None else Frame(hello=link_pb2.Hello())
        if word is not None:
            if word is Said.HELLO:
                return
            frame.MergeFrom(FRAMES[word])
        with pytest.raises(InvalidRequest, match="a greeting and nothing else"):
            link.hear(frame)
        assert link.state is State.SILENT

    def test_empty_frame_is_a_sign_of_life(self) -> None:
        link, ear = link_in(State.OPEN)
        link.hear(Frame())
        assert ear.heard == [("frame", None)]

    def test_kinds_of_a_frame_come_in_the_order_of_their_numbers(self) -> None:
        link, ear = link_in(State.OPEN, End.CALLER)
        frame = Frame()
        for word in (Said.GOODBYE, Said.DRAINING, Said.OUTCOMES, Said.PARTS):
            frame.MergeFrom(FRAMES[word])
        link.hear(frame)
        assert ear.kinds() == ["frame", "part", "outcome", "draining", "goodbye"]
        assert link.state is State.GONE

    def test_draining_may_be_said_again_and_answers_go_on(self) -> None:
        link, ear = link_in(State.DRAINING, End.CALLER)
        for word in (Said.DRAINING, Said.OUTCOMES, Said.PARTS):
            link.hear(FRAMES[word])
        assert link.state is State.DRAINING
        assert ear.kinds() == ["frame", "draining", "frame", "outcome", "frame", "part"]

    @pytest.mark.parametrize("more", [0, 1])
    def test_lists_of_a_frame_have_so_many_items_together(self, more: int) -> None:
        """Else one frame could hold up the receiver's loop for as long as its sender likes."""
        link, ear = link_in(State.OPEN, End.WORKER)
        half = MAX_FRAME_ITEMS // 2
        frame = Frame(
            tasks=[link_pb2.Task()] * half, cancelled_task_ids=[1] * (MAX_FRAME_ITEMS - half - 1 + more)
        )
        frame.credits.add()
        if more:
            with pytest.raises(InvalidRequest, match="4096 items"):
                link.hear(frame)
        else:
            link.hear(frame)
            assert len(ear.heard) == MAX_FRAME_ITEMS + 1

    def test_what_is_newer_than_this_program_is_passed_over(self) -> None:
        link, ear = link_in(State.OPEN)
        unknown = Frame.FromString(b"\xfa\x07\x03abc" + FRAMES[Said.PARTS].SerializeToString())
        link.hear(unknown)
        assert ear.kinds() == ["frame", "part"]

    @given(st.sampled_from(End), st.lists(st.sampled_from([None, *Said]), max_size=12))
    def test_any_sequence_is_heard_as_far_as_it_is_allowed(self, end: End, words: list[Said | None]) -> None:
        link, _ = link_in(State.SILENT, end)
        state = State.SILENT
        for word in words:
            leads_to: State | None
            if word is None:
                leads_to = None if state is State.SILENT else state
            else:
                leads_to = expected(end, Said.HELLO, state, word)
            if leads_to is None:
                with pytest.raises(InvalidRequest):
                    link.hear(Frame() if word is None else FRAMES[word])
            else:
                link.hear(Frame() if word is None else FRAMES[word])
                state = leads_to
            assert link.state is state


class TestSaying:
    def test_nothing_is_nothing_to_take(self) -> None:
        link, _ = link_in(State.OPEN)
        assert link.take() is None
        assert link.backlog_bytes == 0

    def test_what_gathers_goes_in_one_frame(self) -> None:
        link, _ = link_in(State.OPEN)
        link.give(1, b"work", 5, part_credit=7)
        link.give(2, b"more", 6)
        link.cancel(1)
        link.allow(2, 2**64 - 1)
        [frame] = frames_of(link)
        assert frame == Frame(
            tasks=[
                link_pb2.Task(id=1, work=b"work", timeout_ms=5, part_credit=7),
                link_pb2.Task(id=2, work=b"more", timeout_ms=6),
            ],
            cancelled_task_ids=[1],
            credits=[link_pb2.Credit(task_id=2, bytes=2**64 - 1)],
        )
        assert link.backlog_bytes == 0

    def test_asks_with_all_that_a_control_plane_needs_to_know(self) -> None:
        link, _ = link_in(State.OPEN)
        link.ask(1, b"w", 5, "a")
        link.ask(
            2,
            b"w",
            5,
            "a",
            wait_for_agent_ms=1,
            idempotent=True,
            allow_unverified=True,
            part_credit=2,
        )
        [frame] = frames_of(link)
        assert list(frame.tasks) == [
            link_pb2.Task(id=1, work=b"w", timeout_ms=5, target="a"),
            link_pb2.Task(
                id=2,
                work=b"w",
                timeout_ms=5,
                target="a",
                wait_for_agent_ms=1,
                idempotent=True,
                allow_unverified=True,
                part_credit=2,
            ),
        ]

    @pytest.mark.parametrize(
        "answer", [b"value", b"", Failure(OutcomeCode.HANDLER_FAILED, "m", "T"), Complete(0), Complete(3)]
    )
    def test_answer_is_read_as_it_was_given(self, answer: bytes | Failure | Complete) -> None:
        link, _ = link_in(State.OPEN, End.WORKER)
        link.answer(7, answer, "agent-1", 2)
        [frame] = frames_of(link)
        [outcome] = frame.outcomes
        assert (outcome.task_id, outcome.agent_id, outcome.attempts) == (7, "agent-1", 2)
        assert answer_of(outcome) == answer

    def test_answer_without_any_is_invalid(self) -> None:
        failure = answer_of(link_pb2.TaskOutcome(task_id=1))
        assert isinstance(failure, Failure)
        assert failure.code is OutcomeCode.INVALID_RESULT

    def test_greeting_goes_first_whatever_was_said_before(self) -> None:
        link, _ = link_in(State.SILENT, End.WORKER, Said.WELCOME)
        link.answer(1, b"x" * MAX_FRAME_BYTES)
        link.answer(2, b"y")
        link.greet(GREETINGS[Said.HELLO])
        first, *others = frames_of(link)
        assert first == GREETINGS[Said.HELLO]
        assert [o.task_id for frame in others for o in frame.outcomes] == [1, 2]
        assert link.backlog_bytes == 0

    def test_beat_is_an_empty_frame(self) -> None:
        link, _ = link_in(State.OPEN)
        link.beat()
        assert frames_of(link) == [Frame()]
        assert link.backlog_bytes == 0

    def test_taker_is_called_once_until_it_has_found_nothing(self) -> None:
        link, _ = link_in(State.OPEN)
        calls: list[int] = []
        link.on_filled = lambda: calls.append(1)
        link.cancel(1)
        link.cancel(2)
        assert len(calls) == 1
        assert link.take() is not None
        link.cancel(3)
        assert len(calls) == 1, "it has not found the link empty yet"
        frames_of(link)
        link.cancel(4)
        assert len(calls) == 2

    @pytest.mark.parametrize("close", [Link.close, lambda link: link.say_goodbye(1, "bye")])
    def test_nothing_follows_the_end(self, close: Callable[[Link], None]) -> None:
        link, _ = link_in(State.OPEN)
        link.cancel(1)
        close(link)
        assert link.is_closed
        before = link.backlog_bytes
        link.give(2, b"w", 1)
        link.ask(2, b"w", 1, "a")
        link.cancel(2)
        link.allow(2, 1)
        link.answer(2, b"v")
        link.answer(2, Complete(1))
        link.send_part(2, b"v")
        link.drain()
        link.beat()
        link.say_goodbye(link_pb2.GOODBYE_REASON_SUPERSEDED, "again")
        link.repeat([link_pb2.TaskOutcome(task_id=2)])
        assert link.backlog_bytes == before
        [frame] = frames_of(link)
        assert list(frame.cancelled_task_ids) == [1]
        assert frame.goodbye.message in ("", "bye")
        assert {field.name for field, _ in frame.ListFields()} <= {"cancelled_task_ids", "goodbye"}
        assert link.backlog_bytes == 0

    def test_what_nobody_took_can_be_said_elsewhere(self) -> None:
        link, _ = link_in(State.OPEN, End.WORKER)
        answers: list[bytes | Failure | Complete] = [
            b"taken",
            b"x" * MAX_FRAME_BYTES,
            Failure(OutcomeCode.CANCELLED, "c"),
            Complete(2),
        ]
        link.answer(0, answers[0])
        assert link.take() is not None
        for number, answer in enumerate(answers[1:], start=1):
            link.answer(number, answer)
        link.send_part(9, b"of no use without the others")
        link.close()
        unsent = link.unsent()
        assert [o.task_id for o in unsent] == [1, 2, 3]
        other, _ = link_in(State.SILENT, End.WORKER)
        other.repeat(unsent)
        said = [o for frame in frames_of(other) for o in frame.outcomes]
        assert [answer_of(o) for o in said] == answers[1:]
        assert other.backlog_bytes == 0
        assert other.unsent() == []


LONGEST_ID: Final = "anonymous/" + "a" * 63


class TestFrames:
    def test_hold_so_many_items(self) -> None:
        link, _ = link_in(State.OPEN)
        for number in range(2 * MAX_FRAME_ITEMS + 1):
            link.cancel(number)
        assert [len(f.cancelled_task_ids) for f in frames_of(link)] == [MAX_FRAME_ITEMS, MAX_FRAME_ITEMS, 1]

    def test_hold_so_many_bytes_or_one_item(self) -> None:
        link, _ = link_in(State.OPEN)
        for number, size in enumerate(
            (10, MAX_FRAME_BYTES * 3, 10, 10, MAX_FRAME_BYTES - ITEM_OVERHEAD_BYTES)
        ):
            link.give(number, b"x" * size, 1)
        assert [[t.id for t in f.tasks] for f in frames_of(link)] == [[0], [1], [2, 3], [4]]

    @given(
        st.lists(
            st.tuples(
                st.sampled_from(["give", "ask", "cancel", "allow", "answer", "failure", "parts", "part"]),
                st.integers(0, MAX_FRAME_BYTES // 3),
                st.sampled_from([0, 2**64 - 1]),
            ),
            max_size=25,
        )
    )
    def test_are_never_larger_than_they_are_reckoned(self, said: list[tuple[str, int, int]]) -> None:
        """gRPC refuses a message above its limit, and the link with it."""
        link, _ = link_in(State.OPEN)
        for kind, size, number in said:
            say(link, kind, size, number)
        backlog = link.backlog_bytes
        frames = frames_of(link)
        assert all(frame.ByteSize() <= MAX_FRAME_BYTES for frame in frames)
        assert sum(frame.ByteSize() for frame in frames) <= backlog
        assert link.backlog_bytes == 0

    def test_of_the_smallest_answers_fit_too(self) -> None:
        link, _ = link_in(State.OPEN, End.WORKER)
        for _ in range(3 * MAX_FRAME_ITEMS):
            link.answer(2**64 - 1, b"x" * 130, LONGEST_ID, 2**32 - 1)
            link.send_part(2**64 - 1, b"x" * 130, LONGEST_ID)
        assert all(frame.ByteSize() <= MAX_FRAME_BYTES for frame in frames_of(link))


def say(link: Link, kind: str, size: int, number: int) -> None:
    """Say one thing of a kind, about *size* bytes large."""
    match kind:
        case "give":
            link.give(number, b"x" * size, number, number)
        case "ask":
            link.ask(
                number,
                b"x" * size,
                number,
                LONGEST_ID,
                wait_for_agent_ms=number,
                idempotent=True,
                allow_unverified=True,
                part_credit=number,
            )
        case "cancel":
            link.cancel(number)
        case "allow":
            link.allow(number, number)
        case "answer":
            link.answer(number, b"x" * size, LONGEST_ID, 2**32 - 1)
        case "failure":
            link.answer(number, Failure(OutcomeCode.HANDLER_FAILED, "ä" * (size % 2048), "T"), LONGEST_ID, 1)
        case "parts":
            link.answer(number, Complete(2**32 - 1), LONGEST_ID, 1)
        case "part":
            link.send_part(number, b"x" * size, LONGEST_ID)


sizes = st.one_of(st.integers(0, 50), st.integers(MAX_FRAME_BYTES // 4, MAX_FRAME_BYTES + 10))
callers_say = st.sampled_from(["task", "cancellation", "credit"])
workers_say = st.sampled_from(["part", "outcome", "draining"])


class TestArrival:
    @given(st.lists(st.tuples(callers_say, sizes, st.booleans()), max_size=30))
    def test_of_what_a_caller_says(self, said: list[tuple[str, int, bool]]) -> None:
        caller, _, worker, ear = pair()
        expected: defaultdict[str, list[Any]] = defaultdict(list)
        for number, (kind, size, carry) in enumerate(said):
            match kind:
                case "task":
                    caller.give(number, b"x" * size, 1)
                    expected[kind].append((number, size))
                case "cancellation":
                    caller.cancel(number)
                    expected[kind].append(number)
                case "credit":
                    caller.allow(number, size)
                    expected[kind].append((number, size))
            if carry:
                carry_one(caller, worker)
        carry_all(caller, worker)
        assert [(t.id, len(t.work)) for t in ear.all("task")] == expected["task"]
        assert ear.all("cancellation") == expected["cancellation"]
        assert [(c.task_id, c.bytes) for c in ear.all("credit")] == expected["credit"]
        assert caller.backlog_bytes == 0

    @given(st.lists(st.tuples(workers_say, st.integers(0, 3), sizes, st.booleans()), max_size=30))
    def test_of_what_a_worker_says_parts_before_the_outcome(
        self, said: list[tuple[str, int, int, bool]]
    ) -> None:
        caller, ear, worker, _ = pair()
        expected: list[tuple[str, int, int]] = []
        ended: set[int] = set()
        for kind, task_id, size, carry in said:
            if task_id in ended:
                continue
            match kind:
                case "part":
                    worker.send_part(task_id, b"x" * size)
                    expected.append((kind, task_id, size))
                case "outcome":
                    worker.answer(task_id, b"x" * size)
                    expected.append((kind, task_id, size))
                    ended.add(task_id)
                case "draining":
                    worker.drain()
            if carry:
                carry_one(worker, caller)
        carry_all(worker, caller)
        arrived = [(kind, w.task_id, len(w.value)) for kind, w in ear.heard if kind in ("part", "outcome")]
        for task_id in range(4):  # each task's in the order they were said
            assert [a for a in arrived if a[1] == task_id] == [e for e in expected if e[1] == task_id]
        for kind in ("part", "outcome"):
            assert [a for a in arrived if a[0] == kind] == [e for e in expected if e[0] == kind]
        assert worker.backlog_bytes == 0


def carry_one(one: Link, other: Link) -> None:
    frame = one.take()
    if frame is not None:
        other.hear(Frame.FromString(frame.SerializeToString()))


def carry_all(one: Link, other: Link) -> None:
    for frame in frames_of(one):
        other.hear(Frame.FromString(frame.SerializeToString()))
