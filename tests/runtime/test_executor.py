from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.executor import MAX_MESSAGE_CHARS, Executor, Handler, failure_of
from parallax.runtime.outcome import Failure, Outcome, OutcomeCode, Payload, Value
from parallax.runtime.threads import Threads
from parallax.security.errors import ConfigError, InvalidRequest

T = TypeVar("T")
Event = tuple[str, *tuple[object, ...]]

ANSWER = Value(Payload(b"1", "application/json"), 1.0)
NOTHING = Payload()
LONG = timedelta(hours=1)
NO_GRACE = timedelta(0)


class ManualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock moves when told to, so that deadlines pass without waiting."""

    now = 1000.0

    def time(self) -> float:
        return self.now


async def settle() -> None:
    """Let everything happen that is ready to happen, and what follows from it."""
    for _ in range(12):
        await asyncio.sleep(0)


async def advance(seconds: float) -> None:
    """Move the clock of the running `ManualLoop`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ManualLoop)
    loop.now += seconds
    await settle()


def on_manual_time(scenario: Callable[[], Coroutine[None, None, T]]) -> T:
    with asyncio.Runner(loop_factory=ManualLoop) as runner:
        return runner.run(scenario())


class Answers:
    """Takes outcomes, and remembers every one of them."""

    def __init__(self) -> None:
        self.all: list[tuple[int, Outcome]] = []
        self._more = asyncio.Event()

    def __call__(self, task_id: int, outcome: Outcome) -> None:
        self.all.append((task_id, outcome))
        self._more.set()

    def of(self, task_id: int) -> list[str]:
        """How *task_id* ended: "VALUE" or the failure's code, once for each outcome it had."""
        return [kind(outcome) for answered, outcome in self.all if answered == task_id]

    async def arrived(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.all) < count:
                self._more.clear()
                await self._more.wait()

    async def only(self) -> Outcome:
        await self.arrived(1)
        [(_, outcome)] = self.all
        return outcome


def kind(outcome: Outcome) -> str:
    return outcome.code.value if isinstance(outcome, Failure) else "VALUE"


async def answering(_name: str, _payload: Payload) -> Outcome:
    return ANSWER


async def hanging(_name: str, _payload: Payload) -> Outcome:
    await asyncio.Event().wait()
    return ANSWER


async def outcome_of(handler: Handler, timeout: timedelta = LONG) -> Outcome:
    """What one task gets from *handler*."""
    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=0) as executor:
        executor.submit(1, "task", NOTHING, timeout, answers)
        return await answers.only()


def raising(make: Callable[[], BaseException]) -> Handler:
    async def handler(_name: str, _payload: Payload) -> Outcome:
        raise make()

    return handler


async def test_a_task_gets_the_outcome_of_its_handler() -> None:
    seen = []

    async def handler(name: str, payload: Payload) -> Outcome:
        seen.append((name, payload))
        return ANSWER

    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=0) as executor:
        executor.submit(7, "greet", Payload(b"x"), LONG, answers)
        assert executor.in_flight == 1
        await answers.arrived(1)
        assert executor.in_flight == 0
    assert answers.all == [(7, ANSWER)]
    assert seen == [("greet", Payload(b"x"))]


async def test_a_failure_that_the_handler_returns_is_the_outcome() -> None:
    failure = Failure(OutcomeCode.INVALID_RESULT, "no")

    async def handler(_name: str, _payload: Payload) -> Outcome:
        return failure

    assert await outcome_of(handler) is failure


