"""A direct agent, asked by one unary call per task."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from subject import Ask, Subject
from subjects.direct_link import proxied, run_agent, start


@asynccontextmanager
async def connect(certs: Path, address: str) -> AsyncIterator[Ask]:
    """One proxy, each task a call of its own."""
    async with proxied(certs, address, link=False) as ask:
        yield ask


SUBJECT = Subject(
    title="Parallax direct unary",
    about="client → agent; `SecureGrpcAgentProxy` with `link=False`: one unary call per task",
    start=start,
    connect=connect,
    roles={"agent": run_agent},
)
