"""The benchmark of enrollments measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from enrollment import measure, show


async def test_it_measures_both_ways_in_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = await measure(tmp_path / "data", rounds=2, newcomers=10, in_flight=4)
    assert list(measured) == ["redeem", "over HTTPS, both ends"]
    assert all(len(paces) == 2 for paces in measured.values())
    assert all(pace.per_s > 0 for paces in measured.values() for pace in paces)
    show(measured, 4)
    assert "target: 300 per core second" in capsys.readouterr().out
