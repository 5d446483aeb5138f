"""An agent's link as the control plane hears it: who it is, what it holds, and whose answers count."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from parallax.control_plane.agent_link import VALUE_OVERHEAD_BYTES, AgentLink, Fleet
from parallax.control_plane.registry import AgentRef
from parallax.control_plane.sessions import Reason
from parallax.protos import link_pb2, registry_pb2
from parallax.runtime.caller import Anonymous, Caller
from parallax.runtime.executor import MAX_MESSAGE_CHARS, MAX_TYPE_CHARS
from parallax.runtime.outcome import Failure, OutcomeCode, Payload, Value
from parallax.runtime.protocol import hello
from parallax.runtime.wire import encode_value
from parallax.security.errors import (
    IdentityError,
    InvalidRequest,
    InvalidTransition,
    NoSuchAgent,
    NotAuthorized,
    ParallaxError,
    Superseded,
)
from tests.control_plane.test_authorization import peer

if TYPE_CHECKING:
    from tests.control_plane.conftest import World

Frame = link_pb2.LinkFrame
LIMIT = 1000
DONE = Value(Payload(b"done"), 1.0)
VALUE = encode_value(DONE)


class Agent:
    """A link with the agent's mouth and ears."""

    def __init__(self, world: World, name: str = "a", caller: Caller | None = None) -> None:
        self.world = world
        self.name = name
        fleet = Fleet(
            world.registry, world.sessions, world.dispatcher, world.wall_clock, LIMIT, timedelta(seconds=30)
        )
        self.end = AgentLink(fleet, caller or peer(f"agent/{name}"))

    def say(self, frame: Frame) -> None:
        self.end.link.hear(frame)

    def hello(self, **options: Any) -> link_pb2.Hello:
        message = hello()
        message.instance_id = options.pop("instance_id", b"i" * 16)
        for key, value in options.items():
            if key == "held_task_ids":
                message.held_task_ids.extend(value)
            elif key == "description":
                message.description.CopyFrom(value)
            else:
                setattr(message, key, value)
        return message

    def greet(self, **options: Any) -> Agent:
        self.say(Frame(hello=self.hello(**options)))
        return self

    def read(self) -> Frame:
        """All that was said since it was last asked, as one frame."""
        merged = Frame()
        while (frame := self.end.link.take()) is not None:
            merged.MergeFrom(frame)
        return merged

    def task(self) -> link_pb2.Task:
        [task] = self.read().tasks
        return task

    def answer(self, task_id: int, **result: Any) -> None:
        self.say(Frame(outcomes=[link_pb2.TaskOutcome(task_id=task_id, **result)]))
        self.world.spin()


@pytest.fixture
def agent(world: World) -> Agent:
    agent = Agent(world).greet()
    agent.read()
    return agent


