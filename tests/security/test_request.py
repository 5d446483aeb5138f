"""Requests for a certificate: what they prove, and everything they may not ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.errors import InvalidRequest, NotAuthorized, ParallaxError, VerificationError
from parallax.security.identity import Identity, Kind
from parallax.security.keys import KeyType, generate_key
from parallax.security.request import MAX_REQUEST_BYTES, check_request, new_request

AGENT_1: Final = Identity("parallax.local", Kind.AGENT, "agent-1")
AGENT_2: Final = Identity("parallax.local", Kind.AGENT, "agent-2")
KEY: Final = generate_key()
IN_FORCE: Final = generate_key().public_key()
SANS: Final = ("localhost", "127.0.0.1", "::1")
WEAK: Final = rsa.generate_private_key(65537, 1024)  # noqa: S505


def request(
    names: Sequence[x509.GeneralName] = (),
    subject: Sequence[tuple[x509.ObjectIdentifier, str]] = ((NameOID.COMMON_NAME, "agent-1"),),
    extra: Sequence[x509.ExtensionType] = (),
    key: Any = KEY,
) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(oid, value) for oid, value in subject])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension in extra:
        builder = builder.add_extension(extension, critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.DER)


def check(der: bytes) -> object:
    return check_request(der, AGENT_1, SANS, IN_FORCE)


@pytest.mark.parametrize("kind", [KeyType.P256, KeyType.RSA2048])
def test_what_we_make_is_granted(kind: KeyType) -> None:
    key = generate_key(kind)
    assert check(new_request(AGENT_1, key, SANS)) == key.public_key()


@pytest.mark.parametrize(
    "der",
    [
        request(),
        request(subject=()),
        request([x509.DNSName("LOCALHOST"), x509.IPAddress(ip_address("::1"))]),
        request([x509.DNSName("agent-1.agents.parallax.local")]),
        request(extra=[x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])]),
    ],
)
def test_what_other_tools_make_is_granted_as_long_as_it_names_nobody_else(der: bytes) -> None:
    assert check(der) == KEY.public_key()


@pytest.mark.parametrize(
    "name",
    [
        x509.UniformResourceIdentifier(str(AGENT_2)),
        x509.UniformResourceIdentifier("spiffe://parallax.local/client/admin"),
        x509.DNSName("agent-2.agents.parallax.local"),
        x509.DNSName("control-plane.parallax.local"),
        x509.DNSName("*.agents.parallax.local"),
        x509.DNSName("example.com"),
        x509.IPAddress(ip_address("10.0.0.1")),
        x509.RFC822Name("agent-1@parallax.local"),
    ],
)
def test_a_name_that_its_sender_does_not_have_is_refused(name: x509.GeneralName) -> None:
    with pytest.raises(NotAuthorized, match="may not ask for the name"):
        check(request([x509.UniformResourceIdentifier(str(AGENT_1)), name]))


@pytest.mark.parametrize(
    "subject",
    [
        ((NameOID.COMMON_NAME, "agent-2"),),
        ((NameOID.COMMON_NAME, "agent-1"), (NameOID.COMMON_NAME, "agent-2")),
        ((NameOID.ORGANIZATION_NAME, "agent-1"),),
    ],
)
def test_a_subject_that_is_not_its_sender_is_refused(subject: Any) -> None:
    with pytest.raises(NotAuthorized, match="may not ask for the subject"):
        check(request(subject=subject))


@pytest.mark.parametrize(
    "extension",
    [
        x509.BasicConstraints(ca=True, path_length=None),
        x509.NameConstraints(permitted_subtrees=[x509.DNSName("x")], excluded_subtrees=None),
        x509.TLSFeature([x509.TLSFeatureType.status_request]),
    ],
)
def test_what_is_not_given_is_not_asked_for(extension: x509.ExtensionType) -> None:
    with pytest.raises(InvalidRequest, match="asks for extension"):
        check(request(extra=[extension]))


def test_the_key_in_force_is_not_used_on() -> None:
    with pytest.raises(InvalidRequest, match="make a new key"):
        check_request(new_request(AGENT_1, KEY), AGENT_1, (), KEY.public_key())


def other_signature() -> bytes:
    """Somebody else's public key in a request that we sign: nobody has shown to hold its private half."""

    def point(key: Any) -> bytes:
        return bytes(key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint))

    return new_request(AGENT_1, KEY).replace(point(KEY), point(generate_key()))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: b"", "not a certificate request"),
        (lambda: b"\x30\x00", "not a certificate request"),
        (lambda: new_request(AGENT_1, KEY)[:-1], "not a certificate request"),
        (lambda: new_request(AGENT_1, KEY) + b"\0" * MAX_REQUEST_BYTES, "more than 16,384"),
        (other_signature, "not signed with the key"),
    ],
)
def test_what_is_no_request_or_proves_nothing_is_refused(make: Callable[[], bytes], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        check(make())


@pytest.mark.parametrize(
    "key", [WEAK, ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP521R1())]
)
def test_a_key_that_no_certificate_may_have_is_refused(key: Any) -> None:
    with pytest.raises(VerificationError):
        check(request(key=key))


@given(st.binary(max_size=300), st.integers(0, 300))
def test_hostile_bytes_raise_nothing_else(junk: bytes, at: int) -> None:
    whole = bytearray(new_request(AGENT_1, KEY, SANS))
    whole[at : at + len(junk)] = junk
    with suppress(ParallaxError):
        check(bytes(whole))
