"""One order, awaited: for calls that carry a single task."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from parallax.control_plane.authorization import Grant
from parallax.control_plane.dispatch import SHUTTING_DOWN, Dispatcher
from parallax.control_plane.order import Answer, Order
from parallax.control_plane.registry import AgentRef
from parallax.runtime.outcome import Complete, Failure, Outcome, OutcomeCode
from parallax.runtime.wire import decode_value
from parallax.security.errors import InvalidRequest, Unavailable


@dataclass(frozen=True, slots=True)
class Result:
    """How an order ended: *agent* had it last, None if nobody had; *attempts* agents were given it."""

    outcome: Outcome
    agent: AgentRef | None = None
    attempts: int = 0


class Waiter:
    """
    A caller that awaits its one order.

    Args:
        grant: Whom it may ask.
    """

    def __init__(self, grant: Grant) -> None:
        self.key = grant.key
        self.check, self.may_ask = grant.check, grant.covers
        self._answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()

    async def execute(self, order: Order, dispatcher: Dispatcher) -> Result:
        """
        Run *order*, whose caller this is; failures of the task are outcomes, not exceptions.

        Raises:
            Unavailable: The control plane drains.
        """
        dispatcher.submit(order)
        try:
            answer = await self._answer
        except asyncio.CancelledError:
            dispatcher.withdraw(order)
            raise
        if answer is SHUTTING_DOWN:
            raise Unavailable(SHUTTING_DOWN.message)
        return Result(_outcome_of(answer), order.agent, order.attempts)

    def ended(self, order: Order, answer: Answer) -> None:  # noqa: ARG002 - there is one
        """Wake up."""
        if not self._answer.done():
            self._answer.set_result(answer)

    def part(self, order: Order, value: bytes) -> None:
        """Nobody asked for parts, and an order without credit gets none."""


def _outcome_of(answer: Answer) -> Outcome:
    """*answer*, read; an agent that gave something unreadable has failed."""
    if isinstance(answer, Complete):
        return Failure(OutcomeCode.INVALID_RESULT, "the answer came in parts, which nobody asked for")
    if not isinstance(answer, bytes):
        return answer
    try:
        return decode_value(answer)
    except InvalidRequest as exc:
        return Failure(OutcomeCode.INVALID_RESULT, str(exc))
