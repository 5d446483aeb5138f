"""Private keys: which kinds we make, how they are written, which public keys are strong enough."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import TYPE_CHECKING, Final, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from parallax.security.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

MIN_RSA_BITS: Final = 2048  # RFC 9325 §4.5; TLS itself lets a client in with 1,024 (measured)
MAX_RSA_BITS: Final = 8192  # a handshake costs the holder the cube of it, and its peers the square
EXPONENTS: Final = range(65537, 1 << 33)  # from FIPS 186-5 §5.4; gRPC's BoringSSL takes none longer
CURVES: Final = frozenset({"secp256r1", "secp384r1"})  # what gRPC's BoringSSL signs with by default
_ECDSA_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")  # RFC 5758 §3.2
_RSA_SHA256: Final = bytes.fromhex("300d06092a864886f70d01010b0500")  # RFC 4055 §5
NEEDED: Final = f"P-256, P-384 or RSA of at least {MIN_RSA_BITS} bits is needed"


class KeyType(StrEnum):
    """The kinds of key we generate; P-256 unless asked otherwise."""

    P256 = "p256"
    RSA2048 = "rsa-2048"
    RSA4096 = "rsa-4096"


def generate_key(key_type: KeyType = KeyType.P256) -> PrivateKey:
    """A new private key; RSA-4096 takes up to some seconds."""
    match key_type:
        case KeyType.P256:
            return ec.generate_private_key(ec.SECP256R1())
        case KeyType.RSA2048:
            return rsa.generate_private_key(public_exponent=65537, key_size=2048)
        case KeyType.RSA4096:
            return rsa.generate_private_key(public_exponent=65537, key_size=4096)


def generate_like(key: PrivateKey) -> PrivateKey:
    """A new private key of the kind and size of *key*."""
    if isinstance(key, rsa.RSAPrivateKey):
        return rsa.generate_private_key(public_exponent=65537, key_size=key.key_size)
    return ec.generate_private_key(key.curve)


def key_to_pem(key: PrivateKey, passphrase: bytes | None = None) -> bytes:
    """
    *key* as PKCS#8 PEM (RFC 5958), encrypted if there is a passphrase.

    Raises:
        ConfigError: The passphrase is empty: that would look protected and not be.
    """
    encryption: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        if not passphrase:
            raise ConfigError("empty passphrase")
        encryption = serialization.BestAvailableEncryption(passphrase)
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)


def parse_key(pem: bytes, passphrase: bytes | None = None) -> PrivateKey:
    """
    The private key in *pem*: PKCS#8, or the older forms that openssl writes.

    A passphrase given for a key that is not encrypted is ignored. The strength is not checked
    here: what counts is the certificate's key, see `check_strength`.

    Raises:
        ConfigError: The text is the cause alone, for the caller to put the file's name before:
            "encrypted and no passphrase", "wrong passphrase", "not a private key (…)".
    """
    try:
        key = _load(pem, passphrase)
    except TypeError:
        raise ConfigError("encrypted and no passphrase") from None
    except (ValueError, UnsupportedAlgorithm):  # its own text is OpenSSL's error stack: no help to anybody
        raise ConfigError("wrong passphrase" if is_encrypted(pem) else "not a private key (PEM)") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise ConfigError(f"not a private key that gRPC peers accept: {NEEDED}")
    return key


def fits(key: PrivateKey, certificate: Certificate) -> bool:
    """Whether *certificate* is for the public half of *key*."""
    try:
        return key.public_key() == certificate.public_key()
    except (ValueError, UnsupportedAlgorithm):
        return False


def signature_algorithm(key: PrivateKey) -> bytes:
    """How *key* signs, see `sign`: an AlgorithmIdentifier, DER."""
    return _RSA_SHA256 if isinstance(key, rsa.RSAPrivateKey) else _ECDSA_SHA256


def sign(key: PrivateKey, content: bytes) -> bytes:
    """The signature of *key* on *content*, with SHA-256, as certificates and CRLs have it."""
    if isinstance(key, rsa.RSAPrivateKey):
        return key.sign(content, padding.PKCS1v15(), hashes.SHA256())
    return key.sign(content, ec.ECDSA(hashes.SHA256()))


def key_id(public_key: object) -> bytes:
    """SHA-256 of the SubjectPublicKeyInfo of *public_key*, 32 bytes: what an issuer is known by."""
    return hashlib.sha256(key_info(check_strength(public_key))).digest()


def key_info(public_key: PublicKey) -> bytes:
    """The SubjectPublicKeyInfo of *public_key*, DER."""
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return public_key.public_bytes(encoding, form)


def check_strength(public_key: object) -> PublicKey:
    """
    *public_key* itself, if gRPC peers accept it and it is strong enough.

    Ed25519 is refused because the handshake between gRPC peers has no common signature algorithm
    for it (measured).

    Raises:
        VerificationError: It is of another algorithm, another curve or too short.
    """
    match public_key:
        case rsa.RSAPublicKey() if public_key.key_size >= MIN_RSA_BITS:
            return public_key
        case rsa.RSAPublicKey():
            raise VerificationError(f"RSA key of {public_key.key_size} bits: {NEEDED}")
        case ec.EllipticCurvePublicKey() if public_key.curve.name in CURVES:
            return public_key
        case ec.EllipticCurvePublicKey():
            raise VerificationError(f"EC key on curve {public_key.curve.name}: {NEEDED}")
    algorithm = type(public_key).__name__.removesuffix("PublicKey")
    raise VerificationError(f"{algorithm} key, which gRPC peers cannot use: {NEEDED}")


def check_cost(public_key: PublicKey) -> PublicKey:
    """
    *public_key* itself, if it takes no longer than it should to verify with it, which strangers can ask for.

    Raises:
        VerificationError: It is of RSA, and too long or with an unusual exponent.
    """
    if isinstance(public_key, rsa.RSAPublicKey):
        if public_key.key_size > MAX_RSA_BITS:
            raise VerificationError(f"RSA key of {public_key.key_size} bits: {MAX_RSA_BITS} are the most")
        if public_key.public_numbers().e not in EXPONENTS:
            raise VerificationError("RSA key with an exponent that is not usual: make one with 65537")
    return public_key


def _load(pem: bytes, passphrase: bytes | None) -> object:
    return serialization.load_pem_private_key(pem, passphrase if is_encrypted(pem) else None)


def is_encrypted(pem: bytes) -> bool:
    """Whether the PEM says so itself: PKCS#8 (RFC 7468 §11) or OpenSSL's older header (RFC 1421)."""
    return b"BEGIN ENCRYPTED PRIVATE KEY" in pem or b"Proc-Type: 4,ENCRYPTED" in pem
