"""Who is at the other end, proved by certificates."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parallax.security.certificate import (
    MALFORMED,
    check_extended_usage,
    check_validity,
    find_extension,
)
from parallax.security.errors import IdentityError, UntrustedChain, WrongIdentity
from parallax.security.identity import Identity, Kind, check_name, clip, fold_dns
from parallax.security.keys import check_strength, key_id
from parallax.security.path import find_path
from parallax.security.profiles import issued_at

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from parallax.security.bundle import TrustBundle


class Usage(StrEnum):
    """Which end of the connection the certificate stands for."""

    CLIENT = "client"
    SERVER = "server"

    @property
    def oid(self) -> x509.ObjectIdentifier:
        """The extended key usage that this end needs (RFC 5280 §4.2.1.12)."""
        return ExtendedKeyUsageOID.CLIENT_AUTH if self is Usage.CLIENT else ExtendedKeyUsageOID.SERVER_AUTH


class CertificateId(NamedTuple):
    """
    What no two certificates share (RFC 5280 §4.1.2.2), and no holder can change.

    Args:
        issuer: The `key_id` of who signed it, 32 bytes.
    """

    issuer: bytes
    serial: int


@dataclass(frozen=True, slots=True)
class Peer:
    """
    The authenticated other end of a connection; made by `authenticate` and `authenticate_pinned` alone.

    Attributes:
        identity: Who it is.
        serial: The leaf's.
        fingerprint: SHA-256 of the leaf's DER, 32 bytes. Good to admit by, not to refuse by: its
            holder can encode the signature in other ways that verify too.
        not_after: When the proof ends: the earliest end of validity on the path, as a rule the leaf's.
        issuer_key: Who signed the leaf: the `key_id` of that CA's key, 32 bytes; of its own, if it is pinned.
        issued_at: When the leaf was made, see `profiles.issued_at`.
        above: The certificates of the CAs between the leaf and the root, if there are any.
    """

    identity: Identity
    serial: int
    fingerprint: bytes
    not_after: datetime
    issuer_key: bytes
    issued_at: datetime
    above: tuple[CertificateId, ...]


def authenticate(
    chain: Sequence[x509.Certificate],
    bundle: TrustBundle,
    trust_domain: str,
    now: datetime,
    usage: Usage = Usage.CLIENT,
    *also: Usage,
) -> Peer:
    """
    Who presents *chain*.

    Checks the leaf (validity, key, usage), its path to *bundle* (RFC 5280 §6), then what it names.
    Possession of the private key is for the TLS handshake to prove. What the peer may do is not
    decided here.

    Args:
        chain: Leaf first, then intermediates in any order (RFC 8446 §4.4.2).
        now: Aware UTC. Validity includes both its ends.
        usage, also: The end that the peer stands for, not ours; or both, and one path must do for both.

    Raises:
        VerificationError: It must not be trusted: `Expired`, `UntrustedChain`, or the key is too weak.
        WrongIdentity: It is trusted, but of another trust domain.
        IdentityError: It is trusted, but does not name exactly one identity.
    """
    if not chain:
        raise UntrustedChain("no certificate was presented")
    leaf, usages = chain[0], [each.oid for each in (usage, *also)]
    check_validity(leaf, now)
    try:
        check_strength(leaf.public_key())
        _check_leaf(leaf, usages)
        path = find_path(chain, bundle, now, *usages)
        identity, made = identity_of(leaf, trust_domain), issued_at(leaf)
    except MALFORMED as exc:  # parts of the leaf are parsed at first use
        raise UntrustedChain(f"malformed certificate: {clip(str(exc))}") from exc
    _check_constrained(identity, path)
    below_root = [
        CertificateId(key_id(issuer.public_key()), each.serial_number) for each, issuer in pairwise(path)
    ]
    return Peer(
        identity=identity,
        serial=leaf.serial_number,
        fingerprint=leaf.fingerprint(hashes.SHA256()),
        not_after=min(certificate.not_valid_after_utc for certificate in path),
        issuer_key=below_root[0].issuer,
        issued_at=made,
        above=tuple(below_root[1:]),
    )


def identity_of(leaf: x509.Certificate, trust_domain: str) -> Identity:
    """
    The one identity of *trust_domain* that *leaf* names.

    A URI SAN decides, if there is any: exactly one (X509-SVID §2). Certificates we did not make
    have none; then it is what the CN or the DNS SANs spell as an identity's DNS name, or else a
    bare CN, which is an agent. A leaf that also spells somebody else is refused, since whoever
    dials that other would take it for him. Whether the leaf can be trusted is not checked.

    Raises:
        WrongIdentity: The URI SAN is of another trust domain.
        IdentityError: No identity, more than one, or a malformed one.
        UntrustedChain: Subject or extensions cannot be parsed.
    """
    sans = find_extension(leaf, x509.SubjectAlternativeName)
    uris = sans.get_values_for_type(x509.UniformResourceIdentifier) if sans else []
    common_name = _common_name(leaf)
    spelled = _spelled([*_dns_names(leaf), common_name], trust_domain)
    identity = _from_uri(uris, trust_domain) if uris else _foreign(common_name, spelled, trust_domain)
    for other in sorted(spelled - {identity}):
        raise IdentityError(f"names {identity} and also {other}")
    return identity


def _check_leaf(leaf: x509.Certificate, usages: Sequence[x509.ObjectIdentifier]) -> None:
    """What the leaf's own extensions must not say; absent ones say nothing."""
    constraints = find_extension(leaf, x509.BasicConstraints)
    if constraints is not None and constraints.ca:
        raise UntrustedChain("a CA certificate (CA:TRUE) where a leaf is expected")
    check_usages(leaf, usages)


