"""The routes of the HTTPS listener for devices: a name, and a certificate of their own that is pinned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from parallax.control_plane.approvals import Pending
from parallax.control_plane.edge.outcome import Outcome
from parallax.control_plane.edge.reception import Reception
from parallax.control_plane.enrollment import Enrollment
from parallax.security.bundle import parse_certificates
from parallax.security.errors import ConfigError, InvalidRequest
from parallax.security.pinned import MAX_BYTES

_MAX_PEM: Final = 2 * MAX_BYTES  # base64 adds a third, and there may be text before it


class NameRequest(BaseModel):
    """What is sent for a name, by somebody who has none; without a token it has to be approved, too."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    token: Annotated[str | None, Field(max_length=128, repr=False)] = None
    key: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PinRequest(BaseModel):
    """What is sent with a certificate that its holder has signed himself."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    token: Annotated[str | None, Field(max_length=128, repr=False)] = None
    identity: Annotated[str, Field(max_length=80)]
    certificate: Annotated[str, Field(max_length=_MAX_PEM)]


def device_routes(
    enrollment: Enrollment, trust_domain: str, reception: Reception, count: Callable[[Outcome], None]
) -> APIRouter:
    """The routes; see `new_app`."""
    routes = APIRouter()

    @routes.post("/v1/names")
    async def allot(stated: NameRequest, request: Request) -> dict[str, str]:
        with reception.admitted(request) as host:
            reception.nameless(request)
            identity = await enrollment.allot(stated.token, stated.key, trust_domain, host)
        return {"identity": identity.short}

    @routes.post("/v1/pins")
    async def pin(stated: PinRequest, request: Request) -> JSONResponse:
        with reception.admitted(request) as host:
            identity = reception.named(stated.identity, request)
            try:
                (certificate,) = parse_certificates(stated.certificate.encode())
            except (ConfigError, ValueError):
                raise InvalidRequest("certificate: not one certificate (PEM), or a damaged one") from None
            given = await enrollment.register(stated.token, identity, certificate, host)
        if isinstance(given, Pending):
            return waiting(given)
        count(Outcome.ENROLLED)
        return JSONResponse(
            {
                "identity": str(identity),
                "fingerprint": given.pin.fingerprint.hex(),
                "on_port": enrollment.is_on_port(given),
            }
        )

    return routes


def waiting(pending: Pending) -> JSONResponse:
    """What who waits to be approved is told."""
    return JSONResponse({"identity": str(pending.identity), "fingerprint": pending.fingerprint}, 202)
