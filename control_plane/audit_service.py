"""The gRPC service of the audit log: what is asked for, and the translation between proto and domain."""

from __future__ import annotations

from datetime import UTC
from typing import Any, Final

from grpc import aio

from parallax.control_plane.audit_reader import AuditReader, Sought
from parallax.control_plane.readings import Readings
from parallax.protos import audit_pb2, audit_pb2_grpc
from parallax.runtime.caller import current_caller, current_source, name_of
from parallax.security.errors import InvalidRequest
from parallax.security.identity import Identity

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1_000
MAX_SEQUENCE: Final = 10**18  # beyond any that there will be, and within what a key holds

Context = aio.ServicerContext[Any, Any]


class AuditService(audit_pb2_grpc.AuditServiceServicer):
    """The audit log over gRPC."""

    def __init__(self, reader: AuditReader, readings: Readings, trust_domain: str) -> None:
        self._reader = reader
        self._readings = readings
        self._trust_domain = trust_domain

    async def ListAuditEntries(
        self, request: audit_pb2.ListAuditEntriesRequest, context: Context
    ) -> audit_pb2.ListAuditEntriesResponse:
        sought = self._sought(request)
        await self._readings.note(name_of(current_caller()), current_source())
        after = min(request.after, MAX_SEQUENCE)
        if sought is not None and sought.since is not None and not after:
            after = await self._reader.before(sought.since)
        page = await self._reader.page(after, min(request.page_size or DEFAULT_PAGE, MAX_PAGE), sought)
        return audit_pb2.ListAuditEntriesResponse(
            entries=(audit_pb2.AuditEntry(sequence=number, content=content) for number, content in page.kept),
            until=page.until,
            head_sequence=page.head.sequence,
            head_hash=page.head.hash,
        )

    def _sought(self, request: audit_pb2.ListAuditEntriesRequest) -> Sought | None:
        """What is asked for; None: everything, whatever lies there."""
        since, who = None, request.identity
        if request.HasField("since"):
            try:
                since = request.since.ToDatetime(UTC)
            except (ValueError, OverflowError):
                raise InvalidRequest("a time that is out of bounds: the years are 1 to 9999") from None
        if since is None and not request.action and not who:
            return None
        if who and "://" not in who:
            who = str(Identity.parse_short(who, self._trust_domain))
        return Sought(since, request.action, who)
