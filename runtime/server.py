"""How we set up servers: the gate before every call, the same limits, and the port."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import grpc
from grpc import aio

from parallax.runtime.address import listen
from parallax.runtime.authenticator import Authenticator, CheckRevoked, OnVerified
from parallax.runtime.caller import Caller
from parallax.runtime.channel import message_limits
from parallax.runtime.clock import utc_now
from parallax.runtime.gate import Gate
from parallax.runtime.refusal import Refusal
from parallax.security.provider import Mode

if TYPE_CHECKING:
    from parallax.runtime.probe import PortProbe
    from parallax.security.credentials import CredentialStore
    from parallax.security.errors import ParallaxError
    from parallax.security.provider import MTLSCredentialsProvider

    _Handler = grpc.RpcMethodHandler[Any, Any]

# Nobody is authenticated before its end; gRPC would wait two minutes. No shorter: pins need 7 s of it, see
# `SecurePort`.
HANDSHAKE_MS: Final = 8_000
# Of the files that the process may open, what connections with a port may take: the rest is for the ledger,
# the HTTP ports and whoever is dialled. gRPC has no limit, and hangs up on whoever comes beyond this one.
OPEN_FILES: Final = 3 / 4
# Calls that have arrived and not begun. Beyond, gRPC cancels calls without a word, from 1,000 on by itself:
# to a caller who asks for as many tasks at once that looks like a lost connection.
MAX_PENDING_CALLS: Final = 10_000
# Calls at once on one connection, as many as may be pending; gRPC has no limit. A further one waits at the
# caller's end or, while others end, is Unavailable. A link carries any number of tasks in one call.
MAX_STREAMS: Final = 10_000
INT_MAX: Final = 2**31 - 1  # what gRPC takes for a number


class GatedServer(aio.Server):
    """
    A server all of whose services lie behind *gate*: there is no way to add one that does not.

    Everything else is what *server* does, which has no service of its own.
    """

    def __init__(self, server: aio.Server, gate: Gate) -> None:
        self._server = server
        self._gate = gate

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Serve these, behind the gate."""
        self._server.add_generic_rpc_handlers([_Gated(each, self._gate) for each in generic_rpc_handlers])

    def add_registered_method_handlers(
        self, service_name: str, method_handlers: Mapping[str, _Handler]
    ) -> None:
        """Serve these, behind the gate; generated code adds each service in both ways."""
        gated = {
            name: self._gate.before(handler, f"/{service_name}/{name}")
            for name, handler in method_handlers.items()
        }
        self._server.add_registered_method_handlers(service_name, gated)

    def add_insecure_port(self, address: str) -> int:
        """As gRPC does."""
        return self._server.add_insecure_port(address)

    def add_secure_port(self, address: str, server_credentials: grpc.ServerCredentials) -> int:
        """As gRPC does."""
        return self._server.add_secure_port(address, server_credentials)

    def review(self) -> None:
        """See `Gate.review`."""
        self._gate.review()

    def end_revoked(self) -> None:
        """See `Gate.end_revoked`."""
        self._gate.end_revoked()

    def lapse(self, cause: ParallaxError) -> None:
        """See `Gate.lapse`."""
        self._gate.lapse(cause)

    async def start(self) -> None:
        """As gRPC does."""
        await self._server.start()

    async def stop(self, grace: float | None) -> None:
        """As gRPC does."""
        await self._server.stop(grace)

    async def wait_for_termination(self, timeout: float | None = None) -> bool:
        """As gRPC does."""
        return await self._server.wait_for_termination(timeout)


class _Gated(grpc.GenericRpcHandler):
    """What *inner* serves, behind *gate*; a method that it does not serve stays UNIMPLEMENTED."""

    def __init__(self, inner: grpc.GenericRpcHandler, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate
        self._known: dict[str, tuple[_Handler, _Handler]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _Handler | None:
        """The gated handler of a method; None if there is none."""
        handler = self._inner.service(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known = self._known.get(method)
        if known is None or known[0] is not handler:
            known = self._known[method] = handler, self._gate.before(handler, method)
        return known[1]


def max_connections() -> int:
    """How many connections a port of this process has at once, those included that shake hands."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return INT_MAX if soft == resource.RLIM_INFINITY else min(int(soft * OPEN_FILES), INT_MAX)


def new_server(
    provider: MTLSCredentialsProvider,
    authorize: Callable[[Caller, str], None],
    on_refusal: Callable[[Refusal], None],
    max_payload_bytes: int,
    on_verified: OnVerified = lambda _peer, _leaf: True,
    on_call: Callable[[str], None] | None = None,
    check_revoked: CheckRevoked = lambda _peer: None,
    check_current: Callable[[], None] = lambda: None,
) -> GatedServer:
    """
    A server without services or a port, which knows its callers as *provider* says.

    Args:
        authorize, on_refusal, check_current: See `Gate`.
        on_verified, check_revoked: See `Authenticator`.
        on_call: Told the peer's address of each call over TLS.
    """
    store = provider.store if provider.mode is Mode.MUTUAL else None
    authenticator = Authenticator(store, provider.identity.trust_domain, utc_now, on_verified, check_revoked)
    server = aio.server(
        options=[
            *message_limits(max_payload_bytes),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.max_allowed_incoming_connections", max_connections()),
            ("grpc.max_concurrent_streams", MAX_STREAMS),
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # peers ping to notice a dead path
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )
    if provider.mode is Mode.PLAINTEXT:
        on_call = None
    gate = Gate(authenticator, authorize, on_refusal, utc_now, on_call, check_current)
    return GatedServer(server, gate)


@asynccontextmanager
async def serving(
    server: GatedServer,
    provider: MTLSCredentialsProvider,
    address: str,
    grace_s: float,
    probe: PortProbe | None = None,
) -> AsyncIterator[int]:
    """
    Let *server*, which has all its services, listen on *address* for as long as the block; the port.

    Handshakes follow the credentials of *provider*; where it trusts a root no longer, or a pin is gone, what
    is open under that ends. In the end calls have *grace_s* left.

    Args:
        probe: Runs for as long.

    Raises:
        ConfigError: It cannot be bound, or plaintext would leave loopback.
    """
    (await listen(address, "PARALLAX_LISTEN")).close()  # gRPC would say only on stderr why it cannot
    port = provider.add_port(server, address)
    await server.start()
    async with asyncio.TaskGroup() as group:
        following = group.create_task(port.follow())
        reviewing = group.create_task(_review_after_withdrawals(server, provider.store))
        probing = group.create_task(probe.run(port.address)) if probe is not None else None
        try:
            yield port.number
        finally:
            if probing is not None:
                probing.cancel()
            await server.stop(grace_s)
            following.cancel()
            reviewing.cancel()


async def _review_after_withdrawals(server: GatedServer, store: CredentialStore | None) -> None:
    """Review what is open whenever a root or a pin was taken out, until cancelled."""
    if store is None:
        return
    seen = store.served
    while True:
        now = await store.served_other(seen)
        roots = set(seen.credentials.bundle.roots)
        if not roots <= set(now.credentials.bundle.roots) or not now.pins.keep_all_of(seen.pins):
            server.review()
        seen = now
