"""Which roots a process takes over from what it is told, and which it does not."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

import pytest
from cryptography.hazmat.primitives import hashes

from parallax.runtime.trust import _is_of_another, accept_bundle
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials
from parallax.security.errors import UntrustedChain, VerificationError
from parallax.security.identity import Identity, Kind
from parallax.security.keys import generate_key, key_id
from parallax.security.profiles import LeafProfile, self_signed_template

NOW: Final = datetime(2026, 6, 1, tzinfo=UTC)
OLD, NEW = (CertificateAuthority.create(now=NOW, name=name) for name in ("Old", "New"))
BOTH: Final = TrustBundle((OLD.certificate, NEW.certificate))
AGENT: Final = Identity("parallax.local", Kind.AGENT, "agent-1")


def credentials(issuer: CertificateAuthority, bundle: TrustBundle) -> Credentials:
    key = generate_key()
    return Credentials(issuer.issue(AGENT, key.public_key(), LeafProfile(), NOW).chain, key, bundle)


def test_the_next_root_is_taken_over_beside_the_one_in_force() -> None:
    before = credentials(OLD, OLD.bundle)
    after = accept_bundle(BOTH, before, AGENT, NOW)
    assert (after.chain, after.key, after.bundle) == (before.chain, before.key, BOTH)


def test_the_old_root_is_given_up_once_the_own_certificate_is_of_the_new_one() -> None:
    assert accept_bundle(NEW.bundle, credentials(NEW, BOTH), AGENT, NOW).bundle == NEW.bundle


def test_a_bundle_of_strangers_is_refused() -> None:
    with pytest.raises(UntrustedChain, match="none of the roots in force"):
        accept_bundle(NEW.bundle, credentials(OLD, OLD.bundle), AGENT, NOW)


def test_a_bundle_that_does_not_vouch_for_the_own_certificate_is_refused() -> None:
    with pytest.raises(VerificationError):
        accept_bundle(NEW.bundle, credentials(OLD, BOTH), AGENT, NOW)


@pytest.mark.parametrize(
    "told", [b"", key_id(OLD.certificate.public_key())], ids=["nobody has to renew", "the own issuer"]
)
def test_a_certificate_of_the_issuer_that_signs_stays(told: bytes) -> None:
    assert not _is_of_another(told, credentials(OLD, BOTH))


@pytest.mark.parametrize(
    "told", [key_id(NEW.certificate.public_key()), b"nonsense"], ids=["another issuer", "nonsense"]
)
def test_a_certificate_of_another_issuer_is_renewed(told: bytes) -> None:
    assert _is_of_another(told, credentials(OLD, BOTH))


def test_a_certificate_that_nobody_issued_is_not_renewed_for_another_root() -> None:
    key = generate_key()
    profile = LeafProfile(sans=())
    template = self_signed_template(AGENT, key.public_key(), profile, NOW, 1)
    own = Credentials((template.sign(key, hashes.SHA256()),), key, OLD.bundle)
    assert not _is_of_another(key_id(NEW.certificate.public_key()), own)
    assert accept_bundle(BOTH, own, AGENT, NOW).bundle == BOTH
