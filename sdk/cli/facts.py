"""What a certificate says, ready to be shown."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from parallax.sdk.cli.render import distance, instant
from parallax.security.certificate import MALFORMED, check_ca, find_extension
from parallax.security.errors import ConfigError, ParallaxError, VerificationError
from parallax.security.identity import Identity, clip
from parallax.security.verification import identity_of

SOON: Final = timedelta(days=30)
_CURVES: Final = {"secp256r1": "p256", "secp384r1": "p384", "secp521r1": "p521"}


class Status(StrEnum):
    """Where now lies in the validity of a certificate."""

    VALID = "valid"
    ENDS_SOON = "ends soon"
    EXPIRED = "expired"
    NOT_YET_VALID = "not yet valid"


@dataclass(frozen=True, slots=True)
class Facts:
    """
    One certificate.

    Attributes:
        identity: None where it names none, and then `identity_problem` says why, unless it is a CA.
        sans: `DNS:localhost` and the like, in the certificate's order.
        serial: Lower-case hex.
        fingerprint: SHA-256 of the DER, lower-case hex.
    """

    subject: str
    issuer: str
    identity: Identity | None
    identity_problem: str | None
    is_ca: bool
    sans: tuple[str, ...]
    not_before: datetime
    not_after: datetime
    status: Status
    serial: str
    key_type: str
    fingerprint: str

    def as_json(self) -> dict[str, object]:
        """For programs."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        """`<kind>/<name>`; empty where there is no identity."""
        return self.identity.short if self.identity else ""

    def as_lines(self, now: datetime) -> list[tuple[str, ...]]:
        """For people: each a name and the lines of its value."""
        return [
            ("identity", str(self.identity or f"none: {self.identity_problem or 'it is a CA'}")),
            ("subject", self.subject),
            ("names", *(self.sans or ("none",))),
            ("validity", self.verdict(now), f"{instant(self.not_before)} to {instant(self.not_after)}"),
            ("key", self.key_type),
            ("serial", self.serial),
            ("fingerprint", f"SHA-256 {self.fingerprint}"),
            ("issuer", self.issuer),
        ]

    def verdict(self, now: datetime) -> str:
        """For people: where now lies in the validity."""
        match self.status:
            case Status.EXPIRED:
                return f"expired {distance(self.not_after, now)}"
            case Status.NOT_YET_VALID:
                return f"not valid yet, begins {distance(self.not_before, now)}"
            case Status.ENDS_SOON | Status.VALID:
                return f"ends {distance(self.not_after, now)}"


def facts_of(certificate: x509.Certificate, trust_domain: str, now: datetime) -> Facts:
    """
    What *certificate* says; nothing is verified.

    Raises:
        ConfigError: A part of it is malformed; the text is the cause alone.
    """
    try:
        return _facts_of(certificate, trust_domain, now)
    except VerificationError as exc:  # an extension that cannot be parsed
        raise ConfigError(str(exc)) from exc
    except MALFORMED as exc:
        raise ConfigError(f"malformed certificate: {clip(str(exc))}") from exc


def _facts_of(certificate: x509.Certificate, trust_domain: str, now: datetime) -> Facts:
    identity = problem = None
    is_ca = _is_ca(certificate)
    if not is_ca:
        try:
            identity = identity_of(certificate, trust_domain)
        except ParallaxError as exc:
            problem = str(exc)
    return Facts(
        subject=certificate.subject.rfc4514_string(),
        issuer=certificate.issuer.rfc4514_string(),
        identity=identity,
        identity_problem=problem,
        is_ca=is_ca,
        sans=_sans(certificate),
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        status=status_of(certificate, now),
        serial=f"{certificate.serial_number:x}",
        key_type=key_type_of(certificate),
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
    )


def status_of(certificate: x509.Certificate, now: datetime) -> Status:
    """Both ends of the validity belong to it (RFC 5280 §4.1.2.5)."""
    if now > certificate.not_valid_after_utc:
        return Status.EXPIRED
    if now < certificate.not_valid_before_utc:
        return Status.NOT_YET_VALID
    return Status.ENDS_SOON if certificate.not_valid_after_utc - now < SOON else Status.VALID


def key_type_of(certificate: x509.Certificate) -> str:
    """Spelled as `--key-type` is, where that has a word for it."""
    match certificate.public_key():
        case rsa.RSAPublicKey() as key:
            return f"rsa-{key.key_size}"
        case ec.EllipticCurvePublicKey() as key:
            return _CURVES.get(key.curve.name, key.curve.name)
        case key:
            return type(key).__name__.removesuffix("PublicKey").lower()


def _is_ca(certificate: x509.Certificate) -> bool:
    try:
        check_ca(certificate)
    except VerificationError:
        return False
    return True


def _sans(certificate: x509.Certificate) -> tuple[str, ...]:
    names = find_extension(certificate, x509.SubjectAlternativeName)
    return tuple(map(_spell, names)) if names else ()


def _spell(name: x509.GeneralName) -> str:
    match name:
        case x509.UniformResourceIdentifier():
            return f"URI:{name.value}"
        case x509.DNSName():
            return f"DNS:{name.value}"
        case x509.IPAddress():
            return f"IP:{name.value}"
        case x509.RFC822Name():
            return f"email:{name.value}"
        case _:
            return f"{type(name).__name__}:{name.value}"
