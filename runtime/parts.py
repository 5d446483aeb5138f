"""Answers that are made bit by bit: no faster than they are read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Protocol

from parallax.runtime.outcome import Complete, Failure, Outcome, Payload, Value
from parallax.runtime.wire import encode_value

# Yields values; a failure is the last thing it yields. Closing it reaches the user's generator.
StreamHandler = Callable[[str, Payload], AsyncGenerator[Value | Failure, None]]


class Sender(Protocol):
    """Where parts go."""

    async def send(self, value: Value) -> None:
        """Send one part; waits until there is room for it."""


def cost_of(part: bytes) -> int:
    """What *part* takes of the credit: its bytes, or one without any, else there could be any number."""
    return len(part) or 1


class PartSender:
    """
    Sends the parts of one answer while there is credit for them.

    A part may begin whenever some credit is left, so that one larger than all of it can be
    sent at all; the next waits until the debt is paid.

    Args:
        credit: In bytes.
        send: Takes a serialized Value.
    """

    def __init__(self, credit: int, send: Callable[[bytes], None]) -> None:
        self._credit = credit
        self._send = send
        self._allowed = asyncio.Event()

    def allow(self, credit: int) -> None:
        """Make room for *credit* bytes more."""
        self._credit += credit
        self._allowed.set()

    async def send(self, value: Value) -> None:
        """Send one part; waits for credit."""
        while self._credit <= 0:
            self._allowed.clear()
            await self._allowed.wait()
        data = encode_value(value)
        self._credit -= cost_of(data)
        self._send(data)


async def answer_in_parts(handler: StreamHandler, sender: Sender, name: str, payload: Payload) -> Outcome:
    """Send what *handler* yields; how the answer ended."""
    sent = 0
    async with aclosing(handler(name, payload)) as values:
        async for value in values:
            if isinstance(value, Failure):
                return value
            await sender.send(value)
            sent += 1
    return Complete(sent)
