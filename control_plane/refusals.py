"""Refused calls and failed handshakes on their way into the audit log: counted, so that nobody fills it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from parallax.control_plane.audit import AuditLog, Deed
from parallax.runtime.address import host_of
from parallax.runtime.gate import Refusal, name_of
from parallax.runtime.handshake_log import HandshakeFailure
from parallax.security.errors import StorageFailed

PAUSE_S: Final = 60.0  # between two looks: so often a kind is entered at the most
# Kinds that are told apart between two looks: whoever comes from ever new addresses under ever new names
# gets no more entries than that, some 90,000 a day.
MAX_KINDS: Final = 64
MAX_TEXT: Final = 200  # of what a peer chooses

CALL: Final = "call/refused"
HANDSHAKE: Final = "handshake/refused"
UNKNOWN: Final = "unknown"
OTHERS: Final = "others"


@dataclass(frozen=True, slots=True)
class _Kind:
    """What is counted as the same."""

    action: str
    reason: str
    by: str = UNKNOWN
    method: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class _Count:
    times: int
    first: datetime
    last: datetime

    def with_(self, other: _Count) -> _Count:
        """Both together."""
        return _Count(self.times + other.times, min(self.first, other.first), max(self.last, other.last))


class Refusals:
    """
    Counts what is refused by source, identity, reason and method, and enters it once a minute.

    That is beside the calls: none waits for it. What comes after `MAX_KINDS` kinds is counted by reason
    alone, and what cannot be recorded is counted on, so that neither memory nor disk can be filled.

    Args:
        clock: Aware UTC.
    """

    def __init__(self, log: AuditLog, clock: Callable[[], datetime]) -> None:
        self._log = log
        self._clock = clock
        self._counts: dict[_Kind, _Count] = {}
        self._entering = asyncio.Lock()

    def note(self, refusal: Refusal) -> None:
        """Count a call that was not let in."""
        who, source = name_of(refusal.caller), host_of(refusal.source)[:MAX_TEXT]
        self._note(_Kind(CALL, refusal.reason, who, refusal.method[:MAX_TEXT], source), 1)

    def note_handshakes(self, reason: HandshakeFailure, times: int) -> None:
        """Count handshakes that failed; nobody tells where they came from."""
        self._note(_Kind(HANDSHAKE, reason.value), times)

    async def run(self) -> None:
        """Enter what was counted, minute by minute, until cancelled."""
        while True:
            await asyncio.sleep(PAUSE_S)
            await self.enter()

    async def enter(self) -> None:
        """Enter what was counted; what the log does not take is counted on."""
        async with self._entering:
            taken, self._counts = self._counts, {}
            outcomes = await asyncio.gather(
                *(self._log.commit(_deed_of(*each)) for each in taken.items()), return_exceptions=True
            )
            for (kind, count), outcome in zip(taken.items(), outcomes, strict=True):
                if isinstance(outcome, StorageFailed):
                    self._add(kind, count)
                elif isinstance(outcome, BaseException):
                    raise outcome

    def _note(self, kind: _Kind, times: int) -> None:
        now = self._clock()
        self._add(kind, _Count(times, now, now))

    def _add(self, kind: _Kind, count: _Count) -> None:
        if kind not in self._counts and len(self._counts) >= MAX_KINDS:
            kind = replace(kind, by=OTHERS, method="", source="")
        before = self._counts.get(kind)
        self._counts[kind] = before.with_(count) if before else count


def _deed_of(kind: _Kind, count: _Count) -> Deed:
    detail = {
        "reason": kind.reason,
        "count": str(count.times),
        "first": count.first.isoformat(),
        "last": count.last.isoformat(),
    }
    return Deed(kind.action, kind.by, kind.method, kind.source, detail)