def check_usages(leaf: x509.Certificate, usages: Sequence[x509.ObjectIdentifier]) -> None:
    """
    Pass if *leaf* says nothing against being good for *usages*; absent extensions say nothing.

    Raises:
        UntrustedChain: The text is the cause alone.
    """
    key_usage = find_extension(leaf, x509.KeyUsage)
    if key_usage is not None and not key_usage.digital_signature:
        raise UntrustedChain("key usage lacks digitalSignature")  # TLS 1.3 signs, RFC 8446 §4.4.2.2
    check_extended_usage(leaf, usages)


def _check_constrained(identity: Identity, path: Sequence[x509.Certificate]) -> None:
    """
    Where a CA is held to some names, the identity must be among the names that were held against it.

    RFC 5280 §4.2.1.10 applies DNS constraints to DNS SANs only: a CA for `agents.…` alone could
    otherwise name a service by CN or URI.
    """
    leaf, *authorities = path
    for authority in authorities:
        constrained = find_extension(authority, x509.NameConstraints) is not None
        if constrained and identity.dns_name not in _dns_names(leaf):
            raise UntrustedChain(f"issued under name constraints without the DNS SAN {identity.dns_name}")


def _from_uri(uris: Sequence[str], trust_domain: str) -> Identity:
    if len(uris) > 1:
        raise IdentityError(f"{len(uris)} URI SANs, where exactly one is allowed: {clip(', '.join(uris))}")
    identity = Identity.parse(uris[0])
    if identity.trust_domain != trust_domain:
        raise WrongIdentity(f"{identity} is not of the trust domain {trust_domain}")
    return identity


def _foreign(common_name: str, spelled: set[Identity], trust_domain: str) -> Identity:
    """The identity in a certificate we did not make."""
    bare = _is_bare(common_name)
    match sorted(spelled):
        case [] if bare:
            return Identity(trust_domain, Kind.AGENT, common_name)
        case []:
            raise IdentityError(
                f"names no identity of {trust_domain}, neither as SAN nor as CN {clip(common_name)}"
            )
        case [identity] if not bare or identity.name == common_name:
            return identity
        case [identity]:
            raise IdentityError(f"CN {clip(common_name)} contradicts the DNS SAN of {identity}")
        case several:
            raise IdentityError(f"names {len(several)} identities: {clip(', '.join(map(str, several)), 200)}")


def _spelled(names: Sequence[str], trust_domain: str) -> set[Identity]:
    """The identities of *trust_domain* that *names* spell as DNS names."""
    identities = {Identity.from_dns(name, trust_domain) for name in names}
    for name in names:
        if "*" in name and fold_dns(name).endswith(f".{trust_domain}"):
            raise IdentityError(f"the wildcard {clip(name)} would match many identities")
    return {identity for identity in identities if identity is not None}


def _dns_names(leaf: x509.Certificate) -> list[str]:
    sans = find_extension(leaf, x509.SubjectAlternativeName)
    return sans.get_values_for_type(x509.DNSName) if sans else []


def _common_name(leaf: x509.Certificate) -> str:
    """The CN, or an empty text where there is none."""
    try:
        names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    except MALFORMED as exc:
        raise UntrustedChain(f"malformed subject: {clip(str(exc))}") from exc
    if len(names) > 1:
        raise IdentityError(f"{len(names)} common names, where at most one is allowed")
    return str(names[0].value) if names else ""


def _is_bare(common_name: str) -> bool:
    try:
        return "." not in check_name(common_name)
    except IdentityError:
        return False
