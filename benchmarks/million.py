"""
What a control plane makes of a large ledger: `python benchmarks/million.py`.

Starts one on a ledger that was made, of a million certificates; asks it as the administrator does while it
counts them, and again when it has; and revokes and renews. Of the control plane alone it says how much
processor time and memory that takes. With `--directory` what was made there is used again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from identities import channel, environment
from made_ledger import Makeup, fill
from measuring import percentile
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issued import IssuedCertificate
from parallax.protos import (
    certificate_pb2,
    certificate_pb2_grpc,
    ledger_pb2,
    ledger_pb2_grpc,
    revocation_pb2,
    revocation_pb2_grpc,
    root_pb2,
    root_pb2_grpc,
)
from parallax.security import CertificateAuthority, Identity
from parallax.security.keys import generate_key, key_id
from parallax.security.layouts import Layout, authority_paths, load_authority, save_authority, save_leaf
from parallax.security.profiles import LeafProfile
from parallax.security.request import new_request

TARGET_MS: Final = 10.0  # at the 99th percentile, for a page, a lookup, a revocation
TARGET_START_S: Final = 2.0
AIMED: Final = (
    "a page of 100, from now on",
    "a page of 100, of all agents",
    "all of one agent",
    "by serial",
    "by fingerprint",
    "revoke by serial",
)
EARLY: Final = 50  # times of each question while it counts: how a rotation stands waits for a second then
RENEWING: Final = 10  # identities that renew by turns: each may 60 times in a minute
WAIT_S: Final = 30.0  # finds what hangs; how long an answer takes is measured
COUNTED: Final = "parallax_fleet_certificates{"

Question = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Used:
    """What a process has taken so far."""

    wall_s: float
    cpu_s: float
    rss_mib: float

    @classmethod
    def by(cls, pid: int, began: float) -> Used:
        """The process *pid*, which was started at *began*."""
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[11:13]
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        cpu_s = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        return cls(time.perf_counter() - began, cpu_s, int(status["VmRSS"].split()[0]) / 1024)


@dataclass(frozen=True, slots=True)
class Running:
    """A control plane that is ready."""

    pid: int
    began: float
    port: int
    metrics_port: int

    def used(self) -> Used:
        """By now."""
        return Used.by(self.pid, self.began)

    async def is_counted(self) -> bool:
        """Whether it knows by now who holds what."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        content = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
        shown = (line.split()[-1] for line in content.splitlines() if line.startswith(COUNTED))
        return sum(map(float, shown)) > 0


def write_certificates(certs: Path) -> str:
    """Ours, unless they are there: the CA with its key, and the leaves; the id of the CA's key."""
    if not authority_paths(certs, Layout.PARALLAX).cert.exists():
        now = datetime.now(UTC)
        authority = CertificateAuthority.create(now=now)
        save_authority(certs, Layout.PARALLAX, authority)
        for short in ("service/control-plane", "client/admin", *_renewing()):
            identity, key = Identity.parse_short(short), generate_key()
            issued = authority.issue(identity, key.public_key(), LeafProfile(), now)
            save_leaf(certs, Layout.PARALLAX, identity, issued.chain, key, issued.bundle)
    return key_id(load_authority(certs).certificate.public_key()).hex()


def _renewing() -> list[str]:
    return [f"agent/renewing-{number}" for number in range(RENEWING)]


async def made(directory: Path, arguments: argparse.Namespace) -> Makeup:
    """What is in *directory*, made if need be."""
    issuer = write_certificates(directory / "certs")
    data = directory / "data"
    makeup = Makeup.load(data)
    if makeup is None:
        async with SqliteEngine(data):
            pass
        makeup = Makeup(
            arguments.certificates,
            arguments.identities,
            arguments.valid,
            arguments.entries,
            arguments.revoked,
            issuer,
            datetime.now(UTC).isoformat(),
        )
        began = time.perf_counter()
        await asyncio.to_thread(fill, data, makeup)
        print(f"made in {time.perf_counter() - began:.0f} s")
    return makeup


@asynccontextmanager
async def control_plane(directory: Path) -> AsyncIterator[Running]:
    """One on what was made, for as long as the block."""
    began = time.perf_counter()
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "parallax.control_plane"),
        env=os.environ
        | environment(directory / "certs")
        | {
            "PARALLAX_DATA_DIR": str(directory / "data"),
            "PARALLAX_LISTEN": "127.0.0.1:0",
            "PARALLAX_HTTP_LISTEN": "127.0.0.1:0",
            "PARALLAX_METRICS_LISTEN": "127.0.0.1:0",
        },
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None  # noqa: S101 - we asked for it
    reading = None
    try:
        async for line in child.stderr:
            told = json.loads(line) if line.startswith(b"{") else {}
            if told.get("event") == "control plane ready":
                reading = asyncio.create_task(child.stderr.read())  # what it logs must not fill the pipe
                yield Running(child.pid, began, told["port"], told["metrics_port"])
                return
        raise SystemExit("the control plane did not start")
    finally:
        child.terminate()
        await child.wait()
        if reading is not None:
            await reading


