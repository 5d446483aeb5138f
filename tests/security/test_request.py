"""Requests for a certificate: what they prove, and everything they may not ask for."""

from __future__ import annotations

import subprocess
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, Literal

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import AttributeOID, ExtendedKeyUsageOID, NameOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from parallax.security.errors import InvalidRequest, NotAuthorized
from parallax.security.identity import Identity, Kind
from parallax.security.issuance_policy import parse_issuance
from parallax.security.keys import MAX_RSA_BITS, KeyType, generate_key, key_to_pem
from parallax.security.request import MAX_REQUEST_BYTES, check_request, new_request

AGENT_1: Final = Identity("parallax.local", Kind.AGENT, "agent-1")
AGENT_2: Final = Identity("parallax.local", Kind.AGENT, "agent-2")
KEY: Final = ec.generate_private_key(ec.SECP256R1())
IN_FORCE: Final = generate_key().public_key()
SANS: Final = ("localhost", "127.0.0.1", "::1")
WEAK: Final = rsa.generate_private_key(65537, 1024)  # noqa: S505
RSA: Final = rsa.generate_private_key(65537, 2048)
UNKNOWN: Final = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), bytes(1 << 20))
EXTENSION_REQUEST: Final = ObjectIdentifier("1.2.840.113549.1.9.14")


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
    is_edwards = isinstance(key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
    algorithm = None if is_edwards else hashes.SHA256()
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
        ((NameOID.COUNTRY_NAME, "US"), (NameOID.COMMON_NAME, "agent-1")),
    ],
)
def test_a_subject_that_is_not_its_sender_is_refused(subject: Any) -> None:
    with pytest.raises(NotAuthorized, match="may not ask for the subject"):
        check(request(subject=subject))


@pytest.mark.parametrize("what", ["ignore", "error"])
def test_a_name_of_which_cryptography_warns_is_refused_whatever_becomes_of_the_warning(
    what: Literal["ignore", "error"],
) -> None:
    """A country has two letters: `python -W error` must not be another way out of here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        odd = x509.NameAttribute(NameOID.COUNTRY_NAME, "USA", _validate=False)
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([odd]))
        der = builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)
        warnings.simplefilter(what)
        with pytest.raises((NotAuthorized, InvalidRequest)):
            check(der)


def key_usage(**bits: bool) -> x509.KeyUsage:
    names = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**(dict.fromkeys(names, False) | {"digital_signature": True} | bits))


@pytest.mark.parametrize(
    ("extension", "why"),
    [
        (x509.BasicConstraints(ca=True, path_length=None), "asks for a CA"),
        (x509.BasicConstraints(ca=True, path_length=0), "asks for a CA"),
        (key_usage(key_cert_sign=True), "key usage keyCertSign; leave it out"),
        (
            key_usage(crl_sign=True, content_commitment=True),
            "usage nonRepudiation, cRLSign; leave it out",
        ),
        (key_usage(key_agreement=True, encipher_only=True), "key usage keyAgreement"),
        (key_usage(data_encipherment=True), "key usage dataEncipherment"),
        (
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.CODE_SIGNING]),
            r"extended key usage 1\.3\.6\.1\.5\.5\.7\.3\.3; leave it out",
        ),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE]), r"extended key usage 2\.5\.29"),
        (x509.NameConstraints([x509.DNSName("x")], None), r"asks for extension 2\.5\.29\.30; leave it out"),
        (x509.TLSFeature([x509.TLSFeatureType.status_request]), "asks for extension"),
        (x509.OCSPNoCheck(), "asks for extension"),
        (x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b""), r"asks for extension 1\.2\.3\.4"),
    ],
)
def test_what_is_not_given_is_not_asked_for(extension: x509.ExtensionType, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        check(request(extra=[extension]))


@pytest.mark.parametrize(
    "extension",
    [
        x509.BasicConstraints(ca=False, path_length=None),
        key_usage(),
        key_usage(key_encipherment=True),
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]),
        x509.SubjectKeyIdentifier(b"any"),
    ],
)
def test_what_a_leaf_has_anyway_may_be_asked_for(extension: x509.ExtensionType) -> None:
    """The twin: openssl's usual configuration puts some of these in."""
    assert check(request(extra=[extension])) == KEY.public_key()


def with_attribute(oid: ObjectIdentifier, value: bytes) -> bytes:
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(key_usage(), critical=False)
        .add_attribute(oid, value)
    )
    return builder.sign(KEY, hashes.SHA256()).public_bytes(Encoding.DER)


