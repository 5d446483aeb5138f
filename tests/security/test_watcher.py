"""What is told, what is not, and what happens where nothing can be."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from watchdog.events import FileSystemEvent

from parallax.security.watcher import Watcher, way

WITHIN_S: Final = 10.0


@pytest.fixture
def told() -> threading.Event:
    return threading.Event()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "certs" / "key.pem"
    path.parent.mkdir()
    path.write_text("key")
    return path


@pytest.fixture
def watcher(file: Path, told: threading.Event) -> Iterator[Watcher]:
    made = Watcher([file], told.set)
    made.arrange()
    yield made
    made.close()


def steps(path: Path) -> list[str]:
    return [step for _, step in way(path)]


class TestWay:
    def test_is_every_name_from_the_root_on(self) -> None:
        assert list(way(Path("/a/b"))) == [("/", "/a")]  # and there it ends
        assert steps(Path("/usr/bin/../lib/"))[:2] == ["/usr", "/usr/bin"]

    def test_follows_links_of_every_kind(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "file").touch()
        (tmp_path / "relative").symlink_to("./real")
        (tmp_path / "absolute").symlink_to(tmp_path / "relative")
        (tmp_path / "up").symlink_to("absolute/../real/file")
        found = steps(tmp_path / "up")
        for name in ("up", "absolute", "relative", "real", "real/file"):
            assert str(tmp_path / name) in found
        assert found[-1] == str(tmp_path / "real/file")

    def test_ends_where_nothing_is(self, tmp_path: Path) -> None:
        (tmp_path / "dangling").symlink_to("gone/deep/file")
        assert steps(tmp_path / "dangling")[-1] == str(tmp_path / "gone")

    def test_of_a_circle_ends(self, tmp_path: Path) -> None:
        (tmp_path / "a").symlink_to("b")
        (tmp_path / "b").symlink_to("a")
        assert len(steps(tmp_path / "a")) < 100


@pytest.mark.usefixtures("watcher")
class TestTold:
    def test_of_a_change_to_the_file(self, file: Path, told: threading.Event) -> None:
        file.write_text("other")
        assert told.wait(WITHIN_S)

    def test_of_a_change_to_its_mode(self, file: Path, told: threading.Event) -> None:
        file.chmod(0o600)
        assert told.wait(WITHIN_S)

    def test_of_its_directory_renamed(self, file: Path, told: threading.Event) -> None:
        file.parent.rename(file.parent.with_name("old"))
        assert told.wait(WITHIN_S)

    def test_neither_of_its_neighbours_nor_of_being_read(
        self, file: Path, watcher: Watcher, told: threading.Event, tmp_path: Path
    ) -> None:
        with noting(watcher) as seen:
            (file.parent / "other.pem").write_text("x")
            (tmp_path / "beside").mkdir()
            file.read_text()
            until_seen(file.parent / "last", seen)
        assert not told.is_set()

    def test_of_a_file_that_lies_in_place_of_a_link(
        self, file: Path, watcher: Watcher, told: threading.Event
    ) -> None:
        there = file.rename(file.with_name("there"))
        file.symlink_to(there)
        watcher.arrange()
        file.unlink()
        file.write_text("")
        watcher.arrange()
        with noting(watcher) as seen:
            until_seen(file.parent / "last", seen)
        told.clear()
        file.write_text("other")
        assert told.wait(WITHIN_S)


@contextmanager
def noting(watcher: Watcher) -> Iterator[list[str]]:
    """What the kernel tells *watcher* of, meanwhile."""
    seen: list[str] = []
    handle = watcher._handler.on_any_event

    def note(event: FileSystemEvent) -> None:
        handle(event)
        seen.append(os.fsdecode(event.src_path))

    watcher._handler.on_any_event = note  # type: ignore[method-assign]
    yield seen


def until_seen(last: Path, seen: list[str]) -> None:
    """Make the directory *last*, and wait until that is told: so is what was before."""
    last.mkdir()
    deadline = time.monotonic() + WITHIN_S
    while str(last) not in seen:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_written_beside_a_directory_on_the_way_is_not_even_read(
    file: Path, watcher: Watcher, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.touch()
    with noting(watcher) as seen:
        until_seen(tmp_path / "first", seen)
        seen.clear()
        log.write_text("line")
        until_seen(tmp_path / "last", seen)
    assert str(log) not in seen


def test_a_directory_where_everybody_writes_is_not_watched_but_what_is_in_it_is(
    file: Path, told: threading.Event
) -> None:
    """24,000 files a second in /tmp made us use a whole core, without a single change to ours."""
    shared = file.parent.parent
    shared.chmod(0o1777)
    watcher = Watcher([file], told.set)
    watcher.arrange()
    assert str(file.parent) in watcher._watches
    assert str(shared) not in watcher._watches
    watcher.close()


def test_a_closed_one_watches_nothing_again(file: Path, told: threading.Event) -> None:
    watcher = Watcher([file], told.set)
    watcher.arrange()
    watcher.close()
    watcher.close()
    watcher.arrange()
    assert watcher._observer is None


def test_watches_that_are_needed_no_more_end(file: Path, tmp_path: Path, told: threading.Event) -> None:
    link = tmp_path / "link"
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    link.symlink_to("first")
    watcher = Watcher([link / "file"], told.set)
    watcher.arrange()
    assert str(tmp_path / "first") in watcher._watches
    link.unlink()
    link.symlink_to("second")
    watcher.arrange()
    assert str(tmp_path / "first") not in watcher._watches
    assert str(tmp_path / "second") in watcher._watches
    watcher.close()


class Late(Watcher):
    """One whose *link* leads to the next of *targets* each time that the way is known and not watched yet."""

    link: Path
    targets: Iterator[str]

    def _observe(self, ends: Mapping[str, bool]) -> None:
        for target in itertools.islice(self.targets, 1):
            new = self.link.with_name("next")
            new.symlink_to(target)
            new.rename(self.link)
        super()._observe(ends)


@pytest.fixture
def late(tmp_path: Path, told: threading.Event) -> Iterator[Late]:
    """It watches a file beyond a link to one of two directories, `first`."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    link = tmp_path / "link"
    link.symlink_to("first")
    late = Late([link / "file"], told.set)
    late.link = link
    yield late
    late.close()


def test_where_a_link_leads_that_is_swapped_just_before_it_is_watched_is_watched(
    late: Late, told: threading.Event
) -> None:
    late.targets = iter(["second"])
    late.arrange()
    assert not told.is_set()
    (late.link / "file").write_text("other")
    assert told.wait(WITHIN_S)


def test_who_swaps_a_link_without_a_pause_keeps_nobody_busy_and_is_told_of(
    late: Late, told: threading.Event
) -> None:
    late.targets = itertools.cycle(["second", "first"])
    late.arrange()
    assert told.wait(WITHIN_S)


def test_where_no_watch_can_be_had_it_says_so_once_and_tries_again(tmp_path: Path) -> None:
    """A host's limits: no descriptor is left in the child."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path], check=False, capture_output=True, text=True, timeout=20
    )
    assert (done.returncode, done.stdout.split()) == (0, ["1", "False", "True"]), done.stderr
    assert done.stderr.count("certificate files are not all watched") == 1


CHILD: Final = """
import logging, os, resource, sys
from pathlib import Path
from parallax.security.watcher import Watcher
logging.basicConfig()
watcher = Watcher([Path(sys.argv[1]) / "file"], lambda: None)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
lowest = os.dup(0)
os.close(lowest)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
watcher.arrange()
watcher.arrange()
print(1, watcher._observer is not None)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
watcher.arrange()
print(watcher._observer is not None)
watcher.close()
"""


def test_a_directory_that_may_not_be_listed_is_passed(
    file: Path, told: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    file.parent.chmod(0o100)
    watcher = Watcher([file], told.set)
    watcher.arrange()
    watcher.close()
    file.parent.chmod(0o700)
    assert not caplog.records


def test_what_watchdog_says_of_its_own_end_is_no_error_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    theirs = logging.getLogger("watchdog.observers.inotify")
    theirs.error("InotifyEmitter.queue_events() called when the thread is inactive")
    theirs.error("something else")
    assert caplog.messages == ["something else"]
