"""A ledger that is killed while it writes: nothing acknowledged is lost, nothing is there by half."""

from __future__ import annotations

from pathlib import Path

import pytest

from crashes import crash, find_faults, read
from parallax.control_plane.engines.engine import Record


@pytest.mark.timeout(120)
def test_whenever_it_is_killed_all_that_was_acknowledged_is_there_and_whole(tmp_path: Path) -> None:
    """Twenty times here; `make crashes` does it two hundred times."""
    outcome = crash(tmp_path / "data", rounds=20)
    assert outcome.faults == ()
    assert outcome.acknowledged > 100
    assert outcome.certificates > 20


async def test_what_is_missing_or_there_by_half_is_found(tmp_path: Path) -> None:
    """The twin: each record that is taken away is missed."""
    await _crash_once(tmp_path / "data")
    records = await read(tmp_path / "data")
    assert not find_faults(records, records)
    kinds = {key.partition("/")[0] for key in records}
    assert kinds == {"audit", "audit-head", "certificates", "deeds", "holders", "keys", "lookups"}
    for kind in kinds:
        gone = next(key for key in records if key.partition("/")[0] == kind)
        rest: dict[str, Record] = {key: record for key, record in records.items() if key != gone}
        assert find_faults(rest, [])
        assert find_faults(rest, [gone])


async def _crash_once(directory: Path) -> None:
    import asyncio

    await asyncio.to_thread(crash, directory, 2)
