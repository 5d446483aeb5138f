"""The HTTPS listener: the trust bundle for all, certificates for who has a token or a pin."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.routing import APIRoute
from pydantic import BaseModel

from parallax.control_plane.edge.allowance import Limits
from parallax.control_plane.edge.bounds import bounded
from parallax.control_plane.edge.certificates import enrollment_routes, exchange_routes
from parallax.control_plane.edge.devices import device_routes
from parallax.control_plane.edge.errors import say_errors
from parallax.control_plane.edge.outcome import Outcome, outcome_of
from parallax.control_plane.edge.reception import Reception, host_of, wanted_of
from parallax.control_plane.enrollment import Enrollment
from parallax.control_plane.exchange import Exchange
from parallax.runtime.http import App, Scope
from parallax.security.errors import ParallaxError

Note = Callable[[str, str, str, ParallaxError], None]


class BundleAnswer(BaseModel):
    """What the fleet trusts: for whoever can tell by a pin whether to believe it."""

    trust_domain: str
    bundle: str


def new_app(
    enrollment: Enrollment,
    exchange: Exchange,
    trust_domain: str,
    count: Callable[[Outcome], None] = lambda _: None,
    note: Note = lambda _source, _path, _wanted, _cause: None,
    limits: Limits = Limits(),  # noqa: B008 - it is frozen
) -> App:
    """
    The routes, with their limits.

    Args:
        count: Told what becomes of each who wants a certificate.
        note: Told of each that is refused or put off: the address, the path if it is one of ours, for whom
            if that was said, and why.
    """
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    reception = Reception(limits, trust_domain)

    @app.get("/v1/trust-bundle")
    async def trust_bundle() -> BundleAnswer:
        return BundleAnswer(trust_domain=trust_domain, bundle=enrollment.bundle.pem.decode())

    def failed(scope: Scope, exc: ParallaxError) -> None:
        outcome = outcome_of(exc)
        count(outcome)
        if outcome in {Outcome.REFUSED, Outcome.INVALID, Outcome.DEFERRED}:
            path = scope["path"] if scope["path"] in paths else ""  # else it is a stranger's to choose
            note(host_of(scope), path, wanted_of(scope), exc)

    routers = (
        enrollment_routes(enrollment, reception, count),
        exchange_routes(exchange, reception, count),
        device_routes(enrollment, trust_domain, reception, count),
    )
    for router in routers:
        app.include_router(router)
    paths = {route.path for each in (app, *routers) for route in each.routes if isinstance(route, APIRoute)}
    say_errors(app, failed)
    return bounded(app, failed)
