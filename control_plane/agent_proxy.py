"""The control plane's dialling half: sessions with agents that listen and do not dial themselves."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Final

from parallax.control_plane.agent_link import Fleet
from parallax.control_plane.dialled_agent import DialledAgent
from parallax.control_plane.registry import AgentRecord, AgentRef
from parallax.control_plane.sessions import Goodbye, Reason
from parallax.protos import agent_pb2_grpc
from parallax.runtime.backoff import STEADY_S, backoff_s, move_after_s
from parallax.runtime.channel import channel_options
from parallax.runtime.dialling import Dialling, Moved
from parallax.runtime.link_stream import FLUSH_S, Call, converse
from parallax.security.credentials import gives_way, has_another_leaf, may_stay
from parallax.security.errors import ConfigError, ParallaxError
from parallax.security.identity import AGENT_PROXY, Identity, Kind

if TYPE_CHECKING:
    from grpc import aio

    from parallax.security.credentials import Credentials
    from parallax.security.errors import Revoked
    from parallax.security.provider import MTLSCredentialsProvider

logger = logging.getLogger(__name__)

GIVE_WAY_S: Final = 1.0  # an agent whose own session broke is back by itself before that
UNTRUSTED: Final = Goodbye(Reason.REPLACED, "its certificate is of a root that is trusted no longer")
LEFT: Final = Goodbye(Reason.REPLACED, "the agent is not registered at this endpoint any more")
NO_CREDENTIALS: Final = (
    f"it does not dial the control plane, which has no certificate as service/{AGENT_PROXY} to dial it "
    "with; make one (`parallax certs generate`) and start the control plane again"
)


class AgentProxy:
    """
    Keeps a session with one agent for as long as it is registered with an endpoint.

    A session of the agent's own goes first: while there is one, nothing is dialled.

    Once the control plane has a new certificate to dial with, a second link is opened with it, and takes
    the new tasks. The older one is left to end what was given on it, for a link is all that an agent knows
    of who asks; should the certificate change once more, that has the drain time left. There are never more
    than these two.

    Attributes:
        problem: Why there is no session.
    """

    def __init__(
        self,
        ref: AgentRef,
        fleet: Fleet,
        provider: MTLSCredentialsProvider,
        dialling: Dialling,
    ) -> None:
        self.problem = "it is being dialled"
        self._links: list[DialledAgent] = []  # dialled, and not over
        self._current: DialledAgent | None = None  # the newest that has a session
        self._refused: Credentials | None = None  # what the agent did not take, while it kept others
        self._is_stopping = False
        self._ref = ref
        self._fleet = fleet
        self._provider = provider
        self._dialling = dialling
        self._noted = asyncio.Event()

    @property
    def is_connected(self) -> bool:
        """Whether there is a session."""
        return self._current is not None and not self._current.link.is_closed

    def note(self) -> None:
        """Look at the record again."""
        self._noted.set()

    def revoke(self, cause: Revoked) -> None:
        """Leave the agent at once, with what it holds."""
        for agent in self._links:
            agent.revoke(cause)

    def stop(self) -> None:
        """Let `run` return."""
        self._is_stopping = True
        self.note()

    async def run(self) -> None:
        """Until the agent is registered no more."""
        async with asyncio.TaskGroup() as group:
            following = group.create_task(self._follow())
            await self._stay_connected(group)
            following.cancel()

    async def _stay_connected(self, group: asyncio.TaskGroup) -> None:
        attempt = 0
        loop = asyncio.get_running_loop()
        while (record := self._record) is not None:
            if self._has_its_own:
                await self._until(lambda: self._record is None or not self._has_its_own)
                await self._pause(GIVE_WAY_S, record)
                continue
            began = loop.time()
            agent = await self._open(group, record)
            if self._current is agent and await self._until_outdated(agent, record):
                attempt = 0
                continue
            if loop.time() - began > STEADY_S:
                attempt = 0
            self.problem = agent.problem
            if self._record is None or self._has_registered_anew(record):
                attempt = 0
                continue
            pause = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            self._warn(agent, record, pause)
            if await self._pause(pause, record):
                attempt = 0
        await self._until(lambda: not self._links)

    # The record.

    @property
    def _record(self) -> AgentRecord | None:
        """The agent's record, if it is to be dialled."""
        if self._is_stopping:
            return None
        record = self._fleet.registry.find(self._ref)
        return record if record is not None and record.endpoint else None

    @property
    def _has_its_own(self) -> bool:
        """Whether the agent keeps a session itself."""
        instance = self._fleet.sessions.instance(self._ref)
        if instance is None:
            return False
        ours = [agent.session for agent in self._links]
        return any(session not in ours for session in instance.sessions.values())

    def _has_left(self, record: AgentRecord) -> bool:
        """Whether the agent is not to be dialled there any more."""
        now = self._record
        return now is None or now.endpoint != record.endpoint

    def _is_wanted(self, record: AgentRecord) -> bool:
        return not self._has_left(record) and not self._has_its_own

    def _has_registered_anew(self, record: AgentRecord) -> bool:
        now = self._record
        return now is None or self._has_its_own or now.registration != record.registration

    # The links.

    async def _open(self, group: asyncio.TaskGroup, record: AgentRecord) -> DialledAgent:
        """Dial, beside the link that there may be; it has a session now, or else it is over."""
        agent = DialledAgent(self._fleet, record, self._is_wanted, self._move_to)
        self._links.append(agent)
        group.create_task(self._carry(agent, record))
        await self._until(lambda: agent not in self._links or self._current is agent)
        return agent

    async def _until_outdated(self, agent: DialledAgent, record: AgentRecord) -> bool:
        """Wait for credentials newer than those of *agent*, and room; whether it still counts then."""

        def is_to_move() -> bool:
            return gives_way(agent.credentials, self._in_force) and self._is_wanted(record)

        def has_room() -> bool:
            return self._current is not agent or len(self._links) == 1

        await self._until(lambda: self._current is not agent or is_to_move())
        if self._current is agent:
            spread = random.random()  # noqa: S311 - spreads load, hides nothing
            pause = move_after_s(agent.credentials, self._in_force, datetime.now(UTC), spread)
            await self._pause(pause, record)
        # See `AgentSession`: what is open outlasts a root that was taken out.
        await self._until(lambda: has_room() or has_another_leaf(agent.credentials, self._in_force))
        if not has_room():
            for older in self._links[:-1]:
                older.is_hurried = True
            self.note()
            await self._until(has_room)
        return self._current is agent

    def _move_to(self, agent: DialledAgent) -> None:
        """Let *agent* be the one that counts; the one before it has no more tasks given."""
        if self._current is not None:
            self._dialling.moves[Moved.TRIED] += 1
        self._current = agent
        self.note()

    async def _carry(self, agent: DialledAgent, record: AgentRecord) -> None:
        """Hold one link from dialling to its end."""
        agent.problem = "the agent ended the link"
        try:
            agent.credentials, channel = self._in_force, self._dial(record)
            async with channel, self._dialling.timing(channel):
                agent.call = call = agent_pb2_grpc.AgentServiceStub(channel).Link()
                agent.link.on_closed = self.note
                agent.link.greet(agent.hello())
                try:
                    await converse(agent.link, call, partial(self._let_go, agent, call, record))
                except ParallaxError as exc:
                    agent.problem = f"{type(exc).__name__}: {exc}"
                finally:
                    call.cancel()
                    agent.call = None
                    self._end(agent)
        except ConfigError as exc:
            agent.problem = f"{type(exc).__name__}: {exc}"
            self._end(agent)

    def _dial(self, record: AgentRecord) -> aio.Channel:
        expected = Identity(self._provider.identity.trust_domain, Kind.AGENT, self._ref.name)
        return self._provider.channel(
            record.endpoint, expected, channel_options(self._fleet.max_payload_bytes)
        )

    async def _let_go(self, agent: DialledAgent, call: Call, record: AgentRecord) -> None:
        """When the agent is to be left: finish what it holds, say goodbye, and in the end do without."""
        link = agent.link
        await self._until(lambda: link.is_closed or agent.is_hurried or self._has_left(record))
        if agent.session is not None:
            if agent.is_hurried:
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._fleet.drain.total_seconds()):
                        await self._until(lambda: link.is_closed)
                agent.give_up()
            else:
                self._fleet.sessions.retire(agent.session, LEFT)
            await self._until(lambda: link.is_closed)
            await asyncio.sleep(FLUSH_S)
        call.cancel()

    def _end(self, agent: DialledAgent) -> None:
        self._links.remove(agent)
        if self._current is agent:
            self._current = None
        agent.end()
        self.note()

    # The certificate.

    @property
    def _in_force(self) -> Credentials | None:
        store = self._provider.store
        return store.current if store is not None else None

    async def _follow(self) -> None:
        store, seen = self._provider.store, self._in_force
        while store is not None and seen is not None:
            seen = await store.changed(seen)
            self.note()

    def _warn(self, agent: DialledAgent, record: AgentRecord, pause: float) -> None:
        extra = {
            "agent": str(self._ref),
            "endpoint": record.endpoint,
            "cause": agent.problem,
            "retry_in_s": round(pause, 2),
        }
        if self._current is None:
            logger.warning("agent not reached", extra=extra)
            return
        stays = may_stay(self._current.credentials, agent.credentials)
        if not stays and self._current.session is not None:
            self._fleet.sessions.retire(self._current.session, UNTRUSTED)
        self._dialling.moves[Moved.REFUSED if stays else Moved.UNTRIED] += 1
        if self._refused is not agent.credentials:
            self._refused = agent.credentials
            event = "no link with the new certificate, the old one goes on"
            logger.warning(event if stays else "no link with the new roots, the old one is left", extra=extra)

    # Waiting.

    async def _pause(self, seconds: float, record: AgentRecord) -> bool:
        """Wait, but not past a change of link or certificate; whether the agent did something meanwhile."""
        current, seen = self._current, self._in_force

        def is_over() -> bool:
            is_other = self._current is not current or self._in_force is not seen
            return is_other or self._has_registered_anew(record)

        try:
            async with asyncio.timeout(seconds):
                await self._until(is_over)
        except TimeoutError:
            return False
        return self._has_registered_anew(record)

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._noted.clear()
            await self._noted.wait()


class AgentProxies:
    """
    Keeps a session with every agent that is registered with an endpoint and has none of its own.

    Args:
        provider: With the credentials of `service/agent-proxy`; None: nobody is dialled.
        dialling: Told how it goes.
    """

    def __init__(self, fleet: Fleet, provider: MTLSCredentialsProvider | None, dialling: Dialling) -> None:
        self._fleet = fleet
        self._provider = provider
        self._dialling = dialling
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

    def revoke(self, ref: AgentRef, cause: Revoked) -> None:
        """What proves the registration of *ref* is revoked: leave it at once, with what it holds."""
        proxy = self._proxies.get(ref)
        if proxy is not None:
            proxy.revoke(cause)

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
                        proxy = AgentProxy(ref, self._fleet, self._provider, self._dialling)
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
