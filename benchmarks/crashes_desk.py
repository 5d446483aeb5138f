"""What of a control plane writes, wired together as its server does it, for `crashes.py`."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Final

from parallax.control_plane.approvals import Approvals
from parallax.control_plane.audit import AuditLog
from parallax.control_plane.audit_pruning import AuditPruner
from parallax.control_plane.audit_reader import AuditReader
from parallax.control_plane.crl import CRLPublisher, Issuers
from parallax.control_plane.enrollment import Enrollment
from parallax.control_plane.grants import Grants
from parallax.control_plane.issuance import Issuance
from parallax.control_plane.issuer import IssuerFiles
from parallax.control_plane.labelling import Labelling
from parallax.control_plane.ledger import KEPT, Ledger
from parallax.control_plane.pins import Pinning
from parallax.control_plane.refusals import Refusals
from parallax.control_plane.revocations import RevocationLog
from parallax.control_plane.roots import Desk as RotationDesk
from parallax.control_plane.roots import Own, Roots
from parallax.control_plane.survey import Survey
from parallax.control_plane.tokens import Tokens
from parallax.runtime.clock import utc_now
from parallax.security import CertificateAuthority, Identity, LeafProfile
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.identity import control_plane
from parallax.security.keys import generate_key

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from parallax.control_plane.engines.engine import Engine
    from parallax.security.crl import RevokedSerial

HOUR: Final = timedelta(hours=1)
LONG_AGO: Final = KEPT + timedelta(days=2)  # what ended then is dropped
MEMBERS: Final = tuple(Identity.parse_short(f"agent/member-{number}") for number in (1, 2))


class Desk:
    """
    All of it on one *engine*; the CA that is rotated lies in *directory*, and the lists of what it revoked.

    Attributes:
        authority: Issues everything but the control plane's own certificate, and is never rotated.
        ended: Tokens and approvals as they were made long ago.
        ahead: How much later it is for pins.
        withdrawn: What the published lists are made of.
    """

    def __init__(self, engine: Engine, directory: Path) -> None:
        self.engine = engine
        self.authority = CertificateAuthority.create(now=utc_now() - 2 * LONG_AGO)
        self.audit = audit = AuditLog(engine, utc_now)
        self.ledger = Ledger(engine, audit, utc_now)
        self.grants = Grants(engine)
        self.revocations = RevocationLog(engine, audit, utc_now, self.grants.end)
        self.labelling = Labelling(self.grants, audit, self.revocations.current)
        self.tokens, self.approvals = Tokens(engine, audit, utc_now), Approvals(engine, audit, HOUR, utc_now)
        self.ended = Tokens(engine, audit, _long_ago), Approvals(engine, audit, HOUR, _long_ago)
        self.ahead = timedelta(0)
        self.pinning = Pinning(
            engine,
            audit,
            self.ledger,
            _own_store(self.authority),
            timedelta(0),
            lambda: utc_now() + self.ahead,
        )
        self.enrollment = Enrollment(
            self.tokens,
            self.approvals,
            Issuance(lambda: self.authority, lambda: self.authority.bundle, self.ledger.record, utc_now),
            self.ledger,
            self.grants,
            self.pinning,
            audit,
            self.revocations.current,
            utc_now,
        )
        self.ledger.follow(self.pinning.note)
        self.refusals = Refusals(audit, utc_now)
        reader = AuditReader(engine)
        begun = utc_now()  # what was told before that, somebody has read
        self.pruner = AuditPruner(audit, reader, timedelta(0), str(control_plane()), lambda: begun)
        issuer = IssuerFiles(directory / "certs")
        self.withdrawn: dict[int, RevokedSerial] = {}
        self.crls = CRLPublisher(
            engine, directory / "crl", Issuers(issuer.current, list), self._withdrawn, utc_now, HOUR
        )
        self.roots = self._rotated(directory / "certs", issuer)

    async def load(self) -> None:
        """Read what others have written before."""
        await self.revocations.load()
        await self.roots.load()
        await self.crls.load()
        await self.pinning.load()
        await self.grants.load()

    def _rotated(self, certs_dir: Path, issuer: IssuerFiles) -> Roots:
        """What takes the CA in *certs_dir* to the next one, as soon as all `MEMBERS` trust that."""
        store = _own_store(issuer.current())
        issuance = Issuance(issuer.current, lambda: store.current.bundle, self.ledger.record, utc_now)

        async def keep(new: Credentials, _: Credentials) -> None:
            store.publish(new, utc_now())

        async def survey() -> Survey:
            return Survey(utc_now())

        desk = RotationDesk(
            certs_dir, issuer, issuance, survey, lambda: 0, lambda: frozenset(MEMBERS), utc_now
        )
        return Roots(self.engine, self.audit, desk, [Own(store, keep)])

    async def _withdrawn(self, _: bytes, __: object) -> dict[int, RevokedSerial]:
        return dict(self.withdrawn)


def _own_store(authority: CertificateAuthority) -> CredentialStore:
    """The control plane's own certificate, of that CA."""
    now, key = utc_now(), generate_key()
    issued = authority.issue(control_plane(), key.public_key(), LeafProfile(), now)
    return CredentialStore(control_plane(), Credentials(issued.chain, key, issued.bundle), now)


def _long_ago() -> datetime:
    return utc_now() - LONG_AGO