class TestGreeting:
    def test_opens_a_session_and_tells_its_terms(self, world: World) -> None:
        agent = Agent(world).greet()
        session = agent.end.session
        assert session is not None
        assert agent.read().welcome == link_pb2.Welcome(
            protocol_version=1,
            generation=session.generation,
            agent_id="a",
            lease_ms=15_000,
            heartbeat_ms=5_000,
            max_payload_bytes=LIMIT,
        )

    def test_comes_before_tasks_that_waited_for_it(self, world: World) -> None:
        world.order("a", wait=30)
        agent = Agent(world).greet()
        first = agent.end.link.take()
        assert first is not None
        assert first.HasField("welcome")
        assert not first.tasks
        assert len(agent.read().tasks) == 1

    @pytest.mark.parametrize(
        ("options", "error"),
        [
            ({"instance_id": b""}, InvalidRequest),
            ({"instance_id": b"i" * 15}, InvalidRequest),
            ({"instance_id": b"i" * 17}, InvalidRequest),
            ({"protocol_version": 0}, InvalidTransition),
            ({"protocol_version": 9, "min_protocol_version": 8}, InvalidTransition),
            ({"description": registry_pb2.AgentDescription(agent_id="b")}, NotAuthorized),
            ({"description": registry_pb2.AgentDescription(capabilities=["A b"])}, InvalidRequest),
        ],
    )
    def test_that_is_refused_leaves_nothing(
        self, world: World, options: dict[str, Any], error: type[ParallaxError]
    ) -> None:
        agent = Agent(world)
        with pytest.raises(error):
            agent.greet(**options)
        agent.end.over()
        assert len(world.sessions) == len(world.registry) == 0
        assert agent.end.session is None

    def test_of_somebody_without_a_certificate_is_that_of_an_unverified_agent(self, world: World) -> None:
        stated = registry_pb2.AgentDescription(agent_id="a")
        agent = Agent(world, caller=Anonymous()).greet(description=stated)
        assert agent.read().welcome.agent_id == "anonymous/a"
        with pytest.raises(IdentityError):
            Agent(world, caller=Anonymous()).greet()

    def test_names_what_is_held_and_the_rest_is_lost(self, world: World) -> None:
        many = registry_pb2.AgentDescription(max_concurrency=4)
        old = Agent(world).greet(description=many)
        kept, lost = world.orders("a", 2)
        first, _ = (task.id for task in old.read().tasks)
        new = Agent(world).greet(description=many, sole=True, held_task_ids=[first, 99, 2**64 - 1])
        world.spin()
        assert not kept.done()
        outcome = lost.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.AGENT_LOST
        assert old.read().goodbye.reason == Reason.REPLACED.value
        assert sorted(new.read().cancelled_task_ids) == [99, 2**64 - 1]
        new.answer(first, value=VALUE)
        assert kept.result().outcome == DONE

    def test_that_does_not_say_what_is_held_loses_nothing(self, world: World) -> None:
        old = Agent(world).greet()
        order = world.order("a")
        task = old.task()
        new = Agent(world).greet()
        new.answer(task.id, value=VALUE)
        assert order.result().outcome == DONE

    def test_names_tasks_of_others_in_vain(self, world: World, agent: Agent) -> None:
        """Neither does it get hold of them, nor are they taken from who has them."""
        order = world.order("a")
        task = agent.task()
        other = Agent(world, "b").greet(sole=True, held_task_ids=[task.id])
        assert list(other.read().cancelled_task_ids) == [task.id]
        agent.answer(task.id, value=VALUE)
        assert order.result().outcome == DONE

    def test_of_a_fourth_host_within_a_minute_is_refused(self, world: World) -> None:
        for number in range(4):
            Agent(world).greet(instance_id=bytes([number]) * 16)
        with pytest.raises(Superseded):
            Agent(world).greet(instance_id=b"x" * 16)


class TestBroken:
    """What an agent says of a session that broke off while another was open."""

    @pytest.fixture
    def many(self) -> registry_pb2.AgentDescription:
        return registry_pb2.AgentDescription(max_concurrency=8)

    def test_session_loses_what_was_given_on_it_and_is_not_held(
        self, world: World, many: registry_pb2.AgentDescription
    ) -> None:
        old = Agent(world).greet(description=many)
        generation = old.read().welcome.generation
        held, lost = world.orders("a", 2)
        first, _ = (task.id for task in old.read().tasks)
        new = Agent(world).greet(description=many)
        later = world.order("a")
        [third] = new.read().tasks
        new.say(Frame(broken=link_pb2.Broken(generation=generation, held_task_ids=[first])))
        world.spin()
        outcome = lost.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.AGENT_LOST
        assert not held.done()
        assert not later.done()
        new.answer(first, value=VALUE)
        new.answer(third.id, value=VALUE)
        assert (held.result().outcome, later.result().outcome) == (DONE, DONE)
        assert old.read().goodbye.reason == Reason.REPLACED.value

    def test_session_of_no_such_generation_loses_nothing(self, world: World, agent: Agent) -> None:
        order = world.order("a")
        task = agent.task()
        agent.say(Frame(broken=link_pb2.Broken(generation=2**64 - 1)))
        agent.answer(task.id, value=VALUE)
        assert order.result().outcome == DONE

    def test_session_of_another_agent_loses_nothing(self, world: World, agent: Agent) -> None:
        order = world.order("a")
        task = agent.task()
        generation = agent.end.session.generation if agent.end.session else 0
        other = Agent(world, "b").greet()
        other.say(Frame(broken=link_pb2.Broken(generation=generation)))
        world.spin()
        assert not order.done()
        agent.answer(task.id, value=VALUE)
        assert order.result().outcome == DONE

    def test_session_that_holds_more_than_there_may_be_breaks_the_protocol(self, agent: Agent) -> None:
        with pytest.raises(InvalidRequest, match="there may be"):
            agent.say(Frame(broken=link_pb2.Broken(held_task_ids=range(70_000))))


