"""What waits to be written: everything at once, in order, within a frame."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallax.runtime.outbox import MAX_FRAME_BYTES, MAX_FRAME_ITEMS, Outbox


@pytest.fixture
def outbox() -> Outbox[str]:
    return Outbox()


async def test_gives_all_that_waits_at_once_and_in_order(outbox: Outbox[str]) -> None:
    for item in "abc":
        outbox.put(item, 1)
    assert len(outbox) == 3
    assert await outbox.take() == ["a", "b", "c"]
    assert len(outbox) == 0


async def test_waits_for_the_first_item(outbox: Outbox[str]) -> None:
    async with asyncio.TaskGroup() as group:
        taking = group.create_task(outbox.take())
        await asyncio.sleep(0)
        assert not taking.done()
        outbox.put("a", 1)
    assert taking.result() == ["a"]


async def test_waits_again_once_it_is_empty(outbox: Outbox[str]) -> None:
    outbox.put("a", 1)
    await outbox.take()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0):
            await outbox.take()


async def test_a_frame_holds_what_fits_and_the_rest_comes_next(outbox: Outbox[str]) -> None:
    for item in "abc":
        outbox.put(item, 4)
    assert await outbox.take(max_bytes=11) == ["a", "b"]
    assert await outbox.take(max_bytes=11) == ["c"]


async def test_a_frame_may_be_full_to_the_byte(outbox: Outbox[str]) -> None:
    for item in "abc":
        outbox.put(item, MAX_FRAME_BYTES // 2)
    assert await outbox.take() == ["a", "b"]


async def test_one_item_that_is_larger_than_a_frame_goes_alone(outbox: Outbox[str]) -> None:
    outbox.put("large", 100)
    outbox.put("small", 1)
    assert await outbox.take(max_bytes=10) == ["large"]
    assert await outbox.take(max_bytes=10) == ["small"]


async def test_a_large_item_is_not_overtaken(outbox: Outbox[str]) -> None:
    for item, size in (("a", 1), ("large", 100), ("b", 1)):
        outbox.put(item, size)
    assert [await outbox.take(max_bytes=10) for _ in range(3)] == [["a"], ["large"], ["b"]]


async def test_a_frame_holds_a_bounded_number_however_small_they_are(outbox: Outbox[str]) -> None:
    for _ in range(MAX_FRAME_ITEMS + 1):
        outbox.put("a", 0)
    assert len(await outbox.take()) == MAX_FRAME_ITEMS
    assert len(await outbox.take()) == 1


async def test_after_close_gives_what_is_left_and_then_nothing(outbox: Outbox[str]) -> None:
    outbox.put("a", 1)
    outbox.close()
    outbox.put("too late", 1)
    assert await outbox.take() == ["a"]
    assert await outbox.take() == []
    assert await outbox.take() == []


async def test_close_wakes_who_waits(outbox: Outbox[str]) -> None:
    async with asyncio.TaskGroup() as group:
        taking = group.create_task(outbox.take())
        await asyncio.sleep(0)
        outbox.close()
    assert taking.result() == []


async def test_nothing_is_lost_when_taking_is_cancelled(outbox: Outbox[str]) -> None:
    taking = asyncio.get_running_loop().create_task(outbox.take())
    await asyncio.sleep(0)
    outbox.put("a", 1)  # in the same moment
    taking.cancel()
    await asyncio.wait({taking})
    assert await outbox.take() == ["a"]


class TestWithdraw:
    async def test_takes_back_one_item_and_no_other(self, outbox: Outbox[str]) -> None:
        tickets = [outbox.put("same", 1), outbox.put("same", 1), outbox.put("other", 1)]
        assert outbox.withdraw(tickets[0])
        assert await outbox.take() == ["same", "other"]

    async def test_is_too_late_once_the_item_was_taken(self, outbox: Outbox[str]) -> None:
        ticket = outbox.put("a", 1)
        await outbox.take()
        outbox.put("b", 1)
        assert not outbox.withdraw(ticket)
        assert await outbox.take() == ["b"]

    async def test_works_once(self, outbox: Outbox[str]) -> None:
        ticket = outbox.put("a", 1)
        assert outbox.withdraw(ticket)
        assert not outbox.withdraw(ticket)

    async def test_of_the_last_item_does_not_look_like_the_end(self, outbox: Outbox[str]) -> None:
        """An empty list would tell the writer that the outbox is closed."""
        async with asyncio.TaskGroup() as group:
            taking = group.create_task(outbox.take())
            await asyncio.sleep(0)
            outbox.withdraw(outbox.put("a", 1))
            for _ in range(3):
                await asyncio.sleep(0)
            assert not taking.done()
            outbox.put("b", 1)
        assert taking.result() == ["b"]

    async def test_still_works_after_close(self, outbox: Outbox[str]) -> None:
        ticket = outbox.put("a", 1)
        outbox.close()
        assert outbox.withdraw(ticket)
        assert await outbox.take() == []

    async def test_of_what_came_after_close_is_nothing(self, outbox: Outbox[str]) -> None:
        outbox.close()
        assert not outbox.withdraw(outbox.put("a", 1))


@given(
    st.lists(st.tuples(st.sampled_from(["put", "take", "withdraw"]), st.integers(0, 12)), max_size=60),
    st.integers(1, 20),
)
def test_every_item_leaves_once_in_order_in_frames_that_fit(
    steps: list[tuple[str, int]], max_bytes: int
) -> None:
    outbox: Outbox[tuple[int, int]] = Outbox()
    put: list[tuple[int, int]] = []
    frames: list[list[tuple[int, int]]] = []
    withdrawn: list[int] = []

    async def play() -> None:
        for what, value in steps:
            if what == "put":
                item = (len(put), value)
                assert outbox.put(item, value) == item[0]
                put.append(item)
            elif what == "withdraw" and outbox.withdraw(value):
                withdrawn.append(value)
            elif what == "take" and len(outbox):
                frames.append(await outbox.take(max_bytes))
        outbox.close()
        while frame := await outbox.take(max_bytes):
            frames.append(frame)

    asyncio.run(play())
    left = [item for frame in frames for item in frame]
    assert left == [item for item in put if item[0] not in withdrawn]
    assert all(len(frame) == 1 or sum(size for _, size in frame) <= max_bytes for frame in frames)
