"""
A server that changes its certificate 3,000 times under a storm of handshakes: `make storm`.

On loopback over mutual TLS: another process opens a thousand connections a second, most of which are no good:
bare TCP, handshakes that stall, handshakes that end with their first message. In between come TLS clients and
gRPC channels that are good. The server must live, and every good client must get in and see no
certificate but one that was in force at the time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import json
import math
import os
import signal
import sys
import tempfile
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from storm_roles import GOOD, KINDS, WITHIN_S, How

ROLES: Final = Path(__file__).with_name("storm_roles.py")
STARTED_S: Final = 30.0
STOPPED_S: Final = WITHIN_S + 10
SLOWEST_S: Final = 0.5  # a rotation, on average: a server that takes longer has got stuck
LONGEST_LINE: Final = 1 << 26  # the clients' report: tens of thousands of serials

Said = dict[str, Any]


class StormFailed(Exception):
    """It could not be carried out."""


@dataclass(frozen=True, slots=True)
class Term:
    """Between what times a certificate can have been shown, on the clock that all processes here share."""

    since: float
    until: float = math.inf


@dataclass(slots=True)
class Findings:
    """What a run has shown."""

    asked: int
    rotations: Counter[str] = field(default_factory=Counter)
    delays_s: list[float] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    seconds: float = math.inf
    wrong: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Connections a second."""
        return (self.done.total() + self.failed.total()) / self.seconds

    def judge(self, server: Sequence[Said], clients: Said, exit_code: int | None, least: float) -> None:
        """Take in what both have said, how the server has ended, and what rate would show something."""
        changes = [said for said in server if "published" in said]
        self.rotations = Counter(said["result"] for said in changes)
        self.delays_s = sorted(said["in_force"] - said["published"] for said in changes)
        self.done, self.failed = Counter(clients["done"]), Counter(clients["failed"])
        self.seconds = clients["seconds"]
        if exit_code != 0:
            self.wrong.append(f"the server has died: {_ending(exit_code)}")
        if len(changes) < self.asked:
            self.wrong.append(f"it has changed its certificate {len(changes)} times, not {self.asked}")
        self.wrong += [f"a connection failed: {failure}" for failure in clients["failures"]]
        self.wrong += misled(terms(server), clients["seen"])
        if self.rate < least:
            self.wrong.append(f"the storm was too weak: {self.rate:,.0f} connections a second")


def terms(server: Sequence[Said]) -> dict[int, Term]:
    """When each serial can have been shown, by what the server said of its changes."""
    found: dict[int, Term] = {}
    before: int | None = None
    for said in server:
        serial = said.get("serial")
        if serial is None:
            continue
        if before is not None:
            found[before] = Term(found[before].since, said["in_force"])
        found[serial] = Term(said.get("published", -math.inf))
        before = serial
    return found


def misled(shown: dict[int, Term], seen: Sequence[tuple[int, float, float]]) -> list[str]:
    """Who saw a certificate that was not in force at any moment of its handshake."""
    never = Term(math.inf, -math.inf)
    return [
        f"a client was shown {serial:x}, which was not in force"
        for serial, began, ended in seen
        if not (shown.get(serial, never).since <= ended and began <= shown.get(serial, never).until)
    ]


async def run(arguments: argparse.Namespace, on_rotation: Callable[[], object]) -> Findings:
    """
    Storm, within a time that the number of rotations limits.

    Raises:
        StormFailed: A process did not start, or the clients have not said what they saw.
    """
    findings = Findings(arguments.rotations)
    async with contextlib.AsyncExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        start = functools.partial(_start, stack, stack.enter_context(arguments.log.open("wb")))
        server = await start("server", directory, str(arguments.rotations), arguments.how)
        said = [await _hear(server)]
        if "port" not in said[0]:
            raise StormFailed("the server did not start")
        clients = await start("clients", directory, str(said[0]["port"]), str(arguments.rate))
        if "blows" not in await _hear(clients):
            raise StormFailed("the clients did not start")
        assert server.stdin is not None  # noqa: S101 - we asked for a pipe
        server.stdin.write(b"change\n")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STARTED_S + arguments.rotations * SLOWEST_S):
                while said[-1] and "done" not in said[-1]:
                    said.append(await _hear(server))
                    on_rotation()
        report = await _stop(clients)
        if "done" not in report:
            raise StormFailed("the clients have died")
        await _stop(server)
        findings.judge(said, report, server.returncode, arguments.at_least)
    return findings


