"""
Ten minutes of everything at once, and whether the control plane keeps anything of it: `make soak`.

On loopback over mutual TLS, each role in a process of its own: clients call, cancel, time out, stream, hang
up and come back, agents work, and whatever may be killed is killed. In the end the control plane's memory and
open files must not have grown, every call must have ended as it may, and every answer must be the right one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from parallax.sdk.testing import ThrowawayPKI
from trend import Trend, trend

ROLES: Final = Path(__file__).with_name("soak_roles.py")
STEADY_AGENTS: Final = ("steady-1", "steady-2")
CHURN_AGENTS: Final = ("churn-1", "churn-2", "churn-3", "churn-4")
CLIENTS: Final = ("patient", "hasty-1", "hasty-2")  # the first is left alone
WARM_UP: Final = 0.2  # of the time: pools fill, code is imported, the allocator settles
WITHIN_S: Final = 30.0
SPARE_FILES: Final = 8  # what the event loop and gRPC open for themselves, once
DICE: Final = random.Random()  # noqa: S311 - picks what to do next, hides nothing
MIB: Final = 1024 * 1024
SUPERSEDED: Final = 78  # the exit code of an agent whose place was taken
# What the values move by: the allocator takes memory by the MiB, files are whole.
GRAINS: Final = {"rss_mib": 1.0, "open_files": 1.0}


class SoakFailed(Exception):
    """It could not be carried out."""


@dataclass(slots=True)
class Findings:
    """What a run has shown."""

    samples: dict[str, list[tuple[float, float]]] = field(
        default_factory=lambda: {name: [] for name in GRAINS}
    )
    tally: Counter[str] = field(default_factory=Counter)
    disruptions: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def trends(self) -> dict[str, Trend]:
        """Of what was sampled, the warm-up left out."""
        found = {}
        for name, samples in self.samples.items():
            begin = samples[-1][0] * WARM_UP if samples else 0.0
            found[name] = trend([sample for sample in samples if sample[0] >= begin], GRAINS[name])
        return found

    @property
    def is_good(self) -> bool:
        """The verdict."""
        return not self.wrong and all(found.is_flat for found in self.trends().values())


Process = subprocess.Popen[bytes]


class Stage:
    """The processes of a run; none is left behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._all: list[Process] = []
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PARALLAX_")},
            "PARALLAX_TLS_ENABLED": "true",
            "PARALLAX_TLS_VERIFY_CLIENT": "true",
            "PARALLAX_CERTS_DIR": str(directory / "certs"),
            "PARALLAX_DATA_DIR": str(directory / "data"),
            "PARALLAX_LISTEN": "127.0.0.1:0",
            "PARALLAX_HTTP_LISTEN": "none",
            "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
            "PARALLAX_LOG_FORMAT": "json",
        }
        self.log = directory / "control-plane.log"
        self.reports: list[Path] = []
        pki = ThrowawayPKI()
        agents, clients = (
            (f"agent/{n}" for n in STEADY_AGENTS + CHURN_AGENTS),
            (f"client/{n}" for n in CLIENTS),
        )
        pki.save(directory / "certs", "service/control-plane", *agents, *clients)

    def control_plane(self) -> tuple[Process, int]:
        """Start it; with its metrics port."""
        process = self._spawn(self.log, "-m", "parallax.control_plane")
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline and process.poll() is None:
            for record in self.records():
                if record.get("event") == "control plane ready":
                    self._environment["PARALLAX_CONTROL_PLANE"] = f"localhost:{record['port']}"
                    del self._environment["PARALLAX_LISTEN"], self._environment["PARALLAX_METRICS_LISTEN"]
                    return process, record["metrics_port"]
            time.sleep(0.05)
        raise SoakFailed(f"no control plane: {self.log.read_text()}")

    def records(self) -> list[dict[str, Any]]:
        """The control plane's log."""
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]

    def agent(self, name: str) -> Process:
        """Start an agent; its capability is its name without the number."""
        return self._spawn(self._directory / f"{name}.log", ROLES, "agent", name, name.partition("-")[0])

    def client(self, name: str) -> Process:
        """Start a client, with a report of its own."""
        report = self._directory / f"report-{len(self.reports)}"
        self.reports.append(report)
        self._environment["PARALLAX_IDENTITY"] = f"client/{name}"
        return self._spawn(self._directory / f"client-{name}.log", ROLES, "client", name, report)

    def _spawn(self, log: Path, *arguments: str | Path) -> Process:
        with log.open("ab") as output:
            process = Process(
                [sys.executable, *map(str, arguments)],
                env=self._environment,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._all.append(process)
        return process

    def close(self) -> None:
        """End whatever still runs."""
        for process in self._all:
            if process.poll() is None:
                process.kill()
            process.wait()


class Churn:
    """Disturbs agents and clients in turn, in every way there is."""

    def __init__(self, stage: Stage, metrics_port: int, findings: Findings) -> None:
        self._stage = stage
        self._metrics_port = metrics_port
        self._findings = findings
        self.agents = {name: stage.agent(name) for name in CHURN_AGENTS}
        self.clients = {name: stage.client(name) for name in CLIENTS[1:]}
        ways = (self._kill_agent, self._stop_agent, self._take_over, self._kill_client, self._stop_client)
        self.ways, self._in_turn = len(ways), cycle(ways)
        self._rivals = cycle(CHURN_AGENTS)  # in turn: one identity may change hands three times a minute

    def disturb(self) -> None:
        """Once more, in the next way."""
        way = next(self._in_turn)
        self._findings.disruptions[way.__name__.strip("_").replace("_", " ")] += 1
        way()

    def stop(self, processes: Sequence[Process], within_s: float = WITHIN_S) -> None:
        """Have them end in order."""
        for process in processes:
            _wait_until_it_listens(process)
            process.send_signal(signal.SIGTERM)
        for process in processes:
            self._expect(process, process.wait(within_s), {0})

    def _kill_agent(self) -> None:
        name = DICE.choice(CHURN_AGENTS)
        self.agents[name].kill()
        self.agents[name].wait()
        self.agents[name] = self._stage.agent(name)

    def _stop_agent(self) -> None:
        name = DICE.choice(CHURN_AGENTS)
        self.stop([self.agents[name]])
        self.agents[name] = self._stage.agent(name)

    def _take_over(self) -> None:
        # Of two that start beside one another, either could be the later one.
        _wait_for(self._metrics_port, "parallax_sessions", len(STEADY_AGENTS + CHURN_AGENTS))
        name = next(self._rivals)
        older, self.agents[name] = self.agents[name], self._stage.agent(name)
        self._expect(older, older.wait(WITHIN_S), {SUPERSEDED})

    def _kill_client(self) -> None:
        name = DICE.choice(CLIENTS[1:])
        self.clients[name].kill()
        self.clients[name].wait()
        self.clients[name] = self._stage.client(name)

    def _stop_client(self) -> None:
        name = DICE.choice(CLIENTS[1:])
        self.stop([self.clients[name]], 2 * WITHIN_S)
        self.clients[name] = self._stage.client(name)

    def _expect(self, process: Process, code: int, expected: set[int]) -> None:
        if code not in expected:
            self._findings.wrong.append(f"{process.args!r} ended with code {code}")


def run(minutes: float, disturb_s: float, sample_s: float, console: Console) -> Findings:
    """Carry it out."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as scratch:
        stage = Stage(Path(scratch))
        try:
            plane, metrics_port = stage.control_plane()
            watched = psutil.Process(plane.pid)
            at_rest = watched.num_fds()
            steady = [stage.agent(name) for name in STEADY_AGENTS]
            _wait_for(metrics_port, "parallax_sessions", len(steady))
            callers = [stage.client(CLIENTS[0])]
            churn = Churn(stage, metrics_port, findings)
            _soak(minutes * 60, disturb_s, sample_s, watched, churn, findings, console)
            callers += churn.clients.values()
            churn.stop(callers, 2 * WITHIN_S)  # first, so that their calls find agents to the last
            churn.stop([*churn.agents.values(), *steady], WITHIN_S)
            _collect(stage, findings)
            for series in ("parallax_tasks_in_flight", "parallax_sessions", "parallax_agents"):
                _wait_for(metrics_port, series, 0)
            if not _closed(watched, at_rest + SPARE_FILES):
                findings.wrong.append(f"{watched.num_fds()} files stay open, where {at_rest} were at first")
            churn.stop([plane])
            faults = [record for record in stage.records() if record.get("level") in {"error", "critical"}]
            findings.wrong += [f"the control plane logged {fault['event']!r}" for fault in faults]
        finally:
            stage.close()
    return findings


def _soak(
    seconds: float,
    disturb_s: float,
    sample_s: float,
    plane: psutil.Process,
    churn: Churn,
    findings: Findings,
    console: Console,
) -> None:
    began = time.monotonic()
    next_sample, next_disturbance = 0.0, disturb_s
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("soaking", total=seconds)
        # However slow a machine is: in every way there is, once at least.
        while (elapsed := time.monotonic() - began) < seconds or len(findings.disruptions) < churn.ways:
            if plane.status() == psutil.STATUS_ZOMBIE:
                raise SoakFailed("the control plane has ended")
            if elapsed >= next_sample:
                next_sample = elapsed + sample_s
                values = {"rss_mib": plane.memory_info().rss / MIB, "open_files": plane.num_fds()}
                for name, value in values.items():
                    findings.samples[name].append((elapsed / 60, float(value)))
                said = f"{values['rss_mib']:.1f} MiB, {values['open_files']} open files"
                progress.update(bar, completed=elapsed, description=said)
            if elapsed >= next_disturbance:
                churn.disturb()
                next_disturbance = elapsed + disturb_s
            time.sleep(0.05)


def _collect(stage: Stage, findings: Findings) -> None:
    """The clients' reports: the last line of each is what it had seen by then."""
    for report in stage.reports:
        lines = report.read_text().splitlines() if report.exists() else []
        whole = [line for line in lines if line.endswith("}")]
        if whole:
            said = json.loads(whole[-1])
            findings.tally += Counter(said["tally"])
            findings.wrong += said["wrong"]


def _wait_until_it_listens(process: Process) -> None:
    """Until it has ended, or takes SIGTERM for an order: whoever has hardly begun to run is killed by it."""
    deadline = time.monotonic() + WITHIN_S
    while process.poll() is None and time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        (caught,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.02)


def _closed(process: psutil.Process, most: int) -> bool:
    """Whether it comes to have no more than so many files open: who was killed is noticed a little later."""
    deadline = time.monotonic() + WITHIN_S
    while process.num_fds() > most and time.monotonic() < deadline:
        time.sleep(0.1)
    return process.num_fds() <= most


def _wait_for(metrics_port: int, series: str, expected: float) -> None:
    deadline = time.monotonic() + WITHIN_S
    while True:
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=WITHIN_S) as response:
            lines = response.read().decode().splitlines()
        values = [
            float(line.rpartition(" ")[2]) for line in lines if line.split("{")[0].split(" ")[0] == series
        ]
        if sum(values) == expected:
            return
        if time.monotonic() > deadline:
            raise SoakFailed(f"{series} is {sum(values):g}, not {expected:g}")
        time.sleep(0.1)