class TextlessError(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise ValueError("no text for you")


@pytest.mark.parametrize(
    ("make", "error_type", "message"),
    [
        (lambda: ValueError("bad number"), "ValueError", "bad number"),
        (lambda: KeyError("name"), "KeyError", "'name'"),
        (lambda: InvalidRequest("the handler's own"), "InvalidRequest", "the handler's own"),
        (lambda: SystemExit(3), "SystemExit", "3"),
        (KeyboardInterrupt, "KeyboardInterrupt", "the exception carries no text"),
        (GeneratorExit, "GeneratorExit", "the exception carries no text"),
        (MemoryError, "MemoryError", "the exception carries no text"),
        (lambda: RecursionError("too deep"), "RecursionError", "too deep"),
        (asyncio.CancelledError, "CancelledError", "the exception carries no text"),
        (lambda: TimeoutError("upstream"), "TimeoutError", "upstream"),
        (StopIteration, "RuntimeError", "coroutine raised StopIteration"),
        (lambda: BaseExceptionGroup("two", [ValueError("a"), SystemExit()]), "BaseExceptionGroup", "two"),
        (
            TextlessError,
            "TextlessError",
            "the text cannot be shown, because __str__ raised ValueError",
        ),
    ],
    ids=lambda item: item if isinstance(item, str) and item.isidentifier() else "",
)
async def test_a_handler_that_raises_fails_its_own_task_only(
    make: Callable[[], BaseException], error_type: str, message: str
) -> None:
    async def handler(name: str, _payload: Payload) -> Outcome:
        await asyncio.sleep(0)
        if name == "raise":
            raise make()
        return ANSWER

    answers = Answers()
    async with Executor(handler, max_concurrency=3, queue_limit=0) as executor:
        executor.submit(1, "fine", NOTHING, LONG, answers)
        executor.submit(2, "raise", NOTHING, LONG, answers)
        executor.submit(3, "fine", NOTHING, LONG, answers)
        await answers.arrived(3)
        executor.submit(4, "fine", NOTHING, LONG, answers)
        await answers.arrived(4)
    outcomes = dict(answers.all)
    failure = outcomes.pop(2)
    assert isinstance(failure, Failure)
    assert (failure.code, failure.error_type) == (OutcomeCode.HANDLER_FAILED, error_type)
    assert failure.message.startswith(message)
    assert outcomes == {1: ANSWER, 3: ANSWER, 4: ANSWER}


async def test_runaway_recursion_in_a_handler_is_an_outcome() -> None:
    def endless() -> int:
        return endless() + 1

    async def handler(_name: str, _payload: Payload) -> Outcome:
        endless()
        return ANSWER

    outcome = await outcome_of(handler)
    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.error_type) == (OutcomeCode.HANDLER_FAILED, "RecursionError")


async def test_a_failed_handler_is_logged_with_its_traceback_and_answered_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    outcome = await outcome_of(raising(lambda: ValueError("bad number")))
    assert "Traceback" not in repr(outcome)
    [record] = caplog.records
    assert (record.name, record.levelno) == ("parallax.runtime.executor", logging.ERROR)
    assert record.exc_info is not None
    assert record.exc_info[0] is ValueError
    assert (record.__dict__["task_id"], record.__dict__["task"]) == (1, "task")


async def test_a_handler_that_returns_no_outcome_fails_its_task() -> None:
    async def handler(_name: str, _payload: Payload) -> Outcome:
        return ("value", 1.0)  # type: ignore[return-value]

    outcome = await outcome_of(handler)
    assert isinstance(outcome, Failure)
    assert (outcome.code, outcome.error_type) == (OutcomeCode.HANDLER_FAILED, "TypeError")


async def test_a_handler_that_raises_before_its_first_await_fails_its_task() -> None:
    def handler(_name: str, _payload: Payload) -> Coroutine[None, None, Outcome]:
        raise ValueError("at once")

    outcome = await outcome_of(handler)
    assert isinstance(outcome, Failure)
    assert (outcome.error_type, outcome.message) == ("ValueError", "at once")


def test_the_text_of_an_exception_is_clipped() -> None:
    assert failure_of(ValueError("x" * 5000)).message == "x" * MAX_MESSAGE_CHARS


def test_the_text_of_an_exception_can_always_be_sent() -> None:
    """Protobuf strings are UTF-8; one lone surrogate would cost the whole frame."""
    assert failure_of(ValueError("caf\udce9")).message == "caf?"


def test_a_handler_past_its_deadline_is_cancelled() -> None:
    cancelled = []

    async def handler(_name: str, _payload: Payload) -> Outcome:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise
        return ANSWER

    async def scenario() -> None:
        answers = Answers()
        async with Executor(handler, max_concurrency=1, queue_limit=0) as executor:
            executor.submit(1, "task", NOTHING, timedelta(seconds=5), answers)
            await advance(4.9)
            assert answers.all == []
            await advance(0.2)
            assert answers.all == [
                (1, Failure(OutcomeCode.DEADLINE_EXCEEDED, "the handler did not end within 5 s"))
            ]
            assert cancelled == [True]
            assert (executor.in_flight, executor.overdue) == (0, 0)

    on_manual_time(scenario)


