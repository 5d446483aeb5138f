"""What the ledger says of the fleet's certificates, in numbers that fit into a scrape."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
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

    @property
    def holders(self) -> frozenset[Identity]:
        """Who was seen with a certificate that is valid."""
        return frozenset(who for who, holding in self.holdings.items() if holding.seen)

    @property
    def issuers(self) -> frozenset[str]:
        """Who signed what is held."""
        return frozenset().union(*(holding.issuers for holding in self.holdings.values()))

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


def add(holdings: dict[Identity, Holding], entries: Iterable[IssuedCertificate]) -> None:
    """Enter *entries*, all of them valid, into *holdings*."""
    for entry in entries:
        before = holdings.get(entry.identity) or Holding(entry.not_after)
        issuer = frozenset({entry.issuer})
        holdings[entry.identity] = Holding(
            max(before.not_after, entry.not_after),
            before.seen | issuer if entry.seen_at else before.seen,
            before.issuers | issuer,
            before.renews or entry.requested_by is not None,
        )


class Surveyor:
    """
    Looks through the ledger, for metrics and for whoever decides by it; never oftener than they need.

    Attributes:
        last: What was found last.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], datetime]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._looked = -math.inf
        self._lock = asyncio.Lock()
        self.last = Survey(clock())

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
        asked = monotonic()
        async with self._lock:
            if self._looked < asked - age.total_seconds():
                began, now = monotonic(), self._clock()
                self.last, self._looked = await self._survey(now), began
            return self.last

    async def _survey(self, now: datetime) -> Survey:
        holdings: dict[Identity, Holding] = {}
        wanted, after = Wanted(ends_after=now), ""
        while True:
            entries, after = await self._ledger.page(wanted, after)
            add(holdings, entries)
            if not after:
                return Survey(now, holdings)
