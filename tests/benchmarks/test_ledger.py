"""The benchmark of a large ledger asks what it says, of certificates that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from crashes_faults import torn_certificates
from ledger import measure, show
from parallax.control_plane.engines.sqlite import SqliteEngine


async def test_it_asks_every_question_and_makes_the_ledger_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        measured = await measure(tmp_path / "data", certificates=150, questions=3)
        assert len(measured.answers_ms) == 6
        assert all(len(times) == 3 for times in measured.answers_ms.values())
    show(measured)
    out = capsys.readouterr().out
    assert out.count("150 certificates made") == 1
    assert "targets: 10 ms each at p99, 2 s to open: " in out


async def test_what_it_makes_is_what_a_ledger_would_have_written(tmp_path: Path) -> None:
    await measure(tmp_path / "data", certificates=150, questions=3)
    async with SqliteEngine(tmp_path / "data") as engine:
        records = {record.key: record for record in await engine.scan("", limit=1_000)}
    assert not [*torn_certificates(records)]