def test_the_deadline_of_a_task_that_ended_a_moment_ago_does_not_meet_the_next_of_its_id() -> None:
    async def handler(name: str, _payload: Payload) -> Outcome:
        if name != "fresh":
            await asyncio.Event().wait()
        return ANSWER

    async def scenario() -> None:
        answers = Answers()
        async with Executor(handler, max_concurrency=1, queue_limit=2) as executor:

            def done(task_id: int, outcome: Outcome) -> None:
                answers(task_id, outcome)
                if len(answers.all) == 1:  # the other one is over, too, and not told yet
                    executor.cancel(5 - task_id)
                    executor.submit(5 - task_id, "fresh", NOTHING, LONG, answers)

            executor.submit(1, "blocks", NOTHING, LONG, answers)
            executor.submit(2, "waits", NOTHING, timedelta(seconds=5), done)
            executor.submit(3, "waits", NOTHING, timedelta(seconds=5), done)
            await advance(5.2)
            executor.cancel(1)
            await settle()
            first = answers.all[0][0]
            assert answers.of(first) == ["DEADLINE_EXCEEDED"]
            assert answers.of(5 - first) == ["CANCELLED", "VALUE"]

    on_manual_time(scenario)


async def test_the_deadline_holds_on_the_real_clock() -> None:
    outcome = await outcome_of(hanging, timedelta(milliseconds=20))
    assert outcome == Failure(OutcomeCode.DEADLINE_EXCEEDED, "the handler did not end within 0.02 s")


def test_the_deadline_of_a_finished_task_does_nothing() -> None:
    async def scenario() -> None:
        answers = Answers()
        async with Executor(answering, max_concurrency=1, queue_limit=0) as executor:
            executor.submit(1, "task", NOTHING, timedelta(seconds=5), answers)
            await advance(1)
            await advance(10)
        assert answers.of(1) == ["VALUE"]

    on_manual_time(scenario)


async def test_an_answered_task_leaves_nothing_behind_until_its_deadline() -> None:
    answers = Answers()
    trace = weakref.ref(answers)
    async with Executor(answering, max_concurrency=1, queue_limit=0) as executor:
        executor.submit(1, "task", NOTHING, LONG, answers)
        await answers.arrived(1)
        del answers
        await settle()
        gc.collect()
        assert trace() is None


@pytest.mark.parametrize("timeout", [timedelta(0), timedelta(seconds=-1)])
async def test_a_task_without_time_left_is_not_begun(timeout: timedelta) -> None:
    begun = []

    async def handler(name: str, _payload: Payload) -> Outcome:
        begun.append(name)
        return ANSWER

    outcome = await outcome_of(handler, timeout)
    assert kind(outcome) == "DEADLINE_EXCEEDED"
    assert begun == []


def test_waiting_counts_towards_the_deadline() -> None:
    begun = []

    async def handler(name: str, _payload: Payload) -> Outcome:
        begun.append(name)
        await asyncio.Event().wait()
        return ANSWER

    async def scenario() -> None:
        answers = Answers()
        async with Executor(handler, max_concurrency=1, queue_limit=2) as executor:
            executor.submit(1, "first", NOTHING, timedelta(seconds=10), answers)
            executor.submit(2, "second", NOTHING, timedelta(seconds=5), answers)
            executor.submit(3, "third", NOTHING, timedelta(seconds=12), answers)
            await advance(6)
            assert [task_id for task_id, _ in answers.all] == [2]
            [(_, failure)] = answers.all
            assert failure == Failure(
                OutcomeCode.DEADLINE_EXCEEDED, "no slot was free within 5 s; the task was not begun"
            )
            await advance(5)
            assert begun == ["first", "third"]
            await advance(2)
        assert [kind(outcome) for _, outcome in answers.all] == ["DEADLINE_EXCEEDED"] * 3

    on_manual_time(scenario)


