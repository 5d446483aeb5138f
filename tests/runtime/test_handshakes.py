"""What is counted as a handshake, and what they are called."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry

from parallax.runtime.handshake_log import HandshakeFailure
from parallax.runtime.handshakes import MAX_KNOWN, HandshakeResult, Handshakes, Side


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def handshakes(registry: CollectorRegistry) -> Handshakes:
    return Handshakes(registry)


def count(registry: CollectorRegistry, result: HandshakeResult) -> float | None:
    return registry.get_sample_value("parallax_tls_handshakes_total", {"result": result})


@pytest.mark.usefixtures("handshakes")
@pytest.mark.parametrize("result", HandshakeResult)
def test_every_result_is_there_before_the_first(registry: CollectorRegistry, result: HandshakeResult) -> None:
    assert count(registry, result) == 0


def test_a_connection_counts_once_however_many_calls_it_makes(
    registry: CollectorRegistry, handshakes: Handshakes
) -> None:
    for peer in ("ipv4:127.0.0.1:1", "ipv4:127.0.0.1:2", "ipv4:127.0.0.1:1"):
        handshakes.called(peer)
    assert count(registry, HandshakeResult.SUCCESS) == 2


def test_who_keeps_calling_is_known_whoever_else_comes(
    registry: CollectorRegistry, handshakes: Handshakes
) -> None:
    """And no more is remembered than there is room for."""
    for number in range(3 * MAX_KNOWN):
        handshakes.called("ipv4:127.0.0.1:1")
        handshakes.called(f"ipv4:127.0.0.2:{number}")
    assert count(registry, HandshakeResult.SUCCESS) == 3 * MAX_KNOWN + 1
    handshakes.called("ipv4:127.0.0.2:0")
    assert count(registry, HandshakeResult.SUCCESS) == 3 * MAX_KNOWN + 2


@pytest.mark.parametrize("reason", HandshakeFailure)
def test_every_failure_has_a_name_in_the_terms_of_grpc(
    registry: CollectorRegistry, handshakes: Handshakes, reason: HandshakeFailure
) -> None:
    handshakes.failed(reason.result, 2)
    assert reason.result is not HandshakeResult.SUCCESS
    assert count(registry, reason.result) == 2


def test_durations_name_whose_port_it_was(registry: CollectorRegistry, handshakes: Handshakes) -> None:
    name = "parallax_tls_handshake_duration_seconds"
    timer = handshakes.timer(Side.OWN_PORT)
    assert registry.get_sample_value(f"{name}_count", {"side": "own_port"}) == 0
    timer(0.003)
    assert registry.get_sample_value(f"{name}_count", {"side": "own_port"}) == 1
    assert registry.get_sample_value(f"{name}_sum", {"side": "own_port"}) == pytest.approx(0.003)
    assert registry.get_sample_value(f"{name}_count", {"side": "peer"}) is None


def test_what_nobody_can_tell_is_not_shown(registry: CollectorRegistry) -> None:
    Handshakes(registry, [HandshakeResult.SUCCESS])
    assert count(registry, HandshakeResult.SUCCESS) == 0
    assert count(registry, HandshakeResult.CERTIFICATE_EXPIRED) is None
