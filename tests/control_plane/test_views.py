"""Which agents a filter means."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from parallax.control_plane.registry import AgentRecord, AgentRef, Presence
from parallax.control_plane.views import AgentFilter, State
from parallax.runtime.description import AgentDescription
from parallax.security.errors import InvalidRequest

NOW = Presence(1, datetime(2026, 1, 1, tzinfo=UTC))
DESCRIPTION = AgentDescription("", ("echo", "sum"), {"zone": "a", "gpu": ""})
RECORD = AgentRecord(AgentRef("a"), None, DESCRIPTION, session=NOW)
STRANGER = AgentRecord(AgentRef("a", verified=False), None, DESCRIPTION, session=NOW)


@pytest.mark.parametrize(
    "wanted",
    [
        AgentFilter(),
        AgentFilter(capabilities=frozenset({"echo"})),
        AgentFilter(capabilities=frozenset({"echo", "sum"})),
        AgentFilter(labels={"zone": "a"}),
        AgentFilter(labels={"zone": None}),
        AgentFilter(labels={"gpu": ""}),
        AgentFilter(labels={"zone": "a", "gpu": None}),
        AgentFilter(states=frozenset({State.READY})),
        AgentFilter(states=frozenset({State.READY, State.DRAINING})),
        AgentFilter(verified=True),
        AgentFilter(frozenset({"echo"}), {"zone": "a"}, frozenset({State.READY}), verified=True),
    ],
)
def test_an_agent_that_fulfils_everything_is_meant(wanted: AgentFilter) -> None:
    assert wanted.matches(RECORD, State.READY)


@pytest.mark.parametrize(
    "wanted",
    [
        AgentFilter(capabilities=frozenset({"ech"})),
        AgentFilter(capabilities=frozenset({"echo", "other"})),
        AgentFilter(labels={"zone": "b"}),
        AgentFilter(labels={"zone": ""}),
        AgentFilter(labels={"Zone": "a"}),
        AgentFilter(labels={"zone": "a", "other": None}),
        AgentFilter(states=frozenset({State.DRAINING})),
        AgentFilter(verified=False),
        AgentFilter(frozenset({"echo"}), {"zone": "a"}, frozenset({State.REGISTERED}), verified=True),
        AgentFilter(frozenset({"echo"}), {"zone": "a"}, frozenset({State.READY}), verified=False),
    ],
)
def test_an_agent_that_lacks_one_thing_is_not(wanted: AgentFilter) -> None:
    assert not wanted.matches(RECORD, State.READY)


def test_an_agent_nobody_vouches_for_is_meant_unless_verified_is_asked_for() -> None:
    assert AgentFilter().matches(STRANGER, State.READY)
    assert AgentFilter(verified=False).matches(STRANGER, State.READY)
    assert not AgentFilter(verified=True).matches(STRANGER, State.READY)


def test_metadata_is_no_label() -> None:
    record = AgentRecord(AgentRef("a"), None, AgentDescription(metadata={"zone": "a"}), session=NOW)
    assert not AgentFilter(labels={"zone": None}).matches(record, State.READY)


def test_a_filter_that_can_match_nobody_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="not a capability"):
        AgentFilter(capabilities=frozenset({"no such thing"}))
    with pytest.raises(InvalidRequest, match="65 labels, more than 64"):
        AgentFilter(labels={str(n): None for n in range(65)})
    with pytest.raises(InvalidRequest, match="65 capabilities, more than 64"):
        AgentFilter(capabilities=frozenset(f"c{n}" for n in range(65)))
