"""What a task carries and how it ends, free of any wire format."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import Final

from parallax.security.errors import InvalidRequest, TaskFailed

JSON: Final = "application/json"
BYTES: Final = "application/octet-stream"

MAX_PAYLOAD_BYTES: Final = 4 * 1024 * 1024  # a larger one would hold up everybody on a shared stream
# What a payload limit may be set to: protobuf itself ends at 2 GiB, and a message is copied several times.
LARGEST_LIMIT_BYTES: Final = 1 << 30
MAX_TASK_NAME_BYTES: Final = 1024
MAX_CONTENT_TYPE_BYTES: Final = 256


class OutcomeCode(StrEnum):
    """Every way in which a task can fail; `OutcomeCode` of the wire schema without its prefix."""

    UNSPECIFIED = "UNSPECIFIED"
    AGENT_LOST = "AGENT_LOST"
    CONTROL_PLANE_LOST = "CONTROL_PLANE_LOST"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    HANDLER_FAILED = "HANDLER_FAILED"
    INVALID_RESULT = "INVALID_RESULT"
    NO_AGENT = "NO_AGENT"
    OVERLOADED = "OVERLOADED"
    REVOKED = "REVOKED"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"


@dataclass(frozen=True, slots=True)
class Payload:
    """Bytes and their media type."""

    data: bytes = b""
    content_type: str = BYTES


@dataclass(frozen=True, slots=True)
class Value:
    """An answer; *confidence* is finite and within [0, 1]."""

    payload: Payload
    confidence: float


@dataclass(frozen=True, slots=True)
class Failure:
    """
    Why there is no answer.

    Args:
        message: One sentence with cause and next step; never a traceback.
        error_type: With HANDLER_FAILED, the name of the exception's type.
        retry_after: With OVERLOADED, how long to wait.
    """

    code: OutcomeCode
    message: str
    error_type: str = ""
    retry_after: timedelta = timedelta(0)

    def to_error(self) -> TaskFailed:
        """The same as an exception."""
        return TaskFailed(
            self.code.value, self.message, error_type=self.error_type, retry_after=self.retry_after
        )


@dataclass(frozen=True, slots=True)
class Complete:
    """The end of an answer that came in parts: as many as *parts*."""

    parts: int


Outcome = Value | Failure | Complete


def check_confidence(confidence: object) -> float:
    """*confidence* as a float, if it is a real number from 0 to 1; `True` is not a number here."""
    if type(confidence) is float and 0 <= confidence <= 1:  # nearly always
        return confidence
    if isinstance(confidence, bool) or not isinstance(confidence, int | float):
        raise InvalidRequest(f"confidence must be a number from 0 to 1, not {type(confidence).__name__}")
    if not 0 <= confidence <= 1:  # nor is NaN
        # A huge integer may neither fit a float nor be printed.
        is_huge = isinstance(confidence, int) and abs(confidence) > 2**53
        got = "a huge integer" if is_huge else repr(float(confidence))
        raise InvalidRequest(f"confidence must be from 0 to 1, not {got}")
    return float(confidence)


def check_task_name(name: str) -> str:
    """*name* itself, if it has at most 1,024 bytes."""
    if len(name.encode()) > MAX_TASK_NAME_BYTES:
        raise InvalidRequest(
            f"the task's name has more than {MAX_TASK_NAME_BYTES} bytes; put data in the payload"
        )
    return name


def check_payload(payload: Payload, limit: int = MAX_PAYLOAD_BYTES) -> Payload:
    """*payload* itself, if it has at most *limit* bytes, and its content type at most 256."""
    if len(payload.content_type.encode()) > MAX_CONTENT_TYPE_BYTES:
        raise InvalidRequest(f"the payload's content type has more than {MAX_CONTENT_TYPE_BYTES} bytes")
    if len(payload.data) > limit:
        raise InvalidRequest(too_large("the payload", len(payload.data), limit))
    return payload


def too_large(what: str, size: int, limit: int) -> str:
    """The sentence that says that *what* is."""
    return (
        f"{what} has {size:,} bytes, more than the {limit:,} allowed; "
        "send a reference to the data instead, or raise PARALLAX_MAX_PAYLOAD_BYTES on all sides"
    )