def test_a_handler_that_swallows_its_cancellation_keeps_its_slot_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    release = asyncio.Event()

    async def handler(name: str, _payload: Payload) -> Outcome:
        if name == "stubborn":
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()
        return ANSWER

    async def scenario() -> None:
        answers = Answers()
        async with Executor(handler, max_concurrency=2, queue_limit=1) as executor:
            executor.submit(1, "stubborn", NOTHING, timedelta(seconds=1), answers)
            executor.submit(2, "stubborn", NOTHING, timedelta(seconds=1), answers)
            executor.submit(3, "quick", NOTHING, timedelta(seconds=60), answers)
            await advance(2)
            assert answers.of(1) == answers.of(2) == ["DEADLINE_EXCEEDED"]
            assert answers.of(3) == []
            assert (executor.in_flight, executor.overdue) == (1, 2)
            release.set()
            await settle()
            assert answers.of(3) == ["VALUE"]
            assert (executor.in_flight, executor.overdue) == (0, 0)
        assert len(answers.all) == 3

    on_manual_time(scenario)
    assert caplog.records == []


async def test_what_a_handler_raises_after_its_outcome_is_logged_and_not_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def handler(_name: str, _payload: Payload) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            raise ValueError("clean-up failed")

    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=0) as executor:
        executor.submit(1, "task", NOTHING, LONG, answers)
        await settle()
        executor.cancel(1)
        await settle()
    assert answers.of(1) == ["CANCELLED"]
    assert [record.message for record in caplog.records] == ["handler failed after its outcome"]


async def test_more_than_the_queue_holds_is_overloaded_at_once() -> None:
    answers = Answers()
    async with Executor(hanging, max_concurrency=2, queue_limit=1) as executor:
        for task_id in range(4):
            executor.submit(task_id, "task", NOTHING, LONG, answers)
        [(refused, failure)] = answers.all
        assert refused == 3
        assert isinstance(failure, Failure)
        assert failure.code is OutcomeCode.OVERLOADED
        assert failure.retry_after > timedelta(0)
        assert executor.in_flight == 3


async def test_waiting_tasks_start_in_order_of_arrival() -> None:
    begun = []

    async def handler(name: str, _payload: Payload) -> Outcome:
        begun.append(name)
        await asyncio.sleep(0)
        return ANSWER

    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=9) as executor:
        for task_id in range(10):
            executor.submit(task_id, f"{task_id}", NOTHING, LONG, answers)
        executor.cancel(4)
        await answers.arrived(10)
    assert begun == ["0", "1", "2", "3", "5", "6", "7", "8", "9"]


async def test_a_waiting_task_runs_in_the_context_of_whoever_submitted_it() -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who", default="nobody")
    seen = []

    async def handler(_name: str, _payload: Payload) -> Outcome:
        seen.append(who.get())
        who.set("the handler before")
        await asyncio.sleep(0)
        return ANSWER

    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=1) as executor:
        for task_id, name in enumerate(["ann", "ben"]):
            who.set(name)
            executor.submit(task_id, "task", NOTHING, LONG, answers)
        who.set("someone else")
        await answers.arrived(2)
    assert seen == ["ann", "ben"]


async def test_a_second_task_of_a_live_id_is_refused_and_the_first_goes_on() -> None:
    first, second = Answers(), Answers()
    release = asyncio.Event()

    async def handler(_name: str, _payload: Payload) -> Outcome:
        await release.wait()
        return ANSWER

    async with Executor(handler, max_concurrency=2, queue_limit=0) as executor:
        executor.submit(1, "task", NOTHING, LONG, first)
        executor.submit(1, "task", NOTHING, LONG, second)
        assert second.of(1) == ["INVALID_ARGUMENT"]
        release.set()
        assert await first.only() is ANSWER
        third = Answers()
        executor.submit(1, "task", NOTHING, LONG, third)
        assert await third.only() is ANSWER
    assert len(second.all) == 1


async def test_cancelling_a_running_task_reports_it_and_frees_the_slot() -> None:
    answers = Answers()
    async with Executor(hanging, max_concurrency=1, queue_limit=0) as executor:
        executor.submit(1, "task", NOTHING, LONG, answers)
        await settle()
        executor.cancel(1)
        assert answers.of(1) == ["CANCELLED"]
        executor.cancel(1)
        await settle()
        assert (executor.in_flight, executor.overdue) == (0, 0)
    assert answers.of(1) == ["CANCELLED"]


