"""Dependencies point one way, and the check that says so can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("control_plane", "protos", "runtime", "sdk", "security")


def lint_imports(directory: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The result of import-linter in *directory*, with the packages below *path* if one is given."""
    linter = Path(sys.executable).with_name("lint-imports")
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [linter, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of our packages, as `parallax/`."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, tmp_path / "parallax" / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    return tmp_path


def test_layers_hold() -> None:
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


def test_layers_hold_in_a_copy(tree: Path) -> None:
    """The twin of the next test: a copy alone breaks nothing."""
    result = lint_imports(tree, tree)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("security", "parallax.sdk"),
        ("security", "parallax.runtime"),
        ("security", "parallax.protos.task_pb2"),
        ("security", "google.protobuf.message"),
        ("protos", "parallax.security"),
        ("runtime", "parallax.control_plane"),
        ("control_plane", "parallax.sdk"),
    ],
)
def test_planted_import_is_found(tree: Path, importer: str, imported: str) -> None:
    (tree / "parallax" / importer / "planted.py").write_text(f"import {imported}\n")
    result = lint_imports(tree, tree)
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"parallax.{importer}.planted -> {imported.partition('.')[0]}" in result.stdout
