"""The gRPC services: who calls, which domain call, and the translation between the two."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any, Final

from grpc import aio

from parallax.control_plane.agent_link import AgentLink, Fleet
from parallax.control_plane.authorization import Grant
from parallax.control_plane.caller_link import CallerLink
from parallax.control_plane.dispatch import Dispatcher
from parallax.control_plane.order import Order, parse_target
from parallax.control_plane.waiter import Waiter
from parallax.protos import (
    dispatch_pb2,
    dispatch_pb2_grpc,
    link_pb2,
    session_pb2_grpc,
)
from parallax.runtime import wire
from parallax.runtime.authorization import Authorization
from parallax.runtime.caller import current_caller
from parallax.runtime.gate import drain_after_expiry, revocation
from parallax.runtime.link_stream import serve
from parallax.runtime.outcome import check_payload, check_task_name
from parallax.runtime.refusal import Refusal
from parallax.security.errors import NotAuthorized
from parallax.security.identity import Identity
from parallax.security.verification import Peer

Context = aio.ServicerContext[Any, Any]

_SERVICE: Final = dispatch_pb2.DESCRIPTOR.services_by_name["DispatchService"].full_name
EXECUTE: Final = f"/{_SERVICE}/Execute"
LINK: Final = f"/{_SERVICE}/Link"


class DispatchService(dispatch_pb2_grpc.DispatchServiceServicer):
    """
    Tasks over gRPC: one call each, or many on a link.

    Args:
        on_refusal: Told of tasks on links for agents that their client may not ask; the gate tells of others.
        drain: How long a link goes on after its client's certificate has expired, for what is open on it.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        authorization: Authorization,
        on_refusal: Callable[[Refusal], None],
        max_payload_bytes: int,
        drain: timedelta,
    ) -> None:
        self._dispatcher = dispatcher
        self._authorization = authorization
        self._on_refusal = on_refusal
        self._max_payload_bytes = max_payload_bytes
        self._drain = drain
        self._links: dict[CallerLink, Identity | None] = {}

    @property
    def callers(self) -> frozenset[Identity]:
        """Whose links are open, as far as a certificate says."""
        return frozenset(filter(None, self._links.values()))

    def drain(self) -> None:
        """Ask everybody for no new task."""
        for caller in self._links:
            caller.link.drain()

    def say_goodbye(self) -> None:
        """End all links: the control plane stops."""
        for caller in self._links:
            caller.link.say_goodbye(link_pb2.GOODBYE_REASON_SHUTTING_DOWN, "the control plane stops")

    async def Execute(
        self, request: dispatch_pb2.ExecuteRequest, context: Context
    ) -> dispatch_pb2.ExecuteResponse:
        waiter = Waiter(Grant(self._authorization, current_caller(), EXECUTE))
        order = self._order(request, context.time_remaining(), waiter)
        result = await waiter.execute(order, self._dispatcher)
        return dispatch_pb2.ExecuteResponse(
            outcome=wire.outcome_to_proto(result.outcome),
            agent_id=str(result.agent or ""),
            attempts=result.attempts,
        )

    async def Link(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request_iterator: AsyncIterator[link_pb2.LinkFrame], context: Context
    ) -> None:
        """Carry a client's tasks and their outcomes until either side ends the stream."""
        peer = current_caller()
        source = context.peer()

        def refused(cause: NotAuthorized) -> None:
            self._on_refusal(Refusal(LINK, peer, source, cause))

        grant = Grant(self._authorization, peer, LINK)
        caller = CallerLink(self._dispatcher, grant, self._max_payload_bytes, refused)
        self._links[caller] = peer.identity if isinstance(peer, Peer) else None
        drain_after_expiry(self._drain, caller.lapse)
        try:
            await serve(caller.link, context, caller.over)
        finally:
            del self._links[caller]
            caller.over()

    def _order(
        self, request: dispatch_pb2.ExecuteRequest, remaining_s: float | None, waiter: Waiter
    ) -> Order:
        payload = check_payload(wire.payload_from_proto(request.payload), self._max_payload_bytes)
        target = parse_target(request.target)
        waiter.check(target)
        return Order(
            target,
            wire.encode_work(check_task_name(request.task), payload),
            wire.time_limit(request.timeout_ms, remaining_s).total_seconds(),
            waiter,
            wait_s=wire.duration(request.wait_for_agent_ms).total_seconds(),
            idempotent=request.idempotent,
            allow_unverified=request.allow_unverified,
        )


class SessionService(session_pb2_grpc.SessionServiceServicer):
    """Agents' outbound sessions over gRPC."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def Connect(  # type: ignore[override]  # a coroutine that writes, which grpc.aio takes too
        self, request_iterator: AsyncIterator[link_pb2.LinkFrame], context: Context
    ) -> None:
        """Greet the agent, then carry tasks and outcomes until either side ends the stream."""
        agent = AgentLink(self._fleet, current_caller())
        drain_after_expiry(self._fleet.drain, agent.lapse)
        try:
            await serve(agent.link, context, agent.over)
        finally:
            if agent.session is not None:
                self._fleet.sessions.close(agent.session, revocation())
