"""What there is to do only where both ends prove who they are: let in, roll over, and withdraw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from parallax.control_plane.approvals import Approvals
from parallax.control_plane.crl import FOLDER, CRLPublisher
from parallax.control_plane.crl_entries import CRLEntries
from parallax.control_plane.enrollment import Enrollment
from parallax.control_plane.pins import Pinning
from parallax.control_plane.roots import Desk, Roots
from parallax.control_plane.tokens import Tokens
from parallax.runtime.clock import utc_now

if TYPE_CHECKING:
    from parallax.control_plane.issuing import Issuing
    from parallax.control_plane.own_identities import OwnIdentities
    from parallax.control_plane.records import Records
    from parallax.control_plane.supervision import Loop
    from parallax.control_plane.survey import Survey
    from parallax.runtime.settings import Settings
    from parallax.security.credentials import CredentialStore
    from parallax.security.identity import Identity


@dataclass(frozen=True, slots=True)
class MutualTrust:
    """
    How identities come to be trusted, and how they cease to be.

    Args:
        pinning: Keeps the certificates that are let in though nobody issued them.
        enrollment: Gives who has none the first.
        roots: Rotates the root that the fleet trusts.
        crls: Publishes who is revoked.
    """

    pinning: Pinning
    enrollment: Enrollment
    roots: Roots
    crls: CRLPublisher

    @classmethod
    def new(
        cls,
        settings: Settings,
        own: OwnIdentities,
        records: Records,
        issuing: Issuing,
        live: Callable[[], frozenset[Identity]],
        administers: Callable[[Identity], bool],
    ) -> Self:
        """
        For the fleet that *own* are of.

        Args:
            live: Who is connected, or registered.
            administers: Whether a name is one that the policy lets administer.
        """
        store = own.provider.store
        assert store is not None, "nobody is authenticated in plaintext"  # noqa: S101
        pinning = _pinning(settings, store, records)
        return cls(
            pinning,
            _enrollment(settings, records, issuing, pinning, administers),
            _roots(own, records, issuing, live),
            _crls(settings, records, issuing),
        )

    @property
    def loops(self) -> tuple[Loop, ...]:
        """What keeps all of it going, until cancelled."""
        return (self.enrollment.run, self.roots.run, self.crls.run, self.pinning.run)

    async def load(self) -> None:
        """Take up what was under way, which must be before anybody is let in; raises StorageFailed."""
        await self.roots.load()
        await self.crls.load()
        await self.pinning.load()


def _pinning(settings: Settings, store: CredentialStore, records: Records) -> Pinning:
    check_revoked = records.revocations.current.check
    ledger = records.ledger
    pinning = Pinning(records.engine, records.audit, ledger, store, settings.drain, utc_now, check_revoked)
    ledger.follow(pinning.note)
    return pinning


def _enrollment(
    settings: Settings,
    records: Records,
    issuing: Issuing,
    pinning: Pinning,
    administers: Callable[[Identity], bool],
) -> Enrollment:
    return Enrollment(
        Tokens(records.engine, records.audit, utc_now),
        Approvals(records.engine, records.audit, settings.approval, utc_now),
        issuing.issuance,
        records.ledger,
        records.grants,
        pinning,
        records.audit,
        records.revocations.current,
        utc_now,
        administers,
    )


def _roots(
    own: OwnIdentities, records: Records, issuing: Issuing, live: Callable[[], frozenset[Identity]]
) -> Roots:
    async def survey() -> Survey:
        """Of those who can follow: whoever is revoked never will."""
        return (await records.surveyor.current()).without(records.revocations.current.withdrawn())

    desk = Desk(
        issuing.certs_dir, issuing.files, issuing.issuance, survey, lambda: len(records.ledger), live, utc_now
    )
    return Roots(records.engine, records.audit, desk, own.certified)


def _crls(settings: Settings, records: Records, issuing: Issuing) -> CRLPublisher:
    crls = CRLPublisher(
        records.engine,
        settings.data_dir / FOLDER,
        issuing.issuers,
        CRLEntries(records.revocations, records.ledger).of,
        utc_now,
        settings.crl_lifetime,
    )
    revoked = records.revocations.current
    records.revocations.follow(crls.note)
    records.ledger.follow(lambda entry: crls.note() if entry.is_revoked(revoked) else None)
    return crls
