"""Logging must not wait for whoever reads the log."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from parallax.runtime.log_writer import MAX_LINES, BackgroundWriter

SMALLEST_PIPE = 4096
WITHIN_S = 10.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe that is full after a page; the writer owns its end."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, SMALLEST_PIPE)
    yield reading, os.dup(writing)
    os.close(writing)
    os.close(reading)


def test_lines_arrive_in_order(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = BackgroundWriter(writing)
    for number in range(50):
        writer.write(f"line {number} ü\n")
    assert writer.drain(WITHIN_S)
    assert os.read(reading, 65_536).decode().splitlines() == [f"line {number} ü" for number in range(50)]


def test_a_reader_that_stops_holds_nobody_up_and_learns_what_it_missed(pipe: tuple[int, int]) -> None:
    reading, writing = pipe
    writer = BackgroundWriter(writing)
    written = MAX_LINES + 2 * SMALLEST_PIPE
    for number in range(written):
        writer.write(f"{number}\n")
    data, dropped = b"", 0
    numbers: list[int] = []
    while len(numbers) + dropped < written:
        data += os.read(reading, 65_536)
        *lines, data = data.split(b"\n")
        for line in lines:
            if line.endswith(b"log lines were dropped: nobody read them in time)"):
                dropped += int(line.removeprefix(b"(").split()[0])
            else:
                numbers.append(int(line))
    assert dropped > 0
    assert numbers == sorted(set(numbers))


def test_a_reader_that_is_gone_is_no_error(pipe: tuple[int, int]) -> None:
    _, writing = pipe
    closed, gone = os.pipe()
    os.close(closed)
    os.dup2(gone, writing)
    os.close(gone)
    writer = BackgroundWriter(writing)
    for _ in range(2):
        writer.write("nobody hears this\n")
        assert writer.drain(WITHIN_S)


def test_a_process_ends_although_nobody_reads_its_log() -> None:
    program = (
        "import logging\n"
        "from parallax.runtime.log_writer import process_log\n"
        "from parallax.runtime.logs import LogFormat, LogLevel\n"
        "with process_log(LogLevel.INFO, LogFormat.JSON):\n"
        "    for number in range(5_000): logging.warning('line', extra={'number': number})\n"
        "print('done')\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read() == b"done\n"
        assert process.wait(10) == 0


def test_what_was_logged_is_written_before_the_line_that_says_why_the_process_ends() -> None:
    program = (
        "import logging, sys\n"
        "from parallax.runtime.log_writer import process_log\n"
        "from parallax.runtime.logs import LogFormat, LogLevel\n"
        "with process_log(LogLevel.INFO, LogFormat.JSON):\n"
        "    for number in range(500): logging.warning('line', extra={'number': number})\n"
        "sys.stderr.write('why it ends\\n')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    *lines, last = ended.stderr.splitlines()
    assert (len(lines), last) == (500, b"why it ends")
