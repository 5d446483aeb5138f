"""A client's link as the control plane hears it: what each task becomes, and what a bad one costs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from parallax.control_plane import caller_link
from parallax.control_plane.caller_link import LONGEST_S, CallerLink
from parallax.control_plane.order import MAX_PART_CREDIT
from parallax.protos import link_pb2
from parallax.runtime.link import MAX_BACKLOG_BYTES, answer_of
from parallax.runtime.outcome import Complete, Failure, OutcomeCode, Payload, Value
from parallax.runtime.protocol import hello
from parallax.runtime.wire import encode_value, encode_work
from parallax.security.errors import InvalidRequest, InvalidTransition, NotAuthorized, Unavailable
from tests.control_plane.conftest import Cancellation, grant_of

if TYPE_CHECKING:
    from tests.control_plane.conftest import World

Frame = link_pb2.LinkFrame
DONE = encode_value(Value(Payload(b"done"), 1.0))
LIMIT = 1000
MOST = 2**64 - 1


class Client:
    """A link with the client's mouth and ears."""

    def __init__(self, world: World, key: str = "client") -> None:
        self.world = world
        self.caller = CallerLink(world.dispatcher, grant_of(key, world.authorization), LIMIT)
        self.outcomes: dict[int, link_pb2.TaskOutcome] = {}
        self.parts: list[tuple[int, bytes]] = []
        self.welcome: link_pb2.Welcome | None = None

    def say(self, frame: Frame) -> None:
        self.caller.link.hear(frame)

    def greet(self) -> Client:
        self.say(Frame(hello=hello()))
        self.read()
        return self

    def ask(self, number: int, target: str = "a", timeout_ms: int = 60_000, **options: Any) -> None:
        work = options.pop("work", encode_work("task", Payload()))
        task = link_pb2.Task(id=number, work=work, timeout_ms=timeout_ms, target=target, **options)
        self.say(Frame(tasks=[task]))

    def cancel(self, *numbers: int) -> None:
        self.say(Frame(cancelled_task_ids=numbers))

    def read(self) -> list[int]:
        """The tasks that have ended since it was last asked."""
        ended = []
        while (frame := self.caller.link.take()) is not None:
            if frame.HasField("welcome"):
                self.welcome = frame.welcome
            self.parts.extend((part.task_id, part.value) for part in frame.parts)
            for outcome in frame.outcomes:
                assert outcome.task_id not in self.outcomes, "answered twice"
                self.outcomes[outcome.task_id] = outcome
                ended.append(outcome.task_id)
        return ended

    def code(self, number: int) -> OutcomeCode | None:
        """How a task failed; None with a value."""
        answer = answer_of(self.outcomes[number])
        return answer.code if isinstance(answer, Failure) else None


@pytest.fixture
def client(world: World) -> Client:
    return Client(world).greet()


class TestGreeting:
    def test_is_answered_with_what_a_client_needs_to_know(self, client: Client) -> None:
        assert client.welcome == link_pb2.Welcome(
            protocol_version=1,
            max_payload_bytes=LIMIT,
            max_open_tasks=caller_link.MAX_OPEN_TASKS,
        )

    def test_of_another_protocol_is_refused(self, world: World) -> None:
        with pytest.raises(InvalidTransition, match="no common protocol version"):
            Client(world).say(Frame(hello=link_pb2.Hello(protocol_version=99, min_protocol_version=98)))


