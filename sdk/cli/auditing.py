"""The control plane's audit log, read, shown and verified."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, Final

from parallax.control_plane.audit import START, Entry, Head
from parallax.control_plane.audit_chain import Chain
from parallax.control_plane.audit_reader import AuditPage, AuditReader
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.engines.sqlite_file import NAME
from parallax.protos import audit_pb2, audit_pb2_grpc
from parallax.sdk.cli.render import distance, progress
from parallax.sdk.client import READ_S
from parallax.security.errors import ConfigError, IdentityError
from parallax.security.files import show
from parallax.security.identity import Identity

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from grpc import aio

    from parallax.sdk.client import ParallaxClient

PAGE: Final = 1_000
LOOK_S: Final = 1.0


def request_of(since: datetime | None, action: str, identity: str) -> audit_pb2.ListAuditEntriesRequest:
    """What to ask for."""
    request = audit_pb2.ListAuditEntriesRequest(action=action, identity=identity, page_size=PAGE)
    if since is not None:
        request.since.FromDatetime(since)
    return request


async def pages(
    client: ParallaxClient, request: audit_pb2.ListAuditEntriesRequest, *, follow: bool = False
) -> AsyncGenerator[AuditPage]:
    """What is asked for, page by page; with *follow*, what comes later too, without end."""
    while True:
        async with client._asking(_audit) as stub:  # noqa: SLF001 - our own
            answer = await stub.ListAuditEntries(request, timeout=READ_S)
        kept = tuple((entry.sequence, entry.content) for entry in answer.entries)
        yield AuditPage(kept, answer.until, Head(answer.head_sequence, answer.head_hash))
        request.after = answer.until
        if answer.until >= answer.head_sequence:
            if not follow:
                return
            await asyncio.sleep(LOOK_S)


async def pages_in(directory: Path) -> AsyncGenerator[AuditPage]:
    """
    The whole log in a data directory that no control plane uses, page by page.

    Raises:
        ConfigError: There is none, or it is in use.
    """
    if not (directory / NAME).is_file():
        raise ConfigError(f"{show(directory)} holds no {NAME}: state where PARALLAX_DATA_DIR was")
    async with SqliteEngine(directory) as engine:
        reader, after = AuditReader(engine), 0
        while True:
            page = await reader.page(after)
            yield page
            after = page.until
            if after >= page.head.sequence:
                return


async def verify(log: AsyncGenerator[AuditPage], noted: Head | None) -> tuple[Head, int]:
    """
    The head of *log*, and how many entries there are, if all is as it was written.

    Raises:
        ChainBroken: It is not.
    """
    chain, head, count = Chain(noted), START, 0
    with progress("Verifying") as shown:
        async with aclosing(log):
            async for page in log:
                for sequence, content in page.kept:
                    chain.add(sequence, content)
                head, count = page.head, count + len(page.kept)
                shown(page.until, head.sequence)
    chain.finish(head)
    return head, count


def entries(page: AuditPage) -> list[Entry]:
    """What *page* tells; raises ChainBroken."""
    return [Entry.decode(sequence, content) for sequence, content in page.kept]


def to_json(entry: Entry) -> dict[str, object]:
    """For programs."""
    deed = entry.deed
    return {
        "sequence": entry.sequence,
        "at": entry.at.isoformat(),
        "action": deed.action,
        "by": deed.by,
        "subject": deed.subject or None,
        "source": deed.source or None,
        "detail": dict(deed.detail),
        "hash": entry.head.hash,
    }


def as_cells(entry: Entry, now: datetime) -> tuple[str, ...]:
    """For people: its number, when, what, by whom, of whom, from where, and the rest."""
    deed = entry.deed
    return (
        str(entry.sequence),
        distance(entry.at, now),
        deed.action,
        _short(deed.by),
        _short(deed.subject),
        deed.source,
        ", ".join(f"{name} {value}" for name, value in deed.detail.items() if value),
    )


def _short(who: str) -> str:
    try:
        return Identity.parse(who).short
    except IdentityError:
        return who


def _audit(channel: aio.Channel) -> audit_pb2_grpc.AuditServiceAsyncStub:
    return audit_pb2_grpc.AuditServiceStub(channel)
