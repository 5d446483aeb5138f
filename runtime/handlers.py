"""gRPC's handlers, taken apart for the gate: what each does as one coroutine, and a handler of another."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from grpc import aio

from parallax.security.errors import InvalidRequest

Context = aio.ServicerContext[Any, Any]
Behaviour = Callable[[object, Context], Awaitable[Any]]


def behaviour_of(handler: Any) -> Behaviour:
    """What *handler* does: a coroutine that returns the response, or writes it where it is a stream."""
    if handler.response_streaming:
        return _written(handler.unary_stream or handler.stream_stream)
    behaviour: Behaviour = handler.unary_unary or handler.stream_unary
    return behaviour


def with_behaviour(handler: Any, behaviour: Behaviour) -> Any:
    """A handler like *handler* that does this; one request that is no message it is given all the same."""
    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    deserialize = _forgiving(handler.request_deserializer, streaming=handler.request_streaming)
    return make(behaviour, deserialize, handler.response_serializer)


def check_readable(request: object) -> None:
    """Pass if *request*, as a behaviour is given it, could be read; raises InvalidRequest."""
    if request is _MALFORMED:
        raise _malformed()


def _written(behaviour: Any) -> Behaviour:
    """*behaviour* of a streaming response as a coroutine, whether it yields its messages or writes them."""

    async def write(request: object, context: Context) -> None:
        # Without it, a cancellation during the first write leaves the client hanging; and so does one here.
        sending = asyncio.ensure_future(context.send_initial_metadata(()))
        try:
            await asyncio.shield(sending)
        except asyncio.CancelledError:
            await asyncio.wait({sending})
            if not sending.cancelled():
                sending.exception()  # that the peer has hung up, if it has: nobody is left to tell
            raise
        produced = behaviour(request, context)
        if inspect.isasyncgen(produced):
            async for message in produced:
                await context.write(message)
        else:
            await produced

    return write


class _Malformed:
    """Stands for a message that could not be read: gRPC must not answer for it, the gate does."""


_MALFORMED: Final = _Malformed()


def _forgiving(
    deserialize: Callable[[bytes], object] | None, *, streaming: bool
) -> Callable[[bytes], object]:
    """
    *deserialize*, for bytes that may be no message.

    Of a stream they are read by the handler, which is told; one request is read before
    there is a handler to tell, so that a marker stands for it.
    """

    def parse(data: bytes) -> object:
        if deserialize is None:
            return data
        try:
            return deserialize(data)
        except Exception:  # noqa: BLE001 - whatever a parser throws at hostile bytes
            if streaming:
                raise _malformed() from None
            return _MALFORMED

    return parse


def _malformed() -> InvalidRequest:
    return InvalidRequest("the message is not what this method takes; check schema and versions")
