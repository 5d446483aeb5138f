"""What tests of the audit log share: an engine that counts and fails, and a reader that verifies."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from parallax.control_plane.audit import Entry, Head
from parallax.control_plane.audit_chain import Chain
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.engines.engine import Engine, Event, Onward, Record, Write
from parallax.security.errors import StorageFailed


class Recorder:
    """An engine in front of another: it counts commits, and fails when it is told to."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.commits: list[int] = []
        self.fails: StorageFailed | None = None
        self.fails_after: StorageFailed | None = None
        self.may_go_on = asyncio.Event()
        self.may_go_on.set()

    async def commit(self, event: Event, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        await self.may_go_on.wait()
        self.commits.append(len(writes))
        if self.fails is not None:
            raise self.fails
        revisions = await self._engine.commit(event, writes)
        if self.fails_after is not None:
            raise self.fails_after
        return revisions

    async def get(self, key: str) -> Record | None:
        return await self._engine.get(key)

    async def get_many(self, keys: Sequence[str]) -> list[Record]:
        return await self._engine.get_many(keys)

    async def scan(
        self, prefix: str, after: str = "", limit: int = 1_000, onward: Onward | None = None
    ) -> list[Record]:
        return await self._engine.scan(prefix, after, limit, onward)

    async def revision(self) -> int:
        return await self._engine.revision()

    def watch(self, prefix: str, since: int) -> AsyncGenerator[Record]:
        return self._engine.watch(prefix, since)


async def verified(engine: Engine, noted: Head | None = None) -> list[Entry]:
    """All entries, after the chain has been found whole."""
    reader, chain, found, after = AuditReader(engine), Chain(noted), list[Entry](), 0
    while True:
        page = await reader.page(after)
        found += [chain.add(sequence, content) for sequence, content in page.kept]
        after = page.until
        if after >= page.head.sequence:
            chain.finish(page.head)
            return found
