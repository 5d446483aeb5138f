"""When an agent tries to have its own certificate exchanged, and when it does not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from parallax.sdk.cli.self_sign import sign_self
from parallax.sdk.enrolling import Edge
from parallax.sdk.exchanging import Exchanger
from parallax.sdk.testing import ThrowawayPKI
from parallax.security.config import MTLSConfig
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, save_leaf
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.renewal import LONGEST_RETRY

HOST: Final = "127.0.0.1"
WHO: Final = Identity.parse_short("agent/07048933")
DAY: Final = timedelta(days=1)
MINUTE: Final = timedelta(minutes=1)
WITHIN_S: Final = 15.0


class Door(asyncio.Protocol):
    """
    A port that hangs up on everybody.

    Attributes:
        knocks: How many came.
    """

    def __init__(self) -> None:
        self.port = 0
        self.knocks = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.knocks += 1
        transport.close()

    async def knocked(self, times: int) -> None:
        """Wait until so many came."""
        deadline = time.monotonic() + WITHIN_S
        while self.knocks < times:
            assert time.monotonic() < deadline, f"{self.knocks} of {times}"
            await asyncio.sleep(0.01)


@asynccontextmanager
async def new_door() -> AsyncIterator[Door]:
    door = Door()
    server = await asyncio.get_running_loop().create_server(lambda: door, HOST, 0)
    async with server:
        door.port = server.sockets[0].getsockname()[1]
        yield door


@pytest.fixture
async def port() -> AsyncIterator[Door]:
    """Of a control plane that does not let it in."""
    async with new_door() as door:
        yield door


@pytest.fixture
async def edge() -> AsyncIterator[Door]:
    """Where one enrolls."""
    async with new_door() as door:
        yield door


Make = Callable[..., Exchanger]


@pytest.fixture
def make(tmp_path: Path, port: Door, edge: Door) -> Make:
    """What exchanges a certificate that its holder has signed itself."""

    def make(lifetime: timedelta = DAY, later: timedelta = timedelta(0)) -> Exchanger:
        now = datetime.now(UTC)
        key, bundle = generate_key(), ThrowawayPKI().authority.bundle
        own = sign_self(WHO, key, lifetime, now)
        save_leaf(tmp_path, Layout.PARALLAX, WHO, (own,), key, bundle)
        provider = MTLSCredentialsProvider(MTLSConfig(enabled=True, certs_dir=tmp_path), identity=WHO)
        keep = provider.keeper(provider.rotator(DAY))
        assert provider.store is not None
        assert keep is not None
        dial = partial(provider.channel, f"{HOST}:{port.port}", control_plane())
        doors = (HOST, port.port), Edge(HOST, edge.port)
        return Exchanger(provider.store, keep, dial, *doors, clock=lambda: now + later)

    return make


@asynccontextmanager
async def running(exchanger: Exchanger) -> AsyncIterator[None]:
    """It runs meanwhile."""
    task = asyncio.create_task(exchanger.run())
    yield
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()


@pytest.mark.parametrize(("lifetime", "longest"), [(DAY, LONGEST_RETRY), (10 * MINUTE, MINUTE)])
async def test_the_pause_after_each_try_is_twice_that_before_up_to_a_limit(
    make: Make, lifetime: timedelta, longest: timedelta
) -> None:
    """An hour, and a tenth of what is left until the certificate ends."""
    exchanger = make(lifetime)
    pauses = [(await exchanger._try()).total_seconds() for _ in range(14)]
    assert 1 <= pauses[0] <= 2
    assert longest.total_seconds() / 2 <= pauses[-1] <= longest.total_seconds()
    for pause, after in pairwise(pauses):
        assert after == pytest.approx(min(2 * pause, pauses[-1]))


async def test_one_that_is_not_let_in_is_to_be_exchanged(make: Make, edge: Door) -> None:
    async with running(make()):
        await edge.knocked(2)  # whether somebody is there, and to ask


async def test_one_that_has_ended_is_left_alone(make: Make, port: Door, edge: Door) -> None:
    """Nobody would exchange it: no key is made, and nothing sent."""
    async with running(make(later=DAY + MINUTE)):
        await port.knocked(3)  # others may have put another in place, or the clock be wrong
    assert not edge.knocks
