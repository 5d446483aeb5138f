"""How we set up channels, apart from credentials."""

from __future__ import annotations

from typing import Final

from parallax.runtime.outcome import LARGEST_LIMIT_BYTES

MESSAGE_OVERHEAD_BYTES: Final = 1024 * 1024  # above the largest payload: what else a message may carry


def message_limits(max_payload_bytes: int, max_received_bytes: int | None = None) -> list[tuple[str, int]]:
    """
    The gRPC options that bound a message: a payload, or a full frame, and what goes with it.

    Args:
        max_received_bytes: Of the payload in a message that arrives, where that may be larger.
    """
    received = max_payload_bytes if max_received_bytes is None else max_received_bytes
    return [
        ("grpc.max_receive_message_length", received + MESSAGE_OVERHEAD_BYTES),
        ("grpc.max_send_message_length", max_payload_bytes + MESSAGE_OVERHEAD_BYTES),
    ]


def channel_options(max_payload_bytes: int) -> list[tuple[str, int]]:
    """
    The gRPC options of a client's channel to a control plane.

    It outlives a control plane that is away. One that is back is found within three seconds: by itself gRPC
    would let up to two minutes pass, in which every call fails.
    """
    return [
        *message_limits(max_payload_bytes),
        *_COMMON,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),  # no less: to be refused costs a handshake each time
    ]


def session_options(max_payload_bytes: int) -> list[tuple[str, int]]:
    """
    The gRPC options of an agent's channel to a control plane.

    What arrives is bounded by the control plane's setting, not ours: over gRPC's limit a single task
    would end the stream and with it all others. One over *max_payload_bytes* fails by itself, in the handler.
    """
    return [*message_limits(max_payload_bytes, LARGEST_LIMIT_BYTES), *_COMMON]


def direct_options(max_payload_bytes: int) -> list[tuple[str, int]]:
    """
    The gRPC options of a channel to an agent that listens itself.

    It is dialled again when a call needs it, soon: an agent that restarts is back within seconds.
    """
    return [
        *message_limits(max_payload_bytes),
        *_COMMON,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # not a pause: so long an attempt may take
        ("grpc.max_reconnect_backoff_ms", 1_000),
    ]


_COMMON: Final = (
    ("grpc.enable_http_proxy", 0),  # an environment variable must not redirect identities
    ("grpc.keepalive_time_ms", 20_000),  # a path that died silently is noticed within half a minute
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.use_local_subchannel_pool", 1),  # channels with other credentials share nothing
)
