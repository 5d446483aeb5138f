"""What a scrape shows."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from parallax.control_plane.metrics import ControlPlaneMetrics, FleetCertificates
from parallax.control_plane.survey import Ends, Survey
from parallax.runtime.handshake_log import HandshakeFailure
from parallax.runtime.outcome import OutcomeCode
from parallax.security.identity import Identity, Kind


@pytest.fixture
def metrics() -> ControlPlaneMetrics:
    return ControlPlaneMetrics()


def sample(registry: CollectorRegistry, metric: str, /, **labels: str) -> float | None:
    return registry.get_sample_value(metric, labels)


def test_a_task_is_counted_by_outcome_and_timed(metrics: ControlPlaneMetrics) -> None:
    metrics.task_ended("OK", 0.02)
    metrics.task_ended("OK", 0.3)
    metrics.task_ended("HANDLER_FAILED", 100)
    registry = metrics.registry
    assert sample(registry, "parallax_tasks_total", outcome="OK") == 2
    assert sample(registry, "parallax_tasks_total", outcome="HANDLER_FAILED") == 1
    assert sample(registry, "parallax_task_duration_seconds_count") == 3
    assert sample(registry, "parallax_task_duration_seconds_sum") == pytest.approx(100.32)
    assert sample(registry, "parallax_task_duration_seconds_bucket", le="0.025") == 1
    assert sample(registry, "parallax_task_duration_seconds_bucket", le="60.0") == 2


@pytest.mark.parametrize("outcome", ["OK", *OutcomeCode])
def test_every_outcome_is_there_before_the_first(metrics: ControlPlaneMetrics, outcome: str) -> None:
    assert sample(metrics.registry, "parallax_tasks_total", outcome=outcome) == 0


@pytest.mark.parametrize("reason", [*HandshakeFailure, "not_authorized", "untrusted_chain", "wrong_identity"])
def test_every_reason_is_there_before_the_first(metrics: ControlPlaneMetrics, reason: str) -> None:
    assert sample(metrics.registry, "parallax_authentication_failures_total", reason=reason) == 0


def test_a_refusal_is_counted_by_reason(metrics: ControlPlaneMetrics) -> None:
    metrics.refused("expired")
    metrics.refused("expired")
    metrics.refused("not_authorized", times=3)
    registry = metrics.registry
    assert sample(registry, "parallax_authentication_failures_total", reason="expired") == 2
    assert sample(registry, "parallax_authentication_failures_total", reason="not_authorized") == 3


def test_what_is_watched_is_read_at_every_scrape(metrics: ControlPlaneMetrics) -> None:
    numbers = {
        "agents": 1,
        "sessions": 2,
        "proxies": 4,
        "in_flight": 3,
        "ledger": 5,
        "revoked": 6,
        "adoption": 50,
    }
    metrics.watch(
        agents=lambda: numbers["agents"],
        sessions=lambda: numbers["sessions"],
        proxies=lambda: numbers["proxies"],
        in_flight=lambda: numbers["in_flight"],
        ledger_waiting=lambda: numbers["ledger"],
        revocations=lambda: numbers["revoked"],
        adoption=lambda: numbers["adoption"] / 100,
        issuance_policy_stale=lambda: numbers["agents"] > 10,
    )
    for _ in range(2):
        registry = metrics.registry
        assert sample(registry, "parallax_agents") == numbers["agents"]
        assert sample(registry, "parallax_sessions") == numbers["sessions"]
        assert sample(registry, "parallax_agent_proxies") == numbers["proxies"]
        assert sample(registry, "parallax_tasks_in_flight") == numbers["in_flight"]
        assert sample(registry, "parallax_ledger_waiting") == numbers["ledger"]
        assert sample(registry, "parallax_revocations") == numbers["revoked"]
        assert sample(registry, "parallax_trust_bundle_adoption_ratio") == numbers["adoption"] / 100
        assert sample(registry, "parallax_issuance_policy_stale") == (numbers["agents"] > 10)
        numbers = {name: number + 10 for name, number in numbers.items()}


def test_two_control_planes_in_one_process_do_not_share_counters(metrics: ControlPlaneMetrics) -> None:
    other = ControlPlaneMetrics()
    metrics.take_overs.inc()
    assert sample(metrics.registry, "parallax_session_take_overs_total") == 1
    assert sample(other.registry, "parallax_session_take_overs_total") == 0


def test_every_metric_has_our_prefix_and_a_text(metrics: ControlPlaneMetrics) -> None:
    metrics.watch(
        agents=int,
        sessions=int,
        proxies=int,
        in_flight=int,
        ledger_waiting=int,
        revocations=int,
        adoption=int,
        issuance_policy_stale=bool,
    )
    lines = generate_latest(metrics.registry).decode().splitlines()
    helps = {line.split()[2]: line for line in lines if line.startswith("# HELP") and "_created" not in line}
    assert {"parallax_tasks_total", "parallax_agents", "parallax_sessions"} <= helps.keys()
    for name, line in helps.items():
        assert name.startswith("parallax_")
        assert line.endswith(".")


def test_the_fleets_certificates_are_shown_by_bucket_and_the_soonest_by_identity() -> None:
    now, registry = datetime(2026, 6, 1, tzinfo=UTC), CollectorRegistry()
    identities = [Identity("parallax.local", Kind.AGENT, f"agent-{n:02}") for n in range(20)]
    holdings = {who: (Ends("ca", now + timedelta(hours=2 + n)),) for n, who in enumerate(identities)}
    outlook = Survey(now, holdings).outlook()
    registry.register(FleetCertificates(lambda: outlook))
    assert sample(registry, "parallax_fleet_certificates", expires_within="1h") == 0
    assert sample(registry, "parallax_fleet_certificates", expires_within="1d") == 20
    soonest = "parallax_fleet_certificate_not_after_timestamp_seconds"
    assert sample(registry, soonest, identity="agent/agent-00") == (now + timedelta(hours=2)).timestamp()
    assert sample(registry, soonest, identity="agent/agent-10") is None


def test_of_a_fleet_that_is_not_counted_yet_nothing_is_shown() -> None:
    """Zero would be a number: that nobody's certificate ends."""
    registry = CollectorRegistry()
    registry.register(FleetCertificates(lambda: None))
    assert sample(registry, "parallax_fleet_certificates", expires_within="1h") is None
