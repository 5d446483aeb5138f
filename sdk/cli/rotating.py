"""The rotation of the fleet's CA and root: asked for, watched, and shown."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import TYPE_CHECKING, Final

from parallax.protos import root_pb2, root_pb2_grpc
from parallax.sdk.client import READ_S

if TYPE_CHECKING:
    from grpc import aio

    from parallax.sdk.client import ParallaxClient

LOOK_S: Final = 1.0
_SHOWN: Final = 5
_NEVER_ASKED: Final = "has never asked for a certificate"

_STAGES: Final = {
    root_pb2.ROOT_STAGE_IDLE: "idle",
    root_pb2.ROOT_STAGE_PREPARED: "prepared",
    root_pb2.ROOT_STAGE_ACTIVE: "active",
    root_pb2.ROOT_STAGE_RETIRING: "retiring",
    root_pb2.ROOT_STAGE_ABORTING: "aborting",
}
_MEANING: Final = {
    "idle": "no rotation is under way",
    "prepared": "everybody is told the roots of both CAs; the old one signs",
    "active": "the new CA signs; leaves of the old one are still in use",
    "retiring": "the old CA is being taken out",
    "aborting": "the new CA is being taken out",
}


async def status(client: ParallaxClient) -> root_pb2.RootRotation:
    """How it stands."""
    async with client._asking(_roots) as stub:  # noqa: SLF001 - our own
        return (await stub.GetRootRotation(root_pb2.GetRootRotationRequest(), timeout=READ_S)).rotation


async def rotate(client: ParallaxClient, without: Sequence[str], *, force: bool) -> root_pb2.RootRotation:
    """Begin, or go on without some."""
    request = root_pb2.RotateRootRequest(without=without, force=force)
    async with client._asking(_roots) as stub:  # noqa: SLF001
        return (await stub.RotateRoot(request, timeout=READ_S)).rotation


async def abort(client: ParallaxClient) -> root_pb2.RootRotation:
    """Take it back."""
    async with client._asking(_roots) as stub:  # noqa: SLF001
        return (await stub.AbortRootRotation(root_pb2.AbortRootRotationRequest(), timeout=READ_S)).rotation


async def steps(client: ParallaxClient) -> AsyncGenerator[root_pb2.RootRotation]:
    """How it stands each time that is other than before, until it has ended."""
    told: root_pb2.RootRotation | None = None
    while True:
        now = await status(client)
        if now != told:
            told = now
            yield now
        if now.stage == root_pb2.ROOT_STAGE_IDLE:
            return
        await asyncio.sleep(LOOK_S)


def stage_of(rotation: root_pb2.RootRotation) -> str:
    """Its stage, in a word."""
    return _STAGES.get(rotation.stage, "of a newer control plane")


def to_json(rotation: root_pb2.RootRotation) -> dict[str, object]:
    """For programs."""
    return {
        "stage": stage_of(rotation),
        "old_issuer": rotation.old_issuer or None,
        "new_issuer": rotation.new_issuer or None,
        "missing": list(rotation.missing),
        "missing_count": rotation.missing_count,
        "without": list(rotation.without),
        "cannot_renew": list(rotation.cannot_renew),
        "adoption": rotation.adoption,
        "problem": rotation.problem or None,
    }


def as_lines(rotation: root_pb2.RootRotation) -> list[tuple[str, str]]:
    """For people: what there is to say but who is missing."""
    stage = stage_of(rotation)
    lines = [("stage", f"{stage}: {_MEANING.get(stage, 'update this command')}")]
    if rotation.old_issuer:
        lines += [("old CA", rotation.old_issuer), ("new CA", rotation.new_issuer)]
        lines.append(("adoption", f"{rotation.adoption:.0%} have the roots that they are told"))
    if rotation.without:
        lines.append(("without", ", ".join(rotation.without)))
    if rotation.problem:
        lines.append(("problem", rotation.problem))
    return lines


def members(rotation: root_pb2.RootRotation) -> list[tuple[str, str]]:
    """Who there is something to do about, and what."""
    stage = stage_of(rotation)
    lacks = "has not adopted the roots" if stage == "prepared" else "depends on a leaf that is to go"
    by_hand = set(rotation.cannot_renew)
    advice = f"; {_NEVER_ASKED}: it may need one from 'parallax certs issue'"
    return [(name, f"{lacks}{advice if name in by_hand else ''}") for name in rotation.missing] + [
        (name, _NEVER_ASKED) for name in rotation.cannot_renew if name not in rotation.missing
    ]


def progress(rotation: root_pb2.RootRotation) -> str:
    """One line."""
    stage = stage_of(rotation)
    if rotation.problem:
        return f"{stage}: {rotation.problem}"
    if not rotation.missing_count:
        return f"{stage}: {_MEANING.get(stage, '')}"
    names = ", ".join(rotation.missing[:_SHOWN])
    more = rotation.missing_count - min(_SHOWN, len(rotation.missing))
    return f"{stage}: waiting for {names}{f' and {more} more' if more else ''}"


def _roots(channel: aio.Channel) -> root_pb2_grpc.RootServiceAsyncStub:
    return root_pb2_grpc.RootServiceStub(channel)
