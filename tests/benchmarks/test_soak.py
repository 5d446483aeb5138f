"""The soak itself, for real and very short: that no answer is lost; whether something grows takes minutes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from soak import Findings
from soak_roles import Caller
from trend import FEWEST, trend

SOAK: Final = Path(__file__).resolve().parents[2] / "benchmarks" / "soak.py"


@pytest.mark.timeout(240)
def test_short_run_loses_no_answer(tmp_path: Path) -> None:
    found = tmp_path / "found.json"
    arguments = ("--minutes", "0.2", "--disturb-every", "1.5", "--sample-every", "1", "--json", found)
    done = subprocess.run(
        [sys.executable, SOAK, *map(str, arguments)], capture_output=True, text=True, timeout=230, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no answer was lost" in done.stdout
    said = json.loads(found.read_text())
    assert said["wrong"] == []
    assert set(said["disruptions"]) == {
        "kill agent",
        "stop agent",
        "take over",
        "kill client",
        "stop client",
    }
    for samples in said["samples"].values():
        assert 5 < len(samples) < FEWEST
        assert all(value > 0 for _, value in samples)
    acts = {what.partition(" ")[0] for what in said["tally"]}
    assert acts == {act.__name__ for act in Caller().acts}


def flat(count: int, noise: float) -> list[tuple[float, float]]:
    dice = random.Random(7)  # noqa: S311
    return [(n / 30, 100 + dice.gauss(0, noise)) for n in range(count)]


def test_noise_is_no_growth() -> None:
    found = trend(flat(240, 2.0), 1.0)
    assert found.is_flat
    assert found.tolerance == pytest.approx(3 * 2.0 / 8, rel=0.2)
    assert found.first == pytest.approx(found.last, abs=1.0)


def test_growth_beyond_noise_is_found() -> None:
    found = trend([(at, value + 1.5 * at) for at, value in flat(240, 2.0)], 1.0)
    assert not found.is_flat
    assert found.per_minute == pytest.approx(1.5, abs=0.2)


def test_what_shrinks_is_flat() -> None:
    assert trend([(at, value - 3 * at) for at, value in flat(240, 1.0)], 1.0).is_flat


def test_one_jump_of_a_grain_is_no_growth() -> None:
    assert trend([(n / 30, 100.0 + (n > 120)) for n in range(240)], 1.0).is_flat


def test_what_was_sampled_too_seldom_is_not_judged() -> None:
    for samples in ([], flat(FEWEST - 1, 0.0)):
        found = trend([(at, value + 99 * at) for at, value in samples], 1.0)
        assert found.tolerance is None
        assert found.is_flat


def test_the_warm_up_does_not_count() -> None:
    findings = Findings()
    findings.samples["rss_mib"] = [(n / 30, min(n, 48) * 10.0) for n in range(241)]
    assert findings.is_good
    findings.samples["open_files"] = [(n / 30, float(n)) for n in range(241)]
    assert not findings.is_good


def test_anything_wrong_spoils_it() -> None:
    assert Findings().is_good
    assert not Findings(wrong=["echo: never ended"]).is_good
