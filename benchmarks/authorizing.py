"""
What it costs to know who calls and whether they may: `python benchmarks/authorizing.py`.

Both are timed within a live call over mutual TLS, on its own connection; beside what such a call takes that
does nothing else, client and server together, in the same run and interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import grpc
from grpc import aio
from rich.console import Console
from rich.table import Table

from identities import AGENT, CLIENT, SERVER, channel, server_credentials, tls, write_certificates
from parallax.control_plane.authorization import Grant
from parallax.control_plane.order import parse_target
from parallax.control_plane.registry import AgentRef
from parallax.control_plane.services import EXECUTE
from parallax.runtime.authenticator import Authenticator
from parallax.runtime.authorization import Authorization
from parallax.runtime.caller import Caller
from parallax.runtime.clock import utc_now
from parallax.runtime.policy_text import built_in_policy
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, control_plane
from parallax.security.provider import MTLSCredentialsProvider

TARGET: Final = 0.05  # of a unary call
SERVICE: Final = "benchmark.Authorizing"
CALL: Final = "a unary call"

Context = aio.ServicerContext[Any, Any]
Step = Callable[[Context], object]


def steps(certs: Path) -> dict[str, Step]:
    """What the control plane does for each call, and for each task."""
    provider = MTLSCredentialsProvider(tls(certs), identity=control_plane())
    authenticator = Authenticator(provider.store, DEFAULT_TRUST_DOMAIN, utc_now)
    authorization = Authorization(built_in_policy(), DEFAULT_TRUST_DOMAIN)
    target, agent = parse_target(AGENT), AgentRef(AGENT)

    def who(context: Context) -> Caller:
        caller = authenticator.authenticate(context)
        authenticator.check(caller)
        return caller

    def everything(context: Context) -> None:
        caller = who(context)
        authorization.authorize(caller, EXECUTE)
        grant = Grant(authorization, caller, EXECUTE)
        grant.check(target)
        grant.covers(target, agent)

    return {"who calls": who, "… and may they, and ask whom": everything}


class Call:
    """Serves calls that do nothing; or, asked for a step, as much of that as is wanted."""

    def __init__(self, known: dict[str, Step], times: int) -> None:
        self._known = known
        self._times = times

    async def answer(self, request: bytes, context: Context) -> bytes:
        """Nothing for no name; else the seconds that one of these steps took."""
        step = self._known.get(request.decode())
        if step is None:
            return b""
        step(context)
        began = time.process_time()
        for _ in range(self._times):
            step(context)
        return repr((time.process_time() - began) / self._times).encode()


@asynccontextmanager
async def connected(certs: Path, call: Call) -> AsyncIterator[Callable[[bytes], Any]]:
    """A server of *call*, and how to call it."""
    server = aio.server()
    handler: Any = grpc.unary_unary_rpc_method_handler(call.answer)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {"Call": handler})])
    port = server.add_secure_port("127.0.0.1:0", server_credentials(certs, SERVER))
    await server.start()
    async with channel(certs, CLIENT, f"127.0.0.1:{port}") as opened:
        ask: Any = opened.unary_unary(f"/{SERVICE}/Call")
        yield ask
    await server.stop(None)


async def measure(certs: Path, rounds: int, calls: int) -> dict[str, list[float]]:
    """Seconds of processor time that a call takes, and that each step takes, once in each round."""
    known = steps(certs)
    measured: dict[str, list[float]] = {name: [] for name in (CALL, *known)}
    async with connected(certs, Call(known, calls)) as ask:
        await ask(b"")
        for _ in range(rounds):
            began = time.process_time()
            for _ in range(calls):
                await ask(b"")
            measured[CALL].append((time.process_time() - began) / calls)
            for name in known:
                measured[name].append(float(await ask(name.encode())))
    return measured


def show(measured: dict[str, list[float]]) -> bool:
    """Print medians, ranges and their part of a call; whether the target is met."""
    table = Table(title="Processor time, microseconds")
    for column in ("what", "median", "min", "max", "of a call"):
        table.add_column(column, justify="left" if column == "what" else "right")
    whole = statistics.median(measured[CALL])
    for name, took in measured.items():
        table.add_row(
            name,
            *(f"{seconds * 1e6:,.1f}" for seconds in (statistics.median(took), min(took), max(took))),
            f"{statistics.median(took) / whole:.2%}",
        )
    Console().print(table)
    *_, last = measured.values()
    part = statistics.median(last) / whole
    print(f"target: {TARGET:.0%} of a call; {part:.2%}: {'met' if part <= TARGET else 'missed'}")
    return part <= TARGET


def main() -> int:
    """Measure and print; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=2_000, help="in each round, and as often each step")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        certs = Path(scratch)
        write_certificates(certs)
        measured = asyncio.run(measure(certs, arguments.rounds, arguments.calls))
    return 0 if show(measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())
