"""HTTP on the caller's event loop, bounded: uvicorn without its process."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from contextlib import suppress
from functools import partial
from socket import SHUT_RDWR
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from parallax.runtime.address import listen

if TYPE_CHECKING:
    import socket

    import uvicorn

logger = logging.getLogger(__name__)

# What uvicorn warns of is what peers did wrong, a line or two for each request, and whoever reaches the port
# could have as many written as he likes. They are told themselves; what goes wrong here is an error.
_faults = logging.getLogger(f"{__name__}.faults")
_faults.setLevel(logging.ERROR)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_CONNECTIONS: Final = 100  # more would take the process's descriptors
HANDSHAKE_S: Final = 10.0
HEAD_S: Final = 10.0  # for the first request's line and headers

_SHUTDOWN_S: Final = 1  # for answers under way; uvicorn takes whole seconds
_PAUSE_S: Final = 1.0  # while nobody can be accepted


class HttpPort:
    """
    While open, *app* is served at *address*.

    It shares the caller's event loop and touches no signal handler. With more than 100 connections, those
    included that do not shake hands, the oldest is cut off, and so is one that says nothing, or not all of
    a request's head, for ten seconds.

    Args:
        address: `host:port`; with port 0 any free one, then see `port`.
        variable: What the address was set with, for the error.
        context: With TLS.

    Raises:
        ConfigError: On entry, if nobody can listen there.
    """

    def __init__(
        self, app: App, address: str, variable: str, *, context: ssl.SSLContext | None = None
    ) -> None:
        self._app = app
        self._address = address
        self._variable = variable
        self._context = context
        self._server: uvicorn.Server | None = None
        self._accepting: asyncio.Future[None] | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        listening = await listen(self._address, self._variable)
        self.port = listening.getsockname()[1]
        try:
            self._server, welcome = _uvicorn(self._app, self._context)
        except BaseException:
            listening.close()
            raise
        self._accepting = asyncio.ensure_future(_accept(listening, welcome))
        self._accepting.add_done_callback(lambda _: listening.close())  # also if it never began
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is None or self._accepting is None:
            return
        self._accepting.cancel()
        await asyncio.wait({self._accepting})
        try:
            await self._server.shutdown()
        finally:
            # A peer that does not read its answer would keep its connection for ever.
            for connection in list(self._server.server_state.connections):
                transport = getattr(connection, "transport", None)
                if transport is not None:
                    transport.abort()


async def answer(
    send: Send,
    status: int,
    body: str,
    *headers: tuple[bytes, bytes],
    media_type: bytes = b"text/plain; charset=utf-8",
) -> None:
    """Answer with *body* and nothing more."""
    data = body.encode()
    length = (b"content-length", str(len(data)).encode())
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", media_type), length, *headers],
        }
    )
    await send({"type": "http.response.body", "body": data})


async def answer_json(send: Send, status: int, body: object, *headers: tuple[bytes, bytes]) -> None:
    """Answer with *body* as JSON."""
    await answer(send, status, json.dumps(body), *headers, media_type=b"application/json")


Welcome = Callable[["socket.socket"], Coroutine[None, None, None]]


async def _accept(listening: socket.socket, welcome: Welcome) -> None:
    """Have each who connects welcomed, until cancelled."""
    loop = asyncio.get_running_loop()
    listening.settimeout(0)
    async with asyncio.TaskGroup() as group:
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError:  # as a rule for want of a descriptor
                await asyncio.sleep(_PAUSE_S)
            else:
                group.create_task(welcome(accepted))


def _uvicorn(app: App, context: ssl.SSLContext | None) -> tuple[uvicorn.Server, Welcome]:
    """
    A started uvicorn, without its `serve()`, and what gives it a connection.

    Its own takes over the process's signals, and polls. Nothing is lost: the event loop runs the
    connections. Nor does asyncio accept them: it tells nobody of those that do not shake hands.
    """
    import uvicorn  # 0.15 s, for who serves HTTP only
    from uvicorn.protocols.http.h11_impl import H11Protocol

    oldest_first: dict[H11Protocol, Callable[[], None]] = {}  # what cuts each off

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self.logger = _faults
            super().connection_made(transport)
            oldest_first[self] = transport.abort
            self._patience = self.loop.call_later(HEAD_S, self._give_up, transport)

        def connection_lost(self, exc: Exception | None) -> None:
            self._patience.cancel()
            oldest_first.pop(self, None)
            super().connection_lost(exc)

        def _give_up(self, transport: asyncio.Transport) -> None:
            if self.cycle is None:  # no request has begun
                transport.abort()

    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=_SHUTDOWN_S,
    )
    config.load()
    server = uvicorn.Server(config)
    server.lifespan = config.lifespan_class(config)
    server.servers = []
    server.started = True

    async def welcome(accepted: socket.socket) -> None:
        connection = Connection(config=config, server_state=server.server_state, app_state={})
        oldest_first[connection] = partial(_hang_up, accepted)
        if len(oldest_first) > MAX_CONNECTIONS:
            oldest_first.pop(next(iter(oldest_first)))()
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: connection,
                accepted,
                ssl=context,
                ssl_handshake_timeout=HANDSHAKE_S if context is not None else None,
            )
        except OSError:  # it did not shake hands
            oldest_first.pop(connection, None)
        except Exception:  # whatever one peer does, others are accepted
            oldest_first.pop(connection, None)
            logger.exception("a connection was not taken up")

    return server, welcome


def _hang_up(accepted: socket.socket) -> None:
    with suppress(OSError):  # it has gone already
        accepted.shutdown(SHUT_RDWR)
