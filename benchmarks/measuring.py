"""What the numbers of a benchmark mean: cells, medians, ratios, targets. Pure: nothing is timed here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

LINK: Final = "control_plane_link"
RAW: Final = "raw_unary"
NATS: Final = "nats_request"
DIRECT_LINK: Final = "direct_link"
DIRECT_UNARY: Final = "direct_unary"


@dataclass(frozen=True, slots=True)
class Cell:
    """
    One subject in one round with so many tasks in flight.

    Args:
        seconds: How long the measured window was.
        tasks: How many answers came back in it.
        p50_ms, p99_ms: From asking to having the answer; NaN where no answer came.
        cpu_s: User and system time of all the subject's processes in the window.
        rss_bytes: Resident memory of all of them: the larger of the sums at its two ends.
    """

    subject: str
    in_flight: int
    round: int
    seconds: float
    tasks: int
    p50_ms: float
    p99_ms: float
    cpu_s: float
    rss_bytes: int

    @property
    def rate(self) -> float:
        """Tasks per second."""
        return self.tasks / self.seconds if self.seconds else math.nan

    @property
    def cpu_per_1000(self) -> float:
        """CPU seconds per 1,000 tasks."""
        return 1000 * self.cpu_s / self.tasks if self.tasks else math.nan


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some numbers, and how far they range."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, numbers: Iterable[float]) -> Spread:
        """Of those that are numbers; NaN where none is."""
        known = [number for number in numbers if not math.isnan(number)]
        if not known:
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.median(known), min(known), max(known))


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The smallest of *ordered* that at least *fraction* of them do not exceed; NaN of none."""
    return ordered[max(0, math.ceil(fraction * len(ordered)) - 1)] if ordered else math.nan


class Verdict(StrEnum):
    """What a target came to."""

    MET = "met"
    MISSED = "missed"
    UNKNOWN = "not measured"


@dataclass(frozen=True, slots=True)
class Target:
    """
    How one subject should compare with another.

    Args:
        value: What is compared, of a cell.
        limit: The ratio aimed at: *subject*'s value by *baseline*'s.
        at_least: Whether *limit* is the least allowed; else it is the most.
    """

    text: str
    subject: str
    baseline: str
    in_flight: int
    value: Callable[[Cell], float]
    limit: float
    at_least: bool = False

    def verdict(self, ratio: float) -> Verdict:
        """Whether *ratio* meets it."""
        if math.isnan(ratio):
            return Verdict.UNKNOWN
        is_met = ratio >= self.limit if self.at_least else ratio <= self.limit
        return Verdict.MET if is_met else Verdict.MISSED


def _rate(cell: Cell) -> float:
    return cell.rate


def _cpu(cell: Cell) -> float:
    return cell.cpu_per_1000


def _p50(cell: Cell) -> float:
    return cell.p50_ms


TARGETS: Final = (
    Target("CPU, link / raw unary", LINK, RAW, 64, _cpu, 1 / 5),
    Target("CPU, link / NATS", LINK, NATS, 64, _cpu, 1.0),
    Target("tasks/s, link / raw unary", LINK, RAW, 64, _rate, 4.0, at_least=True),
    Target("p50, link / raw unary", LINK, RAW, 1, _p50, 1.7),
    Target("CPU, direct link / raw unary", DIRECT_LINK, RAW, 64, _cpu, 1 / 8),
    Target("CPU, direct unary / raw unary", DIRECT_UNARY, RAW, 64, _cpu, 1.1),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a target came to: the ratios of the rounds, and whether their median meets it."""

    target: Target
    ratio: Spread
    verdict: Verdict


def summarize(cells: Iterable[Cell]) -> dict[tuple[str, int], list[Cell]]:
    """The rounds of every subject and number in flight, in the order in which they came."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.subject, cell.in_flight), []).append(cell)
    return groups


def findings(cells: Iterable[Cell], targets: Iterable[Target] = TARGETS) -> list[Finding]:
    """
    What every target came to.

    A ratio is taken within one round, where both subjects met much the same machine; the median of these
    ratios decides. A round that lacks one of the two counts for nothing.
    """
    known = {(cell.subject, cell.in_flight, cell.round): cell for cell in cells}
    rounds = sorted({number for *_, number in known})
    found = []
    for target in targets:
        ratios = []
        for number in rounds:
            subject = known.get((target.subject, target.in_flight, number))
            baseline = known.get((target.baseline, target.in_flight, number))
            if subject and baseline:
                ratios.append(_ratio(target.value(subject), target.value(baseline)))
        ratio = Spread.of(ratios)
        found.append(Finding(target, ratio, target.verdict(ratio.median)))
    return found


def _ratio(value: float, by: float) -> float:
    return value / by if by else math.nan
