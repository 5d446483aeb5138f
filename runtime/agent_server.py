"""An agent's own port: who may dial it, what it serves, and how it stops."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from grpc_health.v1 import health_pb2_grpc

from parallax.protos import agent_pb2_grpc
from parallax.runtime.address import advertised
from parallax.runtime.agent_service import SERVICE, AgentService, Introduction
from parallax.runtime.clock import utc_now
from parallax.runtime.health import HealthService
from parallax.runtime.refusal_counts import RefusalCounts
from parallax.runtime.refusal_report import AT_AGENT
from parallax.runtime.server import GatedServer, new_server, serving
from parallax.runtime.worker import Bench

if TYPE_CHECKING:
    from parallax.runtime.caller import Caller
    from parallax.runtime.fresh_revocations import FreshRevocations
    from parallax.runtime.policy_follower import PolicyFollower
    from parallax.runtime.probe import PortProbe
    from parallax.runtime.refusal import Refusal
    from parallax.security.provider import MTLSCredentialsProvider

logger = logging.getLogger(__name__)

GRACE_S: Final = 3.0  # for last answers, to callers that may have stopped reading


class AgentServer:
    """
    Serves an agent's work for as long as the `async with` block.

    Args:
        address: Where to listen, `host:port`.
        advertise: Where others reach it, if not there.
        policy: Says who may ask.
        on_removed: Told why, if the control plane says that the agent was taken out of the registry.
        is_healthy: Whether the agent can do its work.
        drain: How long a link goes on after its caller's certificate has expired, for what is open on it.
        revocations: Says who is not let in though his certificate is good. Nobody is while either of them is
            not known; None: nobody tells, and *policy* is what it is.

    Attributes:
        port: Where it is dialled, once the block has begun.
        probe: Runs for as long, if set before.
        on_call: Told the peer's address of each call over TLS, if set before.
        refusals: Whom it did not let in, for who reports that.
    """

    def __init__(
        self,
        provider: MTLSCredentialsProvider,
        bench: Bench,
        introduction: Introduction,
        address: str,
        advertise: str | None = None,
        *,
        policy: PolicyFollower,
        max_payload_bytes: int,
        on_removed: Callable[[str], None],
        is_healthy: Callable[[], bool],
        drain: timedelta,
        revocations: FreshRevocations | None = None,
    ) -> None:
        self.port = 0
        self.is_serving = False
        self.probe: PortProbe | None = None
        self.on_call: Callable[[str], None] | None = None
        self.refusals = RefusalCounts()
        self._revocations = revocations
        self._provider = provider
        self._executor = bench.executor
        self._address = address
        self._advertise = advertise
        self._max_payload_bytes = max_payload_bytes
        self._policy = policy
        self._agent_id = introduction.agent_id
        self._service = AgentService(bench, introduction, max_payload_bytes, on_removed, drain)
        self._health = HealthService((SERVICE,), is_healthy)
        self._server: GatedServer | None = None
        self._stack = AsyncExitStack()

    @property
    def endpoint(self) -> str:
        """Where others reach it, once the block has begun."""
        return advertised(self._address, self.port, self._advertise)

    @property
    def is_proxied(self) -> bool:
        """Whether the control plane has a link to this agent."""
        return self._service.is_proxied

    async def __aenter__(self) -> Self:
        """Listen; raises ConfigError if that cannot be."""
        self._server = server = self._new_server()
        agent_pb2_grpc.add_AgentServiceServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        listening = serving(server, self._provider, self._address, GRACE_S, self.probe)
        self.port = await self._stack.enter_async_context(listening)
        self._set_health(serving=True)
        logger.info("agent serves", extra={"port": self.port, "mode": self._provider.mode.value})
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Say goodbye, and end what calls are left."""
        self._set_health(serving=False)
        self._service.say_goodbye()
        await self._stack.aclose()

    async def drain(self, timeout: timedelta) -> None:
        """Take nothing new, and let what is held be finished."""
        self._set_health(serving=False)
        self._service.drain()
        await self._executor.drain(timeout)

    async def informed(self) -> None:
        """Wait until it is known who is to be let in, where somebody tells."""
        if self._revocations is not None:
            await self._revocations.freshness.known()
            await self._policy.freshness.known()

    def _refused(self, refusal: Refusal) -> None:
        self.refusals.note(AT_AGENT, refusal, utc_now())

    def _authorize(self, caller: Caller, method: str) -> None:
        self._policy.authorization.check(caller, method, self._agent_id)

    def _new_server(self) -> GatedServer:
        make = partial(
            new_server,
            self._provider,
            self._authorize,
            self._refused,
            self._max_payload_bytes,
            on_call=self.on_call,
        )
        told, policy = self._revocations, self._policy
        if told is None:
            return make()

        def check_current() -> None:
            told.freshness.check()
            policy.freshness.check()

        server = make(check_revoked=told.check, check_current=check_current)
        told.on_change, policy.on_change = server.end_revoked, server.review
        told.freshness.on_stale = policy.freshness.on_stale = server.lapse
        return server

    def _set_health(self, *, serving: bool) -> None:
        self.is_serving = serving
        self._health.set(serving=serving)
