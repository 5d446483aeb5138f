"""How often who may."""

from __future__ import annotations

from datetime import timedelta

import pytest

from parallax.control_plane.edge import allowance as module
from parallax.control_plane.edge.allowance import Allowance, Rate, source_of
from parallax.security.errors import Unavailable


def test_so_many_at_once_then_so_many_per_second() -> None:
    allowance = Allowance(Rate(3, 2))
    for _ in range(3):
        allowance.take("a", 100)
    with pytest.raises(Unavailable) as refused:
        allowance.take("a", 100)
    assert refused.value.retry_after == timedelta(seconds=0.5)
    allowance.take("a", 100.5)
    with pytest.raises(Unavailable):
        allowance.take("a", 100.5)


def test_it_never_holds_more_than_at_the_beginning() -> None:
    allowance = Allowance(Rate(2, 1))
    allowance.take("a", 0)
    for _ in range(2):
        allowance.take("a", 10_000)
    with pytest.raises(Unavailable):
        allowance.take("a", 10_000)


def test_one_source_takes_nothing_from_another() -> None:
    allowance = Allowance(Rate(1, 1))
    allowance.take("a", 0)
    allowance.take("b", 0)


def test_sources_fill_nobodys_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SOURCES", 10)
    allowance = Allowance(Rate(1, 0.001))
    for number in range(100):
        allowance.take(f"source-{number}", 0)
    assert len(allowance._buckets) == 10
    with pytest.raises(Unavailable):
        allowance.take("source-99", 0)


@pytest.mark.parametrize(
    ("host", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", ""),
    ],
)
def test_a_subscriber_is_one_source(host: str, source: str) -> None:
    assert source_of(host) == source
