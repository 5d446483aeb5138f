"""Reading one certificate, so that a malformed part of it is an error of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from parallax.security.errors import Expired, UntrustedChain
from parallax.security.identity import clip

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

_E = TypeVar("_E", bound=x509.ExtensionType)

# What cryptography raises on malformed content; it parses lazily, so they come at first use.
MALFORMED: Final = (
    ValueError,
    TypeError,  # a BIT STRING as a common name, for example
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


def find_extension(certificate: x509.Certificate, kind: type[_E]) -> _E | None:
    """
    The extension of *kind*, or None if *certificate* has none.

    Raises:
        UntrustedChain: Some extension of *certificate* is malformed or present twice.
    """
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except MALFORMED as exc:
        raise UntrustedChain(f"malformed extension: {clip(str(exc))}") from exc


def check_validity(certificate: x509.Certificate, now: datetime) -> None:
    """
    Pass if *now*, aware UTC, lies within the validity, both ends included (RFC 5280 §4.1.2.5).

    Raises:
        Expired: "expired at …" or "not valid before …"; the text is the cause alone.
        UntrustedChain: The validity cannot be read: X.509 has a year 0.
    """
    try:
        not_before, not_after = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except MALFORMED as exc:
        raise UntrustedChain(f"malformed validity: {clip(str(exc))}") from exc
    if now > not_after:
        raise Expired(f"expired at {not_after:%Y-%m-%dT%H:%M:%SZ}")
    if now < not_before:
        raise Expired(f"not valid before {not_before:%Y-%m-%dT%H:%M:%SZ}")


def check_ca(certificate: x509.Certificate, usages: Iterable[x509.ObjectIdentifier] = ()) -> None:
    """
    Pass if *certificate* may sign others (RFC 5280 §4.2.1.3, §4.2.1.9).

    An absent keyUsage or extendedKeyUsage restricts nothing: `openssl req -x509` writes none.
    Neither validity nor signature is checked.

    Args:
        usages: The extended key usages that it must not exclude.

    Raises:
        UntrustedChain: It is not a CA, or not for this; the text is the cause alone.
    """
    constraints = find_extension(certificate, x509.BasicConstraints)
    if constraints is None or not constraints.ca:
        raise UntrustedChain("not a CA (basicConstraints lacks CA:TRUE)")
    key_usage = find_extension(certificate, x509.KeyUsage)
    if key_usage is not None and not key_usage.key_cert_sign:
        raise UntrustedChain("not a CA (keyUsage lacks keyCertSign)")
    check_extended_usage(certificate, usages)


def check_extended_usage(certificate: x509.Certificate, usages: Iterable[x509.ObjectIdentifier]) -> None:
    """
    Pass if *certificate* has no extendedKeyUsage, or one that names all of *usages* (RFC 5280 §4.2.1.12).

    anyExtendedKeyUsage does not count: TLS stacks do not take it either.

    Raises:
        UntrustedChain: One of *usages* is missing; the text is the cause alone.
    """
    extended = find_extension(certificate, x509.ExtendedKeyUsage)
    for usage in usages:
        if extended is not None and usage not in extended:
            # `_name` is the OID's name in RFC 5280: clientAuth, serverAuth.
            raise UntrustedChain(f"extended key usage lacks {usage._name}")  # noqa: SLF001


def is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether *issuer* has the name and the key that *certificate* was issued with, nothing else."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *MALFORMED):
        return False
    return True


def subject_of(certificate: x509.Certificate) -> str:
    """The subject for a message, quoted and cut: whoever made the certificate chose it."""
    return _quoted(certificate, "subject")


def issuer_of(certificate: x509.Certificate) -> str:
    """The issuer's name for a message, quoted and cut."""
    return _quoted(certificate, "issuer")


def _quoted(certificate: x509.Certificate, field: str) -> str:
    try:
        name: x509.Name = getattr(certificate, field)
        return clip(name.rfc4514_string())
    except MALFORMED:
        return f"(malformed {field})"
