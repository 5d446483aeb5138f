"""Whose session is in force, who takes over from whom, and what an ending session may take with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from parallax.control_plane.registry import AgentRef
from parallax.control_plane.sessions import (
    MAX_TAKE_OVERS,
    TAKE_OVER_WINDOW_S,
    Goodbye,
    Reason,
    Session,
)
from parallax.runtime.outcome import Failure, OutcomeCode, Payload, Value
from parallax.security.errors import InvalidRequest, LeaseExpired, NoSuchAgent, Revoked, Superseded
from tests.control_plane.conftest import Assignment

if TYPE_CHECKING:
    from tests.control_plane.conftest import World

A = AgentRef("a")
LEASE_S = 15.0


def goodbye(world: World, session: Session) -> Reason | None:
    """The reason of the goodbye that *session* hears last, if it hears one."""
    heard = world.heard(session)
    assert not any(isinstance(item, Goodbye) for item in heard[:-1]), "nothing follows a goodbye"
    return heard[-1].reason if heard and isinstance(heard[-1], Goodbye) else None


def value(data: bytes) -> Value:
    return Value(Payload(data), 1.0)


class TestOneSession:
    def test_puts_the_agent_into_force_under_its_generation(self, world: World) -> None:
        session = world.join("a", "echo")
        instance = world.sessions.instance(A)
        assert instance is session.instance
        assert instance is not None
        assert instance.active is session
        assert world.registry.get(A).generation == session.generation == instance.generation
        assert len(world.sessions) == 1

    def test_takes_the_record_with_it_when_it_ends(self, world: World) -> None:
        world.leave(world.join("a"))
        assert world.sessions.instance(A) is None
        assert len(world.sessions) == 0
        with pytest.raises(NoSuchAgent):
            world.registry.get(A)

    def test_can_be_noted_as_ended_twice(self, world: World) -> None:
        session = world.join("a")
        world.leave(session)
        again = world.join("a")
        world.leave(session)
        assert world.sessions.instance(A) is again.instance
        assert world.registry.get(A).generation == again.generation


class TestSameInstanceAgain:
    def test_new_session_takes_the_new_tasks_and_the_old_one_drains(self, world: World) -> None:
        old = world.join("a", max_concurrency=5)
        held = world.order("a")
        [first] = world.tasks(old)
        new = world.join("a", max_concurrency=5)
        assert new.instance is old.instance
        world.order("a")
        assert world.tasks(old) == []
        assert len(world.tasks(new)) == 1
        assert not old.over, "it drains as long as it has something open"
        world.answer(old, first)
        assert held.result().outcome == value(b"done")

    def test_idle_old_session_ends_with_replaced_at_once(self, world: World) -> None:
        old = world.join("a")
        world.join("a")
        assert goodbye(world, old) is Reason.REPLACED
        assert old.over
        assert old.link.failure is None

    def test_busy_old_session_ends_with_replaced_after_its_last_outcome(self, world: World) -> None:
        old = world.join("a", max_concurrency=5)
        orders = world.orders("a", 2)
        first, second = world.tasks(old)
        world.join("a", max_concurrency=5)
        world.answer(old, first)
        assert not old.over
        world.answer(old, second)
        assert goodbye(world, old) is Reason.REPLACED
        assert [order.result().outcome for order in orders] == [value(b"done")] * 2

    def test_outcome_may_arrive_on_either_session(self, world: World) -> None:
        old = world.join("a", max_concurrency=5)
        on_old, on_new = world.orders("a", 2)
        first, second = world.tasks(old)
        new = world.join("a", max_concurrency=5)
        world.answer(old, first, value(b"old"))
        world.answer(new, second, value(b"new"))
        assert (on_old.result().outcome, on_new.result().outcome) == (value(b"old"), value(b"new"))

    def test_old_session_whose_caller_gives_up_ends_too(self, world: World) -> None:
        old = world.join("a")
        order = world.order("a")
        world.tasks(old)
        world.join("a")
        world.cancel(order)
        assert old.over

    def test_old_stream_that_ends_later_takes_nothing_with_it(self, world: World) -> None:
        old = world.join("a")
        order = world.order("a")
        [task_id] = world.tasks(old)
        new = world.join("a")
        world.leave(old)
        assert world.sessions.instance(A) is new.instance
        assert world.registry.get(A).generation == new.generation
        assert not order.done()
        world.answer(new, task_id)
        assert order.result().outcome == value(b"done")

    def test_new_stream_that_ends_first_leaves_what_the_old_one_holds(self, world: World) -> None:
        old = world.join("a")
        order = world.order("a")
        [task_id] = world.tasks(old)
        new = world.join("a")
        world.leave(new)
        assert not order.done()
        world.answer(old, task_id)
        assert order.result().outcome == value(b"done")

    def test_old_session_is_given_nothing_new_even_if_the_new_one_ends(self, world: World) -> None:
        old = world.join("a", "echo", max_concurrency=5)
        held = world.order("a")
        world.tasks(old)
        world.leave(world.join("a", "echo", max_concurrency=5))
        for target in ("a", "capability:echo"):
            outcome = world.order(target).result().outcome
            assert isinstance(outcome, Failure)
            assert outcome.code is OutcomeCode.NO_AGENT
        assert world.heard(old) == []
        assert not held.done()

    def test_last_of_several_streams_to_end_loses_the_tasks(self, world: World) -> None:
        old = world.join("a")
        order = world.order("a")
        new = world.join("a")
        world.leave(old)
        world.leave(new)
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.AGENT_LOST

    @pytest.mark.parametrize("is_last", [False, True], ids=["first", "last"])
    def test_last_of_several_streams_to_end_says_whether_the_agent_was_revoked(
        self, world: World, *, is_last: bool
    ) -> None:
        """A certificate that was revoked takes nothing from an agent that goes on with another."""
        old, revoked = world.join("a"), Revoked("withdrawn")
        order = world.order("a")
        new = world.join("a")
        world.leave(old, None if is_last else revoked)
        assert not order.done()
        world.leave(new, revoked if is_last else None)
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is (OutcomeCode.REVOKED if is_last else OutcomeCode.AGENT_LOST)

    def test_is_no_take_over(self, world: World) -> None:
        for _ in range(MAX_TAKE_OVERS + 5):
            world.join("a")
        assert world.take_overs == []

    def test_may_describe_itself_anew(self, world: World) -> None:
        world.join("a", "old")
        world.join("a", "new")
        gone, found = world.order("capability:old"), world.order("capability:new")
        failure = gone.result().outcome
        assert isinstance(failure, Failure)
        assert failure.code is OutcomeCode.NO_AGENT
        assert not found.done()

    def test_after_it_was_lost_it_starts_anew(self, world: World) -> None:
        """What failed as AGENT_LOST cannot come back to life with the instance."""
        old = world.join("a")
        order = world.order("a")
        [task_id] = world.tasks(old)
        world.leave(old)
        new = world.join("a")
        assert new.instance is not old.instance
        world.answer(new, task_id)
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.AGENT_LOST


class TestTakeOver:
    def test_newest_wins_and_the_other_is_told(self, world: World) -> None:
        old = world.join("a", instance="first")
        new = world.join("a", instance="second")
        assert goodbye(world, old) is Reason.SUPERSEDED
        assert old.link.failure is None
        assert world.sessions.instance(A) is new.instance
        assert world.take_overs == [A]

    def test_every_session_of_the_old_instance_is_told(self, world: World) -> None:
        draining = world.join("a", max_concurrency=2)
        world.order("a")
        world.tasks(draining)
        active = world.join("a", max_concurrency=2)
        world.join("a", instance="second")
        assert [goodbye(world, session) for session in (draining, active)] == [Reason.SUPERSEDED] * 2

    def test_fails_what_the_old_instance_held_at_once(self, world: World) -> None:
        old = world.join("a")
        order = world.order("a")
        world.tasks(old)
        world.join("a", instance="second")
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.AGENT_LOST
        assert "another instance" in outcome.message

    def test_late_end_of_the_old_stream_takes_nothing_with_it(self, world: World) -> None:
        old = world.join("a", instance="first")
        new = world.join("a", instance="second")
        order = world.order("a")
        world.leave(old)
        assert world.sessions.instance(A) is new.instance
        assert world.registry.get(A).generation == new.generation
        assert not order.done()

    def test_fourth_within_a_minute_refuses_the_newcomer(self, world: World) -> None:
        session = world.join("a", instance="0")
        for number in range(1, MAX_TAKE_OVERS + 1):
            world.advance(1)
            session = world.join("a", instance=str(number))
        order = world.order("a")
        with pytest.raises(Superseded, match="stop one of them"):
            world.join("a", instance="too many")
        assert world.sessions.instance(A) is session.instance
        assert world.registry.get(A).generation == session.generation
        assert not session.over
        assert not order.done()
        assert world.take_overs == [A] * MAX_TAKE_OVERS

    def test_is_possible_again_once_the_first_is_a_minute_past(self, world: World) -> None:
        for number in range(MAX_TAKE_OVERS + 1):
            world.join("a", instance=str(number))
        world.advance(TAKE_OVER_WINDOW_S - 0.001)
        with pytest.raises(Superseded):
            world.join("a", instance="too soon")
        world.advance(0.001)
        session = world.join("a", instance="in time")
        assert world.sessions.instance(A) is session.instance

    def test_refused_newcomers_do_not_prolong_the_refusal(self, world: World) -> None:
        for number in range(MAX_TAKE_OVERS + 1):
            world.join("a", instance=str(number))
        for _ in range(10):
            world.advance(TAKE_OVER_WINDOW_S / 20)
            with pytest.raises(Superseded):
                world.join("a", instance="again")
        world.advance(TAKE_OVER_WINDOW_S / 2)
        world.join("a", instance="again")

    def test_window_slides(self, world: World) -> None:
        """Each take-over counts for a minute of its own."""
        world.join("a", instance="0")
        for number in range(1, 10):
            world.advance(TAKE_OVER_WINDOW_S / MAX_TAKE_OVERS)
            world.join("a", instance=str(number))
        assert len(world.take_overs) == 9

    def test_of_one_identity_does_not_count_for_another(self, world: World) -> None:
        for number in range(MAX_TAKE_OVERS + 1):
            world.join("a", instance=str(number))
        world.join("b", instance="first")
        world.join("b", instance="second")
        assert world.take_overs[-1] == AgentRef("b")

    def test_refused_instance_whose_rival_is_gone_may_come(self, world: World) -> None:
        for number in range(MAX_TAKE_OVERS + 1):
            session = world.join("a", instance=str(number))
            if number == MAX_TAKE_OVERS:
                world.leave(session)
        session = world.join("a", instance="next")
        assert world.sessions.instance(A) is session.instance

    def test_is_forgotten_after_the_window(self, world: World) -> None:
        world.join("a", instance="first")
        world.join("a", instance="second")
        world.advance(TAKE_OVER_WINDOW_S)
        world.expire()
        assert not world.sessions._take_overs


class TestLease:
    def test_expiry_ends_every_session_with_lease_expired(self, world: World) -> None:
        draining = world.join("a", max_concurrency=2)
        order = world.order("a")
        active = world.join("a", max_concurrency=2)
        world.advance(LEASE_S + 1)
        world.expire()
        for session in (draining, active):
            assert isinstance(session.link.failure, LeaseExpired)
            assert session.over
            assert goodbye(world, session) is None
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.AGENT_LOST
        assert "lease" in outcome.message
        assert world.sessions.instance(A) is None

    def test_expiry_touches_nobody_else(self, world: World) -> None:
        world.join("a")
        other = world.join("b")
        order = world.order("b")
        world.advance(LEASE_S + 1)
        world.registry.renew(AgentRef("b"), world.now)
        world.expire()
        assert not other.over
        assert not order.done()
        assert len(world.registry) == 1

    def test_stream_that_ends_after_expiry_does_not_touch_the_next_session(self, world: World) -> None:
        old = world.join("a")
        world.advance(LEASE_S + 1)
        world.expire()
        new = world.join("a")
        world.leave(old)
        assert world.sessions.instance(A) is new.instance
        assert world.registry.get(A).generation == new.generation

    def test_open_renews_it(self, world: World) -> None:
        world.join("a")
        world.advance(LEASE_S - 1)
        world.join("a")
        world.advance(LEASE_S - 1)
        world.expire()
        assert world.sessions.instance(A) is not None

    def test_tasks_given_do_not_renew_it(self, world: World) -> None:
        """Only the agent's own traffic does."""
        session = world.join("a", max_concurrency=9)
        for _ in range(4):
            world.advance(LEASE_S / 3)
            world.order("a")
        world.expire()
        assert isinstance(session.link.failure, LeaseExpired)


