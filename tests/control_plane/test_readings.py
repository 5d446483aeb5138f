"""Who reads the audit log is entered, seldom, and reads whatever becomes of it."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest

from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.readings import MAX_READERS, PAUSE, Readings
from parallax.security.errors import StorageFailed
from tests.control_plane.audit_log import Recorder, verified
from tests.control_plane.clock import Clock

ADMIN = "spiffe://parallax.local/client/admin"


@pytest.fixture
def engine(engine: SqliteEngine) -> Recorder:
    return Recorder(engine)


@pytest.fixture
def readings(engine: Recorder, clock: Clock) -> Readings:
    return Readings(AuditLog(engine, clock), clock)


async def entered(engine: Recorder) -> list[tuple[str, str]]:
    return [(entry.deed.by, entry.deed.source) for entry in await verified(engine)]


async def test_whoever_goes_on_reading_is_entered_once_an_hour(
    readings: Readings, engine: Recorder, clock: Clock
) -> None:
    for _ in range(180):
        await readings.note(ADMIN, "10.0.0.1")
        clock.now += timedelta(minutes=1)
    assert await entered(engine) == [(ADMIN, "10.0.0.1")] * 3


async def test_the_same_certificate_from_elsewhere_is_another_entry(
    readings: Readings, engine: Recorder
) -> None:
    for source in ("10.0.0.1", "10.0.0.2", "10.0.0.1", "2001:db8::1", "2001:db8::2"):
        await readings.note(ADMIN, source)
    await readings.note(ADMIN.replace("admin", "olga"), "10.0.0.1")
    assert [source for _, source in await entered(engine)] == [
        "10.0.0.1",
        "10.0.0.2",
        "2001:db8::1",
        "10.0.0.1",
    ]


async def test_a_clock_that_is_set_back_hides_nobody(
    readings: Readings, engine: Recorder, clock: Clock
) -> None:
    await readings.note(ADMIN, "10.0.0.1")
    clock.now -= timedelta(days=1)
    await readings.note(ADMIN, "10.0.0.1")
    assert len(await entered(engine)) == 2


async def test_while_it_cannot_be_written_he_reads_and_is_entered_as_soon_as_it_can(
    readings: Readings, engine: Recorder
) -> None:
    engine.fails = StorageFailed("the disk is full")
    await readings.note(ADMIN, "10.0.0.1")
    engine.fails = None
    await readings.note(ADMIN, "10.0.0.1")
    assert await entered(engine) == [(ADMIN, "10.0.0.1")]


async def test_very_many_readers_fill_no_memory(readings: Readings, engine: Recorder, clock: Clock) -> None:
    readers = [f"{ADMIN}-{number}" for number in range(MAX_READERS + 1)]
    # At once, in that order: one by one each would wait for the disk.
    await asyncio.gather(*(readings.note(reader, "10.0.0.1") for reader in readers))
    clock.now += PAUSE / 2
    await readings.note(readers[-1], "10.0.0.1")
    assert len(await entered(engine)) == MAX_READERS + 1
    await readings.note(readers[0], "10.0.0.1")
    assert len(await entered(engine)) == MAX_READERS + 2
