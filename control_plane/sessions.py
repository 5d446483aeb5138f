"""Who is connected: sessions, the instances they belong to, and who takes over from whom."""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final, Protocol

from parallax.control_plane.fair_queue import FairQueue
from parallax.control_plane.registry import AgentRef, Registry
from parallax.protos import link_pb2
from parallax.runtime.description import AgentDescription
from parallax.runtime.link import Link
from parallax.security.errors import LeaseExpired, ParallaxError, Revoked, Superseded
from parallax.security.identity import Identity

logger = logging.getLogger(__name__)

MAX_TAKE_OVERS: Final = 3  # per identity and minute: two hosts that fight over a name must not go on for ever
TAKE_OVER_WINDOW_S: Final = 60.0


class Reason(Enum):
    """Why the control plane ends a session in an orderly way."""

    SHUTTING_DOWN = link_pb2.GOODBYE_REASON_SHUTTING_DOWN
    SUPERSEDED = link_pb2.GOODBYE_REASON_SUPERSEDED
    DEREGISTERED = link_pb2.GOODBYE_REASON_DEREGISTERED
    REPLACED = link_pb2.GOODBYE_REASON_REPLACED


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The last thing an agent hears on a session."""

    reason: Reason
    message: str


class Session:
    """One live link with an agent instance; ended by `Sessions.end`."""

    def __init__(self, instance: Instance, generation: int, link: Link) -> None:
        self.instance = instance
        self.generation = generation
        self.link = link
        self.takes_tasks = True
        self.held = 0  # tasks given on it and not yet answered
        self.retires: Goodbye | ParallaxError | None = None  # ends with it when nothing is held any more
        self.over = False


class Instance:
    """One process of an agent: its sessions, and the tasks it holds whatever session they came by."""

    def __init__(self, ref: AgentRef, instance_id: bytes, description: AgentDescription) -> None:
        self.ref = ref
        self.instance_id = instance_id
        self.description = description
        self.generation = 0  # of the newest session
        self.sessions: dict[int, Session] = {}
        self.held: dict[int, Session] = {}  # task id -> the session it was given on
        self.active: Session | None = None  # the newest session that takes tasks
        self.queue: FairQueue | None = None  # what waits until it has room; made when something does
        self.is_moved = False  # its load is not what its indexes say

    @property
    def free(self) -> int:
        """How many more tasks it could work on at once; below zero, as many wait."""
        waiting = len(self.queue) if self.queue else 0
        return self.description.max_concurrency - len(self.held) - waiting

    def take(self, task_id: int, session: Session) -> None:
        """Note that the task was given to it on *session*."""
        self.held[task_id] = session
        session.held += 1

    def release(self, task_id: int) -> Session:
        """Note that nobody waits for the task any more; the session it was given on."""
        session = self.held.pop(task_id)
        session.held -= 1
        return session

    def choose_active(self) -> None:
        """Find the newest session that takes tasks; after any change of its sessions."""
        self.active = next((s for s in reversed(self.sessions.values()) if s.takes_tasks), None)


Cause = str | Revoked
"""What took an instance its tasks: that its agent was revoked, or what else happened to it."""


class Roster(Protocol):
    """Who needs to know which instances can be given tasks."""

    def changed(self, instance: Instance) -> None:
        """*instance* has appeared, drains, or describes itself anew."""

    def lost(self, instance: Instance, cause: Cause) -> None:
        """*instance* is gone; what it holds has failed."""

    def forgotten(self, instance: Instance, held: Collection[int]) -> None:
        """*instance* holds nothing but *held*: what else it was given, or the answer, got lost."""


_TAKEN_OVER: Final = "another instance with the same identity took over"
_REPLACED: Final = Goodbye(Reason.REPLACED, "a newer session of the same instance is open")


class Sessions:
    """
    The instances of all connected agents.

    An identity has one instance in force: the newest. A second session of the same
    instance takes the new tasks while the first one drains; a session of another
    instance supersedes the one in force, up to three times a minute. An ending
    session never removes what is newer than itself.

    Args:
        on_take_over: Told whose place was taken.
    """

    def __init__(self, registry: Registry, roster: Roster, on_take_over: Callable[[AgentRef], None]) -> None:
        self._registry = registry
        self._roster = roster
        self._on_take_over = on_take_over
        self._instances: dict[AgentRef, Instance] = {}
        self._take_overs: defaultdict[AgentRef, deque[float]] = defaultdict(deque)

    def __len__(self) -> int:
        return sum(len(instance.sessions) for instance in self._instances.values())

    def instance(self, ref: AgentRef) -> Instance | None:
        """The instance of *ref* in force, if it is connected."""
        return self._instances.get(ref)

    def open(
        self,
        ref: AgentRef,
        identity: Identity | None,
        instance_id: bytes,
        description: AgentDescription,
        link: Link,
        *,
        held: Collection[int] | None = None,
        now: float,
        at: datetime,
    ) -> Session:
        """
        Begin a session.

        Args:
            held: The tasks that the instance still holds, if all its other sessions are dead.

        Raises:
            Superseded: The identity changed hands too often within a minute.
        """
        instance = self._instances.get(ref)
        taken_over: Instance | None = None
        if instance is not None and instance.instance_id != instance_id:
            self._take_over(instance, now)
            instance, taken_over = None, instance
        record = self._registry.connect(ref, identity, description, now=now, at=at)
        if instance is None:
            instance = self._instances[ref] = Instance(ref, instance_id, description)
        for older in instance.sessions.values():
            older.takes_tasks = False
        session = Session(instance, record.generation, link)
        instance.description = description
        instance.generation = record.generation
        instance.sessions[record.generation] = session
        instance.choose_active()
        if held is not None:
            self._roster.forgotten(instance, held)
            for task_id in held:  # nobody waits for these, and they would take the place of others
                if task_id not in instance.held:
                    link.cancel(task_id)
        for older in [s for s in instance.sessions.values() if s is not session]:
            if held is None:
                self.settle(older)
            else:
                self.end(older, _REPLACED)
        self._roster.changed(instance)
        if taken_over is not None:  # last: what may be done again finds the one that took over
            self._roster.lost(taken_over, _TAKEN_OVER)
        logger.info("session opened", extra={"agent": str(ref), "generation": session.generation})
        return session

    def describe(self, ref: AgentRef, description: AgentDescription) -> None:
        """Take note of what *ref* says of itself beside its sessions: new tasks follow it."""
        instance = self._instances.get(ref)
        if instance is not None:
            instance.description = description
            self._roster.changed(instance)

    def drain(self, session: Session) -> None:
        """Give *session* no more tasks: its agent said so, or it is about to end."""
        session.takes_tasks = False
        session.instance.choose_active()
        self._roster.changed(session.instance)

    def end(self, session: Session, why: Goodbye | ParallaxError) -> None:
        """Let the stream of *session* end, with a goodbye or with an error; only the first call counts."""
        if not session.over:
            _say(session, why)
            self.drain(session)

    def settle(self, session: Session) -> None:
        """End *session* if it retires, or a newer one took its place, and nothing given on it is open."""
        if session.held:
            return
        if session.retires is not None:
            self.end(session, session.retires)
        elif session.generation != session.instance.generation:
            self.end(session, _REPLACED)

    def retire(self, session: Session, why: Goodbye | ParallaxError) -> None:
        """Give *session* no more tasks, and end it when nothing given on it is open."""
        session.retires = why
        self.drain(session)
        self.settle(session)

    def close(self, session: Session, revoked: Revoked | None = None) -> None:
        """Take note that the stream of *session* has ended; because of *revoked*, if that is why."""
        instance = session.instance
        instance.sessions.pop(session.generation, None)
        instance.choose_active()
        logger.info("session closed", extra={"agent": str(instance.ref), "generation": session.generation})
        if instance.sessions:
            self._roster.changed(instance)
        else:
            self._registry.disconnect(instance.ref, instance.generation)
            if self._instances.get(instance.ref) is instance:
                del self._instances[instance.ref]
            self._roster.lost(instance, revoked or "its connection ended")

    def expire(self, now: float) -> None:
        """End the sessions of every agent whose lease ran out, and forget old take-overs."""
        for ref in [r for r, times in self._take_overs.items() if times[-1] <= now - TAKE_OVER_WINDOW_S]:
            del self._take_overs[ref]
        for record in self._registry.expire(now):
            logger.warning("lease expired", extra={"agent": str(record.ref)})
            instance = self._instances.get(record.ref)
            if instance is not None:
                gone = LeaseExpired("no frame arrived within the lease; connect again")
                self._dismiss(instance, gone)
                self._roster.lost(instance, "its lease ran out")

    def remove(self, ref: AgentRef, generation: int = 0) -> bool:
        """Take *ref* out of the registry and end its sessions; whether that generation was in force."""
        if self._registry.remove(ref, generation) is None:
            return False
        instance = self._instances.get(ref)
        if instance is not None:
            cause = "it was taken out of the registry"
            self._dismiss(instance, Goodbye(Reason.DEREGISTERED, f"the agent stops: {cause}"))
            self._roster.lost(instance, cause)
        return True

    def end_all(self) -> None:
        """Say goodbye to everybody: the control plane stops."""
        for instance in list(self._instances.values()):
            for session in instance.sessions.values():
                self.end(session, Goodbye(Reason.SHUTTING_DOWN, "the control plane stops"))

    def _take_over(self, older: Instance, now: float) -> None:
        recent = self._take_overs[older.ref]
        while recent and recent[0] <= now - TAKE_OVER_WINDOW_S:
            recent.popleft()
        if len(recent) >= MAX_TAKE_OVERS:
            raise Superseded(
                f"{older.ref} changed hands {len(recent)} times within a minute; "
                "another host uses the same certificate: stop one of them"
            )
        recent.append(now)
        self._on_take_over(older.ref)
        logger.warning("another instance took over", extra={"agent": str(older.ref), "lately": len(recent)})
        self._dismiss(older, Goodbye(Reason.SUPERSEDED, _TAKEN_OVER))

    def _dismiss(self, instance: Instance, why: Goodbye | ParallaxError) -> None:
        """End all sessions of *instance* at once, and put it out of force; the roster is yet to be told."""
        for task_id, session in instance.held.items():
            session.link.cancel(task_id)  # it may not have been sent yet
        for session in instance.sessions.values():
            session.takes_tasks = False
            _say(session, why)
        instance.choose_active()
        del self._instances[instance.ref]


def _say(session: Session, why: Goodbye | ParallaxError) -> None:
    """Close the link of *session* with *why*, if it is not closed."""
    if session.over:
        return
    session.over = True
    if isinstance(why, Goodbye):
        session.link.say_goodbye(why.reason.value, why.message)
    else:
        session.link.fail(why)
