"""
Every error that Parallax raises on purpose, split by what the catcher does.

::

    ParallaxError
    ├── ConfigError              fix the deployment; of a file carries a `Defect`
    ├── IdentityError            malformed identity           → INVALID_ARGUMENT
    ├── InvalidRequest           malformed message            → INVALID_ARGUMENT
    ├── VerificationError        must not be trusted          → UNAUTHENTICATED
    │   ├── UntrustedChain
    │   ├── Expired
    │   ├── Revoked
    │   └── WrongIdentity
    ├── NotAuthorized            trusted, may not             → PERMISSION_DENIED
    ├── EnrollmentError          token unknown, spent, expired → PERMISSION_DENIED
    ├── NoSuchAgent              nobody of that name          → NOT_FOUND
    ├── LeaseExpired             register again               → FAILED_PRECONDITION
    ├── Superseded               another instance took over   → FAILED_PRECONDITION
    ├── InvalidTransition        not in this state            → FAILED_PRECONDITION
    ├── TaskFailed               the task has no value; carries an outcome code
    ├── ChainBroken              the audit log is not what was written; carries the entry's number
    └── Unavailable              try again; carries `retry_after` → UNAVAILABLE
        ├── Conflict             somebody else wrote first: read again, then decide
        ├── WatchGap             changes were missed: read everything again
        └── StorageFailed        what holds the state does not; carries a `Fault`

Messages are lower case, name cause and next step, and hold no secret. The
status of each is decided in one table, `parallax.runtime.status`.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum


class ParallaxError(Exception):
    """The base of everything Parallax raises on purpose."""


class Defect(StrEnum):
    """Why a file cannot be used: one word, for metrics and probes, where the message is too long."""

    MISSING = "missing"
    UNREADABLE = "unreadable"
    OPEN_TO_OTHERS = "open_to_others"
    UNSETTLED = "unsettled"
    """It changes faster than it can be read."""
    DAMAGED = "damaged"
    MISMATCHED_KEY = "mismatched_key"
    WRONG_IDENTITY = "wrong_identity"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    UNTRUSTED_CHAIN = "untrusted_chain"
    """No path leads to the CA, or a key or usage on it is not accepted."""


class ConfigError(ParallaxError):
    """
    The deployment is wrong; the message names the setting or file and the remedy.

    Attributes:
        defect: What is wrong with a file; None where none is at fault.
    """

    def __init__(self, message: str, defect: Defect | None = None) -> None:
        super().__init__(message)
        self.defect = defect


class IdentityError(ParallaxError):
    """Not an identity, or not exactly one."""


class InvalidRequest(ParallaxError):
    """The message cannot be understood or breaks a documented limit."""


class VerificationError(ParallaxError):
    """The certificate must not be trusted."""


class UntrustedChain(VerificationError):
    """No path leads from the leaf to a root of the trust bundle (RFC 5280 §6)."""


class Expired(VerificationError):
    """Outside the certificate's validity, before it included."""


class Revoked(VerificationError):
    """Withdrawn by its issuer."""


class WrongIdentity(VerificationError):
    """A trusted certificate, but of somebody else."""


class NotAuthorized(ParallaxError):
    """The peer is known and may not do this."""


class EnrollmentError(ParallaxError):
    """The token does not admit; unknown, spent and expired read the same."""


class NoSuchAgent(ParallaxError):
    """No agent of that name is registered."""


class LeaseExpired(ParallaxError):
    """The registration is no longer in force; register again."""


class Superseded(ParallaxError):
    """Another instance with the same identity took over, or may not take over now."""


class InvalidTransition(ParallaxError):
    """The state does not allow this step."""


class TaskFailed(ParallaxError):
    """
    A task ended without a value.

    Attributes:
        code: The outcome code's name, `HANDLER_FAILED` for example.
        error_type: With `HANDLER_FAILED`, the name of the remote exception's type; else empty.
        retry_after: With `OVERLOADED`, how long to wait; else zero.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        error_type: str = "",
        retry_after: timedelta = timedelta(0),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.error_type = error_type
        self.retry_after = retry_after

    def __str__(self) -> str:
        origin = f"{self.error_type}: " if self.error_type else ""
        return f"{self.code}: {origin}{self.args[0]}"


class ChainBroken(ParallaxError):
    """
    An audit log is not what was written.

    Attributes:
        sequence: Of the first entry with which that shows.
    """

    def __init__(self, message: str, sequence: int = 0) -> None:
        super().__init__(message)
        self.sequence = sequence


class Unavailable(ParallaxError):
    """Nobody can answer now; the same request may succeed after *retry_after*."""

    def __init__(self, message: str, *, retry_after: timedelta = timedelta(seconds=1)) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Conflict(Unavailable):
    """A record is not what it was when the decision to write it was taken; nothing was written."""


class WatchGap(Unavailable):
    """A watch cannot go on where it was: what was missed is not known any more."""


class Fault(StrEnum):
    """What is wrong with the medium that holds the state, in one word for metrics and probes."""

    FULL = "full"
    READ_ONLY = "read_only"
    DAMAGED = "damaged"
    MISSING = "missing"
    """Somebody took the file away under the process that uses it."""
    BUSY = "busy"
    """Another program holds it, or there is more to write than it takes."""
    FAILED = "failed"
    """Anything else: the system's own error is in the text."""


class StorageFailed(Unavailable):
    """What was to be written is not known to be safe; the same request may succeed once the cause is gone."""

    def __init__(self, message: str, fault: Fault = Fault.FAILED) -> None:
        super().__init__(message)
        self.fault = fault
