"""
An agent's tasks at work: a bounded number at once, each with a deadline, none able to harm another.

Knows no connection and no wire format. Whoever receives tasks hands them to `Executor.submit` and is
called back with the outcome of each, exactly once.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Self

from parallax.runtime.deadlines import GRAIN_S, Deadlines
from parallax.runtime.outcome import Complete, Failure, Outcome, OutcomeCode, Payload, Value
from parallax.security.errors import ConfigError

Handler = Callable[[str, Payload], Coroutine[Any, Any, Outcome]]  # Any: what a coroutine yields to its loop
Done = Callable[[Any, Outcome], None]  # Any: the key that the task was submitted with

RETRY_AFTER: Final = timedelta(seconds=1)  # as `Unavailable` says unless told otherwise
STOP_GRACE: Final = timedelta(seconds=1)  # for the clean-up of handlers that are cancelled at the end
MAX_MESSAGE_CHARS: Final = 2048  # room for a sentence, not for a dump of the data
MAX_TYPE_CHARS: Final = 256

_OUTCOMES: Final = (Value, Failure, Complete)

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """A task between its arrival and the later of two moments: its outcome and its handler's end."""

    task_id: Hashable
    name: str
    payload: Payload
    timeout: timedelta
    done: Done
    handler: Handler
    slot: int = 0  # where its deadline is kept
    context: contextvars.Context | None = None  # of whoever submitted it, kept while it waits
    work: Coroutine[Any, Any, Outcome] | None = None  # the handler's, until it is abandoned
    task: asyncio.Task[None] | None = None
    is_reported: bool = False

    @property
    def log_fields(self) -> dict[str, object]:
        number = self.task_id[-1] if isinstance(self.task_id, tuple) else self.task_id
        return {"task_id": number, "task": self.name}


