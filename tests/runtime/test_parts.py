"""Answers part by part: never ahead of the credit, and the generator always closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.outcome import Complete, Failure, OutcomeCode, Payload, Value
from parallax.runtime.parts import PartSender, answer_in_parts, cost_of
from parallax.runtime.wire import encode_value

Values = AsyncGenerator[Value | Failure, None]


def value(size: int) -> Value:
    return Value(Payload(b"x" * size, ""), 1.0)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Source:
    """A handler that yields what it is made of, and notes what became of it."""

    def __init__(self, *values: Value | Failure | Exception) -> None:
        self.values = values
        self.yielded = 0
        self.is_closed = False

    async def __call__(self, name: str, payload: Payload) -> Values:
        assert (name, payload) == ("task", Payload(b"in"))
        try:
            for one in self.values:
                if isinstance(one, Exception):
                    raise one
                self.yielded += 1
                yield one
        finally:
            self.is_closed = True


async def test_all_are_sent_in_order_and_counted() -> None:
    sent: list[bytes] = []
    source = Source(value(1), value(0), value(3))
    outcome = await answer_in_parts(source, PartSender(1000, sent.append), "task", Payload(b"in"))
    assert outcome == Complete(3)
    assert sent == [encode_value(value(size)) for size in (1, 0, 3)]
    assert source.is_closed


async def test_of_nothing_are_none() -> None:
    sent: list[bytes] = []
    assert await answer_in_parts(Source(), PartSender(1, sent.append), "task", Payload(b"in")) == Complete(0)
    assert sent == []


async def test_failure_is_the_last_word() -> None:
    sent: list[bytes] = []
    failure = Failure(OutcomeCode.HANDLER_FAILED, "no")
    source = Source(value(1), failure, value(2))
    assert await answer_in_parts(source, PartSender(1000, sent.append), "task", Payload(b"in")) == failure
    assert len(sent) == 1
    assert source.is_closed
    assert source.yielded == 2


async def test_exception_goes_on_to_the_executor() -> None:
    source = Source(value(1), LookupError("gone"))
    with pytest.raises(LookupError):
        await answer_in_parts(source, PartSender(1000, lambda _: None), "task", Payload(b"in"))
    assert source.is_closed


async def test_generator_stands_still_without_credit_and_goes_on_with_it() -> None:
    sent: list[bytes] = []
    source = Source(*[value(10)] * 5)
    size = len(encode_value(value(10)))
    sender = PartSender(1, sent.append)
    work = asyncio.create_task(answer_in_parts(source, sender, "task", Payload(b"in")))
    await settle()
    assert (len(sent), source.yielded) == (1, 2), "one may go beyond the credit, no more"
    sender.allow(size - 1)
    await settle()
    assert len(sent) == 1, "the debt is paid, and nothing is left"
    sender.allow(1)
    await settle()
    assert len(sent) == 2
    sender.allow(0)
    await settle()
    assert len(sent) == 2
    sender.allow(2**64 - 1)
    assert await work == Complete(5)


async def test_cancellation_while_it_waits_closes_the_generator() -> None:
    source = Source(*[value(10)] * 5)
    work = asyncio.create_task(answer_in_parts(source, PartSender(1, lambda _: None), "task", Payload(b"in")))
    await settle()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert source.is_closed


@given(
    st.integers(0, 50), st.lists(st.integers(0, 30), max_size=15), st.lists(st.integers(0, 60), max_size=15)
)
def test_sent_is_what_a_model_would_send(first: int, sizes: list[int], credits_: list[int]) -> None:
    async def run() -> None:
        sent: list[bytes] = []
        sender = PartSender(first, sent.append)
        values = [value(size) for size in sizes]
        work = asyncio.create_task(answer_in_parts(Source(*values), sender, "task", Payload(b"in")))
        left = first
        expected = 0
        for credit in [0, *credits_]:
            left += credit
            sender.allow(credit)
            await settle()
            while left > 0 and expected < len(values):
                left -= cost_of(encode_value(values[expected]))
                expected += 1
                await settle()
            await settle()
            assert len(sent) == expected
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)

    asyncio.run(run())


def test_part_without_content_has_a_cost() -> None:
    assert cost_of(b"") == 1
    assert cost_of(b"x") == 1
    assert cost_of(b"xyz") == 3
