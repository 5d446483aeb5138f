"""Between errors and gRPC status, both ways, by one table."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Final

from grpc import StatusCode

from parallax.security import errors
from parallax.security.errors import ParallaxError

ERROR_KEY: Final = "parallax-error"  # trailing metadata: the class of the error
RETRY_KEY: Final = "parallax-retry-after-ms"

# The first row of a code is what a bare code, from somebody else's program, is read as.
_STATUS: Final[tuple[tuple[type[ParallaxError], StatusCode], ...]] = (
    (errors.InvalidRequest, StatusCode.INVALID_ARGUMENT),
    (errors.IdentityError, StatusCode.INVALID_ARGUMENT),
    (errors.VerificationError, StatusCode.UNAUTHENTICATED),
    (errors.UntrustedChain, StatusCode.UNAUTHENTICATED),
    (errors.Expired, StatusCode.UNAUTHENTICATED),
    (errors.Revoked, StatusCode.UNAUTHENTICATED),
    (errors.WrongIdentity, StatusCode.UNAUTHENTICATED),
    (errors.NotAuthorized, StatusCode.PERMISSION_DENIED),
    (errors.EnrollmentError, StatusCode.PERMISSION_DENIED),
    (errors.NoSuchAgent, StatusCode.NOT_FOUND),
    (errors.InvalidTransition, StatusCode.FAILED_PRECONDITION),
    (errors.LeaseExpired, StatusCode.FAILED_PRECONDITION),
    (errors.Superseded, StatusCode.FAILED_PRECONDITION),
    (errors.ConfigError, StatusCode.FAILED_PRECONDITION),
    (errors.TaskFailed, StatusCode.ABORTED),
    (errors.Unavailable, StatusCode.UNAVAILABLE),
    (errors.Conflict, StatusCode.UNAVAILABLE),
    (errors.WatchGap, StatusCode.UNAVAILABLE),
    (errors.StorageFailed, StatusCode.UNAVAILABLE),
    (ParallaxError, StatusCode.INTERNAL),
    (errors.ChainBroken, StatusCode.INTERNAL),
)

_CODE_OF: Final = dict(_STATUS)
_BY_NAME: Final = {cls.__name__: cls for cls, _ in _STATUS}
_BY_CODE: Final = {code: cls for cls, code in reversed(_STATUS)}
# What gRPC itself answers with.
_BY_GRPC: Final[dict[StatusCode, type[ParallaxError]]] = {
    StatusCode.RESOURCE_EXHAUSTED: errors.InvalidRequest,  # a message over the receiver's limit
    StatusCode.DEADLINE_EXCEEDED: errors.Unavailable,
    StatusCode.CANCELLED: errors.Unavailable,
    StatusCode.UNIMPLEMENTED: errors.ConfigError,
}

# What gRPC's text for UNAVAILABLE gives away. The first two are a server that failed our checks: trying
# again cannot help there.
_REFUSALS: Final[tuple[tuple[str, type[ParallaxError], str], ...]] = (
    (
        "Hostname Verification Check failed",
        errors.WrongIdentity,
        "another identity answers at that address: correct the address, or the server's certificate",
    ),
    ("CERTIFICATE_VERIFY_FAILED", errors.UntrustedChain, "give both sides the same CA certificate"),
    (
        "Connection refused",
        errors.Unavailable,
        "is it running there? (the control plane: `parallax control-plane start`)",
    ),
    (
        "WRONG_VERSION_NUMBER",
        errors.Unavailable,
        "the other side does not speak TLS: set PARALLAX_TLS_ENABLED=true there",
    ),
    (
        "Socket closed",  # all that TLS 1.3 tells a client whose certificate was refused
        errors.Unavailable,
        (
            "if that repeats, PARALLAX_TLS_ENABLED differs between the two sides, "
            "or the other one refused this certificate and its log names the reason"
        ),
    ),
)


def status_of(exc: ParallaxError) -> StatusCode:
    """The status that tells *exc* to a caller."""
    return _CODE_OF[_listed(type(exc))]


def trailers_of(exc: ParallaxError) -> tuple[tuple[str, str], ...]:
    """The trailing metadata that lets the other side raise the same class again."""
    name = _listed(type(exc)).__name__
    if isinstance(exc, errors.Unavailable):
        return ((ERROR_KEY, name), (RETRY_KEY, str(round(exc.retry_after / timedelta(milliseconds=1)))))
    return ((ERROR_KEY, name),)


def error_of(
    code: StatusCode, details: str | None, trailers: Iterable[tuple[str, str | bytes]] = ()
) -> ParallaxError:
    """
    The error that a call ended with, as an exception to raise.

    A peer's word for the class counts only if the table gives that class the same
    *code*; so it can name the failure, not change what kind of failure it is.
    """
    metadata = {key: value for key, value in trailers if isinstance(value, str)}
    message = details or f"the call ended with {code.name}"
    cls = _BY_NAME.get(metadata.get(ERROR_KEY, ""))
    if cls is None or _CODE_OF[cls] is not code:
        cls = _BY_CODE.get(code) or _BY_GRPC.get(code, ParallaxError)
        if code is StatusCode.UNAVAILABLE:
            cls, remedy = _refusal(message)
            message += f"; {remedy}" if remedy else ""
    if cls is errors.Unavailable:
        return errors.Unavailable(message, retry_after=_retry_after(metadata.get(RETRY_KEY, "")))
    return _build(cls, message)


def _refusal(message: str) -> tuple[type[ParallaxError], str]:
    """What hides behind UNAVAILABLE, by gRPC's text, and what to do about it."""
    for said, cls, remedy in _REFUSALS:
        if said in message:
            return cls, remedy
    return errors.Unavailable, ""


def _build(cls: type[ParallaxError], message: str) -> ParallaxError:
    return errors.TaskFailed("UNSPECIFIED", message) if cls is errors.TaskFailed else cls(message)


def _retry_after(text: str) -> timedelta:
    known = text.isascii() and text.isdigit() and len(text) <= 8
    return timedelta(milliseconds=int(text)) if known else timedelta(seconds=1)


def _listed(cls: type[ParallaxError]) -> type[ParallaxError]:
    """The nearest class in the table."""
    return next(base for base in cls.__mro__ if base in _CODE_OF)
