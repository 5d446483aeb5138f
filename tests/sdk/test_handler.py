from __future__ import annotations

import asyncio
import functools
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from parallax.runtime.executor import Executor
from parallax.runtime.outcome import JSON, Failure, Outcome, OutcomeCode, Payload, Value
from parallax.runtime.threads import Threads
from parallax.sdk.agent import SecureAgent
from parallax.sdk.handler import Analyze, handler_for, stream_handler_for
from parallax.sdk.payload import encode
from parallax.security.errors import ConfigError, InvalidRequest

if TYPE_CHECKING:
    from decimal import Decimal


@pytest.fixture
def threads() -> Iterator[Threads]:
    with Threads(2) as threads:
        yield threads


async def async_echo(task: str, data: Any) -> tuple[Any, float]:
    return [task, data, threading.current_thread() is threading.main_thread()], 1


def plain_echo(task: str, data: Any) -> tuple[Any, float]:
    return [task, data, threading.current_thread() is threading.main_thread()], 1


class Echo:
    async def method(self, task: str, data: Any) -> tuple[Any, float]:
        return await async_echo(task, data)

    async def __call__(self, task: str, data: Any) -> tuple[Any, float]:
        return await async_echo(task, data)


@functools.wraps(async_echo)
async def decorated(task: str, data: Any) -> tuple[Any, float]:
    return await async_echo(task, data)


async def named(prefix: str, task: str, data: Any) -> tuple[Any, float]:
    return await async_echo(prefix + task, data)


@pytest.mark.parametrize(
    "analyze",
    [async_echo, Echo().method, Echo(), decorated, functools.partial(named, "")],
    ids=["function", "method", "object", "decorated", "partial"],
)
async def test_a_coroutine_function_runs_on_the_loop(analyze: Analyze, threads: Threads) -> None:
    outcome = await handler_for(analyze, threads)("greet", Payload(b'{"n":1}', JSON))
    assert outcome == Value(Payload(b'["greet",{"n":1},true]', JSON), 1.0)


async def test_any_other_function_runs_on_a_thread(threads: Threads) -> None:
    outcome = await handler_for(plain_echo, threads)("greet", Payload(b'{"n":1}', JSON))
    assert outcome == Value(Payload(b'["greet",{"n":1},false]', JSON), 1.0)


def both(analyze: Analyze) -> tuple[Analyze, Analyze]:
    """*analyze* itself, and as a coroutine function."""

    async def on_loop(task: str, data: Any) -> Any:
        return analyze(task, data)

    return analyze, on_loop


@pytest.mark.parametrize("analyze", both(plain_echo), ids=["plain", "async"])
@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (Payload(b"{", JSON), "the payload is not JSON"),
        (Payload(b"1", "text/plain"), '"text/plain" is not understood'),
        (Payload(b"x" * 101), "has 101 bytes, more than the 100 allowed"),
    ],
    ids=["malformed", "unknown type", "too large"],
)
async def test_a_payload_at_fault_is_an_invalid_argument(
    analyze: Analyze, payload: Payload, reason: str, threads: Threads
) -> None:
    outcome = await handler_for(analyze, threads, max_payload_bytes=100)("task", payload)
    assert isinstance(outcome, Failure)
    assert outcome.code is OutcomeCode.INVALID_ARGUMENT
    assert reason in outcome.message


