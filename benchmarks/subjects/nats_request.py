"""NATS request/reply: a fast broker in Go between two Python clients."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import nats
from nats.aio.client import Client
from nats.aio.msg import Msg

from identities import AGENT, BROKER, CLIENT, files, ssl_context
from role import ready, run
from subject import Ask, Stage, Subject, script

TOPIC = "echo"


def start(stage: Stage) -> str:
    """The broker, then the client that answers."""
    cert, key, ca = files(stage.certs, BROKER)
    ports = stage.scratch / "ports"
    ports.mkdir()
    config = stage.scratch / "nats.conf"
    quoted = {"cert_file": cert, "key_file": key, "ca_file": ca}
    material = "\n".join(f"  {name}: {json.dumps(str(path))}" for name, path in quoted.items())
    listen = f"listen: 127.0.0.1:-1\nports_file_dir: {json.dumps(str(ports))}\n"
    config.write_text(f"{listen}tls {{\n{material}\n  verify: true\n}}\n")
    stage.spawn([script("nats-server"), "--config", config])

    def port(_: str) -> str | None:
        found = [json.loads(path.read_text() or "null") for path in ports.glob("*.ports")]
        return str(found[0]["nats"][0]) if found and found[0] else None

    address = stage.wait("the broker", port).replace("nats://", "tls://")
    stage.role("responder", address)
    return address


async def _open(certs: Path, name: str, address: str) -> Client:
    return await nats.connect(address, tls=ssl_context(certs, name), allow_reconnect=False)


async def _respond(certs: Path, address: str) -> None:
    client = await _open(certs, AGENT, address)

    async def answer(message: Msg) -> None:
        await message.respond(message.data)

    await client.subscribe(TOPIC, cb=answer)
    await client.flush()
    ready()
    await asyncio.Event().wait()


def run_responder(certs: Path, address: str) -> None:
    """The process that answers."""
    run(_respond(certs, address))


@asynccontextmanager
async def connect(certs: Path, address: str) -> AsyncIterator[Ask]:
    """One connection for all requests."""
    client = await _open(certs, CLIENT, address)

    async def ask(payload: bytes) -> bytes:
        return (await client.request(TOPIC, payload, timeout=30)).data

    try:
        yield ask
    finally:
        await client.close()


SUBJECT = Subject(
    title="NATS request/reply",
    about="client → nats-server → responder; nats-py on both sides, one connection each, `verify: true`",
    start=start,
    connect=connect,
    roles={"responder": run_responder},
)
