"""A server has no way in that does not lead through the gate."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import grpc
import pytest
from grpc import aio

from parallax.runtime import server as server_module
from parallax.runtime.authenticator import Authenticator
from parallax.runtime.caller import Anonymous, Caller
from parallax.runtime.gate import Gate
from parallax.runtime.server import GatedServer, new_server, serving
from parallax.security.config import MTLSConfig
from parallax.security.errors import NotAuthorized
from parallax.security.identity import control_plane
from parallax.security.provider import MTLSCredentialsProvider

SERVICE = "test.Echo"
METHODS = {
    "UnaryUnary": (False, False),
    "StreamUnary": (True, False),
    "UnaryStream": (False, True),
    "StreamStream": (True, True),
}
Add = Callable[[GatedServer, dict[str, Any]], None]


def add_generic(server: GatedServer, handlers: dict[str, Any]) -> None:
    """As older generated code does."""
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])


def add_registered(server: GatedServer, handlers: dict[str, Any]) -> None:
    """As newer generated code does beside it; gRPC asks these first."""
    server.add_registered_method_handlers(SERVICE, handlers)


def add_both(server: GatedServer, handlers: dict[str, Any]) -> None:
    """As generated code does."""
    add_generic(server, handlers)
    add_registered(server, handlers)


class Handlers:
    """One of each kind, which count how often they ran."""

    def __init__(self) -> None:
        self.ran = 0

    def all(self) -> dict[str, Any]:
        """Name of the method → handler."""
        return {
            "UnaryUnary": grpc.unary_unary_rpc_method_handler(self._one),
            "StreamUnary": grpc.stream_unary_rpc_method_handler(self._one),
            "UnaryStream": grpc.unary_stream_rpc_method_handler(self._many),
            "StreamStream": grpc.stream_stream_rpc_method_handler(self._many),
        }

    async def _one(self, _: object, __: object) -> bytes:
        self.ran += 1
        return b"in"

    async def _many(self, _: object, __: object) -> AsyncIterator[bytes]:
        self.ran += 1
        yield b"in"


def let_all_in(_: Caller, __: str) -> None:
    """The policy of a server that has none."""


def let_none_in(caller: Caller, method: str) -> None:
    """Deny everything, by the full name."""
    assert isinstance(caller, Anonymous)
    raise NotAuthorized(f"not {method}")


@asynccontextmanager
async def served(add: Add, authorize: Callable[[Caller, str], None]) -> AsyncIterator[tuple[Any, Handlers]]:
    """A channel to a server that serves all four kinds of method."""
    handlers = Handlers()
    gate = Gate(
        Authenticator(None, "parallax.local", lambda: datetime.now(UTC)),
        authorize,
        lambda _: None,
        lambda: datetime.now(UTC),
    )
    server = GatedServer(aio.server(), gate)
    add(server, handlers.all())
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel, handlers
    finally:
        await server.stop(None)


async def ask(channel: aio.Channel, method: str) -> list[bytes]:
    """Everything that *method* answers."""
    streams_in, streams_out = METHODS[method]
    kind = f"{'stream' if streams_in else 'unary'}_{'stream' if streams_out else 'unary'}"
    call = getattr(channel, kind)(f"/{SERVICE}/{method}")(iter([b"?"]) if streams_in else b"?", timeout=10)
    return [part async for part in call] if streams_out else [await call]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("add", [add_generic, add_registered, add_both])
async def test_whoever_is_let_in_reaches_the_handler(add: Add, method: str) -> None:
    async with served(add, let_all_in) as (channel, handlers):
        assert await ask(channel, method) == [b"in"]
        assert handlers.ran == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("add", [add_generic, add_registered, add_both])
async def test_whoever_is_not_let_in_does_not(add: Add, method: str) -> None:
    async with served(add, let_none_in) as (channel, handlers):
        with pytest.raises(aio.AioRpcError) as refused:
            await ask(channel, method)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
        assert refused.value.details() == f"not /{SERVICE}/{method}"
        assert handlers.ran == 0


async def test_a_method_that_nobody_serves_stays_unimplemented() -> None:
    async with served(add_both, let_none_in) as (channel, _):
        with pytest.raises(aio.AioRpcError) as refused:
            await channel.unary_unary(f"/{SERVICE}/Other")(b"?", timeout=10)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_connection_has_so_many_calls_at_once_and_others_have_theirs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "MAX_STREAMS", 4)
    plain = MTLSCredentialsProvider(MTLSConfig(enabled=False), identity=control_plane())
    server = new_server(plain, let_all_in, lambda _: None, 1024)
    may_end = asyncio.Event()

    async def wait(_: object, __: object) -> AsyncIterator[bytes]:
        yield b"in"
        await may_end.wait()

    add_registered(server, Handlers().all() | {"Wait": grpc.unary_stream_rpc_method_handler(wait)})
    async with serving(server, plain, "127.0.0.1:0", 0) as port:

        def dial() -> aio.Channel:
            own_connection = [("grpc.use_local_subchannel_pool", 1)]
            return aio.insecure_channel(f"127.0.0.1:{port}", options=own_connection)

        def ask(channel: aio.Channel, timeout_s: float = 10) -> Any:
            method: Any = channel.unary_unary(f"/{SERVICE}/UnaryUnary")
            return method(b"", timeout=timeout_s)

        async with dial() as full, dial() as other:
            begin: Any = full.unary_stream(f"/{SERVICE}/Wait")
            open_calls = [begin(b"") for _ in range(4)]
            assert [await call.read() for call in open_calls] == [b"in"] * 4
            with pytest.raises(aio.AioRpcError) as refused:
                await ask(full, 0.5)
            assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await ask(other) == b"in"
            open_calls[0].cancel()
            assert await ask(full) == b"in"
            may_end.set()
