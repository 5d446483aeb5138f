"""The control plane's ledger of certificates, read and shown."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from parallax.protos import ledger_pb2, ledger_pb2_grpc
from parallax.sdk.cli.render import distance, instant
from parallax.sdk.client import PAGE, READ_S
from parallax.security.errors import IdentityError
from parallax.security.identity import Identity

if TYPE_CHECKING:
    from grpc import aio

    from parallax.sdk.client import ParallaxClient


async def certificates(
    client: ParallaxClient, holder: str, ends_before: datetime | None, *, ended: bool
) -> list[ledger_pb2.LedgerEntry]:
    """Every entry that is asked for, see `ListCertificatesRequest`."""
    request = ledger_pb2.ListCertificatesRequest(holder=holder, include_ended=ended, page_size=PAGE)
    if ends_before is not None:
        request.ends_before.FromDatetime(ends_before)
    found: list[ledger_pb2.LedgerEntry] = []
    deadline = time.monotonic() + READ_S
    while True:
        async with client._asking(_ledger) as stub:  # noqa: SLF001 - our own
            page = await stub.ListCertificates(request, timeout=max(0.0, deadline - time.monotonic()))
        found.extend(page.certificates)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


async def find(client: ParallaxClient, number: str) -> list[ledger_pb2.LedgerEntry]:
    """The entries with a serial or a fingerprint."""
    request = ledger_pb2.FindCertificatesRequest(number=number)
    async with client._asking(_ledger) as stub:  # noqa: SLF001
        return list((await stub.FindCertificates(request, timeout=READ_S)).certificates)


def _ledger(channel: aio.Channel) -> ledger_pb2_grpc.LedgerServiceAsyncStub:
    return ledger_pb2_grpc.LedgerServiceStub(channel)


def to_json(entry: ledger_pb2.LedgerEntry) -> dict[str, object]:
    """For programs."""
    return {
        "identity": entry.identity,
        "serial": entry.serial,
        "issuer": entry.issuer,
        "fingerprint": entry.fingerprint,
        "key_fingerprint": entry.key_fingerprint,
        "not_before": entry.not_before.ToDatetime(UTC),
        "not_after": entry.not_after.ToDatetime(UTC),
        "recorded_at": entry.recorded_at.ToDatetime(UTC),
        "requested_by": entry.requested_by or None,
        "seen_at": _seen_at(entry),
        "revoked": entry.revoked,
    }


def as_cells(entry: ledger_pb2.LedgerEntry, now: datetime) -> tuple[str, ...]:
    """For people: whose, its end or that it is revoked, when seen, its serial, on whose request issued."""
    seen_at = _seen_at(entry)
    return (
        _short(entry.identity),
        "revoked" if entry.revoked else distance(entry.not_after.ToDatetime(UTC), now),
        distance(seen_at, now) if seen_at else "never",
        entry.serial,
        _short(entry.requested_by) if entry.requested_by else "not issued here",
    )


def as_facts(entry: ledger_pb2.LedgerEntry, now: datetime) -> list[tuple[str, ...]]:
    """For people, all of it."""
    seen_at, begins, ends = _seen_at(entry), entry.not_before.ToDatetime(UTC), entry.not_after.ToDatetime(UTC)
    return [
        ("serial", entry.serial),
        ("fingerprint", entry.fingerprint),
        ("key", entry.key_fingerprint),
        ("issuer's key", entry.issuer),
        ("valid from", instant(begins)),
        ("valid until", f"{instant(ends)} ({distance(ends, now)})"),
        ("entered", instant(entry.recorded_at.ToDatetime(UTC))),
        ("issued for", entry.requested_by or "not issued here"),
        ("first seen", f"{instant(seen_at)} ({distance(seen_at, now)})" if seen_at else "never"),
    ]


def _seen_at(entry: ledger_pb2.LedgerEntry) -> datetime | None:
    return entry.seen_at.ToDatetime(UTC) if entry.HasField("seen_at") else None


def _short(identity: str) -> str:
    try:
        return Identity.parse(identity).short
    except IdentityError:  # from a newer control plane; as it is, then
        return identity
