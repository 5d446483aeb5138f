"""
Enrolls with `parallax enroll` in children that die, or whose disk is full, and then once more.

A program of its own, because it forks and kills; `test_torn_enrollment.py` runs it. Each is another one
for whom the token among the words is good. It prints how many were cut off; any broken promise ends it with a
traceback.

    torn_newcomer.py killed LAYOUT DIRECTORY WORD...    SIGKILL before each file system call in turn
    torn_newcomer.py full   LAYOUT DIRECTORY WORD...    no file may have more bytes than so many

Each WORD is typed behind `parallax enroll NAME`, or without the NAME if there is `--device` among them.
"""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count
from pathlib import Path

from parallax.sdk import exits
from parallax.sdk.cli.app import run
from parallax.security.identity import Identity
from parallax.security.layouts import Layout, leaf_paths
from parallax.security.material import load_credentials
from tests.security.torn_writer import before_each_call, in_child, left_over

LIMITS = (1, 100, 300, 500, 700)  # less than a key, or than a certificate


def nothing() -> None:
    """Let it run."""


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended."""

    code: int | None  # None: it was killed
    said: str

    @property
    def enrolled(self) -> Identity | None:
        """Who was told that it is enrolled."""
        found = re.search(r"(\S+) is enrolled until", self.said)
        return Identity.parse(found[1]) if found else None


@dataclass(frozen=True)
class Command:
    """What is typed by each, in a directory of its own."""

    layout: Layout
    directory: Path
    words: tuple[str, ...]

    def attempt(self, name: str, prepare: Callable[[], None] = nothing) -> Outcome:
        """Have *name* enroll in a child that does *prepare* first."""
        heard, told = os.pipe()

        def act() -> None:
            os.dup2(told, 1)
            os.dup2(told, 2)
            prepare()
            os._exit(self.run(name))

        child = in_child(act)
        os.close(told)
        with open(heard, "rb") as stream:  # noqa: PTH123 - a descriptor
            said = stream.read().decode()
        _, status = os.waitpid(child, 0)
        return Outcome(os.WEXITSTATUS(status) if os.WIFEXITED(status) else None, said)

    def run(self, name: str) -> int:
        """Have *name* enroll, in this process."""
        os.environ["HOME"] = str(self.directory / name)
        who = () if "--device" in self.words else (name,)
        where = ("--layout", self.layout, "--certs-dir", str(self.directory / name))
        return run(["enroll", *who, *self.words, *where])

    def complete(self, name: str, before: Outcome) -> None:
        """The same again, unless *name* was told that it is enrolled; then all is there, and nothing else."""
        place, who = self.directory / name, before.enrolled
        if who is None:
            again = self.attempt(name)
            assert again.code == exits.OK, (before, again)
            who = again.enrolled
        assert who is not None, (before, again)
        assert "--device" in self.words or who.name == name, who
        os.environ["HOME"] = str(place)
        load_credentials(leaf_paths(place, self.layout, who.name), who, datetime.now(UTC))
        assert before.enrolled or not [*place.rglob(".*.enrolling")]
        assert left_over(place) == 1, [*place.rglob("*")]


def killed(command: Command) -> int:
    os.fsync = lambda fd: None  # noqa: ARG005 - a killed process loses nothing that it has written; it only takes time here
    for step in count(1):

        def until_killed(step: int = step) -> None:
            left = step

            def die(_: str) -> None:
                nonlocal left
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)

            before_each_call(die)

        outcome = command.attempt(f"edge-{step}", until_killed)
        assert outcome.code in {None, exits.OK}, outcome
        command.complete(f"edge-{step}", outcome)
        if outcome.code is not None:
            return step
    raise AssertionError("it never ended")


def full(command: Command) -> int:
    for limit in LIMITS:
        bound = (limit, resource.RLIM_INFINITY)
        outcome = command.attempt(f"edge-{limit}", partial(resource.setrlimit, resource.RLIMIT_FSIZE, bound))
        assert outcome.code == exits.CONFIG, outcome
        assert outcome.said.startswith("parallax: cannot write to "), outcome
        assert outcome.said.count("\n") == 1, outcome
        command.complete(f"edge-{limit}", outcome)
    return len(LIMITS)


if __name__ == "__main__":
    mode, layout, directory, *words = sys.argv[1:]
    typed = Command(Layout(layout), Path(directory), tuple(words))
    assert typed.run("edge-0") == exits.OK  # nothing is left to be imported, which would be a call, too
    print({"killed": killed, "full": full}[mode](typed))  # noqa: T201
