"""Templates of the certificates we make; pure: no key signs here and no clock is read."""

from __future__ import annotations

import ipaddress
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parallax.security.certificate import find_extension
from parallax.security.errors import IdentityError, InvalidRequest
from parallax.security.identity import Identity, clip, fold_dns
from parallax.security.keys import KeyType, PublicKey, check_strength, key_id

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

CLOCK_SKEW: Final = timedelta(minutes=5)  # a peer whose clock is behind by less accepts a new certificate
_BACKDATED: Final = 10  # by a tenth of a lifetime at most: else a short one would be half over when it begins
LEAF_LIFETIME: Final = timedelta(days=365)
ROOT_LIFETIME: Final = timedelta(days=3650)
ROOT_NAME: Final = "Parallax Root CA"
LOCAL_SANS: Final = ("localhost", "127.0.0.1", "::1")

_MAX_DNS_NAME: Final = 253  # RFC 1035 §2.3.4, as text
_MAX_COMMON_NAME: Final = 64  # ub-common-name, RFC 5280 appendix A.1
_LABEL: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)  # RFC 1123 §2.1


@dataclass(frozen=True, slots=True)
class LeafProfile:
    """
    What a leaf is like apart from whose it is.

    Attributes:
        lifetime: From now on; the issuer's own end cuts it short.
        key_type: The key that whoever asks for the leaf generates.
        sans: DNS names and IP addresses beside those of the identity.
        crl_url: Of the folder where each issuer's CRL is `<id of its key>.crl`; None: the leaf says none.

    Raises:
        InvalidRequest: The lifetime is not positive.
    """

    lifetime: timedelta = LEAF_LIFETIME
    key_type: KeyType = KeyType.P256
    sans: tuple[str, ...] = LOCAL_SANS
    crl_url: str | None = None

    def __post_init__(self) -> None:
        if self.lifetime < timedelta(seconds=1):
            raise InvalidRequest(f"a lifetime of {self.lifetime} is not positive")


def root_template(
    public_key: PublicKey,
    now: datetime,
    serial: int,
    *,
    name: str = ROOT_NAME,
    lifetime: timedelta = ROOT_LIFETIME,
) -> x509.CertificateBuilder:
    """
    A self-signed root (RFC 5280 §4.1, §4.2.1), backdated like the leaves that it will sign at once.

    Its path length of 1 leaves room for one intermediate.

    Raises:
        InvalidRequest: The lifetime is not positive or reaches past the year 9999, or the name is
            not 1 to 64 printable characters.
    """
    if not 0 < len(name) <= _MAX_COMMON_NAME or not name.isprintable():
        raise InvalidRequest(f"not a name for a CA: {clip(name)} (1 to 64 printable characters)")
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Parallax"),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    try:
        not_after = now + lifetime
    except OverflowError:
        raise InvalidRequest(f"a lifetime of {lifetime} reaches past the year 9999") from None
    if lifetime < timedelta(seconds=1):
        raise InvalidRequest(f"a lifetime of {lifetime} is not positive")
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public_key)
        .serial_number(serial)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def leaf_template(
    identity: Identity,
    public_key: PublicKey,
    issuer: x509.Certificate,
    profile: LeafProfile,
    now: datetime,
    serial: int,
) -> x509.CertificateBuilder:
    """
    A leaf of *identity* for the holder of *public_key*, for both ends of a connection.

    Its validity lies within the issuer's. extendedKeyUsage is not critical: some verifiers
    refuse a critical one.

    Args:
        issuer: Whose key will sign.
        now: Aware UTC, within the validity of *issuer*.
        serial: Positive, at most 20 octets (RFC 5280 §4.1.2.2).

    Raises:
        IdentityError: A requested SAN is no name or address, or spells somebody else.
    """
    usages = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
    template = (
        _leaf(identity, public_key, profile, usages)
        .issuer_name(issuer.subject)
        .serial_number(serial)
        .not_valid_before(max(now - skew(profile.lifetime), issuer.not_valid_before_utc))
        .not_valid_after(now + min(profile.lifetime, issuer.not_valid_after_utc - now))
        .add_extension(authority_key_identifier(issuer), critical=False)
    )
    if profile.crl_url is not None:
        template = template.add_extension(_distribution_point(profile.crl_url, issuer), critical=False)
    return template


def self_signed_template(
    identity: Identity, public_key: PublicKey, profile: LeafProfile, now: datetime, serial: int
) -> x509.CertificateBuilder:
    """
    A leaf of *identity* that the holder of *public_key* signs itself, for those who pin it.

    For the client's end alone: who dials pins nobody. Its keyUsage keeps TLS, too, from taking it for a CA.

    Raises:
        IdentityError: A requested SAN is no name or address, or spells somebody else.
    """
    return (
        _leaf(identity, public_key, profile, (ExtendedKeyUsageOID.CLIENT_AUTH,))
        .issuer_name(_subject_of(identity))
        .serial_number(serial)
        .not_valid_before(now - skew(profile.lifetime))
        .not_valid_after(now + profile.lifetime)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public_key), critical=False)
    )


