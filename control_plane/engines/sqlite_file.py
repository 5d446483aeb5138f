"""One SQLite file with events and records: opened, checked, written and read, all in one thread."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Final

from parallax.control_plane.engines.engine import ABSENT, Event, Onward, Record, Write
from parallax.security.errors import ConfigError, Conflict, Fault, StorageFailed, WatchGap
from parallax.security.files import PRIVATE, PRIVATE_DIRECTORY, command, show

NAME: Final = "parallax.db"
LOCK_NAME: Final = "parallax.lock"
SCHEMA: Final = 1  # this program reads and writes; a file says its own in `user_version`
HISTORY: Final = 300_000  # revisions whose events, and whose records that were taken out, are kept

CHECKED_BYTES: Final = 256 << 20  # a larger file takes more than a second to read through at the start

_APPLICATION: Final = 0x504C4C58  # "PLLX": says that a SQLite file is ours
_BUSY_S: Final = 5.0  # another program that reads a backup may hold the file for a moment
_CACHE_KIB: Final = 128
_WAL_BYTES: Final = 16 << 20  # what the log shrinks to after a burst
_BEHIND_ALL: Final = "\x7f"  # behind every key
_TABLES: Final = (
    "CREATE TABLE events (revision INTEGER PRIMARY KEY, topic TEXT NOT NULL, data BLOB NOT NULL)",
    # A record that was taken out stays as one without a value, so that watches can tell it.
    "CREATE TABLE records (key TEXT PRIMARY KEY, revision INTEGER NOT NULL, value BLOB) WITHOUT ROWID",
    "CREATE UNIQUE INDEX by_revision ON records (revision)",
    "CREATE INDEX removals ON records (revision) WHERE value IS NULL",
    # The newest of the removals that are not known any more.
    "CREATE TABLE forgotten (revision INTEGER NOT NULL)",
    "INSERT INTO forgotten VALUES (0)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {SCHEMA}",
)
_PUT: Final = (
    "INSERT INTO records (key, revision, value) VALUES (?, ?, ?) "
    "ON CONFLICT (key) DO UPDATE SET revision = excluded.revision, value = excluded.value"
)
_GET: Final = "SELECT key, revision, value FROM records WHERE key = ? AND value IS NOT NULL"
_SCAN: Final = (
    "SELECT key, revision, value FROM records "
    "WHERE key > ? AND key < ? AND value IS NOT NULL ORDER BY key LIMIT ?"
)
_FAULTS: Final = {
    sqlite3.SQLITE_FULL: (Fault.FULL, "is full: make room"),
    sqlite3.SQLITE_READONLY: (Fault.READ_ONLY, "cannot be written: give this process the right to"),
    sqlite3.SQLITE_CORRUPT: (Fault.DAMAGED, "is damaged: restore it from a backup"),
    sqlite3.SQLITE_NOTADB: (Fault.DAMAGED, "is damaged: restore it from a backup"),
    sqlite3.SQLITE_BUSY: (Fault.BUSY, "is held by another program: end that"),
}

Result = tuple[int, ...] | Conflict
"""What became of one commit of a group."""


class SqliteFile:
    """
    The file `parallax.db` in *directory*, 0600 and of one process alone.

    Args:
        history: See `HISTORY`.

    Raises:
        ConfigError: Another process uses the directory, or the file cannot be used: one line says why.
    """

    def __init__(self, directory: Path, history: int = HISTORY) -> None:
        self.path = directory / NAME
        self._history = history
        with ExitStack() as stack:
            stack.callback(os.close, _locked(directory))
            _prepare(self.path)
            self._db = stack.enter_context(closing(_open(self.path)))
            self._head = self._revision("SELECT max(revision) FROM events")
            self._files = self._in_place()
            self._held = stack.pop_all()

    def close(self) -> None:
        """Give the file free."""
        self._held.close()

    def write(self, group: Sequence[tuple[Event, Sequence[Write]]]) -> list[Result]:
        """
        Commit all of *group* at once: when it returns, everything is on the disk.

        One that conflicts, with what was there or with one before it, leaves the others alone.

        Raises:
            StorageFailed: Nothing of it was committed as far as is known.
        """
        head, results = self._head, list[Result]()
        self._check_in_place()
        with self._transaction():
            for event, writes in group:
                conflict = self._conflict(writes)
                if conflict is not None:
                    results.append(conflict)
                    continue
                revisions = tuple(range(head + 1, head + 1 + len(writes)))
                self._db.executemany(
                    _PUT,
                    [
                        (write.key, number, write.value)
                        for write, number in zip(writes, revisions, strict=True)
                    ],
                )
                head += len(writes) + 1  # the event comes last: the newest one says how far a file has come
                self._db.execute("INSERT INTO events VALUES (?, ?, ?)", (head, event.topic, event.data))
                results.append(revisions)
            self._forget(head - self._history)
        self._head = head
        self._check_in_place()  # otherwise it is on a disk, but no restart would find it there
        return results

    def get(self, key: str) -> Record | None:
        """As `Engine.get`."""
        return next(iter(self._rows(_GET, key)), None)

    def get_many(self, keys: Sequence[str]) -> list[Record]:
        """As `Engine.get_many`."""
        self._check_in_place()  # once: it takes as long as to read one of them
        return [record for key in keys for record in self._read(_GET, key)]

    def scan(self, prefix: str, after: str, limit: int, onward: Onward | None = None) -> list[Record]:
        """As `Engine.scan`."""
        if onward is None:
            return self._rows(_SCAN, max(prefix, after), _end_of(prefix), limit)
        self._check_in_place()
        found, after = list[Record](), max(prefix, after)
        while len(found) < limit:
            with closing(self._each(_SCAN, after, _end_of(prefix), limit - len(found))) as records:
                for record in records:
                    found.append(record)
                    after = onward(record.key)
                    if after > record.key:
                        break
                else:
                    break
        return found

    def revision(self) -> int:
        """As `Engine.revision`."""
        return self._head

    def changes(self, prefix: str, since: int, limit: int) -> tuple[list[Record], int]:
        """
        At most *limit* records below *prefix* written after *since*; and how far they tell everything.

        Raises:
            WatchGap: As `Engine.watch`.
        """
        forgotten = self._revision("SELECT revision FROM forgotten")
        if not forgotten <= since <= self._head:
            known = f"of the changes, those from {forgotten} to {self._head} are known"
            raise WatchGap(f"the watch cannot go on from {since}, for {known}: read everything again")
        records = self._rows(
            "SELECT key, revision, value FROM records "
            "WHERE revision > ? AND key > ? AND key < ? ORDER BY revision LIMIT ?",
            since,
            prefix,
            _end_of(prefix),
            limit,
        )
        return records, records[-1].revision if len(records) == limit else self._head

    @contextmanager
    def _transaction(self) -> Generator[None]:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except sqlite3.Error as exc:
            raise self._failure(*_explain(exc)) from exc
        finally:
            if self._db.in_transaction:
                with suppress(sqlite3.Error):  # the first error is the one to tell
                    self._db.execute("ROLLBACK")

    def _conflict(self, writes: Sequence[Write]) -> Conflict | None:
        """Why *writes* must not be done; asked before any is, so that nothing has to be taken back."""
        for write in writes:
            if write.expected is not None:
                actual = self._revision(
                    "SELECT revision FROM records WHERE key = ? AND value IS NOT NULL", write.key
                )
                if actual != write.expected:
                    return Conflict(
                        f"{write.key} has revision {actual}, not {write.expected}: read it again, then decide"
                    )
        return None

    def _forget(self, until: int) -> None:
        """Drop events and removals up to the revision *until*."""
        self._db.execute("DELETE FROM events WHERE revision <= ?", (until,))
        removals = "FROM records WHERE value IS NULL AND revision <= ?"
        newest = self._revision(f"SELECT max(revision) {removals}", until)
        if newest:
            self._db.execute(f"DELETE {removals}", (until,))
            self._db.execute("UPDATE forgotten SET revision = ?", (newest,))

    def _rows(self, query: str, *values: object) -> list[Record]:
        self._check_in_place()
        return self._read(query, *values)

    def _read(self, query: str, *values: object) -> list[Record]:
        return list(self._each(query, *values))

    def _each(self, query: str, *values: object) -> Generator[Record]:
        """The same one by one; to be closed, for a read left open keeps the log from being emptied."""
        try:
            with closing(self._db.execute(query, values)) as rows:
                for row in rows:
                    yield Record(*row)
        except sqlite3.Error as exc:
            raise self._failure(*_explain(exc)) from exc

    def _check_in_place(self) -> None:
        """Raise StorageFailed unless a restart would find what is in use now: nothing else counts."""
        if self._in_place() != self._files:
            raise self._failure(Fault.MISSING, "was taken away while it was in use: restart this process")

    def _in_place(self) -> list[tuple[int, int] | None]:
        """Which files lie where a restart would look: the database and its log."""
        return [_identity_of(self.path.with_name(name)) for name in (NAME, f"{NAME}-wal")]

    def _revision(self, query: str, *values: object) -> int:
        """The revision that *query* asks for; `ABSENT` if there is none."""
        try:
            row = self._db.execute(query, values).fetchone()
        except sqlite3.Error as exc:
            raise self._failure(*_explain(exc)) from exc
        return (row and row[0]) or ABSENT

    def _failure(self, fault: Fault, what: str) -> StorageFailed:
        return StorageFailed(f"{show(self.path)} {what}; nothing is recorded until then", fault)


def _locked(directory: Path) -> int:
    """The lock of *directory*, made if need be: a descriptor that holds it until it is closed."""
    try:
        if not directory.is_dir():
            directory.mkdir(PRIVATE_DIRECTORY, parents=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(directory / LOCK_NAME, flags, PRIVATE)
    except OSError as exc:
        raise ConfigError(
            f"the data directory {show(directory)} cannot be used: {_reason(exc)}: "
            "mend it, or set PARALLAX_DATA_DIR to another"
        ) from exc
    try:
        # Of the open file, not of the process: a second engine in this process is refused as well.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ConfigError(
            f"the data directory {show(directory)} is in use by another control plane: "
            "end that one, or give this one its own PARALLAX_DATA_DIR"
        ) from None
    except OSError as exc:
        os.close(descriptor)
        raise ConfigError(
            f"the data directory {show(directory)} cannot be locked: {_reason(exc)}: use a local disk"
        ) from exc
    return descriptor


def _prepare(path: Path) -> None:
    """Make *path* if need be, and see to it that nobody else may read it; SQLite's files beside it follow."""
    try:
        descriptor = os.open(
            path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, PRIVATE
        )
        try:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise ConfigError(f"{show(path)} is not a regular file: remove it")
            if stat.S_IMODE(about.st_mode) != PRIVATE:
                os.fchmod(descriptor, PRIVATE)
        finally:
            # Before SQLite opens it: closing any descriptor of a file drops the locks that it holds there.
            os.close(descriptor)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except PermissionError as exc:
        us = str(os.geteuid())
        raise ConfigError(
            f"{show(path)} cannot be used: {_reason(exc)}: {command('chown', us, path)}, "
            "or set PARALLAX_DATA_DIR to another directory"
        ) from exc
    except OSError as exc:
        raise ConfigError(f"{show(path)} cannot be used: {_reason(exc)}: mend it or use another") from exc


