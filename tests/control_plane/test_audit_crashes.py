"""Processes killed while they record deeds, and a disk that fills: the chain is whole all the same."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from parallax.control_plane.engines.sqlite import SqliteEngine
from tests.control_plane.audit_log import verified

WRITER = Path(__file__).with_name("audit_writer.py")
ROUNDS = 100


class Writers:
    """Starts one after the other on a directory; see `audit_writer.py`."""

    def __init__(self, says: IO[str], hears: IO[str]) -> None:
        self._says = says
        self._hears = hears
        self.lines: list[str] = []

    def begin(self, first: int, limit: str = "") -> int:
        """The process that records from number *first* on."""
        self._hears.write(f"{first} {limit}\n")
        self._hears.flush()
        while not (line := self._next()).startswith("began "):
            self.lines.append(line)
        return int(line.split()[1])

    def hear(self, beginning: str, count: int) -> None:
        """Go on until *count* lines begin so."""
        while sum(line.startswith(beginning) for line in self.lines) < count:
            self.lines.append(self._next())

    def kill(self, process: int) -> None:
        os.kill(process, signal.SIGKILL)
        while (line := self._next()) != "ended":
            self.lines.append(line)

    def acknowledged(self) -> set[str]:
        return {line.removeprefix("done ") for line in self.lines if line.startswith("done ")}

    def _next(self) -> str:
        line = self._says.readline()
        assert line, f"the writer has ended: {self.lines[-3:]}"
        return line.strip()


@pytest.fixture
def writers(tmp_path: Path) -> Iterator[Writers]:
    arguments = [sys.executable, str(WRITER), str(tmp_path / "data")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            yield Writers(process.stdout, process.stdin)
        finally:
            process.stdin.close()


@pytest.mark.timeout(300)
async def test_killed_at_any_moment_it_leaves_a_whole_chain_with_all_that_was_acknowledged(
    writers: Writers, tmp_path: Path
) -> None:
    moments = random.Random(7)  # noqa: S311 - the same ones each time
    noted = None
    for number in range(ROUNDS):
        process = writers.begin(number * 100_000)
        writers.hear("done ", len(writers.acknowledged()) + moments.choice([0, 1, 5, 30, 100]))
        writers.kill(process)
        if number % 20 == 19:
            async with SqliteEngine(tmp_path / "data") as engine:
                entries = await verified(engine, noted)
                noted = entries[-1].head
                found = {entry.deed.subject for entry in entries}
                assert writers.acknowledged() <= found
                for entry in entries[:: max(1, len(entries) // 50)]:
                    assert await engine.get(f"n/{int(entry.deed.subject):08}") is not None
    assert len(entries) == len(found) > 1_000


@pytest.mark.timeout(60)
async def test_on_a_full_disk_it_says_so_reads_go_on_and_nothing_is_missing_afterwards(
    writers: Writers, tmp_path: Path
) -> None:
    process = writers.begin(0, "900000")
    writers.hear("room", 1)
    before = len(writers.acknowledged())
    writers.hear("done ", before + 200)
    writers.kill(process)
    failed = [line for line in writers.lines if line.startswith("failed ")]
    assert len(failed) >= 50
    assert all("nothing is recorded until then" in line for line in failed)
    [read] = [line for line in writers.lines if line.startswith("read ")]
    assert int(read.split()[1]) > 50
    async with SqliteEngine(tmp_path / "data") as engine:
        found = {entry.deed.subject for entry in await verified(engine)}
    assert writers.acknowledged() <= found
    assert before > 50
