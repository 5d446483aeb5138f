"""The process that `crashes.py` kills."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING, Final

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.engines.engine import Write
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.ledger import KEPT, Ledger
from parallax.security import CertificateAuthority, Identity, LeafProfile, authenticate
from parallax.security.keys import generate_key

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from pathlib import Path

    from cryptography import x509

DEEDS: Final = "deeds/"
_LONG_AGO: Final = KEPT + timedelta(days=2)


def work(directory: Path, number: int, told: Connection) -> None:
    """Write as fast as it can, and say which records are acknowledged, until killed."""
    asyncio.run(Worker(number, told).run(directory))


class Worker:
    """Does every kind of write at once; *number* keeps its names apart from those of others."""

    def __init__(self, number: int, told: Connection) -> None:
        self._numbers = count(number * 1_000_000)
        self._told = told
        self._authority = CertificateAuthority.create(now=datetime.now(UTC) - 2 * _LONG_AGO)

    async def run(self, directory: Path) -> None:
        """Until killed."""
        async with SqliteEngine(directory) as engine, asyncio.TaskGroup() as group:
            audit = AuditLog(engine, _now)
            ledger = Ledger(engine, audit, _now)
            group.create_task(ledger.run())
            for _ in range(4):
                group.create_task(self._issue(ledger))
                group.create_task(self._do(audit))
            group.create_task(self._use(ledger))
            group.create_task(self._age(ledger))

    async def _issue(self, ledger: Ledger) -> None:
        """Certificates that last, two for each key; the first is seen in use."""
        while True:
            identity, key = self._identity(), generate_key().public_key()
            for turn in range(2):
                issued = self._authority.issue(identity, key, LeafProfile(), _now())
                leaf = issued.chain[0]
                entry = await ledger.record(leaf, identity, self._authority.certificate, str(identity))
                self._told.send_bytes(entry.key.encode())
                if not turn:
                    self._note(ledger, leaf)

    async def _use(self, ledger: Ledger) -> None:
        """Certificates that nobody here has issued."""
        while True:
            leaf = self._leaf(_now(), timedelta(days=1))
            self._note(ledger, leaf)
            await asyncio.sleep(0.001)

    async def _age(self, ledger: Ledger) -> None:
        """Certificates that ended long ago, and are dropped."""
        while True:
            for _ in range(10):
                leaf = self._leaf(_now() - _LONG_AGO, timedelta(minutes=1))
                await ledger.record(leaf, self._identity(), self._authority.certificate, "nobody")
            await ledger.sweep()

    async def _do(self, audit: AuditLog) -> None:
        """Deeds, each with two records."""
        while True:
            number = next(self._numbers)
            keys = [f"{DEEDS}{number}/{half}" for half in "ab"]
            await audit.commit(Deed("benchmarks/done", "nobody"), [Write(key, b"") for key in keys])
            for key in keys:
                self._told.send_bytes(key.encode())

    def _note(self, ledger: Ledger, leaf: x509.Certificate) -> None:
        ledger.note(authenticate([leaf], self._authority.bundle, "parallax.local", _now()), leaf)

    def _leaf(self, now: datetime, lifetime: timedelta) -> x509.Certificate:
        key = generate_key().public_key()
        return self._authority.issue(self._identity(), key, LeafProfile(lifetime), now).chain[0]

    def _identity(self) -> Identity:
        return Identity.parse_short(f"agent/agent-{next(self._numbers)}")


def _now() -> datetime:
    return datetime.now(UTC)
