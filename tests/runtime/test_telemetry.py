from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.parser import text_string_to_metric_families

from parallax.runtime.telemetry import MetricsListener, Page, Pages, Readiness
from parallax.security.errors import ConfigError
from tests.ports import free_port

ANYWHERE = "127.0.0.1:0"


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: str


async def ask(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    host: str = "127.0.0.1",
) -> Answer:
    def request() -> Answer:
        with contextlib.closing(http.client.HTTPConnection(host, port, timeout=10)) as connection:
            connection.request(method, path, headers=headers or {})
            response = connection.getresponse()
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, fields, response.read().decode())

    return await asyncio.to_thread(request)


def listener(
    address: str = ANYWHERE,
    registry: CollectorRegistry | None = None,
    readiness: Callable[[], Readiness] = lambda: Readiness(ready=True),
    pages: Pages = lambda _: None,
) -> MetricsListener:
    return MetricsListener(address, registry or CollectorRegistry(), readiness, pages)


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("parallax_things", "Things.", ["kind"], registry=registry).labels("good").inc(3)
    return registry


async def test_metrics_are_those_of_the_registry(registry: CollectorRegistry) -> None:
    async with listener(registry=registry) as metrics:
        answer = await ask(metrics.port, "/metrics", headers={"Accept-Encoding": "gzip"})
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = {family.name: family for family in text_string_to_metric_families(answer.body)}
    total = next(
        sample for sample in families["parallax_things"].samples if sample.name == "parallax_things_total"
    )
    assert (total.labels, total.value) == ({"kind": "good"}, 3)


async def test_metrics_are_open_metrics_if_asked_for(registry: CollectorRegistry) -> None:
    async with listener(registry=registry) as metrics:
        answer = await ask(
            metrics.port, "/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"}
        )
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.body.endswith("# EOF\n")


async def test_health_is_ok_while_the_loop_runs() -> None:
    async with listener() as metrics:
        answer = await ask(metrics.port, "/healthz")
    assert (answer.status, answer.body) == (200, "ok")


async def test_readiness_is_asked_at_each_request() -> None:
    now = Readiness(ready=False, detail={"engine": "starting"})
    async with listener(readiness=lambda: now) as metrics:
        before = await ask(metrics.port, "/readyz")
        now = Readiness(ready=True)
        after = await ask(metrics.port, "/readyz?verbose")
    assert before.status == 503
    assert json.loads(before.body) == {"ready": False, "detail": {"engine": "starting"}}
    assert after.status == 200
    assert json.loads(after.body) == {"ready": True, "detail": {}}
    assert after.headers["content-type"] == "application/json"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
@pytest.mark.parametrize("path", ["/metrics", "/healthz", "/readyz"])
async def test_only_get_is_allowed(method: str, path: str) -> None:
    async with listener() as metrics:
        answer = await ask(metrics.port, path, method=method)
    assert answer.status == 405
    assert answer.headers["allow"] == "GET"


@pytest.mark.parametrize("path", ["/", "/metrics/", "//metrics", "/metricsx", "/healthz/../metrics", "/%00"])
async def test_every_other_path_is_unknown(path: str) -> None:
    async with listener() as metrics:
        answer = await ask(metrics.port, path)
    assert answer.status == 404


PAGE = Page(b"what there is", "text/x-page", "v1", datetime(2026, 6, 1, 12, tzinfo=UTC), timedelta(minutes=1))


def pages(path: str) -> Page | None:
    return {"/more/page": PAGE, "/more/large": replace(PAGE, body=bytes(300_000))}.get(path)


async def test_a_page_is_shown_with_what_caches_need() -> None:
    async with listener(pages=pages) as metrics:
        answer = await ask(metrics.port, "/more/page")
        large = await ask(metrics.port, "/more/large")
        health = await ask(metrics.port, "/healthz")
    assert (answer.status, answer.body) == (200, "what there is")
    assert answer.headers == {
        "content-type": "text/x-page",
        "content-length": "13",
        "etag": '"v1"',
        "last-modified": "Mon, 01 Jun 2026 12:00:00 GMT",
        "cache-control": "max-age=60",
    }
    assert (large.headers["content-length"], len(large.body)) == ("300000", 300_000)
    assert health.body == "ok"


@pytest.mark.parametrize("tags", ['"v1"', 'W/"v1"', '"v0", "v1"', "*"])
async def test_who_has_a_page_is_told_that_it_has_not_changed(tags: str) -> None:
    async with listener(pages=pages) as metrics:
        answer = await ask(metrics.port, "/more/page", headers={"If-None-Match": tags})
    assert (answer.status, answer.body, answer.headers["etag"]) == (304, "", '"v1"')


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("If-None-Match", '"v0"'),
        ("If-None-Match", "v1"),
        ("If-Modified-Since", "Mon, 01 Jun 2026 12:00:00 GMT"),
    ],
)
async def test_who_may_have_another_page_is_shown_this_one(name: str, value: str) -> None:
    """A date proves nothing: a second has room for two pages."""
    async with listener(pages=pages) as metrics:
        answer = await ask(metrics.port, "/more/page", headers={name: value})
    assert (answer.status, answer.body) == (200, "what there is")


@pytest.mark.parametrize(
    "path", ["/more", "/more/", "/more/../more/page", "/more/%2e%2e/more/page", "//more/page"]
)
async def test_what_the_owner_does_not_know_is_no_page(path: str) -> None:
    async with listener(pages=pages) as metrics:
        answer = await ask(metrics.port, path)
    assert answer.status == 404


