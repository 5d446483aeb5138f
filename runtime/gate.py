"""The gate every call of a server passes: who is it, may they, and what went wrong."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NoReturn

import grpc
from cryptography.x509 import Certificate
from grpc import aio

from parallax.runtime.address import host_of
from parallax.runtime.expiry import Expiry, Lapsing, no_news
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
    Revoked,
    VerificationError,
)
from parallax.security.identity import Identity
from parallax.security.pinned import NO_PINS, authenticate_pinned, is_self_signed
from parallax.security.verification import Peer, Usage, authenticate

logger = logging.getLogger(__name__)

MAX_KNOWN_LEAVES: Final = 10_000  # what the cache of verified leaves may hold; about 1.5 KiB each
REVIEWED_AT_ONCE: Final = 16  # open calls, 2 ms if each has to be verified again
GATHER_S: Final = 0.01  # revocations share a look at the open calls: 10 ms for 10,000 of them
MAX_COPIES: Final = 32  # of one identity: processes that share it, and what each has had before

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


@dataclass(frozen=True, slots=True)
class Refusal:
    """
    A call that was not let in, or was ended because it would not be any more.

    Args:
        caller: None if it is not known who that is.
        source: The peer's address, as gRPC spells it.
    """

    method: str
    caller: Caller | None
    source: str
    cause: ParallaxError

    @property
    def reason(self) -> str:
        """What it is called, one of `REASONS`."""
        return _reason(type(self.cause))


OnVerified = Callable[[Peer, Certificate], bool]
CheckRevoked = Callable[[Peer], None]


def name_of(caller: Caller | None) -> str:
    """*caller* for a log line."""
    return str(caller.identity) if isinstance(caller, Peer) else str(caller or "unknown")


_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who makes the call that is being handled; set by the gate, from the certificate alone."""
    return _caller.get()


_source: ContextVar[str] = ContextVar("source", default="")


def current_source() -> str:
    """The address, without a port, from which the call that is being handled comes; "" outside of one."""
    return host_of(_source.get())


_stream: ContextVar[tuple[Peer, Lapsing] | None] = ContextVar("stream", default=None)


def drain_after_expiry(drain: timedelta, lapsed: Callable[[ParallaxError], None]) -> None:
    """
    Let the stream that is being handled outlive its certificate by *drain*, to finish what is open.

    So it may, too, when its caller would not be let in any more: until its certificate ends, and the drain
    time after. A stream that does not ask for it ends at once then, and with its certificate.

    Args:
        lapsed: Told at either end what the stream is to end with. From then on it may begin nothing new.
    """
    found = _stream.get()
    if found is not None:
        peer, lapsing = found
        lapsing.drain(drain.total_seconds(), lambda cause: lapsed(cause or _expired(peer)))


