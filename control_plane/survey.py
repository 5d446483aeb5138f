"""What the ledger says of the fleet's certificates: who holds what, and numbers that fit into a scrape."""

from __future__ import annotations

import asyncio
import heapq
import logging
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from time import monotonic
from typing import Final, TypeAlias

from parallax.control_plane.issued import IssuedCertificate
from parallax.control_plane.ledger import RETRY_S, Ledger, Wanted
from parallax.security.errors import StorageFailed, Unavailable
from parallax.security.identity import Identity

logger = logging.getLogger(__name__)

BUCKETS: Final[tuple[tuple[str, timedelta], ...]] = (
    ("1h", timedelta(hours=1)),
    ("1d", timedelta(days=1)),
    ("7d", timedelta(days=7)),
    ("30d", timedelta(days=30)),
)
LATER: Final = "later"
SOONEST: Final = 10
INTERVAL_S: Final = 15.0
REST: Final = 20.0  # after a look at a large fleet, as many times as long as it took
PIECE: Final = 100  # certificates that are counted at once: one to two milliseconds
PAUSE: Final = 3.0  # between two pieces, as many times as long as one took: it is for the calls
PATIENCE_S: Final = 1.0  # how long a question waits for some ten thousand to be counted
NEVER: Final = datetime.min.replace(tzinfo=UTC)
ITSELF: Final = "itself"  # the issuer of a certificate that is pinned


@dataclass(frozen=True, slots=True)
class Ends:
    """When the last certificate of one issuer ends: of all, of those seen, of those that were asked for."""

    issuer: str
    any: datetime
    seen: datetime = NEVER
    asked: datetime = NEVER


