"""The `parallax` command, in this process where that is enough, and in one of its own where it is not."""

from __future__ import annotations

import os
import select
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from parallax.sdk import exits
from parallax.sdk.cli.app import run
from tests.ports import free_port

WITHIN_S: Final = 20.0  # for what takes a second, on a machine that is busy
COMMAND: Final = (sys.executable, "-m", "parallax.sdk.cli")

# Makes its stdin the controlling terminal, as a login shell's is, and becomes the command.
_AT_TERMINAL: Final = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, "-m", "parallax.sdk.cli", *sys.argv[1:]])
"""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]
Serve = Callable[..., None]


@pytest.fixture
def empty_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory to be in, and nobody's settings; what the command sets itself ends with the test."""
    before = dict(os.environ)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    for name in before:
        if name.startswith(("PARALLAX_", "LOG_")):
            del os.environ[name]
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def parallax(empty_environment: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process, in an empty directory and without a terminal."""

    def call(*arguments: str | Path) -> Ended:
        capsys.readouterr()
        code = run([str(each) for each in arguments])
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture
def spawn(empty_environment: Path) -> Command:
    """The command in a process of its own."""

    def call(*arguments: str | Path, **options: str) -> Ended:
        ended = subprocess.run(
            [*COMMAND, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
            input=options.get("input", ""),
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    return call


@pytest.fixture
def serve(empty_environment: Path, spawn: Command) -> Iterator[Serve]:
    """Starts the control plane of the directory `certs`, and has commands find it."""
    assert spawn("certs", "generate").code == exits.OK
    started: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> None:
        port = free_port()
        os.environ["PARALLAX_CONTROL_PLANE"] = f"127.0.0.1:{port}"
        settings = {
            "PARALLAX_TLS_ENABLED": "true",
            "PARALLAX_TLS_VERIFY_CLIENT": "true",
            "PARALLAX_LISTEN": f"127.0.0.1:{port}",
            "PARALLAX_HTTP_LISTEN": "none",
            "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
        }
        with (empty_environment / "log").open("wb") as log:
            command = [sys.executable, "-m", "parallax.control_plane"]
            started.append(subprocess.Popen(command, env=os.environ | settings | environment, stderr=log))
        deadline = time.monotonic() + WITHIN_S
        while b"control plane ready" not in (empty_environment / "log").read_bytes():
            assert time.monotonic() < deadline, (empty_environment / "log").read_text()
            time.sleep(0.02)

    yield start
    for process in started:
        process.kill()
        process.wait()


class Terminal:
    """Somebody at a terminal, who sees what the command writes there and types."""

    def __init__(self, *arguments: str) -> None:
        self.seen = ""
        self._mine, its = os.openpty()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, *arguments],
            stdin=its,
            stdout=its,
            stderr=its,
            start_new_session=True,
        )
        os.close(its)

    def answer(self, prompt: str, typed: str) -> None:
        """Wait until *prompt* stands there, then type."""
        start = len(self.seen)
        while prompt not in self.seen[start:]:
            assert self._read(), f"{prompt!r} never came, but {self.seen!r}"
        while termios.tcgetattr(self._mine)[3] & termios.ECHO and self._process.poll() is None:
            time.sleep(0.01)  # what is typed before the echo is off would be seen, and thrown away
        os.write(self._mine, typed.encode())

    def until(self, shown: str) -> None:
        """Wait until *shown* stands there."""
        while shown not in self.seen:
            assert self._read(), f"{shown!r} never came, but {self.seen!r}"

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        os.write(self._mine, b"\x03")

    def end(self) -> int:
        """Wait for the command; its exit code."""
        while self._read():
            pass
        return self._process.wait(WITHIN_S)

    def close(self) -> None:
        """End the command, if it has not ended."""
        self._process.kill()
        self._process.wait()
        os.close(self._mine)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._mine], [], [], WITHIN_S)
        assert ready, f"nothing for {WITHIN_S:g} s after {self.seen!r}"
        try:
            more = os.read(self._mine, 4096)
        except OSError:  # how Linux says that nobody has the other end any more
            return False
        self.seen += more.decode()
        return bool(more)


@pytest.fixture
def terminal(empty_environment: Path) -> Iterator[Callable[..., Terminal]]:
    """The command in a process of its own that has a terminal."""
    opened: list[Terminal] = []

    def call(*arguments: str | Path) -> Terminal:
        opened.append(Terminal(*map(str, arguments)))
        return opened[-1]

    yield call
    for each in opened:
        each.close()


@pytest.fixture
def openssl(require_tool: Callable[[str], str]) -> Callable[..., str]:
    """The openssl command; what it prints, once it has ended well."""
    path = require_tool("openssl")

    def call(*arguments: str | Path) -> str:
        ended = subprocess.run(
            [path, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr + ended.stdout
        return ended.stdout

    return call


def _tree(directory: Path) -> dict[str, tuple[int, bytes]]:
    tree = {}
    for path in sorted(directory.rglob("*")):
        mode = path.lstat().st_mode
        content = str(path.readlink()).encode() if path.is_symlink() else b""
        tree[str(path.relative_to(directory))] = (mode, path.read_bytes() if stat.S_ISREG(mode) else content)
    return tree


@pytest.fixture
def tree() -> Callable[[Path], dict[str, tuple[int, bytes]]]:
    """Everything below a directory: path → mode and content."""
    return _tree
