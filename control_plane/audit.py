"""The audit log: what was done and refused, by whom and when, each entry with the hash of the one before."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Final, Self

from parallax.control_plane.engines.engine import (
    ABSENT,
    MAX_WRITES,
    Engine,
    Event,
    Write,
    check_writes,
)
from parallax.security.errors import ChainBroken, Conflict, Fault, StorageFailed

ENTRIES: Final = "audit/"
HEAD: Final = "audit-head"  # not below the entries: a scan of these finds nothing else
MAX_DEED: Final = 16 * 1024  # characters: however they are escaped, it fits into a record
MAX_OWN_WRITES: Final = MAX_WRITES - 2  # of a deed: its entry and the head are written with them
MAX_WAITING: Final = 10_000  # deeds, as the engine has commits

_DIGITS: Final = 20  # so that keys sort as numbers do, for ever
_TEXTS: Final = ("action", "by", "subject", "source")
_HEAD: Final = re.compile(r"(0|[1-9][0-9]{0,18}):([0-9a-f]{64})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Deed:
    """
    Something that was done, or refused.

    Args:
        action: What, as an area and a verb: `certificate/revoked`.
        by: Who did it or tried to: an identity as a URI, or a description where there is none.
        subject: Whom or what it was done to.
        source: The address that it came from; empty: that of the call in which it is done, if it is in one.
        detail: Whatever else there is to know. Never a key, a token, or a request's body.
    """

    action: str
    by: str
    subject: str = ""
    source: str = ""
    detail: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """
    How far the log has come: enough to know later that nothing up to here is another.

    Args:
        sequence: Of the newest entry; 0 before the first.
        hash: SHA-256 of that entry as it is kept, lower-case hex.
    """

    sequence: int
    hash: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `str` gives; raises ValueError."""
        found = _HEAD.fullmatch(text)
        if found is None:
            raise ValueError("not <sequence>:<SHA-256 in hex>")
        return cls(int(found[1]), found[2])

    def __str__(self) -> str:
        return f"{self.sequence}:{self.hash}"


START: Final = Head(0, "0" * 64)


@dataclass(frozen=True, slots=True)
class Entry:
    """
    One deed in the log.

    Args:
        before: The hash of the entry before.
        content: All of that as it is kept, which is what is hashed: JSON in ASCII without spaces, its
            names sorted.
    """

    sequence: int
    at: datetime
    deed: Deed
    before: str
    content: bytes = field(repr=False)

    @classmethod
    def behind(cls, head: Head, deed: Deed, at: datetime) -> Self:
        """The entry of *deed* that follows *head*."""
        sequence = head.sequence + 1
        told = {name: getattr(deed, name) for name in _TEXTS}
        told |= {"detail": dict(deed.detail), "sequence": sequence, "at": at.isoformat(), "before": head.hash}
        content = json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
        return cls(sequence, at, deed, head.hash, content)

    @classmethod
    def decode(cls, sequence: int, content: bytes) -> Self:
        """
        The entry *sequence*, kept as *content*; what a newer version has added is passed over.

        Raises:
            ChainBroken: It is no entry, or another one.
        """
        try:
            told = json.loads(content)
            detail = {str(name): str(value) for name, value in told["detail"].items()}
            deed = Deed(**{name: str(told[name]) for name in _TEXTS}, detail=detail)
            at = datetime.fromisoformat(told["at"]).astimezone(UTC)
            entry = cls(int(told["sequence"]), at, deed, str(told["before"]), content)
        except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError):
            raise ChainBroken(f"what lies in the place of entry {sequence} is no entry", sequence) from None
        if entry.sequence != sequence:
            raise ChainBroken(f"in the place of entry {sequence} lies entry {entry.sequence}", sequence)
        return entry

    @property
    def key(self) -> str:
        """Of its record."""
        return key_of(self.sequence)

    @property
    def head(self) -> Head:
        """The log's head, as long as this entry is the newest."""
        return Head(self.sequence, hashlib.sha256(self.content).hexdigest())


def key_of(sequence: int) -> str:
    """Where the entry with this number lies."""
    return f"{ENTRIES}{sequence:0{_DIGITS}}"


def _size_of(deed: Deed) -> int:
    texts = (deed.action, deed.by, deed.subject, deed.source, *deed.detail.keys(), *deed.detail.values())
    return sum(map(len, texts))


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    deed: Deed
    writes: Sequence[Write]
    done: asyncio.Future[tuple[int, ...]]