class TestOutcome:
    @pytest.mark.parametrize(
        "result",
        [{"value": b""}, {"parts": 0}, {"failure": {"code": "OUTCOME_CODE_CANCELLED"}}, {}],
        ids=lambda result: next(iter(result), "nothing"),
    )
    def test_of_any_kind_ends_the_task(self, world: World, agent: Agent, result: dict[str, Any]) -> None:
        order = world.order("a")
        agent.answer(agent.task().id, **result)
        assert order.done()
        assert not world.dispatcher._given

    def test_without_content_is_a_value_all_the_same(self, world: World, agent: Agent) -> None:
        """All its fields may have their defaults."""
        order = world.order("a")
        agent.answer(agent.task().id, value=b"")
        assert order.result().outcome == Value(Payload(b""), 0.0)

    def test_that_is_no_value_fails_its_task_only(self, world: World, agent: Agent) -> None:
        order = world.order("a")
        agent.answer(agent.task().id, value=b"\xff")
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.INVALID_RESULT

    @pytest.mark.parametrize("more", [0, 1])
    def test_may_be_so_large(self, world: World, agent: Agent, more: int) -> None:
        overhead = len(encode_value(Value(Payload(b"x" * LIMIT), 1.0))) - LIMIT
        value = Value(Payload(b"x" * (LIMIT + VALUE_OVERHEAD_BYTES - overhead + more)), 1.0)
        order = world.order("a")
        agent.answer(agent.task().id, value=encode_value(value))
        assert (order.result().outcome == value) == (not more)

    def test_that_fails_says_no_more_than_a_sentence(self, world: World, agent: Agent) -> None:
        order = world.order("a")
        failure = {
            "code": "OUTCOME_CODE_HANDLER_FAILED",
            "message": "m" * 100_000,
            "error_type": "T" * 100_000,
        }
        agent.answer(agent.task().id, failure=failure)
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert (len(outcome.message), len(outcome.error_type)) == (MAX_MESSAGE_CHARS, MAX_TYPE_CHARS)

    def test_for_a_task_of_another_agent_ends_the_link(self, world: World, agent: Agent) -> None:
        world.order("a")
        task = agent.task()
        other = Agent(world, "b").greet()
        with pytest.raises(NotAuthorized):
            other.answer(task.id, value=VALUE)
        with pytest.raises(NotAuthorized):
            other.say(Frame(parts=[link_pb2.Part(task_id=task.id, value=b"x")]))

    def test_of_a_superseded_session_renews_nobody_elses_lease(self, world: World, agent: Agent) -> None:
        Agent(world).greet(instance_id=b"j" * 16)
        leases = dict(world.registry._renewed)
        agent.say(Frame())
        assert dict(world.registry._renewed) == leases

    def test_for_nothing_is_passed_over(self, world: World, agent: Agent) -> None:
        agent.answer(0, value=VALUE)
        agent.answer(2**64 - 1, value=VALUE)
        assert world.results == []
        order = world.order("a")
        agent.answer(agent.task().id, value=VALUE)
        world.spin()
        assert order.result().outcome == DONE

    def test_twice_counts_once(self, world: World, agent: Agent) -> None:
        order = world.order("a")
        task = agent.task()
        agent.say(Frame(outcomes=[link_pb2.TaskOutcome(task_id=task.id, value=VALUE)] * 3))
        world.spin()
        assert order.result().outcome == DONE
        assert [code for code, _ in world.results] == ["OK"]


