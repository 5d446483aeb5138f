"""What is revoked: which certificates are meant, and which are not."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from parallax.security.authority import CertificateAuthority
from parallax.security.errors import Revoked
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.profiles import LeafProfile, issued_at
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.verification import CertificateId, Peer, authenticate

if TYPE_CHECKING:
    from parallax.security.bundle import TrustBundle
    from tests.security.conftest import Forge

DOMAIN = "parallax.local"
SECOND, DAY = timedelta(seconds=1), timedelta(days=1)
AGENT_1, AGENT_2 = (Identity.parse_short(f"agent/agent-{number}") for number in (1, 2))


def peer_of(
    authority: CertificateAuthority, now: datetime, identity: Identity = AGENT_1, lifetime: timedelta = DAY
) -> Peer:
    """Who shows a leaf issued *now*."""
    issued = authority.issue(identity, generate_key().public_key(), LeafProfile(lifetime), now)
    return authenticate(issued.chain, authority.bundle, DOMAIN, now)


def certificate(peer: Peer) -> CertificateId:
    return CertificateId(peer.issuer_key, peer.serial)


@pytest.fixture(scope="module")
def elder(now: datetime) -> CertificateAuthority:
    """A CA that is a day old."""
    return CertificateAuthority.create(now=now - DAY)


@pytest.fixture
def revocations() -> Revocations:
    return Revocations()


def test_a_certificate_is_revoked_and_no_other_of_its_holder(
    revocations: Revocations, elder: CertificateAuthority, now: datetime
) -> None:
    revoked, other = (peer_of(elder, now) for _ in range(2))
    revocations.revoke(certificate(revoked))
    with pytest.raises(Revoked, match="have another one issued"):
        revocations.check(revoked)
    revocations.check(other)
    revocations.check_identity(AGENT_1)


def test_the_same_serial_of_another_issuer_is_not_meant(
    revocations: Revocations, elder: CertificateAuthority, now: datetime
) -> None:
    peer = peer_of(elder, now)
    revocations.revoke(CertificateId(bytes(32), peer.serial))
    revocations.check(peer)


def test_what_is_below_a_revoked_ca_is_refused_and_what_is_below_its_sister_is_not(
    revocations: Revocations, forge: Forge, bundle: TrustBundle, now: datetime
) -> None:
    revoked, sister = (forge.authority(f"Intermediate {number}", issuer=forge.root) for number in (1, 2))
    peers = [
        authenticate([forge(issuer=each).certificate, each.certificate], bundle, DOMAIN, now)
        for each in (revoked, sister)
    ]
    [above] = peers[0].above
    assert above.serial == revoked.certificate.serial_number
    revocations.revoke(above)
    with pytest.raises(Revoked, match="CA certificate"):
        revocations.check(peers[0])
    revocations.check(peers[1])


def test_of_a_withdrawn_identity_nothing_is_good_and_of_others_everything(
    revocations: Revocations, elder: CertificateAuthority, now: datetime
) -> None:
    revocations.cut(AGENT_1, WITHDRAWN)
    for issued in (now - timedelta(hours=1), now):
        with pytest.raises(Revoked, match="parallax certs reinstate agent/agent-1"):
            revocations.check(peer_of(elder, issued))
    with pytest.raises(Revoked):
        revocations.check_identity(AGENT_1)
    revocations.check(peer_of(elder, now, AGENT_2))
    revocations.check_identity(AGENT_2)


@pytest.mark.parametrize("lifetime", [timedelta(minutes=1), timedelta(hours=1), timedelta(days=365)])
def test_after_reinstatement_what_was_issued_before_stays_revoked_and_the_next_is_good_at_once(
    revocations: Revocations, elder: CertificateAuthority, now: datetime, lifetime: timedelta
) -> None:
    """Ours are backdated by up to five minutes, by less if they are short: it does not count."""
    before, after = (peer_of(elder, when, lifetime=lifetime) for when in (now - SECOND, now))
    revocations.cut(AGENT_1, WITHDRAWN)
    revocations.cut(AGENT_1, now)
    with pytest.raises(Revoked, match=r"before .* was reinstated"):
        revocations.check(before)
    revocations.check(after)
    revocations.check_identity(AGENT_1)


def test_a_certificate_made_with_openssl_counts_from_its_beginning(
    revocations: Revocations, forge: Forge, bundle: TrustBundle, now: datetime
) -> None:
    """It is not backdated: it would otherwise pass for younger than it is."""
    before, after = (
        authenticate([forge(uris=(), not_before=age).certificate], bundle, DOMAIN, now)
        for age in (-SECOND, timedelta(0))
    )
    revocations.cut(AGENT_1, now)
    with pytest.raises(Revoked):
        revocations.check(before)
    revocations.check(after)


def test_ours_are_issued_when_they_are_made(elder: CertificateAuthority, now: datetime) -> None:
    for lifetime in (timedelta(seconds=30), timedelta(minutes=50), timedelta(days=30)):
        issued = elder.issue(AGENT_1, generate_key().public_key(), LeafProfile(lifetime), now)
        assert issued_at(issued.chain[0]) == now


def test_forgotten_is_only_what_is_named(
    revocations: Revocations, elder: CertificateAuthority, now: datetime
) -> None:
    first, second = (peer_of(elder, now) for _ in range(2))
    for each in (first, second, first):
        revocations.revoke(certificate(each))
    assert len(revocations) == 2
    revocations.forget(certificate(first))
    revocations.forget(certificate(first))
    revocations.forget(CertificateId(bytes(32), 1))
    assert len(revocations) == 1
    revocations.check(first)
    with pytest.raises(Revoked):
        revocations.check(second)


def test_every_change_has_its_version(revocations: Revocations) -> None:
    one, versions = CertificateId(bytes(32), 1), [revocations.version]
    revocations.revoke(one)
    versions.append(revocations.version)
    revocations.cut(AGENT_1, WITHDRAWN)
    versions.append(revocations.version)
    revocations.forget(one)
    versions.append(revocations.version)
    assert versions == sorted(set(versions))


def test_it_tells_all_that_it_holds(revocations: Revocations, now: datetime) -> None:
    a, b = bytes(32), bytes([1]) * 32
    for each in (CertificateId(a, 1), CertificateId(a, 2), CertificateId(b, 1)):
        revocations.revoke(each)
    revocations.cut(AGENT_1, WITHDRAWN)
    revocations.cut(AGENT_2, now)
    told = {issuer: sorted(serials) for issuer, serials in revocations.certificates()}
    assert told == {a: [1, 2], b: [1]}
    assert dict(revocations.identities()) == {AGENT_1: WITHDRAWN, AGENT_2: now}
    assert len(revocations) == 5


def test_it_may_change_while_it_is_told(revocations: Revocations) -> None:
    """Whoever is told reads slowly, and nobody waits for him."""
    for serial in range(1, 1_001):
        revocations.revoke(CertificateId(bytes(32), serial))
    told = set[int]()
    for _, serials in revocations.certificates():
        for number, serial in enumerate(serials):
            revocations.revoke(CertificateId(bytes(32), 10_000 + number))
            revocations.revoke(CertificateId(bytes([number % 256]) * 32, 1))
            told.add(serial)
    assert told >= set(range(1, 1_001))
