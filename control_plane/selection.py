"""Which of several agents gets the next task."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from parallax.control_plane.sessions import Instance


def _all(_: Instance) -> bool:
    return True


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

    def best(self, fits: Callable[[Instance], bool] = _all) -> tuple[int, Instance] | None:
        """
        Free slots and instance of the least loaded one; None if all have as much waiting as they may.

        Args:
            fits: Whether it may be chosen; each that may not, and is less loaded, costs a question.
        """
        while self._top > -self._queue_limit and self._top not in self._buckets:
            self._top -= 1  # paid for by the `put` that raised it
        for free in range(self._top, -self._queue_limit, -1):
            for instance in self._buckets.get(free, ()):
                if fits(instance):
                    return free, instance
        return None

    def any(self, fits: Callable[[Instance], bool] = _all) -> Instance | None:
        """One of them, when none is the best; not always the same. None if none *fits*."""
        instance = next(filter(fits, self._free), None)
        if instance is not None:
            self.put(instance)
        return instance
