"""The gate every call of a server passes: who is it, may they, and what went wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import Any, Final, NoReturn

import grpc
from grpc import aio

from parallax.runtime.authenticator import Authenticator
from parallax.runtime.caller import Caller, name_of, set_current
from parallax.runtime.expiry import Expiry, Lapsing, no_news
from parallax.runtime.handlers import behaviour_of, check_readable, with_behaviour
from parallax.runtime.refusal import Refusal
from parallax.runtime.status import status_of, trailers_of
from parallax.security.errors import Expired, NotAuthorized, ParallaxError, Revoked
from parallax.security.verification import Peer

logger = logging.getLogger(__name__)

REVIEWED_AT_ONCE: Final = 16  # open calls, 2 ms if each has to be verified again
GATHER_S: Final = 0.01  # revocations share a look at the open calls: 10 ms for 10,000 of them

Context = aio.ServicerContext[Any, Any]

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


def revocation() -> Revoked | None:
    """Why the stream that is being handled ends, if that is because its caller was revoked."""
    found = _stream.get()
    cause = found[1].cause if found is not None else None
    return cause if isinstance(cause, Revoked) else None


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
        behaviour = behaviour_of(handler)
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
                check_readable(request)
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

        return with_behaviour(handler, gated)

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
        set_current(caller, source)
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
