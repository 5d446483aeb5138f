"""A pin is a handshake that a port has gone on with, or an error."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import grpc.aio
import pytest

from parallax.security.pin import HandshakePin, Where, address_of, where_to_dial

ANSWER = bytes.fromhex("160303007a")  # the head of a record that carries a ServerHello
ALERT = bytes.fromhex("15030300020228")  # fatal, handshake_failure

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(answer: Answer) -> AsyncIterator[Where]:
    """A port where *answer* speaks, until the peer hangs up."""
    async with asyncio.timeout(10), asyncio.TaskGroup() as group:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                await answer(reader, writer)
                await reader.read()
            except ConnectionError:
                pass
            finally:
                writer.close()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            group.create_task(serve(reader, writer))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[:2]


async def test_it_is_open_once_tls_answers() -> None:
    hello = asyncio.Queue[bytes]()
    over = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello.put_nowait(await reader.read(4096))
        writer.write(ANSWER)
        with suppress(ConnectionError):
            assert await reader.read() == b""  # no alert
        over.set()

    async with listening(answer) as where:
        pin = await HandshakePin.open(where)
        assert not over.is_set()
        pin.close()
        await over.wait()
        pin.close()  # a second time changes nothing
    said = await hello.get()
    assert said[0] == 0x16
    assert len(said) == 5 + int.from_bytes(said[3:5])


async def test_its_hello_is_one_that_openssl_answers() -> None:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        incoming.write(await reader.read(4096))
        with pytest.raises(ssl.SSLError) as refused:
            context.wrap_bio(incoming, outgoing, server_side=True).do_handshake()
        assert refused.value.reason == "NO_SHARED_CIPHER"  # for want of a certificate; the hello is good
        writer.write(ANSWER)

    async with listening(answer) as where:
        (await HandshakePin.open(where)).close()


async def test_two_hellos_differ() -> None:
    """RFC 8446 §4.1.2: its random is never the same."""
    hellos: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hellos.append(await reader.read(4096))
        writer.write(ANSWER)

    async with listening(answer) as where:
        for _ in range(2):
            (await HandshakePin.open(where)).close()
    assert hellos[0] != hellos[1]


class TestNoPin:
    """The same port with one thing wrong."""

    async def test_where_it_refuses(self) -> None:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(ALERT)

        async with listening(answer) as where:
            with pytest.raises(OSError, match="does not go on with the handshake"):
                await HandshakePin.open(where)

    async def test_where_it_hangs_up(self) -> None:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.close()

        async with listening(answer) as where:
            with pytest.raises(OSError):  # noqa: PT011 - whether it is reset depends on what is unread
                await HandshakePin.open(where)

    async def test_where_it_only_accepts(self) -> None:
        """That the system has accepted a connection does not mean that gRPC has."""

        async def answer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await reader.read()

        async with listening(answer) as where:
            with pytest.raises(TimeoutError):
                await HandshakePin.open(where, limit_s=0.1)

    async def test_where_it_speaks_plaintext(self) -> None:
        server = grpc.aio.server()
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with pytest.raises(OSError, match="does not go on with the handshake"):
            await HandshakePin.open(("127.0.0.1", port))
        await server.stop(0)

    async def test_where_nobody_listens(self) -> None:
        async with listening(lambda *_: asyncio.sleep(0)) as where:
            pass
        with pytest.raises(ConnectionRefusedError):
            await HandshakePin.open(where)
        with pytest.raises(FileNotFoundError):
            await HandshakePin.open("/nowhere/socket")

    async def test_if_it_is_cancelled(self) -> None:
        said, over = asyncio.Event(), asyncio.Event()

        async def answer(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
            await reader.readexactly(1)
            said.set()
            with suppress(ConnectionError):
                await reader.read()
            over.set()

        async with listening(answer) as where, asyncio.TaskGroup() as group:
            opening = group.create_task(HandshakePin.open(where))
            await said.wait()
            opening.cancel()
            await over.wait()


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 7)),
        ("localhost:50051", ("localhost", 7)),
        ("dns:///agents.example:0", ("agents.example", 7)),
        ("ipv4:10.0.0.1:0", ("10.0.0.1", 7)),
        ("[::1]:0", ("::1", 7)),
        ("ipv6:[fd00::1]:0", ("fd00::1", 7)),
        ("0.0.0.0:50051", ("127.0.0.1", 7)),
        ("[::]:50051", ("127.0.0.1", 7)),
        ("ipv6:[::]:50051", ("127.0.0.1", 7)),
        ("0:50051", ("127.0.0.1", 7)),
        ("[fe80::1%lo]:1", ("127.0.0.1", 7)),
        ("unix:/run/parallax", "/run/parallax"),
        ("unix:///run/parallax", "/run/parallax"),
        ("unix:socket", "socket"),
        ("unix-abstract:parallax", "\0parallax"),
    ],
)
def test_an_own_port_is_dialled_where_it_was_bound(address: str, where: Where) -> None:
    assert where_to_dial(address, 7) == where


@pytest.mark.parametrize(
    ("where", "address"),
    [
        (("127.0.0.1", 7), "127.0.0.1:7"),
        (("localhost", 7), "localhost:7"),
        (("::1", 7), "[::1]:7"),
        ("/run/parallax", "unix:/run/parallax"),
        ("\0parallax", "unix-abstract:parallax"),
    ],
)
def test_grpc_is_told_the_same(where: Where, address: str) -> None:
    assert address_of(where) == address
