"""How those who are told of changes are told, too, that nothing has changed."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

BEATS: Final = 3  # within the age that is allowed: one may be late, and one be lost with its connection
SHORTEST_S: Final = 3.0  # an age that anybody may ask for
USUAL_S: Final = 300.0


def beat_s(max_age_ms: int) -> float:
    """How often to tell who lets its knowledge become that old; 0 stands for no age."""
    return max(max_age_ms / 1000 or USUAL_S, SHORTEST_S) / BEATS


async def wait(changed: asyncio.Event, seconds: float) -> None:
    """Return when *changed* is set, or after *seconds*."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await changed.wait()
