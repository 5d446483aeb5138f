"""Between errors and HTTP status, both ways, by one table."""

from __future__ import annotations

import json
import math
import re
from datetime import timedelta
from typing import Final

from parallax.security import errors
from parallax.security.errors import ParallaxError

# The first row of a status is what it alone, from somebody else's program, is read as.
_STATUS: Final[tuple[tuple[type[ParallaxError], int], ...]] = (
    (errors.InvalidRequest, 400),
    (errors.IdentityError, 400),
    (errors.VerificationError, 401),
    (errors.UntrustedChain, 401),
    (errors.Expired, 401),
    (errors.Revoked, 401),
    (errors.WrongIdentity, 401),
    (errors.NotAuthorized, 403),
    (errors.EnrollmentError, 403),
    (errors.NoSuchAgent, 404),
    (errors.InvalidTransition, 409),
    (errors.LeaseExpired, 409),
    (errors.Superseded, 409),
    (errors.ConfigError, 500),
    (errors.ChainBroken, 500),
    (errors.Unavailable, 503),
    (errors.Conflict, 503),
    (errors.WatchGap, 503),
    (errors.StorageFailed, 503),
    (ParallaxError, 500),
)

_STATUS_OF: Final = dict(_STATUS)
_BY_NAME: Final = {cls.__name__: cls for cls, _ in _STATUS}
_BY_STATUS: Final = {status: cls for cls, status in reversed(_STATUS)}
_SECONDS: Final = re.compile(r"[0-9]{1,5}", re.ASCII)  # a day or so; nobody waits for longer


def status_of(exc: ParallaxError) -> int:
    """The status that tells *exc* to a caller."""
    return _STATUS_OF[_listed(type(exc))]


def body_of(exc: ParallaxError) -> dict[str, str]:
    """What is said beside the status."""
    message = str(exc)
    if isinstance(exc, errors.StorageFailed):  # where its files lie is not for newcomers to know
        message = f"the control plane cannot record anything now ({exc.fault.value}): its log says what to do"
    return {"error": _listed(type(exc)).__name__, "message": message}


def retry_after(exc: ParallaxError) -> str | None:
    """The header that says when to ask again, in whole seconds (RFC 9110 §10.2.3); None: never."""
    if isinstance(exc, errors.Unavailable):
        return str(max(1, math.ceil(exc.retry_after.total_seconds())))
    return None


def error_of(status: int, body: bytes, retry: str | None = None) -> ParallaxError:
    """
    The error that was answered, as an exception to raise.

    The other side's word for the class counts only if the table gives that class the same *status*.
    """
    name, message = _read(body)
    cls = _BY_NAME.get(name)
    if cls is None or _STATUS_OF[cls] != status:
        cls = _BY_STATUS.get(status, ParallaxError)
    message = message or f"it answered with status {status}"
    if cls is errors.Unavailable:
        is_time = retry is not None and _SECONDS.fullmatch(retry)
        return errors.Unavailable(message, retry_after=timedelta(seconds=int(retry or 1) if is_time else 1))
    return cls(message)


def _read(body: bytes) -> tuple[str, str]:
    try:
        said = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    if not isinstance(said, dict):
        return "", ""
    name, message = said.get("error"), said.get("message")
    return (name if isinstance(name, str) else "", message if isinstance(message, str) else "")


def _listed(cls: type[ParallaxError]) -> type[ParallaxError]:
    """The nearest class in the table."""
    return next(base for base in cls.__mro__ if base in _STATUS_OF)
