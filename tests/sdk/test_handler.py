from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from parallax.runtime.executor import Executor
from parallax.runtime.outcome import JSON, Failure, Outcome, OutcomeCode, Payload, Value
from parallax.runtime.threads import Threads
from parallax.sdk.handler import Analyze, handler_for
from parallax.security.errors import InvalidRequest


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
