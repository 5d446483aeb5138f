"""An agent that can be given tasks, in whichever ways it is set up for; they begin and end together."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from parallax.runtime.dialling import Dialling

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import timedelta

    from parallax.runtime.agent_server import AgentServer
    from parallax.runtime.executor import Executor
    from parallax.runtime.registration import Registration
    from parallax.runtime.renewal import Renewer
    from parallax.runtime.session import AgentSession
    from parallax.sdk.exchanging import Exchanger
    from parallax.security.rotation import CertificateRotator


@dataclass(slots=True)
class Online:
    """
    The ways in which an agent is reached; None where it does without one.

    Args:
        session: It dials the control plane.
        server: Others dial it.
        registration: By which others know where.
        rotator: Keeps its certificate like its files, meanwhile.
        renewer: Has it renewed, meanwhile.
        exchanger: Has it exchanged, if the control plane does not let it in.
        drain: For the tasks held when it is stopped.

    Attributes:
        dialling: How that goes which *session* and *registration* dial.
        ready: Set once it has been reachable in every way.
    """

    executor: Executor
    drain: timedelta
    session: AgentSession | None = None
    server: AgentServer | None = None
    registration: Registration | None = None
    rotator: CertificateRotator | None = None
    renewer: Renewer | None = None
    exchanger: Exchanger | None = None
    dialling: Dialling = field(default_factory=Dialling)
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        """
        Be reachable until stopped or taken out of the registry.

        Raises:
            ParallaxError: It cannot be, or must not; alone, or in a group of its own.
        """
        async with AsyncExitStack() as stack:
            if self.server is not None:
                await stack.enter_async_context(self.server)
            async with asyncio.TaskGroup() as group:
                upkeep = [
                    group.create_task(part.run())
                    for part in (self.rotator, self.renewer, self.exchanger)
                    if part is not None
                ]
                for part in (self.session, self.registration):
                    if part is not None:
                        group.create_task(self._until_over(part.run))
                waiting = group.create_task(self._note_ready())
                await self._stopping.wait()
                waiting.cancel()
                # First, so that nobody is sent here any more while the tasks held are finished.
                for part in (self.registration, self.session):
                    if part is not None:
                        part.stop()
                if self.server is not None:
                    await self.server.drain(self.drain)
                for task in upkeep:
                    task.cancel()

    def stop(self) -> None:
        """Let `run` take no new task, finish those held, and return."""
        self._stopping.set()

    @property
    def state(self) -> dict[str, bool]:
        """Whether it is reachable, way by way."""
        state = {}
        if self.session is not None:
            state["connected"] = self.session.connected.is_set()
        if self.registration is not None:
            state["registered"] = self.registration.in_force.is_set()
        if self.server is not None:
            state["serving"] = self.server.is_serving
        return state

    async def _until_over(self, run: Callable[[], Awaitable[None]]) -> None:
        """One way that is over, by the control plane's word or ours, ends the others."""
        await run()
        self.stop()

    async def _note_ready(self) -> None:
        if self.session is not None:
            await self.session.connected.wait()
        if self.registration is not None:
            await self.registration.in_force.wait()
        if self.server is not None:
            await self.server.informed()
        self.ready.set()
