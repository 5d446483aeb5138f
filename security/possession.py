"""Proof of possession: what the holder of a certificate's key signs where no handshake shows it."""

from __future__ import annotations

from base64 import b64decode, b64encode, urlsafe_b64decode, urlsafe_b64encode
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Self

import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.security.certificate import MALFORMED
from parallax.security.errors import InvalidRequest, UntrustedChain
from parallax.security.keys import PublicKey, check_strength

if TYPE_CHECKING:
    from parallax.security.identity import Identity
    from parallax.security.keys import PrivateKey

TYPE: Final = "parallax-exchange+jwt"  # what is signed for something else has another (RFC 8725 §3.11)

# JSON that is nested too deeply for Python is no better than none.
_UNREADABLE: Final = (jwt.PyJWTError, RecursionError, *MALFORMED)


@dataclass(frozen=True, slots=True)
class Wish:
    """
    That the holder of a certificate wants another one, for another key.

    Args:
        server: Who is asked: at nobody else it is worth anything.
        nonce: Which that server gave, for this once.
        request: PKCS#10, DER; signed with it, so that nobody puts another in its place.
    """

    server: Identity
    nonce: str
    request: bytes = field(repr=False)

    def sign(self, certificate: x509.Certificate, key: PrivateKey) -> str:
        """It as a JWT (RFC 7519), signed with the *key* of *certificate*, which is in its header."""
        claims = {"aud": str(self.server), "nonce": self.nonce, "csr": _to_text(self.request)}
        leaf = b64encode(certificate.public_bytes(Encoding.DER)).decode()
        return jwt.encode(claims, key, _algorithm(key.public_key()), {"typ": TYPE, "x5c": [leaf]})


@dataclass(frozen=True, slots=True)
class Proof:
    """
    A wish as it is sent, and the certificate that it comes with. Nothing in it is believed yet.

    Attributes:
        certificate: By its holder's own word; whether it is good for anything is for the caller to know.
    """

    text: str = field(repr=False)
    certificate: x509.Certificate

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        The proof spelled *text*; raises InvalidRequest if it is none.

        Its certificate comes alone (x5c, RFC 7515 §4.1.6): nobody else vouches for one that is pinned.
        """
        try:
            header = jwt.get_unverified_header(text)
            (leaf,) = header["x5c"]
            if header.get("typ") != TYPE:
                raise ValueError("signed for something else")
            return cls(text, x509.load_der_x509_certificate(b64decode(leaf, validate=True)))
        except (*_UNREADABLE, KeyError) as exc:
            raise InvalidRequest(f"not a proof (a JWT of type {TYPE}, with x5c), or a damaged one") from exc

    def verify(self, server: Identity) -> Wish:
        """
        The wish, which the holder of the certificate's key has signed for *server*.

        That it is new is for the caller to know, by the nonce.

        Raises:
            UntrustedChain: It is not, or there are parts missing.
        """
        try:
            key = check_strength(self.certificate.public_key())
            claims: dict[str, Any] = jwt.decode(
                self.text,
                key,
                [_algorithm(key)],  # the header's own word for it counts for nothing (RFC 8725 §3.1)
                {"require": ["aud", "nonce", "csr"]},
                audience=str(server),
            )
            return Wish(server, str(claims["nonce"]), _from_text(claims["csr"]))
        except _UNREADABLE as exc:
            raise UntrustedChain(f"the key of the certificate has not signed this for {server}") from exc


def _algorithm(key: PublicKey) -> str:
    """What *key* signs by, as JWS calls it (RFC 7518 §3.1)."""
    if isinstance(key, rsa.RSAPublicKey):
        return "RS256"
    return "ES256" if key.curve.name == "secp256r1" else "ES384"


def _to_text(request: bytes) -> str:
    """Base64url without padding, as ACME sends a request (RFC 8555 §7.4)."""
    return urlsafe_b64encode(request).rstrip(b"=").decode()


def _from_text(text: str) -> bytes:
    return urlsafe_b64decode(text + "=" * (-len(text) % 4))
