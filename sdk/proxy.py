"""One remote agent as if it were local: no hop through the control plane."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typing_extensions import TypeVar

from parallax.protos import agent_pb2, agent_pb2_grpc, link_pb2, task_pb2
from parallax.runtime import wire
from parallax.runtime.calls import GRACE_S, Calls, Reply
from parallax.runtime.channel import direct_options
from parallax.runtime.outcome import (
    Failure,
    OutcomeCode,
    Payload,
    check_payload,
    check_task_name,
)
from parallax.runtime.status import ERROR_KEY, error_of
from parallax.sdk.client import CONNECT_S, DEFAULT_TIMEOUT, READ_S, Duration, time_limit
from parallax.sdk.payload import encode, reader
from parallax.sdk.result import result_of, results_of
from parallax.sdk.route import Route
from parallax.security.errors import (
    ConfigError,
    InvalidRequest,
    ParallaxError,
    TaskFailed,
    Unavailable,
    VerificationError,
)
from parallax.security.identity import Identity, Kind
from parallax.security.provider import MTLSCredentialsProvider

if TYPE_CHECKING:
    from parallax.security.config import MTLSConfig

T = TypeVar("T", default=Any)

ANONYMOUS: Final = "anonymous/"  # how the registry spells an agent that no certificate vouches for


class SecureGrpcAgentProxy:
    """
    An agent that listens itself, asked without a control plane in between; made by `from_metadata`.

    Whoever answers at its endpoint must prove to be that agent: another one's valid certificate
    is refused. A connection that breaks is made again by the next call.

    Attributes:
        agent_id, name, endpoint: As in the metadata.
    """

    def __init__(
        self,
        agent_id: str,
        name: str,
        endpoint: str,
        provider: MTLSCredentialsProvider,
        *,
        max_payload_bytes: int,
        link: bool,
        poll: timedelta,
        metrics_listen: str | None,
        control_plane: str | None,
    ) -> None:
        self.agent_id = agent_id
        self.name = name
        self.endpoint = endpoint
        self._max_payload_bytes = max_payload_bytes
        self._uses_link = link
        self._reached = False
        self._connecting = asyncio.Lock()
        self._closed = False
        self._route = Route(
            f"agent {agent_id}",
            provider,
            endpoint,
            Identity(provider.identity.trust_domain, Kind.AGENT, agent_id),
            direct_options(max_payload_bytes),
            lambda line: line.stub(_agent).Link(),
            self._lost,
            max_payload_bytes=max_payload_bytes,
            poll=poll,
            metrics_listen=metrics_listen,
            follows=control_plane,
        )

    @classmethod
    async def from_metadata(
        cls,
        metadata: Mapping[str, str],
        tls: MTLSConfig | None = None,
        logger: logging.Logger | None = None,
        *,
        identity: str | None = None,
        link: bool = True,
        control_plane: str | None = None,
    ) -> Self:
        """
        Connect to an agent.

        Args:
            metadata: Its `id` and `endpoint` (`host:port`), and perhaps its `name`.
            tls: Where our certificate is; by default what the `PARALLAX_*` environment says.
            logger: For warnings about the transport.
            identity: As whom to act; by default `PARALLAX_IDENTITY`, else client/cli.
            link: Whether calls share one stream, which is cheaper by far where there are many at once;
                otherwise each is a unary gRPC call.
            control_plane: Where one is that renews our certificate and tells whom to trust, and who is
                revoked: `host:port`, or "none"; by default `PARALLAX_CONTROL_PLANE`, else localhost:50051.
                No call goes there, and none waits for it.

        Raises:
            WrongIdentity: Another identity answers at that endpoint.
            ConfigError, IdentityError: The metadata, or our certificate, cannot be used.
            NotAuthorized, VerificationError, Unavailable: The agent cannot be asked.
        """
        # Slow to import, and needed here only.
        from parallax.runtime.address import parse_address
        from parallax.runtime.settings import NO_CONTROL_PLANE, load_settings
        from parallax.security.config import get_mtls_config

        missing = [key for key in ("id", "endpoint") if not metadata.get(key)]
        if missing:
            raise ConfigError(f"the metadata lacks {missing[0]!r}: give id, name and endpoint of an agent")
        parse_address(metadata["endpoint"])
        settings = load_settings(control_plane=control_plane)
        tls = tls or get_mtls_config()
        agent = Identity(tls.trust_domain, Kind.AGENT, metadata["id"].removeprefix(ANONYMOUS))
        ours = Identity.parse_short(identity or settings.identity, tls.trust_domain)
        proxy = cls(
            agent.name,
            metadata.get("name") or agent.name,
            metadata["endpoint"],
            MTLSCredentialsProvider(tls, logger, identity=ours),
            max_payload_bytes=settings.max_payload_bytes,
            link=link,
            poll=settings.certs_poll,
            metrics_listen=settings.metrics_listen,
            control_plane=settings.control_plane if settings.control_plane != NO_CONTROL_PLANE else None,
        )
        try:
            await (proxy._linked() if link else proxy._connected())
        except BaseException:
            await proxy.close()
            raise
        return proxy

    async def __aenter__(self) -> Self:
        """Begin; it is connected already."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the connection."""
        await self.close()

    async def analyze(
        self,
        task: str,
        data: Any = None,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,
        returns: type[T] = Any,  # type: ignore[assignment]  # what says nothing
    ) -> tuple[T, float]:
        """
        Have the agent do one task, as its own `analyze` would: a value, and a confidence from 0 to 1.

        Args:
            task: What to do, in the agent's own vocabulary.
            data: What JSON can carry, or bytes.
            timeout: As timedelta or seconds; the agent is told and stops then.
            returns: The type of the value; an answer that does not fit is INVALID_RESULT.

        Raises:
            TaskFailed: There is no value; its `code` says why, AGENT_LOST if the connection broke.
            InvalidRequest: *data* cannot be sent, or *timeout* is not above zero and at most a day.
            NotAuthorized, VerificationError, Unavailable: The agent cannot be asked.
            Revoked: Its identity is revoked, or was before it answered.
        """
        read, limit = reader(returns), time_limit(timeout)
        payload = check_payload(encode(data), self._max_payload_bytes)
        check_task_name(task)
        if not self._uses_link:
            return await self._call(task, payload, limit, read)
        calls = self._route.calls
        if calls is None or calls.is_broken:
            calls = await self._linked()
        _check_theirs(payload, calls)
        reply = await calls.call(wire.encode_work(task, payload), limit)
        reply.attempts = 1  # the agent had it, whatever it said
        result = result_of(reply, read)
        return result.value, result.confidence

    async def stream(
        self,
        task: str,
        data: Any = None,
        *,
        timeout: Duration = DEFAULT_TIMEOUT,
        returns: type[T] = Any,  # type: ignore[assignment]  # what says nothing
    ) -> AsyncGenerator[tuple[T, float], None]:
        """
        Have the agent do one task, and take its answer part by part; see `analyze`.

        It makes no more of it than fits into 1 MiB ahead of who takes the parts. Leaving the loop
        early cancels the task; do it under `contextlib.aclosing`, so that it happens at once. An agent
        that answers all at once gives one part.
        """
        read, limit = reader(returns), time_limit(timeout)
        payload = check_payload(encode(data), self._max_payload_bytes)
        check_task_name(task)
        if not self._uses_link:
            replies = self._parts(task, payload, limit)
        else:
            calls = await self._linked()
            _check_theirs(payload, calls)
            replies = calls.stream(wire.encode_work(task, payload), limit)
        async with aclosing(results_of(_had(replies), read)) as results:
            async for result in results:
                yield result.value, result.confidence

    async def capabilities(self) -> tuple[str, ...]:
        """What the agent says that it can do."""
        await self._connected()
        try:
            with self._route.connection.use() as line:
                ask, request = line.stub(_agent).GetCapabilities, agent_pb2.GetCapabilitiesRequest()
                response = await self._route.standing.ask(partial(ask, request, timeout=READ_S))
        except aio.AioRpcError as exc:
            raise self._unreached(_error(exc)[0]) from None
        return tuple(response.description.capabilities)

    async def check_health(self) -> bool:
        """Whether the agent takes tasks and calls itself healthy; False if it cannot be reached."""
        try:
            return await self._check() == health_pb2.HealthCheckResponse.SERVING
        except Unavailable:
            return False

    async def close(self) -> None:
        """Close the connection; calls under way end."""
        self._closed = True
        await self._route.close()

    async def _connected(self) -> None:
        """Return after the agent has answered once, so that a connection that breaks then was lost."""
        if not self._reached or self._closed:
            async with self._connecting:
                if self._closed:
                    raise _closed()
                if not self._reached:
                    await self._check()
                    self._reached = True

    async def _check(self) -> int:
        try:
            with self._route.connection.use() as line:
                stub: Any = line.stub(health_pb2_grpc.HealthStub)  # its methods are made at run time
                request = health_pb2.HealthCheckRequest()
                check = partial(stub.Check, request, timeout=CONNECT_S)
                async with self._route.timing(line):
                    response = await self._route.standing.ask(check)
        except aio.AioRpcError as exc:
            raise self._unreached(_error(exc)[0]) from None
        status: int = response.status
        return status

    async def _linked(self) -> Calls:
        """The link to the agent, open."""
        try:
            return await self._route.linked()
        except ParallaxError as exc:
            raise _closed() if self._closed else self._unreached(exc) from None

    async def _call(
        self, task: str, payload: Payload, limit: float, read: Callable[[Payload], T]
    ) -> tuple[T, float]:
        """One task as a unary call."""
        if not self._reached or self._closed:
            await self._connected()
        try:
            with self._route.connection.use() as line:
                ask, request = line.stub(_agent).Analyze, self._request(task, payload, limit)
                response = await self._route.standing.ask(partial(ask, request, timeout=limit + GRACE_S))
        except aio.AioRpcError as exc:
            raise self._broken(exc) from None
        outcome = response.outcome
        if not outcome.HasField("value"):
            raise _failure(outcome).to_error()
        try:
            value = wire.value_from_proto(outcome.value)
            return read(value.payload), value.confidence
        except InvalidRequest as exc:  # the agent's fault, not the caller's
            raise TaskFailed(OutcomeCode.INVALID_RESULT, str(exc)) from exc

    async def _parts(
        self, task: str, payload: Payload, limit: float
    ) -> AsyncGenerator[link_pb2.Part | Reply, None]:
        """One task as a call with a stream of parts, and these as a link would bring them."""
        await self._connected()
        standing = self._route.standing
        standing.check()
        end = standing.end
        with self._route.connection.use() as line:
            call = line.stub(_agent).AnalyzeStream(
                self._request(task, payload, limit), timeout=limit + GRACE_S
            )
            last: Reply | None = None
            try:
                # To its end, beyond the outcome: a call that is cut off keeps its channel and socket open.
                while isinstance(message := await standing.ask(call.read, end), agent_pb2.AnalyzePart):
                    if last is None and message.HasField("part"):
                        yield link_pb2.Part(value=message.part.SerializeToString())
                    elif last is None:
                        last = _reply(message.outcome)
                yield last or _reply(task_pb2.Outcome())
            except aio.AioRpcError as exc:
                raise self._broken(exc) from None
            finally:
                call.cancel()
                del call  # as in `Standing.ask`

    def _request(self, task: str, payload: Payload, limit: float) -> agent_pb2.AnalyzeRequest:
        request = agent_pb2.AnalyzeRequest(
            task=task, timeout_ms=max(1, round(limit * 1000)), max_payload_bytes=self._max_payload_bytes
        )
        inner = request.payload  # filled in place, as in `wire.encode_work`
        inner.data, inner.content_type = payload.data, payload.content_type
        return request

    def _lost(self, failure: ParallaxError) -> ParallaxError:
        """What a task ends with when the connection breaks under it."""
        if not isinstance(failure, Unavailable):
            return failure
        return TaskFailed(
            OutcomeCode.AGENT_LOST,
            f"the connection to {self.agent_id} at {self.endpoint} ended during the call; "
            "whether the task ran is unknown",
        )

    def _broken(self, exc: aio.AioRpcError) -> ParallaxError:
        """What a call without a link ended with, once the agent had been reached."""
        error, told = _error(exc)
        if exc.code() is StatusCode.DEADLINE_EXCEEDED:
            return TaskFailed(OutcomeCode.DEADLINE_EXCEEDED, f"agent {self.agent_id} did not answer in time")
        if exc.code() is StatusCode.RESOURCE_EXHAUSTED and not told:  # gRPC itself, in either direction
            return InvalidRequest(f"{error}; set PARALLAX_MAX_PAYLOAD_BYTES alike on both sides")
        if told or not isinstance(error, Unavailable):
            return self._route.explained(error)
        self._reached = False
        return self._lost(error)

    def _unreached(self, error: ParallaxError) -> ParallaxError:
        """*error*, saying whom we wanted to reach."""
        error = self._route.explained(error)
        text = f"cannot reach {self.agent_id} at {self.endpoint}: {error}"
        if isinstance(error, Unavailable):
            return Unavailable(text, retry_after=error.retry_after)
        return type(error)(text) if isinstance(error, VerificationError) else error


