"""The gRPC service of the ledger: what is asked for, and the translation between proto and domain."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from google.protobuf.timestamp_pb2 import Timestamp
from grpc import aio

from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import Ledger, Wanted
from parallax.control_plane.paging import position, size_of, token_of
from parallax.protos import ledger_pb2, ledger_pb2_grpc
from parallax.security.errors import InvalidRequest
from parallax.security.identity import Identity, Kind, clip
from parallax.security.revocation import Revocations

_FINGERPRINT: Final = 64  # digits, of SHA-256
_HEX: Final = re.compile(rf"[0-9a-f]{{1,{_FINGERPRINT}}}", re.ASCII)

Context = aio.ServicerContext[Any, Any]


class LedgerService(ledger_pb2_grpc.LedgerServiceServicer):
    """The ledger over gRPC."""

    def __init__(
        self, ledger: Ledger, revocations: Revocations, trust_domain: str, clock: Callable[[], datetime]
    ) -> None:
        self._ledger = ledger
        self._revocations = revocations
        self._trust_domain = trust_domain
        self._clock = clock

    async def ListCertificates(
        self, request: ledger_pb2.ListCertificatesRequest, context: Context
    ) -> ledger_pb2.ListCertificatesResponse:
        wanted = Wanted(
            holders=_holders(request.holder, self._trust_domain),
            ends_before=_instant(request.ends_before) if request.HasField("ends_before") else None,
            ends_after=None if request.include_ended else self._clock(),
        )
        found, more = await self._ledger.page(
            wanted, position(request.page_token), size_of(request.page_size)
        )
        return ledger_pb2.ListCertificatesResponse(
            certificates=map(self._to_proto, found), next_page_token=token_of(more)
        )

    async def FindCertificates(
        self, request: ledger_pb2.FindCertificatesRequest, context: Context
    ) -> ledger_pb2.FindCertificatesResponse:
        found = await self._ledger.find(_number(request.number))
        return ledger_pb2.FindCertificatesResponse(certificates=map(self._to_proto, found))

    def _to_proto(self, entry: IssuedCertificate) -> ledger_pb2.LedgerEntry:
        return _to_proto(entry, revoked=entry.is_revoked(self._revocations))


def _to_proto(entry: IssuedCertificate, *, revoked: bool) -> ledger_pb2.LedgerEntry:
    message = ledger_pb2.LedgerEntry(
        identity=str(entry.identity),
        serial=entry.serial,
        issuer=entry.issuer,
        fingerprint=entry.fingerprint,
        key_fingerprint=entry.key_fingerprint,
        requested_by=entry.requested_by or "",
        revoked=revoked,
    )
    message.not_before.FromDatetime(entry.not_before)
    message.not_after.FromDatetime(entry.not_after)
    message.recorded_at.FromDatetime(entry.recorded_at)
    if entry.seen_at is not None:
        message.seen_at.FromDatetime(entry.seen_at)
    return message


def _holders(stated: str, trust_domain: str) -> str:
    """Whose certificates *stated* means, as the ledger takes it."""
    if not stated:
        return ""
    if "/" in stated:
        identity = Identity.parse_short(stated, trust_domain)
        return f"{trust_domain}/{identity.short}"
    try:
        return f"{trust_domain}/{Kind(stated)}"
    except ValueError:
        raise InvalidRequest(
            f"not a kind, nor <kind>/<name>: {clip(stated)} (service, agent or client)"
        ) from None


def _number(stated: str) -> str:
    """A serial or a fingerprint as the ledger spells it; other programs put colons and zeros in."""
    number = stated.replace(":", "").lower()
    if not _HEX.fullmatch(number):
        raise InvalidRequest(f"not a serial or a fingerprint: {clip(stated)} (up to 64 digits of hex)")
    return number if len(number) == _FINGERPRINT else number.lstrip("0") or "0"


def _instant(stated: Timestamp) -> datetime:
    try:
        return stated.ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise InvalidRequest("a time that is out of bounds: the years are 1 to 9999") from None
