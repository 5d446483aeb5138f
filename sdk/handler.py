"""A user's `analyze` as the handler that the runtime calls: payload in, outcome out."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Final, cast, get_args, get_origin, get_type_hints

from parallax.runtime.executor import Handler
from parallax.runtime.outcome import (
    MAX_PAYLOAD_BYTES,
    Failure,
    Outcome,
    OutcomeCode,
    Payload,
    Value,
    check_payload,
)
from parallax.runtime.parts import StreamHandler
from parallax.runtime.threads import Threads
from parallax.sdk.payload import check_result, reader, writer
from parallax.sdk.place import said, type_of
from parallax.security.errors import ConfigError, InvalidRequest

# Any: the user says in `analyze` what it takes. It returns a tuple, or a coroutine of one.
Analyze = Callable[[str, Any], object]
# An async generator of tuples.
AnalyzeStream = Callable[[str, Any], AsyncIterator[Any]]

_STREAMS: Final = (AsyncGenerator, AsyncIterator, AsyncIterable)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Codec:
    """
    How a function's payloads become what it is annotated to take, and its values payloads.

    Args:
        read: Raises InvalidRequest for a payload that does not fit.
        write: Likewise for a value.
    """

    read: Callable[[Payload], Any]
    write: Callable[[object], Payload]


def codec_of(function: Callable[[str, Any], object]) -> Codec:
    """
    The codec of *function*, an `analyze` or `analyze_stream`, by the annotations of `data` and its result.

    The result's counts as `tuple[T, float]`, or as an `AsyncIterator` or `AsyncGenerator` of that; of any
    other, each value says for itself what it is.

    Raises:
        ConfigError: An annotation names what is not defined where its module can see it, or nothing that
            JSON can carry.
    """
    try:
        data, result = _annotations(function)
    except NameError as exc:
        raise ConfigError(
            f"{_name(function)}() is annotated with {exc.name}, which is not defined in its module; "
            "define or import it at the top level, not in a function nor under TYPE_CHECKING"
        ) from None
    except Exception as exc:  # an annotation is the user's code
        raise ConfigError(
            f"the annotations of {_name(function)}() cannot be understood: {said(f'{type_of(exc)}: {exc}')}"
        ) from exc
    try:
        return Codec(reader(data), writer(_value_of(result)))
    except InvalidRequest as exc:
        raise ConfigError(f"{_name(function)}() is annotated with a type that cannot be used: {exc}") from exc


def handler_for(analyze: Analyze, threads: Threads, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> Handler:
    """
    A handler that decodes the payload, calls *analyze*, checks what it returned and encodes that.

    A coroutine function runs on the loop; any other on one of *threads*, decoding and encoding included.

    A payload that cannot be decoded, is too large or does not fit the annotation is INVALID_ARGUMENT, a
    result that breaks the rules of `check_result` or does not fit is INVALID_RESULT. What *analyze* itself
    raises passes through, an `InvalidRequest` too: it is HANDLER_FAILED to the executor.

    Raises:
        ConfigError: See `codec_of`.
    """
    codec = codec_of(analyze)
    read, write = codec.read, codec.write
    if _is_a(inspect.iscoroutinefunction, analyze):

        async def handle(task: str, payload: Payload) -> Outcome:
            try:
                data = read(check_payload(payload, max_payload_bytes))
            except InvalidRequest as exc:
                return Failure(OutcomeCode.INVALID_ARGUMENT, str(exc))
            return _outcome_of(task, await analyze(task, data), max_payload_bytes, write)  # type: ignore[misc]

        return handle

    def work(task: str, payload: Payload) -> Outcome:
        try:
            data = read(check_payload(payload, max_payload_bytes))
        except InvalidRequest as exc:
            return Failure(OutcomeCode.INVALID_ARGUMENT, str(exc))
        return _outcome_of(task, analyze(task, data), max_payload_bytes, write)

    async def handle_on_thread(task: str, payload: Payload) -> Outcome:
        return await threads.run(work, task, payload)

    return handle_on_thread


def stream_handler_for(
    analyze_stream: AnalyzeStream, max_payload_bytes: int = MAX_PAYLOAD_BYTES
) -> StreamHandler:
    """
    A handler that decodes the payload, and gives a checked `Value` for each part of *analyze_stream*.

    It ends after a `Failure`, the only one: INVALID_ARGUMENT at once, or INVALID_RESULT for the first part
    that breaks the rules, which it names by its index; the generator has been closed by then. What the
    generator raises passes through. Closing the handler, or cancelling whoever awaits it, ends the
    generator before it returns, so close it: `async with aclosing(handler(task, payload)) as parts:`.

    Raises:
        ConfigError: *analyze_stream* is no async generator function; or see `codec_of`.
    """
    if not _is_a(inspect.isasyncgenfunction, analyze_stream):
        raise ConfigError(
            f"{_name(analyze_stream)}() must be an async generator: "
            "declare it, and what decorates it, `async def`, and `yield` the parts"
        )
    codec = codec_of(analyze_stream)

    async def handle(task: str, payload: Payload) -> AsyncGenerator[Value | Failure, None]:
        try:
            data = codec.read(check_payload(payload, max_payload_bytes))
        except InvalidRequest as exc:
            yield Failure(OutcomeCode.INVALID_ARGUMENT, str(exc))
            return
        index = 0
        generator = cast("AsyncGenerator[Any, None]", analyze_stream(task, data))
        async with aclosing(generator) as parts:
            async for part in parts:
                outcome = _outcome_of(task, part, max_payload_bytes, codec.write, index)
                if isinstance(outcome, Failure):
                    break
                yield outcome
                index += 1
            else:
                return
        yield outcome

    return handle


def _annotations(function: Callable[..., object]) -> tuple[Any, Any]:
    """Of its second argument and its result, Any where there is none. Raises whatever resolving them does."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:  # a compiled function that says nothing
        return Any, Any
    hints = get_type_hints(_innermost(function), include_extras=True)
    takes = [p for p in parameters if p.kind in {p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD}]
    return hints.get(takes[1].name, Any) if len(takes) > 1 else Any, hints.get("return", Any)


