"""The routes of the HTTPS listener for certificates: the first, and one in place of a pinned one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from parallax.control_plane.edge.devices import waiting
from parallax.control_plane.edge.outcome import Outcome
from parallax.control_plane.edge.reception import Reception
from parallax.control_plane.enrollment import Application, Enrollment
from parallax.control_plane.exchange import Exchange
from parallax.security.authority import Issued
from parallax.security.bundle import certificates_to_pem
from parallax.security.identity import Identity
from parallax.security.possession import Proof
from parallax.security.request import MAX_REQUEST_BYTES, parse_request

_MAX_PEM: Final = 2 * MAX_REQUEST_BYTES  # base64 adds a third, and there may be text before it
_MAX_PROOF: Final = 48 * 1024  # base64 of base64 adds eight ninths to a request and a certificate


class EnrollRequest(BaseModel):
    """What is sent for a certificate."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    token: Annotated[str, Field(max_length=128, repr=False)]
    identity: Annotated[str, Field(max_length=80)]
    request: Annotated[str, Field(max_length=_MAX_PEM, repr=False)]


class ApprovalRequest(BaseModel):
    """What is sent for a certificate that the administrator has to approve."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    identity: Annotated[str, Field(max_length=80)]
    request: Annotated[str, Field(max_length=_MAX_PEM, repr=False)]


class ExchangeRequest(BaseModel):
    """What is sent for a certificate in place of a pinned one."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    identity: Annotated[str, Field(max_length=80)]
    proof: Annotated[str, Field(max_length=_MAX_PROOF, repr=False)]


class EnrollAnswer(BaseModel):
    """A certificate, leaf first, and the roots to trust; PEM."""

    identity: str
    chain: str
    bundle: str


def enrollment_routes(
    enrollment: Enrollment, reception: Reception, count: Callable[[Outcome], None]
) -> APIRouter:
    """The routes for who has no certificate; see `new_app`."""
    routes = APIRouter()

    @routes.post("/v1/enrollments")
    async def enroll(stated: EnrollRequest, request: Request) -> EnrollAnswer:
        with reception.admitted(request) as host:
            identity = reception.named(stated.identity, request)
            application = Application(identity, parse_request(stated.request), host)
            issued = await enrollment.redeem(stated.token, application)
        count(Outcome.ENROLLED)
        return _answer(identity, issued)

    @routes.post("/v1/enrollment-requests", response_model=None)
    async def ask(stated: ApprovalRequest, request: Request) -> EnrollAnswer | JSONResponse:
        with reception.admitted(request) as host:
            identity = reception.named(stated.identity, request)
            given = await enrollment.request(Application(identity, parse_request(stated.request), host))
        if isinstance(given, Issued):
            count(Outcome.ENROLLED)
            return _answer(identity, given)
        return waiting(given)

    return routes


def exchange_routes(exchange: Exchange, reception: Reception, count: Callable[[Outcome], None]) -> APIRouter:
    """The routes for who has a pinned one; see `new_app`."""
    routes = APIRouter()

    @routes.get("/v1/nonce")
    async def nonce(response: Response) -> dict[str, str]:
        response.headers["cache-control"] = "no-store"
        return {"nonce": exchange.nonce()}

    @routes.post("/v1/exchanges")
    async def change(stated: ExchangeRequest, request: Request) -> EnrollAnswer:
        with reception.admitted(request) as host:
            identity = reception.named(stated.identity, request)
            issued = await exchange.exchange(identity, Proof.parse(stated.proof), host)
        count(Outcome.EXCHANGED)
        return _answer(identity, issued)

    return routes


def _answer(identity: Identity, issued: Issued) -> EnrollAnswer:
    chain = certificates_to_pem(issued.chain).decode()
    return EnrollAnswer(identity=str(identity), chain=chain, bundle=issued.bundle.pem.decode())
