"""
Certificate revocation lists: what one issuer has withdrawn, signed by it (RFC 5280 §5).

One full list per issuer, of all that it has signed and that is not over yet: no deltas, no indirect
lists, nothing critical in it.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from datetime import UTC, timedelta
from functools import cache
from typing import TYPE_CHECKING, Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.security.certificate import MALFORMED, find_extension, subject_of
from parallax.security.der import (
    EXPLICIT_0,
    SEQUENCE,
    bit_string,
    element,
    instant,
    integer,
    octet_string,
)
from parallax.security.errors import ConfigError, Expired, InvalidRequest, UntrustedChain
from parallax.security.keys import check_strength, sign, signature_algorithm
from parallax.security.path import MAX_SERIAL, SOUND_HASHES
from parallax.security.profiles import authority_key_identifier, skew

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from parallax.security.authority import CertificateAuthority

LIFETIME: Final = timedelta(days=1)
_PEM: Final = b"-----BEGIN X509 CRL-----"
_END: Final = b"-----END X509 CRL-----"
_LINE: Final = 64  # RFC 7468 §2
_V2: Final = 1  # RFC 5280 §5.1.2.1
_CRL_NUMBER: Final = bytes.fromhex("0603551d14")  # 2.5.29.20, §5.2.3
_REASON_CODE: Final = bytes.fromhex("0603551d15")  # 2.5.29.21, §5.3.1
_AUTHORITY_KEY_IDENTIFIER: Final = bytes.fromhex("0603551d23")  # 2.5.29.35, §5.2.1


@dataclass(frozen=True, slots=True)
class RevokedSerial:
    """
    One certificate that its issuer has withdrawn.

    Args:
        serial: As in the certificate; whatever we let in has one of at most 20 octets.
        revoked_at: Aware UTC.
        reason: Unspecified is not written: RFC 5280 §5.3.1 would rather have none.
        ends_at: When the certificate is over anyway; None: nobody knows, and the entry stays.

    Attributes:
        der: How a list says so: encoded once, for one may be on thousands of lists (RFC 5280 §5.1.2.6).

    Raises:
        InvalidRequest: That is no serial number.
    """

    serial: int
    revoked_at: datetime
    reason: x509.ReasonFlags = x509.ReasonFlags.unspecified
    ends_at: datetime | None = None
    der: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.serial < 0 or self.serial.bit_length() > 8 * MAX_SERIAL:
            raise InvalidRequest(f"not a serial number of at most {MAX_SERIAL} octets: {self.serial:x}")
        parts = [integer(self.serial), instant(self.revoked_at.astimezone(UTC))]
        if self.reason is not x509.ReasonFlags.unspecified:
            parts.append(_reasons(self.reason))
        object.__setattr__(self, "der", element(SEQUENCE, *parts))


@dataclass(frozen=True, slots=True)
class CRL:
    """
    A list as it was read; whether to believe it is for `check` to say.

    Attributes:
        der: As it is published: `application/pkix-crl` (RFC 2585 §4.2).
        issuer: Who claims to have signed it.
        number: Higher than that of every list before it of the same issuer.
        this_update: When it was issued, or a little earlier.
        next_update: By when there is another one.
    """

    signed: x509.CertificateRevocationList = field(repr=False)
    der: bytes = field(repr=False)
    issuer: x509.Name
    number: int
    this_update: datetime
    next_update: datetime

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """
        The list in *content*, DER or PEM.

        Raises:
            ConfigError: It is none, or a damaged one, or has no number or no end; the text is the cause
                alone.
        """
        try:
            if _PEM in content:
                content = x509.load_pem_x509_crl(content).public_bytes(Encoding.DER)
            signed = x509.load_der_x509_crl(content)
            number = signed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            issuer, this_update, next_update = signed.issuer, signed.last_update_utc, signed.next_update_utc
        except x509.ExtensionNotFound:
            raise ConfigError("a CRL without a number (RFC 5280 §5.2.3)") from None
        except MALFORMED:  # its own text is about ASN.1
            raise ConfigError("not a CRL (DER or PEM), or a damaged one") from None
        if next_update is None:
            raise ConfigError("a CRL that does not say when the next one comes (RFC 5280 §5.1.2.5)")
        return cls(signed, content, issuer, number, this_update, next_update)

    def __len__(self) -> int:
        """How many certificates it lists."""
        return len(self.signed)

    def __contains__(self, serial: int) -> bool:
        """Whether it lists the certificate with that serial number."""
        return self.signed.get_revoked_certificate_by_serial_number(serial) is not None

    @property
    def pem(self) -> bytes:
        """`der` as text (RFC 7468 §7); not by `signed`, which would encode each entry once more."""
        text = base64.b64encode(self.der)
        lines = (text[begin : begin + _LINE] for begin in range(0, len(text), _LINE))
        return b"\n".join([_PEM, *lines, _END, b""])

    def check(self, issuer: x509.Certificate, now: datetime) -> None:
        """
        Pass if it is the list of *issuer*, and fresh at *now*, aware UTC.

        Whether *issuer* itself is to be trusted is not checked.

        Raises:
            UntrustedChain: Another issuer, or one that may sign no lists; or a critical extension: it may
                say that this is but a part of the list.
            Expired: It is past its nextUpdate, or from the future.
        """
        if self.issuer != issuer.subject or not _is_signed_by(self.signed, issuer):
            raise UntrustedChain(f"the CRL is not signed by {subject_of(issuer)}")
        check_may_sign(issuer)
        if critical := [each.oid.dotted_string for each in self.signed.extensions if each.critical]:
            # RFC 5280 §5.2: with one that is not known it must not be used to tell who is revoked.
            raise UntrustedChain(f"the CRL has a critical extension that is not known: {critical[0]}")
        if now > self.next_update:
            raise Expired(f"the CRL is stale since {self.next_update:%Y-%m-%dT%H:%M:%SZ}")
        if now < self.this_update:
            raise Expired(f"the CRL is not valid before {self.this_update:%Y-%m-%dT%H:%M:%SZ}")


def issue_crl(
    authority: CertificateAuthority,
    number: int,
    revoked: Iterable[RevokedSerial],
    now: datetime,
    lifetime: timedelta = LIFETIME,
) -> CRL:
    """
    The list of all that *revoked* names, each once: put together, sign, read what was signed (RFC 5280 §5.1).

    It is backdated as leaves are: a reader whose clock is behind would refuse everybody.

    Raises:
        Expired: The CA is not within its validity.
        UntrustedChain: Its certificate is not for signing lists.
    """
    authority.check_usable(now)
    check_may_sign(authority.certificate)
    unique = {each.serial: each.der for each in revoked}
    entries = [unique[serial] for serial in sorted(unique)]
    algorithm = signature_algorithm(authority.key)
    # Not by cryptography: it encodes each entry anew, twice, for as long as which no other thread runs.
    tbs = element(
        SEQUENCE,
        integer(_V2),
        algorithm,
        authority.certificate.subject.public_bytes(),
        instant(now - skew(lifetime)),
        instant(now + lifetime),
        *([element(SEQUENCE, *entries)] if entries else []),  # §5.1.2.6: left out where there are none
        element(
            EXPLICIT_0,
            element(
                SEQUENCE,
                _extension(_AUTHORITY_KEY_IDENTIFIER, authority_key_identifier(authority.certificate)),
                _extension(_CRL_NUMBER, x509.CRLNumber(number)),
            ),
        ),
    )
    return CRL.parse(element(SEQUENCE, tbs, algorithm, bit_string(sign(authority.key, tbs))))


def still_listed(
    revoked: Iterable[RevokedSerial], before: datetime | None, lifetime: timedelta = LIFETIME
) -> tuple[RevokedSerial, ...]:
    """
    Those of *revoked* that the next list has to name.

    A certificate that is over leaves when the list *before* began a whole lifetime later: so whoever asks
    only when a list is due has seen it on one that is younger than its end (RFC 5280 §3.3).

    Args:
        before: When the last list began; None: there was none.
    """
    if before is None:
        return tuple(revoked)
    begun = before - lifetime
    return tuple(each for each in revoked if each.ends_at is None or each.ends_at >= begun)


def next_number(last: int, now: datetime) -> int:
    """
    What the list that is issued *now* is numbered, after *last*, or 0 if none is known.

    By time, unless the clock stands still or was set back: so the number goes on from there also when
    everything was restored from an old backup.
    """
    return max(last + 1, int(now.timestamp()))


def check_may_sign(issuer: x509.Certificate) -> None:
    """
    Pass if *issuer* may sign lists (RFC 5280 §4.2.1.3); an absent keyUsage restricts nothing.

    Raises:
        UntrustedChain: It may not; the text is the cause alone.
    """
    key_usage = find_extension(issuer, x509.KeyUsage)
    if key_usage is not None and not key_usage.crl_sign:
        raise UntrustedChain(f"{subject_of(issuer)} may not sign CRLs (keyUsage lacks cRLSign)")


@cache
def _reasons(reason: x509.ReasonFlags) -> bytes:
    """The extensions of an entry with *reason*."""
    return element(SEQUENCE, _extension(_REASON_CODE, x509.CRLReason(reason)))


def _extension(oid: bytes, value: x509.ExtensionType) -> bytes:
    """One that is not critical (RFC 5280 §4.1)."""
    return element(SEQUENCE, oid, octet_string(value.public_bytes()))


def _is_signed_by(signed: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    try:
        is_valid = signed.is_signature_valid(check_strength(issuer.public_key()))
        return is_valid and isinstance(signed.signature_hash_algorithm, SOUND_HASHES)
    except MALFORMED:  # a key of another kind, too
        return False
