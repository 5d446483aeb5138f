"""When to look at files again: told of a change, or after a while anyway."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from parallax.security.watcher import Watcher

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable
    from datetime import timedelta
    from pathlib import Path

_QUIET_S: Final = (
    0.05  # a pair written by hand is two events close together; a swap is seven within a millisecond
)
_SETTLE_S: Final = 0.2  # who writes without a pause does not put it off for longer


class Lookout:
    """
    Has *paths* looked at: once, then whenever something on the way to them changes and writing pauses.

    Args:
        poll: How often to look without being told of a change.
    """

    def __init__(self, paths: Iterable[Path], poll: timedelta) -> None:
        self._paths = tuple(paths)
        self._poll_s = poll.total_seconds()
        self._woken = asyncio.Event()
        self._watcher: Watcher | None = None

    @property
    def restarts(self) -> int:
        """How often the observer of the files had to be started again."""
        return self._watcher.restarts if self._watcher is not None else 0

    def wake(self) -> None:
        """Look again soon."""
        self._woken.set()

    async def run(self, look: Callable[[], Awaitable[None]]) -> None:
        """Have *look* look until cancelled; its owner's task, once."""
        loop = asyncio.get_running_loop()

        def told() -> None:
            if self._woken.is_set():  # not seen yet; a swap is told of six times
                return
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self.wake)

        self._watcher = watcher = Watcher(self._paths, told)
        try:
            while True:
                self._woken.clear()
                # First watch, then look: what changes in between is told, and looked at again.
                await asyncio.to_thread(watcher.arrange)
                await look()
                await self._next_change()
        finally:
            await asyncio.to_thread(watcher.close)

    async def _next_change(self) -> None:
        """Wait to be woken, or until it is time to look anyway; then until writing pauses."""
        try:
            async with asyncio.timeout(self._poll_s):
                await self._woken.wait()
        except TimeoutError:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_SETTLE_S):
                while self._woken.is_set():
                    self._woken.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(_QUIET_S):
                            await self._woken.wait()
