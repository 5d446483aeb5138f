"""Parallax as its users have it: `ParallaxClient.analyze`, the control plane, a `SecureAgent`."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from identities import AGENT, environment, tls
from parallax.sdk import ParallaxClient, SecureAgent
from subject import WITHIN_S, Ask, Stage, Subject

MAX_CONCURRENCY = 256


class Echo(SecureAgent):
    """An agent that answers with what it was sent."""

    async def analyze(self, task: str, data: Any) -> tuple[Any, float]:  # noqa: ARG002 - as SecureAgent calls it
        """Echo *data*."""
        return data, 1.0


def run_agent(certs: Path, address: str) -> None:
    """The agent's process, as `run` makes it: event loop, logs and all."""
    Echo(
        AGENT, "Echo", ["echo"], None, tls(certs), control_plane=address, max_concurrency=MAX_CONCURRENCY
    ).run()


def start(stage: Stage) -> str:
    """The control plane, then the agent."""
    stage.spawn(
        [sys.executable, "-m", "parallax.control_plane"],
        **environment(stage.certs),
        PARALLAX_LISTEN="127.0.0.1:0",
        PARALLAX_HTTP_LISTEN="none",
        PARALLAX_METRICS_LISTEN="127.0.0.1:0",
        PARALLAX_DATA_DIR=str(stage.scratch / "data"),
    )
    address = f"localhost:{stage.wait('the control plane', _port)}"
    stage.spawn_role("agent", address)
    return address


def _port(log: str) -> int | None:
    for line in log.splitlines(keepends=True):
        if line.startswith("{") and line.endswith("\n"):
            record = json.loads(line)
            if record["event"] == "control plane ready":
                return int(record["port"])
    return None


@asynccontextmanager
async def connect(certs: Path, address: str) -> AsyncIterator[Ask]:
    """One client for all tasks, once the agent is there."""
    async with ParallaxClient(address, tls(certs), identity="client/cli") as client:
        await client.analyze(AGENT, "echo", b"", wait_for_agent=WITHIN_S)

        async def ask(payload: bytes) -> bytes:
            answer: bytes = (await client.analyze(AGENT, "echo", payload)).value
            return answer

        yield ask


SUBJECT = Subject(
    title="Parallax link",
    about="client → control plane → agent; `ParallaxClient.analyze`, bytes, the agent at max_concurrency=256",
    start=start,
    connect=connect,
    roles={"agent": run_agent},
)
