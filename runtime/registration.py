"""An agent's entry in the registry by its endpoint: made, kept alive, made again, and taken back."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Final

from grpc import aio

from parallax.protos import registry_pb2, registry_pb2_grpc
from parallax.runtime import wire
from parallax.runtime.backoff import backoff_s
from parallax.runtime.connection import Connection
from parallax.runtime.description import AgentDescription
from parallax.runtime.refusal_counts import RefusalCounts
from parallax.runtime.refusal_report import to_proto
from parallax.runtime.session import SHORTEST_BEAT_S
from parallax.runtime.status import error_of
from parallax.security.errors import (
    ConfigError,
    IdentityError,
    InvalidRequest,
    LeaseExpired,
    NoSuchAgent,
    NotAuthorized,
    ParallaxError,
)

if TYPE_CHECKING:
    from parallax.runtime.following import Follows

logger = logging.getLogger(__name__)

CALL_S: Final = 10.0
FAREWELL_S: Final = 3.0  # to take it back, from a control plane that may be gone

_LAPSED: Final = (NoSuchAgent, LeaseExpired)  # a control plane that began anew, or that we were silent for
_FINAL: Final = (ConfigError, IdentityError, InvalidRequest, NotAuthorized)  # trying again cannot mend these


class Registration:
    """
    Keeps one agent's endpoint registered.

    Args:
        connect: Makes a connection to the control plane.
        endpoint: Where the agent is dialled; asked when it is registered.
        follower: Takes over what the control plane tells on this connection; None: nobody does here.
        prepared: Awaited first, for a while: until whoever dials would be let in.
        refusals: Whom the agent did not let in: told with each heartbeat, one at the end among them; twice if
            the answer is lost.

    Attributes:
        in_force: Set while the control plane knows it.
    """

    def __init__(
        self,
        connect: Callable[[], Connection],
        agent_id: str,
        description: AgentDescription,
        endpoint: Callable[[], str],
        follower: Follows | None = None,
        prepared: Callable[[], Awaitable[None]] | None = None,
        refusals: RefusalCounts | None = None,
    ) -> None:
        self._prepared = prepared
        self._refusals = refusals or RefusalCounts()
        self.in_force = asyncio.Event()
        self._connect = connect
        self._agent_id = agent_id
        self._description = description
        self._endpoint = endpoint
        self._follower = follower
        self._generation = 0
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """
        Stay registered until stopped; then take it back.

        Raises:
            ParallaxError: The control plane refuses for a reason that stays.
        """
        attempt = 0
        while not self._stopping.is_set():
            try:
                # A new one: gRPC would take its time to dial again.
                async with self._connect().following() as connection, self._adopting(connection):
                    await self._prepare()
                    pause = await self._register(connection)
                    attempt = 0
                    await self._keep(connection, pause)
                    await self._take_back(connection)
                    return
            except aio.AioRpcError as exc:
                error = error_of(exc.code(), exc.details(), tuple(exc.trailing_metadata() or ()))
            finally:
                self.in_force.clear()
            if isinstance(error, _FINAL):
                raise error
            pause = 0.0
            if not isinstance(error, _LAPSED) or attempt:
                pause = backoff_s(attempt, random.random())  # noqa: S311 - spreads load, hides nothing
            attempt += 1
            self._warn(error, pause)
            await self._pause(pause)

    def stop(self) -> None:
        """Let `run` take the registration back and return."""
        self._stopping.set()

    def _adopting(self, connection: Connection) -> AbstractAsyncContextManager[None]:
        return self._follower.following(connection) if self._follower is not None else nullcontext()

    async def _prepare(self) -> None:
        if self._prepared is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(CALL_S):
                    await self._prepared()

    async def _register(self, connection: Connection) -> float:
        """Register; how often to say that the agent lives, in seconds."""
        endpoint = self._endpoint()
        request = registry_pb2.RegisterRequest(
            description=wire.description_to_proto(self._description, self._agent_id), endpoint=endpoint
        )
        with connection.use() as line:
            response = await line.stub(_registry).Register(request, timeout=CALL_S)
        self._generation = response.generation
        self.in_force.set()
        logger.info("registered", extra={"agent": self._agent_id, "endpoint": endpoint})
        return max(SHORTEST_BEAT_S, response.lease_ms / 3000)

    async def _keep(self, connection: Connection, pause: float) -> None:
        while not await self._pause(pause):
            await self._beat(connection, CALL_S)

    async def _beat(self, connection: Connection, timeout_s: float) -> None:
        """Say that the agent lives, and whom it did not let in."""
        taken = self._refusals.take()
        request = registry_pb2.HeartbeatRequest(
            agent_id=self._agent_id, generation=self._generation, refused=to_proto(taken)
        )
        try:
            with connection.use() as line:
                await line.stub(_registry).Heartbeat(request, timeout=timeout_s)
        except aio.AioRpcError:
            for each in taken.items():
                self._refusals.add(*each)
            raise

    async def _take_back(self, connection: Connection) -> None:
        request = registry_pb2.DeregisterRequest(agent_id=self._agent_id, generation=self._generation)
        try:
            await self._beat(connection, FAREWELL_S)  # or whom it did not let in since the last is not told
            with connection.use() as line:
                await line.stub(_registry).Deregister(request, timeout=FAREWELL_S)
        except aio.AioRpcError as exc:
            logger.info("not deregistered", extra={"agent": self._agent_id, "cause": exc.details()})

    async def _pause(self, seconds: float) -> bool:
        """Wait; whether it was stopped meanwhile."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            return False
        return True

    def _warn(self, error: ParallaxError, pause: float) -> None:
        cause = f"{type(error).__name__}: {error}"
        extra = {"agent": self._agent_id, "cause": cause, "retry_in_s": round(pause, 2)}
        logger.warning("not registered", extra=extra)


def _registry(channel: aio.Channel) -> registry_pb2_grpc.RegistryServiceAsyncStub:
    return registry_pb2_grpc.RegistryServiceStub(channel)
