"""The gate every call of a server passes: who is it, may they, and what went wrong."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

import grpc
from grpc import aio

from parallax.runtime.expiry import until_expiry
from parallax.runtime.status import status_of, trailers_of
from parallax.security.bundle import TrustBundle, parse_certificates
from parallax.security.credentials import CredentialStore
from parallax.security.errors import (
    ConfigError,
    Expired,
    IdentityError,
    InvalidRequest,
    NotAuthorized,
    ParallaxError,
    VerificationError,
)
from parallax.security.verification import Peer, Usage, authenticate

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_KNOWN_LEAVES: Final = 10_000  # what the cache of verified leaves may hold; about 4 KiB each

Context = aio.ServicerContext[Any, Any]


def _reason(cls: type[ParallaxError]) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


_REFUSALS: Final[tuple[type[ParallaxError], ...]] = (
    VerificationError,
    *VerificationError.__subclasses__(),
    NotAuthorized,
    IdentityError,
)
# What a refusal is called in logs and metrics: the error's class, spelled as handshakes' reasons are.
REASONS: Final = tuple(_reason(cls) for cls in _REFUSALS)


@dataclass(frozen=True, slots=True)
class Anonymous:
    """A caller that no certificate vouches for: client certificates are not asked for."""

    def __str__(self) -> str:
        return "anonymous"


Caller = Peer | Anonymous


def name_of(caller: Caller | None) -> str:
    """*caller* for a log line."""
    return str(caller.identity) if isinstance(caller, Peer) else str(caller or "unknown")


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that is being handled; set by the gate, from the certificate alone."""
    return _caller.get()


class Authenticator:
    """
    Finds the peer of a call in the certificate of its connection.

    A leaf is verified once and then known by its PEM bytes until the trust bundle
    changes; its validity is compared at every call, for connections outlive it.

    Args:
        store: What this server trusts; None where client certificates are not asked for.
    """

    def __init__(
        self, store: CredentialStore | None, trust_domain: str, clock: Callable[[], datetime]
    ) -> None:
        self._store = store
        self._trust_domain = trust_domain
        self._clock = clock
        self._bundle: TrustBundle | None = None
        self._known: dict[bytes, Peer] = {}

    def authenticate(self, context: Context) -> Caller:
        """
        The caller behind *context*.

        Raises:
            VerificationError: There is no certificate, it must not be trusted, or it names no one identity.
        """
        if self._store is None:
            return Anonymous()
        connection: Mapping[str, Sequence[bytes]] = context.auth_context()  # type: ignore[assignment]
        leaf = connection.get("x509_pem_cert")
        if not leaf:
            raise VerificationError("the caller showed no certificate")
        now = self._clock()
        bundle = self._store.current.bundle
        if bundle is not self._bundle:
            self._bundle, self._known = bundle, {}
        peer = self._known.get(leaf[0])
        if peer is None:
            peer = self._verify(leaf[0], connection.get("x509_pem_cert_chain", ()), bundle, now)
            if len(self._known) >= MAX_KNOWN_LEAVES:
                self._known.clear()
            self._known[leaf[0]] = peer
        if now > peer.not_after:
            raise Expired(
                f"the certificate of {peer.identity} expired at {peer.not_after:%Y-%m-%dT%H:%M:%SZ}"
            )
        return peer

    def _verify(self, leaf: bytes, above: Sequence[bytes], bundle: TrustBundle, now: datetime) -> Peer:
        """Who *leaf* says it is; *above* are the intermediates, which gRPC hands out without the leaf."""
        try:
            certificates = parse_certificates(b"\n".join(pem for pem in (leaf, *above) if pem))
            return authenticate(certificates, bundle, self._trust_domain, now, Usage.CLIENT)
        except (ConfigError, IdentityError) as exc:
            # Here it is the peer's proof that is unusable, not our deployment nor a request.
            raise VerificationError(f"the caller's certificate: {exc}") from exc

    def remaining(self, caller: Caller) -> float | None:
        """How many seconds *caller*'s certificate is still valid; None for a caller without one."""
        return (caller.not_after - self._clock()).total_seconds() if isinstance(caller, Peer) else None


