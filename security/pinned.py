"""Self-signed certificates that are believed because each is known, not because of who signed it; pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding

from parallax.security.bundle import certificates_to_pem
from parallax.security.certificate import MALFORMED, check_validity, find_extension, is_signed_by
from parallax.security.errors import InvalidTransition, Revoked, UntrustedChain, WrongIdentity
from parallax.security.identity import Identity, Kind, clip
from parallax.security.keys import check_cost, check_strength, key_id, key_info
from parallax.security.profiles import issued_at
from parallax.security.verification import Peer, Usage, check_usages, identity_of

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

MAX_PER_IDENTITY: Final = 2  # the one in use, and the one that takes its place
# On a port. A change is in force after 5 ms with 100 of them, 20 ms with 500; to build a TLS context with
# 1,000 more roots takes 120 ms, with 3,000 it is 1.5 s (measured). For so long nobody shakes hands.
MAX_ON_PORT: Final = 500
MAX_BYTES: Final = 4_096  # of one, DER; with a key of RSA-4096 it has 1,300


@dataclass(frozen=True, slots=True)
class Pin:
    """
    One certificate, and for whom it is pinned.

    Args:
        at: Since when; None: nobody noted it.

    Attributes:
        fingerprint: SHA-256 of the DER, 32 bytes: what a certificate that is presented is compared by.
    """

    identity: Identity
    certificate: x509.Certificate
    at: datetime | None = field(default=None, compare=False)
    fingerprint: bytes = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", self.certificate.fingerprint(hashes.SHA256()))


@dataclass(frozen=True, slots=True)
class Pins:
    """
    Whom a port lets in beside those for whom the trust bundle vouches, swapped whole.

    Attributes:
        pem: There TLS takes each for a CA, so whoever adds them to roots has to find the peer with
            `authenticate_pinned` or by the bundle alone.

    Raises:
        InvalidTransition: One certificate twice, more than `MAX_PER_IDENTITY` of one identity, or more than
            `MAX_ON_PORT`.
    """

    pinned: tuple[Pin, ...] = ()
    pem: bytes = field(init=False, repr=False, compare=False)
    _pins: Mapping[bytes, Pin] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        pins = {pin.fingerprint: pin for pin in self.pinned}
        most = max(Counter(pin.identity for pin in self.pinned).values(), default=0)
        if len(pins) < len(self.pinned) or most > MAX_PER_IDENTITY or len(pins) > MAX_ON_PORT:
            raise InvalidTransition(
                f"a certificate is pinned once, an identity has {MAX_PER_IDENTITY} pins at most, "
                f"and a port {MAX_ON_PORT}"
            )
        object.__setattr__(self, "_pins", MappingProxyType(pins))
        object.__setattr__(self, "pem", certificates_to_pem(pin.certificate for pin in self.pinned))

    def holder_of(self, fingerprint: bytes) -> Identity | None:
        """For whom the certificate with this SHA-256 is pinned; None: it is not."""
        pin = self.find(fingerprint)
        return pin.identity if pin else None

    def find(self, fingerprint: bytes) -> Pin | None:
        """The pin of the certificate with this SHA-256."""
        return self._pins.get(fingerprint)

    def keep_all_of(self, earlier: Pins) -> bool:
        """Whether nobody who was let in by *earlier* is without a pin now."""
        return earlier._pins.keys() <= self._pins.keys()


NO_PINS: Final = Pins()


def is_self_signed(leaf: x509.Certificate) -> bool:
    """Whether *leaf* is signed with its own key, in its own name."""
    return is_signed_by(leaf, leaf)


def authenticate_pinned(leaf: x509.Certificate, pins: Pins, trust_domain: str, now: datetime) -> Peer:
    """
    Who presents *leaf*, a self-signed certificate, and no other with it.

    What it says of when it was made, its holder wrote, and it may pass for newer than it is. It counts as
    issued by when it was pinned at the latest.

    Raises:
        Revoked: It is not pinned, or not any more, which look alike.
        VerificationError: It is pinned and must not be trusted all the same: see `check_self_signed`.
        IdentityError: It does not name exactly one identity.
    """
    fingerprint = leaf.fingerprint(hashes.SHA256())
    pin = pins.find(fingerprint)
    if pin is None:
        raise Revoked(f"self-signed, and {fingerprint.hex()} is not pinned: withdrawn, or never registered")
    identity = check_self_signed(leaf, trust_domain, now)
    if identity != pin.identity:
        raise WrongIdentity(f"it names {identity}, not {pin.identity}: pin it for the one that it names")
    return peer_of(pin)


def peer_of(pin: Pin) -> Peer:
    """Whom *pin* is for; whether it is good is not looked at."""
    leaf, made = pin.certificate, issued_at(pin.certificate)
    return Peer(
        identity=pin.identity,
        serial=leaf.serial_number,
        fingerprint=pin.fingerprint,
        not_after=leaf.not_valid_after_utc,
        issuer_key=key_id(leaf.public_key()),
        issued_at=min(made, pin.at or made),
        above=(),
    )


def check_self_signed(leaf: x509.Certificate, trust_domain: str, now: datetime) -> Identity:
    """
    The one identity that *leaf* names, if it could be pinned.

    It may say CA:TRUE, as `openssl req -x509` writes by itself: what it signs is believed by nobody.

    Raises:
        Expired: It is not within its validity.
        UntrustedChain: It is not self-signed, not good for a client, or a service's, whose peers cannot pin;
            or TLS could not read it.
        VerificationError: Its key is too weak, or too costly.
        IdentityError: It does not name exactly one identity.
    """
    check_validity(leaf, now)
    try:
        key = check_cost(check_strength(leaf.public_key()))
        if leaf.version is x509.Version.v1 and not leaf.tbs_certificate_bytes.endswith(key_info(key)):
            # Where such a one stands on a port, TLS reads none of those behind it (measured).
            raise UntrustedChain("of version 1, with what that has not: make one with `openssl req -x509`")
        if not is_self_signed(leaf):
            raise UntrustedChain("not self-signed: whoever issued it vouches for it, and it needs no pin")
        check_usages(leaf, [Usage.CLIENT.oid])
        identity = identity_of(leaf, trust_domain)
    except MALFORMED as exc:
        raise UntrustedChain(f"malformed certificate: {clip(str(exc))}") from exc
    if identity.kind is Kind.SERVICE:
        raise UntrustedChain(f"{identity} is a service, whose clients trust no other certificate than a CA's")
    return identity


def check_fits(pin: Pin, beside: Iterable[Pin], authorities: Iterable[x509.Certificate]) -> None:
    """
    Pass if *pin*, a good one, can stand on a port *beside* others, where these *authorities* issue.

    Raises:
        UntrustedChain: It is too large, or has the key of a CA or of another identity; or the handshake could
            take another certificate for it, or it for another. TLS looks a certificate up by its subject, and
            does not look on (measured).
    """
    new, subject = pin.certificate, pin.certificate.subject
    if len(new.public_bytes(Encoding.DER)) > MAX_BYTES:
        raise UntrustedChain(f"it has more than {MAX_BYTES:,} bytes: make a smaller one")
    for authority in authorities:
        if authority.subject == subject or authority.public_key() == new.public_key():
            raise UntrustedChain("it has the subject or the key of a CA of this fleet: make another")
    for other in beside:
        old = other.certificate
        if other.identity != pin.identity and old.public_key() == new.public_key():
            raise UntrustedChain(f"{other.identity} has the same key: make one for {pin.identity} alone")
        if old.subject == subject and (_hides(old, new) or _hides(new, old)):
            raise UntrustedChain(
                f"nothing tells it from the certificate of {other.identity} that has the same subject: "
                "make it with a new key and `openssl req -x509`, or `parallax certs self-sign`"
            )


def _hides(one: x509.Certificate, other: x509.Certificate) -> bool:
    """Whether *one* could be found where *other*, of the same subject, is looked for (RFC 5280 §4.2.1.1)."""
    key_usage = find_extension(one, x509.KeyUsage)
    if key_usage is not None and not key_usage.key_cert_sign:
        return False
    named = find_extension(other, x509.AuthorityKeyIdentifier)
    known = find_extension(one, x509.SubjectKeyIdentifier)
    if named is None or known is None or named.key_identifier is None:
        return True
    return named.key_identifier == known.digest