def show(findings: Findings, console: Console) -> None:
    """What was found, and the verdict."""
    calls = Table("what clients did", "how it ended", "times")
    for what, times in sorted(findings.tally.items()):
        act, _, outcome = what.partition(" ")
        calls.add_row(act.replace("_", " "), outcome, f"{times:,}")
    console.print(calls)
    done = ", ".join(f"{way} {times}" for way, times in findings.disruptions.items())
    console.print(f"disturbed: {done or 'not at all'}")
    for name, found in findings.trends().items():
        if found.tolerance is None:
            verdict = "too short to tell"
        else:
            verdict = f"{found.per_minute:+.3f} per minute, of which {found.tolerance:.3f} may be noise: "
            verdict += "flat" if found.is_flat else "IT GROWS"
        console.print(f"{name.replace('_', ' ')}: {found.first:.1f} to {found.last:.1f}, {verdict}")
    for what, times in Counter(findings.wrong).items():
        console.print(f"WRONG: {what} ({times} times or more)", style="red", markup=False)
    if not findings.wrong:
        calls_made = sum(findings.tally.values())
        console.print(f"no answer was lost: all {calls_made:,} calls ended as they may, once each")


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, and say whether all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--disturb-every", type=float, default=3.0, metavar="S", help="seconds between two")
    parser.add_argument("--sample-every", type=float, default=2.0, metavar="S", help="seconds between two")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there, too")
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        findings = run(arguments.minutes, arguments.disturb_every, arguments.sample_every, console)
    except (SoakFailed, subprocess.TimeoutExpired) as exc:
        console.print(f"the soak failed: {exc}", markup=False)
        return 1
    show(findings, console)
    if arguments.json:
        found = {
            "samples": findings.samples,
            "tally": findings.tally,
            "disruptions": findings.disruptions,
            "wrong": findings.wrong,
        }
        arguments.json.write_text(json.dumps(found))
    return 0 if findings.is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
