"""
Plain functions beside the event loop, on a bounded number of daemon threads.

Not `concurrent.futures` and not `anyio.to_thread`: both join their threads when the interpreter
exits, so one function that never returns would keep a process alive that was told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final, Generic, ParamSpec, Self, TypeVar

from parallax.security.errors import ConfigError

P = ParamSpec("P")
T = TypeVar("T")

THREAD_NAME_PREFIX: Final = "parallax"


class _Call(Generic[T]):
    """One function on its way through a thread; *answer* says that it returned or raised."""

    __slots__ = ("answer", "context", "error", "function", "value")

    def __init__(self, function: Callable[[], T], answer: asyncio.Future[None]) -> None:
        self.function = function
        self.context = contextvars.copy_context()
        self.answer = answer
        self.value: T
        self.error: BaseException | None = None

    def run(self) -> None:
        """On the thread: whatever the function does, *answer* comes about on its loop."""
        try:
            self.value = self.context.run(self.function)
        except BaseException as exc:  # noqa: BLE001 - SystemExit too belongs to whoever awaits the function
            self.error = exc
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.answer.get_loop().call_soon_threadsafe(self._settle)

    def _settle(self) -> None:
        if not self.answer.done():
            self.answer.set_result(None)


class Threads:
    """
    At most *workers* threads, made when first needed and kept.

    More calls than workers wait without a limit; `Executor` sees to it that there are none when its
    `max_concurrency` is not above *workers*.

    Used from one event loop.

    `close` ends idle threads and waits for nobody. A function that still runs then goes on until it
    returns or the process ends, for these are daemon threads: the interpreter does not wait for them
    either, and stops them wherever they are. What must be finished belongs in a function that returns
    in time.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ConfigError(f"workers must be at least 1, not {workers}")
        self._workers = workers
        self._started = 0
        self._is_closed = False
        self._calls: SimpleQueue[_Call[Any] | None] = SimpleQueue()  # Any: each call has its own type
        self._idle: deque[None] = deque()  # one item for each thread that waits for a call

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """
        What *function* returns or raises, run on a thread in a copy of the caller's context.

        A thread cannot be stopped. When the caller is cancelled this still waits until *function* is
        back, then raises `CancelledError`; closing the coroutine leaves the thread behind at once.
        """
        if self._is_closed:
            raise RuntimeError("the threads are closed")
        loop = asyncio.get_running_loop()
        call = _Call(functools.partial(function, *args, **kwargs), loop.create_future())
        self._provide_thread()
        self._calls.put(call)
        is_cancelled = False
        while not call.answer.done():
            try:
                await asyncio.shield(call.answer)
            except asyncio.CancelledError:  # raised again as soon as the thread is free
                is_cancelled = True
        if is_cancelled:
            raise asyncio.CancelledError
        error, call.error = call.error, None  # else error, its traceback and the call keep each other alive
        if error is not None:
            try:
                raise error
            finally:
                del error
        return call.value

    def close(self) -> None:
        """End the threads that do nothing, and the others after what they do; does not wait."""
        if not self._is_closed:
            self._is_closed = True
            for _ in range(self._started):
                self._calls.put(None)

    def _provide_thread(self) -> None:
        """See that a thread will take the next call."""
        try:
            self._idle.pop()
        except IndexError:
            if self._started == self._workers:
                return  # all are busy; the first that is free takes it
        else:
            return
        name = f"{THREAD_NAME_PREFIX}-{self._started + 1}"
        threading.Thread(target=_work, args=(self._calls, self._idle), name=name, daemon=True).start()
        self._started += 1


def _work(calls: SimpleQueue[_Call[Any] | None], idle: deque[None]) -> None:
    """Run calls until told to stop. Holds no reference to `Threads` nor, while idle, to a call."""
    while (call := calls.get()) is not None:
        call.run()
        del call
        idle.append(None)
