"""Links over real streams: a server on a loopback port whose one method does what a test says."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from parallax.protos import link_pb2
from parallax.security.errors import InvalidRequest

Frame = link_pb2.LinkFrame
Context = aio.ServicerContext[Any, Any]
Peer = Callable[[Context], Awaitable[None]]
Dial = Callable[[], aio.StreamStreamCall[Any, Any]]

HELLO = Frame(hello=link_pb2.Hello(protocol_version=1, min_protocol_version=1))
WELCOME = Frame(welcome=link_pb2.Welcome(protocol_version=1, max_payload_bytes=1000))


def _raw_or_frame(message: Frame | bytes) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


def _parse(data: bytes) -> Frame:
    """As the gate of our servers does (see `runtime.gate`)."""
    try:
        return Frame.FromString(data)
    except DecodeError:
        raise InvalidRequest("not a frame") from None


@asynccontextmanager
async def served_by(peer: Peer) -> AsyncIterator[Dial]:
    """Dials a stream that *peer* handles; either end may write bytes for a frame."""

    async def handle(_: AsyncIterator[Frame], context: Context) -> None:
        await peer(context)

    method = grpc.stream_stream_rpc_method_handler(
        handle, request_deserializer=_parse, response_serializer=_raw_or_frame
    )
    server = aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.Links", {"Link": method}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            multi = channel.stream_stream(
                "/test.Links/Link", request_serializer=_raw_or_frame, response_deserializer=Frame.FromString
            )
            yield multi
    finally:
        await server.stop(grace=None)
