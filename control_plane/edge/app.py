"""The routes of the HTTPS listener: the trust bundle for all, certificates for who has a token or a pin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Final

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from parallax.control_plane.edge.allowance import Limits
from parallax.control_plane.edge.bounds import Failed, bounded
from parallax.control_plane.edge.devices import device_routes, waiting
from parallax.control_plane.edge.outcome import Outcome, outcome_of
from parallax.control_plane.edge.reception import Reception, host_of, wanted_of
from parallax.control_plane.edge.status import body_of, retry_after, status_of
from parallax.control_plane.enrollment import Application, Enrollment
from parallax.control_plane.exchange import Exchange
from parallax.runtime.http import App, Scope
from parallax.security.authority import Issued
from parallax.security.bundle import certificates_to_pem
from parallax.security.errors import InvalidRequest, ParallaxError
from parallax.security.identity import Identity
from parallax.security.possession import Proof
from parallax.security.request import MAX_REQUEST_BYTES, parse_request

_MAX_PEM: Final = 2 * MAX_REQUEST_BYTES  # base64 adds a third, and there may be text before it
_MAX_PROOF: Final = 48 * 1024  # base64 of base64 adds eight ninths to a request and a certificate

Note = Callable[[str, str, ParallaxError], None]


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


class BundleAnswer(BaseModel):
    """What the fleet trusts: for whoever can tell by a pin whether to believe it."""

    trust_domain: str
    bundle: str


class EnrollAnswer(BaseModel):
    """A certificate, leaf first, and the roots to trust; PEM."""

    identity: str
    chain: str
    bundle: str


def new_app(
    enrollment: Enrollment,
    exchange: Exchange,
    trust_domain: str,
    count: Callable[[Outcome], None] = lambda _: None,
    note: Note = lambda _source, _wanted, _cause: None,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
) -> App:
    """
    The routes, with their limits.

    Args:
        count: Told what becomes of each who wants a certificate.
        note: Told of each that is refused for what it is: the address, for whom if that was said, and why.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    reception = Reception(limits, trust_domain)

    @app.get("/v1/trust-bundle")
    async def trust_bundle() -> BundleAnswer:
        return BundleAnswer(trust_domain=trust_domain, bundle=enrollment.bundle.pem.decode())

    @app.post("/v1/enrollments")
    async def enroll(stated: EnrollRequest, request: Request) -> EnrollAnswer:
        with reception.admitted(request) as host:
            identity = reception.named(stated.identity, request)
            application = Application(identity, parse_request(stated.request), host)
            issued = await enrollment.redeem(stated.token, application)
        count(Outcome.ENROLLED)
        return _answer(identity, issued)

    @app.post("/v1/enrollment-requests", response_model=None)
    async def ask(stated: ApprovalRequest, request: Request) -> EnrollAnswer | JSONResponse:
        with reception.admitted(request) as host:
            identity = reception.named(stated.identity, request)
            given = await enrollment.request(Application(identity, parse_request(stated.request), host))
        if isinstance(given, Issued):
            count(Outcome.ENROLLED)
            return _answer(identity, given)
        return waiting(given)

    @app.get("/v1/nonce")
    async def nonce(response: Response) -> dict[str, str]:
        response.headers["cache-control"] = "no-store"
        return {"nonce": exchange.nonce()}

    @app.post("/v1/exchanges")
    async def change(stated: ExchangeRequest, request: Request) -> EnrollAnswer:
        with reception.admitted(request) as host:
            identity = reception.named(stated.identity, request)
            issued = await exchange.exchange(identity, Proof.parse(stated.proof), host)
        count(Outcome.EXCHANGED)
        return _answer(identity, issued)

    def failed(scope: Scope, exc: ParallaxError) -> None:
        outcome = outcome_of(exc)
        count(outcome)
        if outcome in {Outcome.REFUSED, Outcome.INVALID}:
            note(host_of(scope), wanted_of(scope), exc)

    app.include_router(device_routes(enrollment, trust_domain, reception, count))
    _say_errors(app, failed)
    return bounded(app, failed)


def _answer(identity: Identity, issued: Issued) -> EnrollAnswer:
    chain = certificates_to_pem(issued.chain).decode()
    return EnrollAnswer(identity=str(identity), chain=chain, bundle=issued.bundle.pem.decode())


def _say_errors(app: FastAPI, failed: Failed) -> None:
    """Have every error answered as `{error, message}`; none repeats what was sent."""

    @app.exception_handler(ParallaxError)
    async def refused(request: Request, exc: ParallaxError) -> JSONResponse:
        failed(request.scope, exc)
        wait = retry_after(exc)
        headers = {"retry-after": wait} if wait else None
        return JSONResponse(body_of(exc), status_of(exc), headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, exc: RequestValidationError) -> JSONResponse:
        first = exc.errors()[0]
        is_ours = first["type"] != "extra_forbidden"  # else its name was sent
        where = ".".join(str(part) for part in first["loc"][:3] if part != "body" and is_ours)
        return await refused(request, InvalidRequest(f"{where or 'the body'}: {first['msg'].lower()}"))

    @app.exception_handler(400)
    async def unreadable(request: Request, exc: HTTPException) -> JSONResponse:
        return await refused(request, InvalidRequest(exc.detail.lower()))

    @app.exception_handler(404)
    @app.exception_handler(405)
    @app.exception_handler(HTTPException)
    async def unknown(_: Request, exc: HTTPException) -> JSONResponse:
        body = {"error": "InvalidRequest", "message": exc.detail.lower()}
        return JSONResponse(body, exc.status_code, exc.headers)

    @app.exception_handler(Exception)
    async def broken(_: Request, exc: Exception) -> JSONResponse:  # noqa: ARG001 - who serves it logs it
        body = {"error": "ParallaxError", "message": "internal error; the server's log has the cause"}
        return JSONResponse(body, 500)
