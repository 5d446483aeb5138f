"""Old entries go, the chain begins behind them, and the log tells so."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from parallax.control_plane.audit import AuditLog, Deed, Entry, Head, key_of, read_head
from parallax.control_plane.audit_chain import PRUNED
from parallax.control_plane.audit_pruning import AuditPruner
from parallax.control_plane.audit_reader import AuditReader, Sought
from parallax.control_plane.engines.engine import Event, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.security.errors import ChainBroken
from tests.control_plane.audit_log import verified

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
DAY = timedelta(days=1)
US = "spiffe://parallax.local/service/control-plane"
ADMIN = "spiffe://parallax.local/client/admin"


class Log:
    """A log whose clock is set by hand, and what looks after it."""

    def __init__(self, engine: SqliteEngine) -> None:
        self.engine = engine
        self.now = NOW
        self.log = AuditLog(engine, self.clock)
        self.reader = AuditReader(engine)

    def clock(self) -> datetime:
        return self.now

    async def add(self, count: int, action: str = "test/done", by: str = ADMIN, subject: str = "") -> None:
        # At once: one by one each would wait for the disk.
        await asyncio.gather(*(self.log.commit(Deed(action, by, subject)) for _ in range(count)))

    def pruner(self, kept: timedelta = 30 * DAY, max_entries: int = 1_000) -> AuditPruner:
        return AuditPruner(self.log, self.reader, kept, US, self.clock, max_entries=max_entries)

    async def entries(self, noted: Head | None = None) -> list[Entry]:
        """All that is left, after the chain has been found whole."""
        return await verified(self.engine, noted)

    async def sought(self, sought: Sought, limit: int = 1_000) -> list[int]:
        """The numbers of the entries that are *sought*, page by page."""
        found = list[int]()
        after = await self.reader.before(sought.since) if sought.since else 0
        while True:
            page = await self.reader.page(after, limit, sought)
            assert len(page.kept) <= limit
            found += [number for number, _ in page.kept]
            after = page.until
            if after >= page.head.sequence:
                return found


@pytest.fixture
def log(engine: SqliteEngine) -> Log:
    return Log(engine)


# What goes.


async def test_what_is_too_old_goes_and_an_entry_says_so(log: Log) -> None:
    await log.add(3)
    log.now += 31 * DAY
    noted = (await log.entries())[-1].head
    await log.add(2)
    assert await log.pruner().prune() == 3
    left = await log.entries(noted)
    assert [entry.sequence for entry in left] == [4, 5, 6]
    assert left[-1].deed == Deed(PRUNED, US, detail={"until": str(noted), "at": NOW.isoformat()})


async def test_what_is_not_old_enough_stays(log: Log) -> None:
    await log.add(3)
    log.now += 30 * DAY
    assert await log.pruner().prune() == 0
    assert len(await log.entries()) == 3


async def test_what_is_too_much_goes_however_young(log: Log) -> None:
    await log.add(50)
    assert await log.pruner(max_entries=20).prune() == 31
    left = await log.entries()
    assert [entry.sequence for entry in left] == list(range(32, 52))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20, 98, 99, 100, 197, 250])
async def test_what_tells_of_pruning_counts_among_those_that_may_be_there(log: Log, count: int) -> None:
    """Otherwise each would make the next one too many, for ever."""
    await log.add(count)
    async with asyncio.timeout(20):
        await log.pruner(max_entries=max(1, count // 2)).prune()
    assert len(await log.entries()) == min(count, max(1, count // 2))


async def test_more_than_fits_into_a_commit_goes_in_several(log: Log) -> None:
    await log.add(250)
    log.now += 31 * DAY
    assert await log.pruner().prune() == 250
    assert [entry.deed.action for entry in await log.entries()] == [PRUNED] * 3


async def test_what_told_of_pruning_is_pruned_in_its_turn(log: Log) -> None:
    for _ in range(5):
        await log.add(10)
        log.now += 31 * DAY
        await log.pruner().prune()
        await log.entries()
    assert (await log.entries())[0].sequence > 40


async def test_an_empty_log_has_nothing_to_prune(log: Log) -> None:
    assert await log.pruner().prune() == 0
    assert await log.entries() == []


async def test_an_entry_that_was_changed_stays_as_evidence(log: Log) -> None:
    await log.add(3)
    await log.engine.commit(Event("tests/changed"), [Write(key_of(2), b"{}")])
    log.now += 31 * DAY
    with pytest.raises(ChainBroken, match="in the place of entry 2 is no entry"):
        await log.pruner().prune()
    assert await log.engine.get(key_of(2)) is not None


async def test_what_is_added_meanwhile_stays(log: Log) -> None:
    await log.add(300)
    log.now += 31 * DAY
    await asyncio.gather(log.pruner().prune(), *(log.add(1) for _ in range(30)))
    actions = [entry.deed.action for entry in await log.entries()]
    assert actions.count("test/done") == 30


# Finding.


async def test_entries_are_found_by_all_that_is_stated(log: Log) -> None:
    await log.add(2, "certificate/renewed", by="a", subject="b")
    log.now += DAY
    await log.add(2, "certificate/revoked", by=ADMIN, subject="a")
    log.now += DAY
    await log.add(1, "root/prepared")
    assert await log.sought(Sought()) == [1, 2, 3, 4, 5]
    assert await log.sought(Sought(action="certificate/")) == [1, 2, 3, 4]
    assert await log.sought(Sought(action="certificate/rev")) == [3, 4]
    assert await log.sought(Sought(identity="a")) == [1, 2, 3, 4]
    assert await log.sought(Sought(identity=ADMIN)) == [3, 4, 5]
    assert await log.sought(Sought(since=NOW + DAY)) == [3, 4, 5]
    assert await log.sought(Sought(since=NOW + DAY, action="root")) == [5]
    assert await log.sought(Sought(since=log.now + DAY)) == []


async def test_pages_have_no_more_than_was_asked_for(log: Log) -> None:
    await asyncio.gather(*(log.add(1, "test/even" if number % 2 else "test/odd") for number in range(50)))
    assert await log.sought(Sought(action="test/even"), limit=7) == list(range(2, 51, 2))


async def test_a_page_of_large_entries_is_cut_so_that_it_fits_into_a_message(log: Log) -> None:
    await asyncio.gather(*(log.log.commit(Deed("test/large", ADMIN, "x" * 16_000)) for _ in range(100)))
    page = await log.reader.page(0)
    assert sum(len(content) for _, content in page.kept) < 1 << 20
    assert len(await log.entries()) == 100


@pytest.mark.parametrize("count", [0, 1, 2, 7, 40])
async def test_the_first_entry_of_a_time_is_found_by_halving(log: Log, count: int) -> None:
    for _ in range(count):
        await log.add(1)
        log.now += DAY
    await log.pruner(max_entries=max(count - 3, 1)).prune()
    first = await log.reader.first()
    begin = first.sequence if first else 1
    for number in range(begin, count + 1):
        assert await log.reader.before(NOW + (number - 1) * DAY) == number - 1
    assert await log.reader.before(log.now + DAY) == (await read_head(log.engine))[0].sequence
