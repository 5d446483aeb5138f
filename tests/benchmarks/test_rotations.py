"""Everything rotates under load, for real and for a short while; whether something grows takes minutes."""

from __future__ import annotations

import subprocess
import sys
from itertools import islice, pairwise
from pathlib import Path
from typing import Final

import pytest

from rotations import plan

ROTATIONS: Final = Path(__file__).resolve().parents[2] / "benchmarks" / "rotations.py"


@pytest.mark.timeout(300)
def test_short_run_fails_no_call() -> None:
    """Twelve rotations of everything, in which the root changes twice."""
    done = subprocess.run(
        [sys.executable, ROTATIONS, "--minutes", "0.5", "--rotations", "12"],
        capture_output=True,
        text=True,
        timeout=290,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 rotations of everything" in done.stdout
    assert ", 0 failures" in done.stdout
    assert "WRONG" not in done.stdout


def test_a_new_root_is_trusted_before_it_signs_and_the_old_one_until_nobody_needs_it() -> None:
    steps = list(islice(plan(12), 13))
    assert [len(bundle.roots) for _, bundle in steps] == [1, 1, 1, 1, 2, 2, 1, 1, 2, 2, 1, 1, 1]
    for (_, before), (authority, bundle) in pairwise(steps):
        assert authority.certificate in before.roots
        assert authority.certificate in bundle.roots
    assert len({authority.certificate for authority, _ in steps}) == 3


@pytest.mark.timeout(120)
def test_new_files_come_to_be_shown() -> None:
    done = subprocess.run(
        [sys.executable, ROTATIONS.with_name("pickup.py"), "--times", "3"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for how in ("in one rename", "by hand"):
        assert how in done.stdout
