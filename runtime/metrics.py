"""What every process that speaks for an identity shows to Prometheus, whatever else it does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from cryptography.hazmat.primitives import hashes
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from parallax.runtime.dialling import Moved
from parallax.security.certificate import MALFORMED
from parallax.security.port import Swapped
from parallax.security.provider import Mode
from parallax.security.renewal import Urgency

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

    from parallax.runtime.renewal import Renewer
    from parallax.security.credentials import CredentialStore
    from parallax.security.provider import MTLSCredentialsProvider
    from parallax.security.rotation import CertificateRotator

MAX_SHOWN: Final = 16  # of issuers and of roots: a system trusts over a hundred, and each would be two series
_IN_FORCE: Final = "in force"


def watch_transport(
    registry: CollectorRegistry,
    providers: Sequence[MTLSCredentialsProvider],
    rotators: Sequence[CertificateRotator] = (),
    renewers: Sequence[Renewer] = (),
    moves: Mapping[Moved, int] | None = None,
) -> None:
    """
    Show how *providers* speak, how long their certificates last, how ports change them, how the others fare.

    Times are absolute: seconds left would be wrong between two scrapes.

    Args:
        renewers: Read at each scrape: there may be more by then.
        moves: Of what this process dials, see `Dialling`.
    """
    insecure = Gauge("parallax_insecure_mode", "1 while connections are not encrypted.", registry=registry)
    insecure.set(any(provider.mode is Mode.PLAINTEXT for provider in providers))
    stores = [provider.store for provider in providers if provider.store is not None]
    registry.register(_Certificates(stores))
    if rotators:
        registry.register(_Rotations(rotators))
    registry.register(_Renewals(renewers))
    if moves is not None:
        registry.register(_Moves(moves))
    swaps = Counter(
        "parallax_server_credential_swaps",
        "Certificates changed in a port of this process, by whether the old one was pinned meanwhile.",
        ["result"],
        registry=registry,
    )
    for result in Swapped:
        swaps.labels(result)
    for provider in providers:
        provider.on_swap = lambda result: swaps.labels(result).inc()


def certificate_detail(
    rotators: Sequence[CertificateRotator], renewers: Sequence[Renewer] = ()
) -> dict[str, str]:
    """How it stands with each certificate and its files, for `/readyz`; the log has the whole reason."""
    details = {rotator.identity.name: _say(rotator) for rotator in rotators}
    for renewer in renewers:
        name = renewer.identity.name
        details[name] = f"{details.get(name, _IN_FORCE)}, {_say_renewal(renewer)}"
    return {f"certificate {name}": detail for name, detail in details.items()}


class _Certificates(Collector):
    """The certificates in *stores*, read anew at each scrape."""

    def __init__(self, stores: Sequence[CredentialStore]) -> None:
        self._stores = stores

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What a scrape shows."""
        held: dict[str, tuple[float, float]] = {}
        for store in self._stores:
            current = store.current
            held |= _named("root", current.bundle.roots)
            held |= _named("issuer", current.chain[1:])
        held |= {store.identity.name: _validity(store.current.leaf) for store in self._stores}
        for moment, name, text in (
            (0, "parallax_certificate_not_before_timestamp_seconds", "becomes valid"),
            (1, "parallax_certificate_not_after_timestamp_seconds", "expires"),
        ):
            family = GaugeMetricFamily(
                name, f"When a certificate that this process holds {text}.", labels=["name"]
            )
            for whose, validity in held.items():
                family.add_metric([whose], validity[moment])
            yield family


