"""A direct agent, asked through its proxy: no control plane in between."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from identities import AGENT, tls
from parallax.sdk import SecureGrpcAgentProxy
from parallax.security.errors import Unavailable
from subject import WITHIN_S, Ask, Stage, Subject
from subjects.control_plane_link import MAX_CONCURRENCY, Echo


def run_agent(certs: Path, address: str) -> None:
    """The agent's process, on its own port, without a control plane."""
    Echo(
        AGENT,
        "Echo",
        ["echo"],
        None,
        tls(certs),
        control_plane="none",
        listen=address,
        max_concurrency=MAX_CONCURRENCY,
    ).run()


def start(stage: Stage) -> str:
    """One agent, on a port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    stage.spawn_role("agent", address)
    return address


async def proxy_of(certs: Path, address: str, *, link: bool) -> SecureGrpcAgentProxy:
    """A proxy of the agent, as soon as it answers."""
    described = {"id": AGENT, "name": "Echo", "endpoint": address}
    deadline = time.monotonic() + WITHIN_S
    while True:
        try:
            return await SecureGrpcAgentProxy.from_metadata(described, tls(certs), link=link)
        except Unavailable:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)


@asynccontextmanager
async def proxied(certs: Path, address: str, *, link: bool) -> AsyncIterator[Ask]:
    """One proxy for all tasks, which shares a link among them or makes a call of each."""
    async with await proxy_of(certs, address, link=link) as proxy:

        async def ask(payload: bytes) -> bytes:
            value, _ = await proxy.analyze("echo", payload)
            answer: bytes = value
            return answer

        yield ask


@asynccontextmanager
async def connect(certs: Path, address: str) -> AsyncIterator[Ask]:
    """One proxy, on its link."""
    async with proxied(certs, address, link=True) as ask:
        yield ask


SUBJECT = Subject(
    title="Parallax direct link",
    about="client → agent; `SecureGrpcAgentProxy.analyze`, bytes, the agent at max_concurrency=256",
    start=start,
    connect=connect,
    roles={"agent": run_agent},
)
