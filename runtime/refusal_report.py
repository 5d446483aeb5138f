"""What an agent tells the control plane of those whom it did not let in, and what that makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from parallax.protos import registry_pb2
from parallax.runtime.refusal_counts import MAX_KINDS, MAX_TEXT, Count, Kind, some
from parallax.security.identity import Identity

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

AT_AGENT: Final = "agent/refused"


def to_proto(taken: Mapping[Kind, Count]) -> list[registry_pb2.RefusedCalls]:
    """What was counted since the last report."""
    report = []
    for kind, count in taken.items():
        calls = registry_pb2.RefusedCalls(
            caller=kind.who,
            reason=kind.reason,
            address=kind.where,
            count=count.times,
            methods=count.methods,
            sources=count.sources,
        )
        calls.first_at.FromDatetime(count.first)
        calls.last_at.FromDatetime(count.last)
        report.append(calls)
    return report


def from_proto(
    report: Iterable[registry_pb2.RefusedCalls], reporter: Identity, now: datetime
) -> Iterator[tuple[Kind, Count]]:
    """
    What *reporter* tells, which may be anything, of its own port.

    More than an honest one sends is passed over, and nothing is later than *now*.
    """
    for calls, _ in zip(report, range(MAX_KINDS + 1), strict=False):
        last = min(_instant(calls.last_at, now), now)
        yield (
            Kind(
                AT_AGENT,
                calls.reason[:MAX_TEXT],
                calls.caller[:MAX_TEXT],
                calls.address[:MAX_TEXT],
                str(reporter),
            ),
            Count(
                calls.count,
                min(_instant(calls.first_at, now), last),
                last,
                _names(calls.methods),
                _names(calls.sources),
            ),
        )


def _instant(stated: Timestamp, now: datetime) -> datetime:
    try:
        return stated.ToDatetime(UTC)
    except (ValueError, OverflowError):  # out of bounds
        return now


def _names(stated: Iterable[str]) -> tuple[str, ...]:
    return some(tuple(name[:MAX_TEXT] for name in stated))
