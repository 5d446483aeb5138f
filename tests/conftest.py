"""Fixtures that every part of the test suite shares."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import HealthCheck, settings

from parallax.runtime import backoff

# A loaded machine takes its time, and an example's time is no property of the code. Here, so that it holds
# before any test module is read.
settings.register_profile("at-leisure", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("at-leisure")


@pytest.fixture(scope="session")
def _homes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Apart: whoever makes a directory beside them looks at all there are, for its number."""
    return tmp_path_factory.mktemp("homes")


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, _homes: Path) -> None:
    """Nobody's certificates: a process looks in `~/.mtls` last, and a test could write there."""
    monkeypatch.setenv("HOME", tempfile.mkdtemp(dir=_homes))


@pytest.fixture
def moves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is put off when credentials change, for tests that change them many times."""
    monkeypatch.setattr(backoff, "MOVE_WITHIN_S", 0.0)


def go_without(reason: str) -> NoReturn:
    """Skip a test that cannot run here, for *reason*; where CI=true that fails."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def require_tool() -> Callable[[str], str]:
    """The path of a system tool: without it a test skips with the reason, and fails where CI=true."""

    def find(name: str) -> str:
        path = shutil.which(name)
        if path is None:
            go_without(f"needs the system tool {name!r}, which is not installed")
        return path

    return find


@pytest.fixture
def own_mounts(tmp_path: Path, require_tool: Callable[[str], str]) -> tuple[str, ...]:
    """What a program is run by that mounts disks which it alone sees, where the kernel lets it."""
    unshare = (require_tool("unshare"), "--user", "--map-root-user", "--mount")
    if subprocess.run([*unshare, "mount", "-t", "tmpfs", "none", tmp_path], check=False).returncode:
        go_without("nothing may be mounted here")
    return unshare
