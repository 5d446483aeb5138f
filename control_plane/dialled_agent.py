"""An agent that the control plane has dialled, as it hears it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING

from parallax.control_plane.agent_link import AgentEnd, Fleet, check_instance_id
from parallax.control_plane.caller_link import WORK_OVERHEAD_BYTES
from parallax.control_plane.registry import AgentRecord
from parallax.protos import link_pb2
from parallax.runtime import wire
from parallax.runtime.link import End, Link, Said
from parallax.runtime.outcome import Failure, OutcomeCode, too_large
from parallax.runtime.protocol import Speaks, hello, negotiate
from parallax.security.errors import Unavailable

if TYPE_CHECKING:
    from parallax.runtime.link_stream import Call
    from parallax.security.credentials import Credentials
    from parallax.security.errors import Revoked


class DialledLink(Link):
    """
    A link to an agent that states its own limit.

    Attributes:
        limit: Of a task's work, in bytes; 0 while it is unknown.
        on_closed: Called when nothing more is said.
    """

    def __init__(self, receiver: DialledAgent) -> None:
        super().__init__(End.CALLER, Said.WELCOME, receiver)
        self.limit = 0
        self.on_closed: Callable[[], None] = lambda: None
        self._refuse = receiver.refuse

    def give(self, task_id: int, work: bytes, timeout_ms: int, part_credit: int = 0) -> None:
        """Give the agent a task; what it would not take fails by itself, rather than with the stream."""
        if self.limit and len(work) > self.limit + WORK_OVERHEAD_BYTES:
            # Later: whoever gives a task is not done with it.
            asyncio.get_running_loop().call_soon(self._refuse, task_id, len(work))
        else:
            super().give(task_id, work, timeout_ms, part_credit)

    def close(self) -> None:
        """Say nothing more."""
        super().close()
        self.on_closed()


class DialledAgent(AgentEnd):
    """
    An agent at the other end of a link that the control plane dialled.

    Args:
        record: As it registered.
        is_wanted: Whether it is still to have a session by this link.
        on_open: Called once it has.

    Attributes:
        credentials: That it was dialled with; None in plaintext.
        is_hurried: Another link waits for this one to end.
        call: That carries the link, while it does.
        problem: Why it is over, once it is.
    """

    link: DialledLink

    def __init__(
        self,
        fleet: Fleet,
        record: AgentRecord,
        is_wanted: Callable[[AgentRecord], bool],
        on_open: Callable[[DialledAgent], None],
    ) -> None:
        super().__init__(fleet)
        self.link = DialledLink(self)
        self.credentials: Credentials | None = None
        self.is_hurried = False
        self.call: Call | None = None
        self.problem = ""
        self._revoked: Revoked | None = None
        self._record = record
        self._is_wanted = is_wanted
        self._on_open = on_open

    def hello(self) -> link_pb2.LinkFrame:
        """What the control plane says first."""
        message = hello()
        message.heartbeat_ms = wire.milliseconds(self._fleet.registry.lease / 3)
        message.max_payload_bytes = self._fleet.max_payload_bytes
        return link_pb2.LinkFrame(hello=message)

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """Begin a session, unless the agent has one of its own by now."""
        fleet, welcome = self._fleet, frame.welcome
        negotiate(Speaks(welcome.protocol_version, welcome.protocol_version, welcome.capability_bits))
        record = fleet.registry.find(self._record.ref)
        if record is None or not self._is_wanted(self._record):
            raise Unavailable("the agent has left, moved or connected meanwhile")
        self.link.limit = welcome.max_payload_bytes
        self.session = fleet.sessions.open(
            record.ref,
            record.identity,
            check_instance_id(welcome.instance_id),
            record.description,
            self.link,
            now=monotonic(),
            at=fleet.clock(),
        )
        self._on_open(self)

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:  # noqa: ARG002 - as every receiver
        """The agent stops."""
        self.link.close()

    def refuse(self, task_id: int, size: int) -> None:
        """Fail a task that the agent would not take."""
        text = too_large("the task", size, self.link.limit)
        self._fleet.dispatcher.settle(
            self._open.instance, task_id, Failure(OutcomeCode.INVALID_ARGUMENT, text)
        )

    def revoke(self, cause: Revoked) -> None:
        """Leave it at once, with what it holds."""
        self._revoked = cause
        self.over()
        if self.call is not None:
            self.call.cancel()

    def give_up(self) -> None:
        """Take what was given on it for lost, whatever other link there is; then it ends by itself."""
        session = self.session
        if session is not None:
            instance = session.instance
            held = [task_id for task_id, by in instance.held.items() if by is not session]
            self._fleet.dispatcher.forgotten(instance, held, self._revoked)

    def end(self) -> None:
        """Take note that the stream has ended."""
        session = self.session
        if session is not None:
            self._fleet.sessions.close(session, self._revoked)
            if session.instance.sessions:
                self.give_up()
