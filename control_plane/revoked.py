"""What was revoked, as it is kept: one certificate, or one identity."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Final, TypeAlias

from parallax.control_plane.issued import spell
from parallax.security.identity import Identity
from parallax.security.revocation import WITHDRAWN, Reason
from parallax.security.verification import CertificateId

REVOCATIONS: Final = "revocations/"
CERTIFICATES: Final = f"{REVOCATIONS}certificates/"
IDENTITIES: Final = f"{REVOCATIONS}identities/"

_NO_END: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # RFC 5280 §4.1.2.5: no well-defined end


@dataclass(frozen=True, slots=True)
class RevokedCertificate:
    """
    One certificate that is good no more.

    Args:
        identity: Whose it is; None if the ledger does not know it.
        not_after: When it ends; None likewise, and then this is kept for ever.
        by: Who revoked it, as a URI.
        at: When.
    """

    certificate: CertificateId
    identity: Identity | None
    not_after: datetime | None
    reason: Reason
    by: str
    at: datetime

    @property
    def key(self) -> str:
        """Where its record lies: in the order in which certificates end."""
        issuer, serial = self.certificate
        return f"{CERTIFICATES}{spell(self.not_after or _NO_END)}/{issuer.hex()}/{serial:x}"

    def encode(self) -> bytes:
        """As it is stored."""
        issuer, serial = self.certificate
        stored = asdict(self) | {
            "certificate": [issuer.hex(), f"{serial:x}"],
            "identity": str(self.identity) if self.identity else None,
        }
        return json.dumps(stored, default=datetime.isoformat).encode()


@dataclass(frozen=True, slots=True)
class RevokedIdentity:
    """
    One identity of which nothing is good that was issued before it was reinstated, or ever.

    Args:
        by: Who revoked it, as a URI.
        at: When.
        reinstated_at: To the second; None: it was not.
    """

    identity: Identity
    reason: Reason
    by: str
    at: datetime
    reinstated_at: datetime | None = None

    @property
    def cut_off(self) -> datetime:
        """What was issued before this is revoked."""
        return self.reinstated_at or WITHDRAWN

    @property
    def key(self) -> str:
        """Where its record lies."""
        return self.key_of(self.identity)

    @staticmethod
    def key_of(identity: Identity) -> str:
        """Where the record of *identity* lies, if it has one."""
        return f"{IDENTITIES}{identity.trust_domain}/{identity.short}"

    def encode(self) -> bytes:
        """As it is stored."""
        return json.dumps(
            asdict(self) | {"identity": str(self.identity)}, default=datetime.isoformat
        ).encode()


Revoked: TypeAlias = RevokedCertificate | RevokedIdentity


def decode(stored: bytes) -> Revoked:
    """What `encode` of either gave; what a newer version has added is passed over."""
    read = json.loads(stored)
    identity = Identity.parse(read["identity"]) if read["identity"] else None
    reason, by, at = _reason(read["reason"]), read["by"], datetime.fromisoformat(read["at"])
    if "certificate" in read:
        issuer, serial = read["certificate"]
        certificate = CertificateId(bytes.fromhex(issuer), int(serial, 16))
        return RevokedCertificate(certificate, identity, _instant(read["not_after"]), reason, by, at)
    assert identity is not None, "it is an identity that is revoked"  # noqa: S101 - we have written it
    return RevokedIdentity(identity, reason, by, at, _instant(read["reinstated_at"]))


def certificate_of(key: str) -> CertificateId:
    """Which certificate is revoked whose record is *key*: all that matters of a million, at the start."""
    _, issuer, serial = key.rsplit("/", 2)
    return CertificateId(bytes.fromhex(issuer), int(serial, 16))


def _reason(stored: str) -> Reason:
    try:
        return Reason(stored)
    except ValueError:  # of a newer version
        return Reason.UNSPECIFIED


def _instant(stored: str | None) -> datetime | None:
    return datetime.fromisoformat(stored) if stored else None
