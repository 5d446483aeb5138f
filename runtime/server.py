"""How we set up servers: the gate before every call, the same limits, and the port."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from grpc import aio

from parallax.runtime.address import listen
from parallax.runtime.channel import message_limits
from parallax.runtime.interceptors import Authenticator, Caller, Gate, utc_now
from parallax.security.provider import Mode

if TYPE_CHECKING:
    from parallax.security.provider import MTLSCredentialsProvider

HANDSHAKE_MS: Final = 10_000  # nobody is authenticated before its end; gRPC would wait two minutes
# Calls that have arrived and not begun. Beyond, gRPC cancels calls without a word, from 1,000 on by itself:
# to a caller who asks for as many tasks at once that looks like a lost connection.
MAX_PENDING_CALLS: Final = 10_000


def new_server(
    provider: MTLSCredentialsProvider,
    authorize: Callable[[Caller, str], None],
    on_refusal: Callable[[str], None],
    max_payload_bytes: int,
) -> aio.Server:
    """
    A server without services or a port, which knows its callers as *provider* says.

    Args:
        authorize, on_refusal: See `Gate`.
    """
    store = provider.store if provider.mode is Mode.MUTUAL else None
    gate = Gate(Authenticator(store, provider.identity.trust_domain, utc_now), authorize, on_refusal)
    return aio.server(
        interceptors=[gate],
        options=[
            *message_limits(max_payload_bytes),
            ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
            ("grpc.server.max_pending_requests", MAX_PENDING_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", MAX_PENDING_CALLS),
            ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),  # peers ping to notice a dead path
            ("grpc.keepalive_permit_without_calls", 1),
        ],
    )


async def bind(server: aio.Server, provider: MTLSCredentialsProvider, address: str) -> int:
    """
    Let *server*, which has not started, listen on *address*; the port.

    Raises:
        ConfigError: It cannot be bound, or plaintext would leave loopback.
    """
    (await listen(address, "PARALLAX_LISTEN")).close()  # gRPC would say only on stderr why it cannot
    return provider.add_port(server, address)
