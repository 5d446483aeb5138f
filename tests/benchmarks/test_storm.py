"""
The storm itself, for real and short: a server lives through hundreds of rotations under it.

What happens without a pin is no test, for it is a matter of luck: docs/decisions/0005-pin-before-swap.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from storm import Findings, misled, terms
from storm_roles import GOOD, KINDS

STORM: Final = Path(__file__).resolve().parents[2] / "benchmarks" / "storm.py"
SERVER: Final[Sequence[dict[str, Any]]] = (
    {"port": 1, "serial": 10},
    {"serial": 11, "published": 5.0, "in_force": 5.1, "result": "pinned"},
    {"serial": 12, "published": 7.0, "in_force": 7.2, "result": "pinned"},
    {"done": True},
)


@pytest.mark.timeout(180)
def test_a_server_lives_through_a_short_one(tmp_path: Path) -> None:
    found, log = tmp_path / "found.json", tmp_path / "log"
    arguments = ("--rotations", "200", "--rate", "500", "--at-least", "50", "--json", found, "--log", log)
    done = subprocess.run(
        [sys.executable, STORM, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert done.returncode == 0, done.stdout + log.read_text()
    assert "the server lives" in done.stdout
    said = json.loads(found.read_text())
    assert said["rotations"] == {"pinned": 200}
    assert said["wrong"] == []
    assert set(said["done"]) == set(KINDS)
    assert all(said["done"][kind] > 20 for kind in GOOD)


def judged(
    *,
    server: Sequence[dict[str, Any]] = SERVER,
    exit_code: int | None = 0,
    failures: Sequence[str] = (),
    seen: Sequence[tuple[int, float, float]] = ((10, 0.0, 0.1), (11, 5.2, 5.3), (12, 8.0, 8.1)),
    least: float = 10.0,
) -> list[str]:
    findings = Findings(2)
    clients = {"seconds": 8.0, "done": {"tcp": 90}, "failed": {}, "failures": failures, "seen": seen}
    findings.judge(server, clients, exit_code, least)
    return findings.wrong


def test_a_good_one_is_found_good() -> None:
    assert judged() == []


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"exit_code": -11}, "has died: SIGSEGV"),
        ({"exit_code": 1}, "has died: exit code 1"),
        ({"exit_code": None}, "has died: it hung"),
        ({"server": (*SERVER[:2], {}), "seen": []}, "1 times, not 2"),
        ({"failures": ["grpc: UNAVAILABLE"]}, "grpc: UNAVAILABLE"),
        ({"seen": [(13, 8.0, 8.1)]}, "shown d, which was not in force"),
        ({"least": 12.0}, "too weak"),
    ],
)
def test_one_thing_wrong_spoils_it(wrong: dict[str, Any], text: str) -> None:
    (found,) = judged(**wrong)
    assert text in found


@pytest.mark.parametrize(
    ("seen", "is_wrong"),
    [
        ((11, 4.0, 4.9), True),  # before it was published
        ((11, 4.0, 5.0), False),
        ((11, 7.1, 7.3), False),  # its successor was not in force yet
        ((11, 7.3, 7.4), True),
        ((10, 5.2, 5.3), True),
        ((12, 90.0, 90.1), False),
    ],
)
def test_a_certificate_may_be_seen_from_its_publication_until_the_next_is_in_force(
    *, seen: tuple[int, float, float], is_wrong: bool
) -> None:
    assert bool(misled(terms(SERVER), [seen])) is is_wrong
