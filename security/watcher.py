"""Being told when what lies on the way to some files changes, whichever way it is changed."""

from __future__ import annotations

import logging
import os
import stat
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from watchdog.events import (
    DirAttribEvent,
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path

    from watchdog.observers.api import BaseObserver, ObservedWatch

logger = logging.getLogger(__name__)

# When a watch ends while an event of it is read, watchdog calls that an error.
logging.getLogger("watchdog.observers.inotify").addFilter(
    lambda record: "called when the thread is inactive" not in record.getMessage()
)

_MAX_LINKS: Final = 40  # as the kernel follows
_MOST_TRIES: Final = 5  # who swaps for longer is told of: each try sees one link further at least
_STOP_S: Final = 2.0  # it takes milliseconds
_NAMES: Final[tuple[type[FileSystemEvent], ...]] = (
    DirAttribEvent,
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileAttribEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
)
# Not that a file was opened and closed: that would be our own reading of it.
_CONTENTS: Final[tuple[type[FileSystemEvent], ...]] = (FileClosedEvent, FileModifiedEvent)


class Watcher:
    """
    Calls *on_change*, in a thread of its own, when something on the way to *paths* is changed.

    Every directory on the way is watched, and in it the one name that the way takes: so a link that
    is swapped anywhere is seen, and a directory that is deleted or renamed and made again. What lies
    beside the way is not told. It costs us some 40 µs all the same if the kernel tells us of it: so what is
    written into files is asked for only where the way ends, not in a directory that it goes through, where
    there may be a log; and directories where everybody writes, as `/tmp`, are not watched, since that would
    be anybody's to spend. Events can also be lost (a full queue, a file system over the network, a limit of
    this host): whoever needs to know must look from time to time.

    The watches are those of the moment of the last `arrange`, which is to be called after each
    change and before looking. It may block, and is safe to call from any thread, as is `close`.

    Attributes:
        restarts: How often the observer was found dead and replaced.
    """

    def __init__(self, paths: Iterable[Path], on_change: Callable[[], None]) -> None:
        self.restarts = 0
        self._paths = tuple(path.absolute() for path in paths)
        self._handler = _Handler(on_change)
        self._lock = threading.Lock()
        self._observer: BaseObserver | None = None
        self._watches: dict[str, tuple[ObservedWatch, _Sight]] = {}
        self._problem = ""
        self._is_closed = False

    def arrange(self) -> None:
        """Watch what is on the way now; start the observer if it does not run."""
        with self._lock:
            if self._is_closed:
                return
            if self._observer is not None and not _is_alive(self._observer):
                self.restarts += 1
                logger.warning("the observer of certificate files had ended: it is started again")
                self._stop()
            watched: _Ways | None = None
            # A link that was swapped just before it was watched is not told of: so the way is found again.
            for _ in range(_MOST_TRIES):
                ways = _ways(self._paths)
                if ways == watched:
                    return
                self._watch(ways)
                watched = ways

    def close(self) -> None:
        """Watch nothing more."""
        with self._lock:
            self._is_closed = True
            self._stop()

    def _watch(self, ways: _Ways) -> None:
        """Watch them as far as that can be had."""
        self._handler.steps = ways.steps
        try:
            self._observe(ways.ends)
        except FileNotFoundError:
            pass  # gone this moment, which its parent's watch tells
        except Exception as exc:  # noqa: BLE001 - a limit of this host, or an observer that dies just now
            self._note(exc)
        else:
            self._problem = ""

    def _observe(self, ends: Mapping[str, bool]) -> None:
        if self._observer is None:
            observer = Observer()
            observer.start()
            self._observer = observer
        observer = self._observer
        # A watch ends with its directory, also when one of that name, or that number, is made again.
        ended = {emitter.watch for emitter in observer.emitters if not emitter.is_alive()}
        sights = {directory: _sight(directory, contents=is_end) for directory, is_end in ends.items()}
        for directory, (watch, sight) in list(self._watches.items()):
            if watch in ended or sight != sights.get(directory):
                del self._watches[directory]
                observer.unschedule(watch)
        for directory in sorted(sights.keys() - self._watches.keys()):  # a parent before what lies in it
            found = sights[directory]
            if found is not None:
                events = [*_NAMES, *_CONTENTS] if found.contents else [*_NAMES]
                watch = observer.schedule(self._handler, directory, event_filter=events)
                self._watches[directory] = watch, found

    def _stop(self) -> None:
        observer, self._observer = self._observer, None
        self._watches.clear()
        if observer is not None:
            with suppress(OSError):  # what is half dead has closed its descriptors already
                observer.stop()
            observer.join(_STOP_S)

    def _note(self, exc: Exception) -> None:
        problem = getattr(exc, "strerror", None) or f"{type(exc).__name__}: {exc}"
        if problem != self._problem:
            self._problem = problem
            logger.warning(
                "certificate files are not all watched, only looked at from time to time",
                extra={"cause": problem.lower()},
            )


class _Handler(FileSystemEventHandler):
    """
    Tells of what happens to the *steps* alone.

    Attributes:
        steps: The paths that matter.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.steps: frozenset[str] = frozenset()
        self._on_change = on_change

    def on_any_event(self, event: FileSystemEvent) -> None:
        if {os.fsdecode(event.src_path), os.fsdecode(event.dest_path)} & self.steps:
            self._on_change()


def way(path: Path) -> Iterator[tuple[str, str]]:
    """
    The steps by which the kernel reaches *path*, which is absolute: (directory, path of a name in it).

    Links are followed: each directory is a real one. The last step may lead to nothing.
    """
    here, links = "/", 0
    names = str(path).split("/")[::-1]
    while names:
        name = names.pop()
        if name in {"", "."}:
            continue
        if name == "..":
            here = os.path.dirname(here)  # noqa: PTH120 - *here* has no links
            continue
        step = os.path.join(here, name)  # noqa: PTH118 - these are the texts that events come with
        yield here, step
        try:
            target = os.readlink(step)  # noqa: PTH115
        except OSError:  # no link
            if not os.path.isdir(step):  # noqa: PTH112 - never raises
                return
            here = step
            continue
        links += 1
        if links > _MAX_LINKS:
            return
        if target.startswith("/"):
            here = "/"
        names.extend(target.split("/")[::-1])


class _Ways(NamedTuple):
    """
    What lies on the way to some files.

    Attributes:
        steps: The paths that the ways take.
        ends: Of each directory, whether one of them ends there.
    """

    steps: frozenset[str]
    ends: Mapping[str, bool]


def _ways(paths: Iterable[Path]) -> _Ways:
    steps = set[str]()
    ends: dict[str, bool] = {}
    for path in paths:
        for directory, step in way(path):
            steps.add(step)
            ends.setdefault(directory, False)
        ends[directory] = True
    return _Ways(frozenset(steps), ends)


class _Sight(NamedTuple):
    """What there is to see of a directory: by its number it is told from another of that name."""

    device: int
    inode: int
    contents: bool


def _sight(directory: str, *, contents: bool) -> _Sight | None:
    """*contents*: whether those of the files in it matter, too; None if there is nothing to watch."""
    try:
        about = os.stat(directory)  # noqa: PTH116
    except OSError:
        return None
    return None if about.st_mode & stat.S_ISVTX else _Sight(about.st_dev, about.st_ino, contents)


def _is_alive(observer: BaseObserver) -> bool:
    """Whether its threads run; on Linux one of them reads for all watches, and it has no public name."""
    reader = getattr(observer, "_inotify_fd", observer)
    return observer.is_alive() and bool(reader.is_alive())