async def test_a_task_cancelled_before_its_first_step_never_runs() -> None:
    begun = []

    async def handler(name: str, _payload: Payload) -> Outcome:
        begun.append(name)
        return ANSWER

    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=1) as executor:
        executor.submit(1, "running", NOTHING, LONG, answers)
        executor.submit(2, "waiting", NOTHING, LONG, answers)
        executor.cancel(1)
        executor.cancel(2)
        await settle()
        assert (executor.in_flight, executor.overdue) == (0, 0)
        executor.submit(3, "after", NOTHING, LONG, answers)
        await answers.arrived(3)
    assert begun == ["after"]
    assert (answers.of(1), answers.of(2), answers.of(3)) == (["CANCELLED"], ["CANCELLED"], ["VALUE"])


async def test_cancelling_an_unknown_task_does_nothing() -> None:
    async with Executor(answering, max_concurrency=1, queue_limit=0) as executor:
        executor.cancel(404)
        assert executor.in_flight == 0


async def test_a_handler_that_cancels_every_task_it_finds_fails_those_tasks_only() -> None:
    async def handler(name: str, _payload: Payload) -> Outcome:
        if name == "vandal":
            for task in asyncio.all_tasks() - untouched:
                task.cancel()
        await asyncio.sleep(0)
        return ANSWER

    untouched = asyncio.all_tasks()
    answers = Answers()
    async with Executor(handler, max_concurrency=3, queue_limit=1) as executor:
        executor.submit(1, "victim", NOTHING, LONG, answers)
        executor.submit(2, "vandal", NOTHING, LONG, answers)
        executor.submit(3, "not begun", NOTHING, LONG, answers)
        executor.submit(4, "waiting", NOTHING, LONG, answers)
        await answers.arrived(4)
    assert answers.of(1) == answers.of(2) == answers.of(3) == ["HANDLER_FAILED"]
    assert {f.error_type for _, f in answers.all if isinstance(f, Failure)} == {"CancelledError"}
    assert answers.of(4) == ["VALUE"]


async def test_a_receiver_that_raises_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_task_id: int, _outcome: Outcome) -> None:
        raise ValueError("cannot take it")

    answers = Answers()
    async with Executor(answering, max_concurrency=1, queue_limit=2) as executor:
        executor.submit(1, "task", NOTHING, LONG, broken)
        executor.submit(2, "task", NOTHING, timedelta(0), broken)
        executor.submit(3, "task", NOTHING, LONG, answers)
        assert await answers.only() is ANSWER
    assert [record.message for record in caplog.records] == ["outcome could not be handed over"] * 2


async def test_a_receiver_may_submit_the_next_task() -> None:
    ended = asyncio.Event()
    left = [3]

    async with Executor(answering, max_concurrency=1, queue_limit=0) as executor:

        def again(_task_id: int, outcome: Outcome) -> None:
            assert outcome is ANSWER
            left[0] -= 1
            if left[0]:
                executor.submit(1, "task", NOTHING, LONG, again)
            else:
                ended.set()

        executor.submit(1, "task", NOTHING, LONG, again)
        async with asyncio.timeout(10):
            await ended.wait()


async def test_a_draining_executor_takes_nothing_new_although_it_has_room() -> None:
    answers = Answers()
    async with Executor(answering, max_concurrency=1, queue_limit=0) as executor:
        await executor.drain(LONG)
        executor.submit(1, "late", NOTHING, LONG, answers)
    [(_, failure)] = answers.all
    assert isinstance(failure, Failure)
    assert failure.code is OutcomeCode.OVERLOADED
    assert failure.message.startswith("the agent is stopping")


async def test_draining_finishes_what_is_held() -> None:
    release = asyncio.Event()

    async def handler(_name: str, _payload: Payload) -> Outcome:
        await release.wait()
        return ANSWER

    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=1) as executor:
        executor.submit(1, "running", NOTHING, LONG, answers)
        executor.submit(2, "waiting", NOTHING, LONG, answers)
        draining = asyncio.ensure_future(executor.drain(LONG))
        await settle()
        assert not draining.done()
        release.set()
        await draining
        assert answers.of(1) == answers.of(2) == ["VALUE"]


