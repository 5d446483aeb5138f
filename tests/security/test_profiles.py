"""Templates: what we write into certificates, and what nobody can make us write."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from ipaddress import ip_address
from typing import TYPE_CHECKING

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.errors import IdentityError, InvalidRequest
from parallax.security.identity import Identity
from parallax.security.keys import KeyType, generate_key
from parallax.security.profiles import (
    CLOCK_SKEW,
    LeafProfile,
    leaf_template,
    lifetime_of,
    parse_san,
    root_template,
)

if TYPE_CHECKING:
    from parallax.security.authority import CertificateAuthority
    from tests.security.conftest import Forge, Made

AGENT_1 = Identity.parse("spiffe://parallax.local/agent/agent-1")
KEY = generate_key()


def leaf_of(
    root: Made, now: datetime, profile: LeafProfile | None = None, identity: Identity = AGENT_1
) -> x509.Certificate:
    template = leaf_template(
        identity,
        KEY.public_key(),
        root.certificate,
        profile or LeafProfile(),
        now,
        x509.random_serial_number(),
    )
    return template.sign(root.key, hashes.SHA256())


def extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> tuple[object, bool]:
    found = certificate.extensions.get_extension_for_class(kind)
    return found.value, found.critical


# Roots.


def test_a_root_is_a_ca_with_room_for_one_intermediate(authority: CertificateAuthority) -> None:
    root = authority.certificate
    assert root.subject.rfc4514_string() == "CN=Parallax Root CA,O=Parallax"
    assert root.issuer == root.subject
    assert extension(root, x509.BasicConstraints) == (x509.BasicConstraints(ca=True, path_length=1), True)
    usage, critical = extension(root, x509.KeyUsage)
    assert isinstance(usage, x509.KeyUsage)
    assert critical
    assert (usage.key_cert_sign, usage.crl_sign, usage.digital_signature) == (True, True, False)
    assert extension(root, x509.SubjectKeyIdentifier) == (
        x509.SubjectKeyIdentifier.from_public_key(authority.key.public_key()),
        False,
    )
    assert len(root.extensions) == 3


def test_a_root_lives_ten_years_and_is_backdated(authority: CertificateAuthority, now: datetime) -> None:
    assert authority.certificate.not_valid_before_utc == now - CLOCK_SKEW
    assert authority.certificate.not_valid_after_utc == now + timedelta(days=3650)


@pytest.mark.parametrize("name", ["", "a" * 65, "x\n", "x\0"])
def test_a_root_needs_a_name_that_can_be_encoded(now: datetime, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^not a name for a CA: "):
        root_template(KEY.public_key(), now, 1, name=name)


@pytest.mark.parametrize(
    ("lifetime", "cause"),
    [
        (timedelta(0), "is not positive"),
        (timedelta(days=-1), "is not positive"),
        (timedelta(days=365 * 8000), "reaches past the year 9999"),
    ],
)
def test_a_root_needs_a_lifetime_that_can_be_encoded(now: datetime, lifetime: timedelta, cause: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{cause}$"):
        root_template(KEY.public_key(), now, 1, lifetime=lifetime)


# Leaves.


def test_a_leaf_carries_its_identity_three_times(root: Made, now: datetime) -> None:
    leaf = leaf_of(root, now)
    assert leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "agent-1"
    assert extension(leaf, x509.SubjectAlternativeName) == (
        x509.SubjectAlternativeName(
            [
                x509.UniformResourceIdentifier("spiffe://parallax.local/agent/agent-1"),
                x509.DNSName("agent-1.agents.parallax.local"),
                x509.DNSName("localhost"),
                x509.IPAddress(ip_address("127.0.0.1")),
                x509.IPAddress(ip_address("::1")),
            ]
        ),
        False,
    )


def test_a_leaf_serves_both_ends_and_is_no_ca(root: Made, now: datetime) -> None:
    """A critical extendedKeyUsage made some verifiers refuse the certificate."""
    leaf = leaf_of(root, now)
    both = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
    assert extension(leaf, x509.ExtendedKeyUsage) == (both, False)
    assert extension(leaf, x509.BasicConstraints) == (x509.BasicConstraints(ca=False, path_length=None), True)


@pytest.mark.parametrize(("key_type", "enciphers"), [(KeyType.P256, False), (KeyType.RSA2048, True)])
def test_key_usage_fits_the_algorithm(root: Made, now: datetime, key_type: KeyType, enciphers: bool) -> None:  # noqa: FBT001
    template = leaf_template(
        AGENT_1, generate_key(key_type).public_key(), root.certificate, LeafProfile(), now, 1
    )
    usage, critical = extension(template.sign(root.key, hashes.SHA256()), x509.KeyUsage)
    assert isinstance(usage, x509.KeyUsage)
    assert critical
    assert (usage.digital_signature, usage.key_encipherment) == (True, enciphers)
    assert not any((usage.key_cert_sign, usage.crl_sign, usage.key_agreement, usage.data_encipherment))


def test_key_identifiers_link_leaf_and_issuer(root: Made, now: datetime) -> None:
    leaf = leaf_of(root, now)
    above, _ = extension(root.certificate, x509.SubjectKeyIdentifier)
    link, critical = extension(leaf, x509.AuthorityKeyIdentifier)
    assert isinstance(above, x509.SubjectKeyIdentifier)
    assert isinstance(link, x509.AuthorityKeyIdentifier)
    assert link.key_identifier == above.digest
    assert not critical
    own, _ = extension(leaf, x509.SubjectKeyIdentifier)
    assert own == x509.SubjectKeyIdentifier.from_public_key(KEY.public_key())


def test_the_issuers_own_key_identifier_is_taken_over(forge: Forge, now: datetime) -> None:
    """Other tools compute it in other ways; verifiers compare the bytes."""
    odd = forge.authority("Odd CA", extra=[(x509.SubjectKeyIdentifier(b"odd"), False)])
    link, _ = extension(leaf_of(odd, now), x509.AuthorityKeyIdentifier)
    assert isinstance(link, x509.AuthorityKeyIdentifier)
    assert link.key_identifier == b"odd"
    bare = forge.authority("Bare CA")
    link, _ = extension(leaf_of(bare, now), x509.AuthorityKeyIdentifier)
    assert link == x509.AuthorityKeyIdentifier.from_issuer_public_key(bare.key.public_key())


def test_a_leaf_lives_as_long_as_asked_and_is_backdated(root: Made, now: datetime) -> None:
    leaf = leaf_of(root, now + timedelta(days=1), LeafProfile(lifetime=timedelta(hours=1)))
    assert leaf.not_valid_before_utc == now + timedelta(days=1) - CLOCK_SKEW
    assert leaf.not_valid_after_utc == now + timedelta(days=1, hours=1)


@pytest.mark.parametrize(
    ("lifetime", "skew"),
    [
        (timedelta(minutes=1), timedelta(seconds=6)),
        (timedelta(minutes=50), timedelta(minutes=5)),
        (timedelta(hours=1), timedelta(minutes=5)),
        (timedelta(days=365), timedelta(minutes=5)),
    ],
)
def test_a_leaf_is_backdated_by_no_more_than_a_part_of_its_lifetime(
    root: Made, now: datetime, lifetime: timedelta, skew: timedelta
) -> None:
    """Else one of a minute would be due for renewal when it is made."""
    issued = now + timedelta(days=1)
    leaf = leaf_of(root, issued, LeafProfile(lifetime=lifetime))
    assert leaf.not_valid_before_utc == issued - skew
    assert leaf.not_valid_after_utc == issued + lifetime
    assert lifetime_of(leaf) == lifetime


@pytest.mark.parametrize("lifetime", [timedelta(days=365 * 11), timedelta.max])
def test_a_leaf_never_outlives_its_issuer(root: Made, now: datetime, lifetime: timedelta) -> None:
    leaf = leaf_of(root, now, LeafProfile(lifetime=lifetime))
    assert leaf.not_valid_after_utc == root.certificate.not_valid_after_utc


def test_a_leaf_is_never_older_than_its_issuer(root: Made, now: datetime) -> None:
    leaf = leaf_of(root, now - timedelta(minutes=3))
    assert leaf.not_valid_before_utc == root.certificate.not_valid_before_utc


@pytest.mark.parametrize("lifetime", [timedelta(0), timedelta(days=-1), timedelta(microseconds=1)])
def test_a_lifetime_is_positive(lifetime: timedelta) -> None:
    with pytest.raises(InvalidRequest, match=r"^a lifetime of .* is not positive$"):
        LeafProfile(lifetime=lifetime)


@pytest.mark.parametrize(
    "short",
    [
        "service/control-plane",
        "agent/agente_py",
        "agent/a-",
        "agent/x.y",
        "agent/07048933",
        f"client/{'z' * 63}",
    ],
)
def test_every_identity_can_be_encoded(root: Made, now: datetime, short: str) -> None:
    """Underscores and trailing dashes are no host names, but names in the field have them."""
    identity = Identity.parse_short(short)
    names, _ = extension(leaf_of(root, now, identity=identity), x509.SubjectAlternativeName)
    assert isinstance(names, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == [identity.dns_name, "localhost"]


# Requested SANs.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost", x509.DNSName("localhost")),
        ("Host-1.Example.ORG.", x509.DNSName("host-1.example.org")),
        ("xn--bcher-kva.example", x509.DNSName("xn--bcher-kva.example")),
        ("10.0.0.1", x509.IPAddress(ip_address("10.0.0.1"))),
        ("::1", x509.IPAddress(ip_address("::1"))),
        ("2001:DB8::1", x509.IPAddress(ip_address("2001:db8::1"))),
    ],
)
def test_sans_that_can_be_requested(text: str, expected: x509.GeneralName) -> None:
    assert parse_san(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        " ",
        "host_1",
        "host-",
        "-host",
        "a..b",
        ".a",
        "a/b",
        "a b",
        "a\0b",
        "a\n",
        "bücher.example",
        "\u212ahost",
        "a" * 64,
        ".".join(["a" * 63] * 4),
        "127.0.0.256",
        "127.0.0.01",
        "127.1",
        "1",
        "fe80::1%eth0",
        "10.0.0.0/8",
        "[::1]",
        "host:443",
        "https://host",
    ],
)
def test_san_that_is_neither_address_nor_host_name(root: Made, now: datetime, text: str) -> None:
    with pytest.raises(
        IdentityError, match=r"^not a SAN: '.*' \(IP address, or DNS name of a-z, 0-9 and inner '-'\)$"
    ):
        parse_san(text)
    with pytest.raises(IdentityError, match=r"^not a SAN: "):
        leaf_of(root, now, LeafProfile(sans=("localhost", text)))


@pytest.mark.parametrize("text", ["*", "*.example.org", "*.parallax.local", "a*.b"])
def test_wildcard_san(text: str) -> None:
    with pytest.raises(IdentityError, match=r"^not a SAN: '.*' \(a wildcard would match many identities\)$"):
        parse_san(text)


@given(st.text(max_size=300))
def test_parse_san_of_any_text_gives_what_can_be_encoded_or_identity_error(text: str) -> None:
    try:
        name = parse_san(text)
    except IdentityError:
        return
    assert x509.SubjectAlternativeName([name]).public_bytes()


@pytest.mark.parametrize(
    ("san", "other"),
    [
        ("control-plane.parallax.local", "service/control-plane"),
        ("Control-Plane.Parallax.Local.", "service/control-plane"),
        ("agent-2.agents.parallax.local", "agent/agent-2"),
        ("agent-1.parallax.local", "service/agent-1"),
        ("admin.clients.parallax.local", "client/admin"),
    ],
)
def test_san_that_spells_somebody_else(root: Made, now: datetime, san: str, other: str) -> None:
    with pytest.raises(IdentityError) as caught:
        leaf_of(root, now, LeafProfile(sans=(san,)))
    assert str(caught.value) == (
        f"the SAN {san.lower().removesuffix('.')} is spiffe://parallax.local/{other}, "
        "not spiffe://parallax.local/agent/agent-1"
    )


def test_requested_sans_appear_once(root: Made, now: datetime) -> None:
    profile = replace(
        LeafProfile(), sans=("localhost", "LOCALHOST", "agent-1.agents.parallax.local", "::1", "0:0::1")
    )
    names, _ = extension(leaf_of(root, now, profile), x509.SubjectAlternativeName)
    assert isinstance(names, x509.SubjectAlternativeName)
    assert [name.value for name in names][1:] == [
        "agent-1.agents.parallax.local",
        "localhost",
        ip_address("::1"),
    ]


def test_without_requested_sans_only_the_identity_is_named(root: Made, now: datetime) -> None:
    names, _ = extension(leaf_of(root, now, LeafProfile(sans=())), x509.SubjectAlternativeName)
    assert isinstance(names, x509.SubjectAlternativeName)
    assert len(list(names)) == 2