def _open(path: Path) -> sqlite3.Connection:
    """SQLite on *path*, with our tables in it."""
    try:
        with ExitStack() as stack:
            db = stack.enter_context(closing(sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None)))
            _set_up(db, path)
            stack.pop_all()
            return db
    except sqlite3.Error as exc:
        _, what = _explain(exc)
        raise ConfigError(f"{show(path)} {what}, or set PARALLAX_DATA_DIR to another directory") from exc


def _set_up(db: sqlite3.Connection, path: Path) -> None:
    is_new = _is_empty(db, path)
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise ConfigError(f"{show(path)} can have no write-ahead log there: use a local disk")
    # Each commit is on the disk when it returns; NORMAL would lose the last ones with the power.
    db.execute("PRAGMA synchronous = FULL")
    db.execute(f"PRAGMA journal_size_limit = {_WAL_BYTES}")
    # Of the file's pages the system keeps its own copy; of ours, few are asked for twice.
    db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    db.execute("BEGIN IMMEDIATE")  # whether it can be written shows now
    if is_new:
        for statement in _TABLES:
            db.execute(statement)
    db.execute("COMMIT")
    # Of a large file, what was written last. Damage elsewhere shows at whatever meets it, as a fault.
    part = "1" if path.stat().st_size <= CHECKED_BYTES else "events"
    (report, *_) = db.execute(f"PRAGMA quick_check({part})").fetchone()
    if report != "ok":
        raise ConfigError(f"{show(path)} is damaged: restore it from a backup, or move it away")


