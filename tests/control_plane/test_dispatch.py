"""Who is given a task, whose answer counts, and how an order ends when its agent does not answer."""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.control_plane.dispatch import MAX_ATTEMPTS, MAX_QUEUED_BYTES, NOT_AN_AGENTS_TO_SAY
from parallax.control_plane.order import (
    MAX_PART_CREDIT,
    Answer,
    Capability,
    Order,
    Place,
    Target,
    parse_target,
)
from parallax.control_plane.registry import AgentRef
from parallax.control_plane.selection import LeastLoaded
from parallax.control_plane.sessions import Instance, Session
from parallax.control_plane.waiter import Result
from parallax.runtime.description import AgentDescription
from parallax.runtime.link import MAX_BACKLOG_BYTES, End, Link, Receiver, Said
from parallax.runtime.outcome import Complete, Failure, Outcome, OutcomeCode, Payload, Value
from parallax.runtime.wire import encode_value, encode_work
from parallax.security.errors import (
    IdentityError,
    InvalidRequest,
    NotAuthorized,
    ParallaxError,
    Revoked,
    Unavailable,
)
from tests.control_plane.conftest import Assignment, Cancellation

if TYPE_CHECKING:
    from tests.control_plane.conftest import MakeWorld, World

Running = asyncio.Task[Result]

QUEUE_LIMIT = 2  # of the fixture `world`
DONE = Value(Payload(b"done"), 1.0)
WITHDRAWN = Revoked("agent/a is revoked")


def code(outcome: Outcome) -> OutcomeCode | None:
    """The code of a failure; None for a value."""
    return outcome.code if isinstance(outcome, Failure) else None


def code_of(order: Running) -> OutcomeCode | None:
    return code(order.result().outcome)


def message_of(order: Running) -> str:
    outcome = order.result().outcome
    assert isinstance(outcome, Failure)
    return outcome.message


def assert_nothing_left(world: World) -> None:
    """No order, task, index or waiter is remembered any more."""
    dispatcher = world.dispatcher
    assert len(dispatcher) == 0
    for left in (dispatcher._given, dispatcher._waiting, dispatcher._index, dispatcher._indexed):
        assert not left
    assert not dispatcher._instances
    assert not dispatcher._moved
    assert not dispatcher._clogged
    assert not dispatcher._deadlines
    assert dispatcher._waiting_bytes == 0
    assert dispatcher._idle.is_set()


class TestTarget:
    @pytest.mark.parametrize(
        ("text", "target"),
        [
            ("agent-1", AgentRef("agent-1")),
            ("anonymous/agent-1", AgentRef("agent-1", verified=False)),
            ("capability:sentiment", Capability("sentiment")),
            ("capability", AgentRef("capability")),
        ],
    )
    def test_has_one_spelling(self, text: str, target: Target) -> None:
        assert parse_target(text) == target
        assert str(target) == text

    @pytest.mark.parametrize(
        ("text", "error"),
        [
            ("", IdentityError),
            ("capability:", InvalidRequest),
            ("capability:Sentiment", InvalidRequest),
            ("capability:a:b", InvalidRequest),
            ("capability:" + "a" * 64, InvalidRequest),
            ("Capability:a", IdentityError),
            ("skill:a", IdentityError),
            ("agent/agent-1", IdentityError),
            ("a\x00", IdentityError),
            ("a" * 300, IdentityError),
        ],
    )
    def test_anything_else_is_refused(self, text: str, error: type[ParallaxError]) -> None:
        with pytest.raises(error) as caught:
            parse_target(text)
        assert len(str(caught.value)) < 250, "hostile input does not fill the message"