def _leaf(
    identity: Identity, public_key: PublicKey, profile: LeafProfile, usages: Sequence[x509.ObjectIdentifier]
) -> x509.CertificateBuilder:
    """What a leaf is, whoever signs it."""
    encipher = isinstance(public_key, rsa.RSAPublicKey)
    return (
        x509.CertificateBuilder()
        .subject_name(_subject_of(identity))
        .public_key(public_key)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True, key_encipherment=encipher), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names_of(identity, profile.sans)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def _subject_of(identity: Identity) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])


def lifetime_of(leaf: x509.Certificate) -> timedelta:
    """The lifetime that *leaf* was issued for, if it is one of ours; about that, if it is not."""
    validity = leaf.not_valid_after_utc - leaf.not_valid_before_utc
    return max(validity - CLOCK_SKEW, validity * _BACKDATED / (_BACKDATED + 1))


def issued_at(leaf: x509.Certificate) -> datetime:
    """
    When *leaf* was made.

    Ours are valid from earlier on. What has no URI SAN, we did not make: openssl and cert-manager let it
    begin when it is made. Of another CA's with a URI SAN it may be up to `CLOCK_SKEW` too late.
    """
    sans = find_extension(leaf, x509.SubjectAlternativeName)
    if sans and sans.get_values_for_type(x509.UniformResourceIdentifier):
        return leaf.not_valid_after_utc - lifetime_of(leaf)
    return leaf.not_valid_before_utc


def skew(lifetime: timedelta) -> timedelta:
    """How long before now something that is to last *lifetime* begins: peers' clocks may be behind."""
    return min(CLOCK_SKEW, lifetime / _BACKDATED)


def parse_san(text: str) -> x509.DNSName | x509.IPAddress:
    """
    The SAN that *text* spells: an IP address, or else a DNS name.

    Raises:
        IdentityError: It is neither: empty, too long, a wildcard, a label with other than a-z, 0-9
            and an inner '-'.
    """
    try:
        if "%" not in text:  # a scope means something on one host only, and a certificate cannot hold it
            return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        pass
    name = fold_dns(text)
    labels = name.split(".")
    if "*" in name:
        raise IdentityError(f"not a SAN: {clip(text)} (a wildcard would match many identities)")
    if len(name) > _MAX_DNS_NAME or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdecimal():
        raise IdentityError(f"not a SAN: {clip(text)} (IP address, or DNS name of a-z, 0-9 and inner '-')")
    return x509.DNSName(name)


def names_of(identity: Identity, sans: Sequence[str]) -> tuple[x509.GeneralName, ...]:
    """
    What a leaf of *identity* names: its URI and DNS name, then *sans*, each once.

    Raises:
        IdentityError: One of *sans* is no name or address, or spells somebody else.
    """
    names: list[x509.GeneralName] = [
        x509.UniformResourceIdentifier(str(identity)),
        x509.DNSName(identity.dns_name),
    ]
    for name in map(parse_san, sans):
        other = Identity.from_dns(str(name.value), identity.trust_domain)
        if other not in {None, identity}:
            raise IdentityError(f"the SAN {name.value} is {other}, not {identity}")
        names.append(name)
    return tuple(dict.fromkeys(names))


def sans_of(leaf: x509.Certificate, identity: Identity) -> tuple[str, ...]:
    """
    The names and addresses in *leaf* beside those of *identity*, for another leaf of the same to have.

    A foreign one may hold some that we refuse: these are left out.

    Raises:
        UntrustedChain: Its names cannot be read.
    """
    names = []
    for san in find_extension(leaf, x509.SubjectAlternativeName) or ():
        if isinstance(san, x509.DNSName | x509.IPAddress) and san.value != identity.dns_name:
            with suppress(IdentityError):
                parse_san(str(san.value))
                names.append(str(san.value))
    return tuple(names)


def _distribution_point(crl_url: str, issuer: x509.Certificate) -> x509.CRLDistributionPoints:
    """Where the list of *issuer* is (RFC 5280 §4.2.1.13)."""
    url = f"{crl_url.rstrip('/')}/{key_id(issuer.public_key()).hex()}.crl"
    point = x509.DistributionPoint([x509.UniformResourceIdentifier(url)], None, None, None)
    return x509.CRLDistributionPoints([point])


def authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """The issuer's own identifier of its key (RFC 5280 §4.2.1.1); other tools compute it differently."""
    identifier = find_extension(issuer, x509.SubjectKeyIdentifier)
    if identifier is not None:
        return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(check_strength(issuer.public_key()))


def _key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    """The bits given, and every other one named as unset (RFC 5280 §4.2.1.3)."""
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )
