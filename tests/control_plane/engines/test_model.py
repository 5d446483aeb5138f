"""An engine and a dictionary are told the same; they must go on to agree, restarts included."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from parallax.control_plane.engines.engine import ABSENT, Event, Record, Write
from parallax.security.errors import Conflict, WatchGap

if TYPE_CHECKING:
    from tests.control_plane.engines.conftest import OpenEngine

HISTORY = 20  # so few that watches do fall behind
SEGMENT = st.sampled_from(["a", "b", "a.b", "a-b", "A", "0"])
KEY = st.lists(SEGMENT, min_size=1, max_size=3).map("/".join)
PREFIX = st.sampled_from(["", "a/", "b/", "a/b/", "A/"])
VALUE = st.one_of(st.none(), st.binary(max_size=3))
EXPECTED = st.sampled_from(["whatever", "as it is", "absent", "another"])


class Model(RuleBasedStateMachine):
    """The two beside each other."""

    def __init__(self, opening: Callable[[Path], OpenEngine]) -> None:
        super().__init__()
        self.scratch = tempfile.TemporaryDirectory()
        self.loop = asyncio.new_event_loop()
        self.open_engine: OpenEngine = opening(Path(self.scratch.name))
        self.live: dict[str, Record] = {}
        self.changes: dict[str, Record] = {}  # the last change of each key, removals included
        self.newest = 0
        self._open()

    def teardown(self) -> None:
        self._close()
        self.loop.close()
        self.scratch.cleanup()

    def _open(self) -> None:
        self.context = self.open_engine(history=HISTORY)
        self.engine = self.loop.run_until_complete(self.context.__aenter__())

    def _close(self) -> None:
        self.loop.run_until_complete(self.context.__aexit__(None, None, None))

    @rule()
    def restart(self) -> None:
        self._close()
        self._open()

    @rule(wanted=st.dictionaries(KEY, st.tuples(VALUE, EXPECTED), max_size=4))
    def commit(self, wanted: dict[str, tuple[bytes | None, str]]) -> None:
        writes, fits = [], True
        for key, (value, expecting) in wanted.items():
            actual = self.live[key].revision if key in self.live else ABSENT
            expected = {"whatever": None, "as it is": actual, "absent": ABSENT, "another": actual + 1}[
                expecting
            ]
            fits = fits and expected in (None, actual)
            writes.append(Write(key, value, expected))
        try:
            revisions = self.loop.run_until_complete(self.engine.commit(Event("tests/model"), writes))
        except Conflict:
            assert not fits
            return
        assert fits
        for write, revision in zip(writes, revisions, strict=True):
            assert revision > self.newest
            self.newest = revision
            self.changes[write.key] = record = Record(write.key, revision, write.value)
            self.live.pop(write.key, None)
            if write.value is not None:
                self.live[write.key] = record

    @rule(prefix=PREFIX, back=st.integers(0, 2 * HISTORY))
    def watch(self, prefix: str, back: int) -> None:
        """Each change since then is told, or that there is a gap; but within the history there is none."""
        since = max(0, self.newest - back)
        expected = sorted(
            (r for r in self.changes.values() if r.revision > since and r.key.startswith(prefix)),
            key=lambda record: record.revision,
        )
        try:
            assert self.loop.run_until_complete(self._told(prefix, since, len(expected))) == expected
        except WatchGap:
            assert since < self.loop.run_until_complete(self.engine.revision()) - HISTORY

    async def _told(self, prefix: str, since: int, count: int) -> list[Record]:
        records: list[Record] = []
        async with asyncio.timeout(5), aclosing(self.engine.watch(prefix, since)) as watch:
            while len(records) < count:
                records.append(await anext(watch))
        return records

    @rule(prefix=PREFIX, limit=st.integers(1, 4))
    def scan(self, prefix: str, limit: int) -> None:
        found: list[Record] = []
        while page := self.loop.run_until_complete(
            self.engine.scan(prefix, found[-1].key if found else "", limit)
        ):
            assert len(page) <= limit
            found += page
        assert found == [self.live[key] for key in sorted(self.live) if key.startswith(prefix)]

    @rule(key=KEY)
    def get(self, key: str) -> None:
        assert self.loop.run_until_complete(self.engine.get(key)) == self.live.get(key)

    @invariant()
    def revision_is_that_of_the_last_commit(self) -> None:
        assert self.loop.run_until_complete(self.engine.revision()) >= self.newest


@pytest.mark.timeout(120)
def test_an_engine_does_what_a_dictionary_does(opening: Callable[[Path], OpenEngine]) -> None:
    run_state_machine_as_test(
        lambda: Model(opening),  # type: ignore[arg-type]  # anything that makes one will do
        settings=settings(max_examples=60, stateful_step_count=30, deadline=None),
    )
