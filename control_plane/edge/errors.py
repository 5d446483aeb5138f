"""What the HTTPS listener says of whatever goes wrong: `{error, message}`, with a status that fits."""

from __future__ import annotations

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from parallax.control_plane.edge.bounds import Failed
from parallax.control_plane.edge.status import body_of, retry_after, status_of
from parallax.security.errors import InvalidRequest, ParallaxError


def say_errors(app: FastAPI, failed: Failed) -> None:
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
