"""What a process tells its operator over plain HTTP: metrics, whether it is alive, whether it is ready."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import format_datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from parallax.runtime.address import listen

if TYPE_CHECKING:
    import uvicorn
    from prometheus_client import CollectorRegistry

VARIABLE: Final = "PARALLAX_METRICS_LISTEN"

_SHUTDOWN_S: Final = 1  # for answers under way; uvicorn takes whole seconds
_MAX_CONNECTIONS: Final = 100  # a scrape needs one; more would take the process's descriptors
_BACKLOG: Final = 16  # asyncio logs as many errors at once when there is no descriptor left to accept with

_OWN: Final = frozenset({"/metrics", "/healthz", "/readyz"})
_PIECE: Final = 64 * 1024  # so that who does not read takes no more of our memory than that

_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether the process can do its work now, and per part of it how that stands."""

    ready: bool
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Page:
    """
    What else a process shows to whoever asks.

    Args:
        etag: A name of this very content, for who has it already.
        modified: Aware UTC; for people, and caches that know nothing better.
        max_age: How long others may show it without asking again.
    """

    body: bytes = field(repr=False)
    media_type: str
    etag: str
    modified: datetime
    max_age: timedelta


Pages = Callable[[str], Page | None]
"""The page at a path, percent-decoded; None if there is none."""


class MetricsListener:
    """
    While open, `/metrics`, `/healthz` and `/readyz` are served at *address*.

    Plain HTTP by design, without authentication: nothing secret is there, and probes and
    scrapers have no client certificate. It shares the caller's event loop, so that
    `/healthz` answers exactly as long as the loop runs, and touches no signal handler.
    With more than 100 connections the oldest is cut off.

    Args:
        address: `host:port`; with port 0 any free one, then see `port`.
        readiness: Asked at each `/readyz`; 200 if ready, else 503, the detail in both as JSON.
        pages: Asked for whatever is at other paths.

    Raises:
        ConfigError: On entry, if nobody can listen there.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        readiness: Callable[[], Readiness],
        pages: Pages = lambda _: None,
    ) -> None:
        self._address = address
        self._pages = pages
        self._registry = registry
        self._readiness = readiness
        self._server: uvicorn.Server | None = None
        self.port = 0

    async def __aenter__(self) -> Self:
        listening = await listen(self._address, VARIABLE)
        self.port = listening.getsockname()[1]
        try:
            self._server = await _serve(self._app(), listening)
        except BaseException:
            listening.close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is None:
            return
        try:
            await self._server.shutdown()
        finally:
            # A peer that does not read its answer would keep its connection for ever.
            for connection in list(self._server.server_state.connections):
                transport = getattr(connection, "transport", None)
                if transport is not None:
                    transport.abort()

    def _app(self) -> _App:
        from prometheus_client import make_asgi_app  # 0.1 s, for who serves metrics only

        # Not compressed: a scrape crosses one hop, and the loop has better things to do.
        metrics: _App = make_asgi_app(self._registry, disable_compression=True)

        async def app(scope: _Scope, receive: _Receive, send: _Send) -> None:
            path = scope["path"]
            page = None if path in _OWN else self._pages(path)
            if path not in _OWN and page is None:
                await _answer(send, 404, "not found: try /metrics, /healthz or /readyz\n")
            elif scope["method"] != "GET":
                await _answer(send, 405, "only GET\n", (b"allow", b"GET"))
            elif page is not None:
                await _show(page, scope, send)
            elif path == "/metrics":
                try:
                    await metrics(scope, receive, send)
                except UnicodeDecodeError:  # raised before it sends anything
                    await _answer(send, 400, "query and headers must be UTF-8\n")
            elif path == "/healthz":
                await _answer(send, 200, "ok")
            else:
                readiness = self._readiness()
                body = json.dumps({"ready": readiness.ready, "detail": dict(readiness.detail)})
                await _answer(send, 200 if readiness.ready else 503, body, media_type=b"application/json")

        return app


async def _serve(app: _App, listening: socket.socket) -> uvicorn.Server:
    """
    A started uvicorn, without its `serve()`: that takes over the process's signals, and polls.

    Nothing is lost: the event loop runs the connections.
    """
    import uvicorn  # 0.15 s, for who serves metrics only
    from uvicorn.protocols.http.h11_impl import H11Protocol

    oldest_first: dict[H11Protocol, asyncio.Transport] = {}

    class Connection(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            oldest_first[self] = transport
            if len(oldest_first) > _MAX_CONNECTIONS:
                oldest_first.pop(next(iter(oldest_first))).abort()

        def connection_lost(self, exc: Exception | None) -> None:
            oldest_first.pop(self, None)
            super().connection_lost(exc)

    config = uvicorn.Config(
        app,
        http=Connection,
        backlog=_BACKLOG,
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
    await server.startup(sockets=[listening])
    return server


async def _show(page: Page, scope: _Scope, send: _Send) -> None:
    """
    Answer with *page*, or that it has not changed (RFC 9110 §13.1.2).

    A date alone never says that: two pages may be of one second, and a clock may be set back.
    """
    etag = f'"{page.etag}"'.encode()
    asked = b",".join(value for name, value in scope["headers"] if name == b"if-none-match")
    known = {tag.strip().removeprefix(b"W/") for tag in asked.split(b",")}
    headers = [
        (b"etag", etag),
        (b"last-modified", format_datetime(page.modified, usegmt=True).encode()),
        (b"cache-control", f"max-age={max(0, int(page.max_age.total_seconds()))}".encode()),
    ]
    if known & {etag, b"*"}:
        await send({"type": "http.response.start", "status": 304, "headers": headers})
        await send({"type": "http.response.body"})
        return
    headers += [(b"content-type", page.media_type.encode()), _length(page.body)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(page.body), _PIECE):
        piece = page.body[start : start + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})


async def _answer(
    send: _Send,
    status: int,
    body: str,
    *headers: tuple[bytes, bytes],
    media_type: bytes = b"text/plain; charset=utf-8",
) -> None:
    data = body.encode()
    await send(
        {
            "type": "http.response.start",
            "status": status,
            "headers": [(b"content-type", media_type), _length(data), *headers],
        }
    )
    await send({"type": "http.response.body", "body": data})


def _length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", str(len(body)).encode()
