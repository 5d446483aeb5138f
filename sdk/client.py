"""Asking the fleet for work: asynchronously, or with a synchronous face for scripts and notebooks."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parallax.protos import dispatch_pb2_grpc, registry_pb2, registry_pb2_grpc
from parallax.runtime import wire
from parallax.runtime.calls import Calls, Reply
from parallax.runtime.channel import channel_options
from parallax.runtime.link import answer_of
from parallax.runtime.outcome import (
    MAX_PAYLOAD_BYTES,
    Complete,
    OutcomeCode,
    check_payload,
    check_task_name,
)
from parallax.runtime.session import STEADY_S, backoff_s
from parallax.runtime.status import ERROR_KEY, error_of
from parallax.runtime.wire import decode_value, encode_work
from parallax.sdk.agents import AgentEvent, AgentInfo, Known, Labels, Several, filter_to_proto
from parallax.sdk.payload import decode, encode
from parallax.security.errors import InvalidRequest, NoSuchAgent, ParallaxError, TaskFailed, Unavailable
from parallax.security.identity import Identity, control_plane
from parallax.security.provider import MTLSCredentialsProvider

if TYPE_CHECKING:
    from anyio.from_thread import BlockingPortal

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


@dataclass(frozen=True, slots=True)
class Result:
    """An agent's answer: *value* is what JSON carries or bytes, *confidence* from 0 to 1."""

    value: Any
    confidence: float
    agent_id: str


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
        self._max_payload_bytes = MAX_PAYLOAD_BYTES
        self._channel: aio.Channel | None = None
        self._reached = False
        self._connecting = asyncio.Lock()
        self._calls: Calls | None = None
        self._linking = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """Connect; raises what stands in the way."""
        await self._connected()
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
    ) -> Result:
        """
        Have one task done.

        Args:
            target: An agent id, or `capability:<name>` for the least loaded agent that has it.
            task: What to do, in the agent's own vocabulary.
            data: What JSON can carry, or bytes.
            timeout: For everything, as timedelta or seconds; the agent is told and stops then.
            wait_for_agent: How long to wait for an eligible agent to connect; 0 fails at once.
            idempotent: It may run more than once, so it is tried elsewhere if its agent is lost.
            allow_unverified: An agent that no certificate vouches for will do.

        Raises:
            TaskFailed: There is no value; its `code` says why.
            InvalidRequest: *data* cannot be sent, or a duration is negative or longer than a day.
            NotAuthorized, VerificationError, Unavailable: The control plane cannot be asked.
        """
        limit, wait = _seconds("timeout", timeout), _seconds("wait_for_agent", wait_for_agent)
        if not limit:
            raise InvalidRequest("timeout is 0: no task can end in no time; leave it out for 60 s")
        payload = encode(data)
        calls = self._calls
        if calls is None or calls.is_broken:
            calls = await self._linked()
        work = encode_work(check_task_name(task), check_payload(payload, self._max_payload_bytes))
        reply = await calls.call(
            work,
            limit,
            target,
            wait_for_agent_ms=round(wait * 1000),
            idempotent=idempotent,
            allow_unverified=allow_unverified,
        )
        return result_of(reply)

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
        stub = registry_pb2_grpc.RegistryServiceStub(await self._connected())
        found: list[AgentInfo] = []
        token = ""
        ends = time.monotonic() + READ_S
        while True:
            request = registry_pb2.ListAgentsRequest(filter=wanted, page_size=PAGE, page_token=token)
            async with self._translated():
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
        told then, or worked out from the whole state. Tasks in flight are no change.

        Raises:
            InvalidRequest, NotAuthorized, VerificationError: The control plane refuses to tell.
        """
        request = registry_pb2.WatchAgentsRequest(
            filter=filter_to_proto(capability, labels, state, verified=verified)
        )
        known = Known()
        attempt = 0
        while True:
            began = time.monotonic()
            known.begin()
            try:
                async with aclosing(self._watched(request)) as messages:
                    async for message in messages:
                        for event in known.learn(message):
                            yield event
            except ParallaxError as exc:
                if type(exc) not in _PASSING:
                    raise
                logger.info("the watch was interrupted", extra={"cause": str(exc)})
            else:
                return
            if time.monotonic() - began > STEADY_S:
                attempt = 0
            spread = random.random()  # noqa: S311 - spreads load, hides nothing
            await asyncio.sleep(backoff_s(attempt, spread))
            attempt += 1

    async def agent(self, agent_id: str) -> AgentInfo:
        """One registered agent; raises NoSuchAgent."""
        stub = registry_pb2_grpc.RegistryServiceStub(await self._connected())
        async with self._translated():
            response = await stub.GetAgent(registry_pb2.GetAgentRequest(agent_id=agent_id), timeout=READ_S)
        return AgentInfo.from_proto(response.agent)

    async def remove_agent(self, agent_id: str) -> bool:
        """
        Take an agent out for good: its session ends, and its process stops; False if it was not there.

        Only `client/admin` may. Its certificate stays valid: started again, it is back.
        """
        stub = registry_pb2_grpc.RegistryServiceStub(await self._connected())
        try:
            async with self._translated():
                await stub.Deregister(registry_pb2.DeregisterRequest(agent_id=agent_id), timeout=READ_S)
        except NoSuchAgent:
            return False
        return True

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        if self._calls is not None:
            await self._calls.close()
            self._calls = None
        if self._channel is not None:
            await self._channel.close()
            self._channel, self._reached = None, False

    async def _connected(self) -> aio.Channel:
        """The channel, after the control plane has answered on it once."""
        if self._channel is not None and self._reached:
            return self._channel
        async with self._connecting:
            if self._channel is None:
                self._channel = self._dial()
            if not self._reached:
                # So that a connection that breaks during a task was lost, not refused.
                stub = health_pb2_grpc.HealthStub(self._channel)
                async with self._translated():
                    await stub.Check(  # type: ignore[attr-defined]  # made at run time
                        health_pb2.HealthCheckRequest(), timeout=CONNECT_S
                    )
                self._reached = True
            return self._channel

    async def _linked(self) -> Calls:
        """The link to the control plane, open."""
        async with self._linking:
            if self._calls is None or self._calls.is_broken:
                if self._calls is not None:
                    await self._calls.close()
                    self._calls = None
                channel = await self._connected()
                calls = Calls("the control plane", self._lost)
                try:
                    await calls.open(dispatch_pb2_grpc.DispatchServiceStub(channel).Link())
                except Unavailable as exc:
                    self._reached = False
                    raise Unavailable(f"cannot reach the control plane at {self._address}: {exc}") from None
                self._calls = calls
            return self._calls

    def _lost(self, failure: ParallaxError) -> ParallaxError:
        """What a task ends with when the link breaks under it."""
        self._reached = False
        if isinstance(failure, Unavailable):
            return TaskFailed(
                OutcomeCode.CONTROL_PLANE_LOST,
                f"the connection to {self._address} ended during the call; whether the task ran is unknown",
            )
        return failure

    def _dial(self) -> aio.Channel:
        # Slow to import, and needed here only.
        from parallax.runtime.settings import load_settings
        from parallax.security.config import get_mtls_config

        settings = load_settings()
        tls = self._tls or get_mtls_config()
        self._address = self._address or settings.control_plane
        self._max_payload_bytes = settings.max_payload_bytes
        identity = Identity.parse_short(self._identity or settings.identity, tls.trust_domain)
        provider = MTLSCredentialsProvider(tls, identity=identity)
        return provider.channel(
            self._address, control_plane(tls.trust_domain), channel_options(settings.max_payload_bytes)
        )

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        """Raise what a call ended with as one of our errors."""
        try:
            yield
        except aio.AioRpcError as exc:
            raise self._error(exc) from None

    async def _watched(
        self, request: registry_pb2.WatchAgentsRequest
    ) -> AsyncGenerator[registry_pb2.AgentEvents]:
        """
        The messages of one stream, after each of which *request* resumes behind it.

        It ends where the client was closed, and raises where it broke.
        """
        channel = await self._connected()
        call = registry_pb2_grpc.RegistryServiceStub(channel).WatchAgents(request)
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
            if task is None or task.cancelling() or self._channel is channel:
                raise
        finally:
            call.cancel()

    def _error(self, exc: aio.AioRpcError) -> ParallaxError:
        trailers = tuple(exc.trailing_metadata() or ())
        error = error_of(exc.code(), exc.details(), trailers)
        told = any(key == ERROR_KEY for key, _ in trailers)
        if told or not isinstance(error, Unavailable):
            return error
        self._reached = False
        return Unavailable(f"cannot reach the control plane at {self._address}: {error}")


class SyncParallaxClient:
    """
    The same client for code without an event loop: `with SyncParallaxClient() as client:`.

    It runs the asynchronous client in a thread of its own; arguments, results and
    errors are the same.
    """

    def __init__(
        self, address: str | None = None, tls: MTLSConfig | None = None, *, identity: str | None = None
    ) -> None:
        self._client = ParallaxClient(address, tls, identity=identity)
        self._stack = ExitStack()
        self._portal: BlockingPortal | None = None

    def __enter__(self) -> Self:
        """Connect; raises what stands in the way."""
        from anyio.from_thread import start_blocking_portal

        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            context: AbstractContextManager[ParallaxClient] = portal.wrap_async_context_manager(self._client)
            stack.enter_context(context)
            self._portal = portal
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection and end the thread."""
        self._portal = None
        self._stack.__exit__(kind, exc, traceback)

    def analyze(
        self,
        target: str,
        task: str,
        data: Any = None,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,
        wait_for_agent: Duration = 0,
        idempotent: bool = False,
        allow_unverified: bool = False,
    ) -> Result:
        """Have one task done: see `ParallaxClient.analyze`."""

        async def call() -> Result:
            return await self._client.analyze(
                target,
                task,
                data,
                timeout=timeout,
                wait_for_agent=wait_for_agent,
                idempotent=idempotent,
                allow_unverified=allow_unverified,
            )

        return self._entered.call(call)

    def agents(
        self,
        *,
        capability: Several = (),
        labels: Labels = NO_LABELS,
        state: Several = (),
        verified: bool | None = None,
    ) -> list[AgentInfo]:
        """The registered agents that fulfil everything stated: see `ParallaxClient.agents`."""

        async def call() -> list[AgentInfo]:
            return await self._client.agents(
                capability=capability, labels=labels, state=state, verified=verified
            )

        return self._entered.call(call)

    def agent(self, agent_id: str) -> AgentInfo:
        """One registered agent; raises NoSuchAgent."""
        return self._entered.call(self._client.agent, agent_id)

    def remove_agent(self, agent_id: str) -> bool:
        """Take an agent out for good: see `ParallaxClient.remove_agent`."""
        return self._entered.call(self._client.remove_agent, agent_id)

    @property
    def _entered(self) -> BlockingPortal:
        if self._portal is None:
            raise RuntimeError("use it as a context manager: with SyncParallaxClient() as client: ...")
        return self._portal


def result_of(reply: Reply) -> Result:
    """
    What *reply* brings.

    Raises:
        InvalidRequest: The task was refused before any agent had it.
        TaskFailed: It has no value.
    """
    answer = answer_of(reply)
    if isinstance(answer, bytes):
        try:
            value = decode_value(answer)
            return Result(decode(value.payload), value.confidence, reply.agent_id)
        except InvalidRequest as exc:  # the agent's fault, not the caller's
            raise TaskFailed(OutcomeCode.INVALID_RESULT, str(exc)) from exc
    if isinstance(answer, Complete):
        raise TaskFailed(OutcomeCode.INVALID_RESULT, "the agent answered in parts, which nobody asked for")
    if answer.code is OutcomeCode.INVALID_ARGUMENT and not reply.attempts:
        raise InvalidRequest(answer.message)
    raise answer.to_error()


def _seconds(name: str, duration: Duration) -> float:
    seconds = duration.total_seconds() if isinstance(duration, timedelta) else float(duration)
    longest = wire.LONGEST.total_seconds()
    if not 0 <= seconds <= longest:  # nor is NaN
        raise InvalidRequest(f"{name} is {seconds:g} s: give 0 to {longest:g} s")
    return seconds
