"""
What a certificate costs to issue: `python benchmarks/issuing.py`.

Checks a CSR, signs a leaf, checks the leaf, and records it in the ledger, on the disk, before it counts;
beside what cryptography alone takes for CSR and signature, in the same run and interleaved.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from rich.console import Console
from rich.table import Table

from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.ledger import Ledger
from parallax.runtime.clock import utc_now
from parallax.security import CertificateAuthority, Identity
from parallax.security.keys import generate_key
from parallax.security.profiles import LeafProfile
from parallax.security.request import check_request, new_request

TARGET: Final = 1_000.0  # issued in a second of one core
BY: Final = "spiffe://parallax.local/client/admin"
PROFILE: Final = LeafProfile(lifetime=timedelta(hours=1))
LEAF: Final = Identity.parse_short("agent/agent-1")

Work = Callable[[], Awaitable[None]]
"""One certificate."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How many certificates, in a second and in a second of processor time of the whole process."""

    per_s: float
    per_cpu_s: float


class Issuing:
    """The parts of the path, one after the other."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._authority = CertificateAuthority.create(now=datetime.now(UTC))
        self._csrs: Iterator[bytes] = iter(())
        self._spare: Iterator[x509.Certificate] = iter(())

    async def bare(self) -> None:
        """CSR and signature by cryptography, with the extensions of our leaves and no further check."""
        csr = x509.load_der_x509_csr(next(self._csrs))
        if not csr.is_signature_valid:
            raise SystemExit("a bad CSR")
        now, ca = datetime.now(UTC), self._authority.certificate
        names = [x509.UniformResourceIdentifier(str(LEAF)), x509.DNSName(LEAF.dns_name)]
        (
            x509.CertificateBuilder()
            .subject_name(csr.subject)
            .issuer_name(ca.subject)
            .public_key(csr.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + PROFILE.lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._authority.key, hashes.SHA256())
        )

    async def issue(self) -> None:
        """CSR, template, signature, and our check of what was signed."""
        self._issue()

    async def issue_and_record(self) -> None:
        """All of that, and on the disk."""
        await self._record(self._issue())

    def prepare(self, requests: int, leaves: int) -> None:
        """Have so many requests, each for a key of its own, and leaves for `record`, before it counts."""
        self._csrs = iter([new_request(LEAF, generate_key()) for _ in range(requests)])
        self._spare = iter([self._issue() for _ in range(leaves)])

    async def record(self) -> None:
        """On the disk alone."""
        await self._record(next(self._spare))

    def _issue(self) -> x509.Certificate:
        key = check_request(next(self._csrs), LEAF, PROFILE.sans, None)
        return self._authority.issue(LEAF, key, PROFILE, datetime.now(UTC)).chain[0]

    async def _record(self, leaf: x509.Certificate) -> None:
        await self._ledger.record(leaf, LEAF, self._authority.certificate, BY)


async def pace(work: Work, certificates: int, in_flight: int) -> Pace:
    """How fast *work* is with so many certificates asked for at once."""
    numbers = count()

    async def one_after_the_other() -> None:
        while next(numbers) < certificates:
            await work()

    began, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(one_after_the_other() for _ in range(in_flight)))
    return Pace(certificates / (time.perf_counter() - began), certificates / (time.process_time() - cpu))


async def measure(directory: Path, rounds: int, certificates: int, in_flight: int) -> dict[str, list[Pace]]:
    """Each part of the path in turn, as often as there are rounds."""
    measured: dict[str, list[Pace]] = {}
    async with SqliteEngine(directory) as engine:
        issuing = Issuing(Ledger(engine, AuditLog(engine, utc_now), utc_now))
        parts: dict[str, Work] = {
            "CSR, sign: bare": issuing.bare,
            "CSR, sign, check": issuing.issue,
            "… and record": issuing.issue_and_record,
            "record alone": issuing.record,
        }
        for _ in range(rounds):
            for name, work in parts.items():
                issuing.prepare(certificates, certificates if work == issuing.record else 0)
                measured.setdefault(name, []).append(await pace(work, certificates, in_flight))
    return measured


def show(measured: dict[str, list[Pace]], in_flight: int) -> bool:
    """Print medians and ranges beside the first part's; whether the target is met."""
    table = Table(title=f"Certificates issued, P-256, {in_flight} asked for at once")
    for column in ("what", "per second", "per core second", "min", "max", "of the first"):
        table.add_column(column, justify="left" if column == "what" else "right")
    median = {name: statistics.median(pace.per_cpu_s for pace in paces) for name, paces in measured.items()}
    first = next(iter(median.values()))
    for name, paces in measured.items():
        each = [pace.per_cpu_s for pace in paces]
        table.add_row(
            name,
            f"{statistics.median(pace.per_s for pace in paces):,.0f}",
            f"{median[name]:,.0f}",
            f"{min(each):,.0f}",
            f"{max(each):,.0f}",
            f"{median[name] / first:.2f}",
        )
    Console().print(table)
    whole = median["… and record"]
    print(f"target: {TARGET:,.0f} per core second; {whole:,.0f}: {'met' if whole >= TARGET else 'missed'}")
    return whole >= TARGET


def main() -> int:
    """Measure and print; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--certificates", type=int, default=2_000, help="in each round of each part")
    parser.add_argument("--in-flight", type=int, default=64, help="asked for at once")
    parser.add_argument("--directory", type=Path, help="where the data is written: on the disk that is meant")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as scratch:
        measured = asyncio.run(
            measure(Path(scratch), arguments.rounds, arguments.certificates, arguments.in_flight)
        )
    return 0 if show(measured, arguments.in_flight) else 1


if __name__ == "__main__":
    raise SystemExit(main())
