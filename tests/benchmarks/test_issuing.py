"""The benchmark of issuing certificates measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from issuing import measure, show


async def test_it_measures_every_part_in_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = await measure(tmp_path / "data", rounds=2, certificates=20, in_flight=4)
    assert list(measured) == ["CSR, sign: bare", "CSR, sign, check", "… and record", "record alone"]
    assert all(len(paces) == 2 for paces in measured.values())
    assert all(pace.per_s > 0 for paces in measured.values() for pace in paces)
    show(measured, 4)
    assert "target: 1,000 per core second" in capsys.readouterr().out
