"""`grpc.health.v1`: whether a server takes work, for probes and load balancers that speak gRPC."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any

from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from parallax.runtime.watches import Watches

Context = aio.ServicerContext[Any, Any]


class HealthService(health_pb2_grpc.HealthServicer):
    """
    One answer for the process and for each of *services*; not serving at first.

    In grpcio's own servicer, a watcher that does not read holds the lock that a change of status
    needs: any peer could keep the process from stopping.

    Args:
        probe: Whether it can do its work while it serves; asked at every check, not for who watches.
    """

    def __init__(self, services: Iterable[str], probe: Callable[[], bool] = lambda: True) -> None:
        self._services = ("", *services)
        self._probe = probe
        self._response = _response(serving=False)
        self._changed = asyncio.Event()
        self._watches = Watches("the health")

    def set(self, *, serving: bool) -> None:
        """Answer so from now on, and tell who watches; waits for nobody."""
        self._response = _response(serving=serving)
        self._changed.set()
        self._changed = asyncio.Event()

    async def Check(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self._services:
            await context.abort(StatusCode.NOT_FOUND, "no such service")
        return self._response if self._probe() else _response(serving=False)

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Context
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Tell it now and when it changes; raises Unavailable if the caller is told so often already."""
        unknown = health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVICE_UNKNOWN)
        with self._watches.one_more():
            while True:
                changed = self._changed
                yield self._response if request.service in self._services else unknown
                await changed.wait()


def _response(*, serving: bool) -> health_pb2.HealthCheckResponse:
    status = health_pb2.HealthCheckResponse
    return status(status=status.SERVING if serving else status.NOT_SERVING)
