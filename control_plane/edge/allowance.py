"""How often somebody may do something: so much at once, then so much per second."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from ipaddress import IPv6Address, ip_network
from typing import Final

from parallax.security.errors import Unavailable

MAX_SOURCES: Final = 10_000


@dataclass(frozen=True, slots=True)
class Rate:
    """So many at once, then so many more in each second."""

    burst: float
    per_s: float


@dataclass(frozen=True, slots=True)
class Limits:
    """
    How often newcomers may ask.

    Nobody finds a token by guessing; what is limited is the work, and the lines in a log.

    Attributes:
        refusals: Of one source, by its token: then it is not even looked at.
        requests: Of one source.
        everybody: Of all sources; one processor issues about as many.
    """

    refusals: Rate = Rate(30, 0.5)
    requests: Rate = Rate(100, 20)
    everybody: Rate = Rate(1_000, 300)


@dataclass(slots=True)
class _Bucket:
    left: float
    at: float


class Allowance:
    """
    Counts by source, as a bucket that fills up again (a token bucket).

    Of more than 10,000 sources, those that were not here for longest are forgotten, and have all again.
    """

    def __init__(self, rate: Rate) -> None:
        self._burst = rate.burst
        self._per_s = rate.per_s
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()  # least recent first

    def check(self, source: str, now: float) -> None:
        """
        Pass if *source* has one left.

        Args:
            now: Seconds, of a clock that does not go back.

        Raises:
            Unavailable: It has none; when it will.
        """
        bucket = self._buckets.get(source)
        left = self._left(bucket, now) if bucket is not None else self._burst
        if left < 1:
            wait = timedelta(seconds=(1 - left) / self._per_s)
            raise Unavailable("too many requests; try again later", retry_after=wait)

    def spend(self, source: str, now: float) -> None:
        """Have *source* use one up, if it has one."""
        bucket = self._buckets.pop(source, None) or _Bucket(self._burst, now)
        bucket.left, bucket.at = max(self._left(bucket, now) - 1, 0.0), now
        self._buckets[source] = bucket
        if len(self._buckets) > MAX_SOURCES:
            self._buckets.popitem(last=False)

    def take(self, source: str, now: float) -> None:
        """Have *source* use one up; raises Unavailable as `check` does."""
        self.check(source, now)
        self.spend(source, now)

    def _left(self, bucket: _Bucket, now: float) -> float:
        return min(bucket.left + (now - bucket.at) * self._per_s, self._burst)


def source_of(host: str) -> str:
    """Whom *host* stands for: of IPv6 a /64, for one subscriber has all addresses in it."""
    try:
        address = IPv6Address(host)
    except ValueError:
        return host
    mapped = address.ipv4_mapped
    return str(mapped) if mapped else str(ip_network((address, 64), strict=False))
