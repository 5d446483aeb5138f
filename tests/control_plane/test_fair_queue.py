"""Who is next, and who must leave, beside a model of lists."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from parallax.control_plane.fair_queue import FairQueue
from parallax.control_plane.order import Answer, Order, Target
from parallax.control_plane.registry import AgentRef


class Nobody:
    """A caller that nobody tells anything."""

    def __init__(self, key: str) -> None:
        self.key = key

    def ended(self, order: Order, answer: Answer) -> None:
        """Not here."""

    def may_ask(self, target: Target, ref: AgentRef) -> bool:
        return True

    def part(self, order: Order, value: bytes) -> None:
        """Not here."""


CALLERS = {key: Nobody(key) for key in "abc"}


def order(key: str, size: int = 1, number: int = 0) -> Order:
    return Order(AgentRef("x"), b"w" * size, 60, CALLERS[key], number)


class Model:
    """The same, as slowly as one likes: lines in the order of their turns."""

    def __init__(self, limit: int, max_bytes: int) -> None:
        self.limit, self.max_bytes = limit, max_bytes
        self.lines: list[tuple[str, list[Order]]] = []

    def orders(self) -> list[Order]:
        return [order for _, line in self.lines for order in line]

    def line(self, key: str) -> list[Order]:
        return next((line for k, line in self.lines if k == key), [])

    def fits(self, size: int) -> bool:
        held = self.orders()
        return len(held) < self.limit and sum(len(o.work) for o in held) + size <= self.max_bytes

    def put(self, order: Order) -> Order | None:
        key, leaver = order.caller.key, None
        if not self.fits(len(order.work)):
            longest = max((len(line) for _, line in self.lines), default=0)
            if longest <= len(self.line(key)) + 1:
                return order
            leaver = next(line for _, line in self.lines if len(line) == longest)[-1]
            freed = sum(len(o.work) for o in self.orders()) - len(leaver.work) + len(order.work)
            if freed > self.max_bytes:
                return order
            self.discard(leaver)
        if not self.line(key):
            self.lines.append((key, []))
        self.line(key).append(order)
        return leaver

    def pop(self) -> Order | None:
        if not self.lines:
            return None
        key, line = self.lines.pop(0)
        order = line.pop(0)
        if line:
            self.lines.append((key, line))
        return order

    def discard(self, order: Order) -> None:
        self.line(order.caller.key).remove(order)
        self.lines = [(key, line) for key, line in self.lines if line]


steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(0, 6)),
        st.tuples(st.just("pop"), st.just(""), st.just(0)),
        st.tuples(st.just("discard"), st.just(""), st.integers(0, 20)),
        st.tuples(st.just("clear"), st.just(""), st.just(0)),
    ),
    max_size=60,
)


@given(st.integers(0, 8), st.integers(0, 20), steps)
def test_does_what_the_model_does(limit: int, max_bytes: int, steps: list[tuple[str, str, int]]) -> None:
    queue, model = FairQueue(limit, max_bytes), Model(limit, max_bytes)
    for step, key, amount in steps:
        held = model.orders()
        match step:
            case "put":
                newcomer = order(key, amount)
                leaver = queue.put(newcomer)
                assert leaver is model.put(newcomer)
                if leaver is newcomer:
                    assert model.orders() == held, "nobody left for one that was refused"
            case "pop":
                assert queue.pop() is model.pop()
            case "discard":
                if held:
                    queue.discard(held[amount % len(held)])
                    model.discard(held[amount % len(held)])
            case "clear":
                assert queue.clear() == held
                model.lines.clear()
        assert len(queue) == len(model.orders()) <= limit
        assert queue._bytes == sum(len(o.work) for o in model.orders()) <= max_bytes
        assert [(k, list(line)) for k, line in queue._lines.items()] == model.lines
    while queue:
        assert queue.pop() is model.pop()
    assert queue.pop() is None
    assert queue._bytes == 0


@given(st.integers(2, 30), st.integers(1, 60), st.integers(1, 10))
def test_modest_caller_is_next_or_second_whatever_the_others_have_waiting(
    limit: int, greedy: int, modest: int
) -> None:
    queue = FairQueue(limit, 10**6)
    for number in range(greedy):
        queue.put(order("a", number=number))
    mine = [order("b", number=number) for number in range(modest)]
    kept = [o for o in mine if queue.put(o) is not o]
    assert len(kept) >= min(modest, limit // 2), "half of it is to be had"
    for before, own in enumerate(kept, start=1):
        popped = []
        while own not in popped:
            one = queue.pop()
            assert one is not None
            popped.append(one)
        assert len(popped) <= 2, f"turn {before}"


def test_newest_of_the_greediest_leaves() -> None:
    queue = FairQueue(3, 100)
    first, second, newest, other = order("a"), order("a"), order("a"), order("b")
    assert [queue.put(o) for o in (first, second, newest)] == [None] * 3
    assert queue.put(other) is newest
    assert [queue.pop() for _ in range(4)] == [first, other, second, None]


def test_one_that_would_not_fit_alone_makes_nobody_leave() -> None:
    queue = FairQueue(10, 10)
    for _ in range(5):
        queue.put(order("a", 2))
    huge = order("b", 11)
    assert queue.put(huge) is huge
    assert len(queue) == 5
