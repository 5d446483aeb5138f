"""What the gate's authenticator says of the leaves that it verifies."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate, load_der_x509_certificate
from cryptography.x509.oid import NameOID

from parallax.runtime.authenticator import MAX_COPIES, Authenticator
from parallax.sdk.testing import LIFETIME, ThrowawayPKI
from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle
from parallax.security.credentials import Credentials, CredentialStore
from parallax.security.errors import Expired, Revoked, UntrustedChain, VerificationError
from parallax.security.identity import Identity
from parallax.security.keys import PrivateKey, generate_key
from parallax.security.pinned import NO_PINS, Pin, Pins
from parallax.security.profiles import LeafProfile
from parallax.security.provider import MTLSCredentialsProvider
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.verification import Peer


class Connection:
    """A call's context, as far as who calls is concerned."""

    def __init__(self, pem: str | None) -> None:
        self._pem = pem

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem.encode()]} if self._pem else {}


class World:
    """An authenticator, and whom it told of."""

    def __init__(self) -> None:
        self.pki = ThrowawayPKI()
        provider = MTLSCredentialsProvider(
            self.pki.issue("service/control-plane"), identity=Identity.parse_short("service/control-plane")
        )
        assert isinstance(provider.store, CredentialStore)
        self.store = provider.store
        self.told: list[tuple[Peer, Certificate]] = []
        self.takes = True
        self.now = datetime.now(UTC)
        self.revocations = Revocations()
        self.authenticator = Authenticator(
            self.store, self.pki.trust_domain, lambda: self.now, self._note, self.revocations.check
        )

    def call(self, pem: str | None) -> Peer:
        connection: Any = Connection(pem)
        peer = self.authenticator.authenticate(connection)
        assert isinstance(peer, Peer)
        self.authenticator.check(peer)
        return peer

    def trust(self, *roots: Certificate) -> None:
        """Have the server's own certificate replaced, and *roots* come with it."""
        bundle = TrustBundle(roots)
        ca, identity = self.pki.authority, self.store.identity
        key, issuer = generate_key(), CertificateAuthority(ca.certificate, ca.key, bundle)
        issued = issuer.issue(identity, key.public_key(), LeafProfile(LIFETIME), self.now)
        self.store.publish(Credentials(issued.chain, key, bundle), self.now)

    def _note(self, peer: Peer, leaf: Certificate) -> bool:
        self.told.append((peer, leaf))
        return self.takes


@pytest.fixture
def world() -> World:
    return World()


def self_signed(name: str, key: PrivateKey, signer: PrivateKey | None = None) -> Certificate:
    """What a device makes; or, with a *signer* of the same name, has made."""
    subject, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(signer or key, hashes.SHA256())
    )


def pem_of(leaf: Certificate) -> str:
    return leaf.public_bytes(Encoding.PEM).decode()


def reread(certificate: Certificate) -> Certificate:
    """The same, as another object: what a file holds is read anew."""
    return load_der_x509_certificate(certificate.public_bytes(Encoding.DER))


def test_each_leaf_is_told_once(world: World) -> None:
    first, second = (world.pki.issue(f"agent/agent-{number}").cert_pem for number in (1, 2))
    for _ in range(3):
        world.call(first)
        world.call(second)
    assert [peer.identity.name for peer, _ in world.told] == ["agent-1", "agent-2"]
    assert [leaf.serial_number for _, leaf in world.told] == [peer.serial for peer, _ in world.told]


def test_a_leaf_that_was_not_taken_is_told_again(world: World) -> None:
    pem = world.pki.issue("agent/agent-1").cert_pem
    world.takes = False
    assert [world.call(pem).identity.name for _ in range(3)] == ["agent-1"] * 3
    assert len(world.told) == 3
    world.takes = True
    for _ in range(3):
        world.call(pem)
    assert len(world.told) == 4


