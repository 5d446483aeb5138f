"""What another gRPC client has: one `Execute` call per task, on one channel."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from identities import AGENT, CLIENT, channel
from parallax.protos import dispatch_pb2, dispatch_pb2_grpc, task_pb2
from subject import WITHIN_S, Ask, BenchmarkFailed, Subject
from subjects.control_plane_link import run_agent, start


@asynccontextmanager
async def connect(certs: Path, address: str) -> AsyncIterator[Ask]:
    """One channel for all calls, once the agent is there."""
    async with channel(certs, CLIENT, address) as opened:
        stub = dispatch_pb2_grpc.DispatchServiceStub(opened)

        async def ask(payload: bytes, wait_for_agent_ms: int = 0) -> bytes:
            request = dispatch_pb2.ExecuteRequest(
                target=AGENT,
                task="echo",
                payload=task_pb2.Payload(data=payload),
                timeout_ms=60_000,
                wait_for_agent_ms=wait_for_agent_ms,
            )
            outcome = (await stub.Execute(request, timeout=62)).outcome
            if not outcome.HasField("value"):
                raise BenchmarkFailed(f"the task failed: {outcome.failure.message}")
            return outcome.value.payload.data

        await ask(b"", wait_for_agent_ms=round(WITHIN_S * 1000))
        yield ask


SUBJECT = Subject(
    title="Parallax unary",
    about="client → control plane → agent; `DispatchService.Execute` called with the generated stub",
    start=start,
    connect=connect,
    roles={"agent": run_agent},
)