def test_draining_cancels_what_is_left_when_its_time_is_up() -> None:
    async def scenario() -> None:
        answers = Answers()
        async with Executor(hanging, max_concurrency=1, queue_limit=1) as executor:
            executor.submit(1, "running", NOTHING, LONG, answers)
            executor.submit(2, "waiting", NOTHING, LONG, answers)
            draining = asyncio.ensure_future(executor.drain(timedelta(seconds=10)))
            await settle()
            await advance(9)
            assert answers.all == []
            await advance(2)
            assert draining.done()
            assert answers.of(1) == answers.of(2) == ["CANCELLED"]
            assert executor.in_flight == 0

    on_manual_time(scenario)


async def test_draining_nothing_returns_at_once() -> None:
    async with Executor(answering, max_concurrency=1, queue_limit=0) as executor:
        await executor.drain(timedelta(0))


async def test_leaving_the_block_ends_everything_and_reports_it(caplog: pytest.LogCaptureFixture) -> None:
    ended = []

    async def handler(name: str, _payload: Payload) -> Outcome:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(name)
        return ANSWER

    answers = Answers()
    async with asyncio.timeout(10):
        async with Executor(handler, max_concurrency=2, queue_limit=1, grace=LONG) as executor:
            for task_id in range(3):
                executor.submit(task_id, f"{task_id}", NOTHING, LONG, answers)
            await settle()
    assert caplog.records == []
    assert [kind(outcome) for _, outcome in answers.all] == ["CANCELLED"] * 3
    assert sorted(ended) == ["0", "1"]
    assert len(asyncio.all_tasks()) == 1


async def test_an_error_of_the_block_leaves_it_as_it_is() -> None:
    answers = Answers()

    async def failing() -> None:
        async with Executor(hanging, max_concurrency=1, queue_limit=0) as executor:
            executor.submit(1, "task", NOTHING, LONG, answers)
            raise ValueError("from the block")

    with pytest.raises(ValueError, match="from the block"):
        await failing()
    assert answers.of(1) == ["CANCELLED"]


async def test_cancelling_the_owner_of_the_block_reports_and_ends_every_task() -> None:
    answers = Answers()
    inside = asyncio.Event()

    async def owner() -> None:
        async with Executor(hanging, max_concurrency=1, queue_limit=1) as executor:
            executor.submit(1, "running", NOTHING, LONG, answers)
            executor.submit(2, "waiting", NOTHING, LONG, answers)
            inside.set()
            await asyncio.Event().wait()

    running = asyncio.ensure_future(owner())
    await inside.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert answers.of(1) == answers.of(2) == ["CANCELLED"]


async def test_a_handler_that_always_swallows_its_cancellation_is_closed_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cleaned = []

    async def handler(_name: str, _payload: Payload) -> Outcome:
        try:
            while True:
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.Event().wait()
        finally:
            cleaned.append(True)

    answers = Answers()
    async with asyncio.timeout(10):
        async with Executor(handler, max_concurrency=1, queue_limit=0, grace=NO_GRACE) as executor:
            executor.submit(1, "task", NOTHING, LONG, answers)
            await settle()
    assert answers.of(1) == ["CANCELLED"]
    assert cleaned == [True]
    assert [record.message for record in caplog.records] == [
        "handler ignored its cancellation and was closed"
    ]


async def test_a_handler_that_catches_everything_is_named_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    release = asyncio.Event()

    async def handler(_name: str, _payload: Payload) -> Outcome:
        while not release.is_set():
            try:
                await release.wait()
            except BaseException as exc:  # noqa: BLE001 - the point of the test
                if isinstance(exc, GeneratorExit):  # nothing more can be tried then, so the test may end
                    asyncio.get_running_loop().call_soon(release.set)
        return ANSWER

    answers = Answers()
    async with Executor(handler, max_concurrency=1, queue_limit=0, grace=NO_GRACE) as executor:
        executor.submit(1, "task", NOTHING, LONG, answers)
        await settle()
    assert answers.of(1) == ["CANCELLED"]
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.CRITICAL, "handler cannot be stopped; only ending the process helps")
    ]


