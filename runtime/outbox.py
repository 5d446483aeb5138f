"""What waits to be written to one stream."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from itertools import count
from typing import Final, Generic, TypeVar

T = TypeVar("T")

MAX_FRAME_BYTES: Final = 1024 * 1024  # a frame holds this much, or one item
MAX_FRAME_ITEMS: Final = 4_096  # more would hold up the receiver's loop, however small each is


class Outbox(Generic[T]):
    """
    A queue that gives whatever is waiting at once: natural batching.

    A writer that takes again as soon as its last write returned sends single items
    when idle and large frames when busy, without any timer. It has no bound of its
    own: those who put bound what they have in flight.
    """

    def __init__(self) -> None:
        self._waiting: OrderedDict[int, tuple[T, int]] = OrderedDict()  # by ticket, oldest first
        self._tickets = count()
        self._filled = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, item: T, size: int) -> int:
        """Queue *item*, of *size* bytes on the wire; its ticket. After `close` it is dropped."""
        ticket = next(self._tickets)
        if not self._closed:
            self._waiting[ticket] = item, size
            self._filled.set()
        return ticket

    def withdraw(self, ticket: int) -> bool:
        """Take back what has not been taken yet; whether it was still there."""
        return self._waiting.pop(ticket, None) is not None

    def close(self) -> None:
        """Let `take` give what is left, then nothing."""
        self._closed = True
        self._filled.set()

    async def take(self, max_bytes: int = MAX_FRAME_BYTES) -> list[T]:
        """
        Wait for something to write, and take as much as a frame and *max_bytes* hold, at least one item.

        An empty list means that the outbox is closed and empty.
        """
        while not self._waiting and not self._closed:
            self._filled.clear()
            await self._filled.wait()
        taken: list[T] = []
        room = max_bytes
        while self._waiting and len(taken) < MAX_FRAME_ITEMS:
            item, size = next(iter(self._waiting.values()))
            if taken and size > room:
                break
            self._waiting.popitem(last=False)
            taken.append(item)
            room -= size
        return taken