async def _start(stack: contextlib.AsyncExitStack, errors: IO[bytes], *arguments: str) -> Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(ROLES),
        *arguments,
        stdin=PIPE,
        stdout=PIPE,
        stderr=errors,
        limit=LONGEST_LINE,
    )
    stack.push_async_callback(_end, process)
    return process


async def _hear(process: Process) -> Said:
    """What it says next; nothing if it has ended."""
    assert process.stdout is not None  # noqa: S101 - we asked for a pipe
    said: Said = json.loads(await process.stdout.readline() or b"{}")
    return said


async def _stop(process: Process) -> Said:
    """Let it come to an end; what it says last."""
    assert process.stdin is not None  # noqa: S101 - as above
    process.stdin.close()
    said: Said = {}
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(STOPPED_S):
            while more := await _hear(process):
                said = more
            await process.wait()
    return said


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.kill()
    await process.wait()


def _ending(exit_code: int | None) -> str:
    if exit_code is None:
        return "it hung"
    return signal.Signals(-exit_code).name if exit_code < 0 else f"exit code {exit_code}"


def show(findings: Findings, console: Console) -> None:
    """What was found, and the verdict."""
    table = Table("connections", "of them", "a second", "failed")
    for kind in KINDS:
        done, failed = findings.done[kind], findings.failed[kind]
        rate = (done + failed) / findings.seconds
        table.add_row(kind, *(f"{number:,.0f}" for number in (done + failed, rate, failed)))
    console.print(table)
    total = findings.rotations.total()
    how = ", ".join(f"{times:,} {result}" for result, times in findings.rotations.items())
    console.print(f"rotations: {total:,} in {findings.seconds:,.0f} s ({how or 'none'})")
    if findings.delays_s:
        half, most, worst = (_quantile(findings.delays_s, share) for share in (0.5, 0.99, 1.0))
        console.print(
            f"from publication to force: p50 {half:,.0f} ms, p99 {most:,.0f} ms, longest {worst:,.0f} ms"
        )
    console.print(f"connections: {findings.rate:,.0f} a second")
    for what, times in Counter(findings.wrong).items():
        console.print(f"WRONG: {what} ({times} times)", style="red", markup=False)
    if not findings.wrong:
        good = sum(findings.done[kind] for kind in GOOD)
        console.print(f"the server lives, and all {good:,} good clients got in")


def _quantile(ordered: Sequence[float], share: float) -> float:
    """In milliseconds."""
    return 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def main(argv: Sequence[str] | None = None) -> int:
    """Storm, and say whether all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    number = "%(default)s by default"
    parser.add_argument("--rotations", type=int, default=3000, help=f"how many; {number}")
    parser.add_argument("--rate", type=float, default=1200.0, help=f"connections to open a second; {number}")
    parser.add_argument("--at-least", type=float, default=1000.0, help=f"fail below that rate; {number}")
    parser.add_argument("--how", type=How, choices=How, default=How.PINNED, help="other ways show the danger")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="for stderr of both processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, too")
    arguments = parser.parse_args(argv)
    console = Console()
    columns = (TextColumn("rotations"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task("", total=arguments.rotations)
            findings = asyncio.run(run(arguments, lambda: progress.advance(bar)))
    except StormFailed as exc:
        console.print(f"the storm failed: {exc}", markup=False)
        return 1
    show(findings, console)
    if arguments.json:
        found = {
            "rotations": findings.rotations,
            "delays_s": findings.delays_s,
            "done": findings.done,
            "failed": findings.failed,
            "seconds": findings.seconds,
            "wrong": findings.wrong,
        }
        arguments.json.write_text(json.dumps(found))
    return 1 if findings.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
