"""One certificate as the ledger keeps it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from datetime import datetime
from functools import lru_cache
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from parallax.security.identity import Identity
from parallax.security.keys import key_id
from parallax.security.profiles import issued_at
from parallax.security.revocation import Revocations
from parallax.security.verification import CertificateId

CERTIFICATES: Final = "certificates/"
HOLDERS: Final = "holders/"
LOOKUPS: Final = "lookups/"  # by serial and by fingerprint
KEYS: Final = "keys/"

_INSTANTS: Final = ("not_before", "not_after", "issued_at", "recorded_at", "seen_at")


@dataclass(frozen=True, slots=True)
class IssuedCertificate:
    """
    What there is to know of one certificate.

    Args:
        serial: Lower-case hex.
        issuer: SHA-256 of the SubjectPublicKeyInfo of who signed it, lower-case hex: a CA that gets a
            new certificate for the same key stays the same issuer.
        fingerprint: SHA-256 of the DER, lower-case hex.
        key_fingerprint: SHA-256 of its own SubjectPublicKeyInfo, lower-case hex.
        issued_at: When it was made, see `profiles.issued_at`.
        recorded_at: When it was entered; one of ours before it was handed out.
        requested_by: On whose request we issued it; None if we did not, and it was entered when it was
            first authenticated: made by `parallax certs`, with openssl, by another CA of the bundle.
        seen_at: When it was first authenticated; None if that is still to come.
        key: Of its record. It names the end and what was signed, and nothing that the holder could
            write in another way, as the signature.
    """

    identity: Identity
    serial: str
    issuer: str
    fingerprint: str
    key_fingerprint: str
    not_before: datetime
    not_after: datetime
    issued_at: datetime
    recorded_at: datetime
    requested_by: str | None
    seen_at: datetime | None
    key: str

    @classmethod
    def of(
        cls,
        leaf: x509.Certificate,
        identity: Identity,
        issuer: bytes,
        *,
        recorded_at: datetime,
        requested_by: str | None = None,
        seen_at: datetime | None = None,
    ) -> Self:
        """What *leaf* says, whose *identity* is known and whose issuer has the key with the id *issuer*."""
        return cls(
            identity=identity,
            serial=f"{leaf.serial_number:x}",
            issuer=issuer.hex(),
            fingerprint=leaf.fingerprint(hashes.SHA256()).hex(),
            key_fingerprint=key_id(leaf.public_key()).hex(),
            not_before=leaf.not_valid_before_utc,
            not_after=leaf.not_valid_after_utc,
            issued_at=issued_at(leaf),
            recorded_at=recorded_at,
            requested_by=requested_by,
            seen_at=seen_at,
            key=key_of(leaf),
        )

    @property
    def certificate(self) -> CertificateId:
        """By which it is revoked."""
        return CertificateId(bytes.fromhex(self.issuer), int(self.serial, 16))

    @property
    def holder_key(self) -> str:
        """Of the record that says whose it is."""
        return f"{below(self.identity)}{self.key.removeprefix(CERTIFICATES)}"

    @property
    def keys(self) -> tuple[str, ...]:
        """Of the records that lead to its own: by its holder, its serial, and its fingerprint."""
        where = self.key.removeprefix(CERTIFICATES)
        return self.holder_key, f"{LOOKUPS}{self.serial}/{where}", f"{LOOKUPS}{self.fingerprint}/{where}"

    @property
    def use_key(self) -> str:
        """Of the record that says who uses its key."""
        return f"{KEYS}{self.key_fingerprint}"

    def is_revoked(self, revocations: Revocations) -> bool:
        """Whether it is withdrawn, by itself or with its holder."""
        cut_off = revocations.cut_off(self.identity)
        by_name = cut_off is not None and self.issued_at < cut_off
        return by_name or self.certificate in revocations

    def encode(self) -> bytes:
        """As it is stored."""
        stored = {name: getattr(self, name) for name in _STORED} | {"identity": str(self.identity)}
        return json.dumps(stored, default=datetime.isoformat).encode()

    @classmethod
    def decode(cls, key: str, stored: bytes) -> Self:
        """What `encode` gave; what a newer version has added is passed over."""
        read = json.loads(stored)
        read.setdefault("issued_at", read["not_before"])
        for name in _INSTANTS:
            read[name] = datetime.fromisoformat(read[name]) if read[name] else None
        read["identity"] = _parse(read["identity"])
        return cls(**{name: read[name] for name in _STORED}, key=key)


_parse: Final = lru_cache(maxsize=20_000)(Identity.parse)  # each has many certificates
_STORED: Final = [field.name for field in fields(IssuedCertificate) if field.name != "key"]


@dataclass(frozen=True, slots=True)
class KeyUse:
    """
    Whose certificates are for a key.

    Args:
        certificate: The key of the record of the one that ends last; "": none is recorded.
        is_pinned: A certificate for it is pinned.
    """

    identity: Identity
    certificate: str
    is_pinned: bool = False

    def encode(self) -> bytes:
        """As it is stored; nothing, if nobody uses it."""
        if not (self.certificate or self.is_pinned):
            return b""
        stored = {"certificate": self.certificate, "is_pinned": self.is_pinned}
        return json.dumps({"identity": str(self.identity), **stored}).encode()

    @classmethod
    def decode(cls, stored: bytes) -> Self:
        """What `encode` gave; what a newer version has added is passed over."""
        read = json.loads(stored)
        return cls(Identity.parse(read["identity"]), read["certificate"], read.get("is_pinned", False))


def key_of(leaf: x509.Certificate) -> str:
    """Where the record of *leaf* lies: in the order in which certificates end."""
    signed = hashlib.sha256(leaf.tbs_certificate_bytes).hexdigest()
    return f"{CERTIFICATES}{spell(leaf.not_valid_after_utc)}/{signed}"


def spell(moment: datetime) -> str:
    """*moment*, aware UTC, to the second, so that it sorts as time does."""
    return f"{moment.year:04}{moment:%m%dT%H%M%SZ}"  # %Y has no leading zeros everywhere


def below(identity: Identity) -> str:
    """The prefix of what says that *identity* holds a certificate."""
    return f"{HOLDERS}{identity.trust_domain}/{identity.kind}/{identity.name}/"
