"""What a client makes of what a watch tells it."""

from __future__ import annotations

from typing import Any

import pytest

from parallax.protos import registry_pb2
from parallax.sdk.agents import Known, filter_to_proto
from parallax.security.errors import InvalidRequest

ADDED = registry_pb2.AGENT_EVENT_KIND_ADDED
CHANGED = registry_pb2.AGENT_EVENT_KIND_CHANGED
REMOVED = registry_pb2.AGENT_EVENT_KIND_REMOVED


def learn(known: Known, *agents: Any, kind: Any = ADDED, **message: Any) -> list[tuple[str, str]]:
    """What *known* makes of a message: kinds and ids."""
    events = [
        registry_pb2.AgentEvent(
            kind=kind,
            agent=each if isinstance(each, registry_pb2.Agent) else registry_pb2.Agent(agent_id=each),
        )
        for each in agents
    ]
    told = known.learn(registry_pb2.AgentEvents(events=events, **message))
    return [(event.kind, event.agent.agent_id if event.agent else "") for event in told]


@pytest.fixture
def known() -> Known:
    """Of a fleet of a and b."""
    known = Known()
    learn(known, "a", "b", fresh=True, synced=True)
    return known


def test_what_is_told_again_is_no_event(known: Known) -> None:
    assert learn(known, "a", kind=CHANGED) == []
    busier = registry_pb2.Agent(agent_id="a", in_flight=3)
    assert learn(known, busier, kind=CHANGED) == []


def test_what_differs_is_a_change_whatever_it_is_called(known: Known) -> None:
    assert learn(known, registry_pb2.Agent(agent_id="a", endpoint="h:1"), kind=ADDED) == [("changed", "a")]
    assert learn(known, "c", kind=CHANGED) == [("added", "c")]


def test_who_was_never_there_is_not_removed(known: Known) -> None:
    assert learn(known, "c", kind=REMOVED) == []
    assert learn(known, "a", kind=REMOVED) == [("removed", "a")]
    assert learn(known, "a", kind=REMOVED) == []


def test_a_fresh_telling_removes_who_is_not_in_it_once_it_is_complete(known: Known) -> None:
    assert learn(known, "c", fresh=True) == [("added", "c")]
    assert learn(known, "b") == []
    assert learn(known, synced=True) == [("removed", "a"), ("synced", "")]
    assert learn(known, synced=True) == [("synced", "")]


def test_a_fresh_telling_that_was_broken_off_removes_nobody(known: Known) -> None:
    learn(known, "c", fresh=True)
    known.begin()
    assert learn(known, synced=True) == [("synced", "")]


def test_an_event_of_a_kind_younger_than_this_program_tells_the_agent(known: Known) -> None:
    assert learn(known, "c", kind=99) == [("added", "c")]


def test_one_condition_needs_no_list() -> None:
    one = filter_to_proto("echo", {"zone": "a"}, "ready", verified=None)
    assert one == filter_to_proto(["echo"], {"zone": "a"}, ["ready"], verified=None)
    assert not one.HasField("verified")
    assert filter_to_proto((), {}, (), verified=False).HasField("verified")
    any_zone = filter_to_proto((), {"zone": None}, (), verified=None).labels[0]
    assert not any_zone.HasField("value")


@pytest.mark.parametrize(
    ("capability", "state"), [("", ()), ("A", ()), ((), "READY"), ((), ""), ((), "unspecified")]
)
def test_a_condition_that_no_agent_can_fulfil_is_refused(capability: Any, state: Any) -> None:
    with pytest.raises(InvalidRequest):
        filter_to_proto(capability, {}, state, verified=None)
