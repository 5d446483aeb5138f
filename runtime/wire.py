"""Between the wire schema and the values the program works with; nothing is decided here."""

from __future__ import annotations

from datetime import timedelta
from types import MappingProxyType
from typing import Final

from parallax.protos import registry_pb2, task_pb2
from parallax.runtime.description import AgentDescription
from parallax.runtime.outcome import BYTES, Failure, Outcome, OutcomeCode, Payload, Value, check_confidence
from parallax.security.errors import InvalidRequest

LONGEST: Final = timedelta(days=1)  # every wait has an end, and a uint64 of milliseconds none that fits

_PREFIX = "OUTCOME_CODE_"
_CODES = {task_pb2.OutcomeCode.Value(_PREFIX + code.value): code for code in OutcomeCode}


def payload_to_proto(payload: Payload) -> task_pb2.Payload:
    """Write *payload*."""
    return task_pb2.Payload(data=payload.data, content_type=payload.content_type)


def payload_from_proto(message: task_pb2.Payload) -> Payload:
    """Read a payload; no content type means plain bytes."""
    return Payload(message.data, message.content_type or BYTES)


def outcome_to_proto(outcome: Outcome, task_id: int = 0) -> task_pb2.Outcome:
    """Write *outcome* as the answer to *task_id*."""
    match outcome:
        case Value():
            value = task_pb2.Value(payload=payload_to_proto(outcome.payload), confidence=outcome.confidence)
            return task_pb2.Outcome(task_id=task_id, value=value)
        case Failure():
            failure = task_pb2.Failure(
                code=_PREFIX + outcome.code.value,
                message=outcome.message,
                error_type=outcome.error_type,
                retry_after_ms=milliseconds(outcome.retry_after),
            )
            return task_pb2.Outcome(task_id=task_id, failure=failure)


def outcome_from_proto(message: task_pb2.Outcome) -> Outcome:
    """
    Read an outcome.

    Raises:
        InvalidRequest: It has neither value nor failure, or the confidence is not one.
    """
    match message.WhichOneof("result"):
        case "value":
            confidence = check_confidence(message.value.confidence)
            return Value(payload_from_proto(message.value.payload), confidence)
        case "failure":
            failure = message.failure
            return Failure(
                _CODES.get(failure.code, OutcomeCode.UNSPECIFIED),
                failure.message,
                failure.error_type,
                duration(failure.retry_after_ms),
            )
        case _:
            raise InvalidRequest("an outcome has neither a value nor a failure")


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


def duration(milliseconds: int) -> timedelta:
    """*milliseconds* off the wire, cut to `LONGEST`."""
    return timedelta(milliseconds=min(milliseconds, LONGEST // timedelta(milliseconds=1)))


def milliseconds(duration: timedelta) -> int:
    """*duration* in whole milliseconds, at least 1 unless it is zero or less."""
    return max(1, round(duration / timedelta(milliseconds=1))) if duration > timedelta(0) else 0
