"""A control plane whose disk is full: what changes something is refused with the cure, and reads go on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from google.protobuf.duration_pb2 import Duration
from grpc import StatusCode, aio

from parallax.protos import enrollment_pb2, enrollment_pb2_grpc
from parallax.security.errors import StorageFailed
from tests.end_to_end.test_audit import asked, renew
from tests.end_to_end.test_enrollment import redeem, token
from tests.end_to_end.test_revocation import is_refused, list_agents, listed, revoke

if TYPE_CHECKING:
    from tests.end_to_end.conftest import Child, Children, Fleet, Pki

DISK: Final = 4 << 20
MOUNT: Final = f'mount -t tmpfs -o size={DISK} none "$PARALLAX_DATA_DIR" && exec "$@"'


@pytest.fixture
def small(tmp_path: Path, own_mounts: tuple[str, ...]) -> tuple[str, ...]:
    """What a program is run by that has a small disk of its own at `data`, which it alone sees."""
    (tmp_path / "data").mkdir()
    return (*own_mounts, "sh", "-c", MOUNT, "sh")


def fill(plane: Child, data: Path) -> Path:
    """Take all the room that *plane* has, as its processes see the disk; what has taken it."""
    ballast = Path(f"/proc/{plane.process.pid}/root{data}/ballast")
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4_096)):
                pass
        except OSError:
            return ballast
    raise AssertionError("it has no end")


async def is_not_recorded(call: Awaitable[object]) -> bool:
    """Whether *call* is refused for the disk, with what to do about that; any other end is an error."""
    with pytest.raises(aio.AioRpcError, match="is full: make room") as refused:
        await call
    trailers = dict(refused.value.trailing_metadata() or ())
    return (refused.value.code(), trailers["parallax-error"]) == (StatusCode.UNAVAILABLE, "StorageFailed")


async def create_token(fleet: Fleet) -> None:
    grant = enrollment_pb2.TokenGrant(kind="agent", names="agent-8", uses=1)
    request = enrollment_pb2.CreateTokenRequest(grant=grant, ttl=Duration(seconds=60))
    async with fleet.channel("client/admin") as channel:
        await enrollment_pb2_grpc.EnrollmentServiceStub(channel).CreateToken(request, timeout=10)


async def storage(fleet: Fleet) -> str:
    _, text = await fleet.http("/readyz")
    return str(json.loads(text)["detail"]["storage"])


@pytest.mark.timeout(60)
async def test_on_a_full_disk_changes_are_refused_with_the_cure_and_reads_go_on(
    children: Children, pki: Pki, tmp_path: Path, small: tuple[str, ...]
) -> None:
    data = tmp_path / "data"
    settings = {"PARALLAX_DATA_DIR": str(data), "PARALLAX_HTTP_LISTEN": "127.0.0.1:0"}
    plane, fleet = await children.fleet(pki, *small, **settings)
    secret = await token(fleet)
    await revoke(fleet, identity="client/ci")
    ballast = await asyncio.to_thread(fill, plane, data)
    for number in range(1_000):  # there may be room left in the files themselves
        try:
            await revoke(fleet, identity=f"agent/edge-{number}")
        except aio.AioRpcError:
            break
    before = len(await listed(fleet))
    assert await is_not_recorded(revoke(fleet, identity="client/cli"))
    assert await is_not_recorded(renew(fleet, "agent/agent-1"))
    assert await is_not_recorded(create_token(fleet))
    with pytest.raises(StorageFailed, match=r"cannot record anything now \(full\)") as told:
        await redeem(fleet, secret)
    assert str(data) not in str(told.value)  # he is a stranger yet
    await plane.said("nothing is recorded", fault="full")
    assert await storage(fleet) == "full"

    await list_agents(fleet, "client/cli")  # which was not revoked
    assert await is_refused(list_agents(fleet, "client/ci"))
    assert len(await listed(fleet)) == before
    assert (await asked(fleet)).entries

    await asyncio.to_thread(ballast.unlink)
    await redeem(fleet, secret)
    await revoke(fleet, identity="client/cli")
    assert await is_refused(list_agents(fleet, "client/cli"))
    assert await storage(fleet) == "ok"
