"""Those who connect to the port and never shake hands: they are hung up on, and keep nobody out for long."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest
from grpc import aio

from parallax.protos import certificate_pb2, certificate_pb2_grpc
from parallax.runtime.server import HANDSHAKE_MS, OPEN_FILES
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.request import new_request

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki

FILES = 400
ROOM = int(FILES * OPEN_FILES)
FEW_FILES = ("sh", "-c", f'ulimit -n {FILES}; exec "$@"', "sh")


class Silent:
    """Connections on which nobody says anything."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._stack = ExitStack()
        self._sockets: list[socket.socket] = []

    def connect(self, count: int) -> None:
        for _ in range(count):
            one = self._stack.enter_context(socket.create_connection(("127.0.0.1", self._port)))
            one.settimeout(0)
            self._sockets.append(one)

    @property
    def open(self) -> int:
        """Those on which the server has not hung up."""
        return sum(map(_is_open, self._sockets))

    def close(self) -> None:
        self._stack.close()


def _is_open(one: socket.socket) -> bool:
    try:
        return bool(one.recv(1))
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


@asynccontextmanager
async def silent(fleet: Fleet) -> AsyncIterator[Silent]:
    crowd = Silent(fleet.port)
    try:
        yield crowd
    finally:
        crowd.close()


async def renew(channel: aio.Channel, within_s: float) -> None:
    """Something that has to be written before it is answered."""
    stub: Any = certificate_pb2_grpc.CertificateServiceStub(channel)
    request = new_request(Identity.parse_short("agent/agent-1"), generate_key())
    await stub.Renew(certificate_pb2.RenewRequest(csr=request), timeout=within_s, wait_for_ready=True)


@pytest.mark.timeout(60)
async def test_who_says_nothing_is_hung_up_on_and_others_get_in_meanwhile(
    children: Children, pki: Pki
) -> None:
    _, fleet = await children.fleet(pki)
    async with silent(fleet) as crowd:
        began = monotonic()
        crowd.connect(200)
        for _ in range(5):
            async with fleet.channel("agent/agent-1") as channel:
                await renew(channel, within_s=HANDSHAKE_MS / 1000)
        assert crowd.open == 200  # so it was meanwhile
        async with asyncio.timeout(HANDSHAKE_MS / 1000 + 10):
            while crowd.open:
                await asyncio.sleep(0.1)
        assert monotonic() - began > HANDSHAKE_MS / 1000 - 1


@pytest.mark.timeout(60)
async def test_more_than_there_is_room_for_take_neither_files_nor_who_is_there(
    children: Children, pki: Pki
) -> None:
    _, fleet = await children.fleet(pki, *FEW_FILES)
    async with fleet.channel("agent/agent-1") as known, silent(fleet) as crowd:
        await renew(known, within_s=HANDSHAKE_MS / 1000)
        crowd.connect(FILES)
        async with asyncio.timeout(HANDSHAKE_MS / 1000):
            while crowd.open > ROOM:
                await asyncio.sleep(0.1)
        assert crowd.open > ROOM // 2
        await renew(known, within_s=HANDSHAKE_MS / 1000)
        assert (await fleet.http("/healthz"))[0] == 200
        async with fleet.channel("agent/agent-1") as newcomer:
            await renew(newcomer, within_s=HANDSHAKE_MS / 1000 + 10)
