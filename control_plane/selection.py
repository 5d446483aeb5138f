"""Which of several agents gets the next task."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallax.control_plane.sessions import Instance


class LeastLoaded:
    """
    The instances of one capability, by how many more tasks they could work on at once.

    Moving one and finding the best cost the same however many there are: they lie in
    buckets by free slots, in each the one that was moved last at the end, so that equals
    take turns.
    """

    def __init__(self, queue_limit: int) -> None:
        self._queue_limit = queue_limit
        # Ordered: the first key of a plain dict that loses its first keys takes ever longer to find.
        self._free: OrderedDict[Instance, int] = OrderedDict()
        self._buckets: dict[int, OrderedDict[Instance, None]] = {}
        self._top = -queue_limit  # no bucket lies higher

    def __len__(self) -> int:
        return len(self._free)

    def put(self, instance: Instance) -> None:
        """Enter *instance*, or move it to where its load now belongs."""
        self.discard(instance)
        free = instance.free
        self._free[instance] = free
        self._buckets.setdefault(free, OrderedDict())[instance] = None
        self._top = max(self._top, free)

    def discard(self, instance: Instance) -> None:
        """Take *instance* out, if it is in."""
        free = self._free.pop(instance, None)
        if free is not None:
            bucket = self._buckets[free]
            del bucket[instance]
            if not bucket:
                del self._buckets[free]

    def best(self) -> tuple[int, Instance] | None:
        """Free slots and instance of the least loaded one; None if all have as much waiting as they may."""
        while self._top > -self._queue_limit:
            if self._top in self._buckets:
                return self._top, next(iter(self._buckets[self._top]))
            self._top -= 1  # paid for by the `put` that raised it
        return None

    def any(self) -> Instance:
        """One of them, when none is the best; not always the same."""
        instance = next(iter(self._free))
        self.put(instance)
        return instance