def test_what_is_refused_is_not_told(world: World) -> None:
    with pytest.raises(VerificationError):
        world.call(world.pki.foreign("agent/agent-1").cert_pem)
    with pytest.raises(Expired):
        world.call(world.pki.expired("agent/agent-1").cert_pem)
    with pytest.raises(VerificationError):
        world.call(None)
    assert world.told == []


def test_a_known_leaf_that_expires_is_refused_and_not_told_again(world: World) -> None:
    pem = world.pki.issue("agent/agent-1", lifetime=timedelta(minutes=1)).cert_pem
    world.call(pem)
    world.now += timedelta(minutes=2)
    with pytest.raises(Expired):
        world.call(pem)
    assert len(world.told) == 1


def test_a_leaf_that_is_revoked_is_refused_and_told_once_as_any_other(world: World) -> None:
    """Known or not: whoever lists what is revoked has to hear of it."""
    known, other = (world.pki.issue("agent/agent-1").cert_pem for _ in range(2))
    peer = world.call(known)
    world.revocations.cut(peer.identity, WITHDRAWN)
    for pem in (known, other, other):
        with pytest.raises(Revoked):
            world.call(pem)
    assert len(world.told) == 2


def test_an_identity_that_renews_for_ever_is_not_remembered_for_ever(world: World) -> None:
    other = world.pki.issue("agent/agent-2").cert_pem
    pems = [world.pki.issue("agent/agent-1").cert_pem for _ in range(MAX_COPIES + 1)]
    for pem in (other, *pems, *pems[1:], other):
        world.call(pem)
    assert len(world.told) == MAX_COPIES + 2
    world.call(pems[0])
    assert len(world.told) == MAX_COPIES + 3


def test_a_leaf_stays_known_when_only_our_own_certificate_changes(world: World) -> None:
    pem, before = world.pki.issue("agent/agent-1").cert_pem, world.store.current
    world.call(pem)
    world.trust(reread(world.pki.authority.certificate))
    world.call(pem)
    assert world.store.current.leaf != before.leaf
    assert world.store.current.bundle is not before.bundle
    assert len(world.told) == 1


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_every_leaf_is_verified_again_when_the_roots_change(world: World, before: int, after: int) -> None:
    pem = world.pki.issue("agent/agent-1").cert_pem
    roots = world.pki.authority.certificate, ThrowawayPKI().authority.certificate
    for number in (before, after):
        world.trust(*roots[:number])
        world.call(pem)
    assert len(world.told) == 2


def test_a_known_leaf_is_refused_at_once_when_its_root_is_taken_out(world: World) -> None:
    stranger = ThrowawayPKI()
    pem, ours = stranger.issue("agent/agent-1").cert_pem, world.pki.authority.certificate
    world.trust(ours, stranger.authority.certificate)
    world.call(pem)
    for _ in range(2):  # nor does the next rotation bring it back
        world.trust(ours)
        with pytest.raises(UntrustedChain):
            world.call(pem)


def test_a_pinned_certificate_is_known_until_its_pin_is_taken_out(world: World) -> None:
    device = self_signed("07048933", generate_key())
    pin = Pin(Identity.parse_short("agent/07048933"), device)
    world.store.pin(Pins((pin,)))
    for _ in range(2):
        assert world.call(pem_of(device)).identity == pin.identity
    assert len(world.told) == 1
    world.store.pin(NO_PINS)
    with pytest.raises(Revoked):
        world.call(pem_of(device))


def test_what_a_pinned_key_signs_is_refused_whatever_it_is_called(world: World) -> None:
    key = generate_key()
    device = self_signed("07048933", key)
    world.store.pin(Pins((Pin(Identity.parse_short("agent/07048933"), device),)))
    for name in ("07048933", "agent-1", "control-plane.parallax.local"):
        for child in (self_signed(name, key), self_signed(name, generate_key(), key)):
            with pytest.raises(VerificationError):
                world.call(pem_of(child))
