"""
Who takes part in a storm: `server DIRECTORY ROTATIONS HOW` and `clients DIRECTORY PORT RATE`.

Both say what they see in lines of JSON on standard output, and stop when their standard input ends. The
server changes nothing before it is told to by a line there.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Any, Final

import grpc
from cryptography import x509
from grpc import aio

from identities import CLIENT, files, ssl_context
from identities import tls as settings
from parallax.runtime.loop import run
from parallax.runtime.server import new_server, serving
from parallax.security import CertificateAuthority, Credentials, CredentialStore, Identity
from parallax.security.credentials import Served
from parallax.security.identity import control_plane
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, save_leaf
from parallax.security.pin import hello
from parallax.security.port import Swapped
from parallax.security.profiles import LeafProfile
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.tls import certificate_configuration

WITHIN_S: Final = 20.0
KEPT: Final = 20
METHOD: Final = "/test.Storm/Echo"
OPTIONS: Final = [
    ("grpc.ssl_target_name_override", control_plane().dns_name),
    (
        "grpc.use_local_subchannel_pool",
        1,
    ),  # a connection of its own, though there are others to the same port
]
RESET: Final = struct.pack("ii", 1, 0)  # closed without TIME_WAIT: ports would run out within half a minute


class How(StrEnum):
    """How the server changes its certificate."""

    PINNED = "pinned"
    """As Parallax does."""
    BARE = "bare"
    """Once per change, as gRPC's documentation has it."""
    ALWAYS = "always"
    """A configuration at every handshake, which gRPC's documentation allows."""


# Share of all connections, and how many at once: where a machine is slow, the rate falls.
KINDS: Final = {
    "tcp": (0.56, 64),
    "stalled": (0.2, 256),
    "hello and away": (0.2, 64),
    "tls": (0.02, 8),
    "grpc": (0.02, 8),
}
GOOD: Final = ("tls", "grpc")


def tell(**what: Any) -> None:
    """Say it to who started us."""
    print(json.dumps(what), flush=True)


