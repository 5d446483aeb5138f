"""The benchmark itself, for real and very short: that it runs and what it says, not how fast it was."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from client import measure
from measuring import TARGETS
from subject import NAMES, BenchmarkFailed, Stage, load

BENCH: Final = Path(__file__).resolve().parents[2] / "benchmarks" / "bench.py"
IN_FLIGHT: Final = (1, 4)


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH, *arguments], capture_output=True, text=True, timeout=230, check=False
    )


@pytest.mark.timeout(240)
def test_short_run_measures_every_subject_there_is(tmp_path: Path) -> None:
    shortest = ("--rounds", "1", "--seconds", "0.1", "--warm-up", "0.1", "--in-flight", *map(str, IN_FLIGHT))
    done = bench(*shortest, "--results", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    missing = {name for name in NAMES if load(name).missing() is not None}

    written = json.loads((tmp_path / "latest.json").read_text())
    assert set(written["missing"]) == missing
    assert [(cell["subject"], cell["in_flight"]) for cell in written["cells"]] == [
        (name, count) for name in NAMES if name not in missing for count in IN_FLIGHT
    ]
    for cell in written["cells"]:
        assert cell["tasks"] > 0, cell
        assert 0 < cell["p50_ms"] <= cell["p99_ms"], cell
        assert cell["cpu_s"] >= 0, cell
        assert cell["rss_bytes"] > 0, cell
    assert len(written["targets"]) == len(TARGETS)
    assert {target["verdict"] for target in written["targets"]} <= {"met", "missed", "not measured"}

    page = (tmp_path / "latest.md").read_text()
    for name in NAMES:
        assert f"- {load(name).title}: " in page
        assert load(name).title in done.stdout
    assert "<svg" in (tmp_path / "latest.svg").read_text()
    for said in (page, json.dumps(written)):
        assert os.uname().nodename not in said
        assert str(tmp_path) not in said


def test_unknown_subject_is_refused_with_the_list_of_those_there_are() -> None:
    done = bench("--subjects", "carrier_pigeon")
    assert done.returncode == 2
    assert "raw_unary" in done.stderr


@pytest.mark.parametrize("option", ["--rounds", "--seconds", "--in-flight", "--warm-up"])
def test_number_that_measures_nothing_is_refused(option: str) -> None:
    assert bench(option, "0").returncode == 2


def test_process_that_ends_too_early_fails_the_benchmark_and_says_why(tmp_path: Path) -> None:
    with (
        Stage("raw_unary", tmp_path, tmp_path, "asyncio") as stage,
        pytest.raises(BenchmarkFailed, match="FileNotFoundError"),
    ):
        load("raw_unary").start(stage)  # there are no certificates
    assert all(process.returncode is not None for process in stage.processes)


def test_process_that_says_nothing_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with Stage("raw_unary", tmp_path, tmp_path, "asyncio") as stage:
        silent = stage.spawn([sys.executable, "-c", "import time; time.sleep(20)"])
        with pytest.raises(BenchmarkFailed, match="silent"):
            stage.line(silent, 0.2)


async def test_answer_that_is_not_what_was_sent_fails_the_benchmark() -> None:
    async def wrong(payload: bytes) -> bytes:
        return payload[:-1]

    with pytest.RaisesGroup(pytest.RaisesExc(BenchmarkFailed, match="not what was sent")):
        await measure(wrong, asyncio.StreamReader(), in_flight=1, warm_up_s=10, seconds=10)


async def test_client_counts_every_answer_of_the_window_and_keeps_so_many_in_flight(
    capsys: pytest.CaptureFixture[str],
) -> None:
    most = open_now = 0

    async def echo(payload: bytes) -> bytes:
        nonlocal most, open_now
        open_now += 1
        most = max(most, open_now)
        await asyncio.sleep(0.001)
        open_now -= 1
        return payload

    commands = asyncio.StreamReader()
    commands.feed_data(b"stop\n")
    await measure(echo, commands, in_flight=3, warm_up_s=0.05, seconds=0.1)
    begin, end, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert (begin, end) == ({"begin": True}, {"end": True})
    assert most == 3
    assert 0 < result["tasks"] <= 3 * result["seconds"] / 0.001
    assert 1 <= result["p50_ms"] <= result["p99_ms"]


async def test_a_window_goes_on_until_there_is_an_answer(capsys: pytest.CaptureFixture[str]) -> None:
    async def slow(payload: bytes) -> bytes:
        await asyncio.sleep(0.3)
        return payload

    commands = asyncio.StreamReader()
    commands.feed_data(b"stop\n")
    await measure(slow, commands, in_flight=1, warm_up_s=0.05, seconds=0.1)
    *_, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert result["tasks"] == 1
