"""The trust bundle: the root certificates accepted for a trust domain."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.security.certificate import MALFORMED, check_ca, subject_of
from parallax.security.errors import ConfigError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class TrustBundle:
    """
    The roots, never none, each of them a CA.

    An empty bundle would make gRPC refuse everybody without a word, and a leaf among the roots
    would act as a CA whatever it says of itself (both measured): neither can be built. Validity
    in time is not checked here: a root may expire while its successor stands beside it.

    Raises:
        ConfigError: There is no root, or one of them is not a CA; the text is the cause alone.
    """

    roots: tuple[x509.Certificate, ...]
    pem: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.roots:
            raise ConfigError("the trust bundle holds no certificate")
        for root in self.roots:
            try:
                check_ca(root)
            except VerificationError as exc:
                raise ConfigError(f"{subject_of(root)} cannot be a root of the trust bundle: {exc}") from exc
        object.__setattr__(self, "pem", certificates_to_pem(self.roots))

    @property
    def hash(self) -> bytes:
        """What tells it from others: SHA-256 over the fingerprints of its roots, in ascending order."""
        fingerprints = sorted(root.fingerprint(hashes.SHA256()) for root in self.roots)
        return hashlib.sha256(b"".join(fingerprints)).digest()

    @classmethod
    def parse(cls, pem: bytes) -> TrustBundle:
        """The bundle of all certificates in *pem*, each once."""
        return cls(tuple(dict.fromkeys(parse_certificates(pem))))


def parse_certificates(pem: bytes) -> tuple[x509.Certificate, ...]:
    """
    All certificates in *pem* (RFC 7468), in order, at least one; other text between them is ignored.

    Raises:
        ConfigError: There is none, or one is damaged; the text is the cause alone.
    """
    try:
        return tuple(x509.load_pem_x509_certificates(pem))
    except MALFORMED:  # its own text names no line and suggests a web page
        raise ConfigError("not a certificate (PEM), or a damaged one") from None


def certificates_to_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """*certificates* one after the other, as PEM."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)