async def test_a_blocked_thread_answers_at_its_deadline_keeps_its_slot_and_is_left_behind() -> None:
    release, ended = threading.Event(), threading.Event()

    def block(name: str) -> Outcome:
        if name == "block":
            release.wait(10)
            ended.set()
        return ANSWER

    with Threads(2) as threads:

        async def handler(name: str, _payload: Payload) -> Outcome:
            return await threads.run(block, name)

        answers = Answers()
        async with Executor(handler, max_concurrency=2, queue_limit=1, grace=NO_GRACE) as executor:
            executor.submit(1, "block", NOTHING, timedelta(milliseconds=20), answers)
            await answers.arrived(1)
            assert answers.of(1) == ["DEADLINE_EXCEEDED"]
            assert executor.overdue == 1
            executor.submit(2, "quick", NOTHING, LONG, answers)
            await answers.arrived(2)
            assert answers.of(2) == ["VALUE"]
            executor.submit(3, "block", NOTHING, LONG, answers)
            await executor.drain(timedelta(milliseconds=20))
            assert answers.of(3) == ["CANCELLED"]
            assert executor.overdue == 2
        assert not ended.is_set()
    release.set()


async def test_the_slot_of_a_blocked_thread_is_free_again_when_the_function_returns() -> None:
    release = threading.Event()

    def block(name: str) -> Outcome:
        if name == "block":
            release.wait(10)
        return ANSWER

    with Threads(1) as threads:

        async def handler(name: str, _payload: Payload) -> Outcome:
            return await threads.run(block, name)

        answers = Answers()
        async with Executor(handler, max_concurrency=1, queue_limit=1) as executor:
            executor.submit(1, "block", NOTHING, LONG, answers)
            executor.submit(2, "quick", NOTHING, LONG, answers)
            await settle()
            executor.cancel(1)
            await settle()
            assert [task_id for task_id, _ in answers.all] == [1]
            release.set()
            await answers.arrived(2)
    assert (answers.of(1), answers.of(2)) == (["CANCELLED"], ["VALUE"])


STUCK_PROGRAM = """
import asyncio, sys, time
from datetime import timedelta
from parallax.runtime.executor import Executor
from parallax.runtime.outcome import Payload
from parallax.runtime.threads import Threads

def report(task_id, outcome):
    print(outcome.code)

async def main():
    with Threads(1) as threads:
        async def handler(name, payload):
            return await threads.run(time.sleep, 3600)
        async with Executor(handler, max_concurrency=1, queue_limit=0, grace=timedelta(0)) as executor:
            executor.submit(1, "task", Payload(), timedelta(hours=1), report)
            await executor.drain(timedelta(milliseconds=20))

asyncio.run(main())
print("over")
"""


def test_a_thread_that_never_returns_does_not_keep_the_process_alive() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", STUCK_PROGRAM], capture_output=True, text=True, timeout=20, check=False
    )
    assert (ended.returncode, ended.stdout.split()) == (0, ["CANCELLED", "over"]), ended.stderr


def test_ctrl_c_reaches_the_owner_although_a_handler_fails_of_its_own_interrupt() -> None:
    """The runner of asyncio turns SIGINT into a cancellation of the main task, never of a handler."""
    answers: list[str] = []

    async def main() -> None:
        async with Executor(raising(KeyboardInterrupt), max_concurrency=1, queue_limit=0) as executor:
            executor.submit(1, "task", NOTHING, LONG, lambda _, outcome: answers.append(kind(outcome)))
            await settle()
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert answers == ["HANDLER_FAILED"]


def test_a_second_ctrl_c_ends_the_handler_that_blocks_the_loop() -> None:
    answers: list[Outcome] = []

    async def blocking(_name: str, _payload: Payload) -> Outcome:
        for _ in range(2):  # the first is noted, the second raises here
            os.kill(os.getpid(), signal.SIGINT)
        return ANSWER

    async def main() -> None:
        async with Executor(blocking, max_concurrency=1, queue_limit=0) as executor:
            executor.submit(1, "task", NOTHING, LONG, lambda _, outcome: answers.append(outcome))
            await asyncio.Event().wait()

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    [outcome] = answers
    assert isinstance(outcome, Failure)
    assert outcome.error_type == "KeyboardInterrupt"


@pytest.mark.parametrize(("concurrency", "queue"), [(0, 0), (-1, 5), (1, -1)])
def test_senseless_limits_are_refused(concurrency: int, queue: int) -> None:
    with pytest.raises(ConfigError, match="must be at least"):
        Executor(answering, max_concurrency=concurrency, queue_limit=queue)


