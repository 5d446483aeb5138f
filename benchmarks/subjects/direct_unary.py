"""A direct agent, asked by one unary call per task."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import parallax.sdk
from subject import Ask, Subject
from subjects import direct_link
from subjects.direct_link import PROXY, proxied, run_agent, start


def missing() -> str | None:
    """Why the proxy cannot be asked this way."""
    if reason := direct_link.missing():
        return reason
    parameters = inspect.signature(getattr(parallax.sdk, PROXY).analyze).parameters
    return None if "unary" in parameters else "its proxy's analyze has no argument `unary`"


@asynccontextmanager
async def connect(certs: Path, address: str) -> AsyncIterator[Ask]:
    """One proxy for all tasks, each a call of its own."""
    async with proxied(certs, address, unary=True) as ask:
        yield ask


SUBJECT = Subject(
    title="Parallax direct unary",
    about="client → agent; `SecureGrpcAgentProxy.analyze(…, unary=True)`: one unary call per task",
    start=start,
    connect=connect,
    roles={"agent": run_agent},
    missing=missing,
)
