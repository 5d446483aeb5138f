"""Refused calls and failed handshakes on their way into the audit log: counted, so that nobody fills it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Final

from parallax.control_plane.audit import AuditLog, Deed
from parallax.control_plane.edge.allowance import source_of
from parallax.protos import registry_pb2
from parallax.runtime.handshake_log import HandshakeFailure
from parallax.runtime.refusal import Refusal
from parallax.runtime.refusal_counts import OTHERS, Count, Kind, RefusalCounts
from parallax.runtime.refusal_report import AT_AGENT, from_proto
from parallax.security.errors import StorageFailed
from parallax.security.identity import Identity

PAUSE_S: Final = 60.0  # between two looks: so often a kind is entered at the most

CALL: Final = "call/refused"
HANDSHAKE: Final = "handshake/refused"
UNKNOWN: Final = "unknown"


class Refusals:
    """
    Counts what is refused by reason and identity, or address where there is none; enters it once a minute.

    That is beside the calls: none waits for it. See `RefusalCounts` for how much that can be. What cannot
    be recorded is counted on, so that neither memory nor disk can be filled.

    What agents report of their own ports is counted apart, so that none of them hides what is refused here.

    Args:
        clock: Aware UTC.
    """

    def __init__(self, log: AuditLog, clock: Callable[[], datetime]) -> None:
        self._log = log
        self._clock = clock
        self._counts = RefusalCounts()
        self._reported = RefusalCounts()
        self._entering = asyncio.Lock()

    def note(self, refusal: Refusal) -> None:
        """Count a call that was not let in."""
        self._counts.note(CALL, refusal, self._clock(), source_of)

    def note_report(self, reporter: Identity, report: Iterable[registry_pb2.RefusedCalls]) -> None:
        """Count what *reporter*, whose certificate says so, tells of its own port."""
        for kind, count in from_proto(report, reporter, self._clock()):
            self._reported.add(replace(kind, where=source_of(kind.where)), count)

    def note_handshakes(self, reason: HandshakeFailure, times: int) -> None:
        """Count handshakes that failed; nobody tells where they came from."""
        now = self._clock()
        self._counts.add(Kind(HANDSHAKE, reason.value, UNKNOWN), Count(times, now, now))

    async def run(self) -> None:
        """Enter what was counted, minute by minute, until cancelled."""
        while True:
            await asyncio.sleep(PAUSE_S)
            await self.enter()

    async def enter(self) -> None:
        """Enter what was counted; what the log does not take is counted on."""
        async with self._entering:
            taken = self._counts.take() | self._reported.take()
            outcomes = await asyncio.gather(
                *(self._log.commit(_deed_of(*each)) for each in taken.items()), return_exceptions=True
            )
            for (kind, count), outcome in zip(taken.items(), outcomes, strict=True):
                if isinstance(outcome, StorageFailed):
                    (self._reported if kind.action == AT_AGENT else self._counts).add(kind, count)
                elif isinstance(outcome, BaseException):
                    raise outcome


def _deed_of(kind: Kind, count: Count) -> Deed:
    detail = {
        "reason": kind.reason,
        "count": str(count.times),
        "first": count.first.isoformat(),
        "last": count.last.isoformat(),
    }
    (method, *others), (source, *elsewhere) = count.methods or ("",), count.sources or ("",)
    if others:
        method, detail["methods"] = "", " ".join(count.methods)
    if elsewhere:
        source, detail["sources"] = "", " ".join(count.sources)
    if kind.action == AT_AGENT:  # by whom it is told: the rest is his word
        detail |= {"method": method} if method else {}
        return Deed(kind.action, kind.reporter or OTHERS, kind.who, source, detail)
    return Deed(kind.action, kind.who, method, source, detail)
