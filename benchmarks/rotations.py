"""
Full load while every certificate is replaced again and again, and the root twice: a part of `make soak`.

On loopback over mutual TLS, each role in a process of its own: a control plane, agents with sessions and
agents that listen, and clients that ask through the control plane, over links and by unary calls of their
own. All their files are replaced many times: by turns one by one, as renewals come, and all at the same
moment, which on one machine is the worst there is. No task may fail, and nothing may grow.

How long calls take meanwhile is compared with calm, and with `--control` also with spells in which
nothing rotates: strangers take as much processor time in the same way, so much is the machine's; or
all open and close as many connections as a rotation has them open anew, so much is gRPC's.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from measuring import percentile
from parallax.runtime.backoff import MOVE_WITHIN_S
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.layouts import Layout, save_leaf
from parallax.security.profiles import LeafProfile
from rotation_roles import ENDPOINTS
from soak import GRAINS, MIB, WARM_UP, WITHIN_S, SoakFailed
from strangers import Strangers
from trend import Trend, trend

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from parallax.security.keys import PrivateKey

T = TypeVar("T")
Spell: TypeAlias = tuple[str, float, float]  # what was, from when to when
ROLES: Final = Path(__file__).with_name("rotation_roles.py")
AGENTS: Final = ("session-1", "session-2", "direct-1", "direct-2")
CLIENTS: Final = ("link", "direct-link", "direct-unary")
SERVICES: Final = ("control-plane", "agent-proxy")
PER_MINUTE: Final = 20
BURST: Final = 10  # rotations without a longer pause
CALM, SPREAD, TOGETHER = "calm", "one by one", "all at once"
STRANGERS: Final = {SPREAD: "strangers, one by one", TOGETHER: "strangers, all at once"}
BARE: Final = {SPREAD: "connections, one by one", TOGETHER: "connections, all at once"}
CALM_S: Final = 8.0  # what the latencies while rotating are compared with
# What is kept of connections and certificates has bounds, which are reached late: the control plane gained
# 2 MiB in the first 360 rotations that it was looked at, and nothing in the 300 that followed.
WARMING: Final = 2.0  # times the rotations that count, before
FASTEST_S: Final = 0.5
ALLOCATED_MINUTES: Final = 2.0  # in which memory does not count yet
SETTLED_S: Final = 2.0  # from the last rotation of a burst until calm counts
MOVED_S: Final = 2 * MOVE_WITHIN_S  # from a certificate that is taken up until all connections go by it
RATIO: Final = 1.3


class Certificates:
    """
    Everybody's certificate, and the CAs that come one after the other.

    All are made before, so that in the run there is nothing to pay but their files.
    """

    def __init__(self, directory: Path, rotations: int) -> None:
        self._directory = directory
        self._everybody = [
            Identity.parse_short(f"{kind}/{name}")
            for kind, names in (("service", SERVICES), ("agent", AGENTS), ("client", (*CLIENTS, "admin")))
            for name in names
        ]
        steps = list(islice(plan(rotations), rotations + 1))
        moves = [False, *(before != after for before, after in pairwise(steps))]
        prepared = [(moved, *self._issue(*step)) for moved, step in zip(moves, steps, strict=True)]
        self._prepared = prepared[::-1]
        self.serials: dict[str, str] = {}

    def __len__(self) -> int:
        """How many there are."""
        return len(self._everybody)

    @property
    def moves_roots(self) -> bool:
        """Whether with the next all trust other roots, or prove themselves by another."""
        return self._prepared[-1][0]

    @property
    def taken_up(self) -> set[str]:
        """The serial numbers of the newest that a process takes up, in time."""
        return {serial for name, serial in self.serials.items() if name != "client/admin"}

    def rotate(self, over_s: float = 0.0) -> None:
        """Replace all, one after the other, so that it takes *over_s* seconds."""
        _, bundle, made = self._prepared.pop()
        for identity, key, chain in spread(made, over_s):
            save_leaf(self._directory, Layout.PARALLAX, identity, chain, key, bundle)
            self.serials[identity.short] = f"{chain[0].serial_number:x}"

    def _issue(
        self, authority: CertificateAuthority, bundle: TrustBundle
    ) -> tuple[TrustBundle, list[tuple[Identity, PrivateKey, tuple[Certificate, ...]]]]:
        made = []
        for identity in self._everybody:
            key = generate_key()
            issued = authority.issue(identity, key.public_key(), LeafProfile(), datetime.now(UTC))
            made.append((identity, key, issued.chain))
        return bundle, made


def spread(things: Sequence[T], over_s: float) -> Iterator[T]:
    """*things*, one after the other, so that all of them take *over_s* seconds."""
    began, pause = time.monotonic(), over_s / len(things)
    for number, thing in enumerate(things, 1):
        yield thing
        time.sleep(max(0.0, began + number * pause - time.monotonic()))


def plan(rotations: int) -> Iterator[tuple[CertificateAuthority, TrustBundle]]:
    """Who signs, and whom all trust: the first, then at a third and at two thirds of the way another root."""
    moments = {rotations // 3, 2 * rotations // 3}
    now = CertificateAuthority.create(now=datetime.now(UTC), name="Root 0")
    done = 0
    while True:
        if done in moments:
            after = CertificateAuthority.create(now=datetime.now(UTC), name=f"Root {done}")
            both = TrustBundle((*now.bundle.roots, *after.bundle.roots))
            yield now, both  # first everybody trusts both
            yield after, both  # then everybody proves itself by the new one
            now = after
            done += 2
        yield now, now.bundle  # and nobody needs the old one any more
        done += 1


@dataclass(slots=True)
class Findings:
    """What a run has shown."""

    rotations: int = 0
    samples: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    took_ms: dict[str, list[float]] = field(
        default_factory=lambda: {
            when: [] for when in (CALM, *_side_by_side(SPREAD), *_side_by_side(TOGETHER))
        }
    )
    cost_s: float = 0.0  # processor time of one rotation of everybody, if that was measured
    failures: int = 0
    wrong: Counter[str] = field(default_factory=Counter)

    def trends(self) -> dict[str, Trend]:
        """Of what was sampled, the warm-up left out."""
        found = {}
        for name, samples in self.samples.items():
            is_memory = name.endswith("MiB")
            begin = max(samples[-1][0] * WARM_UP, ALLOCATED_MINUTES if is_memory else 0.0)
            grain = GRAINS["rss_mib" if is_memory else "open_files"]
            found[name] = trend([sample for sample in samples if sample[0] >= begin], grain)
        return found

    def ratio(self, when: str) -> float:
        """Of the p99 then to that without rotations."""
        calm, rotating = (percentile(sorted(self.took_ms[each]), 0.99) for each in (CALM, when))
        return rotating / calm

    @property
    def is_good(self) -> bool:
        """The verdict; how long calls took is for people to judge."""
        return not self.wrong and not self.failures and all(found.is_flat for found in self.trends().values())


class Stage:
    """The processes of a run; none is left behind."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            "PARALLAX_TLS_ENABLED": "true",
            "PARALLAX_TLS_VERIFY_CLIENT": "true",
            "PARALLAX_CERTS_DIR": str(directory / "certs"),
            "PARALLAX_DATA_DIR": str(directory / "data"),
            "PARALLAX_LOG_FORMAT": "json",
        }

    def start(self, name: str, *arguments: str | Path, **environment: str) -> None:
        """Start a process called *name*."""
        with (self._directory / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env={"PATH": "/usr/bin:/bin", **self.environment, **environment},
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    def said(self, name: str, event: str) -> dict[str, str]:
        """What *name* logged with *event*, as soon as it has."""
        deadline = time.monotonic() + WITHIN_S
        while time.monotonic() < deadline and self.processes[name].poll() is None:
            for record in self.records(name):
                if record.get("event") == event:
                    return record
            time.sleep(0.05)
        raise SoakFailed(f"{name} did not say {event!r}: {self.log(name)}")

    def log(self, name: str) -> str:
        """All that *name* has said."""
        return (self._directory / f"{name}.log").read_text()

    def records(self, name: str) -> list[dict[str, str]]:
        """Its log."""
        return [json.loads(line) for line in self.log(name).splitlines() if line.startswith("{")]

    def in_force(self) -> set[str]:
        """The serial number of each certificate that somebody has taken up."""
        records = (record for name in self.processes for record in self.records(name))
        return {record["serial"] for record in records if record.get("event") == "certificate rotated"}

    def report(self, client: str) -> Path:
        """Where *client* says what it sees."""
        return self._directory / f"report-{client}"

    def stop(self, *names: str) -> list[str]:
        """Have them end in order; what is wrong with how they did."""
        for name in names:
            self.processes[name].send_signal(signal.SIGTERM)
        codes = {name: self.processes[name].wait(WITHIN_S) for name in names}
        return [f"{name} ended with code {code}" for name, code in codes.items() if code]

    def connect(self, over_s: float) -> None:
        """Have all open the connections that a rotation would, one after the other in *over_s* seconds."""
        for name in spread((*AGENTS, *CLIENTS), over_s):
            self.processes[name].send_signal(signal.SIGUSR1)

    def close(self) -> None:
        """End whatever still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()


def run(minutes: float, rotations: int, console: Console, *, control: bool = False) -> Findings:
    """Carry it out; with *control* two thirds of the time are for what it is compared with."""
    findings = Findings()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        certificates = Certificates(directory / "certs", rotations + round(rotations * WARMING))
        certificates.rotate()
        stage = Stage(directory)
        try:
            _start(stage)
            with Strangers(len(certificates)) if control else nullcontext() as strangers:
                spells = _soak(minutes * 60, rotations, stage, certificates, findings, console, strangers)
            _expect_in_use(stage, certificates, findings)
            clients, others = CLIENTS, [*AGENTS, "control-plane"]
            for wrong in (*stage.stop(*clients), *stage.stop(*others)):
                findings.wrong[wrong] += 1
            _collect(stage, spells, findings)
        finally:
            stage.close()
    return findings


def _start(stage: Stage) -> None:
    free = "127.0.0.1:0"
    stage.start(
        "control-plane",
        "-m",
        "parallax.control_plane",
        PARALLAX_LISTEN=free,
        PARALLAX_METRICS_LISTEN=free,
        PARALLAX_HTTP_LISTEN="none",
    )
    ready = stage.said("control-plane", "control plane ready")
    stage.environment["PARALLAX_CONTROL_PLANE"] = f"localhost:{ready['port']}"
    endpoints = []
    for name in AGENTS:
        listens = {"PARALLAX_LISTEN": free} if name.startswith("direct") else {}
        stage.start(name, ROLES, "agent", name, **listens)
    for name in AGENTS:
        if name.startswith("direct"):
            endpoints.append(f"{name}=localhost:{stage.said(name, 'agent serves')['port']}")
            stage.said(name, "registered")
        else:
            stage.said(name, "connected")
    for name in CLIENTS:
        told = {"PARALLAX_IDENTITY": f"client/{name}", ENDPOINTS: " ".join(endpoints)}
        stage.start(name, ROLES, "client", name, stage.report(name), **told)


def _soak(
    seconds: float,
    rotations: int,
    stage: Stage,
    certificates: Certificates,
    findings: Findings,
    console: Console,
    strangers: Strangers | None,
) -> list[Spell]:
    """Rotate in bursts; what was when."""
    kinds = [SPREAD, TOGETHER] if strangers is None else [*_side_by_side(SPREAD), *_side_by_side(TOGETHER)]
    share = len(kinds) // 2
    bursts = -(-rotations // BURST) * share
    pause = max(FASTEST_S, (seconds - bursts * (CALM_S + SETTLED_S)) / (rotations * share))
    warming = round(rotations * WARMING)
    watched = {name: psutil.Process(process.pid) for name, process in stage.processes.items()}
    spells: list[Spell] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("rotating", total=warming + bursts * BURST)

        def warm_up() -> None:
            for _ in range(warming):
                due = time.monotonic() + FASTEST_S
                _rotate(stage, certificates)
                progress.advance(bar)
                time.sleep(max(0.0, due - time.monotonic()))

        if strangers is None:
            warm_up()
        else:
            findings.cost_s = _cost(watched, warm_up) / warming
        began = time.monotonic()
        for burst in range(bursts):
            when, since = kinds[burst % len(kinds)], time.monotonic()
            over_s = pause if when in _side_by_side(SPREAD) else 0.0
            for _ in range(BURST):
                due = time.monotonic() + pause
                if strangers is not None and when in STRANGERS.values():
                    for _ in spread(range(len(certificates)), over_s):
                        strangers.take(findings.cost_s / len(certificates))
                elif when in BARE.values():
                    stage.connect(over_s)
                elif findings.rotations < rotations:
                    _rotate(stage, certificates, over_s)
                    findings.rotations += 1
                _wait(due - time.monotonic(), began, watched, findings)
                progress.advance(bar)
            spells.append((when, since, time.monotonic()))
            _wait(SETTLED_S, began, watched, findings)
            since = time.monotonic()
            _wait(CALM_S, began, watched, findings)
            spells.append((CALM, since, time.monotonic()))
    return spells


def _rotate(stage: Stage, certificates: Certificates, over_s: float = 0.0) -> None:
    """Replace all certificates, and roots as they have to be: once nobody needs what was there before."""
    if certificates.moves_roots:
        deadline = time.monotonic() + WITHIN_S
        while late := certificates.taken_up - stage.in_force():
            if time.monotonic() > deadline:
                raise SoakFailed(f"{len(late)} certificates were not taken up")
            time.sleep(0.1)
        time.sleep(MOVED_S)
    certificates.rotate(over_s)


def _side_by_side(when: str) -> tuple[str, str, str]:
    return when, STRANGERS[when], BARE[when]


def _cost(watched: Mapping[str, psutil.Process], work: Callable[[], None]) -> float:
    """What *work* makes all of *watched* take in processor time, beyond what they take anyway."""

    def taken() -> tuple[float, float]:
        times = (process.cpu_times() for process in watched.values())
        return time.monotonic(), sum(each.user + each.system for each in times)

    began, before = taken()
    time.sleep(CALM_S)
    until, calm = taken()
    work()
    ended, after = taken()
    return after - calm - (calm - before) / (until - began) * (ended - until)


def _wait(seconds: float, began: float, watched: dict[str, psutil.Process], findings: Findings) -> None:
    """Let time pass, and look at everybody meanwhile."""
    until = time.monotonic() + seconds
    at = (time.monotonic() - began) / 60
    for name, process in watched.items():
        if process.status() == psutil.STATUS_ZOMBIE:
            raise SoakFailed(f"{name} has ended")
        for what, value in (("MiB", process.memory_info().rss / MIB), ("files", process.num_fds())):
            findings.samples.setdefault(f"{name} {what}", []).append((at, float(value)))
    time.sleep(max(0.0, until - time.monotonic()))


def _expect_in_use(stage: Stage, certificates: Certificates, findings: Findings) -> None:
    """Whoever calls the control plane must do so with its newest certificate by now."""
    command = [sys.executable, "-m", "parallax.sdk.cli", "certs", "list", "--ledger", "--json"]
    expected = {f"agent/{name}" for name in AGENTS} | {"client/link"}
    deadline = time.monotonic() + WITHIN_S
    while True:
        done = subprocess.run(
            [*command, "--identity", "client/admin"],
            env={"PATH": "/usr/bin:/bin", **stage.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SoakFailed(done.stderr)
        seen = {entry["serial"] for entry in json.loads(done.stdout) if entry["seen_at"]}
        late = [name for name in expected if certificates.serials[name] not in seen]
        if not late:
            return
        if time.monotonic() > deadline:
            findings.wrong.update(f"{name} does not use its newest certificate" for name in late)
            return


def _collect(stage: Stage, spells: Sequence[Spell], findings: Findings) -> None:
    """The clients' reports, and what else was logged as a fault."""
    for client in CLIENTS:
        for line in stage.report(client).read_text().splitlines():
            said = json.loads(line)
            findings.failures += said["failures"]
            findings.wrong.update(f"{client}: {what}" for what in said["wrong"])
            # Of the second before `at`; one in which two spells meet counts for neither.
            for when, since, until in spells:
                if since + 1 <= said["at"] <= until:
                    findings.took_ms[when] += said["took_ms"]
    for name in ("control-plane", *AGENTS):
        faults = (record for record in stage.records(name) if record.get("level") in {"error", "critical"})
        findings.wrong.update(f"{name} logged {fault['event']!r}" for fault in faults)


def show(findings: Findings, console: Console) -> None:
    """What was found, and the verdict."""
    table = Table("process", "from", "to", "per minute", "noise", "")
    for name, found in findings.trends().items():
        verdict = "too short" if found.tolerance is None else "flat" if found.is_flat else "IT GROWS"
        noise = "" if found.tolerance is None else f"{found.tolerance:.2f}"
        table.add_row(
            name, f"{found.first:.1f}", f"{found.last:.1f}", f"{found.per_minute:+.2f}", noise, verdict
        )
    console.print(table)
    calls = Table("calls", "answered", "p50 ms", "p99 ms")
    for when, took in findings.took_ms.items():
        if not took:
            continue
        ordered = sorted(took)
        p50, p99 = (f"{percentile(ordered, share):.2f}" for share in (0.5, 0.99))
        calls.add_row(when, f"{len(ordered):,}", p50, p99)
    console.print(calls)
    for when in filter(findings.took_ms.get, (SPREAD, TOGETHER)):
        ratio = findings.ratio(when)
        met = "met" if ratio <= RATIO else "missed"
        console.print(f"p99 while all rotate {when}: {ratio:.2f} times that without (target {RATIO}: {met})")
        if findings.took_ms[STRANGERS[when]]:
            floor = findings.ratio(STRANGERS[when])
            console.print(
                f"  while strangers take the same {findings.cost_s * 1000:.0f} ms a time: {floor:.2f}"
            )
            bare = findings.ratio(BARE[when])
            console.print(f"  while as many connections are opened and closed: {bare:.2f}")
    for what, times in findings.wrong.most_common():
        console.print(f"WRONG: {what} ({times} times)", style="red", markup=False)
    answered = sum(map(len, findings.took_ms.values()))
    done = f"{findings.rotations} rotations of everything, {answered:,} calls timed"
    console.print(f"{done}, {findings.failures} failures")


def main(argv: Sequence[str] | None = None) -> int:
    """Rotate under load, and say whether all is well."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default: %(default)s)")
    parser.add_argument("--rotations", type=int, help=f"how many (default: {PER_MINUTE} for each minute)")
    parser.add_argument(
        "--control", action="store_true", help="for comparison, two thirds of the time nothing rotates"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        rotations = arguments.rotations or round(PER_MINUTE * arguments.minutes)
        findings = run(arguments.minutes, rotations, console, control=arguments.control)
    except (SoakFailed, subprocess.TimeoutExpired) as exc:
        console.print(f"it failed: {exc}", markup=False)
        return 1
    show(findings, console)
    return 0 if findings.is_good else 1


if __name__ == "__main__":
    raise SystemExit(main())