def _is_empty(db: sqlite3.Connection, path: Path) -> bool:
    """Whether there is nothing in it; raises ConfigError if it is not ours, before it is touched."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables:
        return True
    if application != _APPLICATION:
        raise ConfigError(f"{show(path)} is another program's: set PARALLAX_DATA_DIR to another directory")
    if version != SCHEMA:
        raise ConfigError(
            f"{show(path)} was written by a newer version of Parallax (schema {version}, this one knows "
            f"{SCHEMA}): use that version, or set PARALLAX_DATA_DIR to another directory"
        )
    return False


def _identity_of(path: Path) -> tuple[int, int] | None:
    try:
        about = path.stat()
    except OSError:
        return None
    return about.st_dev, about.st_ino


def _end_of(prefix: str) -> str:
    """What comes right behind all keys below *prefix*."""
    return f"{prefix[:-1]}{chr(ord('/') + 1)}" if prefix else _BEHIND_ALL


def _explain(exc: sqlite3.Error) -> tuple[Fault, str]:
    """What is wrong, and what to do about it."""
    unknown = (Fault.FAILED, f"cannot be used ({exc}): see to its disk")
    return _FAULTS.get(getattr(exc, "sqlite_errorcode", 0) & 0xFF, unknown)  # above are details


def _reason(exc: OSError) -> str:
    return (exc.strerror or type(exc).__name__).lower()
