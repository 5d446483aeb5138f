"""Loops that run together: none goes on without the others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager

Loop = Callable[[], Coroutine[None, None, None]]
"""Runs until it is cancelled."""


@asynccontextmanager
async def supervised(*loops: Loop) -> AsyncIterator[None]:
    """Run *loops* for as long as the block; if one fails, the block fails with it."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(loop()) for loop in loops]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