async def standard_input() -> asyncio.StreamReader:
    """What we are told: to stop, once it ends."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


# The server.


async def _echo(request: bytes, _: object) -> bytes:
    return request


class _Echo(grpc.GenericRpcHandler):
    def service(self, _: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes]:
        return grpc.unary_unary_rpc_method_handler(_echo)


async def serve(directory: Path, rotations: int, how: How) -> None:
    """Serve, and change the certificate so many times, each as soon as the one before is in force."""
    now = datetime.now(UTC)
    authority = CertificateAuthority.create(now=now)

    def make(identity: Identity) -> Credentials:
        key = generate_key()
        issued = authority.issue(identity, key.public_key(), LeafProfile(), now)
        return Credentials(issued.chain, key, issued.bundle)

    for identity in (control_plane(), Identity.parse_short(f"client/{CLIENT}")):
        own = make(identity)
        save_leaf(directory, Layout.PARALLAX, identity, own.chain, own.key, own.bundle)
    provider = MTLSCredentialsProvider(settings(directory), identity=control_plane())
    store = provider.store
    assert store is not None  # noqa: S101 - TLS is enabled
    server = new_server(provider, lambda *_: None, lambda _: None, 1 << 20)
    server.add_generic_rpc_handlers((_Echo(),))
    swaps: asyncio.Queue[Swapped] = asyncio.Queue()
    provider.on_swap = swaps.put_nowait
    listening = serving(server, provider, "127.0.0.1:0", 1.0)
    if how is not How.PINNED:
        listening = _careless(server, store, swaps, always=how is How.ALWAYS)
    async with AsyncExitStack() as stack:
        port = await stack.enter_async_context(listening)
        tell(port=port, serial=store.current.leaf.serial_number)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        told = await standard_input()
        await told.readline()
        rotating = group.create_task(_rotate(store, swaps, rotations, lambda: make(control_plane())))
        await told.read()
        rotating.cancel()
    tell(bye=True)


async def _rotate(
    store: CredentialStore, swaps: asyncio.Queue[Swapped], rotations: int, make: Callable[[], Credentials]
) -> None:
    for _ in range(rotations):
        new = make()
        published = monotonic()
        store.publish(new, datetime.now(UTC))
        result = await swaps.get()
        tell(serial=new.leaf.serial_number, published=published, in_force=monotonic(), result=result)
    tell(done=True)


@asynccontextmanager
async def _careless(
    server: aio.Server, store: CredentialStore, swaps: asyncio.Queue[Swapped], *, always: bool
) -> AsyncIterator[int]:
    """*server* on a port that changes its certificate without a pin."""
    served = store.current
    loop = asyncio.get_running_loop()

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal served
        current = store.current
        if current is served and not always:
            return None
        if current is not served:
            served = current
            loop.call_soon_threadsafe(swaps.put_nowait, Swapped.UNPINNED)
        return certificate_configuration(Served(current))

    credentials = grpc.dynamic_ssl_server_credentials(
        certificate_configuration(Served(served)),
        fetch,  # type: ignore[arg-type]  # the stub forgets that None is an answer
        require_client_authentication=True,
    )
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(1.0)


# The clients.


class Storm:
    """All kinds of connections to one port, at a steady rate, and how they ended."""

    def __init__(self, directory: Path, port: int) -> None:
        self.done: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.failures: list[str] = []
        self.seen: list[tuple[int, float, float]] = []
        cert, key, ca = (path.read_bytes() for path in files(directory, CLIENT))
        self._credentials = grpc.ssl_channel_credentials(ca, key, cert)
        self._where = ("127.0.0.1", port)
        self._context = ssl_context(directory, CLIENT)
        self._context.set_alpn_protocols(["h2"])
        self._open: dict[str, Callable[[], Awaitable[None]]] = {
            "tcp": self._tcp,
            "stalled": self._stalled,
            "hello and away": self._away,
            "tls": self._tls,
            "grpc": self._grpc,
        }

    async def blow(self, rate: float) -> None:
        """Open *rate* connections a second, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for kind, (share, at_once) in KINDS.items():
                group.create_task(self._keep_opening(kind, rate * share, asyncio.Semaphore(at_once)))

    async def _keep_opening(self, kind: str, rate: float, room: asyncio.Semaphore) -> None:
        began, opened = monotonic(), 0
        async with asyncio.TaskGroup() as group:
            while True:
                due = int((monotonic() - began) * rate)
                for _ in range(due - opened):
                    await room.acquire()
                    group.create_task(self._one(kind, room))
                opened = due
                await asyncio.sleep(0.005)

    async def _one(self, kind: str, room: asyncio.Semaphore) -> None:
        try:
            async with asyncio.timeout(WITHIN_S):
                await self._open[kind]()
        except (OSError, aio.AioRpcError, EOFError) as exc:
            self.failed[kind] += 1
            if len(self.failures) < KEPT:
                cause = (
                    exc.code().name if isinstance(exc, aio.AioRpcError) else str(exc) or type(exc).__name__
                )
                self.failures.append(f"{kind}: {cause}")
        else:
            self.done[kind] += 1
        finally:
            room.release()

    async def _tcp(self) -> None:
        (await self._connect()).close()

    async def _stalled(self) -> None:
        with await self._connect() as connection:
            await asyncio.get_running_loop().sock_sendall(connection, hello())
            await asyncio.get_running_loop().sock_recv(connection, 1)
            await asyncio.sleep(0.5)

    async def _away(self) -> None:
        with await self._connect() as connection:
            await asyncio.get_running_loop().sock_sendall(connection, hello())

    async def _connect(self) -> socket.socket:
        connection = socket.socket()
        connection.settimeout(0)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        try:
            await asyncio.get_running_loop().sock_connect(connection, self._where)
        except BaseException:
            connection.close()
            raise
        return connection

    async def _tls(self) -> None:
        """Let in, and shown a certificate, whose serial is noted."""
        began = monotonic()
        reader, writer = await asyncio.open_connection(
            *self._where, ssl=self._context, server_hostname=control_plane().dns_name
        )
        try:
            secured: ssl.SSLObject = writer.get_extra_info("ssl_object")
            leaf = x509.load_der_x509_certificate(secured.getpeercert(binary_form=True) or b"")
            self.seen.append((leaf.serial_number, began, monotonic()))
            await reader.readexactly(
                9
            )  # the head of a frame: HTTP/2 begins once we were let in (RFC 9113 §3.4)
        finally:
            writer.close()

    async def _grpc(self) -> None:
        host, port = self._where
        async with aio.secure_channel(f"{host}:{port}", self._credentials, options=OPTIONS) as opened:
            echo: aio.UnaryUnaryMultiCallable[bytes, bytes] = opened.unary_unary(METHOD)
            await echo(b"still there?", timeout=WITHIN_S)


async def storm(directory: Path, port: int, rate: float) -> None:
    """Blow until told to stop."""
    clients = Storm(directory, port)
    began = monotonic()
    async with asyncio.TaskGroup() as group:
        blowing = group.create_task(clients.blow(rate))
        tell(blows=True)
        await (await standard_input()).read()
        blowing.cancel()
    tell(
        seconds=monotonic() - began,
        done=clients.done,
        failed=clients.failed,
        failures=clients.failures,
        seen=clients.seen,
    )


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["server", directory, rotations, how]:
            run(serve(Path(directory), int(rotations), How(how)))
        case ["clients", directory, port, rate]:
            run(storm(Path(directory), int(port), float(rate)))
