"""
The seam to what holds shared state: events, and the records derived from them.

Small enough for a SQL database and for a log such as NATS JetStream: keys are segments, revisions
are sequence numbers, and nothing can be asked but one record, those below a prefix, and what
became of these.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

ABSENT: Final = 0
"""The expected revision of a record that must not exist."""

MAX_KEY: Final = 1_024
MAX_BYTES: Final = 256 * 1024  # a value, or an event's data; a NATS message may have 1 MiB
MAX_WRITES: Final = 100  # in one commit; a batch of NATS may have 1,000 messages
MAX_PAGE: Final = 1_000

Onward: TypeAlias = Callable[[str], str]
"""
Behind what a scan goes on that has come to a key: a later one, there or not, passes over what lies between.

What is not later changes nothing. Asked wherever the engine reads, so it has to be pure.
"""

_KEY: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/[A-Za-z0-9_-][A-Za-z0-9._-]*)*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Event:
    """
    What happened, for whoever reads the history: kept apart from the records that came of it.

    Args:
        topic: As a key: `certificates/issued`.
    """

    topic: str
    data: bytes = field(default=b"", repr=False)

    def __post_init__(self) -> None:
        check_key(self.topic)
        _check_size(self.topic, self.data)


@dataclass(frozen=True, slots=True)
class Write:
    """
    One record as it is to become.

    Args:
        value: None takes the record out.
        expected: The revision that it must have now; `ABSENT`: it must not exist; None: whatever it is.
    """

    key: str
    value: bytes | None = field(repr=False)
    expected: int | None = None

    def __post_init__(self) -> None:
        check_key(self.key)
        _check_size(self.key, self.value or b"")


@dataclass(frozen=True, slots=True)
class Record:
    """
    One record as it was at some moment.

    Args:
        revision: Of its last write. Every write has its own, higher than all before.
        value: None where a watch tells that it was taken out.
    """

    key: str
    revision: int
    value: bytes | None = field(repr=False)


class Engine(Protocol):
    """
    Holds events and records.

    What a call has returned survives the end of the process, `kill -9` included. Each raises
    `StorageFailed` where the medium does not do its part; the same call may succeed later.
    """

    async def commit(self, event: Event, writes: Sequence[Write] = ()) -> tuple[int, ...]:
        """
        Append *event* and do all of *writes*, or nothing at all; the revision of each write.

        Raises:
            Conflict: A record is not as expected; nothing was written.
            ValueError: Too many writes, or two of one key.
        """
        ...

    async def get(self, key: str) -> Record | None:
        """The record *key*, with all that was committed before."""
        ...

    async def get_many(self, keys: Sequence[str]) -> list[Record]:
        """Those of *keys* that there are, in that order, as `get` would give them; at most `MAX_PAGE`."""
        ...

    async def scan(
        self, prefix: str, after: str = "", limit: int = MAX_PAGE, onward: Onward | None = None
    ) -> list[Record]:
        """
        At most *limit* records below *prefix*, in the order of their keys' bytes.

        Args:
            prefix: Whole segments, `certificates/`, or "" for everything.
            after: Only keys behind this one, there or not: the last of the page before.
            onward: What may be passed over. Each record at which that is decided comes, too.
        """
        ...

    async def revision(self) -> int:
        """The newest revision: a watch from here on misses nothing that a scan begun now does not show."""
        ...

    def watch(self, prefix: str, since: int) -> AsyncGenerator[Record]:
        """
        The records below *prefix* that are written after the revision *since*, in that order, without end.

        Several writes of one record may come as the last of them. Whoever stops may go on later from
        the last revision it was told of, or knows from `revision`.

        Raises:
            WatchGap: What was taken out since then is not all known any more, or *since* is of another
                engine: take `revision`, scan, and watch from there.
        """
        ...


def check_key(key: str) -> str:
    """*key* itself; raises ValueError if it is none: segments of `[A-Za-z0-9._-]` between slashes."""
    if len(key) > MAX_KEY or not _KEY.fullmatch(key):
        raise ValueError(f"not a key: {key[:80]!r}")
    return key


def check_prefix(prefix: str) -> str:
    """*prefix* itself; raises ValueError if it is none: "", or a key and a slash."""
    if prefix and not prefix.endswith("/"):
        raise ValueError(f"not a prefix, for it ends within a segment: {prefix[:80]!r}")
    if prefix:
        check_key(prefix[:-1])
    return prefix


def check_writes(writes: Sequence[Write]) -> None:
    """Raise ValueError unless they fit into one commit."""
    if len(writes) > MAX_WRITES:
        raise ValueError(f"{len(writes)} writes in one commit: {MAX_WRITES} at most")
    if len({write.key for write in writes}) < len(writes):
        raise ValueError("two writes of one key in one commit")


def _check_size(what: str, content: bytes) -> None:
    if len(content) > MAX_BYTES:
        raise ValueError(f"{what}: {len(content)} bytes, where {MAX_BYTES} are the most")
