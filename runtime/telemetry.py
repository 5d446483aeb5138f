"""What a process tells its operator over plain HTTP: metrics, whether it is alive, whether it is ready."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Final

from parallax.runtime.http import App, HttpPort, Receive, Scope, Send, answer, answer_json

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

VARIABLE: Final = "PARALLAX_METRICS_LISTEN"

_OWN: Final = frozenset({"/metrics", "/healthz", "/readyz"})
_PIECE: Final = 64 * 1024  # so that who does not read takes no more of our memory than that


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


class MetricsListener(HttpPort):
    """
    While open, `/metrics`, `/healthz` and `/readyz` are served at *address*.

    Plain HTTP by design, without authentication: nothing secret is there, and probes and
    scrapers have no client certificate. It shares the caller's event loop, so that
    `/healthz` answers exactly as long as the loop runs.

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
        self._pages = pages
        self._registry = registry
        self._readiness = readiness
        super().__init__(self._routes(), address, VARIABLE)

    def _routes(self) -> App:
        from prometheus_client import make_asgi_app  # 0.1 s, for who serves metrics only

        # Not compressed: a scrape crosses one hop, and the loop has better things to do.
        metrics: App = make_asgi_app(self._registry, disable_compression=True)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            path = scope["path"]
            page = None if path in _OWN else self._pages(path)
            if path not in _OWN and page is None:
                await answer(send, 404, "not found: try /metrics, /healthz or /readyz\n")
            elif scope["method"] != "GET":
                await answer(send, 405, "only GET\n", (b"allow", b"GET"))
            elif page is not None:
                await _show(page, scope, send)
            elif path == "/metrics":
                try:
                    await metrics(scope, receive, send)
                except UnicodeDecodeError:  # raised before it sends anything
                    await answer(send, 400, "query and headers must be UTF-8\n")
            elif path == "/healthz":
                await answer(send, 200, "ok")
            else:
                readiness = self._readiness()
                body = {"ready": readiness.ready, "detail": dict(readiness.detail)}
                await answer_json(send, 200 if readiness.ready else 503, body)

        return app


async def _show(page: Page, scope: Scope, send: Send) -> None:
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
    length = str(len(page.body)).encode()
    headers += [(b"content-type", page.media_type.encode()), (b"content-length", length)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for start in range(0, len(page.body), _PIECE):
        piece = page.body[start : start + _PIECE]
        await send({"type": "http.response.body", "body": piece, "more_body": True})
    await send({"type": "http.response.body"})