class TestTask:
    def test_is_answered_with_who_had_it(self, world: World, client: Client) -> None:
        session = world.join("a")
        client.ask(7)
        world.dispatcher.settle(session.instance, world.task(session), DONE)
        assert client.read() == [7]
        assert client.outcomes[7] == link_pb2.TaskOutcome(task_id=7, value=DONE, agent_id="a", attempts=1)
        assert client.caller.link.backlog_bytes == 0

    def test_passes_its_work_on_undecoded(self, world: World, client: Client) -> None:
        session = world.join("a")
        client.ask(1, work=b"\xff not a Work")
        frame = session.link.take()
        assert frame is not None
        assert frame.tasks[0].work == b"\xff not a Work"

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ({"target": ""}, OutcomeCode.INVALID_ARGUMENT),
            ({"target": "capability:"}, OutcomeCode.INVALID_ARGUMENT),
            ({"target": "a" * 100_000}, OutcomeCode.INVALID_ARGUMENT),
            ({"target": "nobody"}, OutcomeCode.NO_AGENT),
            ({"work": b"x" * (LIMIT + 3_000)}, OutcomeCode.INVALID_ARGUMENT),
            ({"timeout_ms": 0}, OutcomeCode.DEADLINE_EXCEEDED),
        ],
    )
    def test_that_cannot_be_done_costs_no_other(
        self, world: World, client: Client, options: dict[str, Any], code: OutcomeCode
    ) -> None:
        session = world.join("a")
        client.ask(1)
        client.ask(2, **options)
        assert client.read() == [2]
        assert client.code(2) is code
        assert client.outcomes[2].ByteSize() < 500, "hostile input does not fill the message"
        world.dispatcher.settle(session.instance, world.task(session), DONE)
        assert client.read() == [1]

    def test_ends_no_later_than_a_day(self, world: World, client: Client) -> None:
        world.join("a")
        client.ask(1, timeout_ms=MOST, wait_for_agent_ms=MOST, part_credit=MOST)
        order = client.caller._open[1]
        assert (order.timeout_s, order.wait_s, order.part_credit) == (LONGEST_S, LONGEST_S, MAX_PART_CREDIT)
        world.advance(LONGEST_S)
        assert client.read() == [1]
        assert client.code(1) is OutcomeCode.DEADLINE_EXCEEDED

    def test_of_the_highest_number_is_like_any_other(self, world: World, client: Client) -> None:
        session = world.join("a")
        client.ask(MOST)
        world.dispatcher.settle(session.instance, world.task(session), DONE)
        assert client.read() == [MOST]

    def test_of_a_number_that_is_open_breaks_the_protocol(self, world: World, client: Client) -> None:
        world.join("a")
        client.ask(1)
        with pytest.raises(InvalidRequest, match="task 1 is still open"):
            client.ask(1)

    def test_of_a_number_that_has_ended_is_answered_for_itself(self, world: World, client: Client) -> None:
        """A sender should not, but it harms nobody else."""
        session = world.join("a")
        client.ask(1)
        world.dispatcher.settle(session.instance, world.task(session), DONE)
        assert client.read() == [1]
        client.outcomes.clear()
        client.ask(1)
        client.cancel(1)
        client.ask(1)
        _, task_id = world.tasks(session)
        world.dispatcher.settle(session.instance, task_id, DONE)
        assert client.read() == [1]

    def test_beyond_what_may_be_open_is_refused(
        self, world: World, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(caller_link, "MAX_OPEN_TASKS", 3)
        session = world.join("a", max_concurrency=9)
        for number in range(5):
            client.ask(number)
        assert client.read() == [3, 4]
        assert {client.code(3), client.code(4)} == {OutcomeCode.OVERLOADED}
        world.dispatcher.settle(session.instance, world.tasks(session)[0], DONE)
        client.ask(9)
        assert client.read() == [0]

    def test_is_refused_while_the_control_plane_drains(self, world: World, client: Client) -> None:
        world.join("a")
        world.dispatcher._is_draining = True
        client.ask(1)
        assert client.read() == [1]
        assert client.code(1) is OutcomeCode.OVERLOADED
        assert not client.caller._open

    def test_without_a_greeting_breaks_the_protocol(self, world: World) -> None:
        with pytest.raises(InvalidRequest, match="before its greeting"):
            Client(world).ask(1)


class TestCancellation:
    def test_reaches_the_agent_and_is_not_answered(self, world: World, client: Client) -> None:
        session = world.join("a")
        client.ask(1)
        task_id = world.task(session)
        client.cancel(1, 1, 2)
        client.cancel(1)
        assert world.heard(session) == [Cancellation(task_id)]
        world.dispatcher.settle(session.instance, task_id, DONE)
        assert client.read() == []

    def test_of_several_at_once_begins_none_of_them(self, world: World, client: Client) -> None:
        session = world.join("a")
        for number in range(3):
            client.ask(number)
        task_id = world.task(session)
        client.cancel(0, 1, 2)
        assert world.heard(session) == [Cancellation(task_id)]

    def test_after_the_answer_has_no_effect(self, world: World, client: Client) -> None:
        session = world.join("a")
        client.ask(1)
        world.dispatcher.settle(session.instance, world.task(session), DONE)
        client.cancel(1)
        assert client.read() == [1]
        assert world.heard(session) == []

    def test_of_all_when_the_client_leaves(self, world: World, client: Client) -> None:
        session = world.join("a")
        for number in range(3):
            client.ask(number)
        client.ask(3, "nobody", wait_for_agent_ms=10_000)
        task_id = world.task(session)
        client.caller.over()
        client.caller.over()
        assert world.heard(session) == [Cancellation(task_id)]
        assert not client.caller._open
        assert not world.dispatcher._deadlines
        assert client.read() == []

    def test_of_one_client_leaves_the_tasks_of_the_other(self, world: World, client: Client) -> None:
        session, other = world.join("a", max_concurrency=2), Client(world, "other").greet()
        client.ask(1)
        other.ask(1)
        _, task_id = world.tasks(session)
        client.caller.over()
        world.dispatcher.settle(session.instance, task_id, DONE)
        assert other.read() == [1]


class TestParts:
    def test_pass_and_credit_goes_back(self, world: World, client: Client) -> None:
        session = world.join("a")
        client.ask(1, part_credit=3)
        task_id = world.task(session)
        world.dispatcher.part(session.instance, task_id, b"one")
        client.say(Frame(credits=[link_pb2.Credit(task_id=1, bytes=3), link_pb2.Credit(task_id=2, bytes=3)]))
        frame = session.link.take()
        assert frame is not None
        assert list(frame.credits) == [link_pb2.Credit(task_id=task_id, bytes=3)]
        world.dispatcher.part(session.instance, task_id, b"two")
        world.dispatcher.settle(session.instance, task_id, Complete(2))
        assert client.read() == [1]
        assert client.parts == [(1, b"one"), (1, b"two")]
        assert answer_of(client.outcomes[1]) == Complete(2)

    def test_for_a_client_that_does_not_read_end_the_task(self, world: World, client: Client) -> None:
        session = world.join("a", max_concurrency=9)
        size = 4 * 1024 * 1024
        for number in range(9):
            client.ask(number, part_credit=MOST)
        for task_id in world.tasks(session):
            for _ in range(2):
                world.dispatcher.part(session.instance, task_id, b"x" * size)
            world.dispatcher.part(session.instance, task_id, b"x")
        client.read()
        assert {client.code(number) for number in client.outcomes} <= {
            OutcomeCode.OVERLOADED,
            OutcomeCode.INVALID_RESULT,
        }
        assert OutcomeCode.OVERLOADED in map(client.code, client.outcomes)


class TestClientThatDoesNotRead:
    def test_has_its_answers_dropped_and_its_tasks_refused(self, world: World, client: Client) -> None:
        session = world.join("a")
        client.ask(0)
        client.ask(1)
        client.caller.link.backlog_bytes = MAX_BACKLOG_BYTES + 1
        world.dispatcher.settle(session.instance, world.task(session), DONE)
        client.ask(2)
        assert len(world.tasks(session)) == 1, "of those it asked for before"
        assert client.read() == [0, 2]
        assert {client.code(0), client.code(2)} == {OutcomeCode.OVERLOADED}

    def test_and_goes_on_asking_is_left(self, world: World, client: Client) -> None:
        """Each refusal takes room, too."""
        client.caller.link.backlog_bytes = 2 * MAX_BACKLOG_BYTES + 1
        with pytest.raises(Unavailable, match="wait to be read"):
            client.ask(1)
        assert len(world.results) == 0


def test_a_task_for_whom_the_client_may_not_ask_is_refused_and_the_next_is_not(world: World) -> None:
    refused: list[NotAuthorized] = []
    world.let(client="a")
    client = Client(world)
    client.caller._on_refusal = refused.append
    client.greet()
    session = world.join("a")
    client.ask(1, "b")
    client.ask(2, "a")
    assert client.read() == [1]
    assert client.outcomes[1].failure.error_type == "NotAuthorized"
    assert len(refused) == 1
    world.answer(session, world.task(session))
    assert client.read() == [2]
