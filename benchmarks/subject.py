"""What is compared: how a subject's processes are started, and how a client asks it for an echo."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

T = TypeVar("T")

Ask = Callable[[bytes], Awaitable[bytes]]
"""One echo."""

WITHIN_S: Final = 20.0  # for a process to be ready, on a machine that is busy
STOP_S: Final = 10.0  # for a process to end by itself; then it is killed
HERE: Final = Path(__file__).resolve().parent
NAMES: Final = (
    "raw_unary",
    "naive_relay",
    "nats_request",
    "control_plane_link",
    "control_plane_unary",
    "direct_link",
    "direct_unary",
)


class BenchmarkFailed(Exception):
    """A process did not start, or a call failed or was answered wrongly: there are no numbers then."""


@dataclass(frozen=True, slots=True)
class Subject:
    """
    One way to have a task done.

    Args:
        about: What exactly is measured, in one sentence.
        start: Starts all processes but the client; where the client dials.
        connect: Connects, in the client's process, to that address with the certificates in that directory.
        roles: The processes written for the benchmark, by name: each runs until it is terminated.
        missing: Why it cannot be measured here; None if it can.
    """

    title: str
    about: str
    start: Callable[[Stage], str]
    connect: Callable[[Path, str], AbstractAsyncContextManager[Ask]]
    roles: Mapping[str, Callable[[Path, str], None]] = field(default_factory=dict)
    missing: Callable[[], str | None] = lambda: None


def load(name: str) -> Subject:
    """The subject called *name*, one of `NAMES`."""
    found: Subject = import_module(f"subjects.{name}").SUBJECT
    return found


class Stage:
    """
    The processes of one subject; leaving the block ends them.

    Args:
        name: Of the subject.
        certs: The certificate directory.
        scratch: An empty directory for what the processes write.
        loop: The event loop of the processes written for the benchmark, `uvloop` or `asyncio`.
    """

    def __init__(self, name: str, certs: Path, scratch: Path, loop: str) -> None:
        self.name = name
        self.certs = certs
        self.scratch = scratch
        self.loop = loop
        self.processes: list[subprocess.Popen[str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stack.close()

    def spawn(self, arguments: Sequence[str | Path], **environment: str) -> subprocess.Popen[str]:
        """Start a process; what it says on stderr is kept for `failure`."""
        errors = self._stack.enter_context(self._log(len(self.processes)).open("w"))
        process = subprocess.Popen(
            arguments,
            env={**os.environ, **environment, "PARALLAX_BENCH_LOOP": self.loop},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self._stack.enter_context(process)
        self.processes.append(process)
        return process

    def role(self, role: str, address: str = "") -> str:
        """Start the process *role*; what it says when it is ready: its address, if it has one."""
        return self.line(self.spawn_role(role, address))

    def spawn_role(self, role: str, address: str = "") -> subprocess.Popen[str]:
        """Start the process *role*, which does not say when it is ready."""
        return self.spawn([sys.executable, HERE / "role.py", self.name, role, self.certs, address])

    def line(self, process: subprocess.Popen[str], within_s: float = WITHIN_S) -> str:
        """What *process* says next; one that says nothing for so long is killed."""
        limit = threading.Timer(within_s, process.kill)
        limit.start()
        try:
            line = process.stdout.readline() if process.stdout else ""
        finally:
            limit.cancel()
        if not line.endswith("\n"):
            raise self.failure(f"{self.name}: a process ended, or was silent for {within_s:g} s")
        return line.removesuffix("\n")

    def wait(self, what: str, probe: Callable[[str], T | None]) -> T:
        """What *probe* finds in the newest process's stderr, as soon as it finds something."""
        deadline = time.monotonic() + WITHIN_S
        number = len(self.processes) - 1
        while (found := probe(self._log(number).read_text())) is None:
            if time.monotonic() > deadline or self.processes[number].poll() is not None:
                raise self.failure(f"{self.name}: {what} is not ready")
            time.sleep(0.02)
        return found

    def failure(self, text: str) -> BenchmarkFailed:
        """*text*, with what the processes said last."""
        said = "\n".join(self._log(number).read_text()[-2000:] for number in range(len(self.processes)))
        return BenchmarkFailed(f"{text}\n{said}".strip())

    def _log(self, number: int) -> Path:
        return self.scratch / f"{self.name}-{number}.log"


def script(name: str) -> Path:
    """The program *name* that a package installed beside this Python."""
    return Path(sysconfig.get_path("scripts")) / name
