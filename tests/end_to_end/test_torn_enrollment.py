"""An enrollment that is cut off, at either end: nothing is lost, and the same again completes it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from grpc import aio

from parallax.protos import enrollment_pb2, enrollment_pb2_grpc
from parallax.sdk.enrolling import Edge, Enrolling
from parallax.security.errors import EnrollmentError, Unavailable
from parallax.security.identity import DEFAULT_TRUST_DOMAIN, Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout
from parallax.security.root_pin import RootPin
from tests.end_to_end.relay import relay
from tests.end_to_end.test_enrollment import redeem, token
from tests.end_to_end.test_exchange import pins

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Children, Fleet, Pki, Serve

ROOT = Path(__file__).parents[2]
NEWCOMERS = Path(__file__).with_name("torn_newcomer.py")


@pytest.fixture
async def fleet(serve: Serve) -> AsyncIterator[Fleet]:
    async with serve(http_listen="127.0.0.1:0") as running:
        yield running


async def redeemed(fleet: Fleet) -> int:
    """How often the one token that there is was."""
    async with fleet.channel("client/admin") as channel:
        stub = enrollment_pb2_grpc.EnrollmentServiceStub(channel)
        (listed,) = (await stub.ListTokens(enrollment_pb2.ListTokensRequest(), timeout=10)).tokens
    return int(listed.redeemed_count)


# The end that enrolls.


# What it types beside where and by which token, and for which names that is; RSA-4096 keys would take long.
WORDS = {
    "agent": ((), "edge-*"),
    "device": (("--device", "--key-type", "p256"), "#"),
    "device that signs itself": (("--device", "--key-type", "p256", "--self-signed"), "#"),
}


async def cut_off(fleet: Fleet, mode: str, who: str, layout: Layout, directory: Path) -> int:
    """How many were, and have enrolled all the same; see `torn_newcomer.py`."""
    words, names = WORDS[who]
    secret = await token(fleet, names, uses=1_000)
    pin, url = RootPin.of(fleet.pki.authority.certificate), f"https://127.0.0.1:{fleet.http_port}"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, NEWCOMERS, mode, layout, directory),
        *(*words, "--token", secret, "--pin", str(pin), "--url", url),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    async with asyncio.timeout(80):
        said, wrong = await process.communicate()
    assert process.returncode == 0, wrong.decode()
    count = int(said.split()[-1])
    assert await redeemed(fleet) == count + 1, "one who came again was counted as another"
    if "--self-signed" in words:
        assert len(await pins(fleet)) == count + 1
    return count


@pytest.mark.timeout(90)
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("who", WORDS)
async def test_killed_before_any_call_it_leaves_what_the_same_command_completes(
    fleet: Fleet, tmp_path: Path, who: str, layout: Layout
) -> None:
    assert await cut_off(fleet, "killed", who, layout, tmp_path) > 30


@pytest.mark.timeout(90)
@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("who", WORDS)
async def test_on_a_full_disk_it_says_so_and_the_same_command_completes_it_once_there_is_room(
    fleet: Fleet, tmp_path: Path, who: str, layout: Layout
) -> None:
    assert await cut_off(fleet, "full", who, layout, tmp_path) == 5


# The control plane.


@pytest.mark.timeout(120)
@pytest.mark.parametrize("held", [True, False])
async def test_a_control_plane_killed_before_its_answer_arrives_gives_the_same_key_its_certificate(
    children: Children, pki: Pki, *, held: bool
) -> None:
    """With the answer held back, so that it is lost for certain; and a moment after it was asked."""
    identities = [Identity.parse_short(f"agent/edge-{number}") for number in range(3)]
    keys = [generate_key() for _ in identities]
    plane, fleet = await children.fleet(pki, PARALLAX_HTTP_LISTEN="127.0.0.1:0")
    secret = await token(fleet, "edge-*", uses=len(identities))
    for number, (identity, key) in enumerate(zip(identities, keys, strict=True)):

        async def is_answer(fleet: Fleet = fleet, number: int = number) -> bool:
            try:
                return await redeemed(fleet) > number
            except aio.AioRpcError:  # it is killed meanwhile
                return True

        async with relay(fleet.http_port, loses=is_answer if held else None) as (port, cut):
            asking = Enrolling(
                Edge("127.0.0.1", port), {RootPin.of(pki.authority.certificate)}, DEFAULT_TRUST_DOMAIN
            )
            attempt = asyncio.create_task(asyncio.to_thread(asking.redeem, secret, identity, key))
            if held:
                await plane.said("identity enrolled")
            else:
                await asyncio.sleep(0.02 * number)
            await plane.stop(signal.SIGKILL)
            cut()
            with pytest.raises(Unavailable) if held else suppress(Unavailable):
                await attempt
        plane, fleet = await children.fleet(pki, PARALLAX_HTTP_LISTEN="127.0.0.1:0")
        again = await redeem(fleet, secret, identity, key)
        assert again.leaf.public_key() == key.public_key()
        assert await redeemed(fleet) == number + 1
    with pytest.raises(EnrollmentError):
        await redeem(fleet, secret, Identity.parse_short("agent/edge-9"))