class TestRemoval:
    def test_ends_the_sessions_with_deregistered(self, world: World) -> None:
        session = world.join("a")
        order = world.order("a")
        world.tasks(session)
        assert world.sessions.remove(A)
        world.spin()
        assert goodbye(world, session) is Reason.DEREGISTERED
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.AGENT_LOST
        assert world.sessions.instance(A) is None

    def test_by_an_older_generation_has_no_effect(self, world: World) -> None:
        old = world.join("a")
        new = world.join("a")
        assert not world.sessions.remove(A, old.generation)
        assert not new.over
        assert world.registry.get(A).generation == new.generation

    def test_by_the_generation_in_force_has_effect(self, world: World) -> None:
        world.join("a")
        new = world.join("a")
        assert world.sessions.remove(A, new.generation)
        assert new.over

    def test_of_nobody_is_false(self, world: World) -> None:
        assert not world.sessions.remove(A)


class TestEnd:
    def test_ending_session_is_given_no_more_tasks(self, world: World) -> None:
        """Its stream lasts a little longer than its right to tasks."""
        session = world.join("a")
        world.sessions.end(session, InvalidRequest("bad frame"))
        outcome = world.order("a").result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.NO_AGENT

    def test_first_cause_counts(self, world: World) -> None:
        session = world.join("a")
        world.sessions.end(session, InvalidRequest("bad frame"))
        world.sessions.end(session, Goodbye(Reason.SHUTTING_DOWN, "bye"))
        assert isinstance(session.link.failure, InvalidRequest)
        assert goodbye(world, session) is None

    def test_of_one_session_leaves_the_other_of_the_instance(self, world: World) -> None:
        old = world.join("a", max_concurrency=3)
        order = world.order("a")
        [task_id] = world.tasks(old)
        new = world.join("a", max_concurrency=3)
        world.sessions.end(old, InvalidRequest("bad frame"))
        world.leave(old)
        assert not order.done()
        world.answer(new, task_id)
        assert order.result().outcome == value(b"done")

    def test_of_all_says_that_the_control_plane_stops(self, world: World) -> None:
        sessions = [world.join("a"), world.join("b")]
        world.sessions.end_all()
        assert [goodbye(world, session) for session in sessions] == [Reason.SHUTTING_DOWN] * 2

    def test_of_all_leaves_nobody_to_be_given_tasks(self, world: World) -> None:
        world.join("a", "echo")
        waiting = world.order("capability:other", wait=30)
        world.sessions.end_all()
        outcomes = [world.order(target).result().outcome for target in ("a", "capability:echo")]
        assert [o.code for o in outcomes if isinstance(o, Failure)] == [OutcomeCode.NO_AGENT] * 2
        assert not waiting.done()


class TestDrain:
    def test_draining_agent_is_given_nothing_and_keeps_what_it_holds(self, world: World) -> None:
        session = world.join("a", "echo", max_concurrency=5)
        order = world.order("a")
        [task_id] = world.tasks(session)
        world.sessions.drain(session)
        for target in ("a", "capability:echo"):
            outcome = world.order(target).result().outcome
            assert isinstance(outcome, Failure)
            assert outcome.code is OutcomeCode.NO_AGENT
        assert not any(isinstance(item, Assignment) for item in world.heard(session))
        world.answer(session, task_id)
        assert order.result().outcome == value(b"done")
        assert not session.over, "the agent ends it"

    def test_of_the_old_session_does_not_drain_the_new_one(self, world: World) -> None:
        old = world.join("a", max_concurrency=5)
        world.order("a")
        new = world.join("a", max_concurrency=5)
        world.sessions.drain(old)
        world.order("a")
        assert len(world.tasks(new)) == 1

    def test_does_not_wake_those_who_wait(self, world: World) -> None:
        session = world.join("a")
        world.sessions.drain(session)
        order = world.order("a", wait=30)
        world.sessions.drain(session)
        world.spin()
        assert not order.done()
