"""What is told of revocations: all of it, in pieces that are bounded."""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509

from parallax.control_plane.revocation_feed import PIECE, everything
from parallax.runtime.revocations import enter
from parallax.security.identity import Identity, Kind
from parallax.security.revocation import WITHDRAWN, Revocations
from parallax.security.verification import CertificateId

NOW = datetime(2026, 6, 1, tzinfo=UTC)
MAX_BYTES = 256 * 1024


def serials(revocations: Revocations) -> dict[bytes, set[int]]:
    return {issuer: set(serials) for issuer, serials in revocations.certificates()}


def test_all_of_it_arrives_in_pieces_that_are_bounded() -> None:
    told, heard = Revocations(), Revocations()
    for issuer in (bytes(32), bytes([1]) * 32):
        for _ in range(PIECE + 1):
            told.revoke(CertificateId(issuer, x509.random_serial_number()))
    for number in range(PIECE + 1):
        name = f"agent-{number:05}".ljust(63, "x")
        told.cut(Identity("a" * 63, Kind.AGENT, name), NOW if number % 2 else WITHDRAWN)
    pieces = list(everything(told))
    assert [piece.restart for piece in pieces] == [True] + [False] * 6
    assert max(piece.ByteSize() for piece in pieces) <= MAX_BYTES
    for piece in pieces:
        enter(piece, heard)
    assert serials(heard) == serials(told)
    assert dict(heard.identities()) == dict(told.identities())