class Executor:
    """
    Runs *handler* for every task submitted inside the `async with` block.

    At most *max_concurrency* handlers run at once and at most *queue_limit* tasks wait for their turn,
    first come, first served; what is beyond gets OVERLOADED at once.

    A task has its outcome at its deadline, or `GRAIN_S` later, whatever its handler does. Its slot is free
    again when the handler has really ended: one that swallows its cancellation, or a plain function on
    a thread, still uses the machine (`overdue` counts them).

    Leaving the block gives every task still held the outcome CANCELLED, gives cancelled handlers *grace*
    to end, closes those that did not, and returns when all have ended. A plain function is left to its
    thread. The one thing that can hold it up for longer is a handler that catches `GeneratorExit` too, as
    a bare `except:` in a loop does, or that awaits a task of its own which ignores its cancellation:
    asyncio itself cannot end its loop then. The log names the task; only ending the process helps.

    Not thread-safe: everything happens on the loop's thread, *done* included.

    Attributes:
        loop: Where it runs, within the block. Kept: until Python 3.12, asking for it is a system call.
    """

    def __init__(
        self, handler: Handler, *, max_concurrency: int, queue_limit: int, grace: timedelta = STOP_GRACE
    ) -> None:
        if max_concurrency < 1:
            raise ConfigError(f"max_concurrency must be at least 1, not {max_concurrency}")
        if queue_limit < 0:
            raise ConfigError(f"queue_limit must be at least 0, not {queue_limit}")
        self._handler = handler
        self._max_concurrency = max_concurrency
        self._queue_limit = queue_limit
        self._grace = grace
        self._live: dict[Hashable, _Held] = {}  # no outcome yet
        self._waiting: dict[Hashable, _Held] = {}  # of these, the ones without a slot, oldest first
        self._running: set[_Held] = set()  # one for each slot that is taken, live or overdue
        # Not a TaskGroup, which costs a tenth of what is done here for a task: none of these raises.
        self._tasks: dict[asyncio.Task[None], _Held] = {}
        self._deadlines: Deadlines[_Held] = Deadlines()
        self._ticker: asyncio.TimerHandle | None = None  # while a task is live
        self._is_draining = False
        self._answered = asyncio.Event()  # while draining: no task is live
        self._vacated = asyncio.Event()  # while draining: no slot is taken

    async def __aenter__(self) -> Self:
        self.loop = asyncio.get_running_loop()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._is_draining = True
        self._withdraw_all()
        if self._ticker is not None:
            self._ticker.cancel()
        try:
            if self._running:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._grace.total_seconds()):
                        await self._vacated.wait()
        finally:
            for held in tuple(self._running):
                _abandon(held)
            if self._tasks:
                await asyncio.wait(self._tasks)

    @property
    def in_flight(self) -> int:
        """How many tasks have no outcome yet, running and waiting."""
        return len(self._live)

    @property
    def overdue(self) -> int:
        """How many slots are taken by handlers whose outcome was given without them."""
        return len(self._running) + len(self._waiting) - len(self._live)

    def submit(
        self,
        task_id: Hashable,
        name: str,
        payload: Payload,
        timeout: timedelta,
        done: Done,
        handler: Handler | None = None,
    ) -> None:
        """
        Take a task; never blocks.

        *done* gets the outcome exactly once, possibly before this returns, and must not raise. A task that
        is not begun gets OVERLOADED when there is no room or the executor drains, DEADLINE_EXCEEDED when
        *timeout* is not positive, and INVALID_ARGUMENT when a task of that id is still without an
        outcome; that other one goes on undisturbed.

        Args:
            task_id: The caller's own; or a tuple, of which logs show the last item.
            timeout: Counted from now, waiting included.
            handler: For this task, in place of the executor's.
        """
        held = _Held(task_id, name, payload, timeout, done, handler or self._handler)
        if (refusal := self._refusal(held)) is not None:
            _hand_over(held, refusal)
            return
        self._live[task_id] = held
        held.slot = self._deadlines.add(held, self.loop.time() + timeout.total_seconds())
        if self._ticker is None:
            self._ticker = self.loop.call_later(GRAIN_S, self._tick)
        if len(self._running) < self._max_concurrency:
            self._start(held)
        else:
            held.context = contextvars.copy_context()
            self._waiting[task_id] = held

    def cancel(self, task_id: Hashable) -> None:
        """
        Withdraw a task: its outcome is CANCELLED, given before this returns, and its handler is cancelled.

        Nothing happens when the task has its outcome already, or is unknown.
        """
        if (held := self._live.get(task_id)) is not None:
            self._withdraw(held, Failure(OutcomeCode.CANCELLED, "the caller withdrew the task"))

    async def drain(self, timeout: timedelta) -> None:
        """
        Take no new task, and return when every task held has its outcome.

        Tasks that wait still get their turn. What is left after *timeout* gets CANCELLED. Handlers that are
        `overdue` are not waited for; leaving the block ends them.
        """
        self._is_draining = True
        if self._live:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout.total_seconds()):
                    await self._answered.wait()
        self._withdraw_all()

    def _refusal(self, held: _Held) -> Failure | None:
        """Why the task is not taken; None when it is."""
        if held.task_id in self._live:
            return Failure(
                OutcomeCode.INVALID_ARGUMENT, f"a task with the id {held.task_id} is still at work"
            )
        if self._is_draining:
            message = "the agent is stopping and takes no new task; another agent may"
            return Failure(OutcomeCode.OVERLOADED, message, retry_after=RETRY_AFTER)
        if held.timeout <= timedelta(0):
            return Failure(
                OutcomeCode.DEADLINE_EXCEEDED, "the task came without any time left and was not begun"
            )
        if len(self._running) >= self._max_concurrency and len(self._waiting) >= self._queue_limit:
            message = (
                f"the agent works on {len(self._running)} tasks and {len(self._waiting)} wait, "
                "which is all it may have; try again later"
            )
            return Failure(OutcomeCode.OVERLOADED, message, retry_after=RETRY_AFTER)
        return None

    def _start(self, held: _Held) -> None:
        self._running.add(held)
        held.task = task = self.loop.create_task(self._run(held), context=held.context)
        self._tasks[task] = held
        task.add_done_callback(self._ended)

    async def _run(self, held: _Held) -> None:
        """Run the handler and report how it ended. Raises nothing."""
        try:
            held.work = held.handler(held.name, held.payload)
            outcome = await held.work
            if not isinstance(outcome, _OUTCOMES):  # a bug of ours, at the cost of one task
                raise TypeError(f"the handler gave {type(outcome).__name__} for an outcome")  # noqa: TRY301
        except BaseException as exc:
            # SystemExit and KeyboardInterrupt are the handler's failure like any other. A real Ctrl-C goes
            # elsewhere: asyncio's runner cancels its main task, and raises only at the second one, here if
            # a handler blocks the loop, which ends that handler and lets the cancellation go its way.
            if not held.is_reported:
                logger.exception("handler failed", extra=held.log_fields)
            elif held.work is not None and not isinstance(exc, asyncio.CancelledError):
                logger.warning("handler failed after its outcome", exc_info=True, extra=held.log_fields)
            outcome = failure_of(exc)
        self._release(held)  # first, so that whoever gets the outcome finds room for the next task
        self._report(held, outcome)

    def _ended(self, task: asyncio.Task[None]) -> None:
        held = self._tasks.pop(task)
        if held in self._running:  # cancelled before its first step, so that `_run` was never entered
            self._release(held)
            self._report(held, failure_of(asyncio.CancelledError()))  # not by us, or it has its outcome

    def _release(self, held: _Held) -> None:
        """Free the slot for the task that waits longest."""
        self._running.discard(held)
        if self._waiting:
            oldest = next(iter(self._waiting))
            self._start(self._waiting.pop(oldest))
        elif self._is_draining and not self._running:
            self._vacated.set()

    def _tick(self) -> None:
        """Look at the deadlines, for as long as there are any."""
        self._ticker = None
        for held in self._deadlines.expire(self.loop.time()):
            if not held.is_reported:  # by what the end of one before it led to; its id may be in use again
                self._expire(held)
        if self._live:
            self._ticker = self.loop.call_later(GRAIN_S, self._tick)

    def _expire(self, held: _Held) -> None:
        limit = f"{held.timeout.total_seconds():g} s"
        message = (
            f"no slot was free within {limit}; the task was not begun"
            if held.task is None
            else f"the handler did not end within {limit}"
        )
        self._withdraw(held, Failure(OutcomeCode.DEADLINE_EXCEEDED, message))

    def _withdraw_all(self) -> None:
        for held in tuple(self._live.values()):
            self._withdraw(held, Failure(OutcomeCode.CANCELLED, "the agent stopped before the task ended"))

    def _withdraw(self, held: _Held, failure: Failure) -> None:
        """Give the task *failure* for its outcome and see that its handler ends, or never begins."""
        self._waiting.pop(held.task_id, None)
        if held.task is not None:
            held.task.cancel()
        self._report(held, failure)

    def _report(self, held: _Held, outcome: Outcome) -> None:
        """Give the task its outcome, unless it has one."""
        if held.is_reported:
            return
        held.is_reported = True
        del self._live[held.task_id]
        self._deadlines.discard(held, held.slot)
        _hand_over(held, outcome)
        if self._is_draining and not self._live:
            self._answered.set()


