"""The gRPC service of the registry: who calls, which domain call, and the translation between the two."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from types import MappingProxyType
from typing import Any, Final

from grpc import aio

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.authorization import removable, speaker
from parallax.control_plane.registry import AgentRef, Registry
from parallax.control_plane.sessions import Sessions
from parallax.control_plane.views import AgentFilter, AgentView, State, Views
from parallax.control_plane.watch import Batch, Change, ChangeKind, Changes, shutting_down
from parallax.protos import registry_pb2, registry_pb2_grpc
from parallax.runtime import wire
from parallax.runtime.address import parse_address
from parallax.runtime.caller import Caller, current_caller, name_of
from parallax.runtime.watches import Watches
from parallax.security.errors import ConfigError, IdentityError, InvalidRequest, Unavailable
from parallax.security.identity import Identity, Kind, clip
from parallax.security.verification import Peer

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1_000
MAX_LOOKED_AT: Final = 2_000  # for one page, however few of them match
MAX_MESSAGE_BYTES: Final = 256 * 1024  # or one agent, of some 70 KiB at the most; a message may have 1 MiB
CHUNK: Final = 128
STALLED_S: Final = 60.0  # whoever does not read its watch for so long is not kept

Context = aio.ServicerContext[Any, Any]


OnReport = Callable[[Identity, Iterable[registry_pb2.RefusedCalls]], None]


class RegistryService(registry_pb2_grpc.RegistryServiceServicer):
    """
    Registry records over gRPC.

    Args:
        on_report: Told whom an agent, by its certificate, has not let in.
    """

    def __init__(
        self,
        registry: Registry,
        sessions: Sessions,
        changes: Changes,
        audit: AuditLog,
        clock: Callable[[], datetime],
        on_report: OnReport = lambda _agent, _report: None,
    ) -> None:
        self._registry = registry
        self._on_report = on_report
        self._audit = audit
        self._sessions = sessions
        self._changes = changes
        self._views: Views = changes.views
        self._clock = clock
        self._watches = Watches("the agents")

    async def Register(
        self, request: registry_pb2.RegisterRequest, context: Context
    ) -> registry_pb2.RegisterResponse:
        caller = current_caller()
        ref, identity = speaker(caller, request.description.agent_id)
        description = wire.description_from_proto(request.description)
        registration = self._registry.register(
            ref,
            identity,
            description,
            endpoint=_endpoint(request.endpoint),
            now=_monotonic(),
            at=self._clock(),
            proof=_proof(caller),
        )
        self._sessions.describe(ref, description)
        return registry_pb2.RegisterResponse(
            generation=registration.generation, lease_ms=wire.milliseconds(self._registry.lease)
        )

    async def Heartbeat(
        self, request: registry_pb2.HeartbeatRequest, context: Context
    ) -> registry_pb2.HeartbeatResponse:
        caller = current_caller()
        ref, identity = speaker(caller, request.agent_id)
        self._registry.heartbeat(ref, _monotonic(), request.generation, _proof(caller))
        if identity is not None:
            self._on_report(identity, request.refused)
        return registry_pb2.HeartbeatResponse(lease_ms=wire.milliseconds(self._registry.lease))

    async def Deregister(
        self, request: registry_pb2.DeregisterRequest, context: Context
    ) -> registry_pb2.DeregisterResponse:
        caller = current_caller()
        ref = removable(caller, request.agent_id)
        if isinstance(caller, Peer) and caller.identity.kind is not Kind.AGENT:  # who goes by itself
            record = self._registry.get(ref)
            await self._audit.commit(Deed("agent/removed", name_of(caller), str(record.identity or ref)))
        beside = self._registry.retract(ref, request.generation)
        if not beside and not self._sessions.remove(ref, request.generation):
            self._registry.get(ref)  # says so if there is none; an older generation has no effect
        return registry_pb2.DeregisterResponse()

    async def GetAgent(
        self, request: registry_pb2.GetAgentRequest, context: Context
    ) -> registry_pb2.GetAgentResponse:
        record = self._registry.get(AgentRef.parse(request.agent_id))
        return registry_pb2.GetAgentResponse(agent=self._to_proto(self._views.of(record)))

    async def ListAgents(
        self, request: registry_pb2.ListAgentsRequest, context: Context
    ) -> registry_pb2.ListAgentsResponse:
        wanted = _filter(request.filter)
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        last = _last(request.page_token)
        agents: list[registry_pb2.Agent] = []
        room = MAX_MESSAGE_BYTES
        for view in self._views_after(last):
            if wanted.matches(view.record, view.state):
                agent = self._to_proto(view)
                room -= agent.ByteSize()
                if len(agents) == size or (agents and room < 0):
                    break
                agents.append(agent)
            last = view.record.ref
        else:
            last = last if self._views.after(last, 1) else None
        return registry_pb2.ListAgentsResponse(agents=agents, next_page_token=_page_token(last))

    async def WatchAgents(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request: registry_pb2.WatchAgentsRequest, context: Context
    ) -> None:
        """
        Tell what there is, then what changes, as fast as the caller reads and no faster.

        Raises:
            InvalidRequest: The filter or the token cannot be used.
            Unavailable: So many watch already, or the caller does so often, or does not read.
        """
        with self._watches.one_more():
            watcher = self._changes.watch(_filter(request.filter), request.resume_token)
            try:
                while (batch := await watcher.take()) is not None:
                    for message in self._messages(batch):
                        await _write(message, context)
            finally:
                watcher.close()
        raise shutting_down()

    def _views_after(self, ref: AgentRef | None) -> Iterator[AgentView]:
        """The agents after *ref*, as many as are looked at for one page."""
        for _ in range(0, MAX_LOOKED_AT, CHUNK):
            views = self._views.after(ref, CHUNK)
            yield from views
            if len(views) < CHUNK:
                return
            ref = views[-1].record.ref

    def _messages(self, batch: Batch) -> Iterator[registry_pb2.AgentEvents]:
        """*batch* in messages that are not too large; only the last one says how far it goes."""
        message = registry_pb2.AgentEvents(fresh=batch.fresh)
        room = MAX_MESSAGE_BYTES
        for change in batch.changes:
            event = self._event(change)
            room -= event.ByteSize()
            if message.events and room < 0:
                yield message
                message = registry_pb2.AgentEvents()
                room = MAX_MESSAGE_BYTES - event.ByteSize()
            message.events.append(event)
        message.synced = batch.synced
        message.resume_token = batch.resume
        yield message

    def _event(self, change: Change) -> registry_pb2.AgentEvent:
        view = change.view
        agent = registry_pb2.Agent(agent_id=str(change.ref)) if view is None else self._to_proto(view)
        return registry_pb2.AgentEvent(kind=_KINDS[change.kind], agent=agent)

    def _to_proto(self, view: AgentView) -> registry_pb2.Agent:
        record = view.record
        instance = self._sessions.instance(record.ref)
        agent = registry_pb2.Agent(
            agent_id=str(record.ref),
            identity=str(record.identity or ""),
            verified=record.ref.verified,
            description=wire.description_to_proto(record.description, record.ref.name),
            endpoint=record.endpoint,
            state=_STATES[view.state],
            generation=record.generation,
            in_flight=len(instance.held) if instance else 0,
        )
        agent.registered_at.FromDatetime(record.presence.since)
        return agent


_KINDS: Final = {
    ChangeKind.ADDED: registry_pb2.AGENT_EVENT_KIND_ADDED,
    ChangeKind.CHANGED: registry_pb2.AGENT_EVENT_KIND_CHANGED,
    ChangeKind.REMOVED: registry_pb2.AGENT_EVENT_KIND_REMOVED,
}
_STATES: Final = {
    State.READY: registry_pb2.AGENT_STATE_READY,
    State.DRAINING: registry_pb2.AGENT_STATE_DRAINING,
    State.REGISTERED: registry_pb2.AGENT_STATE_REGISTERED,
}
_STATE_OF: Final = {number: state for state, number in _STATES.items()}


def _filter(message: registry_pb2.AgentFilter) -> AgentFilter:
    """The filter stated; one that this program does not understand is refused, not widened."""
    unknown = [number for number in message.states if number not in _STATE_OF]
    if unknown:
        raise InvalidRequest(f"the filter names a state that this control plane does not know: {unknown[0]}")
    labels: dict[str, str | None] = {}
    for label in message.labels:
        if label.key in labels:
            raise InvalidRequest(f"the filter names the label {clip(label.key)} twice; state it once")
        labels[label.key] = label.value if label.HasField("value") else None
    return AgentFilter(
        capabilities=frozenset(message.capabilities),
        labels=MappingProxyType(labels),
        states=frozenset(_STATE_OF[number] for number in message.states),
        verified=message.verified if message.HasField("verified") else None,
    )


def _page_token(last: AgentRef | None) -> str:
    return base64.urlsafe_b64encode(str(last).encode()).decode() if last else ""


def _last(page_token: str) -> AgentRef | None:
    """The last agent of the page before; it need not be there any more."""
    if not page_token:
        return None
    try:
        return AgentRef.parse(base64.b64decode(page_token, b"-_", validate=True).decode())
    except (ValueError, IdentityError):
        raise InvalidRequest(
            "the page token is not one that a page has given; leave it out for the first page"
        ) from None


async def _write(message: registry_pb2.AgentEvents, context: Context) -> None:
    try:
        async with asyncio.timeout(STALLED_S):
            await context.write(message)
    except TimeoutError:
        raise Unavailable(f"the watch was not read for {STALLED_S:g} s; watch again") from None


def _proof(caller: Caller) -> Peer | None:
    return caller if isinstance(caller, Peer) else None


def _endpoint(stated: str) -> str:
    """*stated* itself, if it is empty or an address: everybody who reads the registry gets it."""
    if stated:
        try:
            _, port = parse_address(stated)
        except ConfigError as exc:
            raise InvalidRequest(str(exc)) from exc
        if not port:
            raise InvalidRequest(f"{stated} is not an endpoint: nobody can dial port 0")
    return stated


def _monotonic() -> float:
    return asyncio.get_running_loop().time()
