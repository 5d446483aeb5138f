"""Reading the audit log from an engine: by number, by time, and with conditions."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from parallax.control_plane.audit import ENTRIES, Entry, Head, key_of, read_head
from parallax.control_plane.engines.engine import MAX_PAGE, Engine, Record
from parallax.security.errors import ChainBroken

PAGE_BYTES: Final = 512 * 1024  # of one page: a message may have 1 MiB


@dataclass(frozen=True, slots=True)
class Sought:
    """
    Which entries are meant; those that fulfil everything stated.

    Args:
        since: Only those from then on.
        action: How their action begins: `certificate/`.
        identity: Only those by, or of, this one.
    """

    since: datetime | None = None
    action: str = ""
    identity: str = ""

    def admits(self, entry: Entry) -> bool:
        """Whether *entry* is meant."""
        deed = entry.deed
        return (
            (self.since is None or entry.at >= self.since)
            and deed.action.startswith(self.action)
            and self.identity in ("", deed.by, deed.subject)
        )


@dataclass(frozen=True, slots=True)
class AuditPage:
    """
    Part of the log.

    Args:
        until: The number up to which it was looked through; there is more behind it while that is not
            the head's.
        head: Of the log, when that was read.
    """

    kept: tuple[tuple[int, bytes], ...]
    until: int
    head: Head


class AuditReader:
    """
    Finds entries in an engine.

    What it finds is told as it is kept, whole or not: `Chain` is who judges.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def page(self, after: int, limit: int = MAX_PAGE, sought: Sought | None = None) -> AuditPage:
        """
        At most *limit* entries behind number *after*, of those that are *sought*; by default of all.

        A page may hold fewer, even none, before the last.

        Raises:
            ChainBroken: What is no entry cannot be looked for.
            StorageFailed: It cannot be read.
        """
        head, _ = await read_head(self._engine)
        kept, until, room = list[tuple[int, bytes]](), after, PAGE_BYTES
        records = await self._engine.scan(ENTRIES, key_of(after))
        for record in records:
            number, content = _number_of(record), _content_of(record)
            if number > head.sequence:  # written since
                return AuditPage(tuple(kept), head.sequence, head)
            if sought is None or sought.admits(Entry.decode(number, content)):
                room -= len(content)
                if len(kept) == limit or (kept and room < 0):
                    return AuditPage(tuple(kept), until, head)
                kept.append((number, content))
            until = number
        return AuditPage(tuple(kept), until if len(records) == MAX_PAGE else head.sequence, head)

    async def first(self) -> Entry | None:
        """The oldest entry there is."""
        found = await self._engine.scan(ENTRIES, limit=1)
        return _decode(found[0]) if found else None

    async def before(self, moment: datetime) -> int:
        """
        The number of the last entry before *moment*, found by halving.

        Where a clock was set back, it is one of several such.
        """
        first = await self.first()
        if first is None:
            return 0
        low, high = first.sequence - 1, (await read_head(self._engine))[0].sequence
        while low < high:
            middle = (low + high + 1) // 2
            record = await self._engine.get(key_of(middle))
            if record is None or _decode(record).at < moment:  # none: pruned meanwhile
                low = middle
            else:
                high = middle - 1
        return low


def _number_of(record: Record) -> int:
    name = record.key.removeprefix(ENTRIES)
    if not name.isdecimal():
        raise ChainBroken(f"{record.key} lies among the entries of the audit log and is none")
    return int(name)


def _decode(record: Record) -> Entry:
    return Entry.decode(_number_of(record), _content_of(record))


def _content_of(record: Record) -> bytes:
    """What lies there; what somebody wrote past us may be no bytes at all, and is no entry then."""
    return record.value if isinstance(record.value, bytes) else b""
