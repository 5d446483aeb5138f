"""The engines that there are, each on a place that outlives it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import pytest

from parallax.control_plane.engines.engine import Engine
from parallax.control_plane.engines.sqlite import SqliteEngine


class OpenEngine(Protocol):
    """Opens an engine on the place of this test; again after it was closed, it finds what it held."""

    def __call__(self, *, history: int = ...) -> AbstractAsyncContextManager[Engine]: ...


def _sqlite(directory: Path) -> OpenEngine:
    def open_engine(*, history: int = 1_000) -> AbstractAsyncContextManager[Engine]:
        return SqliteEngine(directory / "data", history=history)

    return open_engine


# Whatever implements the seam is added here, and has to pass the whole suite.
ENGINES: dict[str, Callable[[Path], OpenEngine]] = {"sqlite": _sqlite}


@pytest.fixture(params=ENGINES)
def opening(request: pytest.FixtureRequest) -> Callable[[Path], OpenEngine]:
    """Each engine: what opens it on a given directory."""
    return ENGINES[request.param]


@pytest.fixture
def open_engine(opening: Callable[[Path], OpenEngine], tmp_path: Path) -> OpenEngine:
    """See `OpenEngine`."""
    return opening(tmp_path)
