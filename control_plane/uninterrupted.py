"""Changes that go on to their end when whoever asked for them has left."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

_T = TypeVar("_T")


class Uninterrupted:
    """
    Makes changes that are kept first and in force then.

    gRPC cancels the call of a caller who hangs up. Between the two, what is kept would not be in force
    until the next start.
    """

    def __init__(self) -> None:
        self._changing = set[asyncio.Task[Any]]()  # a task that nobody holds may vanish

    async def make(self, change: Coroutine[Any, Any, _T]) -> _T:
        """The outcome of *change*, which goes on to its end if nobody waits for it any more."""
        task = asyncio.create_task(change)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)
        return await asyncio.shield(task)
