"""What the ledger says of the fleet's certificates, in numbers that fit into a scrape."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final

from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import Ledger, Wanted
from parallax.security.errors import StorageFailed
from parallax.security.identity import Identity

BUCKETS: Final[tuple[tuple[str, timedelta], ...]] = (
    ("1h", timedelta(hours=1)),
    ("1d", timedelta(days=1)),
    ("7d", timedelta(days=7)),
    ("30d", timedelta(days=30)),
    ("later", timedelta.max),
)
SOONEST: Final = 10
INTERVAL: Final = timedelta(seconds=15)
NEVER: Final = datetime.min.replace(tzinfo=UTC)


ITSELF: Final = "itself"  # the issuer of a certificate that is pinned


@dataclass(frozen=True, slots=True)
class Holding:
    """
    What one identity holds that is valid.

    Args:
        not_after: The end of the one that ends last.
        seen: By which issuers those are that have been seen in use.
        issuers: By which issuers they are, seen or not.
        renews: Whether we issued one of them, which takes a holder that asks.
    """

    not_after: datetime
    seen: frozenset[str] = frozenset()
    issuers: frozenset[str] = frozenset()
    renews: bool = False


@dataclass(frozen=True, slots=True)
class Survey:
    """The holdings of everybody at the moment *at*."""

    at: datetime
    holdings: Mapping[Identity, Holding] = field(default_factory=dict)

    def without(self, gone: Callable[[Identity], bool]) -> Survey:
        """The same without those who are *gone*."""
        kept = {who: holding for who, holding in self.holdings.items() if not gone(who)}
        return Survey(self.at, kept)

    @property
    def holders(self) -> frozenset[Identity]:
        """Who was seen with a certificate that is valid."""
        return frozenset(who for who, holding in self.holdings.items() if holding.seen)

    @property
    def issuers(self) -> frozenset[str]:
        """Who signed what is held; not those who signed for themselves, whom no root vouches for."""
        found = frozenset[str]().union(*(holding.issuers for holding in self.holdings.values()))
        return found - {ITSELF}

    def unreplaced(self, old: frozenset[str], new: str) -> frozenset[Identity]:
        """Who holds a certificate of one of the issuers *old*, and has not been seen with one of *new*."""
        return frozenset(
            who for who, each in self.holdings.items() if old & each.issuers and new not in each.seen
        )

    def cannot_renew(self) -> frozenset[Identity]:
        """Who has never been issued a certificate on its own request."""
        return frozenset(who for who, holding in self.holdings.items() if not holding.renews)

    def buckets(self) -> dict[str, int]:
        """How many identities have no certificate longer than so; each in one bucket."""
        counts = dict.fromkeys((name for name, _ in BUCKETS), 0)
        for holding in self.holdings.values():
            left = holding.not_after - self.at
            counts[next(name for name, most in BUCKETS if left <= most)] += 1
        return counts

    def soonest(self) -> list[tuple[Identity, datetime]]:
        """The ten who are without a certificate first, unless they renew."""
        ends = ((holding.not_after, str(who), who) for who, holding in self.holdings.items())
        return [(who, end) for end, _, who in heapq.nsmallest(SOONEST, ends)]


@dataclass(slots=True)
class _Ends:
    """Of one holder and issuer, when the last certificate ends: of all, of those seen, of those asked for."""

    any: datetime = NEVER
    seen: datetime = NEVER
    asked: datetime = NEVER


class Holdings:
    """Who holds what, by what was entered: as much as there are identities, however often they renew."""

    def __init__(self) -> None:
        self._held: dict[Identity, dict[str, _Ends]] = {}

    def enter(self, entry: IssuedCertificate) -> None:
        """Take note of a certificate, in any order, again, and with what is known of it by now."""
        issuer = ITSELF if entry.issuer == entry.key_fingerprint else entry.issuer
        ends = self._held.setdefault(entry.identity, {}).setdefault(issuer, _Ends())
        ends.any = max(ends.any, entry.not_after)
        if entry.seen_at is not None:
            ends.seen = max(ends.seen, entry.not_after)
        if entry.requested_by is not None:
            ends.asked = max(ends.asked, entry.not_after)

    def at(self, now: datetime) -> Survey:
        """What is valid *now*; what has ended is forgotten."""
        holdings: dict[Identity, Holding] = {}
        for who, issuers in list(self._held.items()):
            for issuer in [issuer for issuer, ends in issuers.items() if ends.any < now]:
                del issuers[issuer]
            if not issuers:
                del self._held[who]
                continue
            holdings[who] = Holding(
                max(ends.any for ends in issuers.values()),
                frozenset(issuer for issuer, ends in issuers.items() if ends.seen >= now),
                frozenset(issuers),
                any(ends.asked >= now for ends in issuers.values()),
            )
        return Survey(now, holdings)


class Surveyor:
    """
    Looks at the fleet's certificates, for metrics and for whoever decides by it, as often as they need.

    The ledger is read once. From then on it tells what it enters: read again and again, it would cost ever
    more, for what has been replaced is in it for days.

    Attributes:
        last: What was found last.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], datetime]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._holdings = Holdings()
        self._is_read = False
        self._looked = -math.inf
        self._lock = asyncio.Lock()
        self.last = Survey(clock())
        ledger.follow(self._holdings.enter)

    async def run(self) -> None:
        """Keep `last` up to date until cancelled."""
        while True:
            with suppress(StorageFailed):  # the engine has said what is wrong
                await self.current(INTERVAL)
            await asyncio.sleep(INTERVAL.total_seconds())

    async def current(self, age: timedelta) -> Survey:
        """
        What was found, *age* ago at the most.

        Raises:
            StorageFailed: The ledger cannot be read.
        """
        async with self._lock:
            if not self._is_read:
                await self._read()
            if self._looked < monotonic() - age.total_seconds():
                self.last, self._looked = self._holdings.at(self._clock()), monotonic()
            return self.last

    async def _read(self) -> None:
        wanted, after = Wanted(ends_after=self._clock()), ""
        while not self._is_read:
            entries, after = await self._ledger.page(wanted, after)
            for entry in entries:
                self._holdings.enter(entry)
            self._is_read = not after
