"""
What a large ledger costs: `python benchmarks/ledger.py`.

Fills a ledger with a million certificates, or with `--certificates`, none of which has ended, opens it, and
times what is asked of it. With `--directory` what was made there is used again. What a whole control plane
makes of such a ledger, `million.py` measures.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from made_ledger import Makeup, fill
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import Ledger, Wanted
from parallax.control_plane.survey import Surveyor
from parallax.security import CertificateAuthority, Identity, LeafProfile
from parallax.security.keys import generate_key

TARGET_MS: Final = 10.0  # at the 99th percentile, for each question
TARGET_START_S: Final = 2.0
EACH: Final = 100  # certificates of one identity

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
    makeup = Makeup.load(directory)
    if makeup is None:
        async with SqliteEngine(directory):
            pass
        identities, now = max(1, certificates // EACH), datetime.now(UTC).isoformat()
        makeup = Makeup(certificates, identities, 1.0, 0, 0, "ab" * 32, now)
        began = time.perf_counter()
        await asyncio.to_thread(fill, directory, makeup)
        print(f"{certificates:,} certificates made in {time.perf_counter() - began:.0f} s")
    began = time.perf_counter()
    async with SqliteEngine(directory) as engine:
        open_s = time.perf_counter() - began
        audit = AuditLog(engine, lambda: datetime.now(UTC))
        ledger = Ledger(engine, audit, lambda: datetime.now(UTC))
        answers = {
            name: await time_each(question, questions)
            for name, question in _questions(ledger, makeup).items()
        }
        began = time.perf_counter()
        await Surveyor(ledger, lambda: datetime.now(UTC)).count()
        return Measured(makeup.certificates, open_s, time.perf_counter() - began, answers)


def _questions(ledger: Ledger, makeup: Makeup) -> dict[str, Question]:
    chosen = random.Random(1)  # noqa: S311
    authority = CertificateAuthority.create(now=datetime.now(UTC))
    identity = Identity.parse_short("agent/new")

    def any_of_them() -> IssuedCertificate:
        return makeup.entry(chosen.randrange(makeup.certificates))

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
