"""Proof of possession: what a key has signed for one server, and nothing that only looks like it."""

from __future__ import annotations

import json
from base64 import b64encode, urlsafe_b64encode
from datetime import UTC, datetime
from typing import Any

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from parallax.security.errors import InvalidRequest, UntrustedChain
from parallax.security.identity import Identity, control_plane
from parallax.security.keys import PrivateKey, generate_key
from parallax.security.possession import TYPE, Proof, Wish
from parallax.security.profiles import LeafProfile, self_signed_template

AGENT = Identity.parse_short("agent/07048933")
SERVER = control_plane()
WISH = Wish(SERVER, "a nonce", b"\x30\x00\xff a request")


def certificate(key: PrivateKey) -> x509.Certificate:
    template = self_signed_template(AGENT, key.public_key(), LeafProfile(sans=()), datetime.now(UTC), 1)
    return template.sign(key, hashes.SHA256())


def signed(
    key: Any, header: dict[str, Any], claims: dict[str, Any] | None = None, algorithm: str = "ES256"
) -> str:
    claims = {"aud": str(SERVER), "nonce": "a nonce", "csr": "AAAA"} if claims is None else claims
    return jwt.encode(claims, key, algorithm, header)


def x5c(*leaves: x509.Certificate) -> dict[str, Any]:
    return {"typ": TYPE, "x5c": [b64encode(leaf.public_bytes(Encoding.DER)).decode() for leaf in leaves]}


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP256R1()),
        ec.generate_private_key(ec.SECP384R1()),
        rsa.generate_private_key(65537, 2048),
    ],
    ids=["p256", "p384", "rsa"],
)
def test_what_was_signed_is_read(key: PrivateKey) -> None:
    leaf = certificate(key)
    proof = Proof.parse(WISH.sign(leaf, key))
    assert proof.certificate == leaf
    assert proof.verify(SERVER) == WISH


def test_any_jose_library_can_make_one() -> None:
    key = generate_key()
    assert Proof.parse(signed(key, x5c(certificate(key)))).verify(SERVER) == Wish(SERVER, "a nonce", bytes(3))


def test_another_key_is_refused() -> None:
    key = generate_key()
    with pytest.raises(UntrustedChain):
        Proof.parse(WISH.sign(certificate(key), generate_key())).verify(SERVER)


def test_one_for_another_server_is_refused() -> None:
    key = generate_key()
    proof = Proof.parse(WISH.sign(certificate(key), key))
    for other in (control_plane("elsewhere.local"), AGENT):
        with pytest.raises(UntrustedChain):
            proof.verify(other)


@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_with_a_part_of_another_is_refused(part: int) -> None:
    """The certificate, or what was asked for, or the signature."""
    one, two = generate_key(), generate_key()
    parts = WISH.sign(certificate(one), one).split(".")
    parts[part] = Wish(SERVER, "a nonce", b"another").sign(certificate(two), two).split(".")[part]
    with pytest.raises(UntrustedChain):
        Proof.parse(".".join(parts)).verify(SERVER)


@pytest.mark.parametrize("missing", ["aud", "nonce", "csr"])
def test_one_without_a_part_is_refused(missing: str) -> None:
    key = generate_key()
    claims = {"aud": str(SERVER), "nonce": "a nonce", "csr": "AAAA"}
    del claims[missing]
    with pytest.raises(UntrustedChain):
        Proof.parse(signed(key, x5c(certificate(key)), claims)).verify(SERVER)


@pytest.mark.parametrize("csr", [7, None, ["AAAA"], "AAAAA", "ä"])
def test_one_whose_request_is_none_is_refused(csr: Any) -> None:
    key = generate_key()
    claims = {"aud": str(SERVER), "nonce": "a nonce", "csr": csr}
    with pytest.raises(UntrustedChain):
        Proof.parse(signed(key, x5c(certificate(key)), claims)).verify(SERVER)


def test_an_algorithm_that_is_not_the_keys_is_refused() -> None:
    """RFC 8725 §2.1: `none`, or the public key taken for a secret."""
    key = generate_key()
    leaf = certificate(key)
    point = key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    for text in (
        signed(None, x5c(leaf), algorithm="none"),
        signed(point, x5c(leaf), algorithm="HS256"),
        signed(rsa.generate_private_key(65537, 2048), x5c(leaf), algorithm="RS256"),
        signed(ec.generate_private_key(ec.SECP384R1()), x5c(leaf), algorithm="ES384"),
    ):
        with pytest.raises(UntrustedChain):
            Proof.parse(text).verify(SERVER)


def test_what_was_signed_for_something_else_is_none() -> None:
    """RFC 8725 §3.11: or a JWT of another service's could be one of ours."""
    key = generate_key()
    leaf = certificate(key)
    for header in (x5c(leaf) | {"typ": "JWT"}, x5c(leaf) | {"typ": None}):
        with pytest.raises(InvalidRequest):
            Proof.parse(signed(key, header))


def header(**fields: Any) -> str:
    content = urlsafe_b64encode(json.dumps({"alg": "ES256", "typ": TYPE} | fields).encode())
    return f"{content.rstrip(b'=').decode()}.e30.AAAA"


KEY = generate_key()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "..",
        "nonsense",
        "ä.ä.ä",
        header(),
        header(x5c=7),
        header(x5c=[]),
        header(x5c=[7]),
        header(x5c="A"),
        header(x5c=["nonsense"]),
        header(x5c=x5c(*[certificate(KEY)] * 2)["x5c"]),
        header(x5c=[x5c(certificate(KEY))["x5c"][0] + "\n!"]),
        header(x5c=x5c(certificate(KEY))["x5c"], crit=["unknown"]),
        f"{urlsafe_b64encode(b'[' * 20_000).decode()}.e30.AAAA",
    ],
)
def test_what_is_none_says_so(text: str) -> None:
    with pytest.raises(InvalidRequest, match="not a proof"):
        Proof.parse(text)
