"""Asking the fleet for work: asynchronously, or with a synchronous face for scripts and notebooks."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import timedelta
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typing_extensions import TypeVar

from parallax.protos import dispatch_pb2_grpc, registry_pb2, registry_pb2_grpc
from parallax.runtime import wire
from parallax.runtime.backoff import STEADY_S, backoff_s
from parallax.runtime.channel import channel_options
from parallax.runtime.outcome import (
    MAX_PAYLOAD_BYTES,
    OutcomeCode,
    check_payload,
    check_task_name,
)
from parallax.runtime.status import ERROR_KEY, error_of
from parallax.runtime.wire import encode_work
from parallax.sdk.agents import AgentEvent, AgentInfo, Known, Labels, Several, filter_to_proto
from parallax.sdk.payload import encode, reader
from parallax.sdk.result import Result, result_of, results_of
from parallax.sdk.route import Route
from parallax.security.errors import (
    ConfigError,
    Expired,
    InvalidRequest,
    NoSuchAgent,
    ParallaxError,
    TaskFailed,
    Unavailable,
)
from parallax.security.identity import Identity, control_plane
from parallax.security.provider import MTLSCredentialsProvider

if TYPE_CHECKING:
    from parallax.runtime.calls import Calls
    from parallax.runtime.settings import Settings
    from parallax.security.config import MTLSConfig

logger = logging.getLogger(__name__)

CONNECT_S: Final = 10.0
READ_S: Final = 30.0
DEFAULT_TIMEOUT: Final = timedelta(seconds=60)
PAGE: Final = 500
NO_LABELS: Final[Labels] = MappingProxyType({})

# A watch is begun again after these. An error without a class of its own is what gRPC's INTERNAL becomes.
_PASSING: Final = (Unavailable, ParallaxError)

Duration = timedelta | float
T = TypeVar("T", default=Any)
StubT = TypeVar("StubT")


class ParallaxClient:
    """
    A client of the control plane; use it as `async with ParallaxClient() as client:`.

    Args:
        address: `host:port`; by default `PARALLAX_CONTROL_PLANE`, else localhost:50051.
        tls: Where its certificate is; by default what the `PARALLAX_*` environment says.
        identity: `client/<name>`, which the certificate must carry; by default
            `PARALLAX_IDENTITY`, else client/cli.
    """

    def __init__(
        self, address: str | None = None, tls: MTLSConfig | None = None, *, identity: str | None = None
    ) -> None:
        self._address = address
        self._tls = tls
        self._identity = identity
        self._settings: Settings | None = None  # for `parallax.sdk.testing`: instead of the environment's
        self._max_payload_bytes = MAX_PAYLOAD_BYTES
        self._route: Route | None = None
        self._reached = False
        self._connecting = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Connect; raises what stands in the way."""
        try:
            await self._connected()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        await self.close()

    async def analyze(
        self,
        target: str,
        task: str,
        data: Any = None,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,
        wait_for_agent: Duration = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
        returns: type[T] = Any,  # type: ignore[assignment]  # what says nothing
    ) -> Result[T]:
        """
        Have one task done.

        Args:
            target: An agent id, or `capability:<name>` for the least loaded agent that has it.
            task: What to do, in the agent's own vocabulary.
            data: What JSON can carry, or bytes.
            timeout: For everything, as timedelta or seconds; the agent is told and stops then.
            wait_for_agent: How long to wait for an eligible agent to connect; 0 fails at once.
            idempotent: It may run more than once, so it is tried elsewhere if its agent is lost or revoked.
            allow_unverified: An agent that no certificate vouches for will do.
            returns: The type of the value, a model or dataclass for instance; an answer that does not
                fit is INVALID_RESULT.

        Raises:
            TaskFailed: There is no value; its `code` says why.
            InvalidRequest: *data* cannot be sent, or a duration is negative or longer than a day.
            NotAuthorized, VerificationError, Unavailable: The control plane cannot be asked.
        """
        read = reader(returns)
        limit, wait_ms = _limits(timeout, wait_for_agent)
        payload = encode(data)
        calls = self._route.calls if self._route is not None else None
        if calls is None or calls.is_broken:
            calls = await self._linked()
        reply = await calls.call(
            encode_work(check_task_name(task), check_payload(payload, self._max_payload_bytes)),
            limit,
            target,
            wait_for_agent_ms=wait_ms,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
        )
        return result_of(reply, read)

    async def stream(
        self,
        target: str,
        task: str,
        data: Any = None,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,
        wait_for_agent: Duration = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
        returns: type[T] = Any,  # type: ignore[assignment]  # what says nothing
    ) -> AsyncGenerator[Result[T], None]:
        """
        Have one task done, and take its answer part by part: `async for part in client.stream(...)`.

        The agent makes no more of it than fits into 1 MiB ahead of who takes the parts. Leaving the
        loop early cancels the task; do it under `contextlib.aclosing`, so that it happens at once. An
        agent that answers all at once gives one part.

        Args:
            idempotent: It may be tried elsewhere, as long as no part has come.

        Raises:
            TaskFailed: The answer ends with a failure, after any number of parts.
            InvalidRequest, NotAuthorized, VerificationError, Unavailable: As `analyze`, which has the
                other arguments, too.
        """
        read = reader(returns)
        limit, wait_ms = _limits(timeout, wait_for_agent)
        payload = encode(data)
        calls = await self._linked()
        replies = calls.stream(
            encode_work(check_task_name(task), check_payload(payload, self._max_payload_bytes)),
            limit,
            target,
            wait_for_agent_ms=wait_ms,
            idempotent=idempotent,
            allow_unverified=allow_unverified,
        )
        async with aclosing(results_of(replies, read)) as results:
            async for result in results:
                yield result

    async def agents(
        self,
        *,
        capability: Several = (),
        labels: Labels = NO_LABELS,
        state: Several = (),
        verified: bool | None = None,
    ) -> list[AgentInfo]:
        """
        The registered agents that fulfil everything stated, ordered by id.

        Args:
            capability: One, or several of which an agent must have all.
            labels: Stated labels that an agent must have; None for a value means any.
            state: `ready`, `draining` or `registered`, or several of which one will do.
            verified: Whether a certificate must vouch for it, or must not; None means either.
        """
        wanted = filter_to_proto(capability, labels, state, verified=verified)
        found: list[AgentInfo] = []
        token = ""
        ends = time.monotonic() + READ_S
        while True:
            request = registry_pb2.ListAgentsRequest(filter=wanted, page_size=PAGE, page_token=token)
            async with self._asking(_registry) as stub:
                page = await stub.ListAgents(request, timeout=max(0.0, ends - time.monotonic()))
            found.extend(map(AgentInfo.from_proto, page.agents))
            token = page.next_page_token
            if not token:
                return found

    async def watch_agents(
        self,
        *,
        capability: Several = (),
        labels: Labels = NO_LABELS,
        state: Several = (),
        verified: bool | None = None,
    ) -> AsyncGenerator[AgentEvent]:
        """
        What becomes of the agents that fulfil everything stated (see `agents`), for as long as one asks.

        First every agent there is, as `added`, then `synced`, then changes as they happen; several
        changes of one agent may come as one. A lost connection is made again, and what was missed is
        told then, or worked out from the whole state. Tasks in flight are no change, and neither is a
        new certificate of ours.

        Raises:
            InvalidRequest, NotAuthorized, VerificationError: The control plane refuses to tell.
        """
        request = registry_pb2.WatchAgentsRequest(
            filter=filter_to_proto(capability, labels, state, verified=verified)
        )
        known = Known()
        attempt = 0
        has_moved = False
        while True:
            began = time.monotonic()
            known.begin(resumes=has_moved)
            has_moved = False
            try:
                route = await self._connected()
                async with aclosing(self._watched(route, request)) as messages:
                    async for message in messages:
                        for event in known.learn(message):
                            yield event
            except ParallaxError as exc:
                if type(exc) not in _PASSING:
                    raise
                logger.info("the watch was interrupted", extra={"cause": str(exc)})
            else:
                if self._route is not route:
                    return
                has_moved = True
                continue
            if time.monotonic() - began > STEADY_S:
                attempt = 0
            spread = random.random()  # noqa: S311 - spreads load, hides nothing
            await asyncio.sleep(backoff_s(attempt, spread))
            attempt += 1

    async def agent(self, agent_id: str) -> AgentInfo:
        """One registered agent; raises NoSuchAgent."""
        async with self._asking(_registry) as stub:
            response = await stub.GetAgent(registry_pb2.GetAgentRequest(agent_id=agent_id), timeout=READ_S)
        return AgentInfo.from_proto(response.agent)

    async def remove_agent(self, agent_id: str) -> bool:
        """
        Take an agent out for good: its session ends, and its process stops; False if it was not there.

        Only `client/admin` may. Its certificate stays valid: started again, it is back.
        """
        try:
            async with self._asking(_registry) as stub:
                await stub.Deregister(registry_pb2.DeregisterRequest(agent_id=agent_id), timeout=READ_S)
        except NoSuchAgent:
            return False
        return True

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        route, self._route, self._reached = self._route, None, False
        if route is not None:
            await route.close()

    async def _connected(self) -> Route:
        """The way to the control plane, after it has answered there once."""
        if self._route is not None and self._reached:
            return self._route
        async with self._connecting:
            if self._route is None:
                self._route = self._new_route()
            route = self._route
            if not self._reached:
                # So that a connection that breaks during a task was lost, not refused.
                async with self._translated():
                    with route.connection.use() as line:
                        stub: Any = line.stub(health_pb2_grpc.HealthStub)  # its methods are made at run time
                        async with route.timing(line):
                            await stub.Check(health_pb2.HealthCheckRequest(), timeout=CONNECT_S)
                self._reached = True
            return route

    @asynccontextmanager
    async def _asking(self, make: Callable[[aio.Channel], StubT]) -> AsyncIterator[StubT]:
        """What to ask a service with, a stub that *make* makes; errors are ours."""
        route = await self._connected()
        async with self._translated():
            with route.connection.use() as line:
                yield line.stub(make)

    async def _linked(self) -> Calls:
        """The link to the control plane, open."""
        route = await self._connected()
        try:
            return await route.linked()
        except Unavailable as exc:
            self._reached = False
            text = f"cannot reach the control plane at {self._address}: {exc}"
            raise route.explained(Unavailable(text)) from None
        except Expired as exc:
            raise route.explained(exc) from None

    def _lost(self, failure: ParallaxError) -> ParallaxError:
        """What a task ends with when the link breaks under it."""
        self._reached = False
        if isinstance(failure, Unavailable):
            return TaskFailed(
                OutcomeCode.CONTROL_PLANE_LOST,
                f"the connection to {self._address} ended during the call; whether the task ran is unknown",
            )
        return failure

    def _new_route(self) -> Route:
        # Slow to import, and needed here only.
        from parallax.runtime.settings import NO_CONTROL_PLANE, load_settings
        from parallax.security.config import get_mtls_config

        settings = self._settings or load_settings()
        tls = self._tls or get_mtls_config()
        self._address = self._address or settings.control_plane
        if self._address == NO_CONTROL_PLANE:
            raise ConfigError(
                "PARALLAX_CONTROL_PLANE is none, and a client needs one; SecureGrpcAgentProxy does without"
            )
        self._max_payload_bytes = settings.max_payload_bytes
        identity = Identity.parse_short(self._identity or settings.identity, tls.trust_domain)
        provider = MTLSCredentialsProvider(tls, identity=identity)
        return Route(
            "the control plane",
            provider,
            self._address,
            control_plane(tls.trust_domain),
            channel_options(settings.max_payload_bytes),
            lambda line: line.stub(_dispatch).Link(),
            self._lost,
            poll=settings.certs_poll,
            metrics_listen=settings.metrics_listen,
        )

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        """Raise what a call ended with as one of our errors."""
        try:
            yield
        except aio.AioRpcError as exc:
            raise self._error(exc) from None

    async def _watched(
        self, route: Route, request: registry_pb2.WatchAgentsRequest
    ) -> AsyncGenerator[registry_pb2.AgentEvents]:
        """
        The messages of one stream, after each of which *request* resumes behind it.

        It ends where the client was closed, or the connection has moved, and raises where it broke.
        """
        with route.connection.use() as line:
            call = line.stub(_registry).WatchAgents(request)
            stay = line.on_retire(call.cancel)
            synced = False
            try:
                while True:
                    async with self._translated(), asyncio.timeout(None if synced else READ_S):
                        message = await call.read()
                    if not isinstance(message, registry_pb2.AgentEvents):
                        raise Unavailable("the control plane ended the watch")
                    yield message
                    synced = synced or message.synced
                    request.resume_token = message.resume_token or request.resume_token
            except TimeoutError:
                raise Unavailable(f"the control plane did not tell the state within {READ_S:g} s") from None
            except (asyncio.CancelledError, aio.UsageError):
                task = asyncio.current_task()
                is_over = line.is_retired or self._route is not route
                if task is None or task.cancelling() or not is_over:
                    raise
            finally:
                stay()
                call.cancel()

    def _error(self, exc: aio.AioRpcError) -> ParallaxError:
        trailers = tuple(exc.trailing_metadata() or ())
        error = error_of(exc.code(), exc.details(), trailers)
        told = any(key == ERROR_KEY for key, _ in trailers)
        if not told and isinstance(error, Unavailable):
            self._reached = False
            error = Unavailable(f"cannot reach the control plane at {self._address}: {error}")
        return self._route.explained(error) if self._route is not None else error


def _registry(channel: aio.Channel) -> registry_pb2_grpc.RegistryServiceAsyncStub:
    return registry_pb2_grpc.RegistryServiceStub(channel)


def _dispatch(channel: aio.Channel) -> dispatch_pb2_grpc.DispatchServiceAsyncStub:
    return dispatch_pb2_grpc.DispatchServiceStub(channel)


def _limits(timeout: Duration, wait_for_agent: Duration) -> tuple[float, int]:
    """The one in seconds, the other in milliseconds."""
    wait_ms = round(_seconds("wait_for_agent", wait_for_agent) * 1000) if wait_for_agent else 0
    return time_limit(timeout), wait_ms


def time_limit(timeout: Duration) -> float:
    """*timeout* in seconds; raises InvalidRequest if a task cannot have it."""
    limit = _seconds("timeout", timeout)
    if not limit:
        raise InvalidRequest("timeout is 0: no task can end in no time; leave it out for 60 s")
    return limit


def _seconds(name: str, duration: Duration) -> float:
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    longest = wire.LONGEST.total_seconds()
    if not 0 <= seconds <= longest:  # nor is NaN
        raise InvalidRequest(f"{name} is {seconds:g} s: give 0 to {longest:g} s")
    return seconds
