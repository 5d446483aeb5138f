"""What lists are made of: all that is revoked, and what a change of it adds."""

from __future__ import annotations

import random
from contextlib import suppress
from datetime import timedelta
from typing import Final

import pytest
from cryptography.x509 import ReasonFlags

from parallax.control_plane.audit import AuditLog
from parallax.control_plane.crl_entries import CRLEntries
from parallax.control_plane.engines.sqlite import SqliteEngine
from parallax.control_plane.ledger import Ledger
from parallax.control_plane.revocations import RevocationLog
from parallax.control_plane.revoked import Revoked, RevokedCertificate, RevokedIdentity
from parallax.security.authority import CertificateAuthority
from parallax.security.errors import InvalidTransition
from parallax.security.identity import Identity
from parallax.security.keys import generate_key, key_id
from parallax.security.profiles import LeafProfile
from parallax.security.revocation import Reason
from tests.control_plane.clock import NOW, Clock

ADMIN: Final = "spiffe://parallax.local/client/admin"
HOLDERS: Final = [Identity.parse_short(f"agent/{name}") for name in ("a", "b")]
CAS: Final = [CertificateAuthority.create(now=NOW) for _ in range(2)]
ISSUERS: Final = [key_id(ca.certificate.public_key()) for ca in CAS]


class Desk:
    """A ledger, what is revoked in it, and a reader of lists."""

    def __init__(self, engine: SqliteEngine) -> None:
        self.clock = Clock()
        audit = AuditLog(engine, self.clock)
        self.ledger = Ledger(engine, audit, self.clock)
        self.log = RevocationLog(engine, audit, self.clock)
        self.entries = CRLEntries(self.log, self.ledger)
        self.changes: list[Revoked] = []
        self.log.follow(self.changes.append)

    async def issue(self, holder: Identity, ca: CertificateAuthority) -> None:
        """Enter a certificate."""
        leaf = ca.issue(holder, generate_key().public_key(), LeafProfile(), self.clock.now).chain[0]
        await self.ledger.record(leaf, holder, ca.certificate, ADMIN)

    async def revoke(self, entry: Revoked) -> None:
        """Have *entry* in force."""
        await self.log.revoke(entry)


async def test_one_that_is_revoked_by_itself_is_listed_for_its_own_reason(engine: SqliteEngine) -> None:
    """Whichever of both comes first."""
    desk = Desk(engine)
    for holder, is_first in zip(HOLDERS, (True, False), strict=True):
        await desk.issue(holder, CAS[0])
        (held,) = await desk.ledger.held(holder)
        alone = RevokedCertificate(
            held.certificate, holder, held.not_after, Reason.KEY_COMPROMISE, ADMIN, desk.clock.now
        )
        with_holder = RevokedIdentity(holder, Reason.CESSATION_OF_OPERATION, ADMIN, desk.clock.now)
        for each in (alone, with_holder) if is_first else (with_holder, alone):
            await desk.revoke(each)
    listed = await desk.entries.of(ISSUERS[0])
    assert [each.reason for each in listed.values()] == [ReasonFlags.key_compromise] * 2


@pytest.mark.parametrize("seed", range(3))
async def test_changes_add_up_to_what_is_found_when_all_is_read(engine: SqliteEngine, seed: int) -> None:
    chance, desk = random.Random(seed), Desk(engine)  # noqa: S311 - so that it can be seen again
    listed = [await desk.entries.of(issuer) for issuer in ISSUERS]
    for _ in range(60):
        holder, desk.clock.now = chance.choice(HOLDERS), desk.clock.now + timedelta(seconds=2)
        match chance.randrange(5):
            case 0 | 1 if not desk.log.current.is_withdrawn(holder):  # one that turns up then is no change
                await desk.issue(holder, chance.choice(CAS))
            case 2:
                reason = chance.choice(list(Reason))
                await desk.revoke(RevokedIdentity(holder, reason, ADMIN, desk.clock.now))
            case 3:
                if held := await desk.ledger.held(holder):
                    one, reason = chance.choice(held), chance.choice(list(Reason))
                    at = desk.clock.now
                    await desk.revoke(
                        RevokedCertificate(one.certificate, holder, one.not_after, reason, ADMIN, at)
                    )
            case _:
                with suppress(InvalidTransition):  # it is not revoked
                    await desk.log.reinstate(holder, ADMIN)
        if chance.random() < 0.5:  # else several changes are looked at together
            changes, desk.changes[:] = list(desk.changes), []
            for number, issuer in enumerate(ISSUERS):
                listed[number] = {**listed[number], **await desk.entries.of(issuer, changes)}
                assert listed[number] == await desk.entries.of(issuer)
    assert all(listed)