def failure_of(exc: BaseException) -> Failure:
    """HANDLER_FAILED with the type's name and the text of *exc*, clipped and fit for UTF-8; no traceback."""
    try:
        text = str(exc)
    except Exception as again:  # noqa: BLE001 - `__str__` is the user's code as well
        text = f"the text cannot be shown, because __str__ raised {type(again).__name__}"
    return Failure(
        OutcomeCode.HANDLER_FAILED,
        _clip(text, MAX_MESSAGE_CHARS) or "the exception carries no text",
        error_type=_clip(type(exc).__name__, MAX_TYPE_CHARS),
    )


def _clip(text: str, limit: int) -> str:
    """At most *limit* characters. A lone surrogate becomes "?": it would make the whole frame unsendable."""
    return text[:limit].encode("utf-8", "replace").decode()


def _hand_over(held: _Held, outcome: Outcome) -> None:
    """Call back. An error there is the receiver's bug; it must not reach the other tasks."""
    try:
        held.done(held.task_id, outcome)
    except Exception:
        logger.exception("outcome could not be handed over", extra=held.log_fields)


def _abandon(held: _Held) -> None:
    """End a handler that ignored its cancellation, by closing the coroutine under the task that awaits it."""
    work, held.work = held.work, None
    if work is not None:
        try:
            work.close()
        except BaseException:
            logger.critical(
                "handler cannot be stopped; only ending the process helps",
                exc_info=True,
                extra=held.log_fields,
            )
        else:
            logger.warning("handler ignored its cancellation and was closed", extra=held.log_fields)
    if held.task is not None:
        held.task.cancel()  # wakes the task, which finds the coroutine closed