def test_an_attribute_that_asks_for_nothing_is_passed_over() -> None:
    assert check(with_attribute(AttributeOID.CHALLENGE_PASSWORD, b"secret")) == KEY.public_key()
    assert check(with_attribute(AttributeOID.UNSTRUCTURED_NAME, b"a1")) == KEY.public_key()


@pytest.mark.parametrize("oid", [EXTENSION_REQUEST, ObjectIdentifier("1.3.6.1.4.1.311.2.1.14")])
def test_extensions_in_two_places_are_refused(oid: ObjectIdentifier) -> None:
    """Of two, one program reads the first and another one the last."""
    with pytest.raises(InvalidRequest, match="in more than one place"):
        check(with_attribute(oid, b"any"))


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
        (lambda: new_request(AGENT_1, KEY) + b"\0", "not a certificate request"),
        (lambda: new_request(AGENT_1, KEY) * 2, "not a certificate request"),
        (lambda: pem(new_request(AGENT_1, KEY)), "not a certificate request"),
        (lambda: new_request(AGENT_1, KEY) + b"\0" * MAX_REQUEST_BYTES, "more than 16,384"),
        (
            lambda: request(extra=[x509.UnrecognizedExtension(ObjectIdentifier("1.2.3"), bytes(1 << 20))]),
            "more",
        ),
        (other_signature, "not signed with the key"),
    ],
)
def test_what_is_no_request_or_proves_nothing_is_refused(make: Callable[[], bytes], why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        check(make())


def pem(der: bytes) -> bytes:
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM)


def rsa_with(exponent: int) -> rsa.RSAPrivateKey:
    """A key with an exponent that no tool would choose."""
    while True:
        numbers = rsa.generate_private_key(65537, 2048).private_numbers()
        p, q = numbers.p, numbers.q
        with suppress(ValueError):  # not coprime: another pair of primes
            d = pow(exponent, -1, (p - 1) * (q - 1))
            return rsa.RSAPrivateNumbers(
                p=p,
                q=q,
                d=d,
                dmp1=rsa.rsa_crt_dmp1(d, p),
                dmq1=rsa.rsa_crt_dmq1(d, q),
                iqmp=rsa.rsa_crt_iqmp(p, q),
                public_numbers=rsa.RSAPublicNumbers(exponent, p * q),
            ).private_key()


