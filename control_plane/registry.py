"""Which agents there are, and for how long without hearing from them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from enum import Enum
from itertools import count

from parallax.runtime.description import AgentDescription
from parallax.security.errors import LeaseExpired, NoSuchAgent
from parallax.security.identity import Identity, check_name
from parallax.security.verification import Peer

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

    def __hash__(self) -> int:
        return hash(self.name)  # which knows it already; a record of fields works it out each time

    def __str__(self) -> str:
        return self.name if self.verified else f"{ANONYMOUS}{self.name}"


class Way(Enum):
    """How an agent can be there."""

    SESSION = "session"
    REGISTRATION = "registration"


@dataclass(frozen=True, slots=True)
class Presence:
    """
    An agent's being there in one way.

    Args:
        generation: Rises with every session and every registration, of all agents together.
        proof: Of a registration: what its last sign of life was proved with; None if nothing vouches for it.
    """

    generation: int
    since: datetime
    proof: Peer | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class AgentRecord:
    """
    One agent that is there: by a session, by a direct registration, or by both.

    Args:
        identity: What its certificate proved; None when unverified.
        description: What it said last, in whichever way.
        endpoint: `host:port` where it serves directly; empty if it does not.
        session: Its newest session.
        registration: Its direct registration; the endpoint comes and goes with it.
    """

    ref: AgentRef
    identity: Identity | None
    description: AgentDescription
    endpoint: str = ""
    session: Presence | None = None
    registration: Presence | None = None

    @property
    def presence(self) -> Presence:
        """What the record is known by: the session, or without one the registration."""
        presence = self.session or self.registration
        assert presence is not None, "a record goes with its last presence"  # noqa: S101 - our own bug
        return presence

    @property
    def generation(self) -> int:
        """Of its presence."""
        return self.presence.generation


class Registry:
    """
    The records of all agents, each there for as long as something keeps it.

    One agent has one record. It is kept by a session (`connect`), by a direct registration
    (`register`), or by both, each under a generation and a lease of its own:

    - Frames renew the session's lease (`renew`), heartbeats the registration's (`heartbeat`),
      and nothing else does: neither keeps the other alive.
    - When the session ends or its lease runs out, the registration stays; when the registration is
      taken back or its lease runs out, the session stays, and the endpoint goes. The record goes
      with the last of the two.
    - Registering beside a session replaces description and endpoint, not the session's generation.
      A new session replaces the description, not the endpoint.
    - `remove` by the record's generation, or by none, takes out the agent, whatever keeps it;
      `retract` takes back the registration alone.

    All leases are equally long, so the order of renewal is the order of expiry and no operation
    looks at more than the records it is about. References are kept in order as they come and go.

    Args:
        lease: How long each way of being there lasts without a word from the agent.
        on_change: Told whose record appeared, changed or went.
    """

    def __init__(self, lease: timedelta, on_change: Callable[[AgentRef], None] = lambda _: None) -> None:
        self.lease = lease
        self.on_change = on_change
        self._records: dict[AgentRef, AgentRecord] = {}
        self._order: list[AgentRef] = []
        # Seconds, monotonic; oldest first.
        self._renewed: OrderedDict[tuple[AgentRef, Way], float] = OrderedDict()
        self._generations = count(1)

    def __len__(self) -> int:
        return len(self._records)

    # By a session.

    def connect(
        self,
        ref: AgentRef,
        identity: Identity | None,
        description: AgentDescription,
        *,
        now: float,
        at: datetime,
    ) -> AgentRecord:
        """Enter *ref* by a new session, which takes the place of an older one."""
        record = self._records.get(ref) or AgentRecord(ref, identity, description)
        session = Presence(next(self._generations), at)
        return self._enter(replace(record, description=description, session=session), Way.SESSION, now)

    def renew(self, ref: AgentRef, now: float) -> None:
        """Extend the lease of the session of *ref*; raises NoSuchAgent if there is none."""
        if (ref, Way.SESSION) not in self._renewed:
            raise _unknown(ref)
        self._renew(ref, Way.SESSION, now)

    def disconnect(self, ref: AgentRef, generation: int) -> None:
        """Take note that the session *generation* of *ref* is over; a newer one stays."""
        record = self._records.get(ref)
        if record is not None and record.session is not None and record.session.generation == generation:
            del self._renewed[ref, Way.SESSION]
            self._without(record, Way.SESSION)

    # By a direct registration.

    def register(
        self,
        ref: AgentRef,
        identity: Identity | None,
        description: AgentDescription,
        *,
        endpoint: str = "",
        now: float,
        at: datetime,
        proof: Peer | None = None,
    ) -> Presence:
        """Enter *ref* by a new registration, which takes the place of an older one."""
        record = self._records.get(ref) or AgentRecord(ref, identity, description)
        registration = Presence(next(self._generations), at, proof)
        record = replace(record, description=description, endpoint=endpoint, registration=registration)
        self._enter(record, Way.REGISTRATION, now)
        return registration

    def heartbeat(self, ref: AgentRef, now: float, generation: int = 0, proof: Peer | None = None) -> None:
        """
        Extend the lease of the registration of *ref*; *generation* 0 means whichever is in force.

        Args:
            proof: What it is proved with by now.

        Raises:
            NoSuchAgent: It is not there at all.
            LeaseExpired: That registration is not in force any more, or there is only a session.
        """
        record = self.get(ref)
        registration = record.registration
        if registration is None:
            raise LeaseExpired(f"{ref} has no registration in force; register again")
        if generation not in (0, registration.generation):
            raise LeaseExpired(f"registration {generation} of {ref} is not in force any more; register again")
        if proof is not registration.proof:
            self._records[ref] = replace(record, registration=replace(registration, proof=proof))
        self._renew(ref, Way.REGISTRATION, now)

    def unregister(self, ref: AgentRef) -> None:
        """End the registration of *ref*, if it has one; a session stays."""
        record = self._records.get(ref)
        if record is not None and record.registration is not None:
            del self._renewed[ref, Way.REGISTRATION]
            self._without(record, Way.REGISTRATION)

    def retract(self, ref: AgentRef, generation: int) -> bool:
        """Take back the registration *generation* that stands beside a session; whether there was one."""
        record = self._records.get(ref)
        if record is None or record.session is None or record.registration is None:
            return False
        if record.registration.generation != generation:
            return False
        del self._renewed[ref, Way.REGISTRATION]
        self._without(record, Way.REGISTRATION)
        return True

    # By either.

    def remove(self, ref: AgentRef, generation: int = 0) -> AgentRecord | None:
        """Take *ref* out, unless the record's generation is another than stated; the record taken out."""
        record = self._records.get(ref)
        if record is None or generation not in (0, record.generation):
            return None
        for way in Way:
            self._renewed.pop((ref, way), None)
        self._leave(record)
        return record

    def expire(self, now: float) -> list[AgentRecord]:
        """
        End every presence whose lease ran out.

        The records, as they were, of those who lost their session or are gone, oldest first;
        a registration that lapses beside a session takes only the endpoint with it.
        """
        expired: dict[AgentRef, AgentRecord] = {}
        limit = now - self.lease.total_seconds()
        while self._renewed and next(iter(self._renewed.values())) < limit:
            (ref, way), _ = self._renewed.popitem(last=False)
            record = self._records[ref]
            left = self._without(record, way)
            if way is Way.SESSION or left is None:
                expired.setdefault(ref, record)
        return list(expired.values())

    # Reading.

    def get(self, ref: AgentRef) -> AgentRecord:
        """The record of *ref*; raises NoSuchAgent."""
        record = self._records.get(ref)
        if record is None:
            raise _unknown(ref)
        return record

    def find(self, ref: AgentRef) -> AgentRecord | None:
        """The record of *ref*, if it is there."""
        return self._records.get(ref)

    def records(self) -> list[AgentRecord]:
        """All records, ordered by name."""
        return [self._records[ref] for ref in self._order]

    def after(self, ref: AgentRef | None, limit: int) -> list[AgentRecord]:
        """The *limit* records that follow *ref*, which need not be there, in their order; None: the first."""
        begin = 0 if ref is None else bisect_right(self._order, ref)
        return [self._records[each] for each in self._order[begin : begin + limit]]

    def _enter(self, record: AgentRecord, way: Way, now: float) -> AgentRecord:
        if record.ref not in self._records:
            insort(self._order, record.ref)
        self._records[record.ref] = record
        self._renew(record.ref, way, now)
        self.on_change(record.ref)
        return record

    def _without(self, record: AgentRecord, way: Way) -> AgentRecord | None:
        """Let *record* be there in one way less, whose lease is gone already; None if it is gone with it."""
        if way is Way.SESSION:
            left = replace(record, session=None)
        else:
            left = replace(record, registration=None, endpoint="")
        if left.session is None and left.registration is None:
            self._leave(record)
            return None
        self._records[record.ref] = left
        self.on_change(record.ref)
        return left

    def _leave(self, record: AgentRecord) -> None:
        del self._records[record.ref]
        del self._order[bisect_left(self._order, record.ref)]
        self.on_change(record.ref)

    def _renew(self, ref: AgentRef, way: Way, now: float) -> None:
        self._renewed[ref, way] = now
        self._renewed.move_to_end((ref, way))


def _unknown(ref: AgentRef) -> NoSuchAgent:
    return NoSuchAgent(f"no agent {str(ref)!r} is registered; see `parallax agents list`")