class Authenticator:
    """
    Finds the peer of a call in the certificate of its connection.

    A leaf is verified once and then known by its PEM bytes until the roots of the trust bundle or the pins
    change, or its identity has come with `MAX_COPIES` others. Its validity is compared at every call, for
    connections outlive it.

    Args:
        store: What this server trusts; None where client certificates are not asked for.
        on_verified: Told whenever a leaf that was not known has been verified, one that is revoked, too;
            False: tell it again.
        check_revoked: Asked at every call, for a revocation has no time to lose; raises Revoked.
    """

    def __init__(
        self,
        store: CredentialStore | None,
        trust_domain: str,
        clock: Callable[[], datetime],
        on_verified: OnVerified = lambda _peer, _leaf: True,
        check_revoked: CheckRevoked = lambda _peer: None,
    ) -> None:
        self.check_revoked = check_revoked
        self._store = store
        self._trust_domain = trust_domain
        self._clock = clock
        self._on_verified = on_verified
        self._bundle: TrustBundle | None = None
        self._pins = NO_PINS
        self._known: dict[bytes, Peer] = {}
        self._copies: dict[Identity, list[bytes]] = {}  # the leaves known, the oldest first

    def authenticate(self, context: Context) -> Caller:
        """
        The caller behind *context*, who need not be let in: see `check`.

        Raises:
            VerificationError: There is no certificate, it must not be trusted, or it names no one identity.
        """
        if self._store is None:
            return Anonymous()
        connection: Mapping[str, Sequence[bytes]] = context.auth_context()  # type: ignore[assignment]
        leaf = connection.get("x509_pem_cert")
        if not leaf:
            raise VerificationError("the caller showed no certificate")
        bundle = self._store.current.bundle
        if bundle is not self._bundle:  # as after every rotation; most leave the roots as they were
            if bundle != self._bundle:
                self._forget()
            self._bundle = bundle
        if self._store.pins is not self._pins:
            self._pins = self._store.pins
            self._forget()
        peer = self._known.get(leaf[0])
        if peer is None:
            above = connection.get("x509_pem_cert_chain", ())
            peer, certificate = self._verify(leaf[0], above, bundle, self._clock())
            if self._on_verified(peer, certificate):
                self._remember(leaf[0], peer)
        return peer

    def check(self, caller: Caller) -> None:
        """
        Pass if the certificate of *caller* is good at this moment.

        Raises:
            Revoked: It is withdrawn.
            Expired: It has ended.
        """
        if not isinstance(caller, Peer):
            return
        self.check_revoked(caller)
        if self._clock() > caller.not_after:
            raise Expired(
                f"the certificate of {caller.identity} expired at {caller.not_after:%Y-%m-%dT%H:%M:%SZ}"
            )

    def _remember(self, leaf: bytes, peer: Peer) -> None:
        if len(self._known) >= MAX_KNOWN_LEAVES:
            self._forget()
        copies = self._copies.setdefault(peer.identity, [])
        if len(copies) >= MAX_COPIES:
            del self._known[copies.pop(0)]
        copies.append(leaf)
        self._known[leaf] = peer

    def _forget(self) -> None:
        self._known.clear()
        self._copies.clear()

    def _verify(
        self, leaf: bytes, above: Sequence[bytes], bundle: TrustBundle, now: datetime
    ) -> tuple[Peer, Certificate]:
        """
        Who *leaf* says it is; *above* are the intermediates, which gRPC hands out without the leaf.

        The handshake took pinned certificates for CAs. Here only the bundle has CAs, and who signed for
        himself is looked for among the pins alone.
        """
        try:
            certificates = parse_certificates(b"\n".join(pem for pem in (leaf, *above) if pem))
            if len(certificates) == 1 and is_self_signed(certificates[0]):
                peer = authenticate_pinned(certificates[0], self._pins, self._trust_domain, now)
            else:
                peer = authenticate(certificates, bundle, self._trust_domain, now, Usage.CLIENT)
        except (ConfigError, IdentityError) as exc:
            # Here it is the peer's proof that is unusable, not our deployment nor a request.
            raise VerificationError(f"the caller's certificate: {exc}") from exc
        return peer, certificates[0]


