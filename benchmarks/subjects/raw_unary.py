"""gRPC's own floor: one unary call per task, client to server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc

from identities import CLIENT, SERVER, channel, server_credentials
from role import ready, run
from subject import Ask, Stage, Subject

METHOD = "/benchmark.Echo/Ask"


async def serve(certs: Path, answer: Ask) -> None:
    """A server that answers each call with what *answer* makes of it."""

    async def handle(request: bytes, _: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return await answer(request)

    server = grpc.aio.server()
    service, method = METHOD.strip("/").split("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(handle)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_secure_port("127.0.0.1:0", server_credentials(certs, SERVER))
    await server.start()
    ready(f"127.0.0.1:{port}")
    await server.wait_for_termination()


def call(opened: grpc.aio.Channel) -> Ask:
    """The method, without serializers: bytes go and come as they are."""
    asking: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary(METHOD)
    return asking


async def echo(request: bytes) -> bytes:
    """The answer of the server at the end."""
    return request


def run_server(certs: Path, _: str) -> None:
    """The process that answers."""
    run(serve(certs, echo))


def start(stage: Stage) -> str:
    """One server."""
    return stage.role("server")


@asynccontextmanager
async def connect(certs: Path, address: str) -> AsyncIterator[Ask]:
    """One channel for all calls."""
    async with channel(certs, CLIENT, address) as opened:
        yield call(opened)


SUBJECT = Subject(
    title="raw gRPC unary",
    about="client → server; a unary call per task on one `grpc.aio` channel, bytes, default options",
    start=start,
    connect=connect,
    roles={"server": run_server},
)