class TestAnswer:
    def test_value_reaches_the_caller(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", timeout=60, data=b"in")
        [assignment] = world.heard(session)
        assert isinstance(assignment, Assignment)
        assert (assignment.name, assignment.payload) == ("task", Payload(b"in"))
        assert assignment.timeout == timedelta(seconds=60)
        world.answer(session, assignment.task_id, Value(Payload(b"out"), 0.0))
        assert order.result() == Result(Value(Payload(b"out"), 0.0), AgentRef("a"), 1)
        assert world.heard(session) == [], "an answered task needs no cancellation"
        assert_nothing_left_but_agents(world)

    def test_failure_reaches_the_caller(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a")
        failure = Failure(OutcomeCode.HANDLER_FAILED, "no", error_type="ValueError")
        world.answer(session, world.task(session), failure)
        assert order.result() == Result(failure, AgentRef("a"), 1)

    def test_of_another_agent_is_refused_and_has_no_effect(self, world: World) -> None:
        session, other = world.join("a"), world.join("b")
        order = world.order("a")
        [task_id] = world.tasks(session)
        with pytest.raises(NotAuthorized, match="b answered a task of another agent"):
            world.answer(other, task_id)
        world.spin()
        assert not order.done()
        world.answer(session, task_id)
        assert code_of(order) is None

    def test_of_the_unverified_agent_of_the_same_name_is_refused(self, world: World) -> None:
        session, stranger = world.join("a"), world.join("anonymous/a")
        world.order("a")
        with pytest.raises(NotAuthorized):
            world.answer(stranger, world.task(session))

    def test_of_another_instance_of_the_agent_is_dropped(self, world: World) -> None:
        old = world.join("a", instance="first")
        lost = world.order("a")
        [old_id] = world.tasks(old)
        new = world.join("a", instance="second")
        order = world.order("a")
        [task_id] = world.tasks(new)
        world.answer(old, task_id)
        world.answer(old, old_id)
        assert not order.done()
        assert code_of(lost) is OutcomeCode.AGENT_LOST

    def test_to_nothing_is_dropped(self, world: World) -> None:
        world.answer(world.join("a"), 12345)
        assert world.results == []

    def test_second_one_is_dropped(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a")
        [task_id] = world.tasks(session)
        world.dispatcher.settle(session.instance, task_id, encode_value(DONE))
        world.dispatcher.settle(session.instance, task_id, encode_value(Value(Payload(b"again"), 1.0)))
        world.spin()
        world.answer(session, task_id, Value(Payload(b"and again"), 1.0))
        assert order.result().outcome == DONE

    @pytest.mark.parametrize("said", sorted(NOT_AN_AGENTS_TO_SAY))
    def test_cannot_be_a_code_that_only_the_control_plane_knows(
        self, world: World, said: OutcomeCode
    ) -> None:
        """An agent must not have a task tried elsewhere, or claim that it never ran, by saying so."""
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo", idempotent=True)
        world.answer(session, world.task(session), Failure(said, "lie"))
        assert code_of(order) is OutcomeCode.INVALID_RESULT
        assert said in message_of(order)
        assert world.tasks(other) == []

    @pytest.mark.parametrize("said", sorted(set(OutcomeCode) - NOT_AN_AGENTS_TO_SAY))
    def test_any_other_code_is_the_agents_to_say(self, world: World, said: OutcomeCode) -> None:
        session = world.join("a")
        order = world.order("a")
        world.answer(session, world.task(session), Failure(said, "so"))
        assert code_of(order) is said


class TestNobody:
    def test_unknown_agent_fails_at_once(self, world: World) -> None:
        order = world.order("a")
        assert order.result() == Result(order.result().outcome, None, 0)
        assert code_of(order) is OutcomeCode.NO_AGENT
        assert "'a' is connected; `parallax agents list` shows who is" in message_of(order)

    def test_capability_of_nobody_fails_at_once(self, world: World) -> None:
        world.join("a", "other")
        order = world.order("capability:echo")
        assert code_of(order) is OutcomeCode.NO_AGENT
        assert "capability 'echo'" in message_of(order)

    def test_registered_agent_without_a_session_is_nobody(self, world: World) -> None:
        world.leave(world.join("a"))
        assert code_of(world.order("a")) is OutcomeCode.NO_AGENT


class TestUnverified:
    """An agent that no certificate vouches for is never picked unless asked for."""

    @pytest.mark.parametrize("target", ["a", "capability:echo"])
    def test_is_not_picked_and_the_text_says_why(self, world: World, target: str) -> None:
        session = world.join("anonymous/a", "echo")
        order = world.order(target)
        assert code_of(order) is OutcomeCode.NO_AGENT
        assert "PARALLAX_TLS_VERIFY_CLIENT=true" in message_of(order)
        assert world.tasks(session) == []

    @pytest.mark.parametrize("target", ["a", "capability:echo"])
    def test_is_picked_where_allowed(self, world: World, target: str) -> None:
        session = world.join("anonymous/a", "echo")
        order = world.order(target, allow_unverified=True)
        world.answer(session, world.task(session))
        assert order.result() == Result(DONE, AgentRef("a", verified=False), 1)

    def test_is_picked_by_its_full_name(self, world: World) -> None:
        session = world.join("anonymous/a")
        world.order("anonymous/a")
        assert len(world.tasks(session)) == 1

    def test_is_never_a_verified_one_by_its_full_name(self, world: World) -> None:
        session = world.join("a")
        order = world.order("anonymous/a", allow_unverified=True)
        assert code_of(order) is OutcomeCode.NO_AGENT
        assert "PARALLAX_TLS_VERIFY_CLIENT" not in message_of(order)
        assert world.tasks(session) == []

    def test_does_not_replace_the_verified_one_of_its_name(self, world: World) -> None:
        verified, stranger = world.join("a"), world.join("anonymous/a")
        world.order("a", allow_unverified=True)
        assert (len(world.tasks(verified)), len(world.tasks(stranger))) == (1, 0)

    def test_is_preferred_where_allowed_and_less_loaded(self, world: World) -> None:
        verified = world.join("a", "echo", max_concurrency=1)
        stranger = world.join("anonymous/b", "echo", max_concurrency=2)
        world.order("capability:echo", allow_unverified=True)
        world.order("capability:echo")
        assert (len(world.tasks(verified)), len(world.tasks(stranger))) == (1, 1)

    @pytest.mark.parametrize("target", ["a", "capability:echo"])
    def test_does_not_end_the_wait_of_those_who_do_not_allow_it(self, world: World, target: str) -> None:
        order = world.order(target, wait=30)
        world.join("anonymous/a", "echo")
        assert not order.done()
        session = world.join("a", "echo")
        assert len(world.tasks(session)) == 1

    @pytest.mark.parametrize("target", ["a", "anonymous/a", "capability:echo"])
    def test_ends_the_wait_of_those_who_allow_it(self, world: World, target: str) -> None:
        world.order(target, wait=30, allow_unverified=True)
        assert len(world.tasks(world.join("anonymous/a", "echo"))) == 1


class TestCaller:
    """Whom a caller may ask decides the policy, at the moment of the choice."""

    def test_is_served_by_whom_it_may_ask_however_busy(self, world: World) -> None:
        world.join("a", "x")
        b = world.join("b", "x", max_concurrency=1)
        world.let(client="b")
        first, second = world.orders("capability:x", 2)
        world.answer(b, world.task(b))
        world.answer(b, world.task(b))
        assert {str(order.result().agent) for order in (first, second)} == {"b"}

    def test_hears_that_those_who_are_there_are_not_for_it(self, world: World) -> None:
        world.join("a", "x")
        world.let(client="b")
        order = world.order("capability:x")
        assert code_of(order) is OutcomeCode.NO_AGENT
        assert "that the caller may ask" in message_of(order)

    def test_is_not_overloaded_where_whom_it_may_not_ask_is_free(self, world: World) -> None:
        world.join("a", "x", max_concurrency=8)
        world.join("b", "x")
        world.let(client="b")
        orders = world.orders("capability:x", 1 + world.queue_limit + 1)
        assert [code_of(order) for order in orders if order.done()] == [OutcomeCode.OVERLOADED]

    def test_waits_for_whom_it_may_ask(self, world: World) -> None:
        world.join("a", "x")
        world.let(client="b")
        order = world.order("capability:x", wait=10)
        assert not order.done()
        b = world.join("b", "x")
        world.answer(b, world.task(b))
        assert str(order.result().agent) == "b"

    def test_that_waits_is_served_once_it_may_ask_who_is_there(self, world: World) -> None:
        a = world.join("a", "x")
        world.let(client="b")
        order = world.order("capability:x", wait=10)
        world.let(client="a")
        world.answer(a, world.task(a))
        assert str(order.result().agent) == "a"

    def test_that_waits_does_not_hold_up_who_may_ask_others(self, world: World) -> None:
        """The agent of the first in line is full, that of the next is not."""
        world.let(filler="a", one="nobody", other="b")
        world.join("a", "x")
        world.orders("a", 1 + world.queue_limit, caller="filler")
        one = world.order("capability:x", caller="one", wait=10)
        other = world.order("capability:x", caller="other", wait=10)
        world.let(filler="a", one="a", other="b")
        b = world.join("b", "x")
        world.answer(b, world.task(b))
        assert str(other.result().agent) == "b"
        assert not one.done()

    def test_has_begun_what_it_may_not_ask_any_more_and_nothing_after_that(self, world: World) -> None:
        a = world.join("a", "x")
        first, second = world.orders("a", 2)
        world.let(client="b")
        world.answer(a, world.task(a))
        assert isinstance(first.result().outcome, Value)
        assert code_of(second) is OutcomeCode.NO_AGENT
        assert world.heard(a) == []

    def test_has_what_was_queued_for_whom_it_may_not_ask_any_more_done_by_another(self, world: World) -> None:
        a = world.join("a", "x")
        first, second = world.orders("capability:x", 2)
        b = world.join("b", "x")
        world.let(client="b")
        world.answer(a, world.task(a))
        world.answer(b, world.task(b))
        assert [str(order.result().agent) for order in (first, second)] == ["a", "b"]

    def test_whose_agent_is_lost_is_served_again_by_whom_it_may_ask(self, world: World) -> None:
        world.let(client="capability:x")
        a = world.join("a", "x")
        order = world.order("capability:x", idempotent=True)
        world.task(a)
        c, b = world.join("c", "x"), world.join("b", "x")
        world.let(client="b")
        world.leave(a)
        assert world.heard(c) == []
        world.answer(b, world.task(b))
        assert (str(order.result().agent), order.result().attempts) == ("b", 2)


class TestWait:
    @pytest.mark.parametrize("target", ["a", "capability:echo"])
    def test_ends_when_the_right_agent_comes(self, world: World, target: str) -> None:
        order = world.order(target, wait=30)
        world.advance(10)
        assert world.tasks(world.join("b", "other")) == []
        assert not order.done()
        session = world.join("a", "echo")
        [assignment] = world.heard(session)
        assert isinstance(assignment, Assignment)
        assert assignment.timeout == timedelta(seconds=50), "waiting is part of the time allowed"
        world.answer(session, assignment.task_id)
        assert order.result() == Result(DONE, AgentRef("a"), 1)

    def test_ends_with_no_agent_in_the_end(self, world: World) -> None:
        order = world.order("a", wait=30)
        world.advance(29.9)
        assert not order.done()
        world.advance(0.1)
        assert code_of(order) is OutcomeCode.NO_AGENT
        assert_nothing_left(world)

    def test_is_no_longer_than_the_whole_may_take(self, world: World) -> None:
        order = world.order("a", wait=1e6, timeout=30)
        world.advance(30)
        assert code_of(order) is OutcomeCode.NO_AGENT

    def test_can_be_given_up(self, world: World) -> None:
        order = world.order("a", wait=30)
        world.cancel(order)
        assert order.cancelled()
        assert_nothing_left(world)

    def test_ends_when_a_draining_agent_reconnects(self, world: World) -> None:
        world.sessions.drain(world.join("a"))
        order = world.order("a", wait=30)
        assert not order.done()
        assert len(world.tasks(world.join("a"))) == 1

    def test_ends_for_as_many_as_the_agent_takes_and_goes_on_for_the_others(self, world: World) -> None:
        """What does not fit keeps its place: the agent may have room before the wait is over."""
        orders = [
            *world.orders("a", QUEUE_LIMIT, wait=30),
            *world.orders("capability:echo", QUEUE_LIMIT, wait=30),
        ]
        session = world.join("a", "echo")
        [first] = world.tasks(session)
        assert len(session.instance.queue or ()) == QUEUE_LIMIT
        assert [order.done() for order in orders] == [False] * 4
        assert sum(map(len, world.dispatcher._waiting.values())) == 1
        world.answer(session, first)
        assert len(world.tasks(session)) == 1
        assert not world.dispatcher._waiting
        for _ in range(3):
            world.answer(session, next(iter(session.instance.held)))
        assert [code_of(order) for order in orders] == [None] * 4

    def test_for_an_agent_that_stays_full_ends_as_overloaded(self, world: World) -> None:
        orders = [
            *world.orders("a", QUEUE_LIMIT, wait=30),
            *world.orders("capability:echo", QUEUE_LIMIT, wait=30),
        ]
        world.join("a", "echo")
        world.advance(30)
        assert [code_of(order) for order in orders if order.done()] == [OutcomeCode.OVERLOADED]

    def test_is_for_no_more_than_may_wait_for_one_agent(self, world: World) -> None:
        orders = world.orders("a", QUEUE_LIMIT + 2, wait=30)
        assert [code_of(order) for order in orders if order.done()] == [OutcomeCode.OVERLOADED] * 2
        assert not world.order("b", wait=30).done()

    def test_is_not_for_more_bytes_than_may_wait_and_a_refusal_leaves_nothing(self, world: World) -> None:
        """Else whoever fills the room could have every made-up target remembered for ever."""
        half = b"x" * (MAX_QUEUED_BYTES // 2)
        world.order("a", wait=30, data=half)
        for number in range(9):
            assert code_of(world.order(f"b{number}", wait=30, data=half)) is OutcomeCode.OVERLOADED
        assert len(world.dispatcher._waiting) == 1
        world.advance(30)
        assert_nothing_left(world)

    def test_ends_for_those_who_allow_it_where_only_the_verified_are_full(self, world: World) -> None:
        """An order that only a full agent may serve does not hold up the one behind it."""
        for target in ("a", "capability:sum"):
            world.orders(target, QUEUE_LIMIT, wait=30)
        verified_only = world.order("capability:echo", wait=30)
        allows = world.order("capability:echo", wait=30, allow_unverified=True)
        world.join("a", "sum", "echo")
        assert [world.placed[order].place for order in (verified_only, allows)] == [Place.WAITING] * 2
        stranger = world.join("anonymous/b", "echo")
        assert world.placed[verified_only].place is Place.WAITING
        world.answer(stranger, world.task(stranger))
        assert code_of(allows) is None

    def test_for_a_name_ends_at_the_unverified_agent_once_the_verified_one_is_gone(
        self, world: World
    ) -> None:
        big = world.join("a", max_concurrency=3)
        world.orders("a", 3)
        world.sessions.drain(big)
        waits = world.order("a", wait=30, allow_unverified=True)
        shrunk = world.join("a", max_concurrency=1)
        stranger = world.join("anonymous/a")
        assert world.placed[waits].place is Place.WAITING
        assert world.tasks(stranger) == []
        world.leave(big)
        world.leave(shrunk)
        world.answer(stranger, world.task(stranger))
        assert code_of(waits) is None

    def test_is_not_for_an_overloaded_agent(self, world: World) -> None:
        world.join("a")
        world.orders("a", 1 + QUEUE_LIMIT)
        assert code_of(world.order("a", wait=30)) is OutcomeCode.OVERLOADED


class TestLoad:
    def test_limit_is_what_it_works_on_and_what_may_wait(self, world: World) -> None:
        session = world.join("a", "echo", max_concurrency=3)
        orders = world.orders("a", 3 + QUEUE_LIMIT)
        for target in ("a", "capability:echo"):
            refused = world.order(target)
            assert code_of(refused) is OutcomeCode.OVERLOADED
            outcome = refused.result().outcome
            assert isinstance(outcome, Failure)
            assert outcome.retry_after > timedelta(0)
        assert not any(order.done() for order in orders)
        world.answer(session, world.tasks(session)[0])
        assert not world.order("capability:echo").done()

    def test_agent_that_shrinks_is_given_nothing_until_it_fits_again(self, world: World) -> None:
        world.join("a", "echo", max_concurrency=3)
        world.orders("a", 3 + QUEUE_LIMIT)
        session = world.join("a", "echo", max_concurrency=1)
        for target in ("a", "capability:echo"):
            assert code_of(world.order(target)) is OutcomeCode.OVERLOADED
        first, second, third = sorted(session.instance.held)
        world.answer(session, first)
        world.answer(session, second)
        assert world.tasks(session) == []
        world.answer(session, third)
        assert len(world.tasks(session)) == len(session.instance.held) == 1
        assert len(session.instance.queue or ()) == QUEUE_LIMIT - 1
        assert not world.order("capability:echo").done()

    def test_goes_to_the_one_with_most_free_slots(self, world: World) -> None:
        small, large = world.join("a", "echo", max_concurrency=1), world.join("b", "echo", max_concurrency=3)
        world.orders("capability:echo", 2)
        assert (len(world.tasks(small)), len(world.tasks(large))) == (0, 2)

    def test_equals_take_turns(self, world: World) -> None:
        sessions = [world.join(name, "echo") for name in "abc"]
        for _ in range(6):
            order = world.order("capability:echo")
            [(session, task_id)] = [(s, t) for s in sessions for t in world.tasks(s)]
            world.answer(session, task_id)
            assert order.done()
            sessions.append(sessions.pop(0))
            assert session is sessions[-1]

    def test_one_agents_tasks_do_not_load_another(self, world: World) -> None:
        world.join("a")
        world.join("b")
        world.orders("a", 1 + QUEUE_LIMIT)
        assert not world.order("b").done()


class TestTime:
    def test_agent_that_does_not_answer(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", timeout=5)
        [task_id] = world.tasks(session)
        world.advance(5)
        assert code_of(order) is OutcomeCode.DEADLINE_EXCEEDED
        assert "within 5 s" in message_of(order)
        assert order.result().attempts == 1
        assert world.heard(session) == [Cancellation(task_id)]
        assert not session.instance.held
        assert_nothing_left_but_agents(world)

    def test_answer_that_comes_later_is_dropped(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", timeout=5)
        [task_id] = world.tasks(session)
        world.advance(5)
        world.answer(session, task_id)
        assert code_of(order) is OutcomeCode.DEADLINE_EXCEEDED

    def test_none_left_gives_the_task_to_nobody(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", timeout=0)
        assert order.result() == Result(order.result().outcome, None, 0)
        assert code_of(order) is OutcomeCode.DEADLINE_EXCEEDED
        assert world.heard(session) == []

    def test_caller_who_goes_away_cancels_the_task(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a")
        [task_id] = world.tasks(session)
        world.cancel(order)
        assert order.cancelled()
        assert world.heard(session) == [Cancellation(task_id)]
        assert_nothing_left_but_agents(world)

    def test_cancellation_follows_the_task(self, world: World) -> None:
        """On another stream it could overtake the task it is about."""
        old = world.join("a", max_concurrency=4)
        order, _ = world.orders("a", 2)
        task_id, _ = world.tasks(old)
        new = world.join("a", max_concurrency=4)
        world.cancel(order)
        assert (world.heard(old), world.heard(new)) == ([Cancellation(task_id)], [])

    def test_cancellation_goes_to_the_newest_session_if_that_of_the_task_has_ended(
        self, world: World
    ) -> None:
        old = world.join("a")
        order = world.order("a")
        [task_id] = world.tasks(old)
        new = world.join("a")
        world.leave(old)
        world.cancel(order)
        assert world.heard(new) == [Cancellation(task_id)]

    def test_what_was_not_sent_yet_is_cancelled_behind_it(self, world: World) -> None:
        session = world.join("a")
        world.cancel(world.order("a"))
        task, cancellation = world.heard(session)
        assert isinstance(task, Assignment)
        assert cancellation == Cancellation(task.task_id)

    def test_agent_that_does_not_read_is_given_no_more_than_fits(self, world: World) -> None:
        """However slowly an agent reads, no more waits for it than there is room for."""
        session = world.join("a")
        link = session.link
        size = 1024 * 1024
        while link.backlog_bytes <= MAX_BACKLOG_BYTES:
            order = world.order("a", timeout=1, data=b"x" * size)
            world.advance(1)
            assert code_of(order) is OutcomeCode.DEADLINE_EXCEEDED
        full = link.backlog_bytes
        waiting = world.order("a", timeout=60)
        late = world.order("a", timeout=1)
        world.advance(1)
        assert code_of(late) is OutcomeCode.DEADLINE_EXCEEDED
        assert not session.instance.held
        assert link.backlog_bytes == full
        world.heard(session)
        assert link.backlog_bytes == 0
        world.advance(1)
        world.answer(session, world.task(session))
        assert code_of(waiting) is None
        assert_nothing_left_but_agents(world)

    def test_what_was_not_sent_when_the_agent_was_lost_is_cancelled_behind_it(self, world: World) -> None:
        """Its caller was told AGENT_LOST: the superseded agent should not go on with it."""
        old = world.join("a", instance="first")
        world.order("a")
        world.join("a", instance="second")
        task, cancellation, _ = world.heard(old)
        assert isinstance(task, Assignment)
        assert cancellation == Cancellation(task.task_id)


class TestLoss:
    def test_of_one_agent_fails_its_own_tasks_only(self, world: World) -> None:
        lost, kept = world.join("a", max_concurrency=2), world.join("b")
        orders = [*world.orders("a", 2), world.order("b")]
        world.tasks(lost)
        world.leave(lost)
        assert [order.done() for order in orders] == [True, True, False]
        assert {code_of(order) for order in orders[:2]} == {OutcomeCode.AGENT_LOST}
        world.answer(kept, world.task(kept))
        assert code_of(orders[2]) is None

    def test_of_a_task_that_is_not_idempotent_is_final(self, world: World) -> None:
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo")
        world.leave(session)
        assert order.result().attempts == 1
        assert code_of(order) is OutcomeCode.AGENT_LOST
        assert world.tasks(other) == []

    def test_of_an_idempotent_task_by_capability_is_tried_elsewhere(self, world: World) -> None:
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo", idempotent=True, timeout=60)
        [first] = world.tasks(session)
        world.advance(10)
        world.leave(session)
        [second] = world.heard(other)
        assert isinstance(second, Assignment)
        assert second.task_id != first
        assert second.timeout == timedelta(seconds=50)
        world.answer(other, second.task_id)
        assert order.result() == Result(DONE, AgentRef("b"), 2)

    def test_of_what_is_tried_elsewhere_makes_room_for_what_waits(self, world: World) -> None:
        """The agent is still there: one of its two streams broke off."""
        session = world.join("a", "echo")
        lost, waits = world.order("capability:echo", idempotent=True), world.order("a")
        [first] = world.tasks(session)
        other = world.join("b", "echo", max_concurrency=2)
        world.dispatcher.forgotten(session.instance, [])
        world.answer(other, world.task(other))
        assert code_of(lost) is None
        [second] = [task for task in world.tasks(session) if task != first]
        world.answer(session, second)
        assert code_of(waits) is None

    def test_of_what_is_tried_elsewhere_ends_the_stream_that_it_came_by(self, world: World) -> None:
        older = world.join("a", "echo")
        order = world.order("capability:echo", idempotent=True)
        newer, other = world.join("a", "echo"), world.join("b", "echo", max_concurrency=2)
        assert older.instance is newer.instance
        assert not older.over, "it is finished first"
        world.dispatcher.forgotten(newer.instance, [])
        assert older.over
        world.answer(other, world.task(other))
        assert code_of(order) is None

    def test_of_an_idempotent_task_by_id_is_final(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", idempotent=True, wait=30)
        world.leave(session)
        assert code_of(order) is OutcomeCode.AGENT_LOST

    def test_is_tried_elsewhere_at_most_twice(self, world: World) -> None:
        sessions = [world.join(name, "echo") for name in "abcde"]
        order = world.order("capability:echo", idempotent=True)
        for attempt in range(1, MAX_ATTEMPTS + 1):
            assert not order.done()
            [holder] = [s for s in sessions if s.instance.held]
            world.leave(holder)
            sessions.remove(holder)
            assert attempt == MAX_ATTEMPTS or not order.done()
        assert code_of(order) is OutcomeCode.AGENT_LOST
        assert order.result().attempts == MAX_ATTEMPTS
        assert not any(s.instance.held for s in sessions)

    def test_without_anybody_else_is_told_as_such(self, world: World) -> None:
        """NO_AGENT would say that the task has not run, and it may have."""
        order_of = world.join("a", "echo")
        order = world.order("capability:echo", idempotent=True)
        world.leave(order_of)
        assert code_of(order) is OutcomeCode.AGENT_LOST
        assert (order.result().agent, order.result().attempts) == (AgentRef("a"), 1)

    def test_by_revocation_is_told_as_such(self, world: World) -> None:
        revoked, kept = world.join("a"), world.join("b")
        orders = [world.order("a"), world.order("b")]
        world.leave(revoked, WITHDRAWN)
        assert code_of(orders[0]) is OutcomeCode.REVOKED
        assert message_of(orders[0]) == "a was revoked while it held the task: agent/a is revoked"
        assert world.results == [("REVOKED", 0)]
        world.answer(kept, world.task(kept))
        assert code_of(orders[1]) is None

    def test_by_revocation_of_a_task_that_is_not_idempotent_is_final(self, world: World) -> None:
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo")
        world.leave(session, WITHDRAWN)
        assert code_of(order) is OutcomeCode.REVOKED
        assert order.result().attempts == 1
        assert world.tasks(other) == []

    def test_by_revocation_is_tried_elsewhere_like_any_other(self, world: World) -> None:
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo", idempotent=True)
        world.leave(session, WITHDRAWN)
        world.answer(other, world.task(other))
        assert order.result() == Result(DONE, AgentRef("b"), 2)

    @pytest.mark.parametrize("last", [None, WITHDRAWN], ids=["lost", "revoked"])
    def test_by_revocation_counts_among_the_attempts_and_the_last_is_told(
        self, world: World, last: Revoked | None
    ) -> None:
        causes = [None if last else WITHDRAWN] * (MAX_ATTEMPTS - 1) + [last]
        sessions = [world.join(name, "echo") for name in "abcde"]
        order = world.order("capability:echo", idempotent=True)
        for cause in causes:
            assert not order.done()
            [holder] = [s for s in sessions if s.instance.held]
            world.leave(holder, cause)
            sessions.remove(holder)
        assert code_of(order) is (OutcomeCode.REVOKED if last else OutcomeCode.AGENT_LOST)
        assert order.result().attempts == MAX_ATTEMPTS

    def test_by_revocation_without_anybody_else_is_told_as_such(self, world: World) -> None:
        session = world.join("a", "echo")
        order = world.order("capability:echo", idempotent=True)
        world.leave(session, WITHDRAWN)
        assert code_of(order) is OutcomeCode.REVOKED
        assert (order.result().agent, order.result().attempts) == (AgentRef("a"), 1)

    def test_by_revocation_after_the_first_part_is_final(self, world: World) -> None:
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo", idempotent=True, part_credit=100)
        world.dispatcher.part(session.instance, world.task(session), b"part")
        world.leave(session, WITHDRAWN)
        assert code_of(order) is OutcomeCode.REVOKED
        assert world.tasks(other) == []

    def test_of_one_of_two_streams_by_revocation_fails_what_was_given_on_it(self, world: World) -> None:
        session = world.join("a", max_concurrency=2)
        kept, revoked = world.orders("a", 2)
        task_id, _ = world.tasks(session)
        world.dispatcher.forgotten(session.instance, [task_id], WITHDRAWN)
        world.spin()
        assert code_of(revoked) is OutcomeCode.REVOKED
        assert not kept.done()

    def test_waits_for_another_as_long_as_the_caller_said(self, world: World) -> None:
        session = world.join("a", "echo")
        order = world.order("capability:echo", idempotent=True, wait=30)
        world.advance(10)
        world.leave(session)
        assert not order.done()
        world.advance(10)
        other = world.join("b", "echo")
        world.answer(other, world.task(other))
        assert order.result() == Result(DONE, AgentRef("b"), 2)

    def test_when_time_is_up_as_well_gives_it_to_nobody_else(self, world: World) -> None:
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo", idempotent=True, timeout=5)
        world.loop.now += 5
        world.leave(session)
        assert code_of(order) in {OutcomeCode.AGENT_LOST, OutcomeCode.DEADLINE_EXCEEDED}
        assert order.result().attempts == 1
        assert world.tasks(other) == []

    def test_by_take_over_is_tried_on_the_one_that_took_over(self, world: World) -> None:
        world.join("a", "echo", instance="first")
        order = world.order("capability:echo", idempotent=True)
        new = world.join("a", "echo", instance="second")
        world.answer(new, world.task(new))
        assert order.result() == Result(DONE, AgentRef("a"), 2)

    def test_finds_others_for_what_it_was_not_given_yet(self, world: World) -> None:
        """That has not run: it needs no leave to run again."""
        session, other = world.join("a", "echo"), world.join("b", "other")
        given = world.order("capability:echo")
        queued, by_id = world.order("capability:echo"), world.order("a")
        third = world.join("c", "echo", max_concurrency=3)
        world.leave(session)
        assert code_of(given) is OutcomeCode.AGENT_LOST
        assert (code_of(by_id), by_id.result().attempts) == (OutcomeCode.NO_AGENT, 0)
        assert world.tasks(other) == []
        world.answer(third, world.task(third))
        assert queued.result() == Result(DONE, AgentRef("c"), 1)

    def test_of_an_agent_that_drains_is_not_awaited_by_what_it_was_not_given(self, world: World) -> None:
        """It may work on what it has for long, while others have nothing to do."""
        session = world.join("a", "echo")
        given, queued = world.orders("capability:echo", 2)
        other = world.join("b", "echo")
        world.sessions.drain(session)
        world.answer(other, world.task(other))
        assert code_of(queued) is None
        assert not given.done()

    def test_of_what_finds_no_room_elsewhere_is_told_as_such(self, world: World) -> None:
        """OVERLOADED would say that the task has not run, and it may have."""
        session = world.join("a", "echo", max_concurrency=2)
        order = world.order("capability:echo", idempotent=True)
        world.join("b", "echo")
        world.orders("b", 1 + QUEUE_LIMIT)
        world.leave(session)
        assert code_of(order) is OutcomeCode.AGENT_LOST
        assert order.result().attempts == 1

    def test_leaves_a_retried_order_no_claim_on_the_lost(self, world: World) -> None:
        session = world.join("a", "echo")
        order = world.order("capability:echo", idempotent=True, wait=30)
        world.leave(session)
        assert world.placed[order].instance is None
        world.cancel(order)
        assert_nothing_left(world)

    def test_of_many_one_after_the_other_leaves_nothing(self, world: World) -> None:
        """Also where nobody ever asks for a capability."""
        for number in range(50):
            session = world.join(f"a{number}", "echo")
            order = world.order(f"a{number}")
            world.answer(session, world.task(session))
            world.order(f"a{number}")
            world.leave(session)
            assert code_of(order) is None
        world.leave(world.join("last"))
        assert_nothing_left(world)

    def test_of_a_connection_takes_what_the_agent_does_not_name(self, world: World) -> None:
        old = world.join("a", max_concurrency=3)
        kept, lost, queued = *world.orders("a", 2), world.order("a")
        first, second, third = world.tasks(old)
        new = world.join("a", max_concurrency=3, held=[first, third])
        assert [kept.done(), lost.done(), queued.done()] == [False, True, False]
        assert code_of(lost) is OutcomeCode.AGENT_LOST
        assert old.over
        world.answer(new, first)
        world.answer(new, second)
        assert code_of(kept) is None
        assert world.heard(new) == []

    def test_of_a_connection_cancels_what_nobody_waits_for_any_more(self, world: World) -> None:
        """Else it would take the place of tasks that the agent is given anew."""
        old = world.join("a", max_concurrency=2)
        gone, kept = world.orders("a", 2)
        first, second = world.tasks(old)
        world.cancel(gone)
        new = world.join("a", max_concurrency=2, held=[first, second, 12345])
        assert world.heard(new) == [Cancellation(first), Cancellation(12345)]
        assert not kept.done()


class TestTurns:
    def test_callers_take_turns(self, make_world: MakeWorld) -> None:
        world = make_world(queue_limit=10)
        session = world.join("a")
        world.order("a", caller="first")
        for caller, data in [("greedy", b"g")] * 4 + [("modest", b"m")] * 2:
            world.order("a", caller=caller, data=data)
        heard = []
        for _ in range(7):
            [assignment] = world.heard(session)
            assert isinstance(assignment, Assignment)
            heard.append(assignment.payload.data)
            world.answer(session, assignment.task_id)
        assert heard == [b"", b"g", b"m", b"g", b"m", b"g", b"g"]

    def test_nobody_fills_the_queue_for_everybody(self, world: World) -> None:
        session = world.join("a")
        given, kept, newest = world.orders("a", 1 + QUEUE_LIMIT, caller="greedy")
        modest = world.order("a", caller="modest")
        assert code_of(newest) is OutcomeCode.OVERLOADED
        assert not any(order.done() for order in (given, kept, modest))
        assert code_of(world.order("a", caller="greedy")) is OutcomeCode.OVERLOADED
        assert code_of(world.order("a", caller="modest")) is OutcomeCode.OVERLOADED
        for _ in range(3):
            world.answer(session, world.task(session))
        assert [code_of(order) for order in (given, kept, modest)] == [None] * 3
        assert_nothing_left_but_agents(world)


class TestParts:
    def test_reach_the_caller_in_order_and_before_the_end(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", part_credit=10)
        task_id = world.task(session)
        for value in (b"one", b"two"):
            world.dispatcher.part(session.instance, task_id, value)
        world.answer(session, task_id, Complete(2))
        assert world.listeners[world.placed[order]].parts == [b"one", b"two"]
        world.dispatcher.part(session.instance, task_id, b"late")
        assert len(world.listeners[world.placed[order]].parts) == 2

    def test_may_go_once_beyond_the_credit_and_then_wait_for_more(self, world: World) -> None:
        session = world.join("a")
        task = world.order("a", part_credit=1)
        order, task_id = world.placed[task], world.task(session)
        world.dispatcher.part(session.instance, task_id, b"x" * 100)
        assert order.part_credit == -99
        world.dispatcher.allow(order, 99)
        world.dispatcher.part(session.instance, task_id, b"not yet")
        world.spin()
        assert code_of(task) is OutcomeCode.INVALID_RESULT
        assert "nobody had made room for" in message_of(task)
        assert Cancellation(task_id) in world.heard(session)
        assert world.listeners[order].parts == [b"x" * 100]

    def test_are_not_for_who_did_not_ask(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a")
        world.dispatcher.part(session.instance, world.task(session), b"x")
        world.spin()
        assert code_of(order) is OutcomeCode.INVALID_RESULT

    def test_end_of_an_answer_in_parts_is_no_answer_to_who_did_not_ask(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a")
        world.answer(session, world.task(session), Complete(0))
        assert code_of(order) is OutcomeCode.INVALID_RESULT

    def test_of_another_agents_task_are_refused(self, world: World) -> None:
        session, other = world.join("a"), world.join("b")
        order = world.order("a", part_credit=9)
        task_id = world.task(session)
        with pytest.raises(NotAuthorized):
            world.dispatcher.part(other.instance, task_id, b"x")
        world.dispatcher.part(other.instance, 12345, b"of no task")
        assert not order.done()

    def test_without_content_cost_credit_too(self, world: World) -> None:
        """Else there could be any number of them."""
        session = world.join("a")
        order = world.order("a", part_credit=9)
        task_id = world.task(session)
        for _ in range(9):
            world.dispatcher.part(session.instance, task_id, b"")
        world.spin()
        assert not order.done()
        world.dispatcher.part(session.instance, task_id, b"")
        world.spin()
        assert code_of(order) is OutcomeCode.INVALID_RESULT

    def test_that_are_refused_end_the_task_and_tell_the_agent(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", part_credit=9)
        task_id = world.task(session)
        refusal = Failure(OutcomeCode.INVALID_RESULT, "too large")
        world.dispatcher.part(session.instance, task_id, refusal)
        world.spin()
        assert order.result().outcome == refusal
        assert world.heard(session) == [Cancellation(task_id)]

    @pytest.mark.parametrize("credit", [MAX_PART_CREDIT + 1, 2**64 - 1])
    def test_have_no_more_credit_than_the_control_plane_would_hold(self, world: World, credit: int) -> None:
        session = world.join("a")
        order = world.placed[world.order("a", part_credit=credit)]
        assert order.part_credit == MAX_PART_CREDIT
        world.dispatcher.allow(order, credit)
        assert order.part_credit == MAX_PART_CREDIT
        frame = session.link.take()
        assert frame is not None
        assert [task.part_credit for task in frame.tasks] == [MAX_PART_CREDIT]
        assert not frame.credits
        world.dispatcher.part(session.instance, order.task_id, b"x" * 5)
        world.dispatcher.allow(order, credit)
        frame = session.link.take()
        assert frame is not None
        assert [c.bytes for c in frame.credits] == [5]

    def test_credit_that_comes_while_it_waits_is_in_the_task(self, world: World) -> None:
        order = world.placed[world.order("a", wait=30, part_credit=5)]
        world.dispatcher.allow(order, 7)
        frame = world.join("a").link.take()
        assert frame is not None
        assert frame.tasks[0].part_credit == 12
        assert not frame.credits

    def test_credit_after_the_end_has_no_effect(self, world: World) -> None:
        session = world.join("a")
        task = world.order("a", part_credit=5)
        world.answer(session, world.task(session))
        world.dispatcher.allow(world.placed[task], 5)
        assert session.link.take() is None

    def test_that_were_passed_on_do_not_come_again(self, world: World) -> None:
        """An idempotent task is not tried elsewhere once its caller has a part of the answer."""
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo", idempotent=True, part_credit=9)
        world.dispatcher.part(session.instance, world.task(session), b"x")
        world.leave(session)
        assert code_of(order) is OutcomeCode.AGENT_LOST
        assert world.tasks(other) == []


class Insatiable:
    """A caller that asks again the moment it has its answer, *left* times."""

    key = "insatiable"

    def __init__(self, world: World, left: int = 1000) -> None:
        self.world = world
        self.left = left
        self.answers = 0

    def ask(self) -> None:
        if self.left:
            self.left -= 1
            self.world.dispatcher.submit(Order(AgentRef("a"), encode_work("task", Payload()), 60, self))

    def ended(self, order: Order, answer: Answer) -> None:
        self.answers += 1
        self.ask()

    def may_ask(self, target: Target, ref: AgentRef) -> bool:
        return True

    def part(self, order: Order, value: bytes) -> None:
        raise AssertionError("it asked for none")


class TestMoment:
    """Several things that happen at one moment, each the cause of the other or not."""

    def test_wait_and_deadline_of_another_end_at_once(self, world: World) -> None:
        """Room that another's end makes is not for one whose own wait is over, and both hear the truth."""
        for target in ("a", "capability:sum"):
            world.orders(target, QUEUE_LIMIT, wait=30, timeout=30)
        waits = world.order("capability:echo", wait=30, timeout=60)
        world.join("a", "sum", "echo")
        world.advance(30)
        assert code_of(waits) is OutcomeCode.OVERLOADED
        assert waits.result().attempts == 0

    def test_order_placed_by_anothers_end_keeps_its_own_deadline(self, world: World) -> None:
        session = world.join("a")
        world.order("a", timeout=5)
        queued = world.order("a", timeout=60)
        first = world.task(session)
        world.advance(5)
        assignment, cancellation = world.heard(session)
        assert cancellation == Cancellation(first)
        assert isinstance(assignment, Assignment)
        assert assignment.timeout == timedelta(seconds=55)
        assert not queued.done()

    def test_deadlines_of_what_an_agent_has_and_of_what_waits_for_it(self, world: World) -> None:
        """What is given room by the end of another, and has no time left either, is not begun."""
        session = world.join("a")
        orders = world.orders("a", 1 + QUEUE_LIMIT, timeout=5)
        world.advance(5)
        assert [code_of(order) for order in orders] == [OutcomeCode.DEADLINE_EXCEEDED] * 3
        assert [order.result().attempts for order in orders] == [1, 0, 0]
        assert len(world.tasks(session)) == 1

    def test_answer_at_the_deadline_counts_if_it_comes_first(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", timeout=5)
        world.loop.now += 5
        world.answer(session, world.task(session))
        world.advance(0)
        assert code_of(order) is None
        assert [result for result, _ in world.results] == ["OK"]

    def test_second_end_has_no_effect(self, world: World) -> None:
        session = world.join("a", max_concurrency=2)
        task, _ = world.orders("a", 2)
        order = world.placed[task]
        for _ in range(3):
            world.dispatcher.withdraw(order)
            world.dispatcher.withdraw(order, Failure(OutcomeCode.CANCELLED, ""))
        world.dispatcher.settle(session.instance, order.task_id, b"late")
        assert len(world.results) == 1
        assert world.dispatcher._orders == 1
        assert [item for item in world.heard(session) if isinstance(item, Cancellation)] == [
            Cancellation(order.task_id)
        ]

    @pytest.mark.parametrize("queue_limit", [1, 4])
    def test_end_that_withdraws_all_others_while_their_agent_is_lost(
        self, make_world: MakeWorld, queue_limit: int
    ) -> None:
        """Of those it holds, of those that wait for it, and of those that wait for anybody."""
        world = make_world(queue_limit=queue_limit)
        session = world.join("a", "echo", max_concurrency=3)

        def withdraw_all() -> None:
            for order in world.placed.values():
                world.dispatcher.withdraw(order)

        for _ in range(3 + queue_limit):
            world.order("a", then=withdraw_all, idempotent=True)
        world.orders("b", queue_limit, wait=30, then=withdraw_all)
        world.leave(session)
        assert len(world.results) == 3 + 2 * queue_limit
        assert_nothing_left(world)

    def test_end_that_withdraws_all_others_while_they_expire(self, world: World) -> None:
        def withdraw_all() -> None:
            for order in world.placed.values():
                world.dispatcher.withdraw(order)

        world.join("a")
        world.orders("a", 1 + QUEUE_LIMIT, timeout=5, then=withdraw_all)
        world.orders("b", 2, timeout=5, wait=5, then=withdraw_all)
        world.advance(5)
        assert len(world.results) == 5
        assert_nothing_left_but_agents(world)

    def test_end_that_withdraws_all_others_while_the_control_plane_stops(self, world: World) -> None:
        def withdraw_all() -> None:
            for order in world.placed.values():
                world.dispatcher.withdraw(order)

        world.join("a", max_concurrency=2)
        world.orders("a", 2 + QUEUE_LIMIT, then=withdraw_all)
        world.orders("b", 2, wait=30, then=withdraw_all)
        drain = world.loop.create_task(world.dispatcher.drain(timedelta(seconds=10)))
        world.spin()
        world.advance(10)
        assert drain.done()
        assert len(world.results) == 4 + QUEUE_LIMIT
        assert_nothing_left_but_agents(world)

    def test_end_that_asks_again(self, world: World) -> None:
        """Each end makes room, and whoever asks again at that moment gets in line."""
        session, caller = world.join("a"), Insatiable(world)
        caller.ask()
        for _ in range(6):
            world.answer(session, world.task(session))
        assert caller.answers == 6
        caller.left = 0
        world.answer(session, world.task(session))
        assert_nothing_left_but_agents(world)

    def test_end_that_asks_again_of_nobody(self, world: World) -> None:
        """It ends while it is being placed, over and over."""
        caller = Insatiable(world, left=50)
        caller.ask()
        assert caller.answers == 50
        assert_nothing_left(world)

    def test_room_for_one_that_waits_is_not_given_twice(self, make_world: MakeWorld) -> None:
        """A large order that makes others leave the queue lets smaller ones in while it is placed itself."""
        world = make_world(queue_limit=4)
        big, small = b"x" * (MAX_QUEUED_BYTES * 3 // 4), b"x" * (MAX_QUEUED_BYTES // 2)
        world.order("capability:echo", wait=30, data=small, caller="greedy")
        world.orders("capability:echo", 3, wait=30, caller="modest", data=b"y")
        session = world.join("a", "echo")
        world.orders("a", 3, caller="greedy", data=small[: MAX_QUEUED_BYTES // 8])
        world.order("a", caller="large", data=big)
        while session.instance.held:
            world.answer(session, next(iter(session.instance.held)))
        world.advance(60)
        assert_nothing_left_but_agents(world)

    @pytest.mark.parametrize("timeout", [0, 1e-9])
    def test_no_time_at_all(self, world: World, timeout: float) -> None:
        session = world.join("a")
        world.orders("a", 1 + QUEUE_LIMIT)
        order = world.order("a", timeout=timeout, wait=30)
        world.advance(0)
        assert code_of(order) in {OutcomeCode.DEADLINE_EXCEEDED, OutcomeCode.OVERLOADED}
        assert len(world.tasks(session)) == 1

    def test_a_day_is_a_long_time(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a", timeout=86_400)
        world.advance(86_399)
        assert not order.done()
        world.answer(session, world.task(session))
        assert code_of(order) is None


class TestDrain:
    def test_waits_for_what_is_under_way_and_takes_nothing_new(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a")
        drain = world.loop.create_task(world.dispatcher.drain(timedelta(seconds=10)))
        world.spin()
        with pytest.raises(Unavailable, match="shutting down"):
            world.order("a").result()
        assert not drain.done()
        world.answer(session, world.task(session))
        assert drain.done()
        assert code_of(order) is None

    def test_has_a_limit_after_which_the_rest_is_lost_with_the_control_plane(self, world: World) -> None:
        world.join("a")
        order = world.order("a")
        drain = world.loop.create_task(world.dispatcher.drain(timedelta(seconds=10)))
        world.spin()
        world.advance(10)
        assert drain.done()
        assert code_of(order) is OutcomeCode.CONTROL_PLANE_LOST

    def test_does_not_wait_for_orders_that_nobody_has(self, world: World) -> None:
        order = world.order("nobody", wait=60)
        drain = world.loop.create_task(world.dispatcher.drain(timedelta(seconds=10)))
        world.spin()
        assert drain.done()
        with pytest.raises(Unavailable, match="shutting down"):
            order.result()

    def test_tries_what_is_lost_meanwhile_elsewhere(self, world: World) -> None:
        session, other = world.join("a", "echo", max_concurrency=2), world.join("b", "echo")
        order = world.order("capability:echo", idempotent=True)
        drain = world.loop.create_task(world.dispatcher.drain(timedelta(seconds=10)))
        world.spin()
        world.leave(session)
        world.answer(other, world.task(other))
        assert order.result() == Result(DONE, AgentRef("b"), 2)
        world.spin()
        assert drain.done()

    def test_lets_nothing_wait_that_is_lost_meanwhile(self, world: World) -> None:
        session = world.join("a", "echo")
        order = world.order("capability:echo", idempotent=True, wait=60)
        drain = world.loop.create_task(world.dispatcher.drain(timedelta(seconds=10)))
        world.spin()
        world.leave(session)
        assert code_of(order) is OutcomeCode.AGENT_LOST
        world.spin()
        assert drain.done()

    def test_lets_go_of_what_was_never_given_and_says_that_it_can_be_tried_again(self, world: World) -> None:
        world.join("a")
        given, queued = world.orders("a", 2)
        drain = world.loop.create_task(world.dispatcher.drain(timedelta(seconds=10)))
        world.spin()
        world.advance(10)
        assert drain.done()
        assert code_of(given) is OutcomeCode.CONTROL_PLANE_LOST
        with pytest.raises(Unavailable, match="shutting down"):
            queued.result()

    def test_is_immediate_when_idle(self, world: World) -> None:
        world.run(world.dispatcher.drain(timedelta(seconds=10)))
        with pytest.raises(Unavailable, match="shutting down"):
            world.order("a").result()


class TestCount:
    def test_every_end_is_counted_once_with_its_seconds(self, world: World) -> None:
        session = world.join("a", max_concurrency=9)
        answered, failed, cancelled, late = world.orders("a", 4, timeout=10)
        ids = world.tasks(session)
        world.advance(2)
        world.answer(session, ids[0])
        world.answer(session, ids[1], Failure(OutcomeCode.HANDLER_FAILED, "no"))
        world.cancel(cancelled)
        world.advance(8)
        assert all(order.done() for order in (answered, failed, late))
        world.order("nobody")
        assert world.results == [
            ("OK", 2.0),
            ("HANDLER_FAILED", 2.0),
            ("CANCELLED", 2.0),
            ("DEADLINE_EXCEEDED", 10.0),
            ("NO_AGENT", 0.0),
        ]

    def test_tasks_in_flight_are_those_an_agent_holds(self, world: World) -> None:
        world.join("a", max_concurrency=2)
        world.orders("a", 2)
        world.order("b", wait=30)
        assert len(world.dispatcher) == 2


def assert_nothing_left_but_agents(world: World) -> None:
    dispatcher = world.dispatcher
    assert not dispatcher._given
    assert not dispatcher._waiting
    assert not dispatcher._deadlines
    assert not any(instance.queue for instance in dispatcher._instances.values())
    assert world.dispatcher._idle.is_set()


def instance_of(number: int, max_concurrency: int) -> Instance:
    return Instance(AgentRef(f"a{number}"), b"", AgentDescription(max_concurrency=max_concurrency))


class TestLeastLoaded:
    @given(
        st.integers(0, 3),
        st.lists(st.integers(1, 6), min_size=1, max_size=5),
        st.lists(st.tuples(st.integers(0, 4), st.integers(-1, 9)), max_size=40),
    )
    def test_best_is_what_a_look_at_all_of_them_would_give(
        self, limit: int, sizes: list[int], moves: list[tuple[int, int]]
    ) -> None:
        index = LeastLoaded(limit)
        instances = [instance_of(number, size) for number, size in enumerate(sizes)]
        entered: dict[Instance, int] = {}
        for number, load in moves:
            instance = instances[number % len(instances)]
            if load < 0:
                index.discard(instance)
                entered.pop(instance, None)
            else:
                instance.held = dict.fromkeys(
                    range(load), Session(instance, 0, Link(End.CALLER, Said.HELLO, Receiver()))
                )
                index.put(instance)
                entered[instance] = instance.description.max_concurrency - load
            best = index.best()
            most = max(entered.values(), default=-limit)
            assert len(index) == len(entered)
            if most <= -limit:
                assert best is None
            else:
                assert best is not None
                assert best[0] == most == entered[best[1]]

    def test_costs_the_same_for_many_as_for_few(self) -> None:
        """Cost per task must not grow with the number of agents; looking at all would be 400 times slower."""

        def index_of(count: int) -> LeastLoaded:
            index = LeastLoaded(2)
            for number in range(count):
                index.put(instance_of(number, number % 4 + 1))
            return index

        def seconds(index: LeastLoaded) -> float:
            began = time.thread_time()  # of the processor: other programs share it
            for task_id in range(5_000):
                best = index.best()
                assert best is not None
                _, instance = best
                instance.take(task_id, Session(instance, 0, Link(End.CALLER, Said.HELLO, Receiver())))
                index.put(instance)
                instance.release(task_id)
                index.put(instance)
            return time.thread_time() - began

        few, many = index_of(50), index_of(20_000)
        # The best of several: other programs share its caches, too.
        assert min(seconds(many) for _ in range(4)) < 8 * min(seconds(few) for _ in range(4))


def test_nothing_is_left_when_all_agents_are_gone(make_world: MakeWorld) -> None:
    world = make_world(queue_limit=5)
    sessions = [world.join(name, "echo", name, max_concurrency=3) for name in "abc"]
    sessions.append(world.join("anonymous/d", "echo"))
    world.orders("capability:echo", 12, allow_unverified=True, idempotent=True)
    world.orders("capability:nobody", 3, wait=5)
    for session in sessions:
        world.leave(session)
    world.advance(5)
    assert_nothing_left(world)
    assert len(world.registry) == len(world.sessions) == 0