def _innermost(function: Callable[..., object]) -> Callable[..., object]:
    """The plain function in methods, partial functions, decorators that say what they wrap, and objects."""
    while not inspect.isfunction(function) or hasattr(function, "__wrapped__"):
        if isinstance(function, functools.partial):
            function = function.func
        elif inspect.ismethod(function):
            function = function.__func__
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            function = type(function).__call__
            if not inspect.isfunction(function):
                break  # of a builtin, which has no annotations
    return function


def _value_of(result: Any) -> Any:
    """The T in `tuple[T, float]`, also in a stream of these; Any if there is none."""
    if get_origin(result) in _STREAMS:
        result = get_args(result)[0]
    items = get_args(result)
    is_pair = get_origin(result) is tuple and len(items) == 2 and items[1] is not Ellipsis
    return items[0] if is_pair else Any


def _is_a(kind: Callable[[object], bool], function: object) -> bool:
    """Also for an object whose `__call__` is one."""
    return kind(function) or kind(getattr(type(function), "__call__", None))  # noqa: B004 - not whether it is callable


def _name(function: Callable[..., object]) -> str:
    return getattr(_innermost(function), "__name__", type_of(function))


def _outcome_of(
    task: str,
    result: object,
    max_payload_bytes: int,
    write: Callable[[object], Payload],
    part: int | None = None,
) -> Value | Failure:
    """Of a whole result, or of one *part* of a stream, counted from 0."""
    try:
        if part is None:
            return check_result(result, max_payload_bytes, write=write)
        return check_result(result, max_payload_bytes, write=write, rule="analyze_stream() must yield")
    except InvalidRequest as exc:  # the agent's author must see it too, not only the caller
        reason = str(exc) if part is None else f"part {part}: {exc}"
        logger.warning("invalid result", extra={"task": task, "reason": reason})
        return Failure(OutcomeCode.INVALID_RESULT, reason)
