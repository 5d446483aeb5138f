"""What the control plane counts, in Prometheus' terms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from parallax.runtime.handshake_log import HandshakeFailure
from parallax.runtime.interceptors import REASONS
from parallax.runtime.outcome import OutcomeCode

_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class ControlPlaneMetrics:
    """One registry of metrics per control plane; every label's values are a closed set."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tasks = Counter(
            "parallax_tasks",
            "Tasks ended, by outcome code; OK has a value.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in ("OK", *OutcomeCode):
            self._tasks.labels(outcome)  # at zero: a rate over a series that begins at 1 misses the 1
        self._duration = Histogram(
            "parallax_task_duration_seconds",
            "From the arrival of a task to its outcome, waiting for an agent included.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.take_overs = Counter(
            "parallax_session_take_overs",
            "Sessions superseded by another instance with the same identity.",
            registry=self.registry,
        )
        self.refusals = Counter(
            "parallax_authentication_failures",
            "Connections and calls refused for who the caller is, by reason.",
            ["reason"],
            registry=self.registry,
        )
        for reason in {*HandshakeFailure, *REASONS}:
            self.refusals.labels(reason)

    def watch(
        self, *, agents: Callable[[], int], sessions: Callable[[], int], in_flight: Callable[[], int]
    ) -> None:
        """Read these at every scrape."""
        for name, text, read in (
            ("parallax_agents", "Agents registered.", agents),
            ("parallax_sessions", "Sessions open.", sessions),
            ("parallax_tasks_in_flight", "Tasks given to an agent and not yet answered.", in_flight),
        ):
            Gauge(name, text, registry=self.registry).set_function(read)

    def task_ended(self, outcome: str, seconds: float) -> None:
        """Count one task."""
        self._tasks.labels(outcome).inc()
        self._duration.observe(seconds)

    def refused(self, reason: str, times: int = 1) -> None:
        """Count refused connections or calls."""
        self.refusals.labels(reason).inc(times)
