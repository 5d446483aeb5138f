"""What every process that speaks for an identity shows to Prometheus, whatever else it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

from parallax.security.port import Swapped
from parallax.security.provider import Mode

if TYPE_CHECKING:
    from parallax.security.credentials import CredentialStore
    from parallax.security.provider import MTLSCredentialsProvider


def watch_transport(registry: CollectorRegistry, provider: MTLSCredentialsProvider) -> None:
    """
    Show how *provider* speaks, until when its certificate lasts, and how its ports have changed theirs.

    Times are absolute: seconds left would be wrong between two scrapes.
    """
    insecure = Gauge("parallax_insecure_mode", "1 while connections are not encrypted.", registry=registry)
    insecure.set(provider.mode is Mode.PLAINTEXT)
    not_after = Gauge(
        "parallax_certificate_not_after_timestamp_seconds",
        "When a certificate that this process holds expires.",
        ["name"],
        registry=registry,
    )
    swaps = Counter(
        "parallax_server_credential_swaps",
        "Certificates changed in a port of this process, by whether the old one was pinned meanwhile.",
        ["result"],
        registry=registry,
    )
    for result in Swapped:
        swaps.labels(result)
    provider.on_swap = lambda result: swaps.labels(result).inc()
    store = provider.store
    if store is not None:
        # Read anew at each scrape: the store may hold another certificate by then.
        not_after.labels(provider.identity.name).set_function(lambda: _expiry(store))


def _expiry(store: CredentialStore) -> float:
    return store.current.leaf.not_valid_after_utc.timestamp()