@pytest.mark.parametrize("analyze", both(lambda _task, data: data), ids=["plain", "async"])
@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        (None, "analyze() must return (value, confidence), not None"),
        ((1, 1.5), "confidence must be from 0 to 1, not 1.5"),
        ((1, float("nan")), "confidence must be from 0 to 1, not nan"),
        ((1, "high"), "confidence must be a number from 0 to 1, not str"),
        ((1, True), "confidence must be a number from 0 to 1, not bool"),
        (({"scores": [float("nan")]}, 1), "$.scores[0]: NaN is not JSON"),
        (({1, 2}, 1), "$: set is not JSON"),
        ((b"x" * 101, 1), "has 101 bytes, more than the 100 allowed"),
    ],
    ids=["None", "1.5", "NaN", "high", "True", "NaN inside", "set", "too large"],
)
async def test_a_result_at_fault_is_an_invalid_result_and_the_agents_log_says_so(
    analyze: Analyze, returned: object, reason: str, threads: Threads, caplog: pytest.LogCaptureFixture
) -> None:
    def returning(_task: str, _data: Any) -> object:
        return returned

    async def returning_later(_task: str, _data: Any) -> object:
        return returned

    function: Analyze = returning if analyze.__name__ == "<lambda>" else returning_later
    outcome = await handler_for(function, threads, max_payload_bytes=100)("task", Payload())
    assert isinstance(outcome, Failure)
    assert outcome.code is OutcomeCode.INVALID_RESULT
    assert reason in outcome.message
    [record] = caplog.records
    assert (record.levelno, record.message) == (logging.WARNING, "invalid result")
    assert record.__dict__["reason"] == outcome.message


async def test_a_plain_function_around_a_coroutine_function_is_told_how_to_be_mended(
    threads: Threads,
) -> None:
    def decorated_badly(task: str, data: Any) -> object:
        return async_echo(task, data)

    outcome = await handler_for(decorated_badly, threads)("task", Payload())
    assert isinstance(outcome, Failure)
    assert outcome.code is OutcomeCode.INVALID_RESULT
    assert "declare it, and what decorates it, `async def`" in outcome.message


def refusing(_task: str, _data: Any) -> object:
    raise InvalidRequest("the user's own")


@pytest.mark.parametrize("analyze", both(refusing), ids=["plain", "async"])
async def test_an_error_of_ours_that_the_user_raises_is_the_users(analyze: Analyze, threads: Threads) -> None:
    with pytest.raises(InvalidRequest, match="the user's own"):
        await handler_for(analyze, threads)("task", Payload())


@pytest.mark.parametrize("analyze", both(refusing), ids=["plain", "async"])
async def test_the_executor_calls_that_a_failed_handler(analyze: Analyze, threads: Threads) -> None:
    outcomes: list[Outcome] = []
    async with Executor(handler_for(analyze, threads), max_concurrency=1, queue_limit=0) as executor:
        executor.submit(
            1, "task", Payload(), timedelta(seconds=10), lambda _, outcome: outcomes.append(outcome)
        )
        await executor.drain(timedelta(seconds=10))
    assert outcomes == [Failure(OutcomeCode.HANDLER_FAILED, "the user's own", error_type="InvalidRequest")]


@dataclass
class Point:
    x: int
    label: str = ""


async def move(task: str, data: Point) -> tuple[Point, float]:
    assert type(data) is Point
    return Point(data.x + 1, task), 1


def move_plain(task: str, data: Point) -> tuple[Point, float]:
    assert type(data) is Point
    return Point(data.x + 1, task), 1


class Mover:
    async def method(self, task: str, data: Point) -> tuple[Point, float]:
        return await move(task, data)

    async def __call__(self, task: str, data: Point) -> tuple[Point, float]:
        return await move(task, data)


@functools.wraps(move)
async def moved(*args: Any) -> Any:
    return await move(*args)


async def move_by(by: str, task: str, data: Point) -> tuple[Point, float]:
    return await move(by + task, data)


TYPED = pytest.mark.parametrize(
    "analyze",
    [move, move_plain, Mover().method, Mover(), moved, functools.partial(move_by, "")],
    ids=["function", "plain", "method", "object", "decorated", "partial"],
)


@TYPED
async def test_a_typed_function_gets_what_it_is_annotated_to_take(analyze: Analyze, threads: Threads) -> None:
    outcome = await handler_for(analyze, threads)("on", Payload(b'{"x":1}', JSON))
    assert outcome == Value(Payload(b'{"x":2,"label":"on"}', JSON), 1.0)