class Gate(aio.ServerInterceptor):
    """
    What every call passes: authentication, authorization, and errors turned into status.

    A call ends when the certificate it was made with expires.

    Args:
        authorize: Called with the caller and the full method name; raises NotAuthorized.
        on_refusal: Told the reason of each refused authentication or authorization, see `REASONS`.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        authorize: Callable[[Caller, str], None],
        on_refusal: Callable[[str], None],
    ) -> None:
        self._authenticator = authenticator
        self._authorize = authorize
        self._on_refusal = on_refusal
        self._gated: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Put the gate before the method's handler; a method nobody serves stays UNIMPLEMENTED."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known, gated = self._gated.get(method, (None, None))
        if known is not handler:
            gated = self._gate(handler, method)
            self._gated[method] = handler, gated
        return gated

    def _gate(self, handler: Any, method: str) -> Any:
        deserialize = _forgiving(handler.request_deserializer, streaming=handler.request_streaming)

        async def unary(request: object, context: Context) -> object:
            async def body() -> object:
                behaviour = handler.unary_unary or handler.stream_unary
                return await behaviour(_read(request), context)

            return await self._pass(method, context, body)

        async def stream(request: object, context: Context) -> None:
            async def body() -> None:
                # Without it, a cancellation during the first write leaves the client hanging.
                await context.send_initial_metadata(())
                behaviour = handler.unary_stream or handler.stream_stream
                produced = behaviour(_read(request), context)
                if inspect.isasyncgen(produced):
                    async for message in produced:
                        await context.write(message)
                else:
                    await produced

            return await self._pass(method, context, body)

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        return make(stream if handler.response_streaming else unary, deserialize, handler.response_serializer)

    async def _pass(self, method: str, context: Context, body: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._admit(method, context, body)
        except aio.AbortError:
            raise
        except ParallaxError as exc:
            code, text, trailers = status_of(exc), str(exc), trailers_of(exc)
        except aio.InternalError:  # a write failed: the peer has hung up
            code, text, trailers = grpc.StatusCode.UNAVAILABLE, "the connection ended during the call", ()
        except Exception:
            # A bug is logged here and told to nobody.
            logger.exception("handler failed", extra={"method": method})
            code, text, trailers = (
                grpc.StatusCode.INTERNAL,
                "internal error; the server's log has the cause",
                (),
            )
        # Out here, where no traceback holds what the call held: a peer that does not read keeps this waiting.
        try:
            await context.abort(code, text, trailers)
        except aio.InternalError:  # until it has hung up, which gRPC would log as a fault of ours
            # Nor may it be another AbortError than gRPC's own, which there is none of then.
            raise asyncio.CancelledError(text) from None
        raise AssertionError("abort returned")

    async def _admit(self, method: str, context: Context, body: Callable[[], Awaitable[T]]) -> T:
        caller: Caller | None = None
        try:
            caller = self._authenticator.authenticate(context)
            self._authorize(caller, method)
        except ParallaxError as exc:
            self._note_refusal(method, caller, exc)
            raise
        _caller.set(caller)
        ends: asyncio.Timeout | None = None
        try:
            async with until_expiry(partial(self._authenticator.remaining, caller)) as ends:
                return await body()
        except NotAuthorized as exc:  # it spoke for somebody else
            self._note_refusal(method, caller, exc)
            raise
        except TimeoutError:
            if ends is None or not ends.expired():
                raise
            raise Expired(
                f"the certificate of {name_of(caller)} expired during the call; renew it and call again"
            ) from None

    def _note_refusal(self, method: str, caller: Caller | None, exc: ParallaxError) -> None:
        reason = _reason(type(exc))
        self._on_refusal(reason)
        logger.warning(
            "call refused",
            extra={"method": method, "peer": name_of(caller), "reason": reason, "detail": str(exc)},
        )


class _Malformed:
    """Stands for a message that could not be read: gRPC must not answer for it, the gate does."""


_MALFORMED: Final = _Malformed()


def _forgiving(
    deserialize: Callable[[bytes], object] | None, *, streaming: bool
) -> Callable[[bytes], object]:
    """
    *deserialize*, for bytes that may be no message.

    Of a stream they are read by the handler, which is told; one request is read before
    there is a handler to tell, so that a marker stands for it.
    """

    def parse(data: bytes) -> object:
        if deserialize is None:
            return data
        try:
            return deserialize(data)
        except Exception:  # noqa: BLE001 - whatever a parser throws at hostile bytes
            if streaming:
                raise _malformed() from None
            return _MALFORMED

    return parse


def _read(request: object) -> object:
    if request is _MALFORMED:
        raise _malformed()
    return request


def _malformed() -> InvalidRequest:
    return InvalidRequest("the message is not what this method takes; check schema and versions")


def utc_now() -> datetime:
    """The wall clock, aware UTC."""
    return datetime.now(UTC)
