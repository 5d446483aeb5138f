"""What survives: the engine, and whatever is written in it wherever the control plane runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from parallax.control_plane.audit import AuditLog
from parallax.control_plane.audit_pruning import AuditPruner
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.grants import Grants
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.refusals import Refusals
from parallax.control_plane.revocations import RevocationLog
from parallax.control_plane.revoked import Revoked, RevokedIdentity
from parallax.control_plane.survey import Surveyor
from parallax.runtime.caller import current_source
from parallax.runtime.clock import utc_now

if TYPE_CHECKING:
    from parallax.control_plane.supervision import Loop
    from parallax.runtime.settings import Settings


@dataclass(frozen=True, slots=True)
class Records:
    """What is known beyond a restart. It is there once `engine` was entered, and after `load`."""

    engine: SqliteEngine
    audit: AuditLog
    reader: AuditReader
    pruner: AuditPruner
    refusals: Refusals
    ledger: Ledger
    surveyor: Surveyor
    grants: Grants
    revocations: RevocationLog

    @classmethod
    def new(cls, settings: Settings, by: str, on_deferred: Callable[[], None]) -> Self:
        """
        Those in the directory that is set.

        Args:
            by: Who prunes the audit log.
            on_deferred: See `Ledger`.
        """
        engine = SqliteEngine(settings.data_dir)
        audit = AuditLog(engine, utc_now, current_source)
        reader = AuditReader(engine)
        ledger = Ledger(engine, audit, utc_now, on_deferred)
        grants = Grants(engine)
        revocations = RevocationLog(engine, audit, utc_now, grants.end)

        def revoked(entry: Revoked) -> None:
            if isinstance(entry, RevokedIdentity):
                grants.ended(entry.identity)

        revocations.follow(revoked)
        return cls(
            engine,
            audit,
            reader,
            AuditPruner(audit, reader, settings.audit_kept, by, utc_now),
            Refusals(audit, utc_now),
            ledger,
            Surveyor(ledger, utc_now),
            grants,
            revocations,
        )

    @property
    def loops(self) -> tuple[Loop, ...]:
        """What writes, counts and prunes, until cancelled."""
        return (self.ledger.run, self.refusals.run, self.pruner.run, self.revocations.run, self.surveyor.run)

    async def load(self) -> None:
        """Read what has to be in mind before anybody is let in; raises StorageFailed."""
        await self.revocations.load()
        await self.grants.load()