@dataclass
class Model:
    """Does to an executor what it is told, and counts what comes of it."""

    executor: Executor = field(init=False)
    outcomes: list[list[Outcome]] = field(default_factory=list)  # of each submission, whatever its id
    names: dict[object, str] = field(default_factory=dict)  # of the last submission of each id
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    failing: set[str] = field(default_factory=set)
    began: Counter[str] = field(default_factory=Counter)
    drains: list[asyncio.Future[None]] = field(default_factory=list)
    running: int = 0
    most: int = 0

    async def handler(self, name: str, _payload: Payload) -> Outcome:
        self.began[name.split()[1]] += 1
        self.running += 1
        self.most = max(self.most, self.running)
        gate = self.gates[name]
        try:
            while not gate.is_set():
                try:
                    await gate.wait()
                except asyncio.CancelledError:
                    if not name.startswith("stubborn"):
                        raise
            if name in self.failing:
                raise ValueError(name)
            return ANSWER
        finally:
            self.running -= 1

    async def apply(self, event: Event) -> None:
        match event:
            case ("submit", int(task_id), manner, int(seconds)):
                self.submit(task_id, f"{manner} {len(self.outcomes)}", timedelta(seconds=seconds))
            case ("cancel", int(task_id)):
                self.executor.cancel(task_id)
            case (("finish" | "fail") as how, task_id) if task_id in self.names:
                if how == "fail":
                    self.failing.add(self.names[task_id])
                self.gates[self.names[task_id]].set()
            case ("advance", float() | int() as seconds):
                await advance(seconds)
            case ("settle",):
                await settle()
            case ("drain",):
                self.drains.append(asyncio.ensure_future(self.executor.drain(timedelta(seconds=4))))

    def submit(self, task_id: int, name: str, timeout: timedelta) -> None:
        mine: list[Outcome] = []
        self.outcomes.append(mine)
        self.gates[name] = asyncio.Event()
        self.names[task_id] = name
        self.executor.submit(task_id, name, NOTHING, timeout, lambda _, outcome: mine.append(outcome))

    @property
    def owed(self) -> int:
        return sum(not outcomes for outcomes in self.outcomes)


def _tick() -> None:
    """Move the clock with every turn of the loop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, ManualLoop)
    loop.now += 0.01
    loop.call_soon(_tick)


TIMES_BEGUN = {
    "VALUE": {1},
    "HANDLER_FAILED": {1},
    "OVERLOADED": {0},
    "INVALID_ARGUMENT": {0},
    "CANCELLED": {0, 1},
    "DEADLINE_EXCEEDED": {0, 1},
}

IDS = st.integers(0, 5)
EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), IDS, st.sampled_from(["plain", "stubborn"]), st.sampled_from([1, 3, 10])
        ),
        st.tuples(st.just("cancel"), IDS),
        st.tuples(st.just("finish"), IDS),
        st.tuples(st.just("fail"), IDS),
        st.tuples(st.just("advance"), st.sampled_from([0.5, 2, 5])),
        st.tuples(st.just("settle")),
        st.tuples(st.just("drain")),
    ),
    max_size=40,
)


@given(events=EVENTS, concurrency=st.integers(1, 3), queue=st.integers(0, 3))
def test_whatever_happens_each_task_has_one_outcome_and_slots_are_bounded(
    events: list[Event], concurrency: int, queue: int
) -> None:
    model = Model()

    async def scenario() -> None:
        async with Executor(
            model.handler, max_concurrency=concurrency, queue_limit=queue, grace=timedelta(seconds=1)
        ) as executor:
            model.executor = executor
            for event in events:
                await model.apply(event)
                assert executor.in_flight == model.owed <= concurrency + queue
                assert 0 <= executor.overdue <= concurrency
            _tick()  # what is stubborn is waited for at the end
        assert executor.in_flight == executor.overdue == model.running == 0
        await asyncio.gather(*model.drains)

    on_manual_time(scenario)

    assert model.most <= concurrency
    for number, outcomes in enumerate(model.outcomes):
        [outcome] = outcomes
        assert model.began[f"{number}"] in TIMES_BEGUN[kind(outcome)]