class Asking:
    """The questions, to a control plane at *port*; each time of another certificate."""

    def __init__(self, certs: Path, port: int, makeup: Makeup) -> None:
        self._makeup = makeup
        self._chosen = random.Random()  # noqa: S311 - others each time, for what is revoked stays so
        address = f"127.0.0.1:{port}"
        admin = channel(certs, "admin", address)
        self.channels = [admin]
        self._ledger = ledger_pb2_grpc.LedgerServiceStub(admin)
        self._revocation = revocation_pb2_grpc.RevocationServiceStub(admin)
        self._root = root_pb2_grpc.RootServiceStub(admin)
        self._renewing = []
        for short in _renewing():
            identity = Identity.parse_short(short)
            dialled = channel(certs, identity.name, address)
            self.channels.append(dialled)
            self._renewing.append((identity, certificate_pb2_grpc.CertificateServiceStub(dialled)))

    @property
    def questions(self) -> dict[str, Question]:
        """By name."""
        return {
            "a page of 100, from now on": lambda: self._page(page_size=100),
            "a page of 100, of all agents": lambda: self._page(page_size=100, holder="agent"),
            "all of one agent": lambda: self._page(holder=self._any().identity.short),
            "by serial": lambda: self._find(self._any().serial),
            "by fingerprint": lambda: self._find(self._any().fingerprint),
            "how the root's rotation stands": self._status,
            "renew": self._renew,
            "revoke by serial": self._revoke,
        }

    async def timed(self, times: int) -> dict[str, list[float]]:
        """Milliseconds of each question, ascending; what changes something last, for a CRL follows on it."""
        took: dict[str, list[float]] = {name: [] for name in self.questions}
        for name, question in self.questions.items():
            for _ in range(times):
                began = time.perf_counter()
                await question()
                took[name].append((time.perf_counter() - began) * 1000)
        return {name: sorted(each) for name, each in took.items()}

    def _any(self) -> IssuedCertificate:
        """One that is valid, and was not revoked at the start."""
        makeup = self._makeup
        return makeup.entry(self._chosen.randrange(makeup.ended, makeup.certificates - makeup.revoked))

    async def _page(self, **stated: Any) -> None:
        await self._ledger.ListCertificates(ledger_pb2.ListCertificatesRequest(**stated), timeout=WAIT_S)

    async def _find(self, number: str) -> None:
        request = ledger_pb2.FindCertificatesRequest(number=number)
        if len((await self._ledger.FindCertificates(request, timeout=WAIT_S)).certificates) != 1:
            raise SystemExit("a certificate is not found")

    async def _revoke(self) -> None:
        serial = revocation_pb2.CertificateSerial(serial=self._any().serial)
        request = revocation_pb2.RevokeRequest(
            certificate=serial, reason=revocation_pb2.REVOCATION_REASON_SUPERSEDED
        )
        await self._revocation.Revoke(request, timeout=WAIT_S)

    async def _status(self) -> None:
        await self._root.GetRootRotation(root_pb2.GetRootRotationRequest(), timeout=WAIT_S)

    async def _renew(self) -> None:
        identity, stub = self._renewing[0]
        self._renewing.append(self._renewing.pop(0))
        request = certificate_pb2.RenewRequest(csr=new_request(identity, generate_key()))
        await stub.Renew(request, timeout=WAIT_S)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: what was taken to be ready, and to have counted; and the answers during and after that."""

    ready: Used
    counted: Used
    early: dict[str, list[float]]
    late: dict[str, list[float]]


async def measure(directory: Path, makeup: Makeup, times: int) -> Measured:
    """Start it, ask, wait until it has counted, ask again."""
    async with control_plane(directory) as running:
        ready = running.used()
        asking = Asking(directory / "certs", running.port, makeup)
        for each in asking.channels:
            await each.channel_ready()
        early = await asking.timed(min(times, EARLY))
        while not await running.is_counted():  # noqa: ASYNC110 - another process
            await asyncio.sleep(1)
        counted = running.used()
        late = await asking.timed(times)
        for each in asking.channels:
            await each.close()
    return Measured(ready, counted, early, late)


def show(makeup: Makeup, measured: Measured) -> bool:
    """Print it beside the targets; whether these are met."""
    title = (
        f"{makeup.certificates:,} certificates, {makeup.certificates - makeup.ended:,} of them valid, of "
        f"{makeup.identities:,} identities; {makeup.revoked:,} revoked; {makeup.entries:,} audit entries"
    )
    table = Table("answer, ms", "p50, at once", "p99", "p50, counted", "p99", title=title)
    for name, early in measured.early.items():
        late = measured.late[name]
        numbers = (percentile(each, part) for each in (early, late) for part in (0.5, 0.99))
        table.add_row(name, *(f"{number:.1f}" for number in numbers))
    Console().print(table)
    for what, used in (("ready", measured.ready), ("counted, and asked", measured.counted)):
        print(f"{what}: {used.wall_s:.2f} s, {used.cpu_s:.2f} s of a processor, {used.rss_mib:.0f} MiB")
    slowest = max(percentile(measured.late[name], 0.99) for name in AIMED)
    is_met = slowest <= TARGET_MS and measured.ready.cpu_s <= TARGET_START_S
    verdict = "met" if is_met else "missed"
    print(
        f"targets: {TARGET_MS:.0f} ms each at p99, counted; {TARGET_START_S:.0f} s of a processor: {verdict}"
    )
    return is_met


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--certificates", type=int, default=1_000_000)
    parser.add_argument("--identities", type=int, default=10_000)
    parser.add_argument("--valid", type=float, default=0.05, help="which part has not ended")
    parser.add_argument("--entries", type=int, default=1_000_000, help="of the audit log")
    parser.add_argument("--revoked", type=int, default=1_000)
    parser.add_argument(
        "--times", type=int, default=200, help="each question, before and after it has counted"
    )
    parser.add_argument("--directory", type=Path, help="where all is made, and used again")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.directory or Path(scratch)
        makeup = asyncio.run(made(directory, arguments))
        measured = asyncio.run(measure(directory, makeup, arguments.times))
    return 0 if show(makeup, measured) else 1


if __name__ == "__main__":
    raise SystemExit(main())
