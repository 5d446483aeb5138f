"""Work that ends when a certificate does, by the wall clock."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

RECHECK_S: Final = (
    60.0  # timers stand still while a machine sleeps, and clocks are set; certificates expire anyway
)


@asynccontextmanager
async def until_expiry(
    remaining: Callable[[], float | None], recheck_s: float = RECHECK_S
) -> AsyncIterator[asyncio.Timeout]:
    """
    Cancel the block once *remaining* is over, and raise TimeoutError in its place.

    Args:
        remaining: Seconds left by the wall clock, asked again at least every *recheck_s*; None for no end.
    """
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None
    async with asyncio.timeout(None) as ends:

        def look() -> None:
            nonlocal timer
            left = remaining()
            if left is None:
                return
            if left > recheck_s:
                timer = loop.call_later(recheck_s, look)
            else:
                ends.reschedule(loop.time() + max(0.0, left))

        look()
        try:
            yield ends
        finally:
            if timer is not None:
                timer.cancel()
