"""What the control plane counts, in Prometheus' terms."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from parallax.control_plane.crl import CRLPublisher, Obstacle
from parallax.control_plane.edge.outcome import Outcome
from parallax.control_plane.survey import Outlook
from parallax.control_plane.tally import TaskTally
from parallax.runtime.handshake_log import HandshakeFailure
from parallax.runtime.handshakes import Handshakes
from parallax.runtime.metrics import MAX_SHOWN
from parallax.runtime.refusal import REASONS


class ControlPlaneMetrics:
    """
    One registry of metrics per control plane; every label's values are a closed set.

    Attributes:
        handshakes: Those with its port.
        task_ended: Told the outcome code, or "OK", and the seconds a task took.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        tally = TaskTally()
        self.registry.register(tally)
        self.task_ended = tally.add
        self.handshakes = Handshakes(self.registry)
        self.take_overs = Counter(
            "parallax_session_take_overs",
            "Sessions superseded by another instance with the same identity.",
            registry=self.registry,
        )
        self.duplicates = Counter(
            "parallax_certificate_duplicates",
            "Renewals that showed that two copies of one certificate are in use.",
            registry=self.registry,
        )
        self.refusals = Counter(
            "parallax_authentication_failures",
            "Connections and calls refused for who the caller is, by reason.",
            ["reason"],
            registry=self.registry,
        )
        self.ledger_deferrals = Counter(
            "parallax_ledger_deferrals",
            "Times that a certificate seen had to be seen again, for too many waited to be entered.",
            registry=self.registry,
        )
        self.enrollments = Counter(
            "parallax_enrollments",
            "Requests for a first certificate, by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in Outcome:
            self.enrollments.labels(outcome)
        for reason in {*HandshakeFailure, *REASONS}:
            self.refusals.labels(reason)

    def watch(
        self,
        *,
        agents: Callable[[], int],
        sessions: Callable[[], int],
        proxies: Callable[[], int],
        in_flight: Callable[[], int],
        ledger_waiting: Callable[[], int],
        revocations: Callable[[], int],
        adoption: Callable[[], float],
        issuance_policy_stale: Callable[[], bool],
    ) -> None:
        """Read these at every scrape."""
        for name, text, read in (
            ("parallax_agents", "Agents registered.", agents),
            ("parallax_sessions", "Sessions open.", sessions),
            ("parallax_agent_proxies", "Sessions open with agents that the control plane dialled.", proxies),
            ("parallax_tasks_in_flight", "Tasks given to an agent and not yet answered.", in_flight),
            (
                "parallax_ledger_waiting",
                "Certificates seen that the ledger has not entered yet.",
                ledger_waiting,
            ),
            (
                "parallax_revocations",
                "Certificates revoked, and identities that are or were.",
                revocations,
            ),
            (
                "parallax_trust_bundle_adoption_ratio",
                "Which part of the fleet has the roots in force that it is told; 1 while no root is rotated.",
                adoption,
            ),
            (
                "parallax_issuance_policy_stale",
                "1 while the file of the issuance policy cannot be used, and the one before is in force.",
                issuance_policy_stale,
            ),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def handshake_failed(self, reason: HandshakeFailure, times: int) -> None:
        """Count failed handshakes."""
        self.refused(reason.value, times)
        self.handshakes.failed(reason.result, times)

    def enrolled(self, outcome: Outcome) -> None:
        """Count what became of somebody who wants a first certificate."""
        self.enrollments.labels(outcome).inc()

    def refused(self, reason: str, times: int = 1) -> None:
        """Count refused connections or calls."""
        self.refusals.labels(reason).inc(times)


class FleetCertificates(Collector):
    """
    When the fleet's certificates end, as the ledger was found last: no scrape looks into it.

    Nothing is shown until all of it was counted: of a part, the numbers would be wrong.
    """

    def __init__(self, last: Callable[[], Outlook | None]) -> None:
        self._last = last

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What a scrape shows."""
        outlook = self._last()
        buckets = GaugeMetricFamily(
            "parallax_fleet_certificates",
            "Identities by when their last certificate ends, each in one bucket.",
            labels=["expires_within"],
        )
        for name, count in outlook.buckets.items() if outlook else ():
            buckets.add_metric([name], count)
        soonest = GaugeMetricFamily(
            "parallax_fleet_certificate_not_after_timestamp_seconds",
            "When the last certificate ends of the ten identities that are without one first.",
            labels=["identity"],
        )
        for who, end in outlook.soonest if outlook else ():
            soonest.add_metric([who.short], end.timestamp())
        yield from (buckets, soonest)


class PublishedCRLs(Collector):
    """The CRLs that are stale first; an issuer is shown by the beginning of its key's id."""

    def __init__(self, publisher: CRLPublisher) -> None:
        self._publisher = publisher

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What a scrape shows."""
        due = GaugeMetricFamily(
            "parallax_crl_next_update_timestamp_seconds", "When a CRL is stale.", labels=["issuer"]
        )
        number = GaugeMetricFamily("parallax_crl_number", "The number of a CRL.", labels=["issuer"])
        entries = GaugeMetricFamily(
            "parallax_crl_entries", "How many certificates a CRL lists.", labels=["issuer"]
        )
        for published in self._publisher.published[:MAX_SHOWN]:
            issuer, crl = [published.issuer[:8]], published.crl
            due.add_metric(issuer, crl.next_update.timestamp())
            number.add_metric(issuer, crl.number)
            entries.add_metric(issuer, len(crl))
        blocked = GaugeMetricFamily(
            "parallax_crl_obstacle", "1 while this keeps a CRL from being published.", labels=["reason"]
        )
        for obstacle in Obstacle:
            blocked.add_metric([obstacle], obstacle in self._publisher.obstacles)
        yield from (due, number, entries, blocked)