Holding: TypeAlias = tuple[Ends, ...]
"""What one identity holds, by issuer; some of it may have ended."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """
    When identities will be without a certificate unless they renew.

    Args:
        buckets: How many have no certificate longer than so; each is in one bucket.
        soonest: The ten that are without one first.
    """

    buckets: Mapping[str, int]
    soonest: tuple[tuple[Identity, datetime], ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """
    The holdings of everybody at the moment *at*; what has ended by then counts for nothing.

    Each answer looks at everybody: for a fleet of a million that is work for a thread.
    """

    at: datetime
    holdings: Mapping[Identity, Holding] = field(default_factory=dict)

    def without(self, gone: Iterable[Identity]) -> Survey:
        """The same without those who are *gone*."""
        kept = dict(self.holdings)
        for who in gone:
            kept.pop(who, None)
        return replace(self, holdings=kept)

    @property
    def holders(self) -> frozenset[Identity]:
        """Who was seen with a certificate that is valid."""
        return self._who(lambda each: each.seen >= self.at)

    @property
    def issuers(self) -> frozenset[str]:
        """Who signed what is held; not those who signed for themselves, whom no root vouches for."""
        held = (each for holding in self.holdings.values() for each in holding)
        return frozenset(each.issuer for each in held if each.any >= self.at) - {ITSELF}

    def unreplaced(self, old: frozenset[str], new: str) -> frozenset[Identity]:
        """Who holds a certificate of one of the issuers *old*, and has not been seen with one of *new*."""
        dependent = self._who(lambda each: each.issuer in old and each.any >= self.at)
        return dependent - self._who(lambda each: each.issuer == new and each.seen >= self.at)

    def cannot_renew(self) -> frozenset[Identity]:
        """Who holds none that was issued on its own request."""
        return self._who(lambda each: each.any >= self.at) - self._who(lambda each: each.asked >= self.at)

    def outlook(self) -> Outlook:
        """When they end."""
        last = {who: end for who, holding in self.holdings.items() if (end := _end_of(holding)) >= self.at}
        names, bounds = [*(name for name, _ in BUCKETS), LATER], [self.at + most for _, most in BUCKETS]
        buckets = dict.fromkeys(names, 0)
        for end in last.values():
            buckets[names[bisect_left(bounds, end)]] += 1
        ends = ((end, str(who), who) for who, end in last.items())
        return Outlook(buckets, tuple((who, end) for end, _, who in heapq.nsmallest(SOONEST, ends)))

    def ended(self) -> dict[Identity, Holding]:
        """Of whom something has ended."""
        return {
            who: holding
            for who, holding in self.holdings.items()
            if any(each.any < self.at for each in holding)
        }

    def _who(self, holds: Callable[[Ends], bool]) -> frozenset[Identity]:
        return frozenset(who for who, holding in self.holdings.items() if any(map(holds, holding)))


class Holdings:
    """
    Who holds what, by what was entered: as much as there are identities, however often they renew.

    Some 400 bytes each. What one holds is a value that is swapped, so that a copy is soon made, and may be
    looked at elsewhere while others enter.
    """

    def __init__(self) -> None:
        self._held: dict[Identity, Holding] = {}

    def __len__(self) -> int:
        """How many identities."""
        return len(self._held)

    def enter(self, entry: IssuedCertificate) -> None:
        """Take note of a certificate, in any order, again, and with what is known of it by now."""
        issuer = ITSELF if entry.issuer == entry.key_fingerprint else sys.intern(entry.issuer)
        end, held = entry.not_after, self._held.get(entry.identity, ())
        new = Ends(
            issuer,
            end,
            end if entry.seen_at is not None else NEVER,
            end if entry.requested_by is not None else NEVER,
        )
        for each in held:
            if each.issuer == issuer:
                new = Ends(
                    issuer, max(each.any, new.any), max(each.seen, new.seen), max(each.asked, new.asked)
                )
        self._held[entry.identity] = (*(each for each in held if each.issuer != issuer), new)

    def at(self, now: datetime) -> Survey:
        """What is held *now*."""
        return Survey(now, dict(self._held))

    def drop(self, ended: Mapping[Identity, Holding], now: datetime) -> None:
        """Forget what has ended *now* of those *ended*, unless they have entered something since."""
        for who, holding in ended.items():
            if self._held.get(who) is holding:
                if kept := tuple(each for each in holding if each.any >= now):
                    self._held[who] = kept
                else:
                    del self._held[who]


class Surveyor:
    """
    Looks at the fleet's certificates, for metrics and for whoever decides by it.

    The ledger is read once, beside the calls, which go first: a million that are valid take a minute. From
    then on it tells what it enters: read again and again, it would cost ever more, for what has been replaced
    is in it for days.

    Attributes:
        last: When certificates end, as it was found last; None: not everything was counted yet.
    """

    def __init__(self, ledger: Ledger, clock: Callable[[], datetime]) -> None:
        self._ledger = ledger
        self._clock = clock
        self._holdings = Holdings()
        self._is_counted = asyncio.Event()
        self.last: Outlook | None = None
        ledger.follow(self._holdings.enter)

    async def run(self) -> None:
        """Count, then keep `last` up to date, until cancelled."""
        while not self._is_counted.is_set():
            try:
                await self.count()
            except StorageFailed:  # the engine has said what is wrong
                await asyncio.sleep(RETRY_S)
        while True:
            begun = monotonic()
            await self._look()
            await asyncio.sleep(max(INTERVAL_S, REST * (monotonic() - begun)))

    async def count(self) -> None:
        """
        Read what is in the ledger, a piece at a time.

        Raises:
            StorageFailed: It cannot be read; again, it begins anew.
        """
        wanted, after, count, started = Wanted(ends_after=self._clock()), "", 0, monotonic()
        while True:
            begun = monotonic()
            entries, after = await self._ledger.page(wanted, after, PIECE)
            for entry in entries:
                self._holdings.enter(entry)
            count += len(entries)
            if not after:
                break
            await asyncio.sleep(PAUSE * (monotonic() - begun))
        self._is_counted.set()
        logger.info(
            "ledger counted",
            extra={
                "certificates": count,
                "identities": len(self._holdings),
                "seconds": round(monotonic() - started, 1),
            },
        )

    async def current(self) -> Survey:
        """
        Who holds what.

        Raises:
            Unavailable: It is still being counted: whoever goes by what is known so far goes by too little.
        """
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._is_counted.wait()
        except TimeoutError:
            raise Unavailable(
                "the certificates in the ledger are still being counted, which takes up to a minute for each "
                "million after a start: try again",
                retry_after=timedelta(seconds=5),
            ) from None
        return self._holdings.at(self._clock())

    async def _look(self) -> None:
        survey = self._holdings.at(self._clock())
        self.last = await asyncio.to_thread(survey.outlook)
        self._holdings.drop(await asyncio.to_thread(survey.ended), survey.at)


def _end_of(holding: Holding) -> datetime:
    """When the last of it ends."""
    return max(each.any for each in holding)
