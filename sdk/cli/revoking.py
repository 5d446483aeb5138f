"""Revocation at the control plane: asked for, and shown."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, cast

from parallax.protos import revocation_pb2, revocation_pb2_grpc
from parallax.sdk.cli.render import distance, instant
from parallax.sdk.client import PAGE, READ_S
from parallax.security.errors import IdentityError, InvalidRequest
from parallax.security.identity import Identity, clip

if TYPE_CHECKING:
    from grpc import aio

    from parallax.sdk.client import ParallaxClient

_PREFIX: Final = "REVOCATION_REASON_"
_HEX: Final = frozenset("0123456789abcdef")


def plan(
    name: str | None, serial: str | None, issuer: str | None, fingerprint: str | None
) -> revocation_pb2.RevokeRequest:
    """
    What is asked for, if it is one thing.

    Raises:
        InvalidRequest: It is none or several, or cannot be read.
    """
    if sum(each is not None for each in (name, serial, fingerprint)) != 1 or (issuer and serial is None):
        raise InvalidRequest(
            "name one thing to revoke: KIND/NAME, or --serial (with --issuer if need be), or --fingerprint"
        )
    request = revocation_pb2.RevokeRequest()
    if name is not None:
        request.identity = Identity.parse_short(name).short
    elif serial is not None:
        request.certificate.serial = _hex(serial, "--serial").lstrip("0") or "0"
        request.certificate.issuer = _hex(issuer, "--issuer") if issuer else ""
    elif fingerprint is not None:
        request.fingerprint = _hex(fingerprint, "--fingerprint")
    return request


def reason_of(text: str) -> revocation_pb2.RevocationReason:
    """The reason that is spelled as RFC 5280 does, with dashes."""
    number = revocation_pb2.RevocationReason.Value(f"{_PREFIX}{text.replace('-', '_').upper()}")
    return cast("revocation_pb2.RevocationReason", number)


async def revoke(
    client: ParallaxClient, request: revocation_pb2.RevokeRequest
) -> revocation_pb2.RevokeResponse:
    """In force when this returns."""
    async with client._asking(_revocations) as stub:  # noqa: SLF001 - our own
        return await stub.Revoke(request, timeout=READ_S)


async def reinstate(client: ParallaxClient, name: str) -> revocation_pb2.Revocation:
    """In force when this returns."""
    request = revocation_pb2.ReinstateRequest(identity=name)
    async with client._asking(_revocations) as stub:  # noqa: SLF001
        return (await stub.Reinstate(request, timeout=READ_S)).revocation


async def revoked(client: ParallaxClient) -> list[revocation_pb2.Revocation]:
    """All of them."""
    request = revocation_pb2.ListRevocationsRequest(page_size=PAGE)
    found: list[revocation_pb2.Revocation] = []
    deadline = time.monotonic() + READ_S
    while True:
        async with client._asking(_revocations) as stub:  # noqa: SLF001
            page = await stub.ListRevocations(request, timeout=max(0.0, deadline - time.monotonic()))
        found.extend(page.revocations)
        request.page_token = page.next_page_token
        if not request.page_token:
            return found


def to_json(entry: revocation_pb2.Revocation) -> dict[str, object]:
    """For programs."""
    return {
        "identity": entry.identity or None,
        "serial": entry.serial or None,
        "issuer": entry.issuer or None,
        "not_after": entry.not_after.ToDatetime(UTC) if entry.HasField("not_after") else None,
        "reason": _reason(entry),
        "revoked_by": entry.revoked_by,
        "revoked_at": entry.revoked_at.ToDatetime(UTC),
        "reinstated_at": entry.reinstated_at.ToDatetime(UTC) if entry.HasField("reinstated_at") else None,
    }


def as_cells(entry: revocation_pb2.Revocation, now: datetime) -> tuple[str, ...]:
    """For people: whose, what of it, why, since when, by whom."""
    if entry.serial:
        what = entry.serial
    elif entry.HasField("reinstated_at"):
        what = f"all from before {instant(entry.reinstated_at.ToDatetime(UTC))}"
    else:
        what = "all"
    whose = short(entry.identity) if entry.identity else "unknown"
    since = distance(entry.revoked_at.ToDatetime(UTC), now)
    return (whose, what, _reason(entry), since, short(entry.revoked_by))


def told(answer: revocation_pb2.RevokeResponse) -> str:
    """What has become of it, in a line."""
    entry = answer.revocation
    whose = short(entry.identity) if entry.identity else "somebody the ledger does not know"
    what = f"the certificate {entry.serial} of {whose}" if entry.serial else f"{whose}, with all it holds,"
    return f"{what} {'was revoked before' if answer.already else 'is revoked'}"


def short(uri: str) -> str:
    """*uri* as people spell it; as it is, if a newer control plane spells it in a way of its own."""
    try:
        return Identity.parse(uri).short
    except IdentityError:
        return uri


def _reason(entry: revocation_pb2.Revocation) -> str:
    name = revocation_pb2.RevocationReason.Name(entry.reason)
    return name.removeprefix(_PREFIX).lower().replace("_", "-")


def _hex(text: str, option: str) -> str:
    """*text* as we spell it: openssl writes capitals, and colons between bytes."""
    digits = text.replace(":", "").lower()
    if not digits or not set(digits) <= _HEX:
        raise InvalidRequest(f"{option}: not hexadecimal: {clip(text)}")
    return digits


def _revocations(channel: aio.Channel) -> revocation_pb2_grpc.RevocationServiceAsyncStub:
    return revocation_pb2_grpc.RevocationServiceStub(channel)