class Gate:
    """
    What every call passes: authentication, authorization, and errors turned into status.

    A call ends when the certificate it was made with expires; a stream may ask for time to drain. What is
    open when trust is withdrawn ends at once, see `review` and `end_revoked`.

    It stands in the handlers themselves, not in a gRPC interceptor, which costs as much again as
    all that is done here: a tenth of a unary call (docs/performance.md).

    Args:
        authorize: Called with the caller and the full method name; raises NotAuthorized.
        on_refusal: Told of each refused authentication or authorization.
        clock: Aware UTC.
        on_call: Told the peer's address of each call, of those refused too.
        check_current: Asked before anybody is let in whom a certificate vouches for; raises what to tell
            him where it is not known who is revoked.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        authorize: Callable[[Caller, str], None],
        on_refusal: Callable[[Refusal], None],
        clock: Callable[[], datetime],
        on_call: Callable[[str], None] | None = None,
        check_current: Callable[[], None] = lambda: None,
    ) -> None:
        self._check_current = check_current
        self._authenticator = authenticator
        self._authorize = authorize
        self._on_call = on_call
        self._on_refusal = on_refusal
        self._expiry = Expiry(clock)
        self._looking: asyncio.TimerHandle | None = None  # for calls whose caller was revoked

    def before(self, handler: Any, method: str) -> Any:
        """The handler of *method*, a full gRPC method name, behind the gate."""
        if handler.response_streaming:
            behaviour: Any = _written(handler.unary_stream or handler.stream_stream)
        else:
            behaviour = handler.unary_unary or handler.stream_unary
        enter, leave = self._expiry.enter, self._expiry.leave
        is_stream = handler.response_streaming
        on_lapse = None if is_stream else no_news

        async def gated(request: object, context: Context) -> Any:
            caller: Caller | None = None
            lapsing: Lapsing | None = None
            try:
                caller = self._admit(method, context)
                if isinstance(caller, Peer):
                    lapsing = enter(caller.not_after, (method, context, caller), on_lapse)
                    if is_stream:
                        _stream.set((caller, lapsing))
                _check_readable(request)
                return await behaviour(request, context)
            except (Exception, asyncio.CancelledError) as exc:
                if isinstance(exc, NotAuthorized):  # it spoke for somebody else
                    self._note(Refusal(method, caller, context.peer(), exc))
                verdict = self._verdict(method, caller, lapsing, exc)
                if verdict is None:
                    raise
            finally:
                if lapsing is not None:
                    leave(lapsing)
                    if is_stream:
                        _stream.set(None)  # it knows this task, whose context would know it for ever
            # Out here, where no traceback holds what the call held: a peer that does not read keeps this
            # waiting.
            return await _abort(context, *verdict)

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[handler.request_streaming, handler.response_streaming]
        deserialize = _forgiving(handler.request_deserializer, streaming=handler.request_streaming)
        return make(gated, deserialize, handler.response_serializer)

    def review(self) -> None:
        """
        Look again at all open calls, as after a root was taken out.

        Whose caller has been revoked, ends. Whose caller would not be let in any more for another cause,
        finishes what is open and begins nothing new: a caller that has moved to another certificate loses
        nothing. A few at a time, so that others go on meanwhile: 10,000 streams take about a second.
        """
        self._review_some(list(self._expiry))

    def end_revoked(self) -> None:
        """
        End all open calls whose caller is revoked by now, in a moment and at once.

        What is known of each caller is enough for that: nobody is verified again.
        """
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(GATHER_S, self._end_revoked)

    def lapse(self, cause: ParallaxError) -> None:
        """Let what is open be finished, and nothing new begin on it, because of *cause*."""
        for call in list(self._expiry):
            call.lapse(cause)

    def _end_revoked(self) -> None:
        self._looking = None
        for call in self._expiry:
            method, context, peer = call.work
            try:
                self._authenticator.check_revoked(peer)
            except Revoked as exc:
                if not call.is_over:
                    call.end(exc)
                    self._note(Refusal(method, peer, context.peer(), exc))

    def _review_some(self, calls: list[Lapsing]) -> None:
        for call in calls[-REVIEWED_AT_ONCE:]:
            method, context, _ = call.work
            try:
                if not call.is_over:
                    self._check(method, context)
            except _Refused as exc:
                cause = exc.refusal.cause
                if isinstance(cause, Revoked):
                    call.end(cause)
                elif not isinstance(cause, Expired):  # which is watched anyway, and it may be draining
                    call.lapse(cause)
                if call.is_over:
                    self._note(exc.refusal)
        del calls[-REVIEWED_AT_ONCE:]
        if calls:
            asyncio.get_running_loop().call_soon(self._review_some, calls)

    def _admit(self, method: str, context: Context) -> Caller:
        source = context.peer()
        if self._on_call is not None:
            self._on_call(source)
        try:
            caller = self._check(method, context)
        except _Refused as exc:
            self._note(exc.refusal)
            raise
        if isinstance(caller, Peer):
            self._check_current()
        _caller.set(caller)
        _source.set(source)
        return caller

    def _check(self, method: str, context: Context) -> Caller:
        caller: Caller | None = None
        try:
            caller = self._authenticator.authenticate(context)
            self._authenticator.check(caller)
            self._authorize(caller, method)
        except ParallaxError as exc:
            raise _Refused(Refusal(method, caller, context.peer(), exc)) from None
        return caller

    def _verdict(
        self, method: str, caller: Caller | None, lapsing: Lapsing | None, exc: BaseException
    ) -> Verdict | None:
        """What a call that ended with *exc* is told; None if *exc* is for gRPC itself."""
        match exc:
            case aio.AbortError():
                return None
            case asyncio.CancelledError():
                if lapsing is None or not lapsing.has_ended_it():
                    return None
                return _verdict_of(lapsing.cause or _expired(caller))
            case _Refused():
                return _verdict_of(exc.refusal.cause)
            case ParallaxError():
                return _verdict_of(exc)
            case aio.InternalError():  # a write failed: the peer has hung up
                return grpc.StatusCode.UNAVAILABLE, "the connection ended during the call", ()
        # A bug is logged here and told to nobody.
        logger.error("handler failed", exc_info=exc, extra={"method": method})
        return grpc.StatusCode.INTERNAL, "internal error; the server's log has the cause", ()

    def _note(self, refusal: Refusal) -> None:
        self._on_refusal(refusal)
        logger.warning(
            "call refused",
            extra={
                "method": refusal.method,
                "peer": name_of(refusal.caller),
                "reason": refusal.reason,
                "detail": str(refusal.cause),
            },
        )


Verdict = tuple[grpc.StatusCode, str, tuple[tuple[str, str], ...]]
"""Status, text and trailers of a call that failed."""


class _Refused(Exception):
    """A call is not let in."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal)
        self.refusal = refusal


