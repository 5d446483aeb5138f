"""
Who takes part while all rotate: `rotation_roles.py agent NAME`, `rotation_roles.py client KIND REPORT`.

On SIGUSR1 each opens as many connections as a rotation would have it open anew, and closes them: so much no
rotation can do without.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from parallax.runtime.channel import channel_options
from parallax.runtime.dialling import lets_in
from parallax.runtime.log_writer import process_log
from parallax.runtime.loop import run
from parallax.runtime.outcome import MAX_PAYLOAD_BYTES
from parallax.runtime.settings import load_settings
from parallax.sdk import ParallaxClient, SecureAgent, SecureGrpcAgentProxy
from parallax.security.config import get_mtls_config
from parallax.security.errors import ParallaxError
from parallax.security.identity import Identity, Kind, control_plane
from parallax.security.provider import MTLSCredentialsProvider

SESSIONS: Final = "capability:session"  # agents that the control plane is dialled by
DIRECT: Final = "capability:direct"  # agents that the control plane dials
CALLERS: Final = 8  # at once, in each client
ENDPOINTS: Final = "SOAK_ENDPOINTS"  # `name=host:port`, one after the other
SLOW_S: Final = 0.3
KEPT: Final = 20
DICE: Final = random.Random()  # noqa: S311 - picks what to do next, hides nothing

CONNECT_S: Final = 5.0
CLOSE_AFTER_S: Final = 1.0

Call = Callable[[], Awaitable[None]]


class WrongAnswer(Exception):
    """Not what was asked for."""


class Worker(SecureAgent):
    """Gives back what it gets, at once, a little later, or in parts."""

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        """All at once."""
        if task == "slow":
            await asyncio.sleep(SLOW_S)
        return data, 1.0

    async def analyze_stream(self, task: str, data: Any) -> AsyncIterator[tuple[Any, float]]:
        """In parts."""
        for number in range(data):
            if task == "slow":
                await asyncio.sleep(SLOW_S / data)
            yield number, 1.0


def _check(answer: object, expected: object) -> None:
    if answer != expected:
        raise WrongAnswer


def _by_link(client: ParallaxClient) -> list[Call]:
    async def echo() -> None:
        _check((await client.analyze(DICE.choice((SESSIONS, DIRECT)), "echo", text := _text())).value, text)

    async def slow() -> None:
        _check((await client.analyze(DICE.choice((SESSIONS, DIRECT)), "slow", text := _text())).value, text)

    async def parts() -> None:
        stream = client.stream(DICE.choice((SESSIONS, DIRECT)), DICE.choice(("echo", "slow")), 10)
        _check([part.value async for part in stream], list(range(10)))

    async def look() -> None:
        _check(len(await client.agents(capability="session")), 2)

    return [*[echo] * 12, slow, parts, look]


def _by_proxy(proxy: SecureGrpcAgentProxy) -> list[Call]:
    async def echo() -> None:
        _check((await proxy.analyze("echo", text := _text()))[0], text)

    async def slow() -> None:
        _check((await proxy.analyze("slow", text := _text()))[0], text)

    async def parts() -> None:
        _check([value async for value, _ in proxy.stream("slow", 10)], list(range(10)))

    return [*[echo] * 12, slow, parts]


def _text() -> str:
    return "x" * DICE.randrange(2_000)


@asynccontextmanager
async def reconnecting(kind: Kind, name: str, agents: Mapping[str, str]) -> AsyncGenerator[None]:
    """
    Open connections on SIGUSR1 as long as the block, and close them: beside those that work.

    Args:
        agents: To these, and where they are; without any to the control plane.
    """
    domain = get_mtls_config().trust_domain
    peers = {Identity(domain, Kind.AGENT, agent): where for agent, where in agents.items()} or {
        control_plane(domain): os.environ["PARALLAX_CONTROL_PLANE"]
    }
    loop = asyncio.get_running_loop()
    async with asyncio.TaskGroup() as group:
        connect = partial(_connect, Identity(domain, kind, name), peers)
        loop.add_signal_handler(signal.SIGUSR1, lambda: group.create_task(connect()))
        yield
        loop.remove_signal_handler(signal.SIGUSR1)


async def _connect(identity: Identity, peers: Mapping[Identity, str]) -> None:
    provider, options = (
        MTLSCredentialsProvider(get_mtls_config(), identity=identity),
        channel_options(MAX_PAYLOAD_BYTES),
    )
    async with AsyncExitStack() as stack:
        for peer, address in peers.items():
            channel = await stack.enter_async_context(provider.channel(address, peer, options))
            if not await lets_in(channel, CONNECT_S):
                raise WrongAnswer
        await asyncio.sleep(CLOSE_AFTER_S)


class Report:
    """What a client has seen, one line of JSON a second: when, how long calls took, and what went wrong."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._took_ms: list[float] = []
        self._wrong: list[str] = []

    def done(self, seconds: float) -> None:
        """A call of the usual kind has ended well."""
        self._took_ms.append(round(seconds * 1000, 3))

    def failed(self, what: str) -> None:
        """A call has ended otherwise."""
        self._wrong.append(what)

    def write(self) -> None:
        """Add a line, and begin the next."""
        line = {
            "at": time.monotonic(),
            "took_ms": self._took_ms,
            "wrong": self._wrong[:KEPT],
            "failures": len(self._wrong),
        }
        with self._path.open("a") as file:
            print(json.dumps(line), file=file)
        self._took_ms, self._wrong = [], []


async def _keep_calling(calls: list[Call], report: Report, stop: asyncio.Event) -> None:
    while not stop.is_set():
        call = DICE.choice(calls)
        began = time.perf_counter()
        try:
            await call()
        except (ParallaxError, WrongAnswer) as exc:
            report.failed(f"{call.__name__}: {type(exc).__name__}: {exc}")
        else:
            if call.__name__ == "echo":  # the others take the time that they are asked to
                report.done(time.perf_counter() - began)
        await asyncio.sleep(DICE.uniform(0, 0.01))


async def agent(name: str) -> None:
    """Work until SIGTERM."""
    stop, kind = asyncio.Event(), name.partition("-")[0]
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    worker = Worker(name, "Worker", [kind], max_concurrency=64, session=kind == "session")
    async with worker, reconnecting(Kind.AGENT, name, {}):
        await stop.wait()


async def client(kind: str, path: Path) -> None:
    """Call until SIGTERM, in the way that *kind* says, then let what is under way end."""
    report, stop = Report(path), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    agents = {} if kind == "link" else dict(each.split("=", 1) for each in os.environ[ENDPOINTS].split())
    async with reconnecting(Kind.CLIENT, kind, agents), AsyncExitStack() as stack:
        if kind == "link":
            kinds = [_by_link(await stack.enter_async_context(ParallaxClient()))]
        else:
            kinds = []
            for name, endpoint in agents.items():
                proxy = await SecureGrpcAgentProxy.from_metadata(
                    {"id": name, "endpoint": endpoint}, link=kind == "direct-link"
                )
                kinds.append(_by_proxy(await stack.enter_async_context(proxy)))
        async with asyncio.TaskGroup() as group:
            callers = [
                group.create_task(_keep_calling(kinds[number % len(kinds)], report, stop))
                for number in range(CALLERS)
            ]
            while not all(caller.done() for caller in callers):
                await asyncio.wait(callers, timeout=1)
                report.write()


if __name__ == "__main__":
    role, name, *rest = sys.argv[1:]
    settings = load_settings()
    with process_log(settings.log_level, settings.log_format):
        run(agent(name) if role == "agent" else client(name, Path(rest[0])))
