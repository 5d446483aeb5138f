"""An agent with a session and a direct registration: one record, whatever comes and goes in any order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from parallax.control_plane.registry import AgentRecord, AgentRef
from parallax.control_plane.sessions import Goodbye, Reason
from parallax.runtime.outcome import Failure, OutcomeCode
from parallax.security.errors import LeaseExpired, NoSuchAgent

if TYPE_CHECKING:
    from tests.control_plane.conftest import World

A = AgentRef("a")
LEASE_S = 15.0
THIRD_S = LEASE_S / 3


def only(world: World) -> AgentRecord:
    """The one record there is."""
    [record] = world.registry.records()
    return record


@pytest.mark.parametrize("registers_first", [True, False])
def test_session_and_registration_are_one_record(world: World, *, registers_first: bool) -> None:
    if registers_first:
        registration = world.register("a", "h:1")
        session = world.join("a")
    else:
        session = world.join("a")
        registration = world.register("a", "h:1")
    record = only(world)
    assert (record.endpoint, record.generation) == ("h:1", session.generation)
    assert record.registration is not None
    assert record.registration.generation == registration
    assert session.takes_tasks
    assert not session.over


def test_a_session_that_registers_can_still_end_and_take_the_record_with_it(world: World) -> None:
    session = world.join("a")
    generation = world.register("a", "h:1")
    assert world.registry.retract(A, generation)
    world.leave(session)
    assert world.registry.records() == []


def test_the_session_ends_and_the_registration_whose_heartbeats_go_on_stays(world: World) -> None:
    generation = world.register("a", "h:1")
    session = world.join("a")
    world.leave(session)
    for _ in range(9):
        world.advance(THIRD_S)
        world.heartbeat("a", generation)
        world.expire()
    record = only(world)
    assert (record.endpoint, record.generation, record.session) == ("h:1", generation, None)


def test_the_session_ends_and_the_registration_without_heartbeats_lapses(world: World) -> None:
    world.register("a", "h:1")
    world.leave(world.join("a"))
    world.advance(LEASE_S + 1)
    world.expire()
    assert world.registry.records() == []


def test_heartbeats_do_not_hide_that_the_session_is_silent(world: World) -> None:
    session = world.join("a")
    order = world.order("a")
    world.register("a", "h:1")
    for _ in range(4):
        world.advance(THIRD_S)
        world.heartbeat("a")
        world.expire()
    assert isinstance(session.link.failure, LeaseExpired)
    outcome = order.result().outcome
    assert isinstance(outcome, Failure)
    assert outcome.code is OutcomeCode.AGENT_LOST
    assert world.sessions.instance(A) is None
    assert only(world).endpoint == "h:1"
    world.leave(session)
    assert only(world).endpoint == "h:1", "the late end of its stream takes nothing more"


def test_frames_do_not_hide_that_nobody_serves_at_the_endpoint(world: World) -> None:
    session = world.join("a")
    order = world.order("a")
    [task_id] = world.tasks(session)
    generation = world.register("a", "h:1")
    for _ in range(4):
        world.advance(THIRD_S)
        world.frame(session)
        world.expire()
    assert (only(world).endpoint, only(world).generation) == ("", session.generation)
    assert not session.over
    with pytest.raises(LeaseExpired, match="register again"):
        world.heartbeat("a", generation)
    world.answer(session, task_id)
    assert not isinstance(order.result().outcome, Failure)


def test_registering_again_after_a_lapse_brings_the_endpoint_back(world: World) -> None:
    session = world.join("a")
    old = world.register("a", "h:1")
    for _ in range(4):
        world.advance(THIRD_S)
        world.frame(session)
        world.expire()
    new = world.register("a", "h:2")
    assert new > old
    assert (only(world).endpoint, only(world).generation) == ("h:2", session.generation)


def test_both_fall_silent_and_nothing_is_left(world: World) -> None:
    session = world.join("a")
    world.register("a", "h:1")
    world.advance(LEASE_S + 1)
    world.expire()
    assert world.registry.records() == []
    assert isinstance(session.link.failure, LeaseExpired)


def test_another_instance_takes_over_and_the_registration_stays(world: World) -> None:
    generation = world.register("a", "h:1")
    old = world.join("a", instance="first")
    new = world.join("a", instance="second")
    world.leave(old)
    record = only(world)
    assert (record.generation, record.endpoint) == (new.generation, "h:1")
    world.heartbeat("a", generation)


def test_a_reconnecting_session_does_not_touch_the_registration(world: World) -> None:
    old = world.join("a")
    generation = world.register("a", "h:1")
    new = world.join("a")
    world.leave(old)
    world.heartbeat("a", generation)
    assert (only(world).generation, only(world).endpoint) == (new.generation, "h:1")


def test_removal_takes_both_and_says_so_on_the_session(world: World) -> None:
    session = world.join("a")
    world.register("a", "h:1")
    assert world.sessions.remove(A, session.generation)
    world.spin()
    [*_, last] = world.heard(session)
    assert isinstance(last, Goodbye)
    assert last.reason is Reason.DEREGISTERED
    with pytest.raises(NoSuchAgent):
        world.heartbeat("a")
    world.leave(session)
    assert world.registry.records() == []


def test_what_it_says_beside_its_session_decides_what_it_is_given(world: World) -> None:
    session = world.join("a", "old")
    world.register("a", "h:1", "new")
    gone = world.order("capability:old").result().outcome
    assert isinstance(gone, Failure)
    assert gone.code is OutcomeCode.NO_AGENT
    order = world.order("capability:new")
    world.answer(session, world.task(session))
    assert not isinstance(order.result().outcome, Failure)


def test_what_an_agent_without_a_session_says_gives_it_no_tasks(world: World) -> None:
    world.register("a", "h:1", "echo")
    outcome = world.order("capability:echo").result().outcome
    assert isinstance(outcome, Failure)
    assert outcome.code is OutcomeCode.NO_AGENT


def test_a_registration_of_another_agent_is_not_touched(world: World) -> None:
    world.register("b", "h:2")
    world.leave(world.join("a"))
    world.join("anonymous/b")
    assert [str(r.ref) for r in world.registry.records() if r.endpoint] == ["b"]
