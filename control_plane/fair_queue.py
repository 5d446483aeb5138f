"""Orders that wait for one agent, in an order that is fair to those who placed them."""

from __future__ import annotations

from collections import OrderedDict

from parallax.control_plane.order import Order


class FairQueue:
    """
    A bounded queue that callers take turns in, however many orders each of them has.

    When it is full, an order of a caller who has fewer in it than another takes the place
    of that other one's newest: nobody fills the queue for everybody.

    Args:
        limit: Orders at most.
        max_bytes: Of work in them, at most.
    """

    def __init__(self, limit: int, max_bytes: int) -> None:
        self._limit = limit
        self._max_bytes = max_bytes
        self._lines: OrderedDict[str, OrderedDict[Order, None]] = (
            OrderedDict()
        )  # whose turn is next comes first
        self._count = 0
        self._bytes = 0

    def __len__(self) -> int:
        return self._count

    def put(self, order: Order) -> Order | None:
        """Queue *order*; who must leave for it, which is *order* itself if it has no claim, or None."""
        leaver: Order | None = None
        if self._count >= self._limit or self._bytes + len(order.work) > self._max_bytes:
            greediest = max(self._lines, key=lambda key: len(self._lines[key]), default=None)
            own = len(self._lines.get(order.caller.key, ()))
            if greediest is None or len(self._lines[greediest]) <= own + 1:
                return order
            leaver = next(reversed(self._lines[greediest]))
            if self._bytes - len(leaver.work) + len(order.work) > self._max_bytes:
                return order
            self.discard(leaver)
        self._lines.setdefault(order.caller.key, OrderedDict())[order] = None
        self._count += 1
        self._bytes += len(order.work)
        return leaver

    def pop(self) -> Order | None:
        """Take out the oldest order of the caller whose turn it is."""
        if not self._count:
            return None
        key, line = next(iter(self._lines.items()))
        order = next(iter(line))
        self.discard(order)
        if line:
            self._lines.move_to_end(key)
        return order

    def discard(self, order: Order) -> None:
        """Take out *order*, which is in it."""
        line = self._lines[order.caller.key]
        del line[order]
        if not line:
            del self._lines[order.caller.key]
        self._count -= 1
        self._bytes -= len(order.work)

    def clear(self) -> list[Order]:
        """Take out all, those of each caller in order."""
        orders = [order for line in self._lines.values() for order in line]
        self._lines.clear()
        self._count = self._bytes = 0
        return orders