class TestParts:
    def test_come_before_the_outcome_of_the_same_frame(self, world: World, agent: Agent) -> None:
        order = world.order("a", part_credit=100)
        task = agent.task()
        assert task.part_credit == 100
        agent.say(
            Frame(
                outcomes=[link_pb2.TaskOutcome(task_id=task.id, parts=2)],
                parts=[
                    link_pb2.Part(task_id=task.id, value=b"1"),
                    link_pb2.Part(task_id=task.id, value=b"2"),
                ],
            )
        )
        world.spin()
        assert world.listeners[world.placed[order]].parts == [b"1", b"2"]
        assert order.done()

    def test_that_are_too_large_end_the_task_at_both_ends(self, world: World, agent: Agent) -> None:
        order = world.order("a", part_credit=10_000)
        task = agent.task()
        part = link_pb2.Part(task_id=task.id, value=b"x" * (LIMIT + VALUE_OVERHEAD_BYTES + 1))
        agent.say(Frame(parts=[part, part]))
        world.spin()
        outcome = order.result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.INVALID_RESULT
        assert list(agent.read().cancelled_task_ids) == [task.id]

    def test_beyond_the_credit_end_the_task_at_both_ends(self, world: World, agent: Agent) -> None:
        order = world.order("a", part_credit=1)
        task = agent.task()
        agent.say(Frame(parts=[link_pb2.Part(task_id=task.id, value=b"xy")] * 3))
        world.spin()
        assert isinstance(order.result().outcome, Failure)
        assert list(agent.read().cancelled_task_ids) == [task.id]
        assert world.listeners[world.placed[order]].parts == [b"xy"]


class TestLife:
    def test_draining_agent_gets_nothing_new(self, world: World, agent: Agent) -> None:
        agent.say(Frame(draining=True))
        agent.say(Frame(draining=True))
        outcome = world.order("a").result().outcome
        assert isinstance(outcome, Failure)
        assert outcome.code is OutcomeCode.NO_AGENT
        assert not agent.read().tasks

    def test_frame_after_the_agent_was_removed_ends_the_link(self, world: World) -> None:
        agent = Agent(world).greet()
        world.sessions.remove(AgentRef("a"))
        with pytest.raises(NoSuchAgent):
            agent.say(Frame())

    def test_tasks_are_not_an_agents_to_give(self, agent: Agent) -> None:
        for frame in (
            Frame(tasks=[link_pb2.Task(id=1)]),
            Frame(cancelled_task_ids=[1]),
            Frame(credits=[link_pb2.Credit()]),
            Frame(welcome=link_pb2.Welcome()),
        ):
            with pytest.raises(InvalidRequest):
                agent.say(frame)

    def test_stream_that_is_over_is_given_nothing_more(self, world: World, agent: Agent) -> None:
        agent.end.over()
        assert isinstance(world.order("a").result().outcome, Failure)
        assert not agent.read().tasks

    def test_task_whose_time_is_up_is_cancelled_behind_it(self, world: World, agent: Agent) -> None:
        world.order("a", timeout=5)
        world.advance(5)
        frame = agent.read()
        assert [task.id for task in frame.tasks] == list(frame.cancelled_task_ids)
        assert frame.tasks[0].timeout_ms == timedelta(seconds=5) // timedelta(milliseconds=1)
