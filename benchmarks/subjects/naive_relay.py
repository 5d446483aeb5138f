"""What a relay costs that is written in ten lines: each task is a unary call on each of two hops."""

from __future__ import annotations

from pathlib import Path

from identities import SERVER, channel
from role import run
from subject import Stage, Subject
from subjects.raw_unary import call, connect, run_server, serve


async def _relay(certs: Path, address: str) -> None:
    async with channel(certs, SERVER, address) as onward:
        ask = call(onward)

        async def forward(request: bytes) -> bytes:
            return await ask(request)

        await serve(certs, forward)


def run_relay(certs: Path, address: str) -> None:
    """The process in the middle."""
    run(_relay(certs, address))


def start(stage: Stage) -> str:
    """The server, then the relay that dials it."""
    return stage.role("relay", stage.role("server"))


SUBJECT = Subject(
    title="raw gRPC unary, relayed",
    about="client → relay → server; as above on both hops, each on one channel",
    start=start,
    connect=connect,
    roles={"server": run_server, "relay": run_relay},
)
