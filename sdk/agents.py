"""The fleet as a client sees it: one agent, which agents are meant, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final, Literal

from parallax.protos import registry_pb2
from parallax.runtime import wire
from parallax.runtime.description import check_capability
from parallax.security.errors import InvalidRequest
from parallax.security.identity import clip

_PREFIX: Final = "AGENT_STATE_"
_STATES: Final = {
    number: name.removeprefix(_PREFIX).lower() for name, number in registry_pb2.AgentState.items()
}
STATES: Final = ("ready", "draining", "registered")

Several = str | Sequence[str]  # one, or several
Labels = Mapping[str, str | None]  # None: with whatever value


@dataclass(frozen=True, slots=True)
class AgentInfo:
    """
    One agent as the control plane sees it.

    Args:
        agent_id: `agent-1`, or `anonymous/agent-1` when no certificate vouches for it.
        identity: Its URI; empty when unverified.
        endpoint: `host:port` where it serves directly; empty if it does not.
        state: `ready`, `draining` or `registered` (no session); `unspecified` if the control plane is
            newer than this program.
        generation: Of its session, or without one of its registration; rises with every new one.
    """

    agent_id: str
    identity: str
    verified: bool
    name: str
    capabilities: tuple[str, ...]
    labels: Mapping[str, str]
    metadata: Mapping[str, str]
    max_concurrency: int
    endpoint: str
    state: str
    generation: int
    registered_at: datetime
    in_flight: int

    @classmethod
    def from_proto(cls, agent: registry_pb2.Agent) -> AgentInfo:
        """Read a record."""
        description = wire.description_from_proto(agent.description)
        return cls(
            agent_id=agent.agent_id,
            identity=agent.identity,
            verified=agent.verified,
            name=description.display_name,
            capabilities=description.capabilities,
            labels=MappingProxyType(dict(description.labels)),
            metadata=MappingProxyType(dict(description.metadata)),
            max_concurrency=description.max_concurrency,
            endpoint=agent.endpoint,
            state=_STATES.get(agent.state, "unspecified"),
            generation=agent.generation,
            registered_at=agent.registered_at.ToDatetime(UTC),
            in_flight=agent.in_flight,
        )


@dataclass(frozen=True, slots=True)
class AgentEvent:
    """
    What became of an agent.

    Args:
        kind: `added`, `changed` or `removed`; `synced` when all has been told that was so when the
            watch began, or began again after the connection was lost.
        agent: As it now is; when removed, as it last was; None when synced.
    """

    kind: Literal["added", "changed", "removed", "synced"]
    agent: AgentInfo | None = None


def filter_to_proto(
    capability: Several, labels: Labels, state: Several, *, verified: bool | None
) -> registry_pb2.AgentFilter:
    """
    The filter for the wire.

    Raises:
        InvalidRequest: Something in it could not match any agent.
    """
    states = _several(state)
    for name in states:
        if name not in STATES:
            raise InvalidRequest(f"not a state: {clip(name)} (one of {', '.join(STATES)})")
    return registry_pb2.AgentFilter(
        capabilities=map(check_capability, _several(capability)),
        labels=[registry_pb2.LabelFilter(key=key, value=value) for key, value in labels.items()],
        states=[_PREFIX + name.upper() for name in states],
        verified=verified,
    )


class Known:
    """
    The agents that a watch has told of.

    A connection that is lost and resumed may tell things again, and one that cannot be resumed
    tells everything: here it becomes what differs from what is known.
    """

    def __init__(self) -> None:
        self._agents: dict[str, AgentInfo] = {}
        self._fresh: set[str] | None = None  # told again so far, while everything is
        self._is_synced = False  # as far as was told
        self._is_quiet = False  # the next time is no news

    def begin(self, *, resumes: bool = False) -> None:
        """
        Another stream begins: what an older one began to tell anew counts no more.

        Args:
            resumes: Where the older one, which did not break, was left: that it is synced is no news.
        """
        self._fresh = None
        self._is_synced = self._is_quiet = self._is_synced and resumes

    def learn(self, message: registry_pb2.AgentEvents) -> Iterator[AgentEvent]:
        """What *message* says that is not known yet."""
        if message.fresh:
            self._fresh = set()
        for event in message.events:
            if event.kind == registry_pb2.AGENT_EVENT_KIND_REMOVED:
                yield from self._remove(event.agent.agent_id)
            else:
                yield from self._put(AgentInfo.from_proto(event.agent))
        if message.synced:
            if self._fresh is not None:
                for agent_id in [each for each in self._agents if each not in self._fresh]:
                    yield from self._remove(agent_id)
                self._fresh = None
            self._is_synced, quiet, self._is_quiet = True, self._is_quiet, False
            if not quiet:
                yield AgentEvent("synced")

    def _put(self, agent: AgentInfo) -> Iterator[AgentEvent]:
        if self._fresh is not None:
            self._fresh.add(agent.agent_id)
        before = self._agents.get(agent.agent_id)
        self._agents[agent.agent_id] = agent
        if before is None:
            yield AgentEvent("added", agent)
        elif replace(before, in_flight=agent.in_flight) != agent:
            yield AgentEvent("changed", agent)

    def _remove(self, agent_id: str) -> Iterator[AgentEvent]:
        agent = self._agents.pop(agent_id, None)
        if agent is not None:
            yield AgentEvent("removed", agent)


def _several(given: Several) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
