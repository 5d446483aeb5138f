"""What every engine promises, asked of each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from parallax.control_plane.engines.engine import (
    ABSENT,
    MAX_BYTES,
    MAX_WRITES,
    Engine,
    Event,
    Onward,
    Record,
    Write,
    check_prefix,
)
from parallax.security.errors import Conflict, WatchGap

if TYPE_CHECKING:
    from tests.control_plane.engines.conftest import OpenEngine

HAPPENED = Event("tests/happened", b"{}")
WITHIN_S = 25.0  # in which some of these commit a hundred times


@pytest.fixture
async def engine(open_engine: OpenEngine) -> AsyncIterator[Engine]:
    async with open_engine() as opened:
        yield opened


async def put(engine: Engine, key: str, value: bytes | None, expected: int | None = None) -> int:
    [revision] = await engine.commit(HAPPENED, [Write(key, value, expected)])
    return revision


async def told(engine: Engine, prefix: str, since: int, count: int) -> list[Record]:
    """The first *count* records that a watch tells."""
    records = []
    async with asyncio.timeout(WITHIN_S), aclosing(engine.watch(prefix, since)) as watch:
        async for record in watch:
            records.append(record)
            if len(records) == count:
                break
    return records


async def told_until(engine: Engine, key: str, since: int) -> list[Record]:
    """What a watch tells, up to *key*."""
    records = []
    async with asyncio.timeout(WITHIN_S), aclosing(engine.watch("", since)) as watch:
        async for record in watch:
            records.append(record)
            if record.key == key:
                break
    return records


# Records.


async def test_what_was_committed_is_there(engine: Engine) -> None:
    revision = await put(engine, "a/b", b"value")
    assert await engine.get("a/b") == Record("a/b", revision, b"value")
    assert await engine.get("a") is None
    assert await engine.get("a/b/c") is None


async def test_of_many_those_that_there_are_come_in_the_order_asked_for(engine: Engine) -> None:
    for key in ("a/1", "a/2", "b/1"):
        await put(engine, key, key.encode())
    await put(engine, "a/2", None)
    found = await engine.get_many(["b/1", "a/2", "nowhere", "a/1"])
    assert [(record.key, record.value) for record in found] == [("b/1", b"b/1"), ("a/1", b"a/1")]
    assert found[0] == await engine.get("b/1")
    assert await engine.get_many([]) == []
    with pytest.raises(ValueError, match="1001 keys at once"):
        await engine.get_many(["a"] * 1_001)
    with pytest.raises(ValueError, match="not a key"):
        await engine.get_many(["a//b"])


async def test_what_was_committed_is_there_after_a_restart(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        revision = await put(engine, "a", b"value")
        newest = await engine.revision()
    async with open_engine() as engine:
        assert await engine.get("a") == Record("a", revision, b"value")
        assert await engine.revision() == newest
        assert await put(engine, "b", b"") > newest


async def test_an_empty_value_is_a_value(engine: Engine) -> None:
    revision = await put(engine, "a", b"")
    assert await engine.get("a") == Record("a", revision, b"")


async def test_revisions_rise_with_every_write(engine: Engine) -> None:
    revisions = [await put(engine, "a", b"1"), await put(engine, "b", b"1"), await put(engine, "a", None)]
    revisions += await engine.commit(HAPPENED, [Write("c", b"1"), Write("d", b"1")])
    assert all(before < after for before, after in pairwise([0, *revisions]))
    assert await engine.revision() >= revisions[-1]


async def test_an_event_alone_is_a_commit(engine: Engine) -> None:
    before = await engine.revision()
    assert await engine.commit(HAPPENED) == ()
    assert await engine.revision() > before


async def test_what_is_taken_out_is_gone_and_may_come_back(engine: Engine) -> None:
    await put(engine, "a", b"1")
    await put(engine, "a", None)
    assert await engine.get("a") is None
    assert await engine.scan("") == []
    again = await put(engine, "a", b"2", ABSENT)
    assert await engine.get("a") == Record("a", again, b"2")


async def test_taking_out_what_is_not_there_is_no_error(engine: Engine) -> None:
    await put(engine, "a", None)
    await put(engine, "a", None, ABSENT)
    assert await engine.get("a") is None


# Compare and swap.


async def test_a_write_that_expects_the_present_revision_is_done(engine: Engine) -> None:
    first = await put(engine, "a", b"1", ABSENT)
    second = await put(engine, "a", b"2", first)
    assert await engine.get("a") == Record("a", second, b"2")


@pytest.mark.parametrize("value", [b"2", None])
async def test_a_write_that_expects_an_older_revision_is_refused(engine: Engine, value: bytes | None) -> None:
    first = await put(engine, "a", b"1")
    second = await put(engine, "a", b"1")
    with pytest.raises(Conflict, match=f"a has revision {second}, not {first}: read it again"):
        await put(engine, "a", value, first)
    assert await engine.get("a") == Record("a", second, b"1")


async def test_a_write_that_expects_nothing_there_is_refused_where_something_is(engine: Engine) -> None:
    first = await put(engine, "a", b"1")
    with pytest.raises(Conflict):
        await put(engine, "a", b"2", ABSENT)
    await put(engine, "a", None)
    with pytest.raises(Conflict):
        await put(engine, "a", b"2", first)


async def test_one_conflict_undoes_the_whole_commit(engine: Engine) -> None:
    await put(engine, "b", b"1")
    before = await engine.revision()
    with pytest.raises(Conflict):
        await engine.commit(HAPPENED, [Write("a", b"new"), Write("b", b"new", ABSENT), Write("c", b"new")])
    assert [record.key for record in await engine.scan("")] == ["b"]
    assert await engine.revision() == before


async def test_a_conflict_leaves_the_commits_beside_it_alone(engine: Engine) -> None:
    """Of those that are written together, each is judged for itself, after those before it."""
    outcomes = await asyncio.gather(
        *(put(engine, f"each/{number}", b"1") for number in range(50)),
        *(put(engine, "one", str(number).encode(), ABSENT) for number in range(50)),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes[:51]] == [int] * 51
    assert [type(outcome) for outcome in outcomes[51:]] == [Conflict] * 49
    assert len(await engine.scan("each/")) == 50
    one = await engine.get("one")
    assert one is not None
    assert one.value == b"0"


async def test_of_many_that_count_at_once_none_is_lost(engine: Engine) -> None:
    async def increment() -> None:
        while True:
            record = await engine.get("counter")
            count = int(record.value or b"0") if record else 0
            try:
                await put(engine, "counter", str(count + 1).encode(), record.revision if record else ABSENT)
            except Conflict:
                continue
            return

    await asyncio.gather(*(increment() for _ in range(20)))
    record = await engine.get("counter")
    assert record is not None
    assert record.value == b"20"


async def test_whoever_is_cancelled_harms_nobody_beside_it(engine: Engine) -> None:
    asked = [asyncio.create_task(put(engine, f"a/{number}", b"1")) for number in range(20)]
    await asyncio.sleep(0)
    for task in asked[::2]:
        task.cancel()
    outcomes = await asyncio.gather(*asked, return_exceptions=True)
    assert all(isinstance(outcome, int) for outcome in outcomes[1::2])
    kept = {record.key for record in await engine.scan("a/")}
    assert {f"a/{number}" for number in range(1, 20, 2)} <= kept


# Scans.


async def test_a_scan_is_in_the_order_of_bytes_and_stays_below_its_prefix(engine: Engine) -> None:
    keys = ["a/b", "a/B", "a/b/c", "a/b.c", "a/b-c", "a/b0", "a/_", "ab", "a", "b/a", "a.b/c", "a0/b"]
    await asyncio.gather(*(put(engine, key, b"1") for key in keys))
    for prefix in ("", "a/", "a/b/", "b/", "none/"):
        found = [record.key for record in await engine.scan(prefix)]
        assert found == sorted(key for key in keys if key.startswith(prefix))


async def test_a_scan_goes_on_behind_the_last_key_of_a_page(engine: Engine) -> None:
    keys = [f"a/{number:02}" for number in range(10)]
    await asyncio.gather(*(put(engine, key, b"1") for key in [*keys, "b/1"]))
    found: list[str] = []
    while page := await engine.scan("a/", found[-1] if found else "", 3):
        assert len(page) <= 3
        found += [record.key for record in page]
    assert found == keys
    assert [record.key for record in await engine.scan("a/", "a/055")] == keys[6:]


async def test_a_scan_passes_over_what_it_is_told_to(engine: Engine) -> None:
    keys = [f"a/{letter}/{number}" for letter in "xyz" for number in range(5)]
    await asyncio.gather(*(put(engine, key, b"1") for key in [*keys, "b/x/0"]))

    async def found(after: str, limit: int, onward: Onward) -> list[str]:
        return [record.key for record in await engine.scan("a/", after, limit, onward)]

    def late(key: str) -> str:
        return f"{key[:-1]}3"

    decided = ["a/x/0", "a/x/4", "a/y/0", "a/y/4", "a/z/0", "a/z/4"]
    assert await found("", 100, late) == decided
    assert await found("", 3, late) == decided[:3]
    assert await found("a/y/0", 3, late) == ["a/y/1", "a/y/4", "a/z/0"]
    assert await found("", 100, lambda _: "c") == ["a/x/0"]
    assert await found("", 100, lambda _: "") == await found("", 100, lambda key: key) == keys


# Watches.


async def test_a_watch_tells_what_is_written_in_its_order(engine: Engine) -> None:
    since = await engine.revision()
    watching = asyncio.create_task(told_until(engine, "end", since))
    await put(engine, "a", b"1")
    second = await put(engine, "b", b"1")
    third = await put(engine, "a", None)
    end = await put(engine, "end", b"")
    records = await watching
    # Several writes of one record may come as the last of them.
    assert [record for record in records if record.value != b"1" or record.key == "b"] == [
        Record("b", second, b"1"),
        Record("a", third, None),
        Record("end", end, b""),
    ]


async def test_a_watch_tells_what_was_written_before_it_began(engine: Engine) -> None:
    await put(engine, "a/1", b"1")
    since = await engine.revision()
    second = await put(engine, "a/2", b"1")
    assert await told(engine, "a/", since, 1) == [Record("a/2", second, b"1")]


async def test_a_watch_goes_on_from_any_revision_that_it_told(engine: Engine) -> None:
    since = await engine.revision()
    await engine.commit(HAPPENED, [Write(f"a/{number}", b"1") for number in range(10)])
    everything = await told(engine, "a/", since, 10)
    for position, record in enumerate(everything[:-1]):
        assert await told(engine, "a/", record.revision, 9 - position) == everything[position + 1 :]


async def test_a_watch_goes_on_after_a_restart(open_engine: OpenEngine) -> None:
    async with open_engine() as engine:
        since = await engine.revision()
        await put(engine, "a/1", b"1")
        removed = await put(engine, "a/1", None)
    async with open_engine() as engine:
        assert await told(engine, "a/", since, 1) == [Record("a/1", removed, None)]


async def test_a_watch_with_more_to_tell_than_a_page_tells_all(engine: Engine) -> None:
    since = await engine.revision()
    for start in range(0, 2_500, MAX_WRITES):
        await engine.commit(HAPPENED, [Write(f"a/{start + n}", b"1") for n in range(MAX_WRITES)])
    records = await told(engine, "a/", since, 2_500)
    assert len({record.key for record in records}) == 2_500


async def test_a_watch_of_another_prefix_is_not_disturbed(engine: Engine) -> None:
    since = await engine.revision()
    watching = asyncio.create_task(told(engine, "b/", since, 1))
    for number in range(100):
        await put(engine, f"a/{number}", b"1")
    assert not watching.done()
    await put(engine, "b/1", b"1")
    assert [record.key for record in await watching] == ["b/1"]


async def test_a_watch_that_fell_behind_the_history_says_so(open_engine: OpenEngine) -> None:
    async with open_engine(history=10) as engine:
        since = await engine.revision()
        await put(engine, "a", b"1")
        await put(engine, "a", None)
        for number in range(10):
            await put(engine, f"b/{number}", b"1")
        with pytest.raises(WatchGap, match="read everything again"):
            await told(engine, "", since, 1)
        fresh = await engine.revision()
        await put(engine, "a", b"2")
        assert [record.key for record in await told(engine, "", fresh, 1)] == ["a"]


async def test_a_watch_within_the_history_misses_no_removal(open_engine: OpenEngine) -> None:
    async with open_engine(history=100) as engine:
        await put(engine, "a", b"1")
        since = await engine.revision()
        removed = await put(engine, "a", None)
        for number in range(10):
            await put(engine, f"b/{number}", b"1")
        [first, *_] = await told(engine, "", since, 11)
        assert first == Record("a", removed, None)


async def test_a_watch_from_the_future_says_so(engine: Engine) -> None:
    """The engine was replaced by an older or an empty one."""
    with pytest.raises(WatchGap):
        await told(engine, "", await engine.revision() + 1, 1)


# What does not fit.


@pytest.mark.parametrize(
    "key", ["", "/", "a/", "/a", "a//b", "a b", "a*", "ä", "a/.b", "..", "a\n", "a" * 1_025]
)
async def test_what_is_no_key_is_refused(engine: Engine, key: str) -> None:
    with pytest.raises(ValueError, match="not a key"):
        Write(key, b"")
    with pytest.raises(ValueError, match="not a key"):
        await engine.get(key)


@pytest.mark.parametrize("prefix", ["a", "a/b", "/", "a b/"])
async def test_what_is_no_prefix_is_refused(engine: Engine, prefix: str) -> None:
    with pytest.raises(ValueError, match="not a"):
        check_prefix(prefix)
    with pytest.raises(ValueError, match="not a"):
        await engine.scan(prefix)
    with pytest.raises(ValueError, match="not a"):
        await told(engine, prefix, 0, 1)


async def test_too_much_for_one_commit_is_refused(engine: Engine) -> None:
    with pytest.raises(ValueError, match="most"):
        await engine.commit(HAPPENED, [Write(f"a/{number}", b"") for number in range(MAX_WRITES + 1)])
    with pytest.raises(ValueError, match="two writes of one key"):
        await engine.commit(HAPPENED, [Write("a", b"1"), Write("a", b"2")])
    with pytest.raises(ValueError, match="are the most"):
        Write("a", bytes(MAX_BYTES + 1))
    with pytest.raises(ValueError, match="are the most"):
        Event("a", bytes(MAX_BYTES + 1))
    assert await engine.scan("") == []
