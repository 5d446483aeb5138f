"""A user's `analyze` as the handler that the runtime calls: payload in, outcome out."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

from parallax.runtime.executor import Handler
from parallax.runtime.outcome import MAX_PAYLOAD_BYTES, Failure, Outcome, OutcomeCode, Payload, check_payload
from parallax.runtime.threads import Threads
from parallax.sdk.payload import check_result, decode
from parallax.security.errors import InvalidRequest

# Any: the user says in `analyze` what it takes. It returns a tuple, or a coroutine of one.
Analyze = Callable[[str, Any], object]

logger = logging.getLogger(__name__)


def handler_for(analyze: Analyze, threads: Threads, *, max_payload_bytes: int = MAX_PAYLOAD_BYTES) -> Handler:
    """
    A handler that decodes the payload, calls *analyze*, checks what it returned and encodes that.

    A coroutine function runs on the loop; any other on one of *threads*, decoding and encoding included.

    A payload that cannot be decoded or is too large is INVALID_ARGUMENT, a result that breaks the rules
    of `check_result` is INVALID_RESULT. What *analyze* itself raises passes through, an `InvalidRequest`
    too: it is HANDLER_FAILED to the executor.
    """
    if _is_coroutine_function(analyze):

        async def handle(task: str, payload: Payload) -> Outcome:
            try:
                data = decode(check_payload(payload, max_payload_bytes))
            except InvalidRequest as exc:
                return Failure(OutcomeCode.INVALID_ARGUMENT, str(exc))
            return _outcome_of(task, await analyze(task, data), max_payload_bytes)  # type: ignore[misc]

        return handle

    def work(task: str, payload: Payload) -> Outcome:
        try:
            data = decode(check_payload(payload, max_payload_bytes))
        except InvalidRequest as exc:
            return Failure(OutcomeCode.INVALID_ARGUMENT, str(exc))
        return _outcome_of(task, analyze(task, data), max_payload_bytes)

    async def handle_on_thread(task: str, payload: Payload) -> Outcome:
        return await threads.run(work, task, payload)

    return handle_on_thread


def _is_coroutine_function(analyze: Analyze) -> bool:
    """Also for an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(analyze) or inspect.iscoroutinefunction(
        getattr(type(analyze), "__call__", None)  # noqa: B004 - the question is not whether it is callable
    )


def _outcome_of(task: str, result: object, max_payload_bytes: int) -> Outcome:
    try:
        return check_result(result, max_payload_bytes)
    except InvalidRequest as exc:  # the agent's author must see it too, not only the caller
        logger.warning("invalid result", extra={"task": task, "reason": str(exc)})
        return Failure(OutcomeCode.INVALID_RESULT, str(exc))
