"""The benchmark of a whole control plane starts one on what it made, and asks it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import pytest

from crashes_faults import torn_certificates
from made_ledger import Makeup, fill
from million import AIMED, main
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.ledger import Ledger, Wanted
from parallax.control_plane.revocations import RevocationLog
from tests.control_plane.audit_log import verified

PARTS: Final = {"certificates", "holders", "lookups", "keys"}


def now() -> datetime:
    return datetime.now(UTC)


async def test_what_it_makes_is_what_a_control_plane_would_have_written(tmp_path: Path) -> None:
    makeup = Makeup(100, 7, 0.25, 50, 5, "ab" * 32, now().isoformat())
    assert Makeup.load(tmp_path) is None
    async with SqliteEngine(tmp_path):
        pass
    fill(tmp_path, makeup)
    assert Makeup.load(tmp_path) == makeup
    async with SqliteEngine(tmp_path) as engine:
        audit = AuditLog(engine, now)
        ledger, revocations = Ledger(engine, audit, now), RevocationLog(engine, audit, now)
        assert len(await verified(engine)) == 50
        records = await engine.scan("")
        certificates = {each.key: each for each in records if each.key.split("/")[0] in PARTS}
        assert not list(torn_certificates(certificates))
        valid, _ = await ledger.page(Wanted(ends_after=now()))
        assert valid == [makeup.entry(number) for number in range(75, 100)]
        await revocations.load()
        assert [each.is_revoked(revocations.current) for each in valid] == [False] * 20 + [True] * 5


@pytest.mark.timeout(120)
def test_it_starts_a_control_plane_and_asks_every_question(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (
        "--certificates",
        "300",
        "--identities",
        "30",
        "--entries",
        "20",
        "--revoked",
        "2",
        "--valid",
        "1",
    )
    main(
        [*small, "--times", "2", "--directory", str(tmp_path)]
    )  # whether it meets the targets is a matter of time
    out = capsys.readouterr().out
    assert "300 certificates, 300 of them valid, of 30 identities; 2 revoked; 20 audit entries" in " ".join(
        out.split()
    )
    assert all(name in out for name in AIMED)
    assert "ready: " in out
    assert "targets: 10 ms each at p99" in out
