"""
What a task costs, through Parallax and through its neighbours: `make bench`.

Everything runs on loopback over mutual TLS, each role in a process of its own, and echoes 1 KiB. The subjects
take turns within a round, so that all meet the same machine; docs/performance.md says how to read the result.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import psutil
from rich.console import Console

from identities import write_certificates
from measuring import Cell
from report import WIDTH, Report, machine, write
from subject import HERE, NAMES, WITHIN_S, BenchmarkFailed, Stage, Subject, load

IN_FLIGHT: Final = (1, 16, 64, 256)


class Processes:
    """The CPU time and memory of all processes of a subject, taken together."""

    def __init__(self, pids: Sequence[int]) -> None:
        self._all = [psutil.Process(pid) for pid in pids]

    def cpu_s(self) -> float:
        """Seconds of user and system time so far."""
        return sum(times.user + times.system for times in (process.cpu_times() for process in self._all))

    def rss_bytes(self) -> int:
        """Resident memory; pages they share count once for each."""
        return sum(process.memory_info().rss for process in self._all)


def measure(
    name: str, subject: Subject, certs: Path, number: int, arguments: argparse.Namespace
) -> list[Cell]:
    """One round of one subject: fresh processes, then every number of tasks in flight."""
    with (
        tempfile.TemporaryDirectory() as scratch,
        Stage(name, certs, Path(scratch), arguments.loop) as stage,
    ):
        address = subject.start(stage)
        client = stage.spawn([sys.executable, HERE / "client.py", name, certs, address])
        stage.line(client, 2 * WITHIN_S)
        processes = Processes([process.pid for process in stage.processes])

        def tell(command: str) -> None:
            assert client.stdin is not None  # noqa: S101 - it was asked for
            client.stdin.write(f"{command}\n")
            client.stdin.flush()

        cells = []
        for in_flight in arguments.in_flight:
            tell(f"run {in_flight} {arguments.warm_up} {arguments.seconds}")
            stage.line(client, WITHIN_S + arguments.warm_up)
            cpu_s, rss_bytes = processes.cpu_s(), processes.rss_bytes()
            stage.line(client, WITHIN_S + arguments.seconds)
            cpu_s, rss_bytes = processes.cpu_s() - cpu_s, max(rss_bytes, processes.rss_bytes())
            tell("stop")
            said = json.loads(stage.line(client, 2 * WITHIN_S))
            cells.append(Cell(name, in_flight, number, cpu_s=cpu_s, rss_bytes=rss_bytes, **said))
        return cells


def run(arguments: argparse.Namespace, console: Console) -> Report:
    """
    All rounds of all subjects, in turns.

    Raises:
        BenchmarkFailed: A process did not start, or a call failed.
    """
    subjects = {name: load(name) for name in arguments.subjects}
    missing = {name: why for name, subject in subjects.items() if (why := subject.missing()) is not None}
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as scratch:
        certs = Path(scratch)
        write_certificates(certs)
        for number in range(1, arguments.rounds + 1):
            for name, subject in subjects.items():
                if name not in missing:
                    console.print(f"round {number} of {arguments.rounds}: {subject.title}", highlight=False)
                    cells += measure(name, subject, certs, number, arguments)
    settings = {key: getattr(arguments, key) for key in ("rounds", "seconds", "warm_up", "loop")}
    return Report(machine(), settings, subjects, missing, cells)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="bench.py", description=(__doc__ or "").strip().splitlines()[0])
    parser.add_argument("--rounds", type=_positive(int), default=5, help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=_positive(float), default=2.0, help="of each window; default: %(default)s"
    )
    parser.add_argument(
        "--warm-up", type=_positive(float), default=0.5, help="before each, in seconds; default: 0.5"
    )
    parser.add_argument(
        "--in-flight",
        type=_positive(int),
        nargs="+",
        default=list(IN_FLIGHT),
        help="default: 1 16 64 256",
    )
    parser.add_argument("--subjects", nargs="+", choices=NAMES, default=list(NAMES), help="default: all")
    parser.add_argument(
        "--loop",
        choices=("uvloop", "asyncio"),
        default="uvloop",
        help="of the clients and of the raw servers; default: %(default)s",
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="where the files go")
    return parser.parse_args(words)


def _positive(kind: type[int | float]) -> Callable[[str], int | float]:
    def parse_number(text: str) -> int | float:
        number = kind(text)
        if not 0 < number < 1_000_000:
            raise argparse.ArgumentTypeError(f"not above zero: {text}")
        return number

    return parse_number


def main() -> int:
    """Measure, print, write."""
    arguments = parse()
    console = Console()
    console.width = max(console.width, WIDTH)
    try:
        report = run(arguments, console)
    except BenchmarkFailed as exc:
        console.print(f"benchmark failed: {exc}", markup=False, highlight=False)
        return 1
    report.print(console)
    write(report, arguments.results)
    console.print("written: latest.md, latest.json, latest.svg", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
