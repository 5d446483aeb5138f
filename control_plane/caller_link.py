"""A client's end of a link, as the control plane hears it: tasks in, outcomes out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Final

from parallax.control_plane.authorization import Grant
from parallax.control_plane.dispatch import Dispatcher
from parallax.control_plane.order import Answer, Order, parse_target
from parallax.protos import link_pb2
from parallax.runtime import wire
from parallax.runtime.link import MAX_BACKLOG_BYTES, End, Link, Receiver, Said
from parallax.runtime.outcome import MAX_TASK_NAME_BYTES, Failure, OutcomeCode, too_large
from parallax.runtime.protocol import Speaks, negotiate
from parallax.security.errors import InvalidRequest, NotAuthorized, ParallaxError, Unavailable

MAX_OPEN_TASKS: Final = 8_192  # on one link; whoever needs more opens another
WORK_OVERHEAD_BYTES: Final = (
    MAX_TASK_NAME_BYTES + 1024
)  # the name, a content type of at most 256, and framing
LONGEST_S: Final = wire.LONGEST.total_seconds()
RETRY: Final = timedelta(milliseconds=200)


class CallerLink(Receiver):
    """
    Turns the tasks on a client's link into orders, and how they end into outcomes.

    What is wrong with one task fails that task; only what breaks the protocol ends the link.

    Args:
        grant: Who asks, and whom it may.
        on_refusal: Told of each task that was for somebody else.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        grant: Grant,
        max_payload_bytes: int,
        on_refusal: Callable[[NotAuthorized], None] = lambda _: None,
    ) -> None:
        self.link = Link(End.WORKER, Said.HELLO, self)
        self.key = grant.key
        self.may_ask = grant.covers
        self._grant = grant
        self._on_refusal = on_refusal
        self._dispatcher = dispatcher
        self._max_payload_bytes = max_payload_bytes
        self._open: dict[int, Order] = {}
        self._lapsed: ParallaxError | None = None

    @property
    def is_busy(self) -> bool:
        """See `Receiver.is_busy`: the one that was answered just now does not count."""
        return len(self._open) > 0

    def over(self) -> None:
        """Nobody listens any more: withdraw what is open."""
        orders = list(self._open.values())
        self._open.clear()
        self._withdraw(orders)

    def lapse(self, why: ParallaxError) -> None:
        """The client's certificate is no longer good: nothing new is taken, and what is open is the last."""
        self._lapsed = why
        if self._open:
            self.link.drain()
        self._end_if_lapsed()

    # What the client says.

    def on_greeting(self, frame: link_pb2.LinkFrame) -> None:
        """Agree on a protocol."""
        hello = frame.hello
        agreed = negotiate(Speaks(hello.min_protocol_version, hello.protocol_version, hello.capability_bits))
        welcome = link_pb2.Welcome(
            protocol_version=agreed.version,
            capability_bits=agreed.capability_bits,
            max_payload_bytes=self._max_payload_bytes,
            max_open_tasks=MAX_OPEN_TASKS,
        )
        self.link.greet(link_pb2.LinkFrame(welcome=welcome))

    def on_tasks(self, tasks: Iterable[link_pb2.Task]) -> None:
        """Work to begin."""
        if self.link.backlog_bytes > 2 * MAX_BACKLOG_BYTES:
            # Values are dropped by now, and the refusals alone fill as much again.
            raise Unavailable(f"{self.link.backlog_bytes:,} bytes of answers wait to be read; the link ends")
        for task in tasks:
            number = task.id
            if number in self._open:
                raise InvalidRequest(f"task {number} is still open on this link; number tasks anew")
            if self._lapsed is not None:
                self.link.answer(number, _refusal(self._lapsed))
                continue
            if len(self._open) >= MAX_OPEN_TASKS:
                self.link.answer(number, _TOO_MANY)
                continue
            if self.link.backlog_bytes > MAX_BACKLOG_BYTES:
                self.link.answer(number, _not_read(self.link.backlog_bytes))
                continue
            try:
                order = self._order(task, number)
                self._open[number] = order
                self._dispatcher.submit(order)
            except ParallaxError as exc:
                self._open.pop(number, None)
                if isinstance(exc, NotAuthorized):
                    self._on_refusal(exc)
                self.link.answer(number, _refusal(exc))

    def on_cancellations(self, task_ids: Iterable[int]) -> None:
        """Nobody waits for these any more."""
        orders = (self._open.pop(number, None) for number in task_ids)
        self._withdraw([order for order in orders if order is not None])
        self._end_if_lapsed()

    def on_credits(self, allowances: Iterable[link_pb2.Credit]) -> None:
        """Room for parts."""
        for credit in allowances:
            order = self._open.get(credit.task_id)
            if order is not None:
                self._dispatcher.allow(order, credit.bytes)

    def _end_if_lapsed(self) -> None:
        if self._lapsed is not None and not self._open:
            self.link.fail(self._lapsed)

    def _withdraw(self, orders: list[Order]) -> None:
        # What an agent has comes last: the room it leaves is not for others of these.
        for order in sorted(orders, key=lambda order: order.place.value):
            self._dispatcher.withdraw(order)

    def _order(self, task: link_pb2.Task, number: int) -> Order:
        work = task.work
        if len(work) > self._max_payload_bytes + WORK_OVERHEAD_BYTES:
            raise InvalidRequest(too_large("the task", len(work), self._max_payload_bytes))
        target = parse_target(task.target)
        self._grant.check(target)
        return Order(
            target,
            work,
            min(task.timeout_ms / 1000, LONGEST_S),
            self,
            number,
            min(task.wait_for_agent_ms / 1000, LONGEST_S),
            task.idempotent,
            task.allow_unverified,
            task.part_credit,
        )

    # What the dispatcher says.

    def ended(self, order: Order, answer: Answer) -> None:
        """Pass on how a task ended."""
        if self._open.pop(order.number, None) is None:
            return
        if self.link.backlog_bytes > MAX_BACKLOG_BYTES and isinstance(answer, bytes):
            answer = _not_read(self.link.backlog_bytes)
        self.link.answer(order.number, answer, order.agent_id, order.attempts)
        self._end_if_lapsed()

    def part(self, order: Order, value: bytes) -> None:
        """Pass on a piece of an answer."""
        if self.link.backlog_bytes > MAX_BACKLOG_BYTES:
            self._dispatcher.withdraw(order, _not_read(self.link.backlog_bytes))
        else:
            self.link.send_part(order.number, value, order.agent_id)


_TOO_MANY: Final = Failure(
    OutcomeCode.OVERLOADED,
    f"{MAX_OPEN_TASKS:,} tasks are open on this link, which is all there may be",
    retry_after=RETRY,
)


def _refusal(exc: ParallaxError) -> Failure:
    """*exc* as a failure that names its class, so that the client can raise it again."""
    kind = type(exc).__name__
    if isinstance(exc, Unavailable):
        return Failure(OutcomeCode.OVERLOADED, str(exc), kind, exc.retry_after)
    return Failure(OutcomeCode.INVALID_ARGUMENT, str(exc), kind)


def _not_read(waiting: int) -> Failure:
    return Failure(
        OutcomeCode.OVERLOADED,
        f"the answer was dropped: {waiting:,} bytes of others wait to be read; read faster, or ask for less",
        retry_after=RETRY,
    )
