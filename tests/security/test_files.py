"""One file in place of another: whole or not at all, whatever ends the writer."""

from __future__ import annotations

import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import pytest

from parallax.security.errors import ConfigError
from parallax.security.files import PUBLIC, File, read_file, remove_file, replace_file, writing

SIZE: Final = 200_000
WRITER: Final = f"""
import sys
from pathlib import Path
from parallax.security.files import PUBLIC, File, replace_file, writing
number = 0
while True:
    with writing(Path(sys.argv[1])) as place:
        replace_file(place, "list", File(bytes([number % 256]) * {SIZE}, PUBLIC))
    print(number, flush=True)
    number += 1
"""


def put(directory: Path, content: bytes, mode: int = PUBLIC) -> None:
    with writing(directory) as place:
        replace_file(place, "list", File(content, mode))


def test_what_is_there_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        put(tmp_path, content)
    assert (tmp_path / "list").read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["list"]
    assert stat.S_IMODE((tmp_path / "list").stat().st_mode) == PUBLIC


def test_what_was_put_there_can_be_removed_again_and_again(tmp_path: Path) -> None:
    put(tmp_path, b"one")
    (tmp_path / "..list@left-by-a-crash").touch()
    for _ in range(2):
        with writing(tmp_path) as place:
            remove_file(place, "list")
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "list").symlink_to("victim")
    put(tmp_path, b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "list").is_symlink()


def test_a_directory_in_the_way_stays_and_is_named(tmp_path: Path) -> None:
    (tmp_path / "list").mkdir()
    with pytest.raises(ConfigError, match="cannot write to"):
        put(tmp_path, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_readers_see_one_or_the_other_and_never_a_part(tmp_path: Path) -> None:
    put(tmp_path, bytes(SIZE))
    stop, torn = threading.Event(), list[bytes]()

    def read() -> None:
        while not stop.is_set():
            content = (tmp_path / "list").read_bytes()
            if len(content) != SIZE or len(set(content)) != 1:
                torn.append(content[:10])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(100):
        put(tmp_path, bytes([number]) * SIZE)
    stop.set()
    for reader in readers:
        reader.join()
    assert not torn


def test_a_writer_that_is_killed_leaves_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    for _ in range(10):
        with subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            for _ in range(5):
                writer.stdout.readline()
            writer.send_signal(signal.SIGKILL)
        content = (tmp_path / "list").read_bytes()
        assert (len(content), len(set(content))) == (SIZE, 1)
    put(tmp_path, b"last")
    assert [path.name for path in tmp_path.iterdir()] == ["list"]


def test_more_than_is_expected_is_not_read(tmp_path: Path) -> None:
    put(tmp_path, bytes(11))
    assert len(read_file(tmp_path / "list", remedy="", max_bytes=11)) == 11
    with pytest.raises(ConfigError, match="larger than 10 bytes"):
        read_file(tmp_path / "list", remedy="remove it", max_bytes=10)