class _Rotations(Collector):
    """How *rotators* fare."""

    def __init__(self, rotators: Sequence[CertificateRotator]) -> None:
        self._rotators = rotators

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """What a scrape shows; every result from the start, for a rate misses what a series begins with."""
        rotations = CounterMetricFamily(
            "parallax_certificate_rotations",
            "Attempts to put changed certificate files in force, by result.",
            labels=["name", "result"],
        )
        success = GaugeMetricFamily(
            "parallax_certificate_rotation_last_success_timestamp_seconds",
            "When certificate files last came to be what is in force, the start included.",
            labels=["name"],
        )
        failure = GaugeMetricFamily(
            "parallax_certificate_rotation_last_failure_timestamp_seconds",
            "When certificate files were last found that cannot be used; 0 for never.",
            labels=["name"],
        )
        restarts = CounterMetricFamily(
            "parallax_certificate_observer_restarts",
            "Times the observer of certificate files had died and was replaced.",
        )
        total = 0
        for rotator in self._rotators:
            name, status = rotator.identity.name, rotator.status
            for result, count in status.counts.items():
                rotations.add_metric([name, result], count)
            success.add_metric([name], status.last_success.timestamp())
            failure.add_metric([name], status.last_failure.timestamp() if status.last_failure else 0)
            total += status.restarts
        restarts.add_metric([], total)
        yield from (rotations, success, failure, restarts)


class _Renewals(Collector):
    """How *renewers* fare."""

    def __init__(self, renewers: Sequence[Renewer]) -> None:
        self._renewers = renewers

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """What a scrape shows; of what others renew, nothing."""
        planned = GaugeMetricFamily(
            "parallax_certificate_renewal_timestamp_seconds",
            "When a certificate that this process holds is, or was, to be renewed.",
            labels=["name"],
        )
        renewals = CounterMetricFamily(
            "parallax_certificate_renewals",
            "Attempts to have a certificate renewed, by result.",
            labels=["name", "result"],
        )
        for renewer in self._renewers:
            if renewer.is_ours:
                name = renewer.identity.name
                planned.add_metric([name], renewer.due.timestamp())
                for result, count in renewer.counts.items():
                    renewals.add_metric([name, result], count)
        yield from (planned, renewals)


class _Moves(Collector):
    """How often connections changed credentials, or did not."""

    def __init__(self, moves: Mapping[Moved, int]) -> None:
        self._moves = moves

    def collect(self) -> Iterator[CounterMetricFamily]:
        """What a scrape shows."""
        moved = CounterMetricFamily(
            "parallax_connections_moved",
            "Attempts to move a connection or session to another certificate, by result.",
            labels=["result"],
        )
        for result in Moved:
            moved.add_metric([result], self._moves[result])
        yield moved


def _named(what: str, certificates: Sequence[Certificate]) -> dict[str, tuple[float, float]]:
    """
    Validity by name, of those that end first.

    A name is the beginning of a fingerprint, since two roots may have one subject, and has a colon in it,
    which no identity's name has.
    """
    named = {}
    for certificate in certificates:
        try:
            validity = _validity(certificate)
        except MALFORMED:  # a root may be odd, as long as no path needs it
            continue
        named[f"{what}:{certificate.fingerprint(hashes.SHA256()).hex()[:8]}"] = validity
    return dict(sorted(named.items(), key=lambda item: item[1][1])[:MAX_SHOWN])


def _validity(certificate: Certificate) -> tuple[float, float]:
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()


def _say(rotator: CertificateRotator) -> str:
    status = rotator.status
    if status.defect is None:
        return _IN_FORCE
    return f"the last good one is in force, files {status.defect} since {status.since:%Y-%m-%dT%H:%M:%SZ}"


def _say_renewal(renewer: Renewer) -> str:
    urgency, last = renewer.urgency, renewer.last
    if urgency is Urgency.EXPIRED:
        return "but expired"
    if not renewer.is_ours:
        return "not renewed here" if urgency is Urgency.FINE else f"not renewed here, renewal {urgency}"
    if urgency is Urgency.FINE:
        return f"to be renewed at {renewer.due:%Y-%m-%dT%H:%M:%SZ}"
    return f"renewal {urgency}" + (f": {last.result}" if last.problem is not None else "")
