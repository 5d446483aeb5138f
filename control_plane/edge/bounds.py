"""What a request may cost before anybody looks at it: bytes, seconds, and others at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any, Final

from parallax.runtime.http import App, Receive, Scope, Send, answer_json

MAX_BODY_BYTES: Final = 64 * 1024  # a request for RSA-4096 and a hundred names has 8 KiB as PEM
BODY_S: Final = 10.0
MAX_AT_ONCE: Final = 32  # more would wait for one processor

# One request to a connection: what waits for the next one would be in the way of others.
_CLOSE: Final = (b"connection", b"close")


class _Hopeless(Exception):
    """The body is too large."""


def bounded(app: App) -> App:
    """*app*, for bodies of at most 64 KiB that arrive within ten seconds, 32 of them at once."""
    at_once = 0

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal at_once

        async def closing(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), _CLOSE]
            await send(message)

        try:
            async with asyncio.timeout(BODY_S):
                body = await _read(receive)
        except TimeoutError:
            await _refuse(
                closing, 408, "InvalidRequest", f"the body did not arrive within {BODY_S:g} seconds"
            )
            return
        except _Hopeless:
            text = f"the body has more than {MAX_BODY_BYTES:,} bytes"
            await _refuse(closing, 413, "InvalidRequest", text)
            return
        if body is None:
            return
        if at_once >= MAX_AT_ONCE:
            await _refuse(closing, 503, "Unavailable", "too many requests at once; try again later")
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


async def _refuse(send: Send, status: int, error: str, message: str) -> None:
    headers = ((b"retry-after", b"1"),) if status == 503 else ()
    await answer_json(send, status, {"error": error, "message": message}, *headers)
