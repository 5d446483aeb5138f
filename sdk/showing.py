"""What a client that stays tells its operator over plain HTTP, where it is told to."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry

from parallax.runtime.handshakes import Handshakes, Side
from parallax.runtime.metrics import certificate_detail, watch_transport
from parallax.runtime.telemetry import MetricsListener, Readiness
from parallax.security.renewal import plan_renewal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parallax.runtime.dialling import Dialling
    from parallax.runtime.renewal import Renewer
    from parallax.security.credentials import CredentialStore
    from parallax.security.provider import MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator


def new_listener(
    address: str,
    provider: MTLSCredentialsProvider,
    store: CredentialStore,
    rotators: Sequence[CertificateRotator],
    renewers: Sequence[Renewer],
    dialling: Dialling,
) -> MetricsListener:
    """
    What shows how it stands with the certificate in *store*, and with the connections that present it.

    It is ready while peers accept that.

    Args:
        rotators, renewers: Of that certificate; read at each scrape, for they may come later.
        dialling: Of those connections; from now on each that is let in is shown.
    """
    registry = CollectorRegistry()
    watch_transport(registry, [provider], rotators, renewers, dialling.moves)
    # A client has no port: nobody begins a handshake with it.
    observe = Handshakes(registry, results=[]).timer(Side.PEER)
    dialling.tell(observe)

    def readiness() -> Readiness:
        is_ready = plan_renewal(store.current.leaf).urgency(datetime.now(UTC)).is_healthy
        return Readiness(is_ready, certificate_detail(rotators, renewers))

    return MetricsListener(address, registry, readiness)
