"""How many TLS handshakes succeed and fail, and how long they take, as far as a process can tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from prometheus_client import Counter, Histogram

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

MAX_KNOWN: Final = 4096
# From a connection within a host to one around the world, on a machine that is short of time.
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class HandshakeResult(StrEnum):
    """How a handshake can end: of the names in gRFC A118 those that can be told here."""

    SUCCESS = "SUCCESS"
    CERTIFICATE_VERIFICATION_FAILED = "CERTIFICATE_VERIFICATION_FAILED"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    CERTIFICATE_NOT_YET_VALID = "CERTIFICATE_NOT_YET_VALID"
    CERTIFICATE_AUTHORITY_INVALID = "CERTIFICATE_AUTHORITY_INVALID"
    CERTIFICATE_HOSTNAME_MISMATCH = "CERTIFICATE_HOSTNAME_MISMATCH"
    PROTOCOL_VERSION_UNSUPPORTED = "PROTOCOL_VERSION_UNSUPPORTED"
    UNEXPECTED_MESSAGE = "UNEXPECTED_MESSAGE"
    UNKNOWN_FAILURE = "UNKNOWN_FAILURE"


class Side(StrEnum):
    """Whose port a handshake was timed with."""

    OWN_PORT = "own_port"
    PEER = "peer"


class Handshakes:
    """
    The handshakes of one process, in Prometheus' terms.

    gRPC tells of no handshake that succeeds. What is counted is a connection's first call: by the
    peer's address, as long as it is among the last `MAX_KNOWN` that called. A port that is used
    again meanwhile is taken for the same connection.

    Args:
        results: Those that anybody here can tell; no others are shown.
    """

    def __init__(
        self, registry: CollectorRegistry, results: Iterable[HandshakeResult] = HandshakeResult
    ) -> None:
        ended = Counter(
            "parallax_tls_handshakes",
            "TLS handshakes by result: connections to this process that made a call, and failures.",
            ["result"],
            registry=registry,
        )
        self._durations = Histogram(
            "parallax_tls_handshake_duration_seconds",
            "Connecting, the TLS handshake and HTTP/2's greeting, of connections that this process opened.",
            ["side"],
            buckets=BUCKETS,
            registry=registry,
        )
        self._results = {result: ended.labels(result) for result in results}
        self._known: dict[str, None] = {}  # least recent first

    def called(self, peer: str) -> None:
        """Note a call over TLS from *peer*, an address as gRPC writes it."""
        known = self._known
        if peer in known:
            del known[peer]
        else:
            self._results[HandshakeResult.SUCCESS].inc()
            if len(known) >= MAX_KNOWN:
                del known[next(iter(known))]
        known[peer] = None

    def failed(self, result: HandshakeResult, times: int) -> None:
        """Note handshakes that failed."""
        self._results[result].inc(times)

    def timer(self, side: Side) -> Callable[[float], None]:
        """Who is to be told how long each took that succeeded, in seconds; shown from now on."""
        return self._durations.labels(side).observe
