"""A direct agent, asked through its proxy: no control plane in between."""

from __future__ import annotations

import asyncio
import inspect
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import parallax.sdk
from identities import AGENT, tls
from parallax.security.errors import Unavailable
from subject import WITHIN_S, Ask, Stage, Subject
from subjects.control_plane_link import MAX_CONCURRENCY, Echo

PROXY = "SecureGrpcAgentProxy"


def missing() -> str | None:
    """Why there is no direct agent to measure."""
    if not hasattr(parallax.sdk, PROXY):
        return f"parallax.sdk has no {PROXY}"
    return None if "listen" in inspect.signature(Echo).parameters else "SecureAgent has no argument `listen`"


def run_agent(certs: Path, address: str) -> None:
    """The agent's process, on its own port, without a control plane."""
    own: dict[str, Any] = {"control_plane": "none", "listen": address}
    Echo(AGENT, "Echo", ["echo"], None, tls(certs), max_concurrency=MAX_CONCURRENCY, **own).run()


def start(stage: Stage) -> str:
    """One agent, on a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    stage.spawn_role("agent", address)
    return address


async def proxy_of(certs: Path, address: str) -> Any:
    """A proxy of the agent, as soon as it answers."""
    kind: Any = getattr(parallax.sdk, PROXY)
    described = {"id": AGENT, "name": "Echo", "endpoint": address}
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            proxy = await kind.from_metadata(described, tls(certs))
            await proxy.analyze("echo", b"")
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)
        else:
            return proxy


async def _close(proxy: Any) -> None:
    if hasattr(proxy, "close"):
        await proxy.close()


@asynccontextmanager
async def proxied(certs: Path, address: str, **how: Any) -> AsyncIterator[Ask]:
    """One proxy for all tasks; *how* goes with each."""
    async with AsyncExitStack() as stack:
        proxy = await proxy_of(certs, address)
        stack.push_async_callback(_close, proxy)

        async def ask(payload: bytes) -> bytes:
            answer = await proxy.analyze("echo", payload, **how)
            found: bytes = getattr(answer, "value", answer)
            return found

        yield ask


SUBJECT = Subject(
    title="Parallax direct link",
    about="client → agent; `SecureGrpcAgentProxy.analyze`, bytes, the agent at max_concurrency=256",
    start=start,
    connect=proxied,
    roles={"agent": run_agent},
    missing=missing,
)
