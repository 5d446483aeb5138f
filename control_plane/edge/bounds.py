"""What a request may cost before anybody looks at it: bytes, seconds, and others at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, MutableMapping
from datetime import timedelta
from typing import Any, Final

from parallax.control_plane.edge.status import body_of, retry_after
from parallax.runtime.http import App, Receive, Scope, Send, answer_json
from parallax.security.errors import InvalidRequest, ParallaxError, Unavailable

MAX_BODY_BYTES: Final = 64 * 1024  # a request for RSA-4096 and a hundred names has 8 KiB as PEM
BODY_S: Final = 10.0
MAX_AT_ONCE: Final = 32  # more would wait for one processor

# One request to a connection: what waits for the next one would be in the way of others.
_CLOSE: Final = (b"connection", b"close")


class _Hopeless(Exception):
    """The body is too large."""


Failed = Callable[[Scope, ParallaxError], None]


def bounded(app: App, failed: Failed) -> App:
    """
    *app*, for bodies of at most 64 KiB that arrive within ten seconds, 32 of them at once.

    Args:
        failed: Told of each request that is kept from it, and why.
    """
    at_once = 0

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal at_once

        async def closing(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), _CLOSE]
            await send(message)

        async def refuse(status: int, cause: ParallaxError) -> None:
            failed(scope, cause)
            wait = retry_after(cause)
            headers = ((b"retry-after", wait.encode()),) if wait else ()
            await answer_json(closing, status, body_of(cause), *headers)

        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            await refuse(408, InvalidRequest(f"the body did not arrive within {BODY_S:g} seconds"))
            return
        except _Hopeless:
            await refuse(413, InvalidRequest(f"the body has more than {MAX_BODY_BYTES:,} bytes"))
            return
        if body is None:
            return
        if at_once >= MAX_AT_ONCE:
            busy = Unavailable("too many requests at once; try again later", retry_after=timedelta(seconds=1))
            await refuse(503, busy)
            return
        at_once += 1
        try:
            await app(scope, _replay(body, receive), closing)
        finally:
            at_once -= 1

    return guarded


async def _read(receive: Receive) -> bytes | None:
    """The body; None if the sender has gone."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise _Hopeless
        if not message.get("more_body"):
            return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    is_read = False

    async def replay() -> MutableMapping[str, Any]:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
