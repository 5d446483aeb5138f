"""A large ledger, as so many renewals would have left it, made in a minute or two: the same each time."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from itertools import count
from pathlib import Path
from typing import Final, Self

from parallax.control_plane.audit import HEAD, START, Deed, Entry
from parallax.control_plane.engines.sqlite_file import HISTORY, NAME
from parallax.control_plane.issued import CERTIFICATES, IssuedCertificate, KeyUse, spell
from parallax.control_plane.ledger import KEPT
from parallax.control_plane.revoked import RevokedCertificate
from parallax.security import Identity
from parallax.security.revocation import Reason

LIFETIME: Final = timedelta(days=90)
EARLIEST: Final = timedelta(hours=2)  # until the first of those that are valid ends: longer than a run
BY: Final = "spiffe://parallax.local/client/admin"
EVENT_BYTES: Final = 600
EVENT_EVERY: Final = 5  # revisions: a renewal is several records
ABOUT: Final = "ledger.json"  # beside the file: what was made

Row = tuple[str, bytes]


@dataclass(frozen=True, slots=True)
class Makeup:
    """
    What a ledger is to hold.

    Args:
        identities: Who has them, each as many.
        valid: Which part has not ended. The other has within the week for which it is kept.
        entries: Of the audit log.
        revoked: How many of those that are valid are.
        issuer: Who signed them all: SHA-256 of its key, in hex.
        at: When it was made, as ISO 8601.
    """

    certificates: int
    identities: int
    valid: float
    entries: int
    revoked: int
    issuer: str
    at: str

    @property
    def ended(self) -> int:
        """How many have ended; the others have higher numbers."""
        return self.certificates - round(self.certificates * self.valid)

    def entry(self, number: int) -> IssuedCertificate:
        """Certificate *number*: they end one after the other."""
        serial, fingerprint, key, signed = (
            hashlib.sha256(f"{number}{what}".encode()).hexdigest() for what in "sfkc"
        )
        end = self._end_of(number)
        identity = _agent(number % self.identities)
        return IssuedCertificate(
            identity=identity,
            serial=serial[:38].lstrip("0"),
            issuer=self.issuer,
            fingerprint=fingerprint,
            key_fingerprint=key,
            not_before=end - LIFETIME,
            not_after=end,
            issued_at=end - LIFETIME,
            recorded_at=end - LIFETIME,
            requested_by=str(identity),
            seen_at=end - LIFETIME,
            key=f"{CERTIFICATES}{spell(end)}/{signed}",
        )

    def _end_of(self, number: int) -> datetime:
        now, ended = datetime.fromisoformat(self.at), self.ended
        if number < ended:
            return now - (KEPT - EARLIEST) * (1 - number / ended)
        return now + EARLIEST + LIFETIME * ((number - ended) / (self.certificates - ended))

    def save(self, directory: Path) -> None:
        """Write it beside what was made of it."""
        (directory / ABOUT).write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, directory: Path) -> Self | None:
        """What was made there; None: nothing."""
        path = directory / ABOUT
        return cls(**json.loads(path.read_text())) if path.exists() else None


@cache
def _agent(number: int) -> Identity:
    return Identity.parse_short(f"agent/made-{number}")


def fill(directory: Path, makeup: Makeup) -> None:
    """Put it into an engine's empty file without the engine: what is there afterwards is the same, sooner."""
    revisions = count(1)
    with closing(sqlite3.connect(directory / NAME, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = OFF")  # the engine turns it on again
        db.execute("PRAGMA synchronous = OFF")
        db.execute("PRAGMA cache_size = -2000000")
        db.execute("BEGIN")
        for rows in (_certificates, _holders, _lookups, _keys, _revocations, _audit):
            db.executemany(
                "INSERT INTO records (key, revision, value) VALUES (?, ?, ?)",
                ((key, next(revisions), value) for key, value in rows(makeup)),
            )
        # Those that are kept of what was; the newest one says how far the revisions have come.
        db.executemany(
            "INSERT INTO events VALUES (?, 'certificates/seen', ?)",
            ((next(revisions), bytes(EVENT_BYTES)) for _ in range(HISTORY // EVENT_EVERY)),
        )
        db.execute("COMMIT")
    makeup.save(directory)


# One sort after the other, and in the order of keys where that is easy: so a tree grows fast.


def _certificates(makeup: Makeup) -> Iterator[Row]:
    for each in map(makeup.entry, range(makeup.certificates)):
        yield each.key, each.encode()


def _holders(makeup: Makeup) -> Iterator[Row]:
    for first in range(makeup.identities):
        for each in map(makeup.entry, range(first, makeup.certificates, makeup.identities)):
            yield each.holder_key, b""


def _lookups(makeup: Makeup) -> Iterator[Row]:
    for each in map(makeup.entry, range(makeup.certificates)):
        for key in each.keys[1:]:
            yield key, b""


def _keys(makeup: Makeup) -> Iterator[Row]:
    for each in map(makeup.entry, range(makeup.certificates)):
        yield each.use_key, KeyUse(each.identity, each.key).encode()


def _revocations(makeup: Makeup) -> Iterator[Row]:
    at = datetime.fromisoformat(makeup.at)
    for each in map(makeup.entry, range(makeup.certificates - makeup.revoked, makeup.certificates)):
        revoked = RevokedCertificate(
            each.certificate, each.identity, each.not_after, Reason.SUPERSEDED, BY, at
        )
        yield revoked.key, revoked.encode()


def _audit(makeup: Makeup) -> Iterator[Row]:
    head, at = START, datetime.now(UTC)
    for number in range(makeup.entries):
        who = str(_agent(number % makeup.identities))
        detail = {"serial": f"{number:040x}", "fingerprint": f"{number:064x}", "not_after": at.isoformat()}
        entry = Entry.behind(head, Deed("certificate/renewed", who, who, detail=detail), at)
        head = entry.head
        yield entry.key, entry.content
    if makeup.entries:
        yield HEAD, str(head).encode()