@TYPED
@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (Payload(b'{"x":"1"}', JSON), "$.x: input should be a valid integer"),
        (Payload(b"\xff"), "JSON is expected, for Point"),
        (Payload(b'{"x":1,"x":1}', JSON), 'the key "x" occurs twice'),
    ],
    ids=["wrong field", "bytes", "key twice"],
)
async def test_a_payload_that_does_not_fit_never_reaches_the_function(
    analyze: Analyze, payload: Payload, reason: str, threads: Threads
) -> None:
    outcome = await handler_for(analyze, threads)("on", payload)
    assert isinstance(outcome, Failure)
    assert outcome.code is OutcomeCode.INVALID_ARGUMENT
    assert reason in outcome.message


async def test_a_value_that_breaks_its_annotation_is_an_invalid_result(threads: Threads) -> None:
    async def wrong(task: str, data: Any) -> tuple[Point, float]:
        return data, 1.0

    outcome = await handler_for(wrong, threads)("task", Payload(b'{"x":1}', JSON))
    assert outcome == Failure(OutcomeCode.INVALID_RESULT, "the value does not fit Point: Point is expected")


def locally_annotated() -> Analyze:
    @dataclass
    class Local:
        x: int

    async def analyze(task: str, data: Local) -> tuple[Any, float]:
        return data, 1.0

    return analyze


async def nowhere_defined(task: str, data: Decimal) -> tuple[Any, float]:
    return data, 1.0


async def result_nowhere_defined(task: str, data: Any) -> tuple[list[Decimal], float]:
    return data, 1.0


async def of_a_type_without_json(task: str, data: list[threading.Thread]) -> tuple[Any, float]:
    return data, 1.0


UNUSABLE: list[tuple[Any, str]] = [
    (locally_annotated(), r"^analyze\(\) is annotated with Local, which is not defined in its module; "),
    (nowhere_defined, r"^nowhere_defined\(\) is annotated with Decimal, which is not defined"),
    (result_nowhere_defined, r"annotated with Decimal, which is not defined"),
    (of_a_type_without_json, r"list\[Thread\] is no type that JSON can carry"),
]


@pytest.mark.parametrize(("analyze", "reason"), UNUSABLE, ids=["local", "unknown", "result", "no JSON"])
def test_an_annotation_that_cannot_be_used_is_told_when_the_agent_is_made(
    analyze: Analyze, reason: str, threads: Threads
) -> None:
    with pytest.raises(ConfigError, match=reason):
        handler_for(analyze, threads)

    class Agent(SecureAgent):
        pass

    Agent("agent-1", "Agent", [])  # nothing is wrong with the one it inherits
    Agent.analyze = staticmethod(analyze)  # type: ignore[assignment, method-assign]
    with pytest.raises(ConfigError, match=reason):
        Agent("agent-1", "Agent", [])


async def count(task: str, data: int) -> AsyncGenerator[tuple[Any, float], None]:
    for number in range(data):
        yield number, 0.5


async def points(task: str, data: list[int]) -> AsyncIterator[tuple[Point, float]]:
    for x in data:
        yield (Point(x) if x else None), 1  # type: ignore[misc]  # an error to find


class Stream:
    async def __call__(self, task: str, data: int) -> AsyncIterator[tuple[Any, float]]:
        async with aclosing(count(task, data)) as parts:
            async for part in parts:
                yield part


async def all_of(parts: AsyncIterator[Outcome]) -> list[Outcome]:
    return [part async for part in parts]


@pytest.mark.parametrize("function", [count, Stream(), Stream().__call__, functools.partial(count)])
async def test_each_part_is_a_checked_value(function: Any) -> None:
    parts = await all_of(stream_handler_for(function)("count", encode(3)))
    assert parts == [Value(encode(number), 0.5) for number in range(3)]
    assert await all_of(stream_handler_for(function)("count", encode(0))) == []


async def test_a_payload_that_does_not_fit_is_the_only_thing_in_the_stream() -> None:
    handle = stream_handler_for(count, 10)
    for payload, reason in [
        (encode("3"), "does not fit int: $: input should be a valid integer"),
        (Payload(b"3"), "JSON is expected, for int"),
        (Payload(b"1" * 11, JSON), "has 11 bytes"),
    ]:
        [failure] = await all_of(handle("count", payload))
        assert isinstance(failure, Failure)
        assert failure.code is OutcomeCode.INVALID_ARGUMENT
        assert reason in failure.message