class AuditLog:
    """
    Records deeds in an engine, each in one commit with what it changes.

    Entries follow one another, so one commit must have ended before the next begins. What comes meanwhile
    gathers, and goes into the next together: the busier it is, the more deeds share one.

    Another log on the same engine costs time and breaks nothing: who finds that the head has moved reads
    it again.

    Args:
        clock: Aware UTC.
        source: Where the call that is being handled comes from, for deeds that do not say; "": from nowhere.
    """

    def __init__(
        self, engine: Engine, clock: Callable[[], datetime], source: Callable[[], str] = lambda: ""
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._source = source
        self._waiting: deque[_Pending] = deque()
        self._writing: asyncio.Task[None] | None = None
        self._head: tuple[Head, int] | None = None  # and its revision; None: what is written is not known

    async def commit(self, deed: Deed, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        """
        Record *deed* and do all of *writes*, or nothing at all; the revision of each write.

        Whoever is cancelled meanwhile does not know whether it is done; the log does.

        Raises:
            Conflict: A record is not as expected; nothing was written.
            StorageFailed: It is not known to be recorded.
            ValueError: Too many writes, two of one key, or a deed that is too large.
        """
        if not deed.source:
            deed = replace(deed, source=self._source())
        check_writes(writes)
        if len(writes) > MAX_OWN_WRITES:
            raise ValueError(f"{len(writes)} writes with one deed: {MAX_OWN_WRITES} at most")
        if _size_of(deed) > MAX_DEED:
            raise ValueError(f"{deed.action}: more to tell than {MAX_DEED} characters")
        if len(self._waiting) >= MAX_WAITING:
            raise StorageFailed(f"{MAX_WAITING} deeds wait for the disk already: try again", Fault.BUSY)
        loop = asyncio.get_running_loop()
        pending = _Pending(deed, tuple(writes), loop.create_future())
        self._waiting.append(pending)
        if self._writing is None:
            self._writing = loop.create_task(self._write())  # ours; it hands each error to who waits for it
        return await pending.done

    async def _write(self) -> None:
        """Commit what waits, until nothing does."""
        batch: list[_Pending] = []
        try:
            while batch := self._take():
                await self._settle(batch)
        except asyncio.CancelledError:  # the process ends
            _fail([*batch, *self._waiting], StorageFailed("the process is stopping: it may not be recorded"))
            self._waiting.clear()
            raise
        finally:
            self._writing = None

    def _take(self) -> list[_Pending]:
        """As many as fit into one commit of the engine, which takes no two writes of one key."""
        batch: list[_Pending] = []
        keys, room = set[str](), MAX_WRITES - 1  # for the head
        while self._waiting:
            following = self._waiting[0]
            mine = {write.key for write in following.writes}
            if batch and (room < 1 + len(mine) or keys & mine):
                break
            self._waiting.popleft()
            if following.done.done():  # nobody waits for one that was cancelled
                continue
            keys |= mine
            room -= 1 + len(mine)
            batch.append(following)
        return batch

    async def _settle(self, batch: Sequence[_Pending]) -> None:
        """Commit *batch*, in parts if it cannot be at once, and tell those who wait for it."""
        try:
            revisions = await self._append(batch)
        except Conflict as exc:
            half = len(batch) // 2
            if half:  # so that only those fail that conflict themselves, found by halving
                await self._settle(batch[:half])
                await self._settle(batch[half:])
            else:
                _fail(batch, exc)
        except Exception as exc:  # noqa: BLE001 - it is theirs who wait, whatever it is
            _fail(batch, exc)
        else:
            for each, mine in zip(batch, revisions, strict=True):
                if not each.done.done():
                    each.done.set_result(mine)

    async def _append(self, batch: Sequence[_Pending]) -> list[tuple[int, ...]]:
        """Commit *batch* at once; the revisions of each one's own writes."""
        while True:
            before, revision = self._head or await read_head(self._engine)
            entries, head, now = list[Entry](), before, self._clock()
            for each in batch:
                entries.append(Entry.behind(head, each.deed, now))
                head = entries[-1].head
            writes = [
                Write(HEAD, str(head).encode(), revision),
                *(Write(entry.key, entry.content, ABSENT) for entry in entries),
                *(write for each in batch for write in each.writes),
            ]
            event = Event("audit/recorded", f"{entries[0].sequence}-{head.sequence}".encode())
            self._head = None  # unless it is known to have come that far
            try:
                moved, *others = await self._engine.commit(event, writes)
            except Conflict:
                found = await read_head(self._engine)
                if found[1] != revision:
                    continue  # another log was first
                await self._check_free(entries[0])
                self._head = found
                raise
            self._head = head, moved
            own = iter(others[len(entries) :])
            return [tuple(next(own) for _ in each.writes) for each in batch]

    async def _check_free(self, entry: Entry) -> None:
        """Raise StorageFailed if the place of *entry*, the next one, is taken: no conflict that ever ends."""
        if await self._engine.get(entry.key) is not None:
            raise StorageFailed(
                f"the audit log has an entry {entry.sequence} behind its head: "
                "restore the data directory from a backup",
                Fault.DAMAGED,
            )


async def read_head(engine: Engine) -> tuple[Head, int]:
    """
    How far the log in *engine* has come, and the revision of the record that says so.

    Raises:
        StorageFailed: It cannot be read.
    """
    record = await engine.get(HEAD)
    if record is None:
        return START, ABSENT
    try:
        return Head.parse((record.value or b"").decode()), record.revision
    except ValueError:
        raise StorageFailed(
            "the head of the audit log is damaged: restore the data directory from a backup", Fault.DAMAGED
        ) from None


def _fail(batch: Sequence[_Pending], failure: Exception) -> None:
    """Tell each of *batch*: in an exception of its own, for a traceback grows in whoever raises it."""
    for each in batch:
        if not each.done.done():
            each.done.set_exception(_copy(failure) if len(batch) > 1 else failure)


def _copy(failure: Exception) -> Exception:
    if isinstance(failure, StorageFailed):
        return StorageFailed(str(failure), failure.fault)
    return failure
