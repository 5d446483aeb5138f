"""What comes back for a task, as its caller sees it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, Generic

from grpc import StatusCode
from typing_extensions import TypeVar

from parallax.protos import link_pb2
from parallax.runtime.calls import Reply
from parallax.runtime.link import answer_of
from parallax.runtime.outcome import Complete, Failure, OutcomeCode, Payload
from parallax.runtime.status import ERROR_KEY, RETRY_KEY, error_of, status_of
from parallax.runtime.wire import decode_value, milliseconds
from parallax.security.errors import Expired, InvalidRequest, NotAuthorized, ParallaxError, TaskFailed

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True, default=Any)


@dataclass(frozen=True, slots=True)
class Result(Generic[T_co]):
    """
    An agent's answer, or a part of it.

    Args:
        value: What JSON carries, or bytes; or what was asked for with `returns`.
        confidence: From 0 to 1.
    """

    value: T_co
    confidence: float
    agent_id: str


def result_of(reply: Reply, read: Callable[[Payload], T]) -> Result[T]:
    """
    What *reply* brings, as *read* makes it of the payload.

    Raises:
        InvalidRequest, IdentityError, NotAuthorized, Expired, Unavailable: The task was refused before any
            agent had it.
        TaskFailed: It has no value, or none that *read* takes.
    """
    answer = answer_of(reply)
    match answer:
        case bytes():
            return _read(answer, reply.agent_id, read)
        case Complete():
            raise TaskFailed(OutcomeCode.INVALID_RESULT, "the answer came in parts, which nobody asked for")
        case Failure():
            raise _error(answer, reply)


async def results_of(
    replies: AsyncGenerator[link_pb2.Part | Reply, None], read: Callable[[Payload], T]
) -> AsyncGenerator[Result[T], None]:
    """
    What *replies* bring, part by part.

    Raises:
        ParallaxError: As `result_of`; also when a part got lost.
    """
    taken = 0
    async with aclosing(replies) as items:
        async for item in items:
            if isinstance(item, link_pb2.Part):
                taken += 1
                yield _read(item.value, item.agent_id, read)
                continue
            answer = answer_of(item)
            match answer:
                case Failure():
                    raise _error(answer, item)
                case Complete(parts) if parts == taken:
                    return
                case bytes() if not taken:  # all at once
                    yield _read(answer, item.agent_id, read)
                case _:
                    text = f"{taken} parts arrived, which is not all that the agent sent"
                    raise TaskFailed(OutcomeCode.INVALID_RESULT, text)


def _read(data: bytes, agent_id: str, read: Callable[[Payload], T]) -> Result[T]:
    try:
        value = decode_value(data)
        return Result(read(value.payload), value.confidence, agent_id)
    except InvalidRequest as exc:  # the agent's fault, not the caller's
        raise TaskFailed(OutcomeCode.INVALID_RESULT, str(exc)) from exc


# What a task that no agent was given may have been refused as.
_REFUSED: Final = {
    OutcomeCode.INVALID_ARGUMENT: StatusCode.INVALID_ARGUMENT,
    OutcomeCode.OVERLOADED: StatusCode.UNAVAILABLE,
}
_FOR_THE_CALLER: Final = {cls.__name__: status_of(cls("")) for cls in (Expired, NotAuthorized)}


def _error(failure: Failure, reply: Reply) -> ParallaxError:
    """What to raise: the control plane's own error if it refused the task, else how the task failed."""
    status = None if reply.attempts else _REFUSED.get(failure.code)
    if status is StatusCode.INVALID_ARGUMENT:  # or for who asks, not for what it asks
        status = _FOR_THE_CALLER.get(failure.error_type, status)
    if status is None or not failure.error_type:
        return failure.to_error()
    retry_ms = str(milliseconds(failure.retry_after))
    return error_of(status, failure.message, ((ERROR_KEY, failure.error_type), (RETRY_KEY, retry_ms)))
