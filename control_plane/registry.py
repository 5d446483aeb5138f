"""Which agents there are, and for how long without hearing from them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import count

from parallax.runtime.description import AgentDescription
from parallax.security.errors import LeaseExpired, NoSuchAgent
from parallax.security.identity import Identity, check_name

ANONYMOUS = "anonymous/"


@dataclass(frozen=True, slots=True, order=True)
class AgentRef:
    """
    How an agent is called within the control plane: `agent-1`, or `anonymous/agent-1`.

    The two never compare equal, so that an agent nobody vouches for cannot stand in
    for one whose certificate does.
    """

    name: str
    verified: bool = True

    @classmethod
    def parse(cls, text: str) -> AgentRef:
        """The agent spelled *text*; raises IdentityError."""
        name = text.removeprefix(ANONYMOUS)
        return cls(check_name(name), verified=name == text)

    def __str__(self) -> str:
        return self.name if self.verified else f"{ANONYMOUS}{self.name}"


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """
    One registered agent.

    Args:
        identity: What its certificate proved; None when unverified.
        endpoint: `host:port` where it serves directly; empty if it does not.
        generation: Rises with every registration and session.
    """

    ref: AgentRef
    identity: Identity | None
    description: AgentDescription
    endpoint: str
    generation: int
    registered_at: datetime


class Registry:
    """
    The records of all agents, each under a lease.

    A lease is renewed by the agent's own traffic and by nothing else. All leases are
    equally long, so the order of renewal is the order of expiry and no operation
    looks at more than the records it is about.

    Args:
        lease: How long an agent stays without a word from it.
    """

    def __init__(self, lease: timedelta) -> None:
        self.lease = lease
        self._records: dict[AgentRef, AgentRecord] = {}
        self._renewed: OrderedDict[AgentRef, float] = OrderedDict()  # seconds, monotonic; oldest first
        self._generations = count(1)

    def __len__(self) -> int:
        return len(self._records)

    def register(
        self,
        ref: AgentRef,
        identity: Identity | None,
        description: AgentDescription,
        *,
        endpoint: str = "",
        now: float,
        at: datetime,
    ) -> AgentRecord:
        """Enter *ref* under a new generation, in place of any older record."""
        record = AgentRecord(ref, identity, description, endpoint, next(self._generations), at)
        self._records[ref] = record
        self._renew(ref, now)
        return record

    def renew(self, ref: AgentRef, now: float, generation: int = 0) -> None:
        """
        Extend the lease of *ref*; *generation* 0 means whichever is in force.

        Raises:
            NoSuchAgent: It is not registered.
            LeaseExpired: That generation is not in force any more.
        """
        record = self.get(ref)
        if generation not in (0, record.generation):
            raise LeaseExpired(f"registration {generation} of {ref} is not in force any more; register again")
        self._renew(ref, now)

    def remove(self, ref: AgentRef, generation: int = 0) -> AgentRecord | None:
        """Take *ref* out, unless a newer registration than *generation* is in force; the record taken out."""
        record = self._records.get(ref)
        if record is None or generation not in (0, record.generation):
            return None
        del self._records[ref]
        del self._renewed[ref]
        return record

    def expire(self, now: float) -> list[AgentRecord]:
        """Take out every agent whose lease ran out, oldest first."""
        expired = []
        limit = now - self.lease.total_seconds()
        while self._renewed and next(iter(self._renewed.values())) < limit:
            ref, _ = self._renewed.popitem(last=False)
            expired.append(self._records.pop(ref))
        return expired

    def get(self, ref: AgentRef) -> AgentRecord:
        """The record of *ref*; raises NoSuchAgent."""
        try:
            return self._records[ref]
        except KeyError:
            raise NoSuchAgent(f"no agent {str(ref)!r} is registered; see `parallax agents list`") from None

    def endpoint(self, ref: AgentRef) -> str:
        """Where *ref* serves directly; empty if it does not, or is not registered."""
        record = self._records.get(ref)
        return record.endpoint if record else ""

    def records(self) -> list[AgentRecord]:
        """All records, ordered by name."""
        return [self._records[ref] for ref in sorted(self._records)]

    def _renew(self, ref: AgentRef, now: float) -> None:
        self._renewed[ref] = now
        self._renewed.move_to_end(ref)
