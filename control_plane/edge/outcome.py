"""What becomes of those who want a certificate over HTTPS, for metrics."""

from __future__ import annotations

from enum import StrEnum

from parallax.security.errors import (
    EnrollmentError,
    IdentityError,
    InvalidRequest,
    NotAuthorized,
    ParallaxError,
    Unavailable,
    VerificationError,
)


class Outcome(StrEnum):
    """What becomes of one of them."""

    ENROLLED = "enrolled"
    EXCHANGED = "exchanged"
    """Whose certificate was pinned, and is issued another."""
    REFUSED = "refused"
    """By the token, or for want of a pin."""
    INVALID = "invalid"
    """Whoever it was may not have what was asked for."""
    DEFERRED = "deferred"
    """Too many, or what is needed is away for now."""
    FAILED = "failed"


def outcome_of(exc: ParallaxError) -> Outcome:
    """What it is when *exc* is answered."""
    match exc:
        case EnrollmentError():
            return Outcome.REFUSED
        case Unavailable():
            return Outcome.DEFERRED
        case InvalidRequest() | IdentityError() | NotAuthorized() | VerificationError():
            return Outcome.INVALID
    return Outcome.FAILED