def _expired(caller: Caller | None) -> Expired:
    return Expired(f"the certificate of {name_of(caller)} expired during the call; renew it and call again")


def _verdict_of(exc: ParallaxError) -> Verdict:
    return status_of(exc), str(exc), tuple(trailers_of(exc))


async def _abort(
    context: Context, code: grpc.StatusCode, text: str, trailers: tuple[tuple[str, str], ...]
) -> NoReturn:
    try:
        await context.abort(code, text, trailers)
    except aio.InternalError:  # until it has hung up, which gRPC would log as a fault of ours
        # Nor may it be another AbortError than gRPC's own, which there is none of then.
        raise asyncio.CancelledError(text) from None
    raise AssertionError("abort returned")


def _written(behaviour: Any) -> Callable[[object, Context], Awaitable[None]]:
    """*behaviour* of a streaming response as a coroutine, whether it yields its messages or writes them."""

    async def write(request: object, context: Context) -> None:
        # Without it, a cancellation during the first write leaves the client hanging; and so does one here.
        sending = asyncio.ensure_future(context.send_initial_metadata(()))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait({sending})
            if not sending.cancelled():
                sending.exception()  # that the peer has hung up, if it has: nobody is left to tell
            raise
        produced = behaviour(request, context)
        if inspect.isasyncgen(produced):
            async for message in produced:
                await context.write(message)
        else:
            await produced

    return write


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


def _check_readable(request: object) -> None:
    if request is _MALFORMED:
        raise _malformed()


def _malformed() -> InvalidRequest:
    return InvalidRequest("the message is not what this method takes; check schema and versions")


def utc_now() -> datetime:
    """The wall clock, aware UTC."""
    return datetime.now(UTC)
