"""One stream of an agent's session, as its link hears it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

from parallax.protos import link_pb2
from parallax.runtime.link import End, Link, Receiver, Said
from parallax.security.errors import ParallaxError

if TYPE_CHECKING:
    from parallax.runtime.connection import Line
    from parallax.runtime.link_stream import Call
    from parallax.runtime.session import AgentSession
    from parallax.security.credentials import Credentials


class SessionStream(Receiver):
    """
    A stream that an agent dials, from before its hello to its end.

    Attributes:
        line: That it goes over, once it is dialled; retired when nothing new is to come by it.
        generation: By which the control plane knows it; 0 before it does.
        is_open: The control plane has taken it.
        leaving: Set once nothing new is to come by it.
        hurried: Set once it must not wait for answers in parts any longer.
        is_over: It is a stream no more.
        failure: Why it is over, unless that was in order.
    """

    def __init__(self, session: AgentSession) -> None:
        self.link = Link(End.WORKER, Said.WELCOME, self)
        self.line: Line | None = None
        self.generation = 0
        self.is_open = False
        self.leaving = asyncio.Event()
        self.hurried = asyncio.Event()
        self.is_over = False
        self.failure: ParallaxError | None = None
        self.call: Call | None = None
        self._session = session

    @property
    def credentials(self) -> Credentials | None:
        """That it was dialled with; None in plaintext."""
        return self.line.credentials if self.line is not None else None

    @property
    def is_busy(self) -> bool:
        """See `Receiver.is_busy`."""
        return self._session.is_busy

    def leave(self, *, at_once: bool = False) -> None:
        """Let it end by the control plane's word, or after the drain time; *at_once*: in spite of parts."""
        self.leaving.set()
        if self.line is not None:
            self.line.retire()
        if at_once:
            self.hurried.set()

    def break_off(self) -> None:
        """End it without order."""
        if self.call is not None:
            self.call.cancel()

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """The control plane takes the agent."""
        self._session.on_welcome(self, frame.welcome)

    def on_tasks(self, tasks: Iterable[link_pb2.Task]) -> None:
        """Work to begin."""
        self._session.begin(tasks, self.link)

    def on_cancellations(self, task_ids: Iterable[int]) -> None:
        """Nobody waits for these any more, whichever stream they came by."""
        self._session.on_cancellations(task_ids)

    def on_credits(self, allowances: Iterable[link_pb2.Credit]) -> None:
        """Let parts go on."""
        self._session.on_credits(allowances)

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:
        """The control plane ends the stream."""
        self.link.close()
        self._session.on_farewell(self, goodbye)
