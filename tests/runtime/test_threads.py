from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from parallax.runtime.threads import Threads
from parallax.security.errors import ConfigError


def here() -> tuple[str, bool]:
    thread = threading.current_thread()
    return thread.name, thread.daemon


async def eventually(is_true: Callable[[], bool]) -> None:
    """Wait for something that a thread does."""
    async with asyncio.timeout(10):
        while not is_true():
            await asyncio.sleep(0)


async def test_a_function_runs_on_a_named_daemon_thread() -> None:
    """When Python exits it joins other threads, and those of `concurrent.futures` in any case."""
    with Threads(1) as threads:
        assert await threads.run(here) == ("parallax-1", True)


async def test_arguments_reach_the_function_and_its_value_comes_back() -> None:
    with Threads(1) as threads:
        assert await threads.run(sorted, [2, 3, 1], reverse=True) == [3, 2, 1]


async def test_the_function_sees_the_callers_context_and_cannot_change_it() -> None:
    who: contextvars.ContextVar[str] = contextvars.ContextVar("who")

    def look() -> str:
        seen = who.get()
        who.set("the thread")
        return seen

    with Threads(1) as threads:
        for name in ["ann", "ben"]:
            who.set(name)
            assert await threads.run(look) == name
            assert who.get() == name


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(2), KeyboardInterrupt(), GeneratorExit()])
async def test_what_the_function_raises_reaches_the_caller_and_the_thread_lives_on(
    error: BaseException,
) -> None:
    def fail() -> None:
        raise error

    with Threads(1) as threads:
        with pytest.raises(type(error)) as raised:
            await threads.run(fail)
        assert raised.value is error
        assert await threads.run(here) == ("parallax-1", True)


async def test_stop_iteration_becomes_a_runtime_error_as_in_any_coroutine() -> None:
    with Threads(1) as threads, pytest.raises(RuntimeError, match="StopIteration"):
        await threads.run(next, iter(()))


async def test_there_are_never_more_threads_than_workers() -> None:
    lock, gate = threading.Lock(), threading.Event()
    running: list[int] = []
    most: list[int] = []

    def work() -> None:
        with lock:
            running.append(1)
            most.append(len(running))
        gate.wait(10)
        with lock:
            running.pop()

    before = set(threading.enumerate())
    with Threads(3) as threads:
        calls = asyncio.gather(*(threads.run(work) for _ in range(20)))
        await eventually(lambda: len(running) == 3)
        assert len(set(threading.enumerate()) - before) == 3
        gate.set()
        await calls
    assert max(most) == 3


async def test_an_idle_thread_is_used_again() -> None:
    before = set(threading.enumerate())
    with Threads(8) as threads:
        for _ in range(20):
            await threads.run(here)
            await eventually(lambda: len(threads._idle) == 1)  # a thread first answers, then is idle
        assert len(set(threading.enumerate()) - before) == 1


async def test_a_cancelled_caller_waits_for_the_function_and_is_cancelled_then() -> None:
    began, release = threading.Event(), threading.Event()

    def block() -> None:
        began.set()
        release.wait(10)

    with Threads(1) as threads:
        caller = asyncio.ensure_future(threads.run(block))
        await eventually(began.is_set)
        for _ in range(3):
            caller.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not caller.done()
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await caller


async def test_the_error_of_a_function_whose_caller_was_cancelled_is_dropped() -> None:
    began, release = threading.Event(), threading.Event()

    def fail() -> None:
        began.set()
        release.wait(10)
        raise ValueError("nobody asks any more")

    with Threads(1) as threads:
        caller = asyncio.ensure_future(threads.run(fail))
        await eventually(began.is_set)
        caller.cancel()
        await asyncio.sleep(0)
        release.set()
        with pytest.raises(asyncio.CancelledError):
            await caller
        gc.collect()  # nothing is left that would warn of an exception never retrieved


def test_a_function_that_outlives_its_loop_ends_in_silence() -> None:
    release, ended = threading.Event(), threading.Event()

    def block() -> None:
        release.wait(10)
        ended.set()

    async def leave_behind(threads: Threads) -> None:
        work = threads.run(block)
        caller = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        work.close()
        caller.cancel()
        with pytest.raises(RuntimeError):
            await caller

    threads = Threads(1)
    asyncio.run(leave_behind(threads))
    before = threading.active_count()
    threads.close()
    release.set()
    assert ended.wait(10)
    assert threading.active_count() <= before


async def test_closing_ends_the_threads_and_refuses_more_work() -> None:
    with Threads(2) as threads:
        await asyncio.gather(*(threads.run(here) for _ in range(4)))
        mine = [thread for thread in threading.enumerate() if thread.name.startswith("parallax-")]
    threads.close()
    for thread in mine:
        thread.join(10)
        assert not thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        await threads.run(here)


class Data:
    pass


def look(data: Data) -> None:
    assert data is not None


def look_and_fail(data: Data) -> None:
    raise ValueError(data)


@pytest.mark.parametrize("function", [look, look_and_fail])
async def test_nothing_is_kept_of_a_function_that_is_over(function: Callable[[Data], None]) -> None:
    data = Data()
    trace = weakref.ref(data)
    gc.disable()  # what only the collector of cycles finds stays for long in a busy agent
    try:
        with Threads(1) as threads:
            with contextlib.suppress(ValueError):
                await threads.run(function, data)
            del data
            await eventually(lambda: trace() is None)  # the thread lets go a moment after it has reported
    finally:
        gc.enable()


def test_there_is_at_least_one_worker() -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1, not 0"):
        Threads(0)
