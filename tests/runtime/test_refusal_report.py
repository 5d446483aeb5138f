"""What an agent reports of its own port is read within bounds, whatever it says."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from parallax.protos import registry_pb2
from parallax.runtime.refusal import Refusal
from parallax.runtime.refusal_counts import MAX_KINDS, MAX_NAMED, MAX_TEXT, Count, Kind, RefusalCounts
from parallax.runtime.refusal_report import AT_AGENT, from_proto, to_proto
from parallax.security.errors import NotAuthorized
from parallax.security.identity import Identity

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
AGENT = Identity.parse_short("agent/agent-1")


def read(*report: registry_pb2.RefusedCalls) -> list[tuple[Kind, Count]]:
    return list(from_proto(report, AGENT, NOW))


def test_what_is_reported_is_what_was_counted_with_who_reports_it() -> None:
    counts = RefusalCounts()
    for second in range(3):
        refusal = Refusal("/parallax.v1.AgentService/Analyze", None, "ipv4:10.0.0.1:5", NotAuthorized("no"))
        counts.note(AT_AGENT, refusal, NOW - timedelta(seconds=second))
    [(kind, count)] = read(*to_proto(counts.take()))
    assert kind == Kind(AT_AGENT, "not_authorized", "unknown", "10.0.0.1", str(AGENT))
    assert count == Count(
        3, NOW - timedelta(seconds=2), NOW, ("/parallax.v1.AgentService/Analyze",), ("10.0.0.1",)
    )
    assert not counts.take()


def test_whatever_is_reported_is_cut() -> None:
    long = "x" * 100_000
    calls = registry_pb2.RefusedCalls(
        caller=long,
        reason=long,
        address=long,
        count=2**64 - 1,
        methods=[f"{number}{long}" for number in range(100)],
        sources=[f"{number}{long}" for number in range(100)],
    )
    calls.first_at.seconds, calls.last_at.seconds = 2**63 - 1, -(2**63)
    [(kind, count)] = read(calls)
    assert {len(text) for text in (kind.who, kind.reason, kind.where)} == {MAX_TEXT}
    assert (len(count.methods), len(count.sources)) == (MAX_NAMED + 1, MAX_NAMED + 1)
    assert (count.first, count.last) == (NOW, NOW)


def test_nothing_that_is_reported_is_later_than_now() -> None:
    calls = registry_pb2.RefusedCalls(count=1)
    calls.first_at.FromDatetime(NOW + timedelta(days=2))
    calls.last_at.FromDatetime(NOW + timedelta(days=1))
    [(_, count)] = read(calls)
    assert (count.first, count.last) == (NOW, NOW)


def test_more_than_an_honest_report_holds_is_passed_over() -> None:
    report = [registry_pb2.RefusedCalls(caller=str(number), count=1) for number in range(10_000)]
    assert len(read(*report)) == MAX_KINDS + 1
