"""The policy file of a running control plane: a good one is in force, a bad one changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from parallax.control_plane import issuance_file
from parallax.control_plane.issuance_file import IssuanceFile, load_issuance
from parallax.security import files
from parallax.security.errors import ConfigError
from parallax.security.identity import Identity
from parallax.security.issuance_policy import IssuancePolicy

AGENT_1 = Identity.parse_short("agent/agent-1")
HOUR = '[[issue]]\nholder = "agent"\nlongest = "1h"\n'
DAY = '[[issue]]\nholder = "agent"\nlongest = "1d"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "issuance.toml"
    path.write_text(HOUR)
    return path


def save(path: Path, text: str) -> None:
    path.write_text(text)


def longest(file: IssuanceFile) -> timedelta:
    return file.current.rule_for(AGENT_1).longest


async def look(file: IssuanceFile) -> None:
    for _ in range(2):
        await file.look()


async def test_without_a_file_there_is_no_rule_and_nothing_to_look_at() -> None:
    file = IssuanceFile(None)
    await look(file)
    assert (file.current, file.detail, file.problem) == (IssuancePolicy(), "none", "")
    assert load_issuance(None) == IssuancePolicy()


async def test_a_file_that_changes_is_in_force_once_it_has_settled(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    file = IssuanceFile(path)
    assert longest(file) == timedelta(hours=1)
    save(path, DAY)
    await file.look()
    assert longest(file) == timedelta(hours=1)  # it might still be being written
    await file.look()
    assert (longest(file), file.detail) == (timedelta(days=1), "in force")
    await look(file)
    assert [record.message for record in caplog.records] == ["issuance policy in force"]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (
            lambda path: path.write_text(f"{DAY}[[issue]]\n"),
            "issuance.toml: rule 2, line 4: holder is",
        ),
        (lambda path: path.write_text("[[issue"), "issuance.toml: not TOML"),
        (lambda path: path.write_text(""), "issuance.toml: it is empty, as when not written to its end"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "is not UTF-8"),
        (lambda path: path.write_text("#" * (files.MAX_BYTES + 1)), "issuance.toml"),
        (lambda path: path.unlink(), "issuance.toml is missing: put the issuance policy there"),
    ],
)
async def test_one_that_cannot_be_used_changes_nothing_and_is_said_once(
    path: Path, caplog: pytest.LogCaptureFixture, spoil: Callable[[Path], object], why: str
) -> None:
    caplog.set_level("INFO")
    file = IssuanceFile(path)
    spoil(path)
    for _ in range(3):
        await look(file)
    assert longest(file) == timedelta(hours=1)
    assert why in file.problem
    assert file.detail == "not usable, the one before is in force"
    save(path, HOUR)
    await look(file)
    assert (file.problem, file.detail) == ("", "in force")
    assert [record.message for record in caplog.records] == [
        "issuance policy not usable, the one before is in force",
        "issuance policy usable again",
    ]
    with pytest.raises(ConfigError, match=why):
        spoil(path)
        IssuanceFile(path)


async def test_it_looks_by_itself(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(issuance_file, "LOOK_S", 0.005)
    file = IssuanceFile(path)
    watching = asyncio.create_task(file.run())
    save(path, DAY)
    async with asyncio.timeout(10):
        while longest(file) != timedelta(days=1):
            await asyncio.sleep(0.005)
    watching.cancel()
