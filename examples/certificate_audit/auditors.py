"""Three agents that judge X.509 certificates; each runs as its own process: `python auditors.py keys`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa

from parallax.sdk import SecureAgent

Finding = tuple[str, str]  # "fail" or "warn", and what is wrong


class Auditor(SecureAgent):
    """Takes a certificate as DER bytes and answers with a verdict and its findings."""

    subject: ClassVar[str]

    def analyze(self, task: str, data: Any) -> tuple[Any, float]:
        """Judge one certificate; a plain `def`, because parsing is work for a thread."""
        certificate = x509.load_der_x509_certificate(data)
        findings = list(self.judge(certificate))
        levels = {level for level, _ in findings}
        verdict = "fail" if "fail" in levels else "warn" if levels else "ok"
        # A warning is a matter of taste, the rest is not.
        return {
            "verdict": verdict,
            "findings": [text for _, text in findings],
        }, 0.8 if verdict == "warn" else 1.0

    def judge(self, certificate: x509.Certificate) -> Iterator[Finding]:
        """What is wrong with *certificate*."""
        raise NotImplementedError


class ValidityAuditor(Auditor):
    """Is it in force, and for how long?"""

    subject = "validity"

    def judge(self, certificate: x509.Certificate) -> Iterator[Finding]:
        now = datetime.now(UTC)
        if now > certificate.not_valid_after_utc:
            yield "fail", "expired"
        elif certificate.not_valid_after_utc - now < timedelta(days=365):
            yield "warn", "expires within a year"
        if now < certificate.not_valid_before_utc:
            yield "fail", "not valid yet"
        if certificate.not_valid_after_utc - certificate.not_valid_before_utc > timedelta(days=366 * 25):
            yield "warn", "valid for more than 25 years"


class KeyAuditor(Auditor):
    """Is the key strong enough?"""

    subject = "keys"

    def judge(self, certificate: x509.Certificate) -> Iterator[Finding]:
        match certificate.public_key():
            case rsa.RSAPublicKey(key_size=bits) if bits < 2048:
                yield "fail", f"RSA with {bits} bits"
            case rsa.RSAPublicKey(key_size=bits) if bits < 3072:
                yield "warn", f"RSA with {bits} bits, too few beyond 2030 (NIST SP 800-57)"
            case rsa.RSAPublicKey() | ed25519.Ed25519PublicKey() | ed448.Ed448PublicKey():
                pass
            case ec.EllipticCurvePublicKey(key_size=bits, curve=curve):
                if bits < 256:
                    yield "fail", f"curve {curve.name}"
            case other:
                yield "fail", f"unusual key: {type(other).__name__}"
        if isinstance(certificate.signature_hash_algorithm, hashes.MD5 | hashes.SHA1):
            yield "warn", f"signed with {certificate.signature_hash_algorithm.name}, harmless on a root alone"


class ExtensionAuditor(Auditor):
    """Does it say what a CA certificate has to say (RFC 5280 §4.2.1)?"""

    subject = "extensions"

    def judge(self, certificate: x509.Certificate) -> Iterator[Finding]:
        if certificate.version is not x509.Version.v3:
            yield "fail", "not X.509 version 3"
            return
        constraints = _extension(certificate, x509.BasicConstraints)
        if constraints is None or not constraints.value.ca:
            yield "fail", "basicConstraints does not say CA:TRUE"
        elif not constraints.critical:
            yield "warn", "basicConstraints is not critical"
        usage = _extension(certificate, x509.KeyUsage)
        if usage is None:
            yield "warn", "no keyUsage"
        elif not usage.value.key_cert_sign:
            yield "fail", "keyUsage lacks keyCertSign"
        if _extension(certificate, x509.SubjectKeyIdentifier) is None:
            yield "warn", "no subjectKeyIdentifier"


def _extension(certificate: x509.Certificate, kind: type[x509.ExtensionType]) -> Any:
    try:
        return certificate.extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        return None


AUDITORS: dict[str, type[Auditor]] = {
    cls.subject: cls for cls in (ValidityAuditor, KeyAuditor, ExtensionAuditor)
}

if __name__ == "__main__":
    subject = sys.argv[1]
    AUDITORS[subject](f"auditor-{subject}", f"Auditor of {subject}", [f"audit-{subject}"]).run()
