"""Who takes part while all rotate: `rotation_roles.py agent NAME`, `rotation_roles.py client KIND REPORT`."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from parallax.runtime.loop import run
from parallax.sdk import ParallaxClient, SecureAgent, SecureGrpcAgentProxy
from parallax.security.errors import ParallaxError

SESSIONS: Final = "capability:session"  # agents that the control plane is dialled by
DIRECT: Final = "capability:direct"  # agents that the control plane dials
CALLERS: Final = 8  # at once, in each client
ENDPOINTS: Final = "SOAK_ENDPOINTS"  # `name=host:port`, one after the other
SLOW_S: Final = 0.3
KEPT: Final = 20
DICE: Final = random.Random()  # noqa: S311 - picks what to do next, hides nothing

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


async def client(kind: str, path: Path) -> None:
    """Call until SIGTERM, in the way that *kind* says, then let what is under way end."""
    report, stop = Report(path), asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with AsyncExitStack() as stack:
        if kind == "link":
            kinds = [_by_link(await stack.enter_async_context(ParallaxClient()))]
        else:
            kinds = []
            for each in os.environ[ENDPOINTS].split():
                name, _, endpoint = each.partition("=")
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
    if role == "agent":
        kind = name.partition("-")[0]
        Worker(name, "Worker", [kind], max_concurrency=64, session=kind == "session").run()
    else:
        run(client(name, Path(rest[0])))
