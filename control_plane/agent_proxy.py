"""The control plane's dialling half: sessions with agents that listen and do not dial themselves."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final

from parallax.control_plane.agent_link import AgentEnd, Fleet, check_instance_id
from parallax.control_plane.caller_link import WORK_OVERHEAD_BYTES
from parallax.control_plane.registry import AgentRecord, AgentRef
from parallax.control_plane.sessions import Goodbye, Reason
from parallax.protos import agent_pb2_grpc, link_pb2
from parallax.runtime import wire
from parallax.runtime.channel import channel_options
from parallax.runtime.link import End, Link, Said
from parallax.runtime.link_stream import FLUSH_S, Call, converse
from parallax.runtime.outcome import Failure, OutcomeCode, too_large
from parallax.runtime.protocol import Speaks, hello, negotiate
from parallax.runtime.session import STEADY_S, backoff_s
from parallax.security.errors import ParallaxError, Unavailable
from parallax.security.identity import AGENT_PROXY, Identity, Kind

if TYPE_CHECKING:
    from parallax.security.provider import MTLSCredentialsProvider

logger = logging.getLogger(__name__)

GIVE_WAY_S: Final = 1.0  # an agent whose own session broke is back by itself before that
LEFT: Final = Goodbye(Reason.REPLACED, "the agent is not registered at this endpoint any more")
NO_CREDENTIALS: Final = (
    f"it does not dial the control plane, which has no certificate as service/{AGENT_PROXY} to dial it "
    "with; make one (`parallax certs generate`) and start the control plane again"
)


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
    """

    link: DialledLink

    def __init__(self, fleet: Fleet, record: AgentRecord) -> None:
        super().__init__(fleet)
        self.link = DialledLink(self)
        self._record = record

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
        if record is None or record.session is not None or record.endpoint != self._record.endpoint:
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

    def on_goodbye(self, goodbye: link_pb2.Goodbye) -> None:  # noqa: ARG002 - as every receiver
        """The agent stops."""
        self.link.close()

    def refuse(self, task_id: int, size: int) -> None:
        """Fail a task that the agent would not take."""
        text = too_large("the task", size, self.link.limit)
        self._fleet.dispatcher.settle(
            self._open.instance, task_id, Failure(OutcomeCode.INVALID_ARGUMENT, text)
        )

    def end(self) -> None:
        """Take note that the stream has ended: what was given on it is lost, whatever other link there is."""
        session = self.session
        if session is not None:
            instance = session.instance
            self._fleet.sessions.close(session)
            if instance.sessions:
                held = [task_id for task_id, by in instance.held.items() if by is not session]
                self._fleet.dispatcher.forgotten(instance, held)