def _agent(channel: aio.Channel) -> agent_pb2_grpc.AgentServiceAsyncStub:
    return agent_pb2_grpc.AgentServiceStub(channel)


def _reply(outcome: task_pb2.Outcome) -> Reply:
    """*outcome* as a link would bring it."""
    match outcome.WhichOneof("result"):
        case "value":
            return Reply(value=outcome.value.SerializeToString())
        case "parts":
            return Reply(parts=outcome.parts)
        case _:
            return Reply(failure=wire.failure_to_proto(_failure(outcome)))


def _failure(outcome: task_pb2.Outcome) -> Failure:
    """The failure in *outcome*, which has no value."""
    if outcome.HasField("failure"):
        return wire.failure_from_proto(outcome.failure)
    return Failure(OutcomeCode.INVALID_RESULT, "the answer has neither a value nor a failure")


def _error(exc: aio.AioRpcError) -> tuple[ParallaxError, bool]:
    """What a call ended with, and whether it was the agent that said so."""
    trailers = tuple(exc.trailing_metadata() or ())
    return error_of(exc.code(), exc.details(), trailers), any(key == ERROR_KEY for key, _ in trailers)


def _check_theirs(payload: Payload, calls: Calls) -> None:
    """Refuse here what the agent would not take: over gRPC's limit it would end the link."""
    if calls.max_payload_bytes:
        check_payload(payload, calls.max_payload_bytes)


async def _had(
    replies: AsyncGenerator[link_pb2.Part | Reply, None],
) -> AsyncGenerator[link_pb2.Part | Reply, None]:
    """*replies*, saying that the agent had the task, whatever it said."""
    async with aclosing(replies):
        async for reply in replies:
            if isinstance(reply, Reply):
                reply.attempts = 1
            yield reply


def _closed() -> Unavailable:
    return Unavailable("the proxy is closed; make another with from_metadata")
