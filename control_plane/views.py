"""What readers see of an agent, and which agents they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType

from parallax.control_plane.registry import AgentRecord, AgentRef, Registry
from parallax.control_plane.sessions import Instance, Sessions
from parallax.runtime.description import MAX_ENTRIES, check_capability
from parallax.security.errors import InvalidRequest


class State(Enum):
    """What an agent can be given right now."""

    READY = auto()
    DRAINING = auto()
    REGISTERED = auto()


def state_of(instance: Instance | None) -> State:
    """The state of the agent whose instance in force is *instance*."""
    if instance is None:
        return State.REGISTERED
    return State.DRAINING if instance.active is None else State.READY


@dataclass(frozen=True, slots=True)
class AgentView:
    """One agent as readers see it."""

    record: AgentRecord
    state: State


@dataclass(frozen=True, slots=True)
class AgentFilter:
    """
    Which agents are meant: those that fulfil everything that is stated.

    Args:
        capabilities: All of them.
        labels: All of these stated labels; None for a value means any.
        states: One of them; none means any.
        verified: Whether a certificate proved the identity; None means either.

    Raises:
        InvalidRequest: A capability is none, or there are more than 64 of them or of labels.
    """

    capabilities: frozenset[str] = frozenset()
    labels: Mapping[str, str | None] = field(default_factory=lambda: MappingProxyType({}))
    states: frozenset[State] = frozenset()
    verified: bool | None = None

    def __post_init__(self) -> None:
        for name, entries in (("capabilities", self.capabilities), ("labels", self.labels)):
            if len(entries) > MAX_ENTRIES:
                raise InvalidRequest(f"the filter has {len(entries)} {name}, more than {MAX_ENTRIES}")
        for capability in self.capabilities:
            check_capability(capability)

    def matches(self, record: AgentRecord, state: State) -> bool:
        """Whether an agent of that *record*, in that *state*, is meant."""
        labels = record.description.labels
        return (
            self.verified in (None, record.ref.verified)
            and (not self.states or state in self.states)
            and self.capabilities.issubset(record.description.capabilities)
            and all(key in labels and value in (None, labels[key]) for key, value in self.labels.items())
        )


class Views:
    """The registry's records with the state that the sessions give them."""

    def __init__(self, registry: Registry, sessions: Sessions) -> None:
        self._registry = registry
        self._sessions = sessions

    def find(self, ref: AgentRef) -> AgentView | None:
        """The agent *ref*, if it is there."""
        record = self._registry.find(ref)
        return None if record is None else self.of(record)

    def of(self, record: AgentRecord) -> AgentView:
        """The agent of that *record*."""
        return AgentView(record, state_of(self._sessions.instance(record.ref)))

    def after(self, ref: AgentRef | None, limit: int) -> list[AgentView]:
        """The *limit* agents that follow *ref*, which need not be there, in their order; None: the first."""
        return [self.of(record) for record in self._registry.after(ref, limit)]
