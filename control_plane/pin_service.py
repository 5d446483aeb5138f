"""The gRPC service of pins: what is asked for, and the translation between proto and domain."""

from __future__ import annotations

from typing import Any, Final

from grpc import aio

from parallax.control_plane.certificate_service import UNAUTHENTICATED
from parallax.control_plane.pinned import Pinned
from parallax.control_plane.pins import Change, Pinning
from parallax.protos import pin_pb2, pin_pb2_grpc
from parallax.runtime.caller import current_caller, name_of
from parallax.security.errors import ConfigError
from parallax.security.identity import Identity

DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 1_000  # of some 300 bytes each; a message may have 1 MiB

Context = aio.ServicerContext[Any, Any]


class PinService(pin_pb2_grpc.PinServiceServicer):
    """
    Pins over gRPC.

    Args:
        pinning: None where nobody is authenticated.
    """

    def __init__(self, pinning: Pinning | None, trust_domain: str) -> None:
        self._pinning = pinning
        self._trust_domain = trust_domain

    async def Pin(self, request: pin_pb2.PinRequest, context: Context) -> pin_pb2.PinResponse:
        holder = Identity.parse_short(request.holder, self._trust_domain)
        pinning = self._known()
        return pin_pb2.PinResponse(
            pin=_as_kept(pinning, await pinning.pin(holder, request.certificate, _change()))
        )

    async def Unpin(self, request: pin_pb2.UnpinRequest, context: Context) -> pin_pb2.UnpinResponse:
        holder = Identity.parse_short(request.holder, self._trust_domain)
        gone = await self._known().unpin(holder, request.fingerprint, _change())
        return pin_pb2.UnpinResponse(pins=map(_to_proto, gone))

    async def ListPins(self, request: pin_pb2.ListPinsRequest, context: Context) -> pin_pb2.ListPinsResponse:
        pinning = self._known()
        found, more = pinning.page(request.page_token, min(request.page_size or DEFAULT_PAGE, MAX_PAGE))
        return pin_pb2.ListPinsResponse(
            pins=[_as_kept(pinning, each) for each in found], next_page_token=more
        )

    def _known(self) -> Pinning:
        if self._pinning is None:
            raise ConfigError(UNAUTHENTICATED)
        return self._pinning


def _change() -> Change:
    return Change(name_of(current_caller()))


def _as_kept(pinning: Pinning, pinned: Pinned) -> pin_pb2.PinnedCertificate:
    return _to_proto(pinned, on_port=pinning.is_on_port(pinned), revoked=pinning.is_revoked(pinned))


def _to_proto(pinned: Pinned, *, on_port: bool = False, revoked: bool = False) -> pin_pb2.PinnedCertificate:
    pin = pinned.pin
    message = pin_pb2.PinnedCertificate(
        identity=str(pin.identity),
        fingerprint=pin.fingerprint.hex(),
        serial=f"{pin.certificate.serial_number:x}",
        pinned_by=pinned.by,
        on_port=on_port,
        exchanged=bool(pinned.exchanged_for),
        revoked=revoked,
    )
    message.not_after.FromDatetime(pin.certificate.not_valid_after_utc)
    message.pinned_at.FromDatetime(pinned.at)
    return message
