"""What the SQLite engine promises of its file: it is private, ours alone, and survives what may come."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from parallax.control_plane.engines import sqlite_file
from parallax.control_plane.engines.engine import ABSENT, Event, Record, Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.engines.sqlite_file import LOCK_NAME, NAME
from parallax.security.errors import ConfigError, Conflict, Fault, StorageFailed

WRITER = Path(__file__).with_name("writer.py")
HAPPENED = Event("tests/happened")
FULL_DISK = WRITER.with_name("full_disk.py")
NOBODY = 65_534


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The data directory; it is not there yet."""
    return tmp_path / "data"


@pytest.fixture
def made(place: Path) -> Path:
    """The data directory; it is there, empty, and others may look into it."""
    place.mkdir()
    place.chmod(0o755)
    return place


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def modes(directory: Path) -> dict[str, int]:
    return {path.name: mode(path) for path in directory.iterdir()}


async def fill(directory: Path, *keys: str) -> None:
    async with SqliteEngine(directory) as engine:
        # At once, in that order: one by one each would wait for the disk.
        await asyncio.gather(*(engine.commit(HAPPENED, [Write(key, b"value")]) for key in keys or ("a",)))


async def refusal(directory: Path) -> str:
    """The one line with which a directory is refused."""
    with pytest.raises(ConfigError) as raised:
        async with SqliteEngine(directory):
            pass
    assert "\n" not in str(raised.value)
    return str(raised.value)


# The files.


async def test_files_are_private_from_the_start_whatever_the_umask(place: Path) -> None:
    before = os.umask(0)
    try:
        async with SqliteEngine(place) as engine:
            await engine.commit(HAPPENED, [Write("a", b"1")])
            found = modes(place)
    finally:
        os.umask(before)
    assert mode(place) == 0o700
    assert {NAME, f"{NAME}-wal", LOCK_NAME} <= found.keys()
    assert set(found.values()) == {0o600}


async def test_a_file_that_others_may_read_is_narrowed(place: Path) -> None:
    await fill(place)
    (place / NAME).chmod(0o664)  # as the owner of a mounted volume does
    await fill(place, "b")
    assert mode(place / NAME) == 0o600


async def test_a_directory_that_exists_keeps_its_mode(made: Path) -> None:
    await fill(made)
    assert mode(made) == 0o755


@pytest.mark.parametrize("name", [NAME, LOCK_NAME])
async def test_a_link_in_the_place_of_a_file_is_not_followed(made: Path, name: str) -> None:
    victim = made / "victim"
    victim.write_text("precious")
    victim.chmod(0o644)
    (made / name).symlink_to(victim)
    assert str(made) in await refusal(made)
    assert (victim.read_text(), mode(victim)) == ("precious", 0o644)