@pytest.mark.parametrize(
    ("key", "why"),
    [
        (WEAK, "RSA key of 1024 bits"),
        (
            ed25519.Ed25519PrivateKey.generate(),
            "Ed25519 key, which gRPC peers cannot use: P-256",
        ),
        (ed448.Ed448PrivateKey.generate(), "Ed448 key, which gRPC peers cannot use"),
        (dsa.generate_private_key(1024), "DSA key"),  # noqa: S505
        (ec.generate_private_key(ec.SECP521R1()), "curve secp521r1"),
        (ec.generate_private_key(ec.SECP192R1()), "curve secp192r1"),
        (ec.generate_private_key(ec.SECP256K1()), "curve secp256k1"),
        (ec.generate_private_key(ec.BrainpoolP256R1()), "curve brainpoolP256r1"),
        (rsa_with(3), "an exponent that is not usual"),
        (rsa_with(17), "an exponent that is not usual"),
        (rsa_with((1 << 33) + 1), "an exponent that is not usual"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_key_that_no_certificate_may_have_is_refused(key: Any, why: str) -> None:
    with pytest.raises(InvalidRequest, match=why):
        check(request(key=key))


def test_a_key_that_costs_its_peers_too_much_is_refused_before_it_costs_us() -> None:
    """Nobody has to have it: only its public half is in the request."""
    modulus = (1 << (MAX_RSA_BITS + 8)) - 1
    too_long = rsa.RSAPublicNumbers(65537, modulus).public_key()
    whole = request(key=RSA)
    info = x509.load_der_x509_csr(whole).tbs_certrequest_bytes
    ours, theirs = (
        key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        for key in (RSA.public_key(), too_long)
    )
    content = body(info).replace(ours, theirs)
    with pytest.raises(InvalidRequest, match="RSA key of 8200 bits: 8192 are the most"):
        check(sequence(sequence(content), algorithm_of(whole, info), bit_string(bytes(256))))


@pytest.mark.parametrize("digest", ["md5", "sha1", "sha224"])
def test_a_signature_that_somebody_else_could_have_made_is_refused(
    digest: str, tmp_path: Path, require_tool: Callable[[str], str]
) -> None:
    with pytest.raises(InvalidRequest, match="; sign it with SHA-256"):
        check(by_openssl(require_tool("openssl"), tmp_path, digest))


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha512"])
def test_any_other_is_taken(digest: str, tmp_path: Path, require_tool: Callable[[str], str]) -> None:
    assert check(by_openssl(require_tool("openssl"), tmp_path, digest)) == RSA.public_key()


def by_openssl(openssl: str, directory: Path, digest: str) -> bytes:
    (directory / "key.pem").write_bytes(key_to_pem(RSA))
    command = [
        openssl,
        "req",
        "-new",
        "-key",
        "key.pem",
        "-subj",
        "/CN=agent-1",
        "-outform",
        "DER",
        f"-{digest}",
    ]
    return subprocess.run(command, cwd=directory, capture_output=True, check=True).stdout


# What the policy says.


def test_a_key_that_the_policy_does_not_admit_is_refused_and_one_that_it_does_is_not() -> None:
    policy = parse_issuance('[[issue]]\nholder = "agent"\nkeys = ["rsa-2048"]')
    assert check_request(new_request(AGENT_1, RSA), AGENT_1, (), None, policy) == RSA.public_key()
    with pytest.raises(NotAuthorized, match="admits no key on the curve secp256r1 for agent: make"):
        check_request(new_request(AGENT_1, KEY), AGENT_1, (), None, policy)


def test_a_name_that_was_granted_and_the_policy_does_not_admit_is_refused() -> None:
    policy = parse_issuance('[[issue]]\nholder = "agent"\nsans = ["127.0.0.1"]')
    check_request(new_request(AGENT_1, KEY), AGENT_1, ("127.0.0.1",), None, policy)
    with pytest.raises(NotAuthorized, match="admits no 'localhost' for agent: leave it out"):
        check_request(new_request(AGENT_1, KEY), AGENT_1, SANS, None, policy)


# Hostile bytes.


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_as_no_request(junk: bytes) -> None:
    with pytest.raises(InvalidRequest):
        check(junk)


@given(st.binary(max_size=300), st.integers(0, 300))
def test_a_request_that_was_written_over_raises_nothing_else(junk: bytes, at: int) -> None:
    whole = bytearray(FULL)
    whole[at : at + len(junk)] = junk
    with suppress(InvalidRequest, NotAuthorized):
        check(bytes(whole))


@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=4))
def test_one_that_its_holder_mangled_and_signed_raises_nothing_else(changes: list[tuple[int, int]]) -> None:
    """Past the signature: whoever sends it has the key."""
    info = bytearray(x509.load_der_x509_csr(FULL).tbs_certrequest_bytes)
    for at, value in changes:
        info[at % len(info)] = value
    with suppress(InvalidRequest, NotAuthorized):
        check(sealed(bytes(info)))


def sealed(info: bytes) -> bytes:
    """A request that says *info*, signed."""
    original = x509.load_der_x509_csr(FULL).tbs_certrequest_bytes
    return sequence(info, algorithm_of(FULL, original), bit_string(KEY.sign(info, ec.ECDSA(hashes.SHA256()))))


def test_one_that_was_signed_again_is_granted() -> None:
    """The twin of the one before: the signature is good."""
    assert check(sealed(x509.load_der_x509_csr(FULL).tbs_certrequest_bytes)) == KEY.public_key()


def algorithm_of(der: bytes, info: bytes) -> bytes:
    """The signature's algorithm, which lies between what is signed and the signature."""
    start = der.index(info) + len(info)
    return der[start : start + 2 + der[start + 1]]


def tlv(tag: int, *parts: bytes) -> bytes:
    """DER: tag, length, content."""
    content = b"".join(parts)
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag, 0x80 | len(length)]) + length + content


def sequence(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def bit_string(content: bytes) -> bytes:
    return tlv(0x03, b"\0", content)


def body(der: bytes) -> bytes:
    """What is in a SEQUENCE whose length takes two bytes."""
    return der[4:]


FULL: Final = request(
    [x509.DNSName("localhost"), x509.IPAddress(ip_address("::1"))],
    extra=[x509.BasicConstraints(ca=False, path_length=None), key_usage(), x509.SubjectKeyIdentifier(b"any")],
)
