"""Private keys: written, read back, and the ones that are no use."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from parallax.security.errors import ConfigError, VerificationError
from parallax.security.keys import KeyType, check_strength, fits, generate_key, key_to_pem, parse_key

if TYPE_CHECKING:
    from tests.security.conftest import Made

NEEDED = r"P-256, P-384 or RSA of at least 2048 bits is needed$"


@pytest.fixture(scope="module")
def pem() -> bytes:
    return key_to_pem(generate_key())


@pytest.fixture(scope="module")
def encrypted() -> bytes:
    return key_to_pem(generate_key(), b"correct horse")


def test_a_generated_key_is_of_the_type_asked_for() -> None:
    p256, rsa2048 = generate_key(), generate_key(KeyType.RSA2048)
    assert isinstance(p256, ec.EllipticCurvePrivateKey)
    assert p256.curve.name == "secp256r1"
    assert isinstance(rsa2048, rsa.RSAPrivateKey)
    assert rsa2048.key_size == 2048
    for key in (p256, rsa2048):
        assert check_strength(key.public_key()) == key.public_key()


def test_an_rsa_4096_key_has_4096_bits() -> None:
    key = generate_key(KeyType.RSA4096)
    assert isinstance(key, rsa.RSAPrivateKey)
    assert key.key_size == 4096


@pytest.mark.parametrize("key_type", [KeyType.P256, KeyType.RSA2048])
@pytest.mark.parametrize("passphrase", [None, b"correct horse", "pässwort".encode()])
def test_parse_reads_what_was_written(key_type: KeyType, passphrase: bytes | None) -> None:
    key = generate_key(key_type)
    pem = key_to_pem(key, passphrase)
    assert (b"ENCRYPTED" in pem) == (passphrase is not None)
    assert parse_key(pem, passphrase).public_key() == key.public_key()


def test_a_passphrase_for_a_plain_key_is_ignored(pem: bytes) -> None:
    assert parse_key(pem, b"not needed").public_key() == parse_key(pem).public_key()


def test_encrypted_without_a_passphrase(encrypted: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^encrypted and no passphrase$"):
        parse_key(encrypted)


@pytest.mark.parametrize("passphrase", [b"wrong", b"", b"correct horse\n"])
def test_wrong_passphrase(encrypted: bytes, passphrase: bytes) -> None:
    with pytest.raises(ConfigError, match=r"^(wrong passphrase|encrypted and no passphrase)$"):
        parse_key(encrypted, passphrase)


def test_an_empty_passphrase_does_not_protect() -> None:
    with pytest.raises(ConfigError, match=r"^empty passphrase$"):
        key_to_pem(generate_key(), b"")


@pytest.mark.parametrize("damage", ["empty", "garbage", "torn", "flipped", "header only", "nul"])
def test_damaged_key_is_named_as_such_and_never_quoted(pem: bytes, damage: str) -> None:
    body = pem.splitlines()[1]
    text = {
        "empty": b"",
        "garbage": b"\xff\x00 no key",
        "torn": pem[: len(pem) // 2],
        "flipped": pem.replace(body, body[::-1]),
        "header only": b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
        "nul": b"\0" * 100,
    }[damage]
    with pytest.raises(ConfigError) as caught:
        parse_key(text)
    assert str(caught.value) == "not a private key (PEM)"
    assert caught.value.__suppress_context__


def test_a_certificate_is_not_a_key(root: Made) -> None:
    with pytest.raises(ConfigError, match=r"^not a private key \(PEM\)$"):
        parse_key(root.certificate.public_bytes(Encoding.PEM))


def test_a_key_of_another_algorithm_is_refused() -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(ConfigError, match=r"^not a private key that gRPC peers accept: " + NEEDED):
        parse_key(pem)


def test_openssl_and_we_read_each_others_keys(
    require_tool: Callable[[str], str], tmp_path: Path, encrypted: bytes
) -> None:
    """The guide's `genrsa`, with and without a passphrase, the older form, and back."""
    openssl = require_tool("openssl")

    def run(*arguments: str) -> str:
        return subprocess.run(
            [openssl, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout

    run("genrsa", "-out", "plain.pem", "2048")
    run("genrsa", "-aes256", "-passout", "pass:secret", "-out", "protected.pem", "2048")
    run("genrsa", "-traditional", "-aes256", "-passout", "pass:secret", "-out", "traditional.pem", "2048")
    run("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", "ec.pem")
    check_strength(parse_key((tmp_path / "plain.pem").read_bytes()).public_key())
    check_strength(parse_key((tmp_path / "ec.pem").read_bytes()).public_key())
    for name in ("protected.pem", "traditional.pem"):
        protected = (tmp_path / name).read_bytes()
        parse_key(protected, b"secret")
        with pytest.raises(ConfigError, match=r"^encrypted and no passphrase$"):
            parse_key(protected)
        with pytest.raises(ConfigError, match=r"^wrong passphrase$"):
            parse_key(protected, b"wrong")
    (tmp_path / "ours.pem").write_bytes(encrypted)
    assert "Private-Key" in run("pkey", "-in", "ours.pem", "-passin", "pass:correct horse", "-noout", "-text")


@pytest.mark.parametrize(
    ("key", "cause"),
    [
        (rsa.generate_private_key(65537, 1024), "RSA key of 1024 bits"),  # noqa: S505
        (ec.generate_private_key(ec.SECP521R1()), "EC key on curve secp521r1"),
        (ec.generate_private_key(ec.SECP256K1()), "EC key on curve secp256k1"),
        (ed25519.Ed25519PrivateKey.generate(), "Ed25519 key, which gRPC peers cannot use"),
        (dsa.generate_private_key(1024), "DSA key, which gRPC peers cannot use"),  # noqa: S505
    ],
    ids=lambda value: value.split()[-1] if isinstance(value, str) else "",
)
def test_key_too_weak_or_useless_between_grpc_peers(
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | dsa.DSAPrivateKey,
    cause: str,
) -> None:
    with pytest.raises(VerificationError, match=rf"^{cause}: {NEEDED}"):
        check_strength(key.public_key())


def test_p384_is_strong_enough() -> None:
    check_strength(ec.generate_private_key(ec.SECP384R1()).public_key())


def test_a_key_fits_its_own_certificate_only(root: Made) -> None:
    assert not isinstance(root.key, ed25519.Ed25519PrivateKey)
    assert fits(root.key, root.certificate)
    assert not fits(generate_key(), root.certificate)
    assert not fits(generate_key(KeyType.RSA2048), root.certificate)
