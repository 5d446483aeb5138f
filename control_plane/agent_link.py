"""An agent's end of a session, as the control plane hears it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from time import monotonic
from typing import Final

from parallax.control_plane.authorization import speaker
from parallax.control_plane.dispatch import Dispatcher
from parallax.control_plane.registry import Registry
from parallax.control_plane.sessions import Session, Sessions
from parallax.protos import link_pb2
from parallax.runtime import wire
from parallax.runtime.caller import Caller
from parallax.runtime.executor import MAX_MESSAGE_CHARS, MAX_TYPE_CHARS
from parallax.runtime.link import End, Link, Receiver, Said, answer_of
from parallax.runtime.outcome import Complete, Failure, OutcomeCode, too_large
from parallax.runtime.protocol import Speaks, negotiate
from parallax.security.errors import InvalidRequest, ParallaxError

INSTANCE_ID_BYTES: Final = 16
MAX_HELD_TASKS: Final = (
    65_536  # that an agent has, or whose outcome it could not send; far above what it is given
)
VALUE_OVERHEAD_BYTES: Final = 1024  # a content type of at most 256, and framing


@dataclass(frozen=True, slots=True)
class Fleet:
    """
    What the links of agents need of the control plane.

    Args:
        drain: How long a session goes on after its certificate has expired, for what is open on it.
    """

    registry: Registry
    sessions: Sessions
    dispatcher: Dispatcher
    clock: Callable[[], datetime]
    max_payload_bytes: int
    drain: timedelta


class AgentEnd(Receiver):
    """
    Turns what an agent says on a link into calls of registry, sessions and dispatcher.

    Attributes:
        session: Open from the agent's greeting on.
    """

    link: Link

    def __init__(self, fleet: Fleet) -> None:
        self.session: Session | None = None
        self._fleet = fleet
        self._renewed_at = 0.0
        self._renew_every_s = fleet.registry.lease.total_seconds() / 50

    @property
    def is_busy(self) -> bool:
        """See `Receiver.is_busy`."""
        return self.session is None or self.session.held > 1

    def over(self) -> None:
        """Nothing more will be heard: it gets no more tasks."""
        if self.session is not None:
            self._fleet.sessions.drain(self.session)

    def on_frame(self) -> None:
        """Any frame renews the lease; not each does so anew when there are many."""
        now = monotonic()
        if now - self._renewed_at > self._renew_every_s:
            self._renewed_at = now
            instance = self._open.instance
            # The last frames of one that was superseded say nothing of who took its place.
            if self._fleet.sessions.instance(instance.ref) in {None, instance}:
                self._fleet.registry.renew(instance.ref, now)

    def on_parts(self, parts: Iterable[link_pb2.Part]) -> None:
        """Pieces of answers."""
        instance, dispatcher = self._open.instance, self._fleet.dispatcher
        for part in parts:
            dispatcher.part(instance, part.task_id, self._too_large(part.value) or part.value)

    def on_outcomes(self, outcomes: Iterable[link_pb2.TaskOutcome]) -> None:
        """Answers; what cannot be one fails its own task only."""
        instance, settle = self._open.instance, self._fleet.dispatcher.settle
        limit = self._fleet.max_payload_bytes + VALUE_OVERHEAD_BYTES
        for outcome in outcomes:
            answer: bytes | Failure | Complete = outcome.value
            if not answer or len(answer) > limit:  # type: ignore[arg-type]  # bytes, here
                answer = self._checked(outcome)
            settle(instance, outcome.task_id, answer)

    def on_draining(self, draining: bool) -> None:  # noqa: ARG002, FBT001 - as the field is
        """It takes no new task."""
        if self._open.takes_tasks:
            self._fleet.sessions.drain(self._open)

    def on_broken(self, broken: link_pb2.Broken) -> None:
        """Another session of its instance broke off: what was given on that, and is not held, is lost."""
        instance, named = self._open.instance, _check_held(broken.held_task_ids)
        held = [
            task_id
            for task_id, session in instance.held.items()
            if session.generation != broken.generation or task_id in named
        ]
        self._fleet.dispatcher.forgotten(instance, held)

    @property
    def _open(self) -> Session:
        assert self.session is not None, "a link hears a greeting first"  # noqa: S101 - our own bug
        return self.session

    def _checked(self, outcome: link_pb2.TaskOutcome) -> bytes | Failure | Complete:
        answer = answer_of(outcome)
        match answer:
            case bytes():
                return self._too_large(answer) or answer
            case Failure():
                # Ours says no more than that; more might not fit into the answer to the caller.
                said, kind = answer.message[:MAX_MESSAGE_CHARS], answer.error_type[:MAX_TYPE_CHARS]
                return replace(answer, message=said, error_type=kind)
            case Complete():
                return answer

    def _too_large(self, value: bytes) -> Failure | None:
        limit = self._fleet.max_payload_bytes
        if len(value) <= limit + VALUE_OVERHEAD_BYTES:
            return None
        return Failure(OutcomeCode.INVALID_RESULT, too_large("the answer", len(value), limit))


class AgentLink(AgentEnd):
    """
    A link that the agent dialled.

    Attributes:
        caller: Who did.

    Args:
        caller: Who dialled; the agent is who its certificate says.
    """

    def __init__(self, fleet: Fleet, caller: Caller) -> None:
        super().__init__(fleet)
        self.link = Link(End.CALLER, Said.HELLO, self)
        self.caller = caller

    def lapse(self, why: ParallaxError) -> None:
        """Its certificate is no longer good: it gets no more tasks, and ends with *why* when none is open."""
        if self.session is None:
            self.link.fail(why)
        else:
            self._fleet.sessions.retire(self.session, why)

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """Begin a session."""
        fleet, hello = self._fleet, frame.hello
        ref, identity = speaker(self.caller, hello.description.agent_id)
        agreed = negotiate(Speaks(hello.min_protocol_version, hello.protocol_version, hello.capability_bits))
        held = _check_held(hello.held_task_ids)
        self.session = session = fleet.sessions.open(
            ref,
            identity,
            check_instance_id(hello.instance_id),
            wire.description_from_proto(hello.description),
            self.link,
            held=held if hello.sole else None,
            now=monotonic(),
            at=fleet.clock(),
        )
        lease = fleet.registry.lease
        welcome = link_pb2.Welcome(
            protocol_version=agreed.version,
            capability_bits=agreed.capability_bits,
            generation=session.generation,
            agent_id=str(ref),
            lease_ms=wire.milliseconds(lease),
            heartbeat_ms=wire.milliseconds(lease / 3),
            max_payload_bytes=fleet.max_payload_bytes,
        )
        self.link.greet(link_pb2.LinkFrame(welcome=welcome))


def check_instance_id(instance_id: bytes) -> bytes:
    """*instance_id* itself, if it is one."""
    if len(instance_id) != INSTANCE_ID_BYTES:
        raise InvalidRequest(f"instance_id must have {INSTANCE_ID_BYTES} bytes, not {len(instance_id)}")
    return instance_id


def _check_held(task_ids: Collection[int]) -> frozenset[int]:
    if len(task_ids) > MAX_HELD_TASKS:
        raise InvalidRequest(
            f"{len(task_ids):,} tasks are held, more than the {MAX_HELD_TASKS:,} there may be"
        )
    return frozenset(task_ids)