async def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "set PARALLAX_DATA_DIR to another" in await refusal(tmp_path / "file")
    assert "set PARALLAX_DATA_DIR to another" in await refusal(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.parametrize("what", ["directory", "file"])
async def test_what_this_user_may_not_write_is_refused(made: Path, what: str) -> None:
    await fill(made)
    (made / LOCK_NAME).chmod(0o666)
    said = opened_by_nobody(made, 0o777 if what == "file" else 0o755)
    assert said.startswith("parallax.security.errors.ConfigError: ")
    assert "permission denied" in said or "operation not permitted" in said


def opened_by_nobody(directory: Path, mode: int) -> str:
    """What an unprivileged process that opens *directory* says last."""
    directory.chmod(mode)
    for parent in list(directory.parents)[:3]:  # pytest's own are for one user only
        parent.chmod(0o755)
    script = (
        "import asyncio, os, sys\n"
        "from pathlib import Path\n"
        "from parallax.control_plane.engines.sqlite import SqliteEngine\n"
        f"os.setuid({NOBODY})\n"
        "async def main():\n"
        "    async with SqliteEngine(Path(sys.argv[1])): pass\n"
        "asyncio.run(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, directory], capture_output=True, text=True, check=False, timeout=20
    )
    return ended.stderr.strip().splitlines()[-1]


# One process.


async def test_a_second_engine_on_the_directory_is_refused_until_the_first_has_closed(place: Path) -> None:
    async with SqliteEngine(place):
        assert "is in use by another control plane: end that one, or give this one its own" in await refusal(
            place
        )
    await fill(place)


async def test_a_second_process_is_refused_and_a_dead_one_is_not_waited_for(place: Path) -> None:
    with writing(place) as child:
        said_by(child, 1)
        assert "is in use by another control plane" in await refusal(place)
        child.kill()
        child.wait()
        await fill(place)


# Files that cannot be used.


async def test_the_file_of_another_program_is_left_alone(made: Path) -> None:
    with closing(sqlite3.connect(made / NAME)) as db:
        db.execute("CREATE TABLE theirs (a)")
    before = (made / NAME).read_bytes()
    assert "is another program's: set PARALLAX_DATA_DIR" in await refusal(made)
    assert (made / NAME).read_bytes() == before


async def test_the_file_of_a_newer_version_is_refused(place: Path) -> None:
    await fill(place)
    with closing(sqlite3.connect(place / NAME)) as db:
        db.execute("PRAGMA user_version = 2")
    assert "written by a newer version of Parallax (schema 2, this one knows 1)" in await refusal(place)


@pytest.mark.parametrize(
    "content", [b"not a database, and longer than a header of one" * 100, b"SQLite format 3\0"]
)
async def test_what_is_no_database_is_refused(made: Path, content: bytes) -> None:
    (made / NAME).write_bytes(content)
    assert "restore it from a backup" in await refusal(made)


async def test_a_damaged_file_is_refused_at_the_start(place: Path) -> None:
    await fill(place, *(f"a/{number:04}" for number in range(500)))
    content = bytearray((place / NAME).read_bytes())
    for page in range(2, len(content) // 4096):
        content[page * 4096 : page * 4096 + 200] = os.urandom(200)
    (place / NAME).write_bytes(content)
    assert "is damaged" in await refusal(place)
    async with SqliteEngine(place.with_name("elsewhere")):  # it has let go of everything
        pass


async def test_damage_in_a_large_file_is_said_by_what_meets_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To read all of it at the start would take too long."""
    monkeypatch.setattr(sqlite_file, "CHECKED_BYTES", 0)
    await fill(place, *(f"a/{number:04}" for number in range(500)))
    damage(place / NAME, b"a/0250")
    async with SqliteEngine(place) as engine:
        assert await engine.get("a/0001") is not None
        with pytest.raises(StorageFailed, match="is damaged: restore it from a backup"):
            await engine.scan("a/")
        assert engine.fault is Fault.DAMAGED


async def test_damage_to_what_a_large_file_says_of_the_newest_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "CHECKED_BYTES", 0)
    await fill(place, *(f"a/{number:04}" for number in range(500)))
    damage(place / NAME, HAPPENED.topic.encode())
    assert "is damaged" in await refusal(place)


def damage(file: Path, holding: bytes) -> None:
    """Spoil the first page of *file* that holds these bytes, from the first one with our tables in it on."""
    content = bytearray(file.read_bytes())
    at = content.index(holding, 4096) // 4096 * 4096
    content[at : at + 200] = os.urandom(200)
    file.write_bytes(content)


async def test_a_file_cut_short_is_refused_at_the_start(place: Path) -> None:
    await fill(place, *(f"a/{number:04}" for number in range(500)))
    content = (place / NAME).read_bytes()
    (place / NAME).write_bytes(content[: len(content) // 2])
    assert "is damaged" in await refusal(place)


async def test_a_torn_log_loses_nothing_that_was_before_it(place: Path) -> None:
    """What the power takes from the end of the log was not acknowledged; the rest is there."""
    torn = place.with_name("torn")
    torn.mkdir()
    async with SqliteEngine(place) as engine:
        for number in range(10):
            await engine.commit(HAPPENED, [Write(f"a/{number}", b"value")])
        for name in (NAME, f"{NAME}-wal"):
            shutil.copy(place / name, torn)
        with (torn / f"{NAME}-wal").open("ab") as log:
            log.write(os.urandom(10_000))
    async with SqliteEngine(torn) as engine:
        assert len(await engine.scan("a/")) == 10


# A medium that fails.


async def test_a_full_disk_is_said_nothing_is_half_written_and_it_recovers(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with SqliteEngine(place) as engine:
        await engine.commit(HAPPENED, [Write("small", b"1")])
        [[pages]] = await on_thread(engine, "PRAGMA page_count")
        await on_thread(engine, f"PRAGMA max_page_count = {pages + 5}")
        for _ in range(3):
            with pytest.raises(StorageFailed, match="is full: make room") as raised:
                await engine.commit(HAPPENED, [Write("first", b"1"), Write("large", bytes(100_000))])
            assert (raised.value.fault, engine.fault) == (Fault.FULL, Fault.FULL)
        assert [record.key for record in await engine.scan("")] == ["small"]
        await on_thread(engine, "PRAGMA max_page_count = 1000000")
        await engine.commit(HAPPENED, [Write("large", bytes(100_000), ABSENT)])
        assert engine.fault is None
    said = [record.getMessage() for record in caplog.records if "record" in record.getMessage()]
    assert said == ["nothing is recorded", "recording again"]


@pytest.mark.timeout(120)
def test_on_a_disk_that_is_full_what_is_acknowledged_is_there(
    made: Path, own_mounts: tuple[str, ...]
) -> None:
    """A real one, and then one that may only be read: see `full_disk.py`."""
    ended = subprocess.run(
        [*own_mounts, sys.executable, FULL_DISK, made],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["acknowledged"]
    assert told["failures"]
    assert "read-only file system: mend it, or set PARALLAX_DATA_DIR" in told["refusal"]


async def test_a_conflict_is_no_failure_of_the_medium(place: Path) -> None:
    async with SqliteEngine(place) as engine:
        with pytest.raises(Conflict):
            await engine.commit(HAPPENED, [Write("a", b"1", 7)])
        assert engine.fault is None


async def test_a_file_that_may_only_be_read_is_said(place: Path) -> None:
    async with SqliteEngine(place) as engine:
        await on_thread(engine, "PRAGMA query_only = ON")
        with pytest.raises(StorageFailed, match="cannot be written") as raised:
            await engine.commit(HAPPENED, [Write("a", b"1")])
        assert raised.value.fault is Fault.READ_ONLY


@pytest.mark.parametrize("name", [NAME, f"{NAME}-wal"])
async def test_a_file_that_was_taken_away_records_nothing(place: Path, name: str) -> None:
    """SQLite goes on writing to a file without a name; after a restart nothing of that would be there."""
    async with SqliteEngine(place) as engine:
        await engine.commit(HAPPENED, [Write("a", b"1")])
        (place / name).rename(place / "elsewhere")
        with pytest.raises(StorageFailed, match="taken away while it was in use") as raised:
            await engine.commit(HAPPENED, [Write("b", b"1")])
        assert raised.value.fault is Fault.MISSING
        shutil.copy(place / "elsewhere", place / name)  # another file of the same name does not help
        with pytest.raises(StorageFailed):
            await engine.commit(HAPPENED, [Write("c", b"1")])
        # Nor may anybody take for recorded what he finds there.
        for reading in (engine.get("b"), engine.scan(""), anext(engine.watch("", 0))):
            with pytest.raises(StorageFailed):
                await reading


async def test_a_fault_that_a_read_meets_shows_and_a_read_that_succeeds_ends_none(place: Path) -> None:
    async with SqliteEngine(place) as engine:
        await engine.commit(HAPPENED, [Write("a", b"1")])
        take_away(place)
        with pytest.raises(StorageFailed):
            await engine.get("a")
        assert engine.fault is Fault.MISSING
    async with SqliteEngine(place) as engine:
        await on_thread(engine, "PRAGMA query_only = ON")
        with pytest.raises(StorageFailed):
            await engine.commit(HAPPENED)
        await engine.get("a")
        assert engine.fault is Fault.READ_ONLY


def take_away(place: Path) -> None:
    (place / NAME).rename(place / "elsewhere")


async def test_another_program_may_read_a_backup_meanwhile(place: Path) -> None:
    async with SqliteEngine(place) as engine:
        await engine.commit(HAPPENED, [Write("a", b"1")])
        with (
            closing(sqlite3.connect(place / NAME)) as db,
            closing(sqlite3.connect(place / "backup.db")) as copy,
        ):
            db.backup(copy)
            assert copy.execute("SELECT key, value FROM records").fetchall() == [("a", b"1")]
        await engine.commit(HAPPENED, [Write("b", b"1")])


async def test_a_closed_engine_records_nothing(place: Path) -> None:
    async with SqliteEngine(place) as engine:
        pass
    with pytest.raises(StorageFailed, match="stopping"):
        await engine.commit(HAPPENED)


async def test_closing_finishes_what_waits(place: Path) -> None:
    async with SqliteEngine(place) as engine:
        asked = [asyncio.create_task(engine.commit(HAPPENED, [Write(f"a/{n}", b"1")])) for n in range(50)]
        await asyncio.sleep(0)
    await asyncio.gather(*asked)
    async with SqliteEngine(place) as engine:
        assert len(await engine.scan("a/")) == 50


async def test_what_is_acknowledged_is_on_the_disk_itself(place: Path) -> None:
    """So it is there after a loss of power, which no process that is killed shows."""
    async with SqliteEngine(place) as engine:
        assert await on_thread(engine, "PRAGMA synchronous") == [(2,)]  # FULL


# A process that is killed.


@pytest.mark.timeout(180)
async def test_what_was_acknowledged_survives_kill_9(place: Path) -> None:
    """Several rounds, each killed at another moment; never is half of a commit there."""
    acknowledged: set[str] = set()
    for round_number in range(6):
        with writing(place, round_number * 1_000_000) as child:
            acknowledged |= said_by(child, 20 + 150 * round_number)
            child.kill()
            acknowledged |= {line[5:].strip() for line in child.stdout or () if line.startswith("done ")}
            child.wait()
        async with SqliteEngine(place) as engine:
            found = {record.key.partition("/")[2] for record in await everything(engine, "n/")}
            twins = {record.key.partition("/")[2] for record in await everything(engine, "twin/")}
        assert acknowledged <= found
        assert found == twins


@pytest.mark.timeout(60)
async def test_a_file_that_may_not_grow_loses_nothing_and_it_recovers(place: Path) -> None:
    """The system refuses to write in the middle of a load, as a full disk or a quota does."""
    with writing(place, 0, 600_000) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        acknowledged, failures, before, is_roomy = set[str](), 0, 0, False
        for line in child.stdout:
            word, _, rest = line.strip().partition(" ")
            if word == "done":
                acknowledged.add(rest)
                if is_roomy and len(acknowledged) > before + 500:
                    break
            elif word == "failed":
                failures += 1
                assert "nothing is recorded until then" in rest
                if failures == 100:
                    before = len(acknowledged)
                    child.stdin.write("\n")
                    child.stdin.flush()
            is_roomy = is_roomy or word == "room"
        child.kill()
        acknowledged |= {line[5:].strip() for line in child.stdout if line.startswith("done ")}
        child.wait()
    assert before
    async with SqliteEngine(place) as engine:
        found = {record.key.partition("/")[2] for record in await everything(engine, "n/")}
        assert found == {record.key.partition("/")[2] for record in await everything(engine, "twin/")}
    assert acknowledged <= found


async def test_killed_before_it_was_made_it_is_made(made: Path) -> None:
    (made / NAME).touch()
    await fill(made)


@contextmanager
def writing(directory: Path, first: int = 0, limit: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """A child that writes; see `writer.py`."""
    arguments = [sys.executable, str(WRITER), str(directory), str(first), *([str(limit)] if limit else [])]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


def said_by(child: subprocess.Popen[str], count: int) -> set[str]:
    """The first *count* numbers that *child* says are acknowledged."""
    assert child.stdout is not None
    deadline = time.monotonic() + 25
    numbers = set[str]()
    while len(numbers) < count:
        line = child.stdout.readline()
        assert line, "the child has ended"
        assert time.monotonic() < deadline
        numbers.add(line.removeprefix("done ").strip())
    return numbers


async def everything(engine: SqliteEngine, prefix: str) -> list[Record]:
    found: list[Record] = []
    while page := await engine.scan(prefix, found[-1].key if found else ""):
        found += page
    return found


async def on_thread(engine: SqliteEngine, statement: str) -> list[tuple[int, ...]]:
    """What SQLite answers to *statement* on the connection of *engine*."""
    return await engine._on_thread(lambda: engine._file._db.execute(statement).fetchall())
