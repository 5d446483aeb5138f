"""Whether something that was measured again and again grows, and how much of that is noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median
from typing import Final

FEWEST: Final = 20  # samples; with fewer there is no telling noise from growth
# Samples close in time are alike, so that they count for a dozen: of a line through a dozen points with
# noise s over a time t, the slope is uncertain by s / t, and three times that is what chance hardly does.
NOISES: Final = 3.0
_MAD: Final = 1.4826  # makes the median deviation of normal noise its standard deviation


@dataclass(frozen=True, slots=True)
class Trend:
    """
    A line through samples.

    Args:
        first, last: Where it begins and ends.
        per_minute: What it gains.
        tolerance: What it may gain per minute and still be flat; None where nobody can tell.
    """

    first: float
    last: float
    per_minute: float
    tolerance: float | None

    @property
    def is_flat(self) -> bool:
        """Whether it gains no more than noise would; what shrinks is flat."""
        return self.tolerance is None or self.per_minute <= self.tolerance


def trend(samples: Sequence[tuple[float, float]], grain: float) -> Trend:
    """
    The trend of *samples*, each a time in minutes and a value.

    The slope is the median of those between any two samples (Theil and Sen), which no
    single jump moves.

    Args:
        grain: What the value moves by at least.
    """
    if len(samples) < FEWEST:
        first, last = (samples[0][1], samples[-1][1]) if samples else (0.0, 0.0)
        return Trend(first, last, 0.0, None)
    slope = median((b - a) / (t - s) for (s, a), (t, b) in combinations(samples, 2) if t > s)
    start = median(value - slope * at for at, value in samples)
    noise = _MAD * median(abs(value - start - slope * at) for at, value in samples)
    begin, end = samples[0][0], samples[-1][0]
    tolerance = max(NOISES * noise, grain) / (end - begin)
    return Trend(start + slope * begin, start + slope * end, slope, tolerance)
