"""Deadlines of many things at once, each for the price of two set operations."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush
from itertools import chain
from typing import Final, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

MANY_SLOTS: Final = 4096  # some seconds of a busy dispatcher
# How wide a slot is: a deadline is noticed so much late at most, and a look more. Exact in binary.
GRAIN_S: Final = 1 / 16


class Deadlines(Generic[T]):
    """
    Which things end when, kept in slots of `GRAIN_S`.

    A timer per task costs more than all else that the control plane does for it; nearly
    all are taken back before they fire. Here one timer serves a slot, and the slots that
    exist are as many as the time they span, not as the things in them.

    Args:
        many: From how many slots on it is worth looking for empty ones.
    """

    def __init__(self, grain_s: float = GRAIN_S, many: int = MANY_SLOTS) -> None:
        self._grain_s = grain_s
        self._least = many
        self._slots: dict[int, set[T]] = {}
        self._order: list[int] = []  # a heap of the slots' numbers
        self._many = many

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def __iter__(self) -> Iterator[T]:
        """All things, in no order; none may be added or discarded meanwhile."""
        return chain.from_iterable(self._slots.values())

    def add(self, thing: T, at: float) -> int:
        """Note that *thing* ends at *at*, in seconds of a monotonic clock; what `discard` wants back."""
        slot = int(at / self._grain_s) + 1
        things = self._slots.get(slot)
        if things is None:
            things = self._slots[slot] = set()
            heappush(self._order, slot)
        things.add(thing)
        return slot

    def discard(self, thing: T, slot: int) -> None:
        """Forget *thing*, which `add` put into *slot*."""
        things = self._slots.get(slot)
        if things is not None:
            things.discard(thing)

    def expire(self, now: float) -> list[T]:
        """Take out everything whose time is over."""
        expired: list[T] = []
        current = int(now / self._grain_s)
        while self._order and self._order[0] <= current:
            expired.extend(self._slots.pop(heappop(self._order)))
        if len(self._slots) > self._many:
            self._tidy()
        return expired

    def _tidy(self) -> None:
        """Let go of empty slots: things of a day to come, all taken back, would leave a million for a day."""
        self._slots = {slot: things for slot, things in self._slots.items() if things}
        self._order = list(self._slots)
        heapify(self._order)
        self._many = max(self._least, 2 * len(self._slots))