class Watched:
    """Yields what it is given, and remembers how it ended."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.began = asyncio.Event()
        self.is_closed = False

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[Any]:
        self.began.set()
        try:
            for part in self.parts:
                if callable(part):
                    await part()
                else:
                    yield part
        finally:
            await asyncio.sleep(0)  # clean-up may take a while
            self.is_closed = True


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ("text", "part 1: analyze_stream() must yield (value, confidence), not str"),
        ((1, 2), "part 1: confidence must be from 0 to 1, not 2.0"),
        (({"a": [float("nan")]}, 1), "part 1: $.a[0]: NaN is not JSON"),
        ((b"x" * 101, 1), "part 1: the payload has 101 bytes, more than the 100 allowed"),
    ],
    ids=["no tuple", "confidence", "NaN", "too large"],
)
async def test_a_part_at_fault_ends_the_stream(
    part: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    watched = Watched((0, 1), part, (2, 1))
    parts = stream_handler_for(watched.analyze_stream, 100)("task", Payload())
    assert await anext(parts) == Value(encode(0), 1.0)
    failure = await anext(parts)
    assert watched.is_closed  # before the failure is told
    assert isinstance(failure, Failure)
    assert failure.code is OutcomeCode.INVALID_RESULT
    assert failure.message.startswith(reason)
    assert await all_of(parts) == []
    [record] = caplog.records
    assert record.__dict__["reason"] == failure.message


async def test_a_part_is_written_as_the_stream_is_annotated() -> None:
    first, second = await all_of(stream_handler_for(points)("task", encode([1, 0, 2])))
    assert first == Value(Payload(b'{"x":1,"label":""}', JSON), 1.0)
    assert second == Failure(OutcomeCode.INVALID_RESULT, "part 1: the value is None, and Point is expected")


async def test_what_the_generator_raises_is_the_caller_s() -> None:
    async def fail() -> None:
        raise InvalidRequest("the user's own")

    watched = Watched((0, 1), fail)
    parts = stream_handler_for(watched.analyze_stream)("task", Payload())
    await anext(parts)
    with pytest.raises(InvalidRequest, match="the user's own"):
        await anext(parts)
    assert watched.is_closed


async def test_closing_the_stream_early_reaches_the_generator() -> None:
    watched = Watched((0, 1), (1, 1))
    async with aclosing(stream_handler_for(watched.analyze_stream)("task", Payload())) as parts:
        await anext(parts)
        assert not watched.is_closed
    assert watched.is_closed


async def test_cancelling_who_waits_reaches_the_generator() -> None:
    watched = Watched(asyncio.Event().wait)
    parts = stream_handler_for(watched.analyze_stream)("task", Payload())
    waiting = asyncio.ensure_future(anext(parts))
    await watched.began.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert watched.is_closed


async def test_a_stream_that_was_never_begun_can_be_closed() -> None:
    watched = Watched((0, 1))
    await stream_handler_for(watched.analyze_stream)("task", Payload()).aclose()
    assert not watched.began.is_set()


def plain_stream(task: str, data: Any) -> Iterator[Any]:
    yield data, 1.0


async def no_stream(task: str, data: Any) -> Any:
    return data, 1.0


def around_a_stream(task: str, data: Any) -> Any:
    return count(task, data)


@pytest.mark.parametrize("function", [plain_stream, no_stream, around_a_stream])
def test_what_is_no_async_generator_is_refused_at_once(function: Callable[..., Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"must be an async generator: declare it, .*`async def`, and `yield`"
    ):
        stream_handler_for(function)


def test_a_stream_s_annotation_that_cannot_be_used_is_told_at_once() -> None:
    async def analyze_stream(task: str, data: Nowhere) -> Any:  # type: ignore[name-defined]  # noqa: F821
        yield data, 1.0

    with pytest.raises(
        ConfigError, match=r"analyze_stream\(\) is annotated with Nowhere, which is not defined"
    ):
        stream_handler_for(analyze_stream)
