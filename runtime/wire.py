"""Between the wire schema and the values the program works with; nothing is decided here."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from google.protobuf.message import DecodeError

from parallax.protos import link_pb2, registry_pb2, task_pb2
from parallax.runtime.description import AgentDescription
from parallax.runtime.outcome import (
    BYTES,
    Complete,
    Failure,
    Outcome,
    OutcomeCode,
    Payload,
    Value,
    check_confidence,
)
from parallax.security.errors import InvalidRequest

DEFAULT_TIMEOUT: Final = timedelta(seconds=60)  # of a task whose caller says nothing
LONGEST: Final = timedelta(days=1)  # every wait has an end, and a uint64 of milliseconds none that fits

_PREFIX = "OUTCOME_CODE_"
_CODES = {task_pb2.OutcomeCode.Value(_PREFIX + code.value): code for code in OutcomeCode}


def payload_to_proto(payload: Payload) -> task_pb2.Payload:
    """Write *payload*."""
    return task_pb2.Payload(data=payload.data, content_type=payload.content_type)


def payload_from_proto(message: task_pb2.Payload) -> Payload:
    """Read a payload; no content type means plain bytes."""
    return Payload(message.data, message.content_type or BYTES)


def value_to_proto(value: Value) -> task_pb2.Value:
    """Write *value*."""
    return task_pb2.Value(payload=payload_to_proto(value.payload), confidence=value.confidence)


def value_from_proto(message: task_pb2.Value) -> Value:
    """
    Read a value.

    Raises:
        InvalidRequest: The confidence is not one.
    """
    return Value(payload_from_proto(message.payload), check_confidence(message.confidence))


def failure_to_proto(failure: Failure) -> task_pb2.Failure:
    """Write *failure*."""
    return task_pb2.Failure(
        code=_PREFIX + failure.code.value,
        message=failure.message,
        error_type=failure.error_type,
        retry_after_ms=milliseconds(failure.retry_after),
    )


def failure_from_proto(message: task_pb2.Failure) -> Failure:
    """Read a failure; a code younger than this program is UNSPECIFIED."""
    return Failure(
        _CODES.get(message.code, OutcomeCode.UNSPECIFIED),
        message.message,
        message.error_type,
        duration(message.retry_after_ms),
    )


def outcome_to_proto(outcome: Outcome) -> task_pb2.Outcome:
    """Write *outcome*."""
    message = task_pb2.Outcome()
    write_outcome(message, outcome)
    return message


def write_outcome(message: task_pb2.Outcome, outcome: Outcome) -> None:
    """Write *outcome* into *message*, which is empty."""
    match outcome:
        case Value(payload=payload):
            value = message.value  # filled in place, see `encode_work`
            value.confidence = outcome.confidence
            inner = value.payload
            inner.data, inner.content_type = payload.data, payload.content_type
        case Failure():
            message.failure.CopyFrom(failure_to_proto(outcome))
        case Complete():
            message.parts = outcome.parts


def outcome_from_proto(message: task_pb2.Outcome) -> Outcome:
    """
    Read an outcome.

    Raises:
        InvalidRequest: It has neither value nor failure nor parts, or the confidence is not one.
    """
    match message.WhichOneof("result"):
        case "value":
            return value_from_proto(message.value)
        case "failure":
            return failure_from_proto(message.failure)
        case "parts":
            return Complete(message.parts)
        case _:
            raise InvalidRequest("an outcome has neither a value nor a failure")


def encode_work(name: str, payload: Payload) -> bytes:
    """What to do, as the bytes that travel in a task."""
    message = link_pb2.Work(name=name)
    inner = message.payload  # filled in place: half the price of making it and copying it in
    inner.data, inner.content_type = payload.data, payload.content_type
    return message.SerializeToString()


def decode_work(work: bytes) -> tuple[str, Payload]:
    """
    Read what `encode_work` wrote.

    Raises:
        InvalidRequest: It is not that.
    """
    try:
        message = link_pb2.Work.FromString(work)
    except DecodeError:
        raise InvalidRequest("the task's work is not a Work message") from None
    return message.name, payload_from_proto(message.payload)


def encode_value(value: Value) -> bytes:
    """*value* as the bytes that travel in an outcome; never empty."""
    message = task_pb2.Value(confidence=value.confidence)
    inner, payload = message.payload, value.payload
    inner.data, inner.content_type = payload.data, payload.content_type
    return message.SerializeToString()


def decode_value(data: bytes) -> Value:
    """
    Read what `encode_value` wrote.

    Raises:
        InvalidRequest: It is not that, or the confidence is not one.
    """
    try:
        message = task_pb2.Value.FromString(data)
    except DecodeError:
        raise InvalidRequest("the answer is not a Value message") from None
    return value_from_proto(message)


def description_to_proto(description: AgentDescription, agent_id: str = "") -> registry_pb2.AgentDescription:
    """Write *description* as that of *agent_id*."""
    return registry_pb2.AgentDescription(
        agent_id=agent_id,
        display_name=description.display_name,
        capabilities=description.capabilities,
        labels=dict(description.labels),
        metadata=dict(description.metadata),
        max_concurrency=description.max_concurrency,
    )


def description_from_proto(message: registry_pb2.AgentDescription) -> AgentDescription:
    """
    Read a description; its agent id is not part of the value.

    Raises:
        InvalidRequest: A bound is broken.
    """
    return AgentDescription(
        display_name=message.display_name,
        capabilities=tuple(message.capabilities),
        labels=MappingProxyType(dict(message.labels)),
        metadata=MappingProxyType(dict(message.metadata)),
        max_concurrency=message.max_concurrency or 1,  # unset
    )


@lru_cache(maxsize=1024)  # most tasks have one of a few timeouts
def duration(milliseconds: int) -> timedelta:
    """*milliseconds* off the wire, cut to `LONGEST`."""
    return timedelta(milliseconds=min(milliseconds, LONGEST // timedelta(milliseconds=1)))


def milliseconds(duration: timedelta) -> int:
    """*duration* in whole milliseconds, at least 1 unless it is zero or less."""
    return max(1, round(duration / timedelta(milliseconds=1))) if duration > timedelta(0) else 0


def time_limit(stated_ms: int, remaining_s: float | None) -> timedelta:
    """The smaller of what a request states and what its call has left; `DEFAULT_TIMEOUT` if neither says."""
    left_ms = None if remaining_s is None else max(0, round(remaining_s * 1000))
    if stated_ms and (left_ms is None or stated_ms <= left_ms):
        return duration(stated_ms)  # first: what is stated is one of a few values, which `duration` knows
    return DEFAULT_TIMEOUT if left_ms is None else duration(left_ms)