class AgentProxy:
    """
    Keeps a session with one agent for as long as it is registered with an endpoint.

    A session of the agent's own goes first: while there is one, nothing is dialled.

    Attributes:
        problem: Why there is no session.
    """

    def __init__(self, ref: AgentRef, fleet: Fleet, provider: MTLSCredentialsProvider) -> None:
        self.problem = "it is being dialled"
        self._agent: DialledAgent | None = None
        self._is_stopping = False
        self._ref = ref
        self._fleet = fleet
        self._provider = provider
        self._noted = asyncio.Event()

    @property
    def is_connected(self) -> bool:
        """Whether there is a session."""
        agent = self._agent
        return agent is not None and agent.session is not None and not agent.link.is_closed

    def note(self) -> None:
        """Look at the record again."""
        self._noted.set()

    def stop(self) -> None:
        """Let `run` return."""
        self._is_stopping = True
        self.note()

    async def run(self) -> None:
        """Until the agent is registered no more."""
        attempt = 0
        loop = asyncio.get_running_loop()
        while (record := self._record) is not None:
            if record.session is not None:  # its own
                await self._until(lambda: self._record is None or self._record.session is None)
                await self._pause(GIVE_WAY_S, record)
                continue
            began = loop.time()
            self.problem = await self._connect(record)
            if loop.time() - began > STEADY_S:
                attempt = 0
            if self._record is None or self._has_registered_anew(record):
                attempt = 0
                continue
            pause = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            extra = {"agent": str(self._ref), "endpoint": record.endpoint, "cause": self.problem}
            logger.warning("agent not reached", extra=extra | {"retry_in_s": round(pause, 2)})
            if await self._pause(pause, record):
                attempt = 0

    @property
    def _record(self) -> AgentRecord | None:
        """The agent's record, if it is to be dialled."""
        if self._is_stopping:
            return None
        record = self._fleet.registry.find(self._ref)
        return record if record is not None and record.endpoint else None

    async def _connect(self, record: AgentRecord) -> str:
        """Hold one session from dialling to its end; why it ended."""
        agent = DialledAgent(self._fleet, record)
        expected = Identity(self._provider.identity.trust_domain, Kind.AGENT, self._ref.name)
        options = channel_options(self._fleet.max_payload_bytes)
        try:
            async with self._provider.channel(record.endpoint, expected, options) as channel:
                call = agent_pb2_grpc.AgentServiceStub(channel).Link()
                self._agent = agent
                agent.link.on_closed = self.note
                agent.link.greet(agent.hello())
                try:
                    await converse(agent.link, call, partial(self._let_go, agent, call, record))
                finally:
                    call.cancel()
                    agent.end()
                    self._agent = None
        except ParallaxError as exc:
            return f"{type(exc).__name__}: {exc}"
        return "the agent ended the link"

    async def _let_go(self, agent: DialledAgent, call: Call, record: AgentRecord) -> None:
        """When the agent is to be left: finish what it holds, say goodbye, and in the end do without."""
        link = agent.link

        def is_left() -> bool:
            now = self._record
            return link.is_closed or now is None or now.endpoint != record.endpoint

        await self._until(is_left)
        if agent.session is not None:
            self._fleet.sessions.retire(agent.session, LEFT)
            await self._until(lambda: link.is_closed)
            await asyncio.sleep(FLUSH_S)
        call.cancel()

    def _has_registered_anew(self, record: AgentRecord) -> bool:
        now = self._record
        return now is None or now.session is not None or now.registration != record.registration

    async def _pause(self, seconds: float, record: AgentRecord) -> bool:
        """Wait; whether the agent did something meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._until(partial(self._has_registered_anew, record))
        except TimeoutError:
            return False
        return True

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._noted.clear()
            await self._noted.wait()


class AgentProxies:
    """
    Keeps a session with every agent that is registered with an endpoint and has none of its own.

    Args:
        provider: With the credentials of `service/agent-proxy`; None: nobody is dialled.
    """

    def __init__(self, fleet: Fleet, provider: MTLSCredentialsProvider | None) -> None:
        self._fleet = fleet
        self._provider = provider
        self._proxies: dict[AgentRef, AgentProxy] = {}
        self._tasks: dict[AgentRef, asyncio.Task[None]] = {}
        self._is_closed = False
        self._noted: dict[AgentRef, None] = {}
        self._has_noted = asyncio.Event()

    def __len__(self) -> int:
        return sum(proxy.is_connected for proxy in self._proxies.values())

    def note(self, ref: AgentRef) -> None:
        """Take note that the record of *ref* has changed."""
        proxy = self._proxies.get(ref)
        if proxy is not None:
            proxy.note()
        elif self._is_to_be_dialled(ref):
            self._noted[ref] = None
            self._has_noted.set()

    def why_absent(self, ref: AgentRef) -> str:
        """Why there is no session with *ref*, which has none of its own; empty if it is not to be dialled."""
        record = self._fleet.registry.find(ref)
        if record is None or not record.endpoint or record.session is not None:
            return ""
        if self._provider is None:
            return NO_CREDENTIALS
        proxy = self._proxies.get(ref)
        return f"it is registered at {record.endpoint}: {proxy.problem if proxy else 'it is being dialled'}"

    async def run(self) -> None:
        """Dial for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._has_noted.wait()
                self._has_noted.clear()
                noted, self._noted = self._noted, {}
                for ref in noted:
                    if self._is_to_be_dialled(ref) and self._provider is not None:
                        proxy = AgentProxy(ref, self._fleet, self._provider)
                        self._proxies[ref] = proxy
                        self._tasks[ref] = group.create_task(self._keep(ref, proxy))

    async def close(self) -> None:
        """Dial nobody any more; gives those who have been told goodbye a moment to hear it."""
        self._is_closed = True
        for proxy in self._proxies.values():
            proxy.stop()
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=FLUSH_S)

    def _is_to_be_dialled(self, ref: AgentRef) -> bool:
        record = self._fleet.registry.find(ref)
        return record is not None and bool(record.endpoint) and not self._is_closed

    async def _keep(self, ref: AgentRef, proxy: AgentProxy) -> None:
        try:
            await proxy.run()
        except Exception:  # a bug of ours costs this agent, not all of them
            logger.exception("agent proxy failed", extra={"agent": str(ref)})
        finally:
            del self._proxies[ref], self._tasks[ref]
        self.note(ref)  # it may have come back while this one ended
