"""The benchmark of authorization measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from authorizing import measure, show
from identities import write_certificates


async def test_it_measures_a_call_and_every_step_in_every_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_certificates(tmp_path)
    measured = await measure(tmp_path, rounds=2, calls=20)
    assert list(measured) == ["a unary call", "who calls", "… and may they, and ask whom"]
    assert all(len(took) == 2 for took in measured.values())
    show(measured)
    assert "target: 5% of a call" in capsys.readouterr().out
