"""How long is waited before a peer is dialled again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from parallax.runtime.backoff import FIRST_S, LONGEST_S, MOVE_WITHIN_S, backoff_s, move_after_s
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials
from parallax.security.identity import Identity
from parallax.security.keys import generate_key
from parallax.security.profiles import LeafProfile

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def authority() -> CertificateAuthority:
    return CertificateAuthority.create(now=NOW)


def issue(authority: CertificateAuthority) -> Credentials:
    key, profile = generate_key(), LeafProfile(lifetime=DAY)
    issued = authority.issue(Identity.parse_short("client/cli"), key.public_key(), profile, NOW)
    return Credentials(issued.chain, key, issued.bundle)


def test_attempts_come_ever_more_rarely_up_to_a_limit() -> None:
    assert (backoff_s(0, 0.0), backoff_s(0, 1.0)) == (FIRST_S / 2, FIRST_S)
    assert [backoff_s(attempt, 1.0) for attempt in (1, 2, 1_000_000)] == [2 * FIRST_S, 4 * FIRST_S, LONGEST_S]


@pytest.mark.parametrize("attempt", range(20))
def test_a_peer_that_was_away_is_found_soon_after_its_return(attempt: int) -> None:
    """At worst it returns right after an attempt, all pauses before were short, and this one is long."""
    away_s = sum(backoff_s(before, 0.0) for before in range(attempt))
    assert backoff_s(attempt, 1.0) <= min(2 * away_s + FIRST_S, 10) * (1 + 1e-9)


def test_connections_change_credentials_one_after_the_other(authority: CertificateAuthority) -> None:
    old, new = issue(authority), issue(authority)
    assert [move_after_s(old, new, NOW, spread) for spread in (0.0, 0.5, 1.0)] == [
        0.0,
        MOVE_WITHIN_S / 2,
        MOVE_WITHIN_S,
    ]


def test_a_certificate_that_ends_soon_or_has_ended_is_left_at_once(authority: CertificateAuthority) -> None:
    old, new = issue(authority), issue(authority)
    for left in (timedelta(seconds=5), timedelta(), -DAY):
        assert move_after_s(old, new, NOW + DAY - left, 1.0) == 0.0
    assert move_after_s(old, new, NOW + DAY - timedelta(seconds=6), 1.0) == MOVE_WITHIN_S


def test_where_a_root_was_taken_out_nothing_is_put_off(authority: CertificateAuthority) -> None:
    old = issue(authority)
    other = CertificateAuthority.create(now=NOW)
    both = Credentials(old.chain, old.key, TrustBundle((*old.bundle.roots, *other.bundle.roots)))
    assert move_after_s(both, old, NOW, 1.0) == 0.0
    assert move_after_s(old, both, NOW, 1.0) == MOVE_WITHIN_S  # one that was added can wait


def test_where_another_ca_issues_nothing_is_put_off(authority: CertificateAuthority) -> None:
    """In a rotation of the root the old one goes once the new certificate is seen, on whatever connection."""
    other = CertificateAuthority.create(now=NOW)
    both = TrustBundle((*authority.bundle.roots, *other.bundle.roots))
    old, new = (issue(CertificateAuthority(ca.certificate, ca.key, both)) for ca in (authority, other))
    assert old.leaf.issuer == new.leaf.issuer  # by name
    assert move_after_s(old, new, NOW, 1.0) == 0.0


def test_in_plaintext_there_is_nothing_to_wait_for() -> None:
    assert move_after_s(None, None, NOW, 1.0) == 0.0
