"""Certificates expire by the wall clock, timers run by another."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

import pytest

from parallax.runtime.expiry import Expiry, Lapsing, no_news
from parallax.security.errors import ParallaxError, UntrustedChain

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
LOOK_S = 0.005


class Clock:
    """A wall clock that the test sets."""

    def __init__(self) -> None:
        self.now = NOW
        self.asked = 0

    def __call__(self) -> datetime:
        self.asked += 1
        return self.now


class Work:
    """A task that lasts until a certificate ends, or it is told to."""

    def __init__(self, expiry: Expiry, until: datetime) -> None:
        self.may_end = asyncio.Event()
        self.lapsing: Lapsing | None = None
        self.was_ours: bool | None = None
        self.task = asyncio.create_task(self._run(expiry, until))

    async def _run(self, expiry: Expiry, until: datetime) -> None:
        self.lapsing = expiry.enter(until)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            self.was_ours = self.lapsing.has_ended_it()
            if not self.was_ours:
                raise
        finally:
            expiry.leave(self.lapsing)


async def test_work_ends_when_its_certificate_does() -> None:
    clock = Clock()
    expiry = Expiry(clock, LOOK_S)
    short, long = Work(expiry, NOW + timedelta(seconds=1)), Work(expiry, NOW + timedelta(hours=1))
    await asyncio.sleep(0)
    assert len(expiry) == 2
    clock.now += timedelta(seconds=2)
    async with asyncio.timeout(5):
        await short.task
    assert short.was_ours
    assert not long.task.done()
    assert len(expiry) == 1
    long.may_end.set()
    await long.task
    assert long.was_ours is None
    assert len(expiry) == 0


async def test_work_is_not_ended_while_its_certificate_is_valid() -> None:
    clock = Clock()
    expiry = Expiry(clock, LOOK_S)
    work = Work(expiry, NOW + timedelta(seconds=1))
    clock.now += timedelta(milliseconds=999)
    async with asyncio.timeout(5):
        while clock.asked < 5:
            await asyncio.sleep(LOOK_S)
    assert not work.task.done()
    work.may_end.set()
    await work.task


async def test_time_that_grows_is_believed() -> None:
    """A clock that is set back after the call began: the certificate is valid for longer."""
    clock = Clock()
    expiry = Expiry(clock, LOOK_S)
    work = Work(expiry, NOW + timedelta(seconds=1))
    await asyncio.sleep(0)
    clock.now -= timedelta(hours=1)
    async with asyncio.timeout(5):
        while clock.asked < 5:
            await asyncio.sleep(LOOK_S)
    assert not work.task.done()
    clock.now += timedelta(hours=2)
    async with asyncio.timeout(5):
        await work.task
    assert work.was_ours


async def test_a_certificate_that_was_over_before_ends_work_at_the_next_look() -> None:
    expiry = Expiry(Clock(), LOOK_S)
    work = Work(expiry, NOW - timedelta(seconds=1))
    async with asyncio.timeout(5):
        await work.task
    assert work.was_ours


async def test_work_that_asks_for_time_to_drain_is_told_when_to_and_ends_after_it() -> None:
    clock, told = Clock(), asyncio.Event()
    expiry = Expiry(clock, LOOK_S)
    work = Work(expiry, NOW + timedelta(seconds=1))
    await asyncio.sleep(0)
    assert work.lapsing is not None
    work.lapsing.drain(30, lambda _: told.set())
    clock.now += timedelta(seconds=2)
    async with asyncio.timeout(5):
        await told.wait()
    clock.now += timedelta(seconds=28)
    asked = clock.asked
    async with asyncio.timeout(5):
        while clock.asked < asked + 5:
            await asyncio.sleep(LOOK_S)
    assert not work.task.done()
    clock.now += timedelta(seconds=2)
    async with asyncio.timeout(5):
        await work.task
    assert work.was_ours
    assert len(expiry) == 0


async def test_a_machine_that_slept_through_the_drain_gives_none() -> None:
    clock, told = Clock(), asyncio.Event()
    expiry = Expiry(clock, LOOK_S)
    work = Work(expiry, NOW + timedelta(seconds=1))
    await asyncio.sleep(0)
    assert work.lapsing is not None
    work.lapsing.drain(30, lambda _: told.set())
    clock.now += timedelta(hours=1)
    async with asyncio.timeout(5):
        await work.task
    assert told.is_set()
    assert work.was_ours


async def test_whoever_fails_to_be_told_ends_all_the_same_and_so_do_the_others() -> None:
    def fail(_: object) -> None:
        raise LookupError("a bug of ours")

    clock = Clock()
    expiry = Expiry(clock, LOOK_S)
    works = [Work(expiry, NOW + timedelta(seconds=1)) for _ in range(2)]
    await asyncio.sleep(0)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    assert works[0].lapsing is not None
    works[0].lapsing.drain(30, fail)
    clock.now += timedelta(seconds=2)
    async with asyncio.timeout(5):
        await works[1].task
        clock.now += timedelta(seconds=40)
        await works[0].task
    assert [work.was_ours for work in works] == [True, True]


async def test_a_cancellation_by_others_is_not_ours() -> None:
    expiry = Expiry(Clock(), LOOK_S)
    work = Work(expiry, NOW + timedelta(hours=1))
    await asyncio.sleep(0)
    work.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work.task
    assert work.was_ours is False
    assert len(expiry) == 0


async def test_a_cancellation_by_others_beside_ours_goes_its_way() -> None:
    clock = Clock()
    expiry = Expiry(clock, LOOK_S)
    work = Work(expiry, NOW + timedelta(seconds=1))
    await asyncio.sleep(0)
    assert work.lapsing is not None
    clock.now += timedelta(seconds=2)
    expiry._look()
    work.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work.task
    assert work.was_ours is False


async def test_nobody_looks_at_the_clock_while_there_is_no_work() -> None:
    clock = Clock()
    expiry = Expiry(clock, LOOK_S)
    work = Work(expiry, NOW + timedelta(hours=1))
    await asyncio.sleep(0)
    work.may_end.set()
    await work.task
    await asyncio.sleep(3 * LOOK_S)
    asked = clock.asked
    await asyncio.sleep(5 * LOOK_S)
    assert clock.asked == asked <= 1


async def test_work_is_ended_for_another_cause_and_what_has_left_is_not() -> None:
    expiry = Expiry(Clock(), LOOK_S)
    ended, left, later = (Work(expiry, NOW + timedelta(hours=1)) for _ in range(3))
    await asyncio.sleep(0)
    lapsings = list(expiry)
    left.may_end.set()
    await left.task
    cause = UntrustedChain("no path leads to a root")
    for lapsing in lapsings:
        if lapsing is not later.lapsing:
            lapsing.drain(30, no_news)
            lapsing.end(cause)
    async with asyncio.timeout(5):
        await ended.task
    assert ended.was_ours
    assert ended.lapsing is not None
    assert ended.lapsing.cause is cause
    assert left.was_ours is None
    assert [*expiry] == [later.lapsing]
    later.may_end.set()
    await later.task


async def test_work_that_lapses_is_told_why_once_and_has_its_certificates_time_and_the_drain() -> None:
    clock = Clock()
    expiry = Expiry(clock, LOOK_S)
    work, deaf = Work(expiry, NOW + timedelta(seconds=10)), Work(expiry, NOW + timedelta(seconds=10))
    await asyncio.sleep(0)
    told: list[ParallaxError | None] = []
    cause = UntrustedChain("no path leads to a root")
    assert work.lapsing is not None
    assert deaf.lapsing is not None
    work.lapsing.drain(30, told.append)
    for lapsing in (work.lapsing, work.lapsing, deaf.lapsing):
        lapsing.lapse(cause)
    async with asyncio.timeout(5):
        await deaf.task
    assert deaf.was_ours
    assert told == [cause]
    for seconds in (11, 28):
        clock.now += timedelta(seconds=seconds)
        asked = clock.asked
        async with asyncio.timeout(5):
            while clock.asked < asked + 3:
                await asyncio.sleep(LOOK_S)
        assert not work.task.done()
    clock.now += timedelta(seconds=2)
    async with asyncio.timeout(5):
        await work.task
    assert told == [cause]
