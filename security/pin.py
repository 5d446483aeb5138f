"""A TLS handshake with our own port that we begin and do not go on with."""

from __future__ import annotations

import asyncio
import ssl
from contextlib import suppress
from functools import cache
from time import monotonic
from typing import TYPE_CHECKING, Final, Self, TypeAlias

from parallax.security.tls import host_of

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

Where: TypeAlias = tuple[str, int] | str
"""Host and port, or the path of a Unix socket; an abstract one begins with NUL."""

LIMIT_S: Final = 2.0  # a port that takes longer to answer is not pinned now, but tried again
_LOOPBACK: Final = "127.0.0.1"
_HANDSHAKE: Final = b"\x16"  # a record of TLS that carries a handshake (RFC 8446 §5.1), not an alert


class HandshakePin:
    """
    While open, gRPC does not free the TLS context that its port answered with.

    The handshaker of gRPC core holds a reference to the context that it was made from, and lives as long as
    the handshake goes on. That it exists is certain from the first byte it sends; that a connection
    is accepted by the system says nothing.

    Attributes:
        since: When it was begun, on the monotonic clock; the port may give up on it some time after that.
    """

    def __init__(self, since: float, writer: StreamWriter) -> None:
        self.since = since
        self._writer = writer

    @classmethod
    async def open(cls, where: Where, limit_s: float = LIMIT_S) -> Self:
        """
        Say hello at *where*, and wait until TLS answers.

        Raises:
            OSError: It cannot be reached, did not answer within *limit_s*, or refused.
        """
        since = monotonic()
        async with asyncio.timeout(limit_s):
            reader, writer = await _connect(where)
            pin = cls(since, writer)
            try:
                writer.write(hello())
                await _expect_handshake(reader)
            except BaseException:
                pin.close()
                raise
        return pin

    def close(self) -> None:
        """Hang up without an alert: to gRPC a handshake that never was, without a line about it."""
        self._writer.transport.abort()


def where_to_dial(address: str, port: int) -> Where:
    """Where this host reaches what gRPC bound as *address*, which got *port*."""
    for scheme, prefix in (("unix-abstract:", "\0"), ("unix:", "")):
        if address.startswith(scheme):
            return prefix + address.removeprefix(scheme).removeprefix("//")
    host = host_of(address)
    # For a wildcard gRPC takes all interfaces, of IPv4 and IPv6 alike.
    return (_LOOPBACK if host in {None, "0.0.0.0", "::", "0"} else host, port)  # noqa: S104 - not bound


def address_of(where: Where) -> str:
    """*where* as gRPC writes it."""
    match where:
        case str() if where.startswith("\0"):
            return f"unix-abstract:{where[1:]}"
        case str():
            return f"unix:{where}"
        case host, port:
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _connect(where: Where) -> tuple[StreamReader, StreamWriter]:
    if isinstance(where, str):
        return await asyncio.open_unix_connection(where)
    return await asyncio.open_connection(*where)


async def _expect_handshake(reader: StreamReader) -> None:
    answer = await reader.read(1)
    if answer != _HANDSHAKE:
        raise ConnectionAbortedError("the port does not go on with the handshake")


def hello() -> bytes:
    """A new ClientHello, as a client sends it that will take whatever TLS the port speaks."""
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):  # it waits for an answer, which it will never see
        _context().wrap_bio(ssl.MemoryBIO(), outgoing).do_handshake()
    return outgoing.read()


@cache
def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # nothing is sent but the hello, and nothing that comes back believed
    return context
