"""The issuer: a CA's key and certificate, and what they sign."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from parallax.security.bundle import TrustBundle
from parallax.security.certificate import check_ca, check_validity, subject_of
from parallax.security.errors import ConfigError, Expired, VerificationError, WrongIdentity
from parallax.security.keys import KeyType, PrivateKey, PublicKey, check_strength, fits, generate_key
from parallax.security.profiles import ROOT_LIFETIME, ROOT_NAME, LeafProfile, leaf_template, root_template
from parallax.security.verification import Usage, authenticate

if TYPE_CHECKING:
    from datetime import datetime, timedelta

    from parallax.security.identity import Identity


@dataclass(frozen=True, slots=True)
class Issued:
    """
    What the issuer hands out; it holds no key.

    Attributes:
        chain: Leaf first, then the intermediates; no root.
        bundle: The roots the holder is to trust.
    """

    chain: tuple[x509.Certificate, ...]
    bundle: TrustBundle


@dataclass(frozen=True, slots=True)
class CertificateAuthority:
    """
    A CA that can sign: a root of *bundle*, or an intermediate below one.

    Attributes:
        certificate: Of *key*.
        bundle: What holders of its leaves are to trust.
        intermediates: Those between *certificate* and a root; none for a root and for the usual intermediate.

    Raises:
        ConfigError: The certificate is not a CA's, its key is too weak, or *key* does not fit it;
            the text is the cause alone. Validity depends on the time: see `check_usable`.
    """

    certificate: x509.Certificate
    key: PrivateKey = field(repr=False)
    bundle: TrustBundle
    intermediates: tuple[x509.Certificate, ...] = ()

    def __post_init__(self) -> None:
        try:
            check_ca(self.certificate)
            check_strength(self.key.public_key())
        except VerificationError as exc:
            raise ConfigError(f"{subject_of(self.certificate)} cannot issue: {exc}") from exc
        if not fits(self.key, self.certificate):
            raise ConfigError(f"the key is not that of the CA certificate {subject_of(self.certificate)}")

    @classmethod
    def create(
        cls,
        *,
        now: datetime,
        key_type: KeyType = KeyType.P256,
        lifetime: timedelta = ROOT_LIFETIME,
        name: str = ROOT_NAME,
    ) -> CertificateAuthority:
        """A new self-signed root with a new key."""
        key = generate_key(key_type)
        serial = x509.random_serial_number()
        template = root_template(key.public_key(), now, serial, name=name, lifetime=lifetime)
        root = template.sign(key, hashes.SHA256())
        return cls(root, key, TrustBundle((root,)))

    def check_usable(self, now: datetime) -> None:
        """
        Pass if it may issue at *now*.

        Raises:
            Expired: The CA certificate is not within its validity.
        """
        try:
            check_validity(self.certificate, now)
        except Expired as exc:
            raise Expired(f"the CA certificate {subject_of(self.certificate)} cannot issue: {exc}") from exc

    def issue(self, identity: Identity, public_key: PublicKey, profile: LeafProfile, now: datetime) -> Issued:
        """
        A leaf of *identity* for the holder of *public_key*: template, sign, check what was issued.

        Whether the holder may have that identity, and has the private key, is for the caller to know.

        Raises:
            Expired: The CA is not within its validity.
            IdentityError: A requested SAN is none, or spells somebody else.
            VerificationError: The public key is too weak, or peers would refuse the leaf: for
                instance because this CA is not below its own bundle.
        """
        self.check_usable(now)
        check_strength(public_key)
        serial = x509.random_serial_number()
        template = leaf_template(identity, public_key, self.certificate, profile, now, serial)
        leaf = template.sign(self.key, hashes.SHA256())
        issued = Issued((leaf, *self._above_leaf), self.bundle)
        peer = authenticate(issued.chain, issued.bundle, identity.trust_domain, now, *Usage)
        if peer.identity != identity:
            raise WrongIdentity(f"issued for {identity}, but it reads as {peer.identity}")
        return issued

    @property
    def _above_leaf(self) -> tuple[x509.Certificate, ...]:
        """What a leaf's holder presents beside it: nothing below a root, which peers have."""
        return () if self.certificate in self.bundle.roots else (self.certificate, *self.intermediates)
