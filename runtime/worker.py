"""An agent's end of a link: tasks become work of its executor, outcomes go back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from parallax.protos import link_pb2
from parallax.runtime.executor import Executor, Handler
from parallax.runtime.link import MAX_BACKLOG_BYTES, Link, Receiver
from parallax.runtime.outcome import (
    Complete,
    Failure,
    Outcome,
    OutcomeCode,
    Value,
    check_task_name,
    too_large,
)
from parallax.runtime.parts import PartSender, StreamHandler, answer_in_parts
from parallax.runtime.wire import decode_work, duration, encode_value
from parallax.security.errors import InvalidRequest, Unavailable


@dataclass(frozen=True, slots=True)
class Bench:
    """Where an agent's tasks are done, whichever way they come."""

    executor: Executor
    stream_handler: StreamHandler | None = None  # where the agent answers in parts, too


class Worker(Receiver):
    """
    Does the tasks that come by a link, or by several with the same other end.

    An outcome goes to the link that its task came by; where that is closed, to `link`.

    Attributes:
        link: That counts, where there are several; may be exchanged for another one.
        max_payload_bytes: That the other end takes; 0 while unknown.
        refusal: What every new task is answered with; None while they are begun.
    """

    link: Link

    def __init__(self, bench: Bench) -> None:
        self.max_payload_bytes = 0
        self.refusal: Failure | None = None
        self._bench = bench
        self._senders: dict[int, PartSender] = {}  # of the tasks that are answered in parts
        self._held: dict[int, Link] = {}  # and the link it came by

    @property
    def is_busy(self) -> bool:
        """See `Receiver.is_busy`: the one that was answered just now does not count."""
        return len(self._held) > 0

    @property
    def held(self) -> list[int]:
        """The tasks that have no outcome yet."""
        return list(self._held)

    def on_tasks(self, tasks: Iterable[link_pb2.Task]) -> None:
        """Begin them, or refuse them one by one."""
        self.begin(tasks, self.link)

    def begin(self, tasks: Iterable[link_pb2.Task], link: Link) -> None:
        """Begin what has come by *link*, or refuse it one by one."""
        if link.backlog_bytes > 2 * MAX_BACKLOG_BYTES:  # even of refusals
            raise Unavailable(f"{link.backlog_bytes:,} bytes of answers wait to be read; the link ends")
        submit = self._bench.executor.submit
        for task in tasks:
            number = task.id
            if number in self._held:
                raise InvalidRequest(f"task {number} is still open on this link; number tasks anew")
            if self.refusal is not None:
                link.answer(number, self.refusal)
                continue
            try:
                name, payload = decode_work(task.work)
                check_task_name(name)
            except InvalidRequest as exc:
                link.answer(number, Failure(OutcomeCode.INVALID_ARGUMENT, str(exc)))
                continue
            self._held[number] = link
            handler = self._in_parts(number, task.part_credit) if task.part_credit else None
            submit((self, number), name, payload, duration(task.timeout_ms), self._done, handler)

    def on_cancellations(self, task_ids: Iterable[int]) -> None:
        """Stop working on them."""
        for number in task_ids:
            self._bench.executor.cancel((self, number))

    def on_credits(self, allowances: Iterable[link_pb2.Credit]) -> None:
        """Let parts go on."""
        for credit in allowances:
            if (sender := self._senders.get(credit.task_id)) is not None:
                sender.allow(credit.bytes)

    def withdraw_all(self) -> None:
        """Nobody waits for any answer any more."""
        for number in self.held:
            self._bench.executor.cancel((self, number))

    def withdraw_streams(self, link: Link) -> list[int]:
        """Stop what is answered in parts on *link*, and say nothing more of it; the tasks."""
        numbers = self.in_parts(link)
        for number in numbers:
            del self._held[number], self._senders[number]
            self._bench.executor.cancel((self, number))
        return numbers

    def in_parts(self, link: Link) -> list[int]:
        """The tasks that are answered in parts on *link*."""
        return [number for number in self._senders if self._held[number] is link]

    def _in_parts(self, number: int, credit: int) -> Handler | None:
        if self._bench.stream_handler is None:
            return None  # then the whole answer is its only part
        sender = PartSender(credit, partial(self._send_part, number))
        self._senders[number] = sender
        return partial(answer_in_parts, self._bench.stream_handler, sender)

    def _send_part(self, number: int, value: bytes) -> None:
        if (link := self._held.get(number)) is not None:  # else its handler does not know yet
            link.send_part(number, value)

    def _done(self, key: tuple[Worker, int], outcome: Outcome) -> None:
        number: int = key[1]
        link = self._held.pop(number, None)
        if link is None:
            return  # what is said of it was said when it was withdrawn
        if self._senders:
            self._senders.pop(number, None)
        (self.link if link.is_closed else link).answer(number, self._answer(outcome))

    def _answer(self, outcome: Outcome) -> bytes | Failure | Complete:
        if not isinstance(outcome, Value):
            return outcome
        limit = self.max_payload_bytes
        if limit and len(outcome.payload.data) > limit:
            text = too_large("the payload", len(outcome.payload.data), limit)
            return Failure(OutcomeCode.INVALID_RESULT, text)
        try:
            return encode_value(outcome)
        except (TypeError, ValueError) as exc:  # else nobody would ever hear of it
            return Failure(OutcomeCode.INVALID_RESULT, f"the answer cannot be sent: {exc}")
