"""
What a large ledger costs: `python benchmarks/ledger.py`.

Fills a ledger with a million certificates, or with `--certificates`, as so many renewals would have left
it, opens it, and times what is asked of it. With `--directory` what was made there is used again.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import random
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.engines.sqlite_file import NAME
from parallax.control_plane.issued import CERTIFICATES, IssuedCertificate, KeyUse, spell
from parallax.control_plane.ledger import Ledger, Wanted
from parallax.control_plane.survey import Surveyor
from parallax.security import CertificateAuthority, Identity, LeafProfile
from parallax.security.keys import generate_key

TARGET_MS: Final = 10.0  # at the 99th percentile, for each question
TARGET_START_S: Final = 2.0
EACH: Final = 100  # certificates of one identity
ISSUER: Final = "ab" * 32
LIFETIME: Final = timedelta(days=90)

Question = Callable[[], Awaitable[object]]


@dataclass(frozen=True, slots=True)
class Measured:
    """How long it took to open, to survey, and to answer each question so and so often."""

    certificates: int
    open_s: float
    survey_s: float
    answers_ms: dict[str, list[float]]

    @property
    def is_met(self) -> bool:
        """Whether all of it is within the targets."""
        slowest = max(_p99(times) for times in self.answers_ms.values())
        return self.open_s <= TARGET_START_S and slowest <= TARGET_MS


def entry(number: int, certificates: int, now: datetime) -> IssuedCertificate:
    """Certificate *number* of so many: the same each time, and they end one after the other."""
    serial, fingerprint, key, signed = (
        hashlib.sha256(f"{number}{what}".encode()).hexdigest() for what in "sfkc"
    )
    end = now + LIFETIME * ((number + 1) / certificates)
    return IssuedCertificate(
        identity=_agent(number % max(1, certificates // EACH)),
        serial=serial[:40].lstrip("0"),
        issuer=ISSUER,
        fingerprint=fingerprint,
        key_fingerprint=key,
        not_before=end - LIFETIME,
        not_after=end,
        issued_at=end - LIFETIME,
        recorded_at=end - LIFETIME,
        requested_by="spiffe://parallax.local/agent/agent-1",
        seen_at=end - LIFETIME,
        key=f"{CERTIFICATES}{spell(end)}/{signed}",
    )


@cache
def _agent(number: int) -> Identity:
    return Identity.parse_short(f"agent/agent-{number}")


def fill(directory: Path, certificates: int, now: datetime) -> None:
    """Put them into the file without the engine: what is there afterwards is the same, sooner."""

    def rows() -> Iterator[tuple[str, int, bytes]]:
        revisions = count(1)
        for number in range(certificates):
            each = entry(number, certificates, now)
            yield each.key, next(revisions), each.encode()
            for key in each.keys:
                yield key, next(revisions), b""
            yield each.use_key, next(revisions), KeyUse(each.identity, each.key).encode()

    with closing(sqlite3.connect(directory / NAME, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")  # the engine turns it on again
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -2000000")
        db.execute("BEGIN")
        db.executemany("INSERT INTO records (key, revision, value) VALUES (?, ?, ?)", rows())
        # The newest event says how far the revisions have come.
        db.execute("INSERT INTO events VALUES (?, 'benchmarks/filled', '')", (certificates * 5 + 1,))
        db.execute("COMMIT")


async def time_each(question: Question, times: int) -> list[float]:
    """Milliseconds, each time."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        await question()
        taken.append((time.perf_counter() - began) * 1000)
    return taken


async def measure(directory: Path, certificates: int, questions: int) -> Measured:
    """Fill what is empty, then open it, and ask."""
    now = datetime.now(UTC)
    if not (directory / NAME).exists():
        async with SqliteEngine(directory):
            pass
        began = time.perf_counter()
        await asyncio.to_thread(fill, directory, certificates, now)
        print(f"{certificates:,} certificates made in {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    async with SqliteEngine(directory) as engine:
        open_s = time.perf_counter() - began
        audit = AuditLog(engine, lambda: datetime.now(UTC))
        ledger = Ledger(engine, audit, lambda: datetime.now(UTC))
        answers = {
            name: await time_each(question, questions)
            for name, question in (await _questions(ledger, certificates)).items()
        }
        began = time.perf_counter()
        await Surveyor(ledger, lambda: datetime.now(UTC)).count()
        return Measured(certificates, open_s, time.perf_counter() - began, answers)


async def _questions(ledger: Ledger, certificates: int) -> dict[str, Question]:
    found, _ = await ledger.page(Wanted(), limit=1)
    begin = found[0].not_after - LIFETIME / certificates  # of this file, whenever it was made
    chosen = random.Random(1)  # noqa: S311
    authority = CertificateAuthority.create(now=datetime.now(UTC))
    identity = Identity.parse_short("agent/new")

    def any_of_them() -> IssuedCertificate:
        return entry(chosen.randrange(certificates), certificates, begin)

    async def lookup(number: Callable[[IssuedCertificate], str]) -> None:
        if len(await ledger.find(number(any_of_them()))) != 1:
            raise SystemExit("a certificate is not found")

    async def record() -> None:
        key = generate_key().public_key()
        leaf = authority.issue(identity, key, LeafProfile(), datetime.now(UTC)).chain[0]
        await ledger.record(leaf, identity, authority.certificate, str(identity))

    holders = "parallax.local/agent"
    return {
        "a page of 100, somewhere": lambda: ledger.page(Wanted(), any_of_them().key, 100),
        "a page of 100, of all agents": lambda: ledger.page(Wanted(holders), limit=100),
        "all of one agent": lambda: ledger.page(Wanted(f"{holders}/{any_of_them().identity.name}")),
        "by serial": lambda: lookup(lambda each: each.serial),
        "by fingerprint": lambda: lookup(lambda each: each.fingerprint),
        "sign and record a new one": record,
    }


def _p99(times: list[float]) -> float:
    return sorted(times)[min(len(times) - 1, len(times) * 99 // 100)]


def show(measured: Measured) -> None:
    """Print it beside the targets."""
    table = Table(title=f"A ledger of {measured.certificates:,} certificates, in milliseconds")
    for column in ("what", "p50", "p99"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for name, times in measured.answers_ms.items():
        table.add_row(name, f"{statistics.median(times):.2f}", f"{_p99(times):.2f}")
    Console().print(table)
    print(f"opened in {measured.open_s:.2f} s, surveyed once, beside the calls, in {measured.survey_s:.1f} s")
    verdict = "met" if measured.is_met else "missed"
    print(f"targets: {TARGET_MS:.0f} ms each at p99, {TARGET_START_S:.0f} s to open: {verdict}")


def main() -> int:
    """Measure and print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--certificates", type=int, default=1_000_000)
    parser.add_argument("--questions", type=int, default=1_000, help="of each sort")
    parser.add_argument("--directory", type=Path, help="where the ledger is made, and used again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = arguments.directory or Path(scratch) / "data"
        measured = asyncio.run(measure(directory, arguments.certificates, arguments.questions))
    show(measured)
    return 0 if measured.is_met else 1


if __name__ == "__main__":
    raise SystemExit(main())
