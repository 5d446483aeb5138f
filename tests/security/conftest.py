"""Fixtures of the security tests: a real CA, real keys, and certificates with one thing wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from parallax.security.authority import CertificateAuthority
from parallax.security.bundle import TrustBundle

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey

AGENT_URI: Final = "spiffe://parallax.local/agent/agent-1"
AGENT_DNS: Final = "agent-1.agents.parallax.local"
BOTH_ENDS: Final = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
KEY_USAGE_BITS: Final = (
    "digital_signature",
    "content_commitment",
    "key_encipherment",
    "data_encipherment",
    "key_agreement",
    "key_cert_sign",
    "crl_sign",
    "encipher_only",
    "decipher_only",
)


@dataclass(frozen=True)
class Made:
    """A certificate and its key."""

    certificate: x509.Certificate
    key: Key


@dataclass(frozen=True)
class Forge:
    """
    Makes any certificate, wrong ones too; each argument changes one thing of a good leaf of agent-1.

    `ca`, `usages` and `key_usage` of None leave the extension out. Without *issuer* the `authority` signs.
    """

    root: Made
    now: datetime

    def __call__(
        self,
        *,
        issuer: Made | None = None,
        self_signed: bool = False,
        key: Key | None = None,
        common_names: Sequence[str] = ("agent-1",),
        subject: x509.Name | None = None,
        uris: Sequence[str] = (AGENT_URI,),
        dns: Sequence[str] = (AGENT_DNS,),
        not_before: timedelta = timedelta(minutes=-5),
        not_after: timedelta = timedelta(days=30),
        ca: bool | None = False,
        path_length: int | None = None,
        usages: Sequence[x509.ObjectIdentifier] | None = BOTH_ENDS,
        key_usage: Sequence[str] | None = ("digital_signature",),
        extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> Made:
        key = key or ec.generate_private_key(ec.SECP256R1())
        if subject is None:
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name) for name in common_names])
        issuer = issuer or self.root
        sans = [*map(x509.UniformResourceIdentifier, uris), *map(x509.DNSName, dns)]
        extensions: list[tuple[x509.ExtensionType, bool]] = [*extra]
        if sans:
            extensions.append((x509.SubjectAlternativeName(sans), False))
        if ca is not None:
            extensions.append((x509.BasicConstraints(ca=ca, path_length=path_length), True))
        if usages is not None:
            extensions.append((x509.ExtendedKeyUsage(usages), False))
        if key_usage is not None:
            extensions.append((_key_usage(key_usage), True))
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(subject if self_signed else issuer.certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(self.now + not_before)
            .not_valid_after(self.now + not_after)
        )
        for extension, critical in extensions:
            builder = builder.add_extension(extension, critical=critical)
        signer = key if self_signed else issuer.key
        algorithm = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        return Made(builder.sign(signer, algorithm), key)

    def authority(
        self,
        name: str,
        *,
        issuer: Made | None = None,
        key: Key | None = None,
        ca: bool | None = True,
        path_length: int | None = None,
        usages: Sequence[x509.ObjectIdentifier] | None = None,
        key_usage: Sequence[str] | None = ("key_cert_sign", "crl_sign"),
        not_after: timedelta = timedelta(days=300),
        extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
    ) -> Made:
        """A CA named *name*: below *issuer*, or else a root of its own."""
        return self(
            issuer=issuer,
            self_signed=issuer is None,
            key=key,
            common_names=(name,),
            uris=(),
            dns=(),
            ca=ca,
            path_length=path_length,
            usages=usages,
            key_usage=key_usage,
            not_after=not_after,
            extra=extra,
        )


@dataclass(frozen=True)
class AsV1:
    """Makes X.509 v1 certificates, as plain `openssl x509 -req` of OpenSSL 3.0 does; newer ones make v3."""

    def __call__(
        self,
        made: Made,
        signer: Key,
        *,
        sha1: bool = False,
        keep_extensions: bool = False,
        serial: bytes | None = None,
    ) -> Made:
        """*made* again as v1, signed with *signer* (P-256), which must be its issuer's key."""
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        parts = _elements(_content(made.certificate.tbs_certificate_bytes))
        kept = [part for part in parts if part[0] != 0xA0 and (keep_extensions or part[0] != 0xA3)]
        algorithm = bytes.fromhex("300906072a8648ce3d0401") if sha1 else kept[1]  # ecdsa-with-SHA1
        kept[1] = algorithm
        if serial is not None:
            kept[0] = _der(0x02, serial)
        tbs = _der(0x30, b"".join(kept))
        signature = signer.sign(tbs, ec.ECDSA(hashes.SHA1() if sha1 else hashes.SHA256()))  # noqa: S303
        der = _der(0x30, tbs + algorithm + _der(0x03, b"\0" + signature))
        return Made(x509.load_der_x509_certificate(der), made.key)


@pytest.fixture(scope="session")
def as_v1() -> AsV1:
    """Makes X.509 v1 certificates, see `AsV1`."""
    return AsV1()


@pytest.fixture(scope="session")
def now() -> datetime:
    """When the tests take place: about now, since openssl and TLS see the real clock; whole seconds, UTC."""
    return datetime.now(UTC).replace(microsecond=0)


@pytest.fixture(scope="session")
def authority(now: datetime) -> CertificateAuthority:
    """The CA of the trust domain: a self-signed P-256 root."""
    return CertificateAuthority.create(now=now)


@pytest.fixture(scope="session")
def bundle(authority: CertificateAuthority) -> TrustBundle:
    """The trust bundle that holds `authority` alone."""
    return authority.bundle


@pytest.fixture(scope="session")
def root(authority: CertificateAuthority) -> Made:
    """Certificate and key of `authority`."""
    return Made(authority.certificate, authority.key)


@pytest.fixture(scope="session")
def forge(root: Made, now: datetime) -> Forge:
    """Makes certificates with one thing wrong, see `Forge`."""
    return Forge(root, now)


def _key_usage(bits: Sequence[str]) -> x509.KeyUsage:
    return x509.KeyUsage(**{name: name in bits for name in KEY_USAGE_BITS})


def _der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    octets = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def _header(der: bytes) -> tuple[int, int]:
    """Where the content of the first element of *der* starts and ends."""
    if der[1] < 0x80:
        return 2, 2 + der[1]
    start = 2 + (der[1] & 0x7F)
    return start, start + int.from_bytes(der[2:start], "big")


def _content(der: bytes) -> bytes:
    start, end = _header(der)
    return der[start:end]


def _elements(content: bytes) -> list[bytes]:
    found = []
    while content:
        _, end = _header(content)
        found.append(content[:end])
        content = content[end:]
    return found
