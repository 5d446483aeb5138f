"""The embedded engine: one SQLite file, one thread, and commits that share an fsync."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, ParamSpec, Self, TypeVar

from parallax.control_plane.engines.engine import (
    MAX_PAGE,
    Event,
    Onward,
    Record,
    Write,
    check_key,
    check_prefix,
    check_writes,
)
from parallax.control_plane.engines.sqlite_file import HISTORY, Result, SqliteFile
from parallax.security.errors import Conflict, Fault, StorageFailed

logger = logging.getLogger(__name__)

MAX_WAITING: Final = 10_000  # commits that wait for the disk; one more is refused at once
MAX_GROUP: Final = 1_000  # commits in one transaction: some 30 ms of work beside the fsync

_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class _Commit:
    event: Event
    writes: Sequence[Write]
    done: asyncio.Future[tuple[int, ...]]


class SqliteEngine:
    """
    An `Engine` in a directory of its own, for as long as the block; of one event loop.

    While one transaction is being written, commits gather, and all of them go into the next: the
    busier it is, the more of them share an fsync, and nobody waits for a timer.

    Args:
        directory: Made if need be, for this user alone.
        history: Revisions for which events and removals are kept.

    Attributes:
        fault: What keeps it from recording anything; None while nothing is known to.
    """

    def __init__(self, directory: Path, *, history: int = HISTORY) -> None:
        self._directory = directory
        self._history = history
        self._waiting: deque[_Commit] = deque()
        self._advanced = asyncio.Event()  # replaced by a new one with every change
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_open = False
        self.fault: Fault | None = None

    async def __aenter__(self) -> Self:
        """Open it; raises ConfigError."""
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "parallax-engine")
        try:
            self._file = await self._on_thread(SqliteFile, self._directory, self._history)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Finish what waits, then close."""
        self._is_open = False
        self._advanced.set()
        await self._idle.wait()
        try:
            await self._on_thread(self._file.close)
        finally:
            self._thread.shutdown(wait=False)

    async def commit(self, event: Event, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        """As `Engine.commit`."""
        check_writes(writes)
        self._check_open()
        if len(self._waiting) >= MAX_WAITING:
            raise StorageFailed(f"{MAX_WAITING} commits wait for the disk already: try again", Fault.BUSY)
        commit = _Commit(event, tuple(writes), self._loop.create_future())
        self._waiting.append(commit)
        if self._idle.is_set():
            self._write()
        return await commit.done

    async def get(self, key: str) -> Record | None:
        """As `Engine.get`."""
        return await self._read(self._file.get, check_key(key))

    async def get_many(self, keys: Sequence[str]) -> list[Record]:
        """As `Engine.get_many`."""
        if len(keys) > MAX_PAGE:
            raise ValueError(f"{len(keys)} keys at once: {MAX_PAGE} at most")
        return await self._read(self._file.get_many, list(map(check_key, keys)))

    async def scan(
        self, prefix: str, after: str = "", limit: int = MAX_PAGE, onward: Onward | None = None
    ) -> list[Record]:
        """As `Engine.scan`."""
        return await self._read(self._file.scan, check_prefix(prefix), after, min(limit, MAX_PAGE), onward)

    async def revision(self) -> int:
        """As `Engine.revision`."""
        return await self._read(self._file.revision)

    async def watch(self, prefix: str, since: int) -> AsyncGenerator[Record]:
        """As `Engine.watch`; it ends when the engine is closed."""
        check_prefix(prefix)
        while self._is_open:
            advanced = self._advanced  # taken before looking, so that nothing comes unnoticed in between
            records, told = await self._read(self._file.changes, prefix, since, MAX_PAGE)
            for record in records:
                yield record
            since = told
            if len(records) < MAX_PAGE:
                await advanced.wait()

    def _write(self) -> None:
        """Hand over to the thread what waits."""
        group = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_GROUP))]
        group = [commit for commit in group if not commit.done.done()]  # nobody waits for a cancelled one
        self._idle.clear()
        writing = self._loop.run_in_executor(
            self._thread, self._file.write, [(commit.event, commit.writes) for commit in group]
        )
        writing.add_done_callback(lambda done: self._written(group, done))

    def _written(self, group: Sequence[_Commit], writing: asyncio.Future[list[Result]]) -> None:
        """Tell those who wait for *group*, then go on with what has gathered meanwhile."""
        failure = writing.exception()
        self._note(failure if isinstance(failure, StorageFailed) else None)
        for number, commit in enumerate(group):
            if commit.done.done():
                continue
            if failure is not None:
                commit.done.set_exception(_copy(failure))
                continue
            result = writing.result()[number]
            if isinstance(result, Conflict):
                commit.done.set_exception(result)
            else:
                commit.done.set_result(result)
        advanced, self._advanced = self._advanced, asyncio.Event()
        advanced.set()
        if self._waiting:
            self._write()
        else:
            self._idle.set()

    def _note(self, failure: StorageFailed | None) -> None:
        """Log what has become of the medium, once for each state."""
        fault = failure.fault if failure is not None else None
        if fault is not self.fault and fault is not None:
            logger.error("nothing is recorded", extra={"fault": fault.value, "cause": str(failure)})
        elif fault is not self.fault:
            logger.info("recording again")
        self.fault = fault

    def _check_open(self) -> None:
        if not self._is_open:
            raise StorageFailed("the process is stopping: nothing is recorded any more")

    async def _read(self, function: Callable[_P, _T], *arguments: _P.args, **keywords: _P.kwargs) -> _T:
        self._check_open()
        try:
            return await self._on_thread(function, *arguments, **keywords)
        except StorageFailed as exc:
            self._note(exc)  # that a read succeeds says nothing of writes
            raise

    async def _on_thread(self, function: Callable[_P, _T], *arguments: _P.args, **keywords: _P.kwargs) -> _T:
        return await self._loop.run_in_executor(self._thread, lambda: function(*arguments, **keywords))


def _copy(failure: BaseException) -> BaseException:
    """*failure* for one of several who get it: a traceback of its own, and no other's caller in it."""
    if isinstance(failure, StorageFailed):
        return StorageFailed(str(failure), failure.fault)
    return failure