async def test_pages_are_for_reading() -> None:
    async with listener(pages=pages) as metrics:
        answer = await ask(metrics.port, "/more/page", method="DELETE")
    assert (answer.status, answer.headers["allow"]) == (405, "GET")


async def test_garbage_is_answered_and_the_next_request_too() -> None:
    async with listener() as metrics:
        reader, writer = await asyncio.open_connection("127.0.0.1", metrics.port)
        writer.write(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
        await writer.wait_closed()
        assert (await ask(metrics.port, "/healthz")).status == 200


async def test_a_failing_readiness_is_an_error_of_that_request_only(caplog: pytest.LogCaptureFixture) -> None:
    def readiness() -> Readiness:
        raise ValueError("broken")

    async with listener(readiness=readiness) as metrics:
        assert (await ask(metrics.port, "/readyz")).status == 500
        assert (await ask(metrics.port, "/healthz")).status == 200
    assert "broken" in caplog.text


@pytest.mark.parametrize("address", ["[::1]:0", "localhost:0"])
async def test_listens_on_what_the_address_names(address: str) -> None:
    async with listener(address) as metrics:
        host = "::1" if address.startswith("[") else "localhost"
        assert (await ask(metrics.port, "/healthz", host=host)).status == 200


@pytest.mark.parametrize("address", ["192.0.2.1:1", "no-such-host.invalid:1", "9464", "[::1]:99999"])
async def test_where_nobody_can_listen_one_line_names_the_setting(address: str) -> None:
    with pytest.raises(ConfigError) as caught:
        async with listener(address):
            pass
    assert str(caught.value).startswith("PARALLAX_METRICS_LISTEN")
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_a_port_in_use_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            async with listener(address):
                pass
    wrong = f"PARALLAX_METRICS_LISTEN={address}: cannot listen there"
    assert str(caught.value) == f"{wrong}: address already in use; choose another address"


async def test_the_port_is_free_again_afterwards() -> None:
    address = f"127.0.0.1:{free_port()}"
    for _ in range(2):
        async with listener(address) as metrics:
            assert (await ask(metrics.port, "/healthz")).status == 200


async def test_signals_stay_the_owners() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    got = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, got.set)
    owned = signal.getsignal(signal.SIGTERM)
    try:
        async with listener() as metrics:
            assert signal.getsignal(signal.SIGTERM) is owned
            assert signal.getsignal(signal.SIGINT) is before[signal.SIGINT]
            os.kill(os.getpid(), signal.SIGTERM)
            await got.wait()
            assert (await ask(metrics.port, "/healthz")).status == 200
        assert signal.getsignal(signal.SIGTERM) is owned
    finally:
        asyncio.get_running_loop().remove_signal_handler(signal.SIGTERM)


async def test_idle_and_slow_clients_do_not_hold_up_the_end() -> None:
    big = CollectorRegistry()
    gauge = Gauge("parallax_big", "Much text.", ["text"], registry=big)
    for number in range(3000):
        gauge.labels(f"{number}-" + "x" * 4000).set(1)
    async with listener(registry=big) as metrics:
        idle = await asyncio.open_connection("127.0.0.1", metrics.port)
        half = await asyncio.open_connection("127.0.0.1", metrics.port)
        half[1].write(b"GET /metrics HTTP/1.1\r\nHos")
        kept = await asyncio.open_connection("127.0.0.1", metrics.port)
        kept[1].write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await kept[0].readline()) == b"HTTP/1.1 200 OK\r\n"
        deaf = await asyncio.open_connection("127.0.0.1", metrics.port)
        deaf[1].write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await deaf[0].readline()) == b"HTTP/1.1 200 OK\r\n"
        begun = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - begun < 10
    assert {task for task in asyncio.all_tasks() if task is not asyncio.current_task()} == set()
    for _, writer in (idle, half, kept, deaf):
        writer.transport.abort()


async def test_connections_in_vain_crowd_out_each_other_and_no_probe() -> None:
    async with listener() as metrics, contextlib.AsyncExitStack() as stack:
        idle = []
        for _ in range(150):
            idle.append(stack.enter_context(socket.create_connection(("127.0.0.1", metrics.port))))
            idle[-1].sendall(b"GET /metrics HTTP/1.1\r\nX: ")
            await asyncio.sleep(0)  # the backlog is short
        assert (await ask(metrics.port, "/healthz")).status == 200
        idle[0].settimeout(10)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.to_thread(idle[0].recv, 1) == b""
        assert metrics._server is not None
        assert len(metrics._server.server_state.connections) <= 100


async def test_a_header_that_is_no_text_is_the_askers_fault_and_leaves_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with listener() as metrics:
        reader, writer = await asyncio.open_connection("127.0.0.1", metrics.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: \xff\r\n\r\n")
        assert await reader.readline() == b"HTTP/1.1 400 Bad Request\r\n"
        writer.transport.abort()
    assert caplog.messages == []


async def test_an_error_of_the_owner_passes_as_it_is() -> None:
    with pytest.raises(ValueError, match="mine"):
        async with listener():
            raise ValueError("mine")


async def test_cancelling_the_owner_frees_the_port() -> None:
    opened = asyncio.Event()
    ports: list[int] = []

    async def own() -> None:
        async with listener() as metrics:
            ports.append(metrics.port)
            opened.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        owner = group.create_task(own())
        await opened.wait()
        owner.cancel()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", ports[0])
