"""A network between two ends that a test can make slow, or break."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager


@asynccontextmanager
async def relay(
    to_port: int, *, delay_s: float = 0, loses: Callable[[], Awaitable[bool]] | None = None
) -> AsyncIterator[tuple[int, Callable[[], None]]]:
    """
    A port that leads to another, *delay_s* away, and a function that breaks all connections through it.

    Args:
        loses: Asked of whatever comes back whether it is lost.
    """
    writers: set[asyncio.StreamWriter] = set()
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_back: bool) -> None:
        try:
            while data := await reader.read(65_536):
                await asyncio.sleep(delay_s)
                if not (is_back and loses is not None and await loses()):
                    writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", to_port)
        writers.update((writer, back))
        pumps.add(asyncio.create_task(pump(reader, back, is_back=False)))
        pumps.add(asyncio.create_task(pump(there, writer, is_back=True)))

    def cut() -> None:
        for writer in writers:
            writer.transport.abort()
        writers.clear()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], cut
        cut()
        await asyncio.wait(pumps)
